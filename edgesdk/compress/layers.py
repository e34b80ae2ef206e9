"""What the methods that look at activations share: the inputs of layers, which layers share one, what makes them, and how they are rounded."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgesdk.compress.rtn import RtnConfig, grid_of
from edgesdk.compress.weights import holders, rows_in
from edgesdk.errors import InputError
from edgesdk.plan.fake_quant import samples

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

Layer = nn.Linear | nn.Conv1d | nn.Conv2d


def layers_of(spec: ModelSpec) -> dict[str, Any]:
    """Weight name → the first module that holds it: every Linear and every convolution without groups."""
    found = {name: uses[0][2] for name, uses in holders(spec).items()}
    return {n: m for n, m in found.items() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv1d | nn.Conv2d) and m.groups == 1)}


def need_calibration(spec: ModelSpec) -> str | None:
    return None if spec.calibration else "it has no calibration data"


def inputs_of(spec: ModelSpec, rows: int = 256, most: int = 16) -> dict[str, torch.Tensor]:
    """Weight name → at most `rows` of the rows [rows, cols] that its matrix is multiplied with, spread over at most `most` samples a method."""
    found: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as undo, torch.no_grad():
        for name, module in layers_of(spec).items():

            def note(m: Any, inputs: tuple[Any, ...], name: str = name) -> None:
                x = rows_in(m, inputs[0])[0].float()
                found.setdefault(name, []).append(x[:: max(1, len(x) // max(4, rows // most))])

            undo.callback(module.register_forward_pre_hook(note).remove)
        for method, entry in spec.methods.items():
            for sample in samples(spec, method, most):
                entry.module(*sample)
    whole = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: x[torch.linspace(0, len(x) - 1, min(rows, len(x))).long()] for name, x in whole.items()}


def round_rows(x: torch.Tensor, bits: int, share: float = 1.0) -> torch.Tensor:
    """Every row of the last dimension on 2^bits points of its own range (zero included), `share` of which is kept; 0 bits: as it is."""
    if not bits:
        return x
    low, high = x.amin(-1, keepdim=True).clamp_max(0) * share, x.amax(-1, keepdim=True).clamp_min(0) * share
    scale = (high - low).clamp_min(1e-12) / (2**bits - 1)
    zero = torch.round(-low / scale)
    points: torch.Tensor = torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1) - zero
    answer: torch.Tensor = points * scale
    return answer


def round_matrix(matrix: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """A weight to nearest, as rtn does it; 0 bits: as it is."""
    if not bits:
        return matrix
    scale, _ = grid_of(matrix, RtnConfig(bits=bits, group=group))
    s = scale.repeat_interleave(group or matrix.shape[1], 1)[:, : matrix.shape[1]]
    top = 2 ** (bits - 1) - 1
    return torch.clamp(torch.round(matrix / s), -top, top) * s


def lost(x: torch.Tensor, matrix: torch.Tensor, seen: torch.Tensor, made: torch.Tensor) -> float:
    """Mean squared error of the outputs seen @ madeᵀ against x @ matrixᵀ."""
    return float(((seen @ made.T - x @ matrix.T) ** 2).mean())


# ---- who makes the inputs


@dataclass
class Pair:
    """Layers (weight names) that read the same tensor, channel by channel what `producer` makes."""

    readers: list[str]
    producer: Any
    name: str


def _channels(module: Any) -> int:
    """How many channels a module makes that a scale can be folded into; 0: none."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.out_channels
    own = list(module.parameters(recurse=False))
    return len(own[0]) if own and all(p.dim() == 1 and p.shape == own[0].shape for p in own) else 0


def reads(module: Any) -> int:
    return module.in_features if isinstance(module, nn.Linear) else int(module.in_channels)


def rescale(module: Any, by: torch.Tensor, reader: bool) -> None:
    """Multiply what a producer makes, or what a reader reads, channel by channel, in place."""
    with torch.no_grad():
        if reader:
            module.weight.mul_(by.reshape(1, -1, *[1] * (module.weight.dim() - 2)))
            return
        for own in module.parameters(recurse=False):  # a weight and a bias, or a norm's factors
            own.mul_(by.reshape(-1, *[1] * (own.dim() - 1)))


def _calls(spec: ModelSpec) -> list[list[tuple[str, Any, Any, Any]]]:
    """A method each: (path, module, input, output) of every module of interest in the order they ran, on one sample."""
    runs = []
    for method, entry in spec.methods.items():
        calls: list[tuple[str, Any, Any, Any]] = []
        with ExitStack() as undo, torch.no_grad():
            for path, module in entry.module.named_modules():
                if _channels(module):

                    def note(m: Any, inputs: Any, output: Any, path: str = path, calls: list[Any] = calls) -> None:
                        calls.append((path, m, inputs[0], output))

                    undo.callback(module.register_forward_hook(note).remove)
            entry.module(*samples(spec, method, 1)[0])
        runs.append(calls)
    return runs


def _outputs(spec: ModelSpec, method: str, sample: tuple[Any, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        made = spec.methods[method].module(*sample)
    return [o.double() for o in (made if isinstance(made, tuple | list) else (made,)) if o.is_floating_point()]


def pairs_of(spec: ModelSpec, most: int = 2) -> list[Pair]:
    """Layers with a producer whose channels can be scaled if theirs are scaled back: found by trying it. Nothing is changed.

    Producers are norms, linears and convolutions that ran before; where scaling both leaves every method's outputs as they were, all that
    lies between (attention over positions, ReLU, reshapes) passes a positive scale on.
    """
    names = {id(m): n for n, m in layers_of(spec).items()}
    shared: dict[str, set[str]] = {}
    before: dict[str, list[tuple[str, Any]]] = {}
    for calls in _calls(spec):
        for i, (_, module, x, _) in enumerate(calls):
            name = names.get(id(module))
            if name is None:
                continue
            same = {names[id(m)] for _, m, y, _ in calls if y is x and id(m) in names}
            joined = set().union(*(shared.get(n, {n}) for n in same))
            for n in joined:
                shared[n] = joined
            made = [c for c in calls[:i] if c[3] is x] + [c for c in reversed(calls[:i]) if c[3] is not x]
            before.setdefault(
                name, [(p, m) for p, m, _, _ in made if _channels(m) == reads(module) and names.get(id(m)) not in same][:most]
            )
    modules = layers_of(spec)
    given = {m: samples(spec, m, 1)[0] for m in spec.methods}
    wanted = {m: _outputs(spec, m, sample) for m, sample in given.items()}
    answer, done = [], set[str]()
    for name in modules:
        readers = sorted(shared.get(name, set()))
        if name in done or not readers or len({reads(modules[n]) for n in readers}) != 1:
            continue
        done |= set(readers)
        for path, producer in before.get(name, []):
            if _passes(spec, [modules[n] for n in readers], producer, given, wanted):
                answer.append(Pair(readers, producer, path))
                break
    return answer


def _passes(spec: ModelSpec, readers: list[Any], producer: Any, given: dict[str, Any], wanted: dict[str, list[torch.Tensor]]) -> bool:
    tried = 2.0 ** torch.randint(-1, 2, (reads(readers[0]),), generator=torch.Generator().manual_seed(0)).float()
    touched = {id(m) for m in (*readers, producer)}
    try:
        rescale(producer, 1 / tried, False)
        for reader in readers:
            rescale(reader, tried, True)
        for method, entry in spec.methods.items():
            if touched & {id(m) for m in entry.module.modules()}:
                for got, want in zip(_outputs(spec, method, given[method]), wanted[method], strict=True):
                    if float((got - want).norm()) > 1e-5 * max(float(want.norm()), 1e-12):
                        return False
    finally:  # powers of two: exactly what they were
        rescale(producer, tried, False)
        for reader in readers:
            rescale(reader, 1 / tried, True)
    return True


def none_found(spec: ModelSpec, only: str) -> InputError:
    return InputError(f"{spec.name}: no layer's name matches only='{only}'", "leave `only` out, or correct it")
