"""Devices named in published tables: from `machines.toml` first, then from the profiles."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from edgesdk.errors import EdgeError


@dataclass(frozen=True)
class Machine:
    """`cores`: (fp32, fp16, int8 peak MAC/s, clock Hz) of each core, fastest first; bandwidths in bytes/s; peaks in MAC/s."""

    name: str
    cores: tuple[tuple[float, float, float, float], ...]
    bandwidth: float
    one_core: float
    core: str = "?"  # the kind of the fastest core
    plain: tuple[str, ...] = ()  # programs that take neither fp16 arithmetic nor the dot product here
    gpu: dict[str, float] = field(default_factory=dict)
    npu: dict[str, float] = field(default_factory=dict)

    def cpu_peak(self, dtype: int, threads: int, program: str = "") -> tuple[float, float]:
        """(fastest core's peak, sum over the `threads` fastest cores) in MAC/s for dtype 0 fp32, 1 fp16, 2 int8."""
        plain = program in self.plain
        rates = [core[0] * (1.0, 1.0, 1.5)[dtype] if plain else core[dtype] for core in self.cores[:threads]]
        return rates[0], sum(rates)

    def default_threads(self) -> int:
        """Threads a runtime takes when none are stated: every core of a uniform CPU, the four fastest of a mixed one."""
        uniform = len({core[2] for core in self.cores}) == 1
        return len(self.cores) if uniform else min(4, len(self.cores))


def _machine(entry: dict[str, Any], cores: dict[str, list[float]]) -> Machine:
    each = [(*(m * ghz * 1e9 for m in cores[core]), ghz * 1e9) for core, count, ghz in entry["cpu"] for _ in range(count)]
    peaks = {k: {d: v * 0.5e12 for d, v in entry.get(k, {}).items()} for k in ("gpu", "npu")}
    return Machine(
        entry["name"], tuple(each), entry["bandwidth"] * 1e9, entry["one_core"] * 1e9, entry["cpu"][0][0], tuple(entry.get("plain", ())),
        peaks["gpu"], peaks["npu"],
    )  # fmt: skip


@cache
def _table() -> tuple[tuple[Machine, tuple[re.Pattern[str], ...]], ...]:
    data = tomllib.loads(files("edgesdk.predict").joinpath("machines.toml").read_text(encoding="utf-8"))
    return tuple((_machine(e, data["cores"]), tuple(re.compile(p) for p in e["match"])) for e in data["machine"])


def machines() -> list[Machine]:
    """Every device of the table."""
    return [machine for machine, _ in _table()]


def _from_profile(text: str) -> Machine | None:
    """A profile whose name, alias, title or published name is in `text`."""
    try:
        from edgesdk.devices import shipped_devices

        profiles = shipped_devices()
    except (ImportError, EdgeError):
        return None
    for p in profiles:
        names = {p.name, p.title, *p.published_names, *(a for a in p.aliases if len(a) > 4)}
        if not any(n and n.lower() in text for n in names) or p.name == "host":
            continue
        cores = []
        for u in p.units:
            if u.kind == "cpu":
                fp32 = u.peak_ops_per_s.get("fp32", 16 * u.clock_hz * u.cores) / 2 / u.cores
                fp16 = u.peak_ops_per_s.get("fp16", 2 * u.cores * fp32) / 2 / u.cores
                cores += [(fp32, fp16, u.peak_ops_per_s.get("int8", 4 * u.cores * fp32) / 2 / u.cores, u.clock_hz)] * u.cores
        if not cores:
            return None
        peaks = {k: {d: v / 2 for u in p.units if u.kind == k for d, v in u.peak_ops_per_s.items()} for k in ("gpu", "npu")}
        bw = p.memory.bandwidth_bytes_per_s
        fastest = max((u for u in p.units if u.kind == "cpu"), key=lambda u: u.clock_hz)
        core = str(fastest.core or "?").lower().removeprefix("cortex-")
        cores.sort(key=lambda c: -c[2])
        gpu, npu = ({str(d): v for d, v in peaks[k].items()} for k in ("gpu", "npu"))
        return Machine(p.name, tuple(cores), bw, p.memory.one_thread_bytes_per_s or bw / 3, core, (), gpu, npu)
    return None


@cache
def find_machine(name: str) -> Machine | None:
    """The device a table calls `name`; None when unknown."""
    text = re.sub(r"[\s_]+", " ", name.lower())
    for machine, patterns in _table():
        if any(p.search(text) for p in patterns):
            return machine
    return _from_profile(text)
