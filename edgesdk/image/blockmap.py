"""Block maps: which blocks of an image hold something, and their checksums (the XML format 2.0 of bmaptool, github.com/yoctoproject/bmaptool)."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from edgesdk.errors import CheckFailed, InputError

MOST_BYTES = 1 << 26
_KINDS = ("sha256", "sha512", "sha384", "sha1")


@dataclass(frozen=True)
class Range:
    """Blocks `first` to `last`, both counted in; `checksum` in hex, or nothing."""

    first: int
    last: int
    checksum: str


@dataclass(frozen=True)
class BlockMap:
    """A map of an image of `image_bytes`."""

    image_bytes: int
    block_bytes: int
    kind: str  # of checksum, as hashlib names it
    ranges: tuple[Range, ...]

    def new_digest(self) -> hashlib._Hash:
        return hashlib.new(self.kind)

    def span(self, spot: Range) -> tuple[int, int]:
        """The bytes of a range: from, up to. The image's last block may be a part of one."""
        return spot.first * self.block_bytes, min((spot.last + 1) * self.block_bytes, self.image_bytes)

    @property
    def mapped_bytes(self) -> int:
        return sum(end - start for start, end in map(self.span, self.ranges))


def find(image: Path) -> Path | None:
    """The map beside an image: `os.img.bmap`, `os.bmap`; for `os.img.xz` also `os.img.bmap`."""
    names = [image.with_name(image.name + ".bmap"), image.with_suffix(".bmap"), image.with_suffix("").with_suffix(".bmap")]
    return next((n for n in names if n.is_file()), None)


def read(path: Path) -> BlockMap:
    """The map in a file. Raises `InputError` (not a map) and `CheckFailed` (its own checksum is wrong)."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: too large for a block map", "give the .bmap file, not the image")
        text = path.read_bytes()
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise InputError(f"{path}: holds a document type, which no block map has", "do not use this file")
        root = ElementTree.fromstring(text)
        kind = _text(root, "ChecksumType").lower() if root.find("ChecksumType") is not None else ""
        if root.tag != "bmap" or not str(root.get("version", "")).startswith("2."):
            version = root.get("version")
            raise InputError(f"{path}: {root.tag} of version {version}, wanted bmap 2.x", "make it again: bmaptool create")
        if kind not in _KINDS:
            raise InputError(f"{path}: ChecksumType = '{kind}', wanted one of {', '.join(_KINDS)}", "make it again: bmaptool create")
        _own_checksum(root, text, kind, path)
        return _checked(root, kind, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "give the .bmap file that belongs to the image") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{path}: not a block map ({error})", "give the .bmap file that belongs to the image") from None


def _text(root: ElementTree.Element, name: str) -> str:
    return (root.findtext(name) or "").strip()


def _own_checksum(root: ElementTree.Element, text: bytes, kind: str, path: Path) -> None:
    """The file's digest is taken with the digest itself as zeros."""
    given = _text(root, "BmapFileChecksum")
    if hashlib.new(kind, text.replace(given.encode(), b"0" * len(given), 1)).hexdigest() != given:
        raise CheckFailed(f"{path}: BmapFileChecksum is wrong: the block map is damaged", "fetch it again")


def _checked(root: ElementTree.Element, kind: str, path: Path) -> BlockMap:
    size, block = int(_text(root, "ImageSize")), int(_text(root, "BlockSize"))
    count = int(_text(root, "BlocksCount"))
    ranges = []
    for element in root.iterfind("BlockMap/Range"):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", element.text or "")
        if not match:
            raise ValueError(f"Range = '{element.text}'")
        ranges.append(Range(int(match[1]), int(match[2] or match[1]), (element.get("chksum") or "").lower()))
    ordered = all(a.last < b.first for a, b in itertools.pairwise(ranges)) and all(r.first <= r.last for r in ranges)
    if not ranges or not ordered or ranges[-1].last >= count or block < 512 or (count - 1) * block >= size or count * block < size:
        raise ValueError(f"{len(ranges)} ranges do not fit {count} blocks of {block} bytes in {size}")
    made = BlockMap(size, block, kind, tuple(ranges))
    if (mapped := int(_text(root, "MappedBlocksCount"))) != sum(r.last - r.first + 1 for r in ranges):
        raise CheckFailed(f"{path}: MappedBlocksCount = {mapped} is not what its ranges add up to", "fetch it again")
    return made
