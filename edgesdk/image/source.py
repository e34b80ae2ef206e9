"""Where an image comes from: a plain file, or one inside .xz, .gz, .bz2 or .zip; and a sparse copy of it. The source is never written to."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from edgesdk.errors import CheckFailed, DeviceError, InputError
from edgesdk.image.blockmap import BlockMap
from edgesdk.units import show_bytes

CHUNK = 1 << 22
GRAIN = 1 << 12
Watch = Callable[[str, int, int], None]
"""`watch(what, done, total)` in bytes; a total of 0 is unknown."""
_PACKED: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_DAMAGE = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, NotImplementedError, RuntimeError)


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in (*_PACKED, ".zip")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The image's bytes from the start. Raises `InputError`; `CheckFailed` for what is cut off or damaged, while reading too."""
    with contextlib.ExitStack() as stack:
        try:
            file = _open(path, stack)
        except OSError as error:
            why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise InputError(f"{path}: {why}", "give a disk image: .img, .img.xz, .img.gz or .zip") from None
        except _DAMAGE as error:
            raise _damaged(path, error) from None
        try:
            yield file
        except _DAMAGE as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> CheckFailed:
    return CheckFailed(f"{path}: cut off or damaged ({error})", "fetch the image again and compare its checksum")


def _open(path: Path, stack: contextlib.ExitStack) -> IO[bytes]:
    if path.suffix.lower() == ".zip":
        archive = stack.enter_context(zipfile.ZipFile(path))
        return stack.enter_context(archive.open(_member(archive, path)))
    file: IO[bytes] = stack.enter_context(_PACKED.get(path.suffix.lower(), open)(path, "rb"))
    return file


def _member(archive: zipfile.ZipFile, path: Path) -> str:
    images = [m for m in archive.infolist() if m.filename.lower().endswith((".img", ".wic", ".raw", ".ext4"))]
    if len(images) != 1:
        raise InputError(f"{path}: {len(images)} images in it, wanted one", "unpack it and give the .img")
    return images[0].filename


def copy(path: Path, to: Path, blocks: BlockMap | None = None, watch: Watch = lambda what, done, total: None) -> str:
    """The image at `path`, unpacked, as a sparse file `to`; returns its sha256, read back from the disk and compared.

    With a block map only its ranges are taken, their checksums compared. Raises `CheckFailed`, `InputError` and `DeviceError` (full disk).
    """
    try:
        with opened(path) as source, to.open("wb") as target:
            total = blocks.image_bytes if blocks else 0 if is_packed(path) else path.stat().st_size
            wanted = _mapped(source, target, blocks, path, watch) if blocks else _plain(source, target, total, watch)
            target.flush()
            os.fsync(target.fileno())
            os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        to.unlink(missing_ok=True)
        raise DeviceError(
            f"{to}: cannot be written ({error.strerror or error})", "free some space there, or choose another place"
        ) from None
    except BaseException:
        to.unlink(missing_ok=True)
        raise
    got = read_back(to, watch)
    if got != wanted:
        to.unlink(missing_ok=True)
        raise CheckFailed(f"{to}: what is read back is not what was written (sha256 {got[:12]}…, wanted {wanted[:12]}…)", "a bad disk?")
    return got


def _plain(source: IO[bytes], target: IO[bytes], total: int, watch: Watch) -> str:
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        _sparse(target, chunk)
        done += len(chunk)
        watch("copy", done, total)
    target.truncate(done)
    return digest.hexdigest()


def _sparse(target: IO[bytes], chunk: bytes) -> None:
    """Write what is not zero, step over the rest."""
    empty = bytes(GRAIN)
    for at in range(0, len(chunk), GRAIN):
        part = chunk[at : at + GRAIN]
        if part == empty[: len(part)]:
            target.seek(len(part), os.SEEK_CUR)
        else:
            target.write(part)


def _mapped(source: IO[bytes], target: IO[bytes], blocks: BlockMap, path: Path, watch: Watch) -> str:
    """Only what the map names; zeros among it are written as such, so that the copy's own holes are the map's."""
    whole, at = hashlib.sha256(), 0
    for spot in blocks.ranges:
        start, end = blocks.span(spot)
        _skip(source, start - at, path)
        _zeros(whole, start - at)
        target.seek(start)
        digest = blocks.new_digest()
        at = start
        while at < end:
            chunk = source.read(min(CHUNK, end - at))
            if not chunk:
                raise CheckFailed(f"{path}: cut off at {show_bytes(at)} of {show_bytes(blocks.image_bytes)}", "fetch the image again")
            digest.update(chunk)
            whole.update(chunk)
            target.write(chunk)
            at += len(chunk)
            watch("copy", at, blocks.image_bytes)
        if spot.checksum and digest.hexdigest() != spot.checksum:
            what = f"{path}: blocks {spot.first}-{spot.last} have {blocks.kind} {digest.hexdigest()[:12]}…, the block map wants {spot.checksum[:12]}…"
            raise CheckFailed(what, "fetch the image and its .bmap again: they do not belong together, or one is damaged")
    target.truncate(blocks.image_bytes)
    _zeros(whole, blocks.image_bytes - at)
    return whole.hexdigest()


def _skip(source: IO[bytes], count: int, path: Path) -> None:
    """Forward without keeping anything: compressed streams cannot seek cheaply, and a plain file can."""
    if count and source.seekable():
        source.seek(count, os.SEEK_CUR)
        return
    while count > 0:
        chunk = source.read(min(CHUNK, count))
        if not chunk:
            raise CheckFailed(f"{path}: cut off", "fetch the image again")
        count -= len(chunk)


def _zeros(digest: hashlib._Hash, count: int) -> None:
    while count > 0:
        digest.update(bytes(min(CHUNK, count)))
        count -= CHUNK


def read_back(path: Path, watch: Watch = lambda what, done, total: None) -> str:
    """sha256 of a file."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            watch("verify", done, total)
    return digest.hexdigest()
