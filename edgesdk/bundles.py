"""Write, read and verify bundles (see `edgesdk.bundle` for what is in one)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from edgesdk.bundle import Manifest, Member
from edgesdk.errors import CheckFailed, EdgeError, InputError

_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error, zlib.error)
"""What `zipfile` raises on spoiled bytes: an unknown compression, an encryption flag, an offset outside the file among them."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_bundle(path: str | Path, members: Mapping[str, bytes], **fields: Any) -> Manifest:
    """Write members and a manifest of `fields`; the same content gives the same bytes. Raises `EdgeError` and leaves no part behind."""
    for name in members:
        if not name or name == "manifest.json" or not _inside(name):
            raise InputError(
                f"{path}: '{name}' cannot be a member's name", "use a relative name inside the bundle, other than manifest.json"
            )
    listed = tuple(Member(name=n, size_bytes=len(c), sha256=sha256(c)) for n, c in sorted(members.items()))
    manifest = Manifest(members=listed, **fields)
    write_members(path, {"manifest.json": manifest.to_json().encode(), **dict(sorted(members.items()))})
    return manifest


def write_members(path: str | Path, members: Mapping[str, bytes]) -> None:
    """An uncompressed zip of `members`, in their order; the same content gives the same bytes. Raises `EdgeError` and leaves no part behind."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise EdgeError(f"{path}: cannot be written ({error.strerror})", "free some space or choose another --out") from None


def _inside(name: str) -> bool:
    """Whether a member's name stays in the folder it is unpacked in."""
    parts = PurePosixPath(name).parts
    return not name.startswith("/") and ".." not in parts and "\\" not in name


def _open(path: str | Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", "give a file that `edgesdk build` or `edgesdk compress` wrote") from None
    except _DAMAGE as error:
        raise InputError(f"{path}: not a bundle, or cut off ({error})", "copy or build it again") from None


def read_manifest(path: str | Path) -> Manifest:
    """The manifest. Raises `InputError`."""
    return Manifest.from_json(read_member(path, "manifest.json"), f"{path}: manifest.json")


def read_member(path: str | Path, name: str) -> bytes:
    """The bytes of a member. Raises `InputError` naming it."""
    with _open(path) as archive:
        try:
            return archive.read(name)
        except KeyError:
            raise InputError(f"{path}: has no member '{name}'", "build the bundle again") from None
        except _DAMAGE as error:
            raise InputError(f"{path}: member '{name}' is damaged ({error})", "copy or build the bundle again") from None


def member_names(path: str | Path) -> list[str]:
    """The names of what a file holds. Raises `InputError`."""
    with _open(path) as archive:
        return archive.namelist()


def bundle_digest(path: str | Path) -> str:
    """sha256 of the manifest's bytes, which holds every member's: it stands for the whole bundle."""
    return sha256(read_member(path, "manifest.json"))


def verify_bundle(path: str | Path) -> Manifest:
    """Read every member and hold it against the manifest. Raises `InputError` or `CheckFailed`."""
    manifest = read_manifest(path)
    for member in manifest.members:
        content = read_member(path, member.name)
        if len(content) != member.size_bytes or sha256(content) != member.sha256:
            raise CheckFailed(f"{path}: member '{member.name}' has the wrong digest", "copy or build the bundle again")
    return manifest


def extract(path: str | Path, folder: str | Path) -> Manifest:
    """Verify a bundle, then write its manifest and members under `folder`. Raises `InputError`, `CheckFailed` or `EdgeError`."""
    manifest = verify_bundle(path)
    names = ["manifest.json", *(m.name for m in manifest.members)]
    if outside := next((n for n in names if not _inside(n)), None):
        raise CheckFailed(f"{path}: member '{outside}' would be written outside its folder", "do not use this bundle; build it again")
    for name in names:
        target = Path(folder, name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_member(path, name))
        except OSError as error:
            raise EdgeError(f"{target}: cannot be written ({error.strerror})", "free some space or choose another folder") from None
    return manifest


def array_bytes(array: Any) -> bytes:
    """An array as .npy bytes."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_array(content: bytes) -> Any:
    """The array in .npy bytes."""
    import numpy as np

    return np.load(io.BytesIO(content), allow_pickle=False)
