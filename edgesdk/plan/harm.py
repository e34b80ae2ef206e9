"""How much each precision costs in quality: measured with round-tripped weights and activations in PyTorch, kept by content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from edgesdk.noun import Noun, Part

if TYPE_CHECKING:
    from edgesdk.graph.types import ModelGraph
    from edgesdk.model import ModelSpec

LOSSY = ("int8-static", "int8-dynamic", "int8-weight-only", "int4-g32")


class UnitError(Part):
    """Relative output error ‖Δy‖ / ‖y‖ of a unit's own output, averaged over calibration inputs."""

    method: str
    unit: str
    precision: str
    error: float


class Harm(Noun):
    """`drop`: quality lost when every unit takes one precision. A unit's part of it goes with its squared output error."""

    KIND: ClassVar[str] = "harm"

    quality: float | None
    drop: dict[str, float]
    errors: tuple[UnitError, ...]

    def of(self, method: str, unit: str, precision: str) -> float | None:
        """Predicted quality drop of one unit in one precision; None when quality cannot be measured."""
        if precision in ("fp32", "as-is", "fp16"):
            return 0.0
        if precision not in self.drop:
            return None
        same = [e for e in self.errors if e.precision == precision]
        whole = sum(e.error**2 for e in same)
        own = next((e.error**2 for e in same if e.method == method and e.unit == unit), 0.0)
        return self.drop[precision] * own / whole if whole else 0.0


def measure(spec: ModelSpec, graph: ModelGraph) -> Harm:
    """The harm table of a model, from the cache when its digest is known. A flatbuffer, or a model without `evaluate`, has none."""
    from edgesdk import __version__
    from edgesdk.cache import cached

    return cached("harm", f"{spec.digest[:32]}-{__version__}", Harm, lambda: _measure(spec, graph))


def _measure(spec: ModelSpec, graph: ModelGraph) -> Harm:
    if spec.flatbuffer is not None or spec.evaluate is None:
        return Harm(quality=None, drop={}, errors=())
    reference = spec.evaluate(_runner(spec, "fp32"))
    errors: list[UnitError] = []
    drop = {}
    for precision in LOSSY:
        seen: dict[tuple[str, str], list[float]] = {}
        drop[precision] = max(0.0, reference - spec.evaluate(_runner(spec, precision, seen))) + 1e-4
        units = {(m.name, u.name.split("#")[0]) for m in graph.methods for u in m.units if u.weight_elements}
        errors += [UnitError(method=m, unit=u, precision=precision, error=sum(v) / len(v)) for (m, u), v in seen.items() if (m, u) in units]
    return Harm(quality=reference, drop=drop, errors=tuple(errors))


def _runner(spec: ModelSpec, precision: str, seen: dict[tuple[str, str], list[float]] | None = None) -> Any:
    """`run(method, inputs)` over copies of the modules with round-tripped weights and inputs; fills `seen` with unit errors."""
    import copy

    import numpy as np
    import torch
    from torch import nn

    modules = copy.deepcopy({n: m.module for n, m in spec.methods.items()})
    current = [""]

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any, names: dict[str, str], plain: Any) -> None:
        key = (current[0], names.get(current[0], ""))
        if seen is not None and key[1] and len(seen.setdefault(key, [])) < 16:
            wanted = plain(inputs[0])
            seen[key].append(float((output - wanted).norm() / wanted.norm().clamp_min(1e-9)))

    if precision != "fp32":
        by_module: dict[int, tuple[nn.Module, dict[str, str]]] = {}
        for method, module in modules.items():
            for name, part in module.named_modules():
                if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv1d):
                    by_module.setdefault(id(part), (part, {}))[1][method] = name
        for part, names in by_module.values():
            plain = copy.deepcopy(part)
            part.weight.data = round_trip(part.weight.data, precision)
            if precision != "int8-weight-only":
                part.register_forward_pre_hook(lambda m, x: (round_trip_activation(x[0]), *x[1:]))
            part.register_forward_hook(lambda m, x, y, names=names, plain=plain: hook(m, x, y, names, plain))

    def run(method: str, inputs: Sequence[Any]) -> list[Any]:
        current[0] = method
        with torch.no_grad():
            out = modules[method](*(torch.from_numpy(np.ascontiguousarray(i)) for i in inputs))
        return [o.numpy() for o in (out if isinstance(out, tuple | list) else (out,))]

    return run


def round_trip(weight: Any, precision: str) -> Any:
    """A weight after symmetric rounding: int8 a channel, or int4 in groups of 32 along the reduction where its length allows."""
    import torch

    flat = weight.reshape(weight.shape[0], -1)
    grouped = precision == "int4-g32" and flat.shape[1] % 32 == 0 and weight.dim() == 2
    groups, top = (flat.reshape(-1, 32), 7.0) if grouped else (flat, 127.0)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-9) / top
    return (torch.round(groups / scale).clamp(-top - 1, top) * scale).reshape(weight.shape)


def round_trip_activation(x: Any) -> Any:
    """An activation after asymmetric int8 rounding over its whole range (float tensors only)."""
    import torch

    if not torch.is_floating_point(x):
        return x
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = max(high - low, 1e-9) / 255
    zero = round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale
