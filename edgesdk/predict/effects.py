"""What runtimes, devices and models add to the cost law: random effects on the log time, each with a prior spread.

An effect is a name and a value for a case; the log time gains value × fitted coefficient. Names start with their kind. Most
kinds have the value 1 (a factor on the whole time). Kinds that end in `part` have the share of the time that a part of the law
takes as their value, so their coefficient is the log of a factor on that part alone: how much slower depthwise convolutions
are in this program, on this core, at this data type. An effect whose name no fitted row had is zero, its spread widens the interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING

from edgesdk.predict.layers import Layer
from edgesdk.predict.physics import PARTS, Case

if TYPE_CHECKING:
    from edgesdk.predict.physics import Array

SPREAD: dict[str, float] = {
    "variant": 0.5, "device": 0.1, "precision": 0.35, "silicon": 0.08, "model": 0.1, "model-program": 0.1, "model-width": 0.1,
    "family-width": 0.15, "core-program": 0.15, "core-threads": 0.15, "device-threads": 0.1,
    "program-part": 0.2, "width-part": 0.2, "core-part": 0.2, "device-part": 0.15, "program-width-part": 0.1,
}  # fmt: skip
"""Prior spread of each kind of effect; chosen on rows outside the frozen devices and models (docs/predictions.md)."""
SMALLEST_SHARE = 0.02  # parts that take less of the time have no effect of their own


def family(layers: tuple[Layer, ...]) -> str:
    """attention, depthwise or plain: what a network is mostly built from."""
    if sum(layer.op == "bmm" for layer in layers) >= 8:
        return "attention"
    return "depthwise" if sum(layer.op == "dw" for layer in layers) >= 6 else "plain"


def effects(case: Case, shares: Array) -> dict[str, float]:
    """Name → value of every effect on a case; `shares` is the case's row of `Table.parts`."""
    program, width, kind = case.variant, case.width, family(case.layers)
    out = {
        f"variant:{program}": 1.0, f"device:{case.device}": 1.0, f"precision:{case.precision}": 1.0,
        f"silicon:{case.device}:{width}": 1.0, f"model:{case.model}": 1.0, f"model-program:{case.model}:{program}": 1.0,
        f"model-width:{case.model}:{width}": 1.0, f"family-width:{kind}:{width}": 1.0, f"core-program:{case.core}:{program}": 1.0,
        f"core-threads:{case.core}": log(case.spread), f"device-threads:{case.device}": log(case.spread),
    }  # fmt: skip
    groups = {"program-part": program, "width-part": width, "core-part": case.core, "device-part": case.device,
              "program-width-part": f"{program}:{width}"}  # fmt: skip
    for part, share in zip(PARTS, shares.tolist(), strict=True):
        if share > SMALLEST_SHARE:
            out.update({f"{group}:{name}:{part}": share for group, name in groups.items()})
    return {name: value for name, value in out.items() if value}


def spread(name: str, engine: str) -> float:
    """Prior spread of an effect. An NPU's data sheet tells less of its speed than a CPU's, so its devices may differ more."""
    kind = name.split(":")[0]
    return SPREAD[kind] * (2.0 if engine == "npu" and kind in ("device", "silicon") else 1.0)


def total(found: Mapping[str, float], fitted: Mapping[str, float]) -> float:
    """What the effects `found` on a case add to its log time."""
    return sum(value * fitted.get(name, 0.0) for name, value in found.items())
