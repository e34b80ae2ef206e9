"""One user at a time on a device: who installs or measures holds a lock there, which the device's own system gives back when the link ends.

A process on the device holds an advisory lock on `ROOT/lease` as long as its input is open: nothing has to be cleaned up after a crash, a cut link or a
power cut, and no clock is needed.
"""

from __future__ import annotations

import contextlib
import getpass
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from edgesdk.agent.client import require_python
from edgesdk.errors import DeviceError, LinkError
from edgesdk.plain import scripts as plain_scripts
from edgesdk.transport.base import Result, Stream, Transport, refused
from edgesdk.transport.scripts import script

HOLD = """
import fcntl, os, sys
try:
    os.makedirs(sys.argv[1], exist_ok=True)
    file = os.open(os.path.join(sys.argv[1], 'lease'), os.O_RDWR | os.O_CREAT, 0o644)
except OSError as error:
    print('cannot ' + str(error), flush=True)
    sys.exit()
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print('held ' + ' '.join(os.read(file, 4096).decode(errors='replace').split()), flush=True)
    sys.exit()
try:
    os.ftruncate(file, 0)
    os.pwrite(file, sys.argv[2].encode(), 0)
except OSError:
    pass  # a full disk: the lock holds without a name
print('yours', flush=True)
sys.stdin.read()
"""
ANSWER_S = 60.0
AGAIN_S = 1.0


def holder(what: str) -> str:
    """Who holds a device from now on, and what for, as others are told."""
    return f"{getpass.getuser()}@{platform.node()}, to {what}, since {datetime.now(UTC).isoformat(timespec='seconds')}"


@contextlib.contextmanager
def lease(transport: Transport, what: str, *, python: str | None = None, wait_s: float = 0.0, plain: bool = False) -> Iterator[None]:
    """Hold the device behind `transport`, to do `what`; within it, another lease of the same transport is this one. `plain`: without Python there.

    Raises `DeviceError` that names who holds it, if they still do after `wait_s`.
    """
    if transport.leased:
        yield
        return
    python, until = python or transport.python, time.monotonic() + wait_s
    who = holder(what)
    argv = script("hold", plain_scripts.HOLD, transport.root, who) if plain else (python, "-u", "-c", HOLD, transport.root, who)
    while True:
        stream = transport.open(argv)
        try:
            line = _answer(stream, transport, None if plain else python)
            if line == "yours":
                transport.leased = True
                try:
                    yield
                finally:
                    transport.leased = False
                return
        finally:
            stream.close()
        if line.startswith("cannot"):
            raise refused(transport.link, f"writing to {transport.root}", Result(1, b"", line[7:].encode()))
        if time.monotonic() >= until:
            raise DeviceError(
                f"{transport.link}: in use by {line[5:] or 'somebody'}", "wait until they are done, or say how long: --wait 10min"
            )
        time.sleep(AGAIN_S)


def _answer(stream: Stream, transport: Transport, python: str | None) -> str:
    """What the lock said; a login banner may come first."""
    try:
        while True:
            line = stream.readline(ANSWER_S).decode(errors="replace").strip()
            if line == "yours" or line.startswith(("held", "cannot")):
                return line
    except LinkError:
        raise
    except DeviceError:
        if python is not None:
            require_python(transport, python)
        raise
