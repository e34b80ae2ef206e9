"""Firmware images as MCUboot takes them: a header, the program, then fields that hold its digest and signature.

The form: https://docs.mcuboot.com/design.html, "Image format".
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from edgesdk.errors import CheckFailed, InputError

MAGIC, FIELDS, PROTECTED = 0x96F3B83D, 0x6907, 0x6908
_HEAD = struct.Struct("<IIHHIIBBHI")
_SHA256, _OTHER_DIGESTS = 0x10, {0x11: "sha384", 0x12: "sha512"}
_SIGNATURES = {0x20: "RSA-2048", 0x22: "ECDSA", 0x23: "RSA-3072", 0x24: "Ed25519"}
_ENCRYPTED = 0x4 | 0x8


@dataclass(frozen=True)
class Image:
    version: str
    digest: bytes  # by which board and host name the image
    signed: str  # the kind of its signature; empty: not signed
    encrypted: bool  # its digest is of the plain program and cannot be checked here
    end: int  # bytes

    def __str__(self) -> str:
        how = f"signed with {self.signed}" if self.signed else "not signed"
        return f"version {self.version}, {how}, sha256 {self.digest.hex()[:12]}…"


def read_image(content: bytes, name: str) -> Image:
    """The image in a file, its digest checked. Raises `InputError` (not one, cut) or `CheckFailed` (changed since it was made)."""
    hint = "give the file that imgtool signed (zephyr.signed.bin, app_update.bin)"
    if len(content) < _HEAD.size or struct.unpack_from("<I", content)[0] != MAGIC:
        raise InputError(f"{name}: not an MCUboot image (it does not begin with 0x{MAGIC:08x})", hint)
    _, _, head, protected, size, flags, major, minor, revision, build = _HEAD.unpack_from(content)
    body = head + size
    if head < 32 or body > len(content):
        raise InputError(
            f"{name}: says {size} bytes behind a head of {head}, the file has {len(content)}", "it is cut off: copy or build it again"
        )
    fields: list[tuple[int, bytes]] = []
    at = body
    if protected:
        fields, at = _fields(content, at, PROTECTED, name)
        if at != body + protected:
            raise InputError(f"{name}: its protected fields have {at - body} bytes, its head says {protected}", "build it again")
    hashed = at
    more, end = _fields(content, at, FIELDS, name)
    found = dict(fields + more)
    if content[end:].strip(b"\xff"):
        raise InputError(
            f"{name}: {len(content) - end} bytes behind the image: it was made with --pad",
            "make it without: its trailer decides over test and confirm",
        )
    if _SHA256 not in found:
        other = next((d for t, d in _OTHER_DIGESTS.items() if t in found), "no digest")
        raise InputError(f"{name}: holds {other}, edgesdk checks sha256", "sign it with imgtool's --sha 256, its default")
    if not flags & _ENCRYPTED and hashlib.sha256(content[:hashed]).digest() != found[_SHA256]:
        raise CheckFailed(f"{name}: its sha256 is not that of its content", "it was changed or spoiled: build and sign it again")
    signed = next((s for t, s in _SIGNATURES.items() if t in found), "")
    return Image(f"{major}.{minor}.{revision}" + (f".{build}" if build else ""), found[_SHA256], signed, bool(flags & _ENCRYPTED), end)


def _fields(content: bytes, at: int, magic: int, name: str) -> tuple[list[tuple[int, bytes]], int]:
    """Type and content of the fields at `at`, and where they end. Raises `InputError`."""
    cut = InputError(f"{name}: the fields behind the program are cut off or spoiled (at byte {at})", "copy or build it again")
    if len(content) < at + 4:
        raise cut
    found_magic, total = struct.unpack_from("<HH", content, at)
    end, here = at + total, at + 4
    if found_magic != magic or total < 4 or end > len(content):
        raise cut
    found = []
    while here < end:
        if here + 4 > end:
            raise cut
        kind, size = struct.unpack_from("<HH", content, here)
        if here + 4 + size > end:
            raise cut
        found.append((kind, content[here + 4 : here + 4 + size]))
        here += 4 + size
    return found, end
