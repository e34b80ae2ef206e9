"""Facts → a profile as a plain dict, with a source for each number: read, derived by a formula, or taken from the shipped profile of such a board."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgesdk.device import Board, ComputeUnit, DeviceProfile
from edgesdk.devices import NOT_CONFIRMED, load_device, shipped_devices, source_of
from edgesdk.host import RUNTIMES, operations_per_cycle
from edgesdk.probe.cores import Core, core_of
from edgesdk.probe.facts import Cluster, Facts

FALLBACK_HZ = 1e9
NO_ID = "unknown"
"""The id of a board that nothing tells from others of its kind."""
MEASURED = "measured"
"""How the source of a figure begins that was measured on the board."""
_PRECISIONS = {name: list(precisions) for name, _, precisions in RUNTIMES} | {
    "tflite-runtime": ["fp32", "int8-static", "int8-weight-only", "as-is"],
    "native-cuda": ["fp32", "int8-dynamic", "int8-weight-only", "int4-g32"],
}


@dataclass
class Draft:
    """A profile in the making. `day`: when it was read."""

    facts: Facts
    base: DeviceProfile | None
    day: str
    sources: dict[str, str] = field(default_factory=dict)

    def read(self, key: str, where: str) -> None:
        self.sources[key] = f"probed {self.day}: {where}"

    def from_base(self, *heads: str) -> None:
        """The shipped profile's sources of these fields."""
        for key, source in self.base.sources.items() if self.base else ():
            if any(key == head or key.startswith(head + ".") for head in heads):
                self.sources[key] = source


def recognise(facts: Facts) -> DeviceProfile | None:
    """The shipped profile that this board is one of, in the variant of its memory; None where no profile knows it."""
    names = [n.lower() for n in (facts.model, *facts.chips)]
    for profile in shipped_devices():
        for known in (*profile.models, profile.title):
            if any(re.match(re.escape(known.lower()) + r"(?![a-z0-9+])", name) for name in names):
                return _variant(profile, facts)
    return None


def _variant(profile: DeviceProfile, facts: Facts) -> DeviceProfile:
    """By memory (Linux sees less than is there: the smallest that holds what it sees), else by the nearest clock."""
    sizes = {int(v.set["memory.size_bytes"]): v.suffix for v in profile.variants if "memory.size_bytes" in v.set}
    sizes[profile.memory.size_bytes] = ""
    suffix = sizes[min((s for s in sizes if s >= facts.memory_bytes), default=profile.memory.size_bytes)]
    clock, key = facts.clusters[0].max_hz, "units.cpu.clock_hz"
    clocks = {v.suffix: float(v.set[key]) for v in profile.variants if key in v.set and "memory.size_bytes" not in v.set}
    if clock and not suffix and clocks:
        clocks[""] = next(u for u in profile.units if u.name == "cpu").clock_hz
        suffix = min(clocks, key=lambda s: abs(clocks[s] - clock))
    return load_device(f"{profile.name}-{suffix}") if suffix else profile


def compose(facts: Facts, name: str, base: DeviceProfile | None, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The profile's fields in the order of a TOML file. `measured`: what the agent's `speed` found there."""
    draft = Draft(facts, base, facts.when[:10])
    measured = measured or {}
    units = _units(draft, measured)
    memory = _memory(draft, units, measured)
    raw: dict[str, Any] = {
        "name": name, "title": f"{base.title if base else facts.model}, board {facts.board_id or NO_ID}", "family": _family(facts, base),
        "arch": facts.arch, "os": "android" if facts.android else "linux", "memory": memory, "storage": _storage(draft, measured),
        "units": units, "runtimes": _runtimes(draft, units),
    }  # fmt: skip
    if base and base.power_modes:
        raw["power_modes"] = [m.model_dump(mode="json", exclude_none=True) for m in base.power_modes]
        raw["default_power_mode"] = _power_mode(facts, base)
        draft.from_base("power_modes")
    raw["board"] = _board(facts, base).model_dump(mode="json", exclude_none=True)
    raw["sources"] = draft.sources
    return raw


def _family(facts: Facts, base: DeviceProfile | None) -> str:
    if base:
        return base.family
    if facts.android:
        return "phone"
    return "jetson" if "l4t" in facts.nvidia else "raspberry-pi" if facts.model.startswith("Raspberry Pi") else "linux"


def _power_mode(facts: Facts, base: DeviceProfile) -> str | None:
    """What the board says it is in, where the profile knows it."""
    now = facts.nvidia.get("power_mode", "")
    return now if now in [m.name for m in base.power_modes] else base.default_power_mode


def _board(facts: Facts, base: DeviceProfile | None) -> Board:
    rails = tuple(f"{r.name} ({r.kind}{'' if r.answers else ', silent'})" for r in facts.rails)
    return Board(
        id=facts.board_id or NO_ID, identified_by=facts.identified_by or "nothing", model=facts.model, probed=facts.when[:10],
        based_on=base.name if base else None, emulated=bool(facts.emulated), system=facts.system, kernel=facts.kernel, governor=facts.governor,
        runtimes=facts.runtimes, programs=facts.programs, nvidia=facts.nvidia, thermal_zones=tuple(z.name for z in facts.zones), power_rails=rails,
    )  # fmt: skip


def _units(draft: Draft, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The CPU's clusters as they were read, then what the shipped profile has beside them."""
    units = []
    for name, cluster in zip(_names(len(draft.facts.clusters)), draft.facts.clusters, strict=True):
        units.append(_cpu(draft, name, cluster, measured))
    for unit in draft.base.units if draft.base else ():
        if unit.kind != "cpu":
            units.append(unit.model_dump(mode="json", exclude_none=True, exclude_defaults=True))
            draft.from_base(f"units.{unit.name}")
    return units


def _names(count: int) -> list[str]:
    """As the shipped profiles call clusters, the fastest first."""
    middle = [f"performance-{i}" if i else "performance" for i in range(max(0, count - 2))]
    return ["cpu", *middle, *(["efficiency"] if count > 1 else [])]


def _cpu(draft: Draft, name: str, cluster: Cluster, measured: Mapping[str, Any]) -> dict[str, Any]:
    at = f"units.{name}"
    twin = next((u for u in draft.base.units if u.kind == "cpu" and u.core == cluster.core), None) if draft.base else None
    numbers = f"cores {', '.join(map(str, cluster.numbers))}"
    part = (
        f", implementer 0x{cluster.implementer:02x}, part 0x{cluster.part:03x}"
        if cluster.part is not None and cluster.implementer is not None
        else ""
    )
    draft.read(f"{at}.cores", f"/proc/cpuinfo: {numbers}{part}")
    draft.read(f"{at}.isa", "/proc/cpuinfo: features")
    clock = _clock(draft, at, cluster, twin)
    unit: dict[str, Any] = {"name": name, "kind": "cpu", "core": cluster.core, "cores": cluster.cores, "clock_hz": clock}
    if cluster.isa:
        unit["isa"] = list(cluster.isa)
    unit["peak_ops_per_s"] = _peaks(draft, at, cluster, clock, measured if name == "cpu" else {})
    caches = [c.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for c in cluster.caches or (twin.caches if twin else ())]
    if caches:
        unit["caches"] = caches
        if cluster.caches:
            draft.read(f"{at}.caches", f"/sys/devices/system/cpu/cpu{cluster.numbers[0]}/cache")
        elif twin and draft.base:
            theirs = f"units.{twin.name}.caches"
            draft.sources |= {at + k[len(theirs) - 7 :]: v for k, v in draft.base.sources.items() if k.startswith(theirs)}
    return unit


def _clock(draft: Draft, at: str, cluster: Cluster, twin: ComputeUnit | None) -> float:
    if cluster.max_hz:
        file = f"/sys/devices/system/cpu/cpu{cluster.numbers[0]}/cpufreq/cpuinfo_max_freq"
        draft.read(f"{at}.clock_hz", file if cluster.min_hz else "/proc/cpuinfo: cpu MHz")
        return cluster.max_hz
    if twin and draft.base:
        draft.sources[f"{at}.clock_hz"] = source_of(draft.base.sources, f"units.{twin.name}.clock_hz") or f"as {draft.base.name}"
        return twin.clock_hz
    draft.sources[f"{at}.clock_hz"] = f"{NOT_CONFIRMED}: the board tells no clock (no cpufreq); 1 GHz stands in its place"
    return FALLBACK_HZ


def _peaks(draft: Draft, at: str, cluster: Cluster, clock: float, measured: Mapping[str, Any]) -> dict[str, float]:
    """Cores × clock × operations a cycle; of a core that nothing knows, what was measured, as a least."""
    fp32, int8, why = _a_cycle(cluster, draft.base)
    key = f"{at}.peak_ops_per_s"
    rate = measured.get("fp32_ops_per_s")
    if rate and why.startswith(NOT_CONFIRMED) and rate > clock * fp32:
        times = int8 / fp32
        draft.sources[key] = (
            f"{MEASURED} {draft.day}: float32 matrix products on one core, times {cluster.cores} cores; int8 taken as {times:g} times that"
        )
        return {"fp32": cluster.cores * rate, "int8": cluster.cores * rate * times}
    formula = f"{cluster.cores} cores x {clock / 1e9:.4g} GHz x {fp32} fp32 or {int8} int8 operations a cycle"
    open_ones = any(source.startswith(NOT_CONFIRMED) for source in (why, draft.sources[f"{at}.clock_hz"]))
    more = "" if why.startswith(NOT_CONFIRMED) else f"; {why}"
    draft.sources[key] = f"{NOT_CONFIRMED if open_ones else 'derived'}: {formula}{more}"
    return {"fp32": cluster.cores * clock * fp32, "int8": cluster.cores * clock * int8}


def _a_cycle(cluster: Cluster, base: DeviceProfile | None) -> tuple[int, int, str]:
    """(fp32, int8 operations a cycle of a core, why): as a shipped profile has that core, this board's own first, else by the table of cores."""
    for profile in (*([base] if base else ()), *shipped_devices()):
        for unit in profile.units:
            if unit.kind == "cpu" and unit.core == cluster.core and ("dotprod" in unit.isa) == ("dotprod" in cluster.isa):
                fp32, int8 = (round(unit.peak_ops_per_s.get(d, 0) / (unit.cores * unit.clock_hz)) for d in ("fp32", "int8"))
                source = source_of(profile.sources, f"units.{unit.name}.peak_ops_per_s") or ""
                why = NOT_CONFIRMED if source.startswith(NOT_CONFIRMED) else f"a {cluster.core} as in the profile {profile.name}"
                if fp32 and int8:
                    return fp32, int8, why
    if cluster.part is None:
        if any(i.startswith("avx") for i in cluster.isa):
            fp32, int8 = operations_per_cycle(list(cluster.isa))
            return fp32, int8, "two vector units, a multiply and an add are two"
        return 8, 32 if "dotprod" in cluster.isa else 16, NOT_CONFIRMED
    core = _core(cluster)
    return core.fp32, core.int8("dotprod" in cluster.isa), NOT_CONFIRMED


def _core(cluster: Cluster) -> Core:
    if cluster.implementer is None or cluster.part is None:
        return Core(cluster.core, 8)
    return core_of(cluster.implementer, cluster.part, cluster.isa)


def _memory(draft: Draft, units: list[dict[str, Any]], measured: Mapping[str, Any]) -> dict[str, Any]:
    facts, base, day = draft.facts, draft.base, draft.day
    draft.read("memory.size_bytes", "/proc/meminfo: MemTotal")
    memory: dict[str, Any] = {"size_bytes": facts.memory_bytes}
    if facts.available_bytes:
        memory["usable_share"] = min(1.0, max(0.01, round(facts.available_bytes / facts.memory_bytes, 3)))
        draft.read("memory.usable_share", "/proc/meminfo: MemAvailable / MemTotal at that moment")
    else:
        memory["usable_share"] = 0.6
        draft.sources["memory.usable_share"] = f"{NOT_CONFIRMED}: the system does not tell; 40% assumed for it"
    if base:
        memory["bandwidth_bytes_per_s"] = base.memory.bandwidth_bytes_per_s
        draft.from_base("memory.bandwidth_bytes_per_s")
        if base.memory.one_thread_bytes_per_s:
            memory["one_thread_bytes_per_s"] = base.memory.one_thread_bytes_per_s
            draft.from_base("memory.one_thread_bytes_per_s")
    elif every := measured.get("all_threads_bytes_per_s"):
        memory["bandwidth_bytes_per_s"] = every
        draft.sources["memory.bandwidth_bytes_per_s"] = (
            f"{MEASURED} {day}: {measured['how']}, {measured['processes']} processes at once; a least"
        )
    else:
        core, clock = _core(facts.clusters[0]), units[0]["clock_hz"]
        memory["bandwidth_bytes_per_s"] = 2 * core.bytes_per_cycle * clock
        draft.sources["memory.bandwidth_bytes_per_s"] = (
            f"{NOT_CONFIRMED}: twice the {core.bytes_per_cycle:g} bytes a cycle that such a core reads at {clock / 1e9:.4g} GHz, until --measure"
        )
    if one := measured.get("one_thread_bytes_per_s"):
        memory["one_thread_bytes_per_s"] = one
        draft.sources["memory.one_thread_bytes_per_s"] = f"{MEASURED} {day}: {measured['how']}, one core"
    return memory


def _storage(draft: Draft, measured: Mapping[str, Any]) -> dict[str, Any]:
    disk = draft.facts.disk
    found: dict[str, Any] = {}
    if disk.size_bytes:
        found["size_bytes"] = disk.size_bytes
        draft.read("storage.size_bytes", f"df: {disk.device}, which holds edgesdk's folder")
    if rate := measured.get("storage_bytes_per_s"):
        found["read_bytes_per_s"] = rate
        draft.sources["storage.read_bytes_per_s"] = f"{MEASURED} {draft.day}: {measured['storage_how']}"
    return found


def _runtimes(draft: Draft, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What such a board can run (of the shipped profile; of another board what its system has packages for), and what is there."""
    facts, base = draft.facts, draft.base
    found: dict[str, dict[str, Any]] = {}
    names = {u["name"] for u in units}
    for runtime in base.runtimes if base else ():
        if runtime.unit in names:
            found[runtime.name] = runtime.model_dump(mode="json", exclude_none=True)
    if base:
        draft.from_base("runtimes")
    usual = () if base else ("litert", "executorch") if facts.android else ("litert", "executorch", "native")
    for name in (*usual, *(n for n in facts.runtimes if n in _PRECISIONS)):
        found.setdefault(name, {"name": name, "unit": "cpu", "precisions": _PRECISIONS[name]})
    return list(found.values())
