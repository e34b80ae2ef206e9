"""What one candidate of a plan is made of, and what every unit would take at every precision: the planner's table, which compression uses, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from edgesdk.device import ComputeUnit, DeviceProfile
from edgesdk.efficiency import Efficiency
from edgesdk.errors import InputError, UnknownName
from edgesdk.graph.memory import in_flash, memory_answer, packed_again, weight_bytes
from edgesdk.graph.memory_plan import known
from edgesdk.graph.types import MethodGraph, ModelGraph, Unit
from edgesdk.native.formats import ROUNDED, is_native
from edgesdk.plan.cost import UnitCost, breaking, breaks, call_seconds, fused, unit_cost, working_set
from edgesdk.plan.harm import Harm
from edgesdk.plan.options import options
from edgesdk.plan.rates import calibration_of, efficiency_for
from edgesdk.plan.solve import Option, Solution
from edgesdk.plan.subject import Subject
from edgesdk.plan.types import MemoryAnswer, Precision, Workload
from edgesdk.sequence.card import NATIVE_BITS
from edgesdk.sequence.sizes import refuse_narrow
from edgesdk.target import target_for


@dataclass(frozen=True)
class Setting:
    """One candidate's surroundings: everything but the precisions."""

    subject: Subject
    graph: ModelGraph
    device: DeviceProfile
    compute: ComputeUnit
    runtime: str
    threads: int
    efficiency: Efficiency
    harm: Harm
    workload: Workload
    lost: float = 0.0  # quality that compressing the model before has cost already
    native: tuple[Precision, ...] = ()  # of single linear layers on our own kernels, where they were measured and can be built
    whole: bool = False  # the whole model in static int8, nothing rounded in between; else each weight for itself


def runtimes_of(device: DeviceProfile, asked: str | None, graph: ModelGraph, native: bool) -> list[str]:
    """Runtimes to consider, in the target's order: what the device has and edgesdk lowers for. Our own kernels, where they run the model
    (`native`), are among them once they were calibrated there: no prior says how fast they are."""
    here = {r.name for r in device.runtimes}
    if graph.cache_bits in NATIVE_BITS:
        refuse_narrow(graph.cache_bits, asked or "native", device.name, "native" in here)
        asked = asked or "native"
    if asked in ("native", "native-cuda") and not native:
        raise InputError(
            f"--runtime {asked}: {graph.name} is no sequence model of edgesdk's family", "choose --runtime executorch or litert"
        )
    if asked is not None:
        if asked not in here:
            raise UnknownName(f"runtime on {device.name}", asked, here)
        return [asked]
    target = target_for(device)
    kept: list[str] = [r for r in target.runtimes if r in here and not (graph.source == "tflite" and r.startswith("executorch"))]
    if native and "native" in here and calibration_of(device, "native", target.default_threads):
        kept.append("native")
    if not kept:
        raise InputError(
            f"{device.name} has no runtime that takes {graph.name}",
            f"its runtimes: {', '.join(sorted(here)) or 'none'}; name one with --runtime",
        )
    return kept


def setting_of(
    subject: Subject, graph: ModelGraph, harm: Harm, device: DeviceProfile, runtime: str, threads: int | None, workload: Workload
) -> Setting:
    compute = device.unit(next(r.unit for r in device.runtimes if r.name == runtime))
    n = threads or target_for(device).default_threads
    if n > compute.cores:
        raise InputError(f"--threads {n}: {device.name}'s {compute.name} has {compute.cores} cores", "ask for fewer threads")
    efficiency = efficiency_for(device, compute, runtime, n)
    native = native_units(compute, runtime, efficiency)
    return Setting(subject, graph, device, compute, runtime, n, efficiency, harm, workload, native=native)


def native_units(compute: ComputeUnit, runtime: str, efficiency: Efficiency) -> tuple[Precision, ...]:
    """What linear layers of an ExecuTorch program may take on our own kernels: what was measured there, where the operator can be compiled here."""
    measured = tuple(p for p in ROUNDED if any(r.op == "linear" and r.precision == p for r in efficiency.rows))
    if runtime != "executorch" or not measured:
        return ()
    from edgesdk.kernels.cpu import target_of
    from edgesdk.native.operator_build import missing

    return () if missing(target_of(compute.isa)) else measured


def group_of(method: str, unit: Unit) -> str:
    return unit.weight or f"{method}/{unit.name}"


def cost_of(s: Setting, unit: Unit, precision: str, touched: float) -> UnitCost:
    """`touched`: bytes a call of the whole method touches, as float: what decides the memory level its weights come from."""
    cost = unit_cost(unit, precision, s.device, s.runtime, s.threads, s.efficiency, working_set=touched)
    clock = s.compute.clock_hz / s.compute.sustained_clock_hz if s.workload.sustained and s.compute.sustained_clock_hz else 1.0
    factor = clock * s.workload.batch
    if precision == "int8-static" and not s.whole and cost.seconds:  # alone among floats it rounds its input and turns its output back
        ends = [Unit(name="turn", op="quantize", in_elements=n, out_elements=n) for n in (unit.in_elements, unit.out_elements)]
        turns = sum(unit_cost(end, "fp32", s.device, s.runtime, s.threads, s.efficiency).seconds for end in ends)
        factor *= 1 + turns / cost.seconds
    return replace(cost, seconds=cost.seconds * factor, low=cost.low * factor, high=cost.high * factor)


def offered_by(s: Setting, unit: Unit, method: str) -> list[Precision]:
    """Precisions of a unit; static int8 needs data for its ranges, and no attention masks, which would stretch every range."""
    static = s.subject.facts.layout == "plain" and s.subject.facts.has_calibration
    stored = s.subject.facts.formats.get(unit.weight or "")
    native = [cast(Precision, stored)] if stored and s.native else s.native
    found = options(unit, method, s.runtime, s.device, source=s.graph.source, static=static, native=native)
    if stored and s.runtime == "native" and unit.op == "linear":  # it runs as it is stored, whatever is planned
        return [cast(Precision, stored)]
    if s.whole:
        return ["int8-static"] if "int8-static" in found else found[:1]
    return found if unit.weight_elements else found[:1]


def power_of(device: DeviceProfile) -> float | None:
    """Watts of the device's default power mode: what the whole module may draw in it, so energies by it are at most. None: the profile has none."""
    return next((m.power_w for m in device.power_modes if m.name == device.default_power_mode), None)


def need_power(device: DeviceProfile) -> float:
    """Raises `InputError` where the profile has no power figure."""
    power = power_of(device)
    if power is None:
        modes = ", ".join(m.name for m in device.power_modes) or "none"
        raise InputError(
            f"energy: the profile of {device.name} has no power_w for its default power mode (modes: {modes})",
            "give a latency budget instead, or a profile with default_power_mode and a power_w for it, as profiles/jetson-orin-nano.toml has",
        )
    return power


def table_of(s: Setting, slower: bool) -> tuple[list[Option], dict[str, float], int]:
    """Options by group, the fixed part of every metric, and how many options were refused for being slower than float."""
    uses: dict[tuple[str, str], dict[str, float]] = {}
    copies, counted = packed_again(s.graph, s.runtime), not in_flash(s.runtime)
    choices: dict[str, list[Precision]] = {}
    fixed: dict[str, float] = {"latency": 0.0}
    for method in s.graph.methods:
        call = call_seconds(method, "fp32", s.efficiency) * s.workload.batch
        fixed[f"latency:{method.name}"] = call
        fixed["latency"] += call * method.unroll
        touched, quiet = working_set(method, {}), fused(method)
        more = _broken(s, method, quiet) if s.native else {}
        for unit in (u for u in method.units if u.name not in quiet):
            group, offered = group_of(method.name, unit), offered_by(s, unit, method.name)
            if not unit.weight_elements:
                value = cost_of(s, unit, offered[0], touched).seconds
                fixed["latency"] += value * method.unroll
                fixed[f"latency:{method.name}"] += value
                continue
            choices[group] = [p for p in offered if p in choices.get(group, offered)]
            for precision in offered:
                held = weight_bytes(unit, precision, s.runtime) * (1 + (0 if is_native(precision) else copies.get(unit.weight or "", 0)))
                use = uses.setdefault((group, precision), {"memory": held * counted, "latency": 0.0, "harm": 0.0})
                value = cost_of(s, unit, precision, touched).seconds + (more.get(unit.name, 0.0) if is_native(precision) else 0.0)
                use["latency"] += value * method.unroll
                use[f"latency:{method.name}"] = use.get(f"latency:{method.name}", 0.0) + value
                use["harm"] += harm_at(s, unit, precision)
                use["storage"] = stored_bytes(s, unit, precision)
    kept = [Option(g, p, u) for (g, p), u in uses.items() if p in choices[g]]
    fast = [o for o in kept if slower or o.use["latency"] <= uses[(o.group, choices[o.group][0])]["latency"] * 1.0001]
    stored = {g: float(weight_bytes(u, "fp32", s.runtime)) for g, u in s.graph.weights().items() if g in choices}
    answer = memory_of(s, {})
    fixed["memory"] = answer.peak_bytes - counted * sum(n * (1 + copies.get(g, 0)) for g, n in stored.items())
    fixed["storage"] = answer.weights_bytes - sum(stored.values())
    power = power_of(s.device) or 0.0
    fixed["energy"] = fixed["latency"] * power
    for option in kept:
        uses[option.group, option.precision]["energy"] = option.use["latency"] * power
    return fast, fixed, len(kept) - len(fast)


def harm_at(s: Setting, unit: Unit, precision: str) -> float:
    """Of a weight that our kernels read as it is stored: that of rounding what it meets."""
    as_stored = s.subject.facts.formats.get(unit.weight or "") == precision
    return s.harm.of(unit.weight or "", "int8-dynamic" if as_stored else precision)


def _broken(s: Setting, method: MethodGraph, quiet: frozenset[str]) -> dict[str, float]:
    """What each linear layer on our kernels costs beside itself, as if it were the only one: delegates entered anew, and a clamp that
    XNNPACK would fold into it."""
    found, each = {}, breaking(s.efficiency)
    order = [u for u in method.units if u.op != "reshape"]
    for before, unit, after in zip([None, *order[:-1]], order, [*order[1:], None], strict=True):
        if unit.op == "linear" and unit.weight_elements:
            near = MethodGraph.model_construct(units=tuple(u for u in (before, unit, after) if u))
            clamp = cost_of(s, after, "fp32", 0.0).seconds if after and after.name in quiet else 0.0
            found[unit.name] = breaks(near, {unit.name}) * each * s.workload.batch + clamp
    return found


def fewer_bits(s: Setting, group: str) -> set[str]:
    """Native precisions of less than 8 bits that a weight would first be rounded to."""
    fewer: set[str] = {p for p in s.native if p != "native-int8"}
    return fewer - {s.subject.facts.formats.get(group, "")}


def native_in(method: MethodGraph, solution: Solution) -> set[str]:
    """The units of a method that are chosen to run on our kernels inside another runtime's program."""
    groups = ((u.name, group_of(method.name, u)) for u in method.units if u.weight_elements)
    return {name for name, group in groups if group in solution.chosen and is_native(solution.chosen[group].precision)}


def stored_bytes(s: Setting, unit: Unit, precision: str) -> float:
    """Bytes of a weight in the program's file: its code, where the model is compressed and expanded on load, with what the precision adds to it."""
    held = float(weight_bytes(unit, precision, s.runtime))
    code = s.subject.facts.coded.get(unit.weight or "")
    if code is None or is_native(precision) or in_flash(s.runtime) or (precision == "int4-g32" and unit.weight not in s.subject.facts.int4):
        return held
    return min(held, code + (4.0 * unit.rows if precision.startswith("int8") else 0.0))


RUNTIME_BYTES = {"litert": 13_300_000, "tflite-runtime": 13_300_000, "executorch": 343_000_000}
"""Growth of resident memory when the runtime's Python package is loaded with a small program: x86-64 Linux, ai-edge-litert 2.3.0,
executorch 1.4.1 with libtorch. Used where a profile has no figure of its own."""


def memory_of(s: Setting, precisions: dict[tuple[str, str], str]) -> MemoryAnswer:
    """The memory answer; a runtime whose size the profile does not know counts as measured on x86-64."""
    answer = memory_answer(s.graph, precisions, s.runtime, s.device, known(s.graph.model_digest, s.runtime, precisions.values()))
    own = RUNTIME_BYTES.get(s.runtime)
    if answer.runtime_bytes is not None or own is None:
        return answer
    left = tuple(n for n in answer.not_counted if not n.startswith("the runtime itself"))
    return answer.model_copy(update={"runtime_bytes": own, "peak_bytes": answer.peak_bytes + own, "not_counted": left})
