"""Power sensors: what they are called, what they cover, and watts, or in words why one does not work. Goes to the device as it is.

    INA3221 and other chips that meter rails      /sys/class/hwmon: in1_label, in1_input (mV), curr1_input (mA), power1_input (µW)
    the same under old Jetson kernels             /sys/bus/i2c/drivers/ina3221x/…/iio:device0: rail_name_0, in_power0_input (mW)
    tegrastats                                    where those files may not be read
    vcgencmd pmic_read_adc                        Raspberry Pi 5: volts and amperes of what the power chip feeds
    RAPL                                          /sys/class/powercap/intel-rapl:0/energy_uj, which begins anew at max_energy_range_uj
    a battery's gauge                             /sys/class/power_supply: power_now (µW), or current_now (µA) and voltage_now (µV)

A sensor that reads nothing, nonsense or always the same is none: never a silent zero.
"""

from __future__ import annotations

import math
import re
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from .moments import Tree, number

MOST_W = 2000.0
WHOLE = ("VDD_IN", "POM_5V_IN", "VIN", "VDD_TOTAL")
"""Rails that feed all others of a board."""
STUCK_AFTER = 20
"""So many readings, all the same, are of a sensor that stands still."""
LEAST_MA = 20e3
"""A running device draws 20 mA and more: smaller "microamperes" are milliamperes, as some phones have them."""


class BadSensorError(Exception):
    """In words, why a sensor does not work."""


class Sensor:
    """`watts()` now; of counters, on the average since the last reading. Raises `BadSensorError`."""

    def __init__(self, name: str, covers: str, watts: Callable[[], float | None], interval_s: float, counts: bool = False) -> None:
        self.name, self.covers, self.interval_s, self.counts = name, covers, interval_s, counts
        self._watts = watts

    def watts(self) -> float | None:
        """None where a counter has only begun."""
        value = self._watts()
        if value is not None and not 0.0 < value < MOST_W:
            raise BadSensorError(f"{self.name}: says {value:.3g} W")
        return value

    def close(self) -> None:
        """Ends what it started."""


def _value(tree: Tree, path: str, name: str) -> float:
    try:
        text = tree.must(path)
    except PermissionError:
        raise BadSensorError(f"{name}: {path} may be read by root only") from None
    except OSError as error:
        raise BadSensorError(f"{name}: {path}: {error.strerror}") from None
    value = number(text)
    if value is None:
        raise BadSensorError(f"{name}: {path} says '{text[:20]}'")
    return value


# ---- chips that meter rails


def _product(tree: Tree, chip: str, paths: tuple[str, ...], unit: float) -> float:
    """Watts out of the numbers in files, `unit` of their product being one."""
    return math.prod(_value(tree, path, chip) for path in paths) / unit


def _rails(tree: Tree, place: str, chip: str) -> dict[str, Callable[[], float]]:
    """Rail → its watts. Inputs 4 to 7 of an INA3221 are voltages over its shunts."""
    rails: dict[str, Callable[[], float]] = {}
    for path in tree.glob(place + "/power*_input"):
        label = tree.read(path[:-5] + "label") or chip
        rails[label] = partial(_product, tree, chip, (path,), 1e6)
    if rails:
        return rails
    for path in tree.glob(place + "/curr*_input"):
        index = re.sub(r"\D", "", path.rpartition("/")[2])
        volts = f"{place}/in{index}_input"
        if tree.read(volts) and not (chip == "ina3221" and int(index) > 3):
            label = tree.read(f"{place}/in{index}_label") or f"{chip} channel {index}"
            rails[label] = partial(_product, tree, chip, (path, volts), 1e6)
    return rails


def meters(tree: Tree) -> list[Sensor]:
    """One sensor of all rails that are metered: the whole board's where there is one, else their sum."""
    rails: dict[str, Callable[[], float]] = {}
    chip = ""
    for place in tree.glob("/sys/class/hwmon/hwmon*"):
        name = tree.read(place + "/name")
        if name.startswith(("ina", "ltc29", "max34", "pac19")):
            found = _rails(tree, place, name)
            rails.update(found)
            chip = name if found else chip
    for place in tree.glob("/sys/bus/i2c/drivers/ina3221x/*/iio:device*") if not rails else []:
        chip = "ina3221"
        for path in tree.glob(place + "/in_power*_input"):
            label = tree.read(place + "/rail_name_" + re.sub(r"\D", "", path.rpartition("/")[2]))
            if label:
                rails[label] = partial(_product, tree, chip, (path,), 1e3)
    rails = {label: read for label, read in rails.items() if label.upper() not in ("NC", "NOT CONNECTED")}
    return [_chosen(chip, rails, 0.05)] if rails else []


def _chosen(chip: str, rails: dict[str, Callable[[], float]], interval_s: float) -> Sensor:
    for label in WHOLE:
        if label in rails:
            return Sensor(f"{chip} {label}", "the whole board", rails[label], interval_s)
    names = ", ".join(sorted(rails))
    return Sensor(
        f"{chip} {names}",
        f"the rails {names}" if len(rails) > 1 else f"the rail {names}",
        lambda: sum(r() for r in rails.values()),
        interval_s,
    )


# ---- tegrastats

TEGRA_RAIL = re.compile(r"\b((?:VDD|VIN|POM|VDDQ|SYS|CV|GPU|CPU|SOC|CVB)\w*) (\d+)(?:mW)?/(\d+)(?:mW)?")
TEGRA_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")


def parse_tegrastats(line: str) -> tuple[dict[str, float], int | None]:
    """(rail → watts, bytes of memory in use by everybody) of one line: `RAM 2462/7620MB … VDD_IN 4832mW/4900mW …`, or without `mW`."""
    used = TEGRA_RAM.search(line)
    return {name: int(now) / 1e3 for name, now, _ in TEGRA_RAIL.findall(line)}, int(used.group(1)) << 20 if used else None


class Tegrastats(Sensor):
    """The program, running; its newest line."""

    def __init__(self, tree: Tree, interval_ms: int = 100) -> None:
        argv = [tree.program("tegrastats"), "--interval", str(interval_ms)]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._line, self._ended = "", False
        self._first = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._first.wait(3.0)
        rails, _ = parse_tegrastats(self._line)
        if not rails:
            self.close()
            raise BadSensorError("tegrastats: " + (f"no rail in '{self._line[:60]}'" if self._line else "said nothing in 3 s"))
        chosen = _chosen("tegrastats", {name: partial(self._rail, name) for name in rails}, interval_ms / 1e3)
        super().__init__(chosen.name, chosen.covers, chosen.watts, interval_ms / 1e3)

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                self._line = line
                self._first.set()
        self._ended = True
        self._first.set()

    def _rail(self, name: str) -> float:
        rails, _ = parse_tegrastats(self._line)
        if self._ended or name not in rails:
            raise BadSensorError("tegrastats: ended" if self._ended else f"tegrastats: {name} is gone")
        return rails[name]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(1.0)


# ---- Raspberry Pi 5

PMIC = re.compile(r"^\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=(-?[\d.]+)[AV]\s*$", re.MULTILINE)


def parse_pmic(text: str) -> float:
    """Watts of the rails whose current is metered: `VDD_CORE_A current(7)=1.51A`, `VDD_CORE_V volt(15)=0.72V`. Raises `BadSensorError`."""
    values = {(name, kind): float(value) for name, kind, value in PMIC.findall(text)}
    both = [name for name, kind in values if kind == "A" and (name, "V") in values]
    if not both:
        raise BadSensorError(
            "vcgencmd pmic_read_adc: " + (f"no rail in '{text[:40]}'" if text else "says nothing (only a Raspberry Pi 5 has it)")
        )
    return sum(values[name, "A"] * values[name, "V"] for name in both)


# ---- RAPL


class _Counter:
    """Microjoules that begin anew at a limit → watts since the last reading."""

    def __init__(self, tree: Tree, places: list[str], now: Callable[[], float]) -> None:
        self.tree, self.places, self.now = tree, places, now
        self.limits = [number(tree.read(p + "/max_energy_range_uj")) or 0.0 for p in places]
        self.before: tuple[float, list[float]] | None = None

    def watts(self) -> float | None:
        seen, at = [_value(self.tree, p + "/energy_uj", "RAPL") for p in self.places], self.now()
        before, self.before = self.before, (at, seen)
        if before is None or at <= before[0]:
            return None
        total = 0.0
        for new, old, limit in zip(seen, before[1], self.limits):  # noqa: B905
            if new < old and not limit:
                raise BadSensorError("RAPL: its counter fell and does not say where it begins anew")
            total += new - old + (limit if new < old else 0.0)
        return total / 1e6 / (at - before[0])


def rapl(tree: Tree, now: Callable[[], float] = time.monotonic) -> list[Sensor]:
    """The whole platform where it is metered (psys), else packages and their memory."""
    zones = {place: tree.read(place + "/name") for place in tree.glob("/sys/class/powercap/intel-rapl:*")}
    psys = [p for p, name in zones.items() if name == "psys"]
    wanted = psys or [p for p, name in zones.items() if name.startswith(("package", "dram"))]
    if not wanted:
        return []
    names = ", ".join(sorted({zones[p] for p in wanted}))
    covers = (
        "the whole platform (psys)"
        if psys
        else "the CPU package" + ("s" if sum(zones[p].startswith("package") for p in wanted) > 1 else "")
    )
    covers += " and memory" if any(zones[p] == "dram" for p in wanted) else ""
    return [Sensor(f"RAPL {names}", covers, _Counter(tree, wanted, now).watts, 0.1, counts=True)]


# ---- batteries


def battery(tree: Tree) -> list[Sensor]:
    found = []
    for place in tree.glob("/sys/class/power_supply/*"):
        if tree.read(place + "/type") == "Battery" and tree.read(place + "/scope") != "Device":
            name = "battery " + place.rpartition("/")[2]
            found.append(Sensor(name, "the whole device, on its battery", partial(_gauge, tree, place, name), 0.5))
    return found


def _gauge(tree: Tree, place: str, name: str) -> float:
    status = tree.read(place + "/status")
    if status.lower() != "discharging":
        raise BadSensorError(
            f"{name}: is {status.lower() or 'in an unknown state'}, so its current is not the device's; unplug the charger"
        )
    if tree.read(place + "/power_now"):
        return abs(_value(tree, place + "/power_now", name)) / 1e6
    current, volts = abs(_value(tree, place + "/current_now", name)), _value(tree, place + "/voltage_now", name)
    return current / (1e3 if current < LEAST_MA else 1e6) * volts / (1e3 if volts < 1e5 else 1e6)


# ---- all of them


def find(tree: Tree) -> tuple[Sensor | None, list[str]]:
    """(the first that works, of those that cover most; why those before it do not)"""
    reasons: list[str] = []
    makers: list[Callable[[], list[Sensor]]] = [lambda: meters(tree)]
    if tree.program("tegrastats"):
        makers.append(lambda: [Tegrastats(tree)])
    if tree.program("vcgencmd"):
        makers.append(
            lambda: [Sensor("vcgencmd pmic_read_adc", PMIC_COVERS, lambda: parse_pmic(tree.said("vcgencmd", "pmic_read_adc")), 0.2)]
        )
    makers += [lambda: battery(tree), lambda: rapl(tree)]
    for make in makers:
        sensor = None
        try:
            for sensor in make():
                sensor.watts()
                return sensor, reasons
        except (BadSensorError, OSError) as error:
            reasons.append(f"no working sensor: {error}")
            if sensor:
                sensor.close()
    if not reasons:
        reasons.append("no working sensor: no metered rail, power chip, battery gauge or RAPL counter is here")
    return None, reasons


PMIC_COVERS = "what the power chip feeds (processor, memory, input and output; not USB devices or HATs)"


class Sampler(threading.Thread):
    """Readings over time, in a process that is not the measured one."""

    def __init__(self, sensor: Sensor, now: Callable[[], float]) -> None:
        super().__init__(daemon=True)
        self.sensor, self.now = sensor, now
        self.times: list[float] = []
        self.watts: list[float] = []
        self.failed, self.spent_s, self.began = "", 0.0, now()
        self._stop_now = threading.Event()

    def run(self) -> None:
        last = self.now()
        while not self._stop_now.wait(self.sensor.interval_s):
            try:
                begun = self.now()
                watts, at = self.sensor.watts(), self.now()
            except (BadSensorError, OSError) as error:
                self.failed = str(error)
                return
            if watts is not None:
                self.times.append((last + at) / 2 if self.sensor.counts else (begun + at) / 2)
                self.watts.append(watts)
            last = at
            self.spent_s += at - begun

    def end(self) -> dict[str, Any]:
        """The series, or `reason`: why it is none."""
        self._stop_now.set()
        self.join(5.0)
        self.sensor.close()
        reason = self.failed
        if not reason and len(self.watts) >= STUCK_AFTER and len(set(self.watts)) == 1:
            reason = f"{self.sensor.name}: {len(self.watts)} readings, all {self.watts[0]:.4g} W: it stands still"
        if not reason and len(self.watts) < 2:
            reason = f"{self.sensor.name}: {len(self.watts)} readings"
        if reason:
            return {"reason": "no working sensor: " + reason}
        span = self.now() - self.began
        return {
            "sensor": self.sensor.name, "covers": self.sensor.covers, "times_s": self.times, "watts": self.watts,
            "sampler_share": self.spent_s / span if span > 0 else None,
        }  # fmt: skip
