"""What is in a disk image: its partitions (MBR, GPT, or one bare file system) and the file system in each. Reads only.

Layouts: UEFI specification 2.10 §5 (MBR, GPT); ext4's superblock from the kernel's Documentation/filesystems/ext4/super.rst; FAT from Microsoft's fatgen103.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from edgesdk.errors import CheckFailed, InputError
from edgesdk.units import show_bytes

SECTOR = 512
MOST_PARTITIONS = 128
Kind = Literal["ext4", "fat", "other"]
_EXTENDED = (0x05, 0x0F, 0x85)


@dataclass(frozen=True)
class Partition:
    """`number` as the system counts (0: the whole image is one file system); `start_bytes` and `size_bytes` within the image."""

    number: int
    start_bytes: int
    size_bytes: int
    kind: Kind
    label: str = ""

    def __str__(self) -> str:
        name = f"partition {self.number}" if self.number else "the file system"
        return f"{name} ({self.kind}, {show_bytes(self.size_bytes)}{f', {self.label}' if self.label else ''})"


@dataclass(frozen=True)
class Ext4:
    """What an ext2, ext3 or ext4 superblock says."""

    block_bytes: int
    blocks: int
    free_blocks: int
    reserved_blocks: int
    free_inodes: int
    clean: bool  # unmounted cleanly: no journal to replay, no errors noted
    label: str

    @property
    def free_bytes(self) -> int:
        """What may be used, without what is reserved for root."""
        return max(0, self.free_blocks - self.reserved_blocks) * self.block_bytes


def partitions(path: Path, shown: Path | None = None) -> list[Partition]:
    """The partitions of an image, which errors call `shown`. Raises `InputError` (no table, no file system) and `CheckFailed` (cut off, damaged table)."""
    size = path.stat().st_size
    shown = shown or path
    with path.open("rb") as image:
        bare = _kind(image, 0, size)
        if bare[0] != "other":
            found = [Partition(0, 0, size, *bare)]
        else:
            spans = _spans(image, size, path)
            found = [Partition(n, start, length, *_kind(image, start, length if start < size else 0)) for n, start, length in spans]
        for part in found:
            _whole(image, part, size, shown)
    return found


def ext4(path: Path, part: Partition) -> Ext4:
    """The superblock of an ext4 partition."""
    with path.open("rb") as image:
        return _superblock(_read(image, part.start_bytes + 1024, 1024))


def pick(found: list[Partition], kind: Kind, wanted: int | None, path: Path) -> Partition:
    """The partition numbered `wanted`, else the largest of a kind. Raises `InputError` that lists what is there."""
    matching = [p for p in found if p.kind == kind and wanted in (None, p.number)]
    if matching:
        return max(matching, key=lambda p: p.size_bytes)
    listed = "; ".join(map(str, found))
    which = f"partition {wanted} of kind {kind}" if wanted is not None else f"{kind} partition"
    what = {"ext4": "the root file system", "fat": "the boot partition"}.get(kind, kind)
    raise InputError(f"{path}: no {which} found, there is: {listed}", f"edgesdk puts files into {what} of kind {kind}; give such an image")


def _read(image: BinaryIO, at: int, count: int) -> bytes:
    image.seek(at)
    return image.read(count).ljust(count, b"\0")


def _spans(image: BinaryIO, size: int, path: Path) -> list[tuple[int, int, int]]:
    """(number, start, length) in bytes of every partition."""
    first = _read(image, 0, SECTOR)
    if size < SECTOR or first[510:] != b"\x55\xaa":
        raise InputError(f"{path}: neither a partition table nor a file system in it", "give a disk image: .img, .img.xz, .img.gz or .zip")
    entries = _entries(first)
    if any(kind == 0xEE for kind, _, _ in entries):
        found = _gpt(image, path)
    else:
        found = [
            (i, start * SECTOR, count * SECTOR)
            for i, (kind, start, count) in enumerate(entries, 1)
            if count and kind not in (0, *_EXTENDED)
        ]
        for kind, start, _ in entries:
            if kind in _EXTENDED:
                found += _logical(image, start, path)
    if not found:
        raise InputError(f"{path}: its partition table is empty", "give an image of a whole disk with a system in it")
    return found


def _entries(sector: bytes) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of the four entries of an MBR."""
    return [(sector[o + 4], *struct.unpack_from("<II", sector, o + 8)) for o in (446, 462, 478, 494)]


def _logical(image: BinaryIO, base: int, path: Path) -> list[tuple[int, int, int]]:
    """The chain of an extended partition: each link names one partition and the next link."""
    found: list[tuple[int, int, int]] = []
    at, seen = base, set[int]()
    while at not in seen and len(found) < MOST_PARTITIONS:
        seen.add(at)
        sector = _read(image, at * SECTOR, SECTOR)
        if sector[510:] != b"\x55\xaa":
            raise CheckFailed(f"{path}: its extended partition is damaged at sector {at}", "fetch the image again")
        (kind, start, count), (following, link, _) = _entries(sector)[:2]
        if kind and count:
            found.append((5 + len(found), (at + start) * SECTOR, count * SECTOR))
        if following not in _EXTENDED:
            break
        at = base + link
    return found


def _gpt(image: BinaryIO, path: Path) -> list[tuple[int, int, int]]:
    header = _read(image, SECTOR, 92)
    size = struct.unpack_from("<I", header, 12)[0]
    crc, table_at, count, entry, table_crc = (
        struct.unpack_from("<I", header, 16)[0], *struct.unpack_from("<QIII", header, 72),
    )  # fmt: skip
    if header[:8] != b"EFI PART" or size != 92 or zlib.crc32(header[:16] + b"\0\0\0\0" + header[20:92]) != crc:
        raise CheckFailed(f"{path}: its GPT header is damaged", "fetch the image again, or repair it with `sgdisk -v`")
    if not 128 <= entry <= 4096 or count > 4 * MOST_PARTITIONS or table_at > 1 << 40:
        raise CheckFailed(f"{path}: its GPT has {count} entries of {entry} bytes at sector {table_at}", "fetch the image again")
    table = _read(image, table_at * SECTOR, count * entry)
    if zlib.crc32(table) != table_crc:
        raise CheckFailed(f"{path}: its GPT is damaged", "fetch the image again, or repair it with `sgdisk -v`")
    found = []
    for i in range(count):
        kind, first, last = table[i * entry : i * entry + 16], *struct.unpack_from("<QQ", table, i * entry + 32)
        if any(kind) and first <= last:
            found.append((i + 1, first * SECTOR, (last - first + 1) * SECTOR))
    return found


def _kind(image: BinaryIO, start: int, size: int) -> tuple[Kind, str]:
    """What file system is there, and its label."""
    if size < 4096:
        return "other", ""
    if _read(image, start + 1080, 2) == b"\x53\xef":
        return "ext4", _superblock(_read(image, start + 1024, 1024)).label
    boot = _read(image, start, SECTOR)
    if boot[510:] == b"\x55\xaa" and boot[0] in (0xEB, 0xE9):
        for at in (54, 82):
            if boot[at : at + 3] == b"FAT":
                return "fat", boot[at - 11 : at].decode("ascii", "replace").strip().removesuffix("NO NAME")
    return "other", ""


def _superblock(block: bytes) -> Ext4:
    incompatible = struct.unpack_from("<I", block, 96)[0]
    wide = bool(incompatible & 0x80)  # 64bit

    def count(low: int, high: int) -> int:
        parts: tuple[int, int] = struct.unpack_from("<I", block, low)[0], struct.unpack_from("<I", block, high)[0] if wide else 0
        return parts[0] + (parts[1] << 32)

    return Ext4(
        block_bytes=1024 << min(struct.unpack_from("<I", block, 24)[0], 6),
        blocks=count(4, 0x150),
        free_blocks=count(12, 0x158),
        reserved_blocks=count(8, 0x154),
        free_inodes=struct.unpack_from("<I", block, 16)[0],
        clean=struct.unpack_from("<H", block, 58)[0] & 3 == 1 and not incompatible & 4,
        label=block[120:136].split(b"\0")[0].decode("utf-8", "replace"),
    )


def _whole(image: BinaryIO, part: Partition, size: int, path: Path) -> None:
    """Raises `CheckFailed` where a partition or its file system ends behind the image's end."""
    needed = part.start_bytes + part.size_bytes
    if part.kind == "ext4":
        block = _superblock(_read(image, part.start_bytes + 1024, 1024))
        needed = max(needed, part.start_bytes + block.blocks * block.block_bytes)
    if needed > size:
        what = f"{path}: cut off: {part} ends at {show_bytes(needed)}, the image at {show_bytes(size)}"
        raise CheckFailed(what, "fetch or unpack the image again")
