"""UF2: blocks of 512 bytes that say for themselves where they belong, copied onto the volume that a board's bootloader shows.

The form: https://github.com/microsoft/uf2 (README); families: its utils/uf2families.json; RP2350's own: RP2350 datasheet, section 5.5.3 and picobin's headers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgesdk.bootloaders.types import BoardWrite, Payload, Watch, Where, note_on_board, parse_where
from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError, select_by_name
from edgesdk.units import parse_bytes, show_bytes

OPTIONS = ("family", "address", "flash")
BLOCK, DATA = 512, 256
_HEAD = struct.Struct("<8I")
_START, _SECOND, _END = 0x0A324655, 0x9E5D5157, 0x0AB16F30
_NOT_FLASH, _CONTAINER, _FAMILY = 0x1, 0x1000, 0x2000
SECTOR = 4096
CHUNK = 128 * BLOCK
LEAVES_S = 10.0
"""How long a volume may stay after its last block."""
FAMILIES = {
    "rp2040": 0xE48BFF56, "rp2350-absolute": 0xE48BFF57, "rp2350-data": 0xE48BFF58, "rp2350-arm": 0xE48BFF59, "rp2350-riscv": 0xE48BFF5A,
    "rp2350-arm-ns": 0xE48BFF5B, "samd21": 0x68ED2B88, "samd51": 0x55114460, "nrf52840": 0xADA52840, "esp32s2": 0xBFDD4EEE,
    "esp32s3": 0xC47E5767,
}  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """What its bootloader says, which families it takes; for those that take data at an address, where flash is and how much a board has at least."""

    name: str
    says: str  # a pattern of Board-ID
    families: tuple[str, ...]
    profile: str = ""
    flash: int | None = None
    flash_bytes: int = 0
    most_bytes: int = 0


CHIPS = (
    Chip(
        "RP2350", r"RP2350", ("rp2350-absolute", "rp2350-data", "rp2350-arm", "rp2350-riscv", "rp2350-arm-ns"), "raspberry-pi-pico-2",
        0x10000000, 4 << 20, 32 << 20,
    ),
    Chip("RP2040", r"RPI-RP2$", ("rp2040",), "raspberry-pi-pico", 0x10000000, 2 << 20, 16 << 20),
    Chip("SAMD21", r"SAMD21", ("samd21",)),
    Chip("SAMD51", r"SAMD51", ("samd51",)),
    Chip("nRF52840", r"nRF52840", ("nrf52840",)),
    Chip("ESP32-S2", r"ESP32-?S2", ("esp32s2",)),
    Chip("ESP32-S3", r"ESP32-?S3", ("esp32s3",)),
)  # fmt: skip


@dataclass(frozen=True)
class Image:
    """A whole UF2 file: the families in it, and from where to where it writes (end exclusive) in each."""

    blocks: int
    spans: dict[int, tuple[int, int]]  # family id, 0 where none is given

    @property
    def families(self) -> tuple[int, ...]:
        return tuple(self.spans)


def make(content: bytes, address: int, family: int) -> bytes:
    """`content` at `address` as UF2; the last block is filled up with 0xFF, as erased flash is."""
    count = -(-len(content) // DATA)
    blocks = []
    for i in range(count):
        data = content[i * DATA : (i + 1) * DATA].ljust(DATA, b"\xff")
        head = _HEAD.pack(_START, _SECOND, _FAMILY, address + i * DATA, DATA, i, count, family)
        blocks.append(head + data.ljust(476, b"\0") + struct.pack("<I", _END))
    return b"".join(blocks)


def read(content: bytes, name: str) -> Image:
    """A UF2 file, checked block by block. Raises `InputError` naming the block."""
    if not content or len(content) % BLOCK:
        raise InputError(f"{name}: {len(content)} bytes are not whole blocks of {BLOCK}", "build or copy the .uf2 file again")
    spans: dict[int, tuple[int, int]] = {}
    expected: dict[int, tuple[int, int]] = {}  # family → next block, blocks in all
    for i in range(len(content) // BLOCK):
        at = i * BLOCK
        start, second, flags, address, size, number, count, family = _HEAD.unpack_from(content, at)
        if (start, second, struct.unpack_from("<I", content, at + BLOCK - 4)[0]) != (_START, _SECOND, _END):
            raise InputError(f"{name}: block {i} is not UF2 (its magic numbers are wrong)", "build or copy the .uf2 file again")
        if flags & (_NOT_FLASH | _CONTAINER) or _is_spare(content, at):
            continue
        family = family if flags & _FAMILY else 0
        if not 1 <= size <= 476 or address % 4:
            raise InputError(f"{name}: block {i} holds {size} bytes for address 0x{address:08x}", "build the .uf2 file again")
        wanted, blocks = expected.get(family, (0, count))
        if number != wanted or count != blocks or number >= count:
            raise InputError(
                f"{name}: block {i} says {number} of {count}, wanted {wanted} of {blocks}", "blocks are lost: copy or build it again"
            )
        low, high = spans.get(family, (address, address))
        if number and address < high:
            raise InputError(f"{name}: block {i} writes at 0x{address:08x}, before the end of another", "build the .uf2 file again")
        spans[family], expected[family] = (low, address + size), (number + 1, count)
    for family, (following, count) in expected.items():
        if following != count:
            raise InputError(
                f"{name}: ends after block {following} of {count} (family 0x{family:08x})", "it is cut off: copy or build it again"
            )
    if not spans:
        raise InputError(f"{name}: writes nothing into flash", "give the .uf2 file of a firmware")
    return Image(len(content) // BLOCK, spans)


def _is_spare(content: bytes, at: int) -> bool:
    """The block that picotool puts before an RP2350's firmware for erratum E10: of no data, and not counted with the others."""
    _, _, _, _, size, number, count, family = _HEAD.unpack_from(content, at)
    plain = content[at + 32 : at + 32 + DATA] == b"\xef" * DATA
    return family == FAMILIES["rp2350-absolute"] and (size, number, count) == (DATA, 0, 2) and plain


def board_of(volume: Path) -> tuple[str, Chip | None]:
    """What INFO_UF2.TXT says, and the chip if it is a known one. Raises `DeviceError` where there is no such file."""
    try:
        text = (volume / "INFO_UF2.TXT").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        hint = (
            "hold the board's BOOT button while it is plugged in, then give the folder its volume is mounted at (`edgesdk devices ports`)"
        )
        raise DeviceError(f"{volume}: no UF2 volume there: INFO_UF2.TXT cannot be read ({error.strerror})", hint) from None
    fields = dict(re.findall(r"^([\w-]+):[ \t]*(.*?)\s*$", text, re.MULTILINE))
    board_id, model = fields.get("Board-ID", ""), fields.get("Model", "")
    chip = next((c for c in CHIPS if re.match(c.says, board_id, re.IGNORECASE)), None)
    return f"{model or 'unknown board'} ({board_id or 'no Board-ID'})", chip


def _at_address(payload: Payload, where: Where, chip: Chip | None, board: str) -> tuple[bytes, int]:
    """A program or a plain binary as UF2 at an address. Raises `InputError`."""
    if chip is None or chip.flash is None:
        raise InputError(f"{where.text}: {board} takes no data at an address from edgesdk", "give a whole firmware: --firmware FILE.uf2")
    size = int(parse_bytes(where.options["flash"])) if "flash" in where.options else chip.flash_bytes
    if size > chip.most_bytes:
        raise InputError(
            f"{where.text}: flash={where.options['flash']}: {chip.name} reaches {show_bytes(chip.most_bytes)}", "give the board's size"
        )
    default = chip.flash if payload.firmware else None
    if default is None and "address" not in where.options:
        hint = f"add ?address=0x{chip.flash + size // 2:08x}, where the firmware looks for its model, or give --firmware FILE.uf2 that holds it"
        raise InputError(f"{where.text}: where in flash is the model to be written?", hint)
    address = where.number("address", default or 0)
    if address % SECTOR or address < chip.flash:
        raise InputError(
            f"{where.text}: address 0x{address:08x} is not a sector of flash", f"from 0x{chip.flash:08x} on, in steps of 0x{SECTOR:x}"
        )
    room = chip.flash + size - address
    if len(payload.content) > room:
        what = f"{payload.name}: {show_bytes(len(payload.content))} from 0x{address:08x} on, {show_bytes(max(room, 0))} are there"
        raise InputError(
            what, f"flash wraps around behind its {show_bytes(size)}: give a lower address, or ?flash=16MB if the board has more"
        )
    name = where.options.get("family", "rp2350-arm" if payload.firmware and chip.name == "RP2350" else chip.families[0])
    return make(payload.content, address, select_by_name("UF2 family", name, FAMILIES)), address


def _checked(content: bytes, name: str, where: Where, chip: Chip | None, board: str) -> Image:
    """The blocks, of families that this board takes, within its flash. Raises `InputError`."""
    image = read(content, name)
    asked = where.options.get("family")
    if chip is None and asked is None:
        known = ", ".join(c.name for c in CHIPS)
        raise InputError(f"{where.text}: {board} is none of {known}", "say which family it takes: ?family=0xADA52840")
    allowed = {FAMILIES[f] for f in chip.families} if chip else set()
    if asked is not None and not (asked.lower() in FAMILIES and chip):
        allowed = {FAMILIES[asked.lower()] if asked.lower() in FAMILIES else where.number("family", 0)}
    names = {v: k for k, v in FAMILIES.items()}
    for family, (low, high) in image.spans.items():
        if family not in allowed:
            what = f"{name}: made for {names.get(family, f'family 0x{family:08x}' if family else 'no family')}, the board is {board}"
            raise InputError(what, "build the firmware for this board" + ("" if chip is None else f" ({chip.name})"))
        if chip and chip.flash is not None and not (chip.flash <= low and high <= chip.flash + chip.most_bytes) and low < 0x20000000:
            raise InputError(
                f"{name}: writes 0x{low:08x} to 0x{high:08x}, outside {chip.name}'s flash", "build the firmware for this board"
            )
    return image


def write_uf2(
    to: str, payload: Payload, *, dry_run: bool = False, watch: Watch | None = None, opener: Callable[[Path], int] | None = None
) -> BoardWrite:
    """Copy a .uf2 file, or make one of a program at an address, onto a board's volume.

    Raises `InputError` (a wrong file, another board's), `DeviceError` (no volume, full, not taken) and `LinkError` (unplugged before all was written).
    """
    where = parse_where(to, OPTIONS)
    volume = Path(where.path)
    board, chip = board_of(volume)
    address: int | None = None
    if payload.firmware and payload.content[:4] == struct.pack("<I", _START):
        content = payload.content
    else:
        content, address = _at_address(payload, where, chip, board)
    image = _checked(content, payload.name, where, chip, board)
    low, high = min(s[0] for s in image.spans.values()), max(s[1] for s in image.spans.values())
    target = volume / "EDGESDK.UF2"
    steps = (
        f"check {payload.name}: {image.blocks} blocks, 0x{low:08x} to 0x{high:08x}, families {', '.join(f'0x{f:08x}' for f in image.families)}",
        f"copy  {target}  # {show_bytes(len(content))}, each part on the board before the next",
        f"wait  for {volume} to go, as it does when the board has every block and starts",
    )
    verified = ""
    if not dry_run:
        copy(content, target, watch, opener or _open)
        _await_leave(volume, watch)
        verified = "every block was taken and the board has started anew; UF2 has no way to read flash back"
    return BoardWrite(
        action="dry-run" if dry_run else "written", to=to, board=board, payload=payload.name, size_bytes=len(payload.content),
        sha256=payload.sha256, address=low if address is None else address, verified=verified, signer=payload.signed_by, steps=steps,
        notes=note_on_board(payload, chip.profile) if chip and chip.profile else (),
    )  # fmt: skip


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DSYNC, 0o644)


def copy(content: bytes, target: Path, watch: Watch | None, opener: Callable[[Path], int]) -> None:
    """Write and sync, the last block apart: a board leaves as soon as it has that one, and what fails behind it is no failure.

    Raises `DeviceError` or `LinkError`.
    """
    last = len(content) - BLOCK
    ends = [*range(CHUNK, last, CHUNK), *([last] if last else []), len(content)]
    done = 0
    try:
        handle = opener(target)
    except OSError as error:
        raise DeviceError(
            f"{target}: cannot be written ({error.strerror})", "is the volume mounted for you to write? unplug the board and try again"
        ) from None
    try:
        for end in ends:
            while done < end:
                done += os.write(handle, content[done:end])
            os.fsync(handle)
            if watch:
                watch(f"copying {show_bytes(len(content))}", done / len(content))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DeviceError(f"{target.parent}: the volume is full", "remove files from it, or unplug the board and try again") from None
        if done < last or not _gone(target.parent):
            what = f"{target.parent}: the volume failed after {show_bytes(done)} of {show_bytes(len(content))} ({error.strerror})"
            raise LinkError(what, "the board holds half a program: put it into its bootloader again and run the same command") from None
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)


def _gone(volume: Path) -> bool:
    try:
        return not (volume / "INFO_UF2.TXT").is_file()
    except OSError:
        return True


def _await_leave(volume: Path, watch: Watch | None) -> None:
    """Raises `CheckFailed` if the volume stays: the board did not take the file."""
    if watch:
        watch("waiting for the board to start", 1.0)
    end = time.monotonic() + LEAVES_S
    while not _gone(volume):
        if time.monotonic() > end:
            what = f"{volume}: is still there {LEAVES_S:.0f} s after the last block: the board did not take the file"
            raise CheckFailed(what, "unplug it, put it into its bootloader again and run the same command")
        time.sleep(0.05)
