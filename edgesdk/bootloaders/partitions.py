"""The partition table of an ESP32: entries of 32 bytes from 0x8000 on, closed by their MD5.

The form: ESP-IDF Programming Guide, "Partition Tables", and its `esp_flash_partitions.h`.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from edgesdk.errors import CheckFailed, DeviceError, InputError, UnknownName
from edgesdk.units import show_bytes

TABLE_AT, TABLE_BYTES, SECTOR = 0x8000, 0xC00, 0x1000
APP, DATA = 0, 1
_ENTRY = struct.Struct("<HBBII16sI")
_MAGIC, _MD5 = 0x50AA, b"\xeb\xeb" + b"\xff" * 14
_SYSTEM = {0: "ota", 1: "phy", 2: "nvs", 3: "coredump", 4: "nvs_keys", 5: "efuse"}
"""Subtypes of data that the system keeps for itself."""
LABELS = ("model", "edgesdk")


@dataclass(frozen=True)
class Partition:
    label: str
    type: int
    subtype: int
    offset: int
    size: int
    encrypted: bool

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def kind(self) -> str:
        if self.type == APP:
            return "app"
        return _SYSTEM.get(self.subtype, "data") if self.type == DATA else "data"

    def __str__(self) -> str:
        return f"{self.label} ({self.kind}, {show_bytes(self.size)} at 0x{self.offset:x})"


def parse_table(content: bytes, where: str) -> tuple[Partition, ...]:
    """The partitions of a table as it lies in flash. Raises `DeviceError` (none there) or `CheckFailed` (spoiled)."""
    found: list[Partition] = []
    for at in range(0, len(content) - 31, 32):
        entry = content[at : at + 32]
        if entry[:16] == _MD5:
            if hashlib.md5(content[:at], usedforsecurity=False).digest() != entry[16:]:
                raise CheckFailed(f"{where}: the partition table's MD5 is wrong", "flash the firmware again: `--firmware merged.bin`")
            break
        if entry == b"\xff" * 32:
            break
        magic, kind, subtype, offset, size, label, flags = _ENTRY.unpack(entry)
        if magic != _MAGIC or not size:
            if not found:
                hint = "flash a firmware first (a merged one: `--firmware merged.bin`), or give ?table=0x… if its table is elsewhere"
                raise DeviceError(f"{where}: no partition table there", hint)
            raise CheckFailed(f"{where}: entry {at // 32} of the partition table is spoiled", "flash the firmware again")
        found.append(Partition(label.split(b"\0")[0].decode("utf-8", "replace"), kind, subtype, offset, size, bool(flags & 1)))
    if not found:
        raise DeviceError(f"{where}: no partition table there", "flash a firmware first (a merged one: `--firmware merged.bin`)")
    return tuple(found)


def place_model(
    table: tuple[Partition, ...], size: int, name: str | None, offset: int | None, name_of: str
) -> tuple[int, Partition | None]:
    """Where a model of `size` bytes goes: into the partition `name` (else one labelled model or edgesdk), or to `offset`.

    Raises `UnknownName`, or `InputError` where it does not fit or would lie over what is not its own.
    """
    if offset is not None:
        return offset, _free(table, offset, size, name_of)
    labels = (name,) if name else LABELS
    part = next((p for label in labels for p in table if p.label == label), None)
    if part is None and name:
        raise UnknownName("partition", name, [p.label for p in table])
    if part is None:
        have = ", ".join(str(p) for p in table)
        hint = f"add `model, data, 0x40, , 1M` to its partitions.csv, or name one (?partition=…) of: {have}"
        raise InputError("the board has no partition labelled model or edgesdk", hint)
    if part.kind != "data":
        raise InputError(
            f"partition {part}: is not for data", "a model goes into a partition of type data, or of a type of its own (0x40 and on)"
        )
    if size > part.size:
        what = f"{name_of}: {show_bytes(size)} do not fit in partition {part}"
        raise InputError(what, "build a smaller plan (--storage), or enlarge the partition")
    return part.offset, part


def _free(table: tuple[Partition, ...], offset: int, size: int, name_of: str) -> Partition | None:
    """The partition that holds all of a span, None if it is in no partition. Raises `InputError`."""
    if offset % SECTOR:
        raise InputError(f"offset=0x{offset:x} is not at the start of a sector", f"flash is erased in steps of 0x{SECTOR:x}")
    end = offset + -(-size // SECTOR) * SECTOR
    if offset < TABLE_AT + SECTOR:
        raise InputError(
            f"offset=0x{offset:x}: bootloader and partition table are there", "a model goes behind them, into a partition of its own"
        )
    for part in table:
        if offset < part.end and part.offset < end and not (part.kind == "data" and part.offset <= offset and end <= part.end):
            what = f"{name_of}: 0x{offset:x} to 0x{end:x} would lie over partition {part}"
            raise InputError(what, "give the offset of a partition for data that is large enough, or leave ?offset= out")
    return next((p for p in table if p.offset <= offset < p.end), None)


def place_app(table: tuple[Partition, ...], size: int, name: str | None, name_of: str) -> Partition:
    """The partition that a program for the chip goes into: `name`, else the only one, else `factory`. Raises `UnknownName` or `InputError`."""
    apps = {p.label: p for p in table if p.type == APP}
    if name and name not in apps:
        raise UnknownName("app partition", name, apps)
    part = apps.get(name or "factory") or (next(iter(apps.values())) if len(apps) == 1 else None)
    if part is None:
        raise InputError(f"{name_of}: into which of {', '.join(apps) or 'no app partitions'}?", "say it: ?partition=ota_0")
    if size > part.size:
        raise InputError(
            f"{name_of}: {show_bytes(size)} do not fit in partition {part}", "build a smaller firmware, or enlarge the partition"
        )
    return part
