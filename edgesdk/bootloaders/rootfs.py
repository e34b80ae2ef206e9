"""A root file system in a folder of this machine: what an image gets (`edgesdk.image.contents`) is put there, and never outside of it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from edgesdk.errors import DeviceError, InputError
from edgesdk.image.files import Entry, File, Folder, Owner, Symlink


class Tree:
    """The folder as the system it will be: links are followed inside it, also those that begin with `/`."""

    def __init__(self, folder: Path) -> None:
        self.image = self.part = folder
        self.folder = folder

    def here(self, path: str) -> Path:
        """Where a path of that system lies on this machine."""
        return self.folder / path.lstrip("/")

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.here(path))

    def resolve(self, path: str) -> str:
        """The path with every link followed, as that system would. Raises `InputError` for links in a circle."""
        left, done, hops = list(PurePosixPath(path).parts[1:]), PurePosixPath("/"), 0
        while left:
            name = left.pop(0)
            if name == "..":
                done = done.parent
                continue
            at = self.here(str(done / name))
            if not at.is_symlink():
                done = done / name
                continue
            hops += 1
            if hops > 40:
                raise InputError(f"{self.folder}: {path} leads in a circle", "unpack the root file system again")
            target = PurePosixPath(os.readlink(at))
            if target.is_absolute():
                done, target = PurePosixPath("/"), target.relative_to("/")
            left = [p for p in target.parts if p != "."] + left
        return str(done)

    def put(self, entries: Sequence[Entry]) -> None:
        """Do them in order; files appear whole. Raises `DeviceError` (full, not writable)."""
        for entry in entries:
            at = self.here(self.resolve(str(PurePosixPath(entry.path).parent))) / PurePosixPath(entry.path).name
            try:
                if isinstance(entry, Folder):
                    if not self.here(self.resolve(entry.path)).is_dir():
                        at.mkdir(mode=entry.mode, parents=True)
                        _own(at, entry.owner)
                elif isinstance(entry, Symlink):
                    at.unlink(missing_ok=True)
                    at.symlink_to(entry.target)
                else:
                    _file(at, entry)
            except OSError as error:
                hint = (
                    "free some space there; nothing was sent to the board"
                    if error.errno == errno.ENOSPC
                    else "look at the folder; nothing was sent"
                )
                raise DeviceError(f"{at}: cannot be written ({error.strerror})", hint) from None

    def forget(self, root: str, digest: str) -> list[str]:
        """Remove other bundles that lie in the store and were never on a board; their digests."""
        store = self.here(self.resolve(f"{root}/store"))
        held = sorted(store.iterdir()) if store.is_dir() else []
        found = [p for p in held if re.fullmatch(r"[0-9a-f]{64}", p.name) and p.name != digest and p.is_dir() and not p.is_symlink()]
        for folder in found:
            shutil.rmtree(folder)
        return [p.name for p in found]


def _own(at: Path, owner: Owner) -> None:
    if os.geteuid() == 0:
        os.lchown(at, owner.user, owner.group)


def _file(at: Path, entry: File) -> None:
    part = at.with_name(at.name + ".part")
    try:
        with entry.blob.open() as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        part.chmod(entry.mode)
        _own(part, entry.owner)
        part.replace(at)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
