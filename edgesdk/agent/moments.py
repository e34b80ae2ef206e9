"""What a device is like at one moment: clocks, governors, temperatures, what holds it back, who else is at work. Goes to the device as it is.

Everything is read below a `Tree`, so that a folder of files can stand for a machine. What is not told is left out, never 0.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from typing import Any

COMMAND_S = 5.0
PI_FLAGS = ("under-voltage", "clock capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 of a Raspberry Pi's get_throttled; bits 16 to 19 tell of the time since the start and are not of this moment."""
ANDROID_STATES = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
GPUS = re.compile(r"gpu|mali|kgsl|ga10b|gv11b|gp10b", re.IGNORECASE)
HOLDS_BACK = re.compile(r"cpufreq|devfreq|gpu|processor|^cpu|emc", re.IGNORECASE)
"""Kinds of cooling devices that take speed away; the rest blow air."""


class Tree:
    """A machine's files below `root`, and its commands."""

    def __init__(self, root: str = "/") -> None:
        self.root = root.rstrip("/")

    def read(self, path: str) -> str:
        """Nothing where it cannot be read."""
        try:
            return self.must(path)
        except OSError:
            return ""

    def must(self, path: str) -> str:
        """Raises `OSError`."""
        with open(self.root + path, "rb") as file:
            return file.read(1 << 20).replace(b"\0", b" ").decode(errors="replace").strip()

    def glob(self, pattern: str) -> list[str]:
        """Paths in the order of the numbers in them."""
        found = [path[len(self.root) :] for path in glob.glob(self.root + pattern)]
        return sorted(found, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p)])

    def program(self, name: str) -> str:
        """Where a command is, or nothing. Of another root only what is in its usr/bin."""
        return shutil.which(name, path=self.root + "/usr/bin" if self.root else None) or ""

    def said(self, *argv: str) -> str:
        """What a command says; nothing where it is not there or fails."""
        path = self.program(argv[0])
        if not path:
            return ""
        try:
            done = subprocess.run([path, *argv[1:]], stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def clusters(tree: Tree) -> tuple[dict[str, float], dict[str, str]]:
    """(cluster → the clock of its fastest core in Hz, cluster → governor)"""
    clocks: dict[str, float] = {}
    governors: dict[str, str] = {}
    for policy in tree.glob("/sys/devices/system/cpu/cpufreq/policy*"):
        name = "cpu" + span(tree.read(policy + "/related_cpus") or tree.read(policy + "/affected_cpus") or policy[-1])
        clock = number(tree.read(policy + "/scaling_cur_freq"))
        if clock:
            clocks[name] = clock * 1e3
        governor = tree.read(policy + "/scaling_governor")
        if governor:
            governors[name] = governor
    if not clocks:
        listed = [number(line.partition(":")[2]) for line in tree.read("/proc/cpuinfo").splitlines() if line.startswith("cpu MHz")]
        if any(listed):
            clocks[f"cpu0-{len(listed) - 1}"] = max(m for m in listed if m) * 1e6
    for path in tree.glob("/sys/class/devfreq/*/cur_freq") + tree.glob("/sys/class/kgsl/kgsl-3d0/gpuclk"):
        clock = number(tree.read(path))
        if clock and GPUS.search(path.split("/")[4]):
            clocks.setdefault("gpu", clock)
    return clocks, governors


def span(cpus: str) -> str:
    """`0 1 2 3` → `0-3`."""
    found = sorted(int(c) for c in re.findall(r"\d+", cpus))
    if len(found) > 1 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]}-{found[-1]}"
    return ",".join(map(str, found))


def temperatures(tree: Tree) -> dict[str, float]:
    """Zone → °C; of machines without thermal zones, what their processor's own sensors say."""
    found: dict[str, float] = {}
    named = [
        (zone, tree.read(zone + "/type") or os.path.basename(zone), zone + "/temp")
        for zone in tree.glob("/sys/class/thermal/thermal_zone*")
    ]
    if not named:
        for place in tree.glob("/sys/class/hwmon/hwmon*"):
            if tree.read(place + "/name") in ("coretemp", "k10temp", "zenpower", "cpu_thermal"):
                named += [(p, tree.read(p[:-5] + "label") or os.path.basename(p)[:-6], p) for p in tree.glob(place + "/temp*_input")]
    for place, name, path in named:
        value = number(tree.read(path))
        if value is not None and -40e3 < value < 200e3:
            found[name if name not in found else f"{name} {os.path.basename(place)}"] = value / 1e3
    return found


class Watcher:
    """Takes moments; counters are told as what they rose by since the moment before."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._counters: dict[str, float] = {}
        self._times: tuple[float, float, float, float] | None = None
        self._android = bool(tree.read("/system/build.prop") or tree.program("dumpsys"))

    def moment(self) -> dict[str, Any]:
        """Fields of `edgesdk.report.Moment` but for the time."""
        clocks, governors = clusters(self.tree)
        others, steal = self._shares()
        return {
            "clocks_hz": clocks, "governors": governors, "temperatures_c": temperatures(self.tree), "throttle": self.throttle(),
            "others": others, "steal": steal,
        }  # fmt: skip

    def throttle(self) -> list[str] | None:
        """What holds the device back now; None where nothing here would tell."""
        told = [self._raspberry_pi(), self._counted(), self._cooling(), self._thermal_service()]
        known = [flags for flags in told if flags is not None]
        return [flag for flags in known for flag in flags] if known else None

    def _raspberry_pi(self) -> list[str] | None:
        text = self.tree.read("/sys/devices/platform/soc/soc:firmware/get_throttled")
        text = text or self.tree.said("vcgencmd", "get_throttled").partition("=")[2]
        try:
            bits = int(text, 16)
        except ValueError:
            return None
        return [name for i, name in enumerate(PI_FLAGS) if bits >> i & 1]

    def _counted(self) -> list[str] | None:
        """Counters of x86 cores and packages, and of a Jetson's over-current alarms."""
        paths = self.tree.glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
        paths += self.tree.glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/package_throttle_count")
        paths += self.tree.glob("/sys/class/hwmon/hwmon*/oc*_event_cnt")
        seen = {path: value for path in paths if (value := number(self.tree.read(path))) is not None}
        if not seen:
            return None
        rose: dict[str, float] = {}
        for path, value in seen.items():
            kind = "over-current" if path.endswith("_event_cnt") else os.path.basename(path).split("_")[0] + " too hot"
            rose[kind] = max(rose.get(kind, 0.0), value - self._counters.get(path, value))
        self._counters = seen
        return [f"{kind} ({n:.0f} times)" for kind, n in rose.items() if n > 0]

    def _cooling(self) -> list[str] | None:
        known, flags = False, []
        for place in self.tree.glob("/sys/class/thermal/cooling_device*"):
            kind, state = self.tree.read(place + "/type"), number(self.tree.read(place + "/cur_state"))
            if state is not None and HOLDS_BACK.search(kind):
                known = True
                if state > 0:
                    flags.append(f"{kind} {state:.0f}/{self.tree.read(place + '/max_state') or '?'}")
        return flags if known else None

    def _thermal_service(self) -> list[str] | None:
        if not self._android:
            return None
        found = re.search(r"Thermal Status: (\d+)", self.tree.said("dumpsys", "thermalservice"))
        if not found:
            return None
        state = min(int(found.group(1)), len(ANDROID_STATES) - 1)
        return [f"thermal status {ANDROID_STATES[state]}"] if state else []

    def _shares(self) -> tuple[float | None, float | None]:
        """Shares of all cores' time since the moment before: (processes that are neither this one nor its children, the hypervisor)"""
        fields = self.tree.read("/proc/stat").partition("\n")[0].split()[1:9]
        if len(fields) < 8 or not all(f.isdigit() for f in fields):
            return None, None
        user, nice, system, idle, iowait, irq, softirq, steal = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
        spent = os.times()
        now = (user + nice + system + irq + softirq, idle + iowait, steal, sum(spent[:4]))
        before, self._times = self._times, now
        if before is None:
            return None, None
        busy, free, stolen, own = (a - b for a, b in zip(now, before))  # noqa: B905 (3.9 has no strict)
        total = busy + free + stolen
        if total <= 0:
            return None, None
        return max(0.0, busy - own) / total, stolen / total
