"""How much a weight matters: what predicts the loss of an option when it is multiplied with the option's own error.

Sources: "fisher" and "interaction": second-order sensitivity, and with it what neighbouring layers do to each other (Augmenting Hessians with
Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization). "change" and "zscore": how much a layer changes its input, and how many
of its weights stand far out; the latter needs no data (Layer-Wise Quantization, both scores).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from edgesdk.compress.weights import holders, replaced, stats_of, weights_of
from edgesdk.errors import UnknownName

if TYPE_CHECKING:
    from edgesdk.compress.loss import Loss
    from edgesdk.compress.table import OptionRow, Options
    from edgesdk.compress.types import Step
    from edgesdk.model import ModelSpec

SCORES = ("loss", "interaction", "fisher", "change", "zscore", "uniform")


def scores(kind: str, options: Options, probes: Mapping[str, OptionRow], loss: Callable[[], Loss], step: Step) -> dict[str, float]:
    """Weight → factor of its options' errors. `probes`: the smallest option of each weight. Raises `UnknownName`, `InputError`."""
    spec = options.spec
    if kind == "interaction":
        return _interaction(options, probes, loss(), step)
    if kind == "fisher":
        return _fisher(options, probes)
    if kind == "change":
        return _change(spec)
    if kind == "zscore":
        return zscores(spec)
    if kind == "uniform":
        return {n: float(w.matrix.numel()) for n, w in weights_of(spec).items()}
    raise UnknownName("score", kind, SCORES)


def _interaction(options: Options, probes: Mapping[str, OptionRow], measure: Loss, step: Step) -> dict[str, float]:
    """(loss of the probe alone + half of what it adds or spares together with each neighbour) / its error."""
    spec, names = options.spec, list(probes)
    alone: dict[str, float] = {}
    both: dict[tuple[str, str], float] = {}
    for i, name in enumerate(names):
        step(f"sensitivity of {name} and its neighbour", 0.6 + 0.3 * i / len(names))
        with replaced(spec, {name: options.value(probes[name])}):
            alone[name] = measure(spec)
        if i:
            pair = (names[i - 1], name)
            with replaced(spec, {n: options.value(probes[n]) for n in pair}):
                both[pair] = measure(spec)
    found = {}
    for name in names:
        shared = sum(both[p] - alone[p[0]] - alone[p[1]] for p in both if name in p)
        found[name] = max(alone[name] + 0.5 * shared, 0.1 * alone[name]) / max(probes[name].error, 1e-30)
    return found


def _fisher(options: Options, probes: Mapping[str, OptionRow]) -> dict[str, float]:
    """Σ fisher · (w - probe)² / the probe's error: the second-order loss of the probe, by the diagonal."""
    found, weights = {}, weights_of(options.spec)
    for name, seen in stats_of(options.spec, gradients=True).items():
        if seen.fisher is not None and name in probes:
            d = options.value(probes[name]) - weights[name].matrix
            found[name] = float((seen.fisher * d * d).double().sum()) / max(probes[name].error, 1e-30)
    most = max(found.values(), default=1.0)
    return {n: found.get(n, most) for n in probes}


def _change(spec: ModelSpec) -> dict[str, float]:
    """1 - cos(input, output) of the smallest block around a weight that gives back what it takes in shape, over calibration inputs."""
    import torch

    from edgesdk.plan.fake_quant import samples

    seen: dict[int, list[float]] = {}
    hooks = []

    def note(module: torch.nn.Module, inputs: tuple[object, ...], out: object) -> None:
        x = inputs[0] if inputs else None
        y = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.shape == y.shape and x.is_floating_point():
            alike = torch.nn.functional.cosine_similarity(x.flatten().double(), y.flatten().double(), 0)
            seen.setdefault(id(module), []).append(1 - float(alike))

    for entry in spec.methods.values():
        hooks += [m.register_forward_hook(note) for m in entry.module.modules()]
    try:
        with torch.no_grad():
            for method, entry in spec.methods.items():
                for sample in samples(spec, method, 8):
                    entry.module(*sample)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, uses in holders(spec).items():
        method, path, _ = uses[0]
        parts = path.split(".") if path else []
        around = [spec.methods[method].module.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)]
        values = next((seen[id(m)] for m in around if id(m) in seen), [1.0])
        found[name] = sum(values) / len(values)
    return found


def zscores(spec: ModelSpec, beyond: float = 1.0) -> dict[str, float]:
    """The share of a weight's entries more than `beyond` standard deviations above its mean."""
    found = {}
    for name, weight in weights_of(spec).items():
        m = weight.matrix
        found[name] = float(((m - m.mean()) / m.std(unbiased=False).clamp_min(1e-12) > beyond).double().mean())
    return found
