"""A PyTorch model as it will compute at given precisions: weights and activations rounded as the runtimes round them, arithmetic in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from edgesdk.native.formats import bits_and_group, is_native, name_of

if TYPE_CHECKING:
    import torch

    from edgesdk.graph.types import ModelGraph
    from edgesdk.model import ModelSpec

Ranges = dict[str, tuple[float, float]]
"""Weight name → least and largest input its module met."""


def round_weight(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """Symmetric: int8 a channel (dim 0), or int4 a channel and group of 32 along the reduction, as XNNPACK holds it: a scale of a 7.5th of
    the largest, in bfloat16, the codes those of the scale before it was rounded. Same shape and dtype."""
    import torch

    flat = weight.reshape(weight.shape[0], -1)
    if form := bits_and_group(precision):
        return _on_our_kernels(flat, *form).reshape(weight.shape)
    if precision == "int4-g32":
        groups = flat.reshape(flat.shape[0], -1, 32)
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7.5
        codes = torch.clamp(torch.round(groups * (1.0 / scale)), -8, 7)  # a product, as torchao has it: the largest lie between two codes
        return (codes * scale.to(torch.bfloat16).to(weight.dtype)).reshape(weight.shape)
    if precision.startswith("int8"):
        scale = flat.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127.0
        return (torch.clamp(torch.round(flat / scale), -127, 127) * scale).reshape(weight.shape)
    return weight.half().float() if precision == "fp16" else weight


def _on_our_kernels(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """As the kernels hold it. What is such a grid already, as a compressed weight is, comes back all but as it was."""
    import torch

    from edgesdk.kernels.nearest import nearest
    from edgesdk.packed import decode

    return torch.from_numpy(decode(nearest(weight.numpy(), bits, group, True))).to(weight.dtype)


def _round_dynamic(x: torch.Tensor) -> torch.Tensor:
    """int8 with its own range for each row of the last dimension, zero among its values, as XNNPACK and LiteRT have it."""
    import torch

    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(1e-12) / 255.0
    zero = -128 - torch.round(low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale


def _round_static(x: torch.Tensor, limits: tuple[float, float]) -> torch.Tensor:
    """int8 with one fixed range for the tensor, zero included."""
    import torch

    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    scale = max(high - low, 1e-12) / 255.0
    zero = round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


def _weighted(spec: ModelSpec, graph: ModelGraph) -> Iterator[tuple[str, str, Any, Any]]:
    """(method, weight name, parameter, module) of every unit with a weight; None where the weight is not its module's own."""
    for method in graph.methods:
        root = spec.methods[method.name].module
        for unit in method.units:
            if unit.weight and unit.weight_elements:
                path = unit.weight.rpartition(".")[0]
                try:
                    module = root.get_submodule(path)
                except AttributeError:
                    continue
                yield method.name, unit.weight, getattr(module, unit.weight.rpartition(".")[2], None), module


@contextmanager
def quantized(spec: ModelSpec, graph: ModelGraph, choice: Mapping[str, str], ranges: Ranges) -> Iterator[None]:
    """Within it, `spec`'s own modules compute as if each weight had the precision `choice` names; afterwards they are as before."""
    import torch

    with ExitStack() as undo, torch.no_grad():
        seen: set[int] = set()
        hooked: set[int] = set()
        for _, name, parameter, module in _weighted(spec, graph):
            precision = choice.get(name, "fp32")
            if precision in ("fp32", "as-is") or parameter is None:
                continue
            stored = spec.codes.get(name)
            as_stored = stored is not None and is_native(precision) and name_of(stored) == precision
            if parameter.data_ptr() not in seen and not as_stored:
                seen.add(parameter.data_ptr())
                before = parameter.data.clone()
                undo.callback(parameter.data.copy_, before)
                parameter.data.copy_(round_weight(before, precision))
            if id(module) not in hooked and not isinstance(module, torch.nn.Embedding):
                hooked.add(id(module))
                undo.callback(round_inputs(module, precision, ranges.get(name)).remove)
        yield


def round_inputs(module: Any, precision: str, limits: tuple[float, float] | None) -> Any:
    """A hook that rounds a module's first input as `precision` does; `limits` is its range for static int8. `.remove()` takes it off again."""

    def before(_: Any, inputs: tuple[Any, ...]) -> Any:
        x = inputs[0]
        if precision == "int8-static" and limits is not None:
            x = _round_static(x, limits)
        elif precision in ("int8-dynamic", "int4-g32") or is_native(precision):
            x = _round_dynamic(x)
        return (x, *inputs[1:])

    return module.register_forward_pre_hook(before)


def samples(spec: ModelSpec, method: str, most: int) -> list[tuple[Any, ...]]:
    """At most `most` input tuples of a method, spread over the calibration data; the example inputs where there is none."""
    found = list(spec.calibration(method)) if spec.calibration else [spec.methods[method].example_inputs]
    return found[:: max(1, len(found) // most)][:most]


def observe(spec: ModelSpec, graph: ModelGraph, most: int = 32) -> Ranges:
    """The input range of every weighted module over the calibration data."""
    import torch

    ranges: Ranges = {}
    with ExitStack() as undo, torch.no_grad():
        for _, name, _, module in _weighted(spec, graph):

            def note(_: Any, inputs: tuple[Any, ...], name: str = name) -> None:
                if inputs and inputs[0].is_floating_point():
                    low, high = ranges.get(name, (0.0, 0.0))
                    ranges[name] = (min(low, float(inputs[0].min())), max(high, float(inputs[0].max())))

            undo.callback(module.register_forward_pre_hook(note).remove)
        for method, entry in spec.methods.items():
            for sample in samples(spec, method, most):
                entry.module(*sample)
    return ranges


def run(spec: ModelSpec) -> Any:
    """`run(method, arrays) -> arrays` over the modules as they are now, for `spec.evaluate`."""
    import numpy as np
    import torch

    def call(method: str, inputs: Any) -> list[Any]:
        with torch.no_grad():
            out = spec.methods[method].module(*(torch.from_numpy(np.ascontiguousarray(i)) for i in inputs))
        return [o.numpy() for o in (out if isinstance(out, tuple | list) else (out,))]

    return call
