"""What a plan says of itself: why each choice, what it rests on, why not the others."""

from __future__ import annotations

from collections.abc import Sequence

from edgesdk.graph.memory import weight_bytes
from edgesdk.graph.types import Unit
from edgesdk.plan.setting import Setting, cost_of
from edgesdk.plan.types import Plan, Precision, UnitPlan


def why(s: Setting, unit: Unit, precision: str, offered: list[Precision], touched: float) -> str:
    """Why a unit takes its precision."""
    if not unit.weight_elements:
        return "no weights"
    if s.whole and precision == "int8-static":
        return "int8 end to end: nothing is turned back to float in between"
    if len(offered) == 1:
        return "the only choice here"
    if precision == "fp32":
        return "float is fastest here, or needed for quality"
    float_s, own_s = cost_of(s, unit, "fp32", touched).seconds, cost_of(s, unit, precision, touched).seconds
    smaller = weight_bytes(unit, "fp32", s.runtime) / max(weight_bytes(unit, precision, s.runtime), 1)
    return f"{float_s / own_s:.2g}x the speed of float, {smaller:.2g}x smaller" if own_s > 0 else f"{smaller:.2g}x smaller"


def reasons(s: Setting, refused: int, units: Sequence[UnitPlan]) -> tuple[str, ...]:
    """What the whole plan rests on."""
    found = [f"times: {s.efficiency.origin}" + (f", {s.efficiency.notes[0]}" if s.efficiency.notes else "")]
    if native := sum(u.runtime == "native" for u in units) if s.runtime != "native" else 0:
        found.append(f"{native} of {len(units)} units run on our own kernels inside {s.runtime}, which calibration measured for each kind")
    if refused:
        found.append(f"{refused} quantized options were refused: predicted slower than float on {s.device.name} with {s.runtime}")
    if s.harm.quality is None:
        found.append("quality: the model has no evaluate(), so int8-static and int4 are taken only if a budget needs them")
    else:
        found.append(f"quality: {s.subject.facts.quality_name} {s.harm.quality:.2%} on held-out data before compression")
    return tuple(found)


def warnings(s: Setting, forced: bool) -> tuple[str, ...]:
    """What its reader should not miss."""
    found = []
    if s.efficiency.emulated:
        found.append(f"times are of the emulator that {s.device.name} was calibrated on: they say nothing of silicon")
    if forced:
        found.append("memory forces precisions that are predicted slower than float")
    if s.efficiency.origin == "prior":
        found.append(f"nothing was measured on {s.device.name} with {s.runtime}: run `edgesdk calibrate` there for tight predictions")
    return tuple(found)


def against(best: Plan, plans: list[Plan]) -> list[str]:
    """Why not the others: one line each."""
    lines = []
    for p in plans:
        if (p.layout, p.runtime) != (best.layout, best.runtime):
            state = f"{p.latency.value / best.latency.value:.2f}x the time" + ("" if p.fits else ", does not fit")
            quality = "" if p.quality is None else f", quality {p.quality:.1%}"
            lines.append(f"not {p.layout} on {p.runtime}: {state}{quality}")
    return lines
