"""The files of a bundle as a rollout hands them out: by content, in chunks, and where each lies in the bundle for those who fetch it from a URL."""

from __future__ import annotations

import hashlib
import itertools
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from edgesdk.fleet.wire import CHUNK_BYTES

_HEAD = struct.Struct("<26xHH")
"""A member's local header: the lengths of its name and its extra field at its end (APPNOTE 4.3.7)."""


def files_of(bundle: Path) -> list[tuple[str, str, int, int]]:
    """(name, sha256, bytes, place in the file) of each member, `manifest.json` and `signature.json` among them."""
    found = []
    with zipfile.ZipFile(bundle) as archive, bundle.open("rb") as raw:
        for member in archive.infolist():
            raw.seek(member.header_offset)
            name, extra = _HEAD.unpack(raw.read(_HEAD.size))
            with archive.open(member) as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
            found.append((member.filename, digest, member.file_size, member.header_offset + _HEAD.size + name + extra))
    return found


def chunk_names(files: Iterable[tuple[str, str, int, int]]) -> Iterator[tuple[str, str, int]]:
    """(name, sha256, number) of every chunk of what `files_of` found; a file that is there twice once."""
    places = {sha: (name, size) for name, sha, size, _ in files}
    for sha, (name, size) in places.items():
        for index in range(-(-size // CHUNK_BYTES)):
            yield name, sha, index


def chunks_of(bundle: Path, files: Iterable[tuple[str, str, int, int]]) -> Iterator[tuple[str, int, bytes]]:
    """(sha256, number, bytes) of every chunk."""
    with zipfile.ZipFile(bundle) as archive:
        for name, chunks in itertools.groupby(chunk_names(files), key=lambda c: c[0]):
            with archive.open(name) as content:
                for _, sha, index in chunks:
                    yield sha, index, content.read(CHUNK_BYTES)
