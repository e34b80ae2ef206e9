"""What is plugged into this machine and may be written to or worked on: serial ports, UF2 volumes, Jetsons in recovery mode, phones."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgesdk.bootloaders.jetson import NVIDIA, in_recovery
from edgesdk.bootloaders.uf2 import board_of
from edgesdk.noun import Noun, Part

_ESPRESSIF = 0x303A
_BRIDGES = {
    (0x10C4, 0xEA60): "CP210x", (0x10C4, 0xEA70): "CP2105", (0x1A86, 0x7523): "CH340", (0x1A86, 0x55D4): "CH9102", (0x0403, 0x6001): "FT232R",
    (0x0403, 0x6010): "FT2232", (0x0403, 0x6015): "FT231X", (0x067B, 0x2303): "PL2303",
}  # fmt: skip
"""Chips between USB and a serial line, as ESP32 boards and cables to consoles have them (ids: the Linux kernel's usb/serial drivers)."""
_LABELS = ("RPI-RP2", "RP2350")
"""Volumes that may be there and not mounted."""


class Port(Part):
    kind: Literal["serial", "uf2", "jetson", "adb"]
    name: str  # a device file, a folder, a place on USB, a phone's serial
    what: str
    usb: str | None = None  # vendor and product id, "10c4:ea60"
    use: tuple[str, ...] = ()  # what may be typed for it


class Ports(Noun):
    KIND: ClassVar[str] = "ports"

    ports: tuple[Port, ...]


@dataclass(frozen=True)
class Here:
    """Where to look; other places for tests."""

    sys: Path = Path("/sys")
    mounts: Path = Path("/proc/mounts")
    labels: Path = Path("/dev/disk/by-label")
    serial: Callable[[], Iterable[Any]] | None = None  # as pyserial's `comports`
    adb: str | None = None  # the program


def list_ports(here: Here = Here()) -> Ports:
    """All of them, in order of kind and name. What cannot be asked (no pyserial, no adb) is left out."""
    return Ports(ports=(*_serial(here), *_uf2(here), *_jetsons(here), *_phones(here)))


def _serial(here: Here) -> list[Port]:
    if here.serial is None and importlib.util.find_spec("serial") is None:
        return []
    if here.serial is None:
        from serial.tools.list_ports import comports
    found = []
    for port in sorted((here.serial or comports)(), key=lambda p: p.device):
        if port.vid is None:
            found.append(Port(kind="serial", name=port.device, what="a serial port of this machine", use=(f"--on serial:{port.device}",)))
            continue
        bridge = _BRIDGES.get((port.vid, port.pid))
        maker = " ".join(t for t in (port.manufacturer, port.product) if t) or bridge or "unknown"
        what = maker + (f", serial number {port.serial_number}" if port.serial_number else "")
        console = () if port.vid == _ESPRESSIF else (f"--on serial:{port.device}",)
        use = (f"--to {'esp32' if bridge or not console else 'smp'}:{port.device}", *console)
        found.append(Port(kind="serial", name=port.device, what=what, usb=f"{port.vid:04x}:{port.pid:04x}", use=use))
    return found


def _uf2(here: Here) -> list[Port]:
    try:
        lines = [line.split() for line in here.mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        lines = []
    mounted = {os.path.realpath(w[0]): _unescaped(w[1]) for w in lines if len(w) > 2 and w[2] in ("vfat", "msdos", "exfat")}
    found = []
    for folder in sorted(mounted.values()):
        if (Path(folder) / "INFO_UF2.TXT").is_file():
            board, chip = board_of(Path(folder))
            wants = "?address=0x…" if chip and chip.flash is not None else " --firmware FILE.uf2"
            found.append(Port(kind="uf2", name=folder, what=board, use=(f"--to uf2:{folder}{wants}",)))
    for label in _LABELS:
        at = here.labels / label
        if at.exists() and os.path.realpath(at) not in mounted:
            use = (f"udisksctl mount -b {os.path.realpath(at)}",)
            found.append(Port(kind="uf2", name=str(at), what="a board in its bootloader, its volume not mounted", use=use))
    return found


def _unescaped(text: str) -> str:
    """A mount point as /proc/mounts writes it: blanks in octal."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


def _jetsons(here: Here) -> list[Port]:
    return [
        Port(
            kind="jetson", name=r.port, what=f"Jetson {r.module} in recovery mode", usb=f"{NVIDIA}:{r.product}",
            use=(f"--to 'jetson:/path/Linux_for_Tegra?board=…&usb={r.port}'",),
        )
        for r in in_recovery(here.sys)
    ]  # fmt: skip


def _phones(here: Here) -> list[Port]:
    adb = here.adb or shutil.which("adb")
    if adb is None:
        return []
    try:
        said = subprocess.run([adb, "devices", "-l"], capture_output=True, text=True, errors="replace", timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in said.partition("List of devices attached")[2].splitlines():
        words = line.split()
        if len(words) < 2:
            continue
        model = next((w.partition(":")[2] for w in words[2:] if w.startswith("model:")), "")
        if words[1] == "device":
            found.append(Port(kind="adb", name=words[0], what=model or "a phone", use=(f"--on adb://{words[0]}",)))
        else:
            hint = {"unauthorized": "allow this machine on the phone's screen"}.get(words[1], "plug it in again")
            found.append(Port(kind="adb", name=words[0], what=f"{words[1]}: {hint}"))
    return found
