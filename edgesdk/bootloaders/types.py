"""What all bootloaders share: the text after `--to`, what is to be written, and what came of it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qsl

from edgesdk.errors import DeviceError, InputError, MissingTool, UnknownName
from edgesdk.install import Source, read_source
from edgesdk.noun import Noun
from edgesdk.signing import Signer, signer_of

FORMS = {
    "esp32": "esp32:/dev/ttyUSB0",
    "uf2": "uf2:/media/RPI-RP2",
    "smp": "smp:/dev/ttyACM0",
    "jetson": "jetson:/path/Linux_for_Tegra?board=jetson-orin-nano-devkit",
}
"""Kind → how it is written."""
Watch = Callable[[str, float], None]
"""`watch("writing", 0.4)`: what is being done and the share of it done."""


class BoardWrite(Noun):
    """What was written to a board, or with a dry run would be."""

    KIND: ClassVar[str] = "board-write"

    action: Literal["written", "already-there", "dry-run"]
    to: str
    board: str  # what the board, or its flasher's folder, says of itself; with a dry run of serial links what is known without asking
    payload: str  # what was written, in words
    size_bytes: int
    sha256: str
    address: int | None = None  # in the board's flash, where one is known
    verified: str = ""  # how it was checked after writing; empty with a dry run
    signer: str | None = None  # of the bundle; None: a file, or not asked for
    steps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Where:
    """`KIND:PATH?a=1&b=2`, taken apart."""

    text: str
    kind: str
    path: str
    options: dict[str, str]

    def number(self, name: str, default: int, least: int = 1, most: int = 1 << 40) -> int:
        """An option as a number, decimal or `0x…`. Raises `InputError`."""
        given = self.options.get(name)
        if given is None:
            return default
        try:
            value = int(given, 0)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise InputError(
                f"{self.text}: {name}={given}: not a number from {least} to {most}", f"write it like {name}={default or '0x110000'}"
            )
        return value

    def yes(self, name: str, default: bool) -> bool:
        """An option as yes or no. Raises `InputError`."""
        given = self.options.get(name, "yes" if default else "no")
        if given not in ("yes", "no"):
            raise InputError(f"{self.text}: {name}={given}: neither yes nor no", f"write {name}=yes or {name}=no")
        return given == "yes"


def is_board(to: str) -> bool:
    """Whether the text after `--to` names a board's bootloader."""
    return to.partition(":")[0] in FORMS and ":" in to


def parse_where(to: str, known: Iterable[str]) -> Where:
    """The text after `--to`; `known` are the names of its options. Raises `InputError`."""
    head, _, query = to.partition("?")
    kind, _, path = head.partition(":")
    if kind not in FORMS or not path:
        raise InputError(f"--to {to}: not a board", f"write it like {FORMS.get(kind, ', '.join(FORMS.values()))}")
    options = dict(parse_qsl(query, keep_blank_values=True))
    names = list(known)
    for name in options:
        if name not in names:
            raise UnknownName(f"option of {kind}:", name, names)
    return Where(to, kind, path, options)


def open_port(path: str, baud: int = 115200) -> Any:
    """A serial port that nobody else has open. Raises `DeviceError`, or `MissingTool` without pyserial."""
    try:
        import serial
    except ImportError:
        raise MissingTool("pyserial is not installed", "pip install -c constraints.txt 'edgesdk[boards]'") from None
    try:
        return serial.serial_for_url(path, baudrate=baud, exclusive=True)
    except (serial.SerialException, ValueError) as error:
        code = getattr(error, "errno", None)
        why, hint = {
            errno.ENOENT: ("no such port", "`edgesdk devices ports` lists what is plugged in"),
            errno.EACCES: ("you may not open it", "join the group that owns it (dialout), then log in anew"),
            errno.EAGAIN: ("another program has it open", "close the serial monitor, then run the command again"),
            errno.EBUSY: ("another program has it open", "close the serial monitor, then run the command again"),
        }.get(code or 0, (f"cannot be opened ({error})", "`edgesdk devices ports` lists what is plugged in"))
        raise DeviceError(f"{path}: {why}", hint) from None


@dataclass(frozen=True)
class Payload:
    """What is to be written: the program of a bundle, or a firmware's file as it is."""

    name: str
    content: bytes
    firmware: Path | None
    source: Source | None
    signer: Signer | None = None

    @property
    def signed_by(self) -> str | None:
        """Name and id of the trusted key, None where none was asked for."""
        return f"{self.signer.name} ({self.signer.id})" if self.signer else None

    @property
    def sha256(self) -> str:
        from edgesdk.bundles import sha256

        return sha256(self.content)


def note_on_board(payload: Payload, board: str) -> tuple[str, ...]:
    """A note if the program was planned for another board than `board`, a profile's name."""
    built = payload.source.manifest.device if payload.source else board
    return () if built == board else (f"built for {built}, this is {board}: the plan's times and memory are not of this board",)


def read_payload(bundle: str | None, firmware: str | None, allow_unsigned: bool = False, micro: bool = True) -> Payload:
    """The program of a verified and signed bundle (`micro`: one for microcontrollers), or a firmware's file. Raises `InputError` or `CheckFailed`."""
    if (bundle is None) == (firmware is None):
        raise InputError("--to a board wants one of: a bundle, --firmware FILE", "edgesdk flash model.edge --to esp32:/dev/ttyUSB0")
    if bundle is not None:
        from edgesdk.bundles import read_member

        source = read_source(bundle)
        signer = None if allow_unsigned else signer_of(bundle)
        runtime, name = source.manifest.runtime, source.manifest.program
        if micro and runtime != "tflite-micro":
            what = f"{bundle}: built for {source.manifest.device} with {runtime}, which reads no program out of a microcontroller's flash"
            hint = "build it for the board: edgesdk build --model … --device esp32-s3 (`edgesdk devices list`)"
            linked = "link its program into the firmware, then: --firmware FILE"
            raise InputError(what, linked if runtime == "executorch-ethos-u" else hint)
        content = read_member(bundle, name)
        return Payload(f"{name} of {Path(bundle).name}", content, None, source, signer)
    path = Path(str(firmware))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "give the firmware's file") from None
    if not content:
        raise InputError(f"{path}: is empty", "give the firmware's file")
    return Payload(path.name, content, path, None)
