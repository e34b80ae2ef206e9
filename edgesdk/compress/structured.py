"""Structured pruning: channels, neurons, heads and the width of residual streams are cut out, so that shapes, bytes and MACs fall for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgesdk.compress.cut_costs import Order, order_of, readers_of, share_out
from edgesdk.compress.dependency import Axis, Family, Trace, holders_of, trace
from edgesdk.compress.refit import Rows, note_rows, refit
from edgesdk.compress.shrink import copy_of, cuttable, edits_of, module_at
from edgesdk.compress.surgery import Edit, apply_edits
from edgesdk.compress.training import TrainConfig, trained
from edgesdk.compress.types import Change, Config, Need, Step
from edgesdk.compress.types import Family as Kind
from edgesdk.errors import InputError

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class StructuredConfig(Config):
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3  # share of the parameters (or MACs) to cut out
    of: Literal["weights", "macs"] = "weights"
    importance: Literal["output", "layer", "magnitude"] = (
        "output"  # felt by the model's outputs; by the layer's own; sizes of weights alone
    )
    residual: bool = False  # the width of residual streams with norms over it, too; wants tuning
    multiple: Annotated[int, Field(ge=1, le=64)] = 1  # layers keep a multiple of this many channels where they had one
    rounds: Annotated[int, Field(ge=1, le=20)] = 1  # cut and fit this often on the way
    refit: bool = True  # least squares of the layers that read what was cut (needs calibration data)
    tune: Annotated[int, Field(ge=0, le=20000)] = 0  # steps of training towards the whole model's outputs (needs calibration data)


class Structured:
    """Zero-invariant groups as in Only Train Once (arXiv:2107.07467) and OTOv2 (arXiv:2303.06862), found by our own tracing of every exported
    method at once: edits must hold in all methods that share a module, and be made again on load, which libraries do not offer.
    What a unit costs is the structured form of Optimal Brain Surgeon over the layers that read it (see `shrink`)."""

    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "structured"
    family: ClassVar[Kind] = "pruning"
    source: ClassVar[str] = (
        "OTO/OTOv2 groups (arXiv:2107.07467, 2303.06862) with structured Optimal Brain Surgeon costs; own tracing of torch.export graphs"
    )
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[StructuredConfig]] = StructuredConfig

    def why_not(self, spec: ModelSpec, config: StructuredConfig) -> str | None:
        if spec.calibration is None and (config.importance != "magnitude" or config.tune):
            return 'it has no calibration data (importance="magnitude" and tune=0 need none)'
        return None

    def options(self, spec: ModelSpec) -> Sequence[StructuredConfig]:
        return [StructuredConfig(ratio=r, importance="output" if spec.calibration else "magnitude") for r in (0.7, 0.5, 0.3, 0.2, 0.1)]

    def apply(self, spec: ModelSpec, config: StructuredConfig, step: Step) -> Change:
        teacher, found = copy_of(spec), trace(spec)
        before = elements(spec, found)
        edits: list[Edit] = []
        notes: list[str] = []
        rows: Rows = {}
        for i in range(config.rounds):
            left = (1 - config.ratio) ** ((i + 1) / config.rounds) * before[config.of == "macs"]
            ratio = 1 - left / elements(spec, found)[config.of == "macs"]
            if ratio <= 0:
                continue
            found = trace(spec) if i else found
            families = cuttable(spec, [f for f in found.families if f.exact or config.residual], step)
            if not families:
                raise InputError(
                    f"{spec.name} has no channels, neurons or heads that can be cut out", "use magnitude or nm, which keep all shapes"
                )
            step("weighing units", 0.3)
            made, notes = cut(
                spec, teacher, found, orders_of(spec, families, config.importance), ratio, rows, macs=config.of == "macs", multiple=config.multiple,
                fit=config.refit and spec.calibration is not None, step=step,
            )  # fmt: skip
            edits += made
            if config.tune >= config.rounds:
                taught = TrainConfig(steps=config.tune // config.rounds)
                notes.append(trained(spec, taught, step, teacher=teacher, name=self.name).note(self.name, taught.steps))
        after = elements(spec, found)
        notes.append(f"{1 - after[0] / before[0]:.1%} of the weights and {1 - after[1] / max(before[1], 1):.1%} of the MACs were cut out")
        return Change(tuple(edits), tuple(notes))


def elements(spec: ModelSpec, found: Trace) -> tuple[int, int]:
    """(parameters, MACs of one whole answer)."""
    held = {id(p): p for e in spec.methods.values() for p in e.module.parameters()}
    macs = sum(n * int(module_at(spec, path).weight.numel()) for path, n in found.positions.items())
    return sum(p.numel() for p in held.values()), macs


def cut(
    spec: ModelSpec, teacher: ModelSpec, found: Trace, orders: list[Order], ratio: float, rows: Rows, *, macs: bool, multiple: int, fit: bool, step: Step,
    share: float = 1e-3,
) -> tuple[list[Edit], list[str]]:  # fmt: skip
    """Choose, cut in place, refit to the teacher (damped by `share`); the edits, and a note for each family that lost units."""
    taken = share_out(spec, found, orders, ratio, macs, multiple)
    if not any(taken):
        raise InputError(f"ratio = {ratio}: no unit is small enough to be cut", "ask for more, or for a multiple of 1")
    edits: list[Edit] = []
    notes: list[str] = []
    readers: set[str] = set()
    for order, n in zip(orders, taken, strict=True):
        if not n:
            continue
        gone, family = set(order.gone[:n]), order.family
        edits += edits_of(spec, family, [u for u in range(len(family.units)) if u not in gone])
        notes.append(f"{family.name}: {n} of {len(family.units)} units cut")
        readers |= {a.path for a in family.readers if hasattr(module_at(spec, a.path), "bias") and _alone(spec, a)}
        if not family.exact:
            _gains(spec, family, 1 - n / len(family.units))
    apply_edits(spec, edits)
    note_rows(rows, edits)
    if fit:
        refit(spec, teacher, sorted(readers), rows, share=share, step=step)
    return edits, notes


def _alone(spec: ModelSpec, axis: Axis) -> bool:
    """Whether no other module uses the same weight (a tied embedding must not be refitted for its other use)."""
    return any(places == [(axis.path, axis.tensor)] for places in holders_of(spec).values())


def _gains(spec: ModelSpec, family: Family, share: float) -> None:
    """A norm now averages over fewer channels, and those that stay would come out smaller: its gain makes up for it."""
    import torch
    from torch import nn

    with torch.no_grad():
        for axis in family.axes:
            module = module_at(spec, axis.path)
            value = getattr(module, axis.tensor)
            plain = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding | nn.modules.batchnorm._BatchNorm)
            if value.dim() == 1 and not plain and axis.tensor != "bias":
                value.mul_(share**0.5)


def orders_of(spec: ModelSpec, families: list[Family], importance: str) -> list[Order]:
    """For each family its units from the cheapest to the dearest, costs comparable between families."""
    grouped: list[Order] = []
    readers = readers_of(spec, families, importance)
    for family, own in zip(families, readers, strict=True):
        grouped.append(order_of(family, own, len(family.units) - 1))
    return grouped


METHOD: Any = Structured()
