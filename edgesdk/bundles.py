"""Write, read and verify bundles (see `edgesdk.bundle` for what is in one)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import stat
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
MOST_MEMBERS = 10_000
MOST_MANIFEST_BYTES = 1 << 24
BESIDE = ("manifest.json", "signature.json")
"""What no manifest lists."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_bundle(path: str | Path, members: Mapping[str, bytes], *, key: str | None = "default", **fields: Any) -> Manifest:
    """Write members and a manifest of `fields`, signed with one's own `key` (None: not signed); the same content gives the same bytes.

    Raises `EdgeError` and leaves no part behind.
    """
    for name in members:
        if not name or name in BESIDE or not _inside(name):
            raise InputError(
                f"{path}: '{name}' cannot be a member's name", f"use a relative name inside the bundle, none of {', '.join(BESIDE)}"
            )
    listed = tuple(Member(name=n, size_bytes=len(c), sha256=sha256(c)) for n, c in sorted(members.items()))
    manifest = Manifest(members=listed, **fields)
    content = {"manifest.json": manifest.to_json().encode()}
    if key is not None:
        from edgesdk.signing import signed

        content["signature.json"] = signed(content["manifest.json"], key)
    write_members(path, {**content, **dict(sorted(members.items()))})
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


def copy_members(path: str | Path, out: str | Path, changed: Mapping[str, bytes]) -> None:
    """A file's members once more, some of them `changed` or new. Raises `EdgeError` and leaves no part behind; `out` may be `path`."""
    part = Path(out).with_name(Path(out).name + ".part")
    try:
        with _open(path) as source, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted({*source.namelist(), *changed}, key=lambda n: (n not in BESIDE, n)):
                with archive.open(zipfile.ZipInfo(name, _EPOCH), "w", force_zip64=True) as target:
                    if name in changed:
                        target.write(changed[name])
                    else:
                        with source.open(name) as held:
                            shutil.copyfileobj(held, target, 1 << 20)
        part.replace(out)
    except _DAMAGE as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise EdgeError(f"{out}: cannot be written ({error})", "free some space or choose another folder") from None


def _inside(name: str) -> bool:
    """Whether a member's name stays in the folder it is unpacked in."""
    parts = PurePosixPath(name).parts
    return not name.startswith("/") and ".." not in parts and "\\" not in name


def _open(path: str | Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", "give a file that `edgesdk build` or `edgesdk compress` wrote") from None
    except _DAMAGE as error:
        raise InputError(f"{path}: not a bundle, or cut off ({error})", "copy or build it again") from None
    if why := _strange(archive, Path(path).stat().st_size):
        archive.close()
        raise InputError(f"{path}: {why}", "edgesdk writes no such file: do not use it, build it again")
    return archive


def _strange(archive: zipfile.ZipFile, size_bytes: int) -> str:
    """What no bundle has: members that grow when they are read, that lie over each other, that are links, twice there, or without end."""
    found = archive.infolist()
    if len(found) > MOST_MEMBERS:
        return f"{len(found)} members"
    names = [m.filename for m in found]
    if len(set(names)) < len(names):
        return f"member '{next(n for n in names if names.count(n) > 1)}' is there twice"
    for member in found:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            return f"member '{member.filename}' is compressed or encrypted"
        if stat.S_ISLNK(member.external_attr >> 16):
            return f"member '{member.filename}' is a link"
    if sum(m.file_size for m in found) > size_bytes:
        return "its members are larger than the file"
    return ""


def read_manifest(path: str | Path) -> Manifest:
    """The manifest. Raises `InputError`."""
    with _open(path) as archive:
        size = next((m.file_size for m in archive.infolist() if m.filename == "manifest.json"), 0)
    if size > MOST_MANIFEST_BYTES:
        raise InputError(f"{path}: manifest.json has {size} bytes, {MOST_MANIFEST_BYTES} at most", "do not use this file; build it again")
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
    known, names = {m.name for m in manifest.members}, member_names(path)
    for name in set(BESIDE) & set(names):
        read_member(path, name)  # its own checksum
    if len(known) < len(manifest.members):
        raise CheckFailed(f"{path}: the manifest lists a member twice", "copy or build the bundle again")
    if unknown := sorted(set(names) - known - set(BESIDE)):
        raise CheckFailed(
            f"{path}: member '{unknown[0]}' is not in the manifest", "somebody has added it: do not use this bundle; build it again"
        )
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
