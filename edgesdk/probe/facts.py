"""What a device said, read: its cores, caches, memory, disk, system, runtimes, sensors and what tells it from every other board."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import ClassVar

from edgesdk.agent.facts import board_id, emulated
from edgesdk.agent.look import properties
from edgesdk.device import Cache
from edgesdk.errors import DeviceError
from edgesdk.host import FLAGS
from edgesdk.noun import Noun, Part
from edgesdk.probe.cores import core_of

_CPU = "/sys/devices/system/cpu/"
ARCHES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64", "armv7l": "armv7", "armv8l": "armv7"}


BY_HAND = "write its profile by hand from the nearest one: docs/adding-a-device.md"


class Cluster(Part):
    """Cores that are alike: of one part, with one highest clock."""

    core: str
    implementer: int | None = None
    part: int | None = None
    numbers: tuple[int, ...]  # as the system counts them
    cores: int  # of their own, where two threads share one
    min_hz: float | None = None
    max_hz: float | None = None
    allowed_hz: float | None = None  # what the power mode or the user lets it have
    governor: str | None = None
    isa: tuple[str, ...] = ()
    caches: tuple[Cache, ...] = ()


class Zone(Part):
    name: str
    temperature_c: float | None


class Rail(Part):
    """A sensor of power, current or energy. `answers`: it said something when it was asked."""

    name: str
    kind: str  # "ina3221", "hwmon", "pmic", "rapl", "battery"
    answers: bool


class Disk(Part):
    """The file system that holds edgesdk's folder."""

    size_bytes: int | None = None
    free_bytes: int | None = None
    writable: bool | None = None
    device: str | None = None


class Facts(Noun):
    KIND: ClassVar[str] = "device-facts"

    link: str
    via: str  # "agent" or "shell"
    when: str
    board_id: str | None
    identified_by: str
    model: str  # as the board calls itself
    chips: tuple[str, ...]  # other names that say what it is: compatible strings, a phone's device and chip
    arch: str
    android: bool
    system: str
    kernel: str
    emulated: tuple[str, ...]  # reasons to believe so
    clusters: tuple[Cluster, ...]
    memory_bytes: int
    available_bytes: int | None
    disk: Disk
    python: str | None
    runtimes: dict[str, str]  # of that Python, with their versions
    programs: dict[str, str]  # name → path
    nvidia: dict[str, str]  # "l4t", "cuda", "power_mode"
    zones: tuple[Zone, ...]
    rails: tuple[Rail, ...]

    @property
    def governor(self) -> str | None:
        return ", ".join(sorted({c.governor for c in self.clusters if c.governor})) or None


def read_facts(texts: Mapping[str, str], link: str, via: str) -> Facts:
    """Facts of `texts` (see `edgesdk.agent.look`). Raises `DeviceError` where neither cores nor memory can be made out."""
    try:
        return _read({name: re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", " ", text).strip() for name, text in texts.items()}, link, via)
    except ValueError as error:  # a number of a thousand digits
        raise DeviceError(f"{link}: what it tells of itself makes no sense: {str(error).splitlines()[0]}", BY_HAND) from None


def _read(texts: dict[str, str], link: str, via: str) -> Facts:
    def get(name: str) -> str:
        return texts.get(name, "")

    props = properties(get("!getprop"))
    system, kernel, machine = ([*get("!uname").split(), "", "", ""])[:3]
    arch = ARCHES.get(machine.lower())
    clusters = tuple(_clusters(texts, arch or ""))
    memory = _kilobytes(get("/proc/meminfo"), "MemTotal")
    if arch is None:
        raise DeviceError(f"{link}: what it is cannot be read: '{machine}' is no machine edgesdk knows", BY_HAND)
    if not clusters or memory is None:
        lacking = "/proc/meminfo tells no size" if clusters else "/proc/cpuinfo tells of no cores"
        raise DeviceError(f"{link}: what it is cannot be read: {lacking}", BY_HAND)
    number, where = board_id(texts)
    return Facts(
        link=link, via=via, when=datetime.now(UTC).isoformat(timespec="seconds"), board_id=number, identified_by=where,
        model=_model(texts, props), chips=_chips(texts, props), arch=arch, android=bool(props.get("ro.build.version.release")),
        system=_system(texts, props), kernel=f"{system} {kernel}".strip(), emulated=tuple(emulated(get, machine)), clusters=clusters,
        memory_bytes=memory, available_bytes=_kilobytes(get("/proc/meminfo"), "MemAvailable"), disk=_disk(texts),
        python=get("!python") or None, runtimes=_named(texts, "!package "), programs=_named(texts, "!program "), nvidia=_nvidia(texts),
        zones=tuple(_zones(texts)), rails=tuple(_rails(texts)),
    )  # fmt: skip


def _named(texts: Mapping[str, str], head: str) -> dict[str, str]:
    return {name[len(head) :]: text for name, text in sorted(texts.items()) if name.startswith(head)}


def _kilobytes(text: str, key: str) -> int | None:
    match = re.search(rf"^{key}:\s*(\d+)\s*kB", text, re.M)
    return int(match[1]) * 1024 if match and int(match[1]) else None


def _hz(text: str) -> float | None:
    return int(text) * 1e3 if text.isdigit() and int(text) else None


def _blocks(cpuinfo: str) -> dict[int, dict[str, str]]:
    """Core → its keys. Keys behind the last core (of older systems) are everybody's."""
    found: dict[int, dict[str, str]] = {}
    common: dict[str, str] = {}
    for block in re.split(r"\n\s*\n", cpuinfo):
        keys = {name.strip().lower(): value.strip() for name, mark, value in (line.partition(":") for line in block.splitlines()) if mark}
        if keys.get("processor", "").isdigit():
            found[int(keys["processor"])] = keys
        else:
            common |= keys
    return {number: {**common, **keys} for number, keys in found.items()}


def _clusters(texts: Mapping[str, str], arch: str) -> Iterator[Cluster]:
    """The fastest first."""
    blocks = _blocks(texts.get("/proc/cpuinfo", ""))
    numbers = set(blocks) | {int(m[1]) for m in (re.match(_CPU + r"cpu(\d+)/", path) for path in texts) if m}
    alike: dict[tuple[int | None, int | None, str, float | None], list[int]] = {}
    for number in sorted(numbers):
        keys = blocks.get(number, {})
        implementer, part = _part(keys, texts.get(f"{_CPU}cpu{number}/regs/identification/midr_el1", ""))
        name = "" if part is not None else keys.get("model name", "")
        highest = _hz(texts.get(f"{_CPU}cpu{number}/cpufreq/cpuinfo_max_freq", ""))
        alike.setdefault((implementer, part, name.lower(), highest), []).append(number)
    every = [_cluster(texts, blocks, arch, key, mine) for key, mine in alike.items()]
    yield from sorted(every, key=lambda c: (-(c.max_hz or 0.0), -(c.part or 0), c.numbers))


def _cluster(
    texts: Mapping[str, str], blocks: Mapping[int, Mapping[str, str]], arch: str, key: tuple[int | None, int | None, str, float | None],
    numbers: list[int],
) -> Cluster:  # fmt: skip
    (implementer, part, name, highest), first = key, numbers[0]
    keys = blocks.get(first, {})
    flags = set((keys.get("features") or keys.get("flags") or "").split())
    isa = tuple(sorted({known for flag, known in FLAGS.items() if flag in flags}))
    if highest is None:
        told = [float(v) for n in numbers if (v := blocks.get(n, {}).get("cpu mhz", "")) and re.fullmatch(r"[\d.]+", v)]
        highest = max(told) * 1e6 if told else None
    freq = f"{_CPU}cpu{first}/cpufreq/"
    siblings = {texts.get(f"{_CPU}cpu{n}/topology/thread_siblings_list", str(n)) for n in numbers}
    return Cluster(
        core=core_of(implementer, part, isa).name if implementer is not None and part is not None else name or f"unknown {arch}".strip(),
        implementer=implementer, part=part, numbers=tuple(numbers), cores=len(siblings), max_hz=highest,
        min_hz=_hz(texts.get(freq + "cpuinfo_min_freq", "")), allowed_hz=_hz(texts.get(freq + "scaling_max_freq", "")),
        governor=texts.get(freq + "scaling_governor") or None, isa=isa, caches=tuple(_caches(texts, first)),
    )  # fmt: skip


def _part(keys: Mapping[str, str], midr: str) -> tuple[int | None, int | None]:
    """(implementer, part) of a core: of its block in /proc/cpuinfo, else of its MIDR_EL1 (bits 31-24 and 15-4)."""
    try:
        return int(keys["cpu implementer"], 16), int(keys["cpu part"], 16)
    except (KeyError, ValueError):
        if re.fullmatch(r"0x[0-9a-fA-F]+", midr):
            return int(midr, 16) >> 24 & 0xFF, int(midr, 16) >> 4 & 0xFFF
        return None, None


def _caches(texts: Mapping[str, str], number: int) -> Iterator[Cache]:
    """Those that hold data, the nearest first."""
    for index in range(8):
        at = f"{_CPU}cpu{number}/cache/index{index}/"
        level, kind, size = (texts.get(at + name, "") for name in ("level", "type", "size"))
        match = re.fullmatch(r"(\d+)([KM])", size)
        if match and int(match[1]) and level in ("1", "2", "3", "4") and kind != "Instruction":
            shared = _count(texts.get(at + "shared_cpu_list", ""))
            yield Cache(level=int(level), size_bytes=int(match[1]) * {"K": 1024, "M": 1024**2}[match[2]], shared_by=max(1, shared))


def _count(numbers: str) -> int:
    """`0-3,6` → 5."""
    parts = [part.split("-") for part in numbers.split(",") if re.fullmatch(r"\d+(-\d+)?", part)]
    return sum(int(p[-1]) - int(p[0]) + 1 for p in parts)


def _model(texts: Mapping[str, str], props: Mapping[str, str]) -> str:
    phone = " ".join(p for p in (props.get("ro.product.manufacturer", ""), props.get("ro.product.model", "")) if p)
    return texts.get("/proc/device-tree/model") or phone or texts.get("/sys/class/dmi/id/product_name") or "unknown model"


def _chips(texts: Mapping[str, str], props: Mapping[str, str]) -> tuple[str, ...]:
    named = [props.get(n, "") for n in ("ro.product.model", "ro.product.device", "ro.soc.model", "ro.board.platform")]
    hardware = re.findall(r"^Hardware\s*:\s*(.+)$", texts.get("/proc/cpuinfo", ""), re.M)
    compatible = texts.get("/proc/device-tree/compatible", "").split()
    return tuple(dict.fromkeys(n for n in (*named, *hardware, *compatible) if n))


def _system(texts: Mapping[str, str], props: Mapping[str, str]) -> str:
    if release := props.get("ro.build.version.release"):
        return f"Android {release} (API {props.get('ro.build.version.sdk', '?')})"
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', texts.get("/etc/os-release", ""), re.M)
    return match[1] if match else "unknown Linux"


def _disk(texts: Mapping[str, str]) -> Disk:
    writable = {"yes": True, "no": False}.get(texts.get("!writable", ""))
    words = texts.get("!df", "").split()[-6:]
    if len(words) < 6 or not (words[1].isdigit() and words[3].isdigit()):
        return Disk(writable=writable)
    return Disk(size_bytes=int(words[1]) * 1024 or None, free_bytes=int(words[3]) * 1024, writable=writable, device=words[0])


def _nvidia(texts: Mapping[str, str]) -> dict[str, str]:
    """`# R36 (release), REVISION: 4.3, …` → l4t 36.4.3."""
    found = {}
    if match := re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", texts.get("/etc/nv_tegra_release", "")):
        found["l4t"] = f"{match[1]}.{match[2]}"
    if match := re.search(r"release [\d.]+, V([\d.]+)", texts.get("!nvcc", "")):
        found["cuda"] = match[1]
    elif text := texts.get("/usr/local/cuda/version.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            found["cuda"] = str(json.loads(text)["cuda"]["version"])
    if match := re.search(r"NV Power Mode:\s*(?:MODE_)?(\S+)", texts.get("!nvpmodel", "")):
        found["power_mode"] = match[1]
    return found


def _zones(texts: Mapping[str, str]) -> Iterator[Zone]:
    for path, name in sorted(texts.items()):
        if match := re.fullmatch(r"/sys/class/thermal/thermal_zone(\d+)/type", path):
            said = texts.get(f"/sys/class/thermal/thermal_zone{match[1]}/temp", "")
            celsius = int(said) / 1000 if re.fullmatch(r"-?\d+", said) else None
            yield Zone(name=name, temperature_c=celsius if celsius is not None and -40 < celsius < 200 else None)


def _rails(texts: Mapping[str, str]) -> Iterator[Rail]:
    for path, name in sorted(texts.items()):
        folder, _, last = path.rpartition("/")
        if path.startswith("/sys/class/hwmon/") and re.fullmatch(r"in\d+_label", last):
            chip = texts.get(folder + "/name", "hwmon")
            both = [f"{folder}/in{last[2:-6]}_input" in texts, f"{folder}/curr{last[2:-6]}_input" in texts]
            if name != "NC" and (both[1] or chip.startswith("ina")):
                yield Rail(name=name, kind=chip, answers=all(both))
        elif path.startswith("/sys/class/hwmon/") and re.fullmatch(r"power\d+_(input|average)", last):
            yield Rail(name=f"{texts.get(folder + '/name', 'hwmon')} {last.split('_')[0]}", kind="hwmon", answers=name.isdigit())
        elif last.startswith("rail_name_") and "ina3221x" in path:
            yield Rail(name=name, kind="ina3221", answers=f"{folder}/in_power{last[-1]}_input" in texts)
        elif path.startswith("/sys/class/powercap/") and last == "name":
            yield Rail(name=name, kind="rapl", answers=folder + "/energy_uj" in texts)
        elif path.startswith("/sys/class/power_supply/") and last == "type" and name == "Battery":
            yield Rail(
                name=folder.rpartition("/")[2], kind="battery", answers=any(f"{folder}/{f}" in texts for f in ("current_now", "power_now"))
            )
    for name in dict.fromkeys(re.findall(r"^\s*(\S+)_A current\(\d+\)=", texts.get("!pmic", ""), re.M)):
        yield Rail(name=name, kind="pmic", answers=True)
