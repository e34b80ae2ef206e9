"""Cards and disks as targets: what may be written to, and writing with what is read back compared."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgesdk.errors import CheckFailed, DeviceError, InputError
from edgesdk.image.source import CHUNK, Watch
from edgesdk.units import show_bytes

SECTOR = 512


@dataclass(frozen=True)
class Machine:
    """Where this system shows its disks."""

    dev: Path = Path("/dev")
    sys: Path = Path("/sys")
    proc: Path = Path("/proc")


@dataclass(frozen=True)
class Disk:
    """A whole disk that may be written to."""

    path: Path
    name: str
    size_bytes: int
    model: str

    def __str__(self) -> str:
        return f"{self.path} ({self.model or 'no name'}, {show_bytes(self.size_bytes)})"


def is_disk(path: Path, machine: Machine = Machine()) -> bool:
    """Whether a target is a device rather than a file."""
    real = path.resolve()
    return real.parent == machine.dev.resolve() or (path.exists() and stat.S_ISBLK(path.stat().st_mode))


def safe_disk(path: Path, needed_bytes: int, machine: Machine = Machine()) -> Disk:
    """The disk at `path`, if nothing is lost by writing to it that is not asked for. Raises `InputError` that says what stands against it."""
    found = _look(path, needed_bytes, machine)
    if isinstance(found, Disk):
        return found
    what, hint = found
    raise InputError(f"{path}: {what}", hint or f"those that may be written to: {_candidates(machine)}")


def _look(path: Path, needed_bytes: int, machine: Machine) -> Disk | tuple[str, str]:
    """The disk, or what stands against it and what to do (nothing: take another)."""
    name = path.resolve().name
    entry = machine.sys / "class" / "block" / name
    if not entry.exists():
        return "no such disk", ""
    if (entry / "partition").exists():
        return "a partition, an image wants the whole disk", f"give the disk it is on: --to {machine.dev / entry.resolve().parent.name}"
    place = str(entry.resolve())
    if _text(entry / "removable") != "1" and "/usb" not in place and "/mmc" not in place:
        return "not removable, and not on USB or MMC", ""
    if _text(entry / "ro") == "1":
        return "write-protected", "look at the card's switch"
    if used := _in_use(entry, machine):
        return used, "unmount it (`umount`, `swapoff`), if it is the right disk at all"
    size = int(_text(entry / "size") or 0) * SECTOR
    if not size:
        return "no medium in it", "put a card in"
    if size < needed_bytes:
        return f"{show_bytes(size)}, the image has {show_bytes(needed_bytes)}", "take a larger card"
    return Disk(path, name, size, " ".join(_text(entry / "device" / part) for part in ("vendor", "model")).strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _candidates(machine: Machine) -> str:
    found = [_look(machine.dev / entry.name, 0, machine) for entry in sorted((machine.sys / "class" / "block").glob("*"))]
    return ", ".join(str(disk) for disk in found if isinstance(disk, Disk)) or "none is plugged in"


def _in_use(entry: Path, machine: Machine) -> str:
    """What the disk or a partition of it is used for, or nothing."""
    parts = [entry, *(p.parent for p in entry.resolve().glob("*/partition"))]
    numbers = {_text(p / "dev"): p.name for p in parts}
    for line in _text(machine.proc / "self" / "mountinfo").splitlines():
        fields = line.split()
        source = fields[fields.index("-") + 2] if "-" in fields and len(fields) > fields.index("-") + 2 else ""
        held = numbers.get(fields[2]) if len(fields) > 4 else None
        held = held or next((p.name for p in parts if source == str(machine.dev / p.name)), None)
        if held:
            where = fields[4].replace("\\040", " ")
            return f"the disk of the running system ({held} is /)" if where == "/" else f"{held} is mounted on {where}"
    for line in _text(machine.proc / "swaps").splitlines()[1:]:
        if held := next((p.name for p in parts if line.split()[0] == str(machine.dev / p.name)), None):
            return f"{held} is used as swap"
    for part in parts:
        if holders := sorted(h.name for h in (part / "holders").glob("*")):
            return f"{part.name} is held by {holders[0]} (LVM, RAID or encryption)"
    return ""


def extents(path: Path, everything: bool) -> Iterator[tuple[int, int]]:
    """The ranges (from, up to) of a file to write: all of it, or what is not a hole."""
    size = path.stat().st_size
    if everything:
        yield 0, size
        return
    with path.open("rb") as file:
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = min(os.lseek(file.fileno(), at, os.SEEK_HOLE), size)
            yield at, end
            at = end


def write(image: Path, disk: Disk, everything: bool, watch: Watch = lambda what, done, total: None) -> int:
    """Write the ranges of `image`, read each back from the disk itself and compare; returns the bytes written.

    Raises `DeviceError` (full, pulled out, no permission) and `CheckFailed` (what is read back is something else).
    """
    spans = list(extents(image, everything))
    total, done = sum(end - start for start, end in spans), 0
    digests = []

    def tell(count: int) -> None:
        nonlocal done
        done += count
        watch("write", done, total)

    try:
        target = os.open(disk.path, os.O_RDWR | getattr(os, "O_EXCL", 0))
        try:
            with image.open("rb") as source:
                for start, end in spans:
                    digests.append(_copy(source.fileno(), target, start, end, tell))
            os.fsync(target)
            os.posix_fadvise(target, 0, 0, os.POSIX_FADV_DONTNEED)
            done = 0
            for (start, end), wanted in zip(spans, digests, strict=True):
                _verify(target, disk, start, end, wanted)
                done += end - start
                watch("verify", done, total)
        finally:
            os.close(target)
    except PermissionError:
        raise DeviceError(
            f"{disk.path}: no permission to write", "run it as root, or as a member of the group that owns the disk"
        ) from None
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise DeviceError(
            f"{disk}: {why} after {show_bytes(done)} of {show_bytes(total)}", "it holds no whole image now; write it again"
        ) from None
    return total


def _copy(source: int, target: int, start: int, end: int, tell: Callable[[int], None]) -> str:
    digest, at = hashlib.sha256(), start
    while at < end:
        chunk = os.pread(source, min(CHUNK, end - at), at)
        if not chunk:
            raise OSError(errno.EIO, "the image became shorter while it was read")
        digest.update(chunk)
        view, offset = memoryview(chunk), at
        while view:
            sent = os.pwrite(target, view, offset)
            if not sent:
                raise OSError(errno.ENOSPC, "no space")
            view, offset = view[sent:], offset + sent
        at += len(chunk)
        tell(len(chunk))
    return digest.hexdigest()


def _verify(target: int, disk: Disk, start: int, end: int, wanted: str) -> None:
    digest, at = hashlib.sha256(), start
    while at < end:
        chunk = os.pread(target, min(CHUNK, end - at), at)
        if not chunk:
            break
        digest.update(chunk)
        at += len(chunk)
    if digest.hexdigest() != wanted:
        what = f"{disk}: bytes {start}-{end} read back are not what was written"
        raise CheckFailed(what, "the card is worn out or not as large as it says; use another one")
