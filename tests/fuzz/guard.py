"""Tells of every file that is opened for writing, made, moved or removed outside the folders where that is allowed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.rmtree",
)
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_allowed: tuple[str, ...] | None = None
_seen: list[str] = []
_hooked = False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _allowed is None:
        return
    if event == "open":
        path, mode, flags = args
        writes = (
            any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        )
        if writes and isinstance(path, (str, bytes)):
            _tell("open for writing", path)
    elif event in _CHANGES:
        for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
            if isinstance(path, (str, bytes)):
                _tell(event, path)
        if event == "os.symlink":
            _tell(event, args[1])
    elif event in _PROGRAMS:
        _seen.append(f"{event} {args[0]!r}")


def _tell(what: str, path: str | bytes) -> None:
    full = os.path.realpath(os.fsdecode(path))
    if not any(full == a or full.startswith(a + "/") for a in _allowed or ()):
        _seen.append(f"{what} {full}")


@contextlib.contextmanager
def confined(*folders: Path) -> Iterator[None]:
    """Within it nothing outside `folders` may be written and no program started. Raises `AssertionError` at the end if something was."""
    global _allowed, _hooked
    if not _hooked:
        sys.addaudithook(_watch)  # for good: it cannot be taken away again
        _hooked = True
    _seen.clear()
    _allowed = tuple(os.path.realpath(f) for f in folders)
    try:
        yield
    finally:
        _allowed = None
    assert not _seen, f"outside its folder: {_seen[:3]}"
