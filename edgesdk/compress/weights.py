"""The weights of a model that can be compressed, statistics of their inputs, and errors measured with them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgesdk.compress.types import Stats, Step, Weight
from edgesdk.errors import InputError

if TYPE_CHECKING:
    import torch

    from edgesdk.graph.types import Op
    from edgesdk.model import ModelSpec

TOKENS = 8
"""Calls that read one token tell so many times less than others."""


def holders(spec: ModelSpec) -> dict[str, list[tuple[str, str, Any]]]:
    """Weight name → the modules that hold it, as (method, path, module); a parameter shared under several names is listed under the first.

    Linear, Conv1d, Conv2d and Embedding modules are looked at. A linear's name goes before an embedding's that it is tied to.
    """
    from torch import nn

    found: list[tuple[str, str, Any]] = []
    for method, entry in spec.methods.items():
        for path, module in entry.module.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding) and isinstance(module.weight, nn.Parameter):
                found.append((method, path, module))
    found.sort(key=lambda h: isinstance(h[2], nn.Embedding))
    names: dict[int, str] = {}
    answer: dict[str, list[tuple[str, str, Any]]] = {}
    for method, path, module in found:
        name = names.setdefault(id(module.weight), f"{path}.weight" if path else "weight")
        answer.setdefault(name, []).append((method, path, module))
    return answer


def _op(module: Any) -> Op:
    from torch import nn

    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv1d):
        return "conv1d"
    return "depthwise_conv2d" if module.groups == module.in_channels and module.groups > 1 else "conv2d"


def weights_of(spec: ModelSpec) -> dict[str, Weight]:
    """Every compressible weight, in the model's order. Raises `InputError` for one that holds NaN or infinity."""
    import torch

    answer = {}
    for name, uses in holders(spec).items():
        module = uses[0][2]
        matrix = module.weight.detach().to(torch.float32).reshape(module.weight.shape[0], -1).clone()
        if not bool(torch.isfinite(matrix).all()):
            raise InputError(f"{spec.name}: {name} holds NaN or infinite values", "train or load the model again; nothing was compressed")
        others = {_op(m) for _, _, m in uses[1:]} - {_op(module)}
        answer[name] = Weight(name, _op(module), tuple(module.weight.shape), matrix, getattr(module, "groups", 1), tuple(sorted(others)))
    return answer


def need_finite(spec: ModelSpec) -> None:
    """Raises `InputError` where a parameter of the model is NaN or infinite."""
    import torch

    for entry in spec.methods.values():
        for name, value in entry.module.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise InputError(
                    f"{spec.name}: {name} holds NaN or infinite values", "train or load the model again; nothing was compressed"
                )


def careful(spec: ModelSpec) -> ModelSpec:
    """The same model with calibration inputs that are made once; `InputError` where there are none, too few in one, or NaN, as they are asked for."""
    import torch

    if spec.calibration is None:
        return spec
    made = spec.calibration

    @functools.cache
    def calibration(method: str) -> Sequence[tuple[Any, ...]]:
        found, wanted = list(made(method)), len(spec.methods[method].example_inputs)
        if not found:
            raise InputError(f"{spec.name}: its calibration function gives no inputs for {method}", "let it give at least 2, better 64")
        for i, sample in enumerate(found):
            if len(sample) != wanted:
                raise InputError(f"{spec.name}: calibration input {i} of {method} has {len(sample)} tensors", f"{method} takes {wanted}")
            if any(x.is_floating_point() and not bool(torch.isfinite(x).all()) for x in sample):
                raise InputError(
                    f"{spec.name}: calibration input {i} of {method} holds NaN or infinite values", "leave it out, or correct it"
                )
        return found

    return replace(spec, calibration=calibration)


@contextmanager
def suited_threads(spec: ModelSpec) -> Iterator[None]:
    """Within it torch uses one thread where no parameter is large: many small operators run slower on several, far slower on a busy machine."""
    from edgesdk.plan.harm import one_thread

    sizes = (p.numel() for e in spec.methods.values() for p in e.module.parameters())
    if max(sizes, default=0) < 1_000_000:
        with one_thread():
            yield
    else:
        yield


def set_weight(spec: ModelSpec, name: str, matrix: torch.Tensor) -> None:
    """Put a matrix [rows, cols] into every module that holds the weight, in place."""
    import torch

    with torch.no_grad():
        for _, _, module in holders(spec)[name]:
            module.weight.copy_(matrix.reshape(module.weight.shape).to(module.weight.dtype))


@contextmanager
def replaced(spec: ModelSpec, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within it the named weights have other values [rows, cols]; afterwards they are as before."""
    import torch

    held = holders(spec)
    with ExitStack() as undo, torch.no_grad():
        for name, matrix in values.items():
            parameter = held[name][0][2].weight
            before = parameter.detach().clone()
            undo.callback(parameter.data.copy_, before)
            parameter.data.copy_(matrix.reshape(parameter.shape))
        yield


def rows_in(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A module's input as [groups, positions, cols]."""
    import torch
    from torch import nn

    if isinstance(module, nn.Linear):
        return x.detach().reshape(1, -1, module.in_features).to(torch.float64)
    x = x.detach().to(torch.float64)
    if isinstance(module, nn.Conv1d):
        x, kernel, stride, pad, dilation = (
            x[..., None, :],
            (1, *module.kernel_size),
            (1, *module.stride),
            module.padding,
            (1, *module.dilation),
        )
        pad = (0, *pad) if not isinstance(pad, str) else pad
    else:
        kernel, stride, pad, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    if isinstance(pad, str):
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)] if pad == "same" else [0, 0]
        x = nn.functional.pad(x, (spans[1] // 2, spans[1] - spans[1] // 2, spans[0] // 2, spans[0] - spans[0] // 2))
        pad = (0, 0)
    x = x if x.dim() == 4 else x[None]
    patches = nn.functional.unfold(x, kernel, dilation=dilation, padding=pad, stride=stride)  # [batch, channels · kernel, positions]
    patches = patches.reshape(patches.shape[0], module.groups, -1, patches.shape[2])
    return patches.permute(1, 0, 3, 2).reshape(module.groups, -1, patches.shape[2])


class _Sums:
    def __init__(self) -> None:
        self.count = 0
        self.gram: Any = None
        self.mean: Any = None
        self.absmax: Any = None

    def add(self, x: Any) -> None:
        gram, mean, most = x.transpose(1, 2) @ x, x.sum((0, 1)), x.abs().amax((0, 1))
        self.count += x.shape[1]
        self.gram = gram if self.gram is None else self.gram + gram
        self.mean = mean if self.mean is None else self.mean + mean
        self.absmax = most if self.absmax is None else self.absmax.maximum(most)


TOKENS = 8


def need_data(spec: ModelSpec) -> None:
    """Raises `InputError` where a model has no calibration data."""
    if spec.calibration is None:
        raise InputError(
            f"{spec.name} has no calibration data", "give the model a calibration function, or use a method that needs no data"
        )


def stats_of(spec: ModelSpec, *, gradients: bool = False, most: int = 64, step: Step | None = None) -> dict[str, Stats]:
    """Statistics of the inputs of every linear and convolution weight over at most `most` calibration samples a method (`TOKENS` times as many
    where a call reads one token).

    Raises `InputError` when the model has no calibration data (its example inputs alone would fit any weight to one case).
    """
    import torch
    from torch import nn

    from edgesdk.plan.fake_quant import samples

    need_data(spec)
    sums: dict[str, _Sums] = {}
    with ExitStack() as undo, torch.no_grad():
        for name, uses in holders(spec).items():
            for _, _, module in uses:
                if isinstance(module, nn.Embedding):
                    continue

                def note(m: Any, inputs: tuple[Any, ...], name: str = name) -> None:
                    sums.setdefault(name, _Sums()).add(rows_in(m, inputs[0]))

                undo.callback(module.register_forward_pre_hook(note).remove)
        for i, (method, entry) in enumerate(spec.methods.items()):
            if step:
                step(f"statistics of {method}", i / len(spec.methods))
            for sample in samples(spec, method, most * (TOKENS if entry.example_inputs[0].numel() == 1 else 1)):
                entry.module(*sample)
    fisher = fisher_of(spec, most) if gradients else {}
    return {
        name: Stats(
            s.count, s.gram / max(1, s.count), (s.mean / max(1, s.count * len(s.gram))).float(), s.absmax.float(), fisher.get(name)
        )
        for name, s in sums.items() if s.gram is not None
    }  # fmt: skip


def fisher_of(spec: ModelSpec, most: int = 64) -> dict[str, torch.Tensor]:
    """Mean squared gradient of random projections of a method's float outputs: the diagonal of JᵀJ, in expectation."""
    import torch

    from edgesdk.plan.fake_quant import samples

    held = {name: uses[0][2].weight for name, uses in holders(spec).items()}
    total = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in held.items()}
    before = {name: w.requires_grad for name, w in held.items()}
    generator, count = torch.Generator().manual_seed(0), 0
    for w in held.values():
        w.requires_grad_(True)
    try:
        for method, entry in spec.methods.items():
            for sample in samples(spec, method, min(most, 16)):
                with torch.enable_grad():
                    out = entry.module(*sample)
                    floats = [o for o in (out if isinstance(out, tuple | list) else (out,)) if o.is_floating_point() and o.requires_grad]
                    if not floats:
                        continue
                    loss = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in floats)
                    grads = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
                count += 1
                for name, g in zip(held, grads, strict=True):
                    if g is not None:
                        total[name] += g.detach() ** 2
    finally:
        for name, w in held.items():
            w.requires_grad_(before[name])
    return {name: (t / max(1, count)).reshape(t.shape[0], -1) for name, t in total.items()}


def output_error(weight: Weight, decoded: torch.Tensor, stats: Stats | None) -> float:
    """Relative squared error: of the outputs over the calibration inputs where `stats` are given, of the weights where not. 0 is exact."""
    import torch

    w, d = weight.matrix.double(), (decoded.double() - weight.matrix.double())
    if stats is None:
        return float((d * d).sum() / (w * w).sum().clamp_min(1e-30))
    groups = stats.gram.shape[0]
    w, d = w.reshape(groups, -1, weight.cols), d.reshape(groups, -1, weight.cols)
    return float(torch.einsum("gri,gij,grj->", d, stats.gram, d) / torch.einsum("gri,gij,grj->", w, stats.gram, w).clamp_min(1e-30))
