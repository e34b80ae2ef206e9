"""What there is to compress with, and what of a model can be compressed: `edgesdk compress --list`."""

from __future__ import annotations

from typing import Any, ClassVar

from edgesdk.compress.registry import METHODS, method
from edgesdk.compress.weights import weights_of
from edgesdk.errors import InputError
from edgesdk.intake import load_model
from edgesdk.noun import Noun, Part


class MethodRow(Part):
    name: str
    family: str
    level: str  # "weight": each for itself; "model": the whole
    needs: tuple[str, ...]  # "inputs": calibration data; "gradients": gradients over them
    settings: dict[str, Any]  # with their defaults; null: none, or must be given
    source: str


class WeightRow(Part):
    name: str
    op: str
    shape: tuple[int, ...]
    elements: int


class Listing(Noun):
    KIND: ClassVar[str] = "compression-methods"

    methods: tuple[MethodRow, ...]
    model: str | None = None
    weights: tuple[WeightRow, ...] = ()


def listing(model: str | None = None) -> Listing:
    """Every method, and with `model` (a reference) the weights that methods look at. Raises what `load_model` raises."""
    found = [method(name) for name in sorted(METHODS)]
    rows = tuple(
        MethodRow(
            name=m.name, family=m.family, level=m.level, needs=tuple(sorted(m.needs)), source=m.source,
            settings={k: f.get_default(call_default_factory=True) if not f.is_required() else None for k, f in m.config.model_fields.items()},
        )
        for m in found
    )  # fmt: skip
    if model is None:
        return Listing(methods=rows)
    spec = load_model(model)
    if not spec.methods:
        raise InputError(f"{spec.name} is a .tflite: it has no weights that can be compressed here", "give the PyTorch model")
    weights = tuple(WeightRow(name=n, op=w.op, shape=w.shape, elements=w.matrix.numel()) for n, w in weights_of(spec).items())
    return Listing(methods=rows, model=spec.name, weights=weights)
