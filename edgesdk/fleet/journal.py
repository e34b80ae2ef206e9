"""Rollouts on the disk: what was asked for, the bundle, every event in order, and what people asked of it since.

Under `$EDGESDK_ROLLOUTS`, else `$XDG_DATA_HOME/edgesdk/rollouts` (`~/.local/share/edgesdk/rollouts`), a folder each:

    rollout.json    what was asked for (`rollout.Spec`)
    bundle.edge     a copy, so that it can be gone on with
    journal         one event a line, appended and flushed before it is acted on; a last line that a crash tore is cut off
    commands        one a line: pause, resume, abort, rollback; whoever drives the rollout takes them up
    lock            held by who drives it
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from edgesdk.errors import DeviceError, EdgeError, InputError, UnknownName
from edgesdk.fleet.rollout import COMMANDS, Event, Rollout, Spec


def rollouts_dir() -> Path:
    given = os.environ.get("EDGESDK_ROLLOUTS")
    data = os.environ.get("XDG_DATA_HOME")
    return Path(given) if given else (Path(data) if data else Path.home() / ".local" / "share") / "edgesdk" / "rollouts"


def rollout_ids() -> list[str]:
    """The newest first."""
    found = [p.parent for p in rollouts_dir().glob("*/rollout.json")]
    return [p.name for p in sorted(found, key=lambda p: -(p / "rollout.json").stat().st_mtime_ns)]


class Folder:
    """One rollout on the disk. Raises `UnknownName` where there is none; an empty id is the newest."""

    def __init__(self, rollout: str = "") -> None:
        known = rollout_ids()
        if not rollout and not known:
            raise InputError("there is no rollout", "begin one: edgesdk rollout start BUNDLE --broker mqtts://… --on group:…")
        self.id = rollout or known[0]
        if self.id not in known:
            raise UnknownName("rollout", self.id, known)
        self.path = rollouts_dir() / self.id
        self.spec = Spec.load(self.path / "rollout.json")
        self.bundle = self.path / "bundle.edge"
        self._journal: IO[bytes] | None = None

    @classmethod
    def create(cls, spec: Spec, bundle: str | Path) -> Folder:
        """Raises `InputError` for an id that is taken and `EdgeError` where it cannot be written."""
        path = rollouts_dir() / spec.id
        try:
            path.mkdir(parents=True, exist_ok=False)
            shutil.copyfile(bundle, path / "bundle.edge")
            spec.save(path / "rollout.json")  # last: with it the rollout is there
        except FileExistsError:
            raise InputError(f"a rollout '{spec.id}' is there already", "give another --id") from None
        except OSError as error:
            raise EdgeError(
                f"{path}: cannot be written ({error.strerror})", "free some space, or give another folder: EDGESDK_ROLLOUTS"
            ) from None
        return cls(spec.id)

    def read(self) -> Rollout:
        """What all events come to. Raises `InputError` for a journal that was changed."""
        rollout = Rollout(self.spec)
        for number, line in enumerate(self._lines("journal"), 1):
            try:
                rollout.apply(json.loads(line))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise InputError(f"{self.path}/journal: line {number} is damaged", "give back a copy of that file") from None
        return rollout

    def _lines(self, name: str) -> list[bytes]:
        """Whole lines; what a crash left of the last is none."""
        try:
            content = (self.path / name).read_bytes()
        except FileNotFoundError:
            return []
        return content[: content.rfind(b"\n") + 1].splitlines()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Drive the rollout: nobody else does meanwhile. Raises `DeviceError` that names who does."""
        with (self.path / "lock").open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                what = f"rollout {self.id} is driven by {lock.read().strip() or 'somebody'}"
                raise DeviceError(
                    what, "it takes up pause, resume, abort and rollback from here; edgesdk rollout status shows it"
                ) from None
            lock.truncate(0)
            lock.write(f"{getpass.getuser()}@{platform.node()}, process {os.getpid()}")
            lock.flush()
            path = self.path / "journal"
            with path.open("ab") as journal:
                content = path.read_bytes()
                journal.truncate(content.rfind(b"\n") + 1)
                self._journal = journal
                try:
                    yield
                finally:
                    self._journal = None

    def append(self, events: Sequence[Event]) -> None:
        """Events are on the disk when this returns. Raises `EdgeError` where they cannot be."""
        assert self._journal is not None
        try:
            self._journal.write(b"".join(json.dumps(e, separators=(",", ":")).encode() + b"\n" for e in events))
            self._journal.flush()
            os.fsync(self._journal.fileno())
        except OSError as error:
            raise EdgeError(
                f"{self.path}/journal: cannot be written ({error.strerror})", "free some space, then: edgesdk rollout resume"
            ) from None

    def ask(self, command: str) -> None:
        """Leave a command for who drives the rollout, now or later."""
        assert command in COMMANDS
        with (self.path / "commands").open("ab") as file:
            file.write(command.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def asked(self, taken: int) -> list[str]:
        """Commands behind the first `taken`."""
        return [c for line in self._lines("commands")[taken:] if (c := line.decode(errors="replace").strip()) in COMMANDS]
