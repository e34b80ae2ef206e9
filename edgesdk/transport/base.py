"""What a transport is: it moves bytes and runs argument tuples on a device. It knows nothing of models."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol
from urllib.parse import SplitResult, urlsplit

from edgesdk.errors import CheckFailed, DeviceError, EdgeError, InputError, LinkError
from edgesdk.transport.scripts import RECEIVE, SIZE, script
from edgesdk.units import show_bytes

Progress = Callable[[int, int], None]
"""`progress(bytes_there, bytes_in_all)` of one file."""

CHUNK_BYTES = 1 << 16
NO_PYTHON = (
    "install python3 there, or give its path: --python PATH; without any, flash and profile take a runtime's own tool: --runner PATH"
)
SLOWEST_BYTES_PER_S = 1000.0
RESUME_FROM_BYTES = 1 << 16
"""Smaller files are sent again from the start: one command instead of two."""


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        return self.out.decode(errors="replace").strip()

    @property
    def complaint(self) -> str:
        """The last line of stderr, for an error message."""
        lines = self.err.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {self.code}"


@dataclass(frozen=True)
class Blob:
    """Bytes to send: their size, sha256 (hex) and a way to read them from the start."""

    size_bytes: int
    sha256: str
    open: Callable[[], BinaryIO | IO[bytes]]

    @classmethod
    def of(cls, data: bytes | Path) -> Blob:
        import io

        if isinstance(data, bytes):
            return cls(len(data), hashlib.sha256(data).hexdigest(), lambda: io.BytesIO(data))
        with data.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(data.stat().st_size, digest, lambda: data.open("rb"))


class Stream(Protocol):
    """A running program on the device: lines in, lines out."""

    def send(self, line: bytes) -> None: ...

    def readline(self, timeout_s: float) -> bytes: ...

    def ready(self, timeout_s: float) -> bool: ...

    def close(self) -> None: ...


class Transport(ABC):
    """One link to one device. `root` is where edgesdk keeps its files there, `python` the interpreter used by default."""

    link: str
    root: str
    python: str = "python3"
    leased: bool = False  # by this object (see `edgesdk.lease`)

    @abstractmethod
    def run(self, argv: tuple[str, ...], stdin: bytes | None = None, timeout: float = 60.0) -> Result:
        """Run a command to its end. Raises `LinkError` if the link failed, not if the command did."""

    @abstractmethod
    def put(self, data: Blob | bytes | Path, remote: str, *, resume: bool = True, progress: Progress | None = None) -> int:
        """Send a file, verify its sha256 there, move it into place; returns the bytes that were already there.

        Raises `LinkError` (what arrived is kept and the next call resumes), `DeviceError` (full disk, no permission) and
        `CheckFailed` (wrong digest; what arrived is removed).
        """

    @abstractmethod
    def get(self, remote: str) -> bytes:
        """A file's bytes. Raises `DeviceError` if it cannot be read."""

    @abstractmethod
    def open(self, argv: tuple[str, ...]) -> Stream:
        """Start a program that talks over stdin and stdout."""

    def close(self) -> None:  # noqa: B027 (most have nothing to give up)
        """Give up the link; may be called twice."""

    def must(self, argv: tuple[str, ...], why: str, timeout: float = 60.0) -> Result:
        """`run`, with `DeviceError` if the command fails; `why` says what was being done."""
        result = self.run(argv, timeout=timeout)
        if result.code != 0:
            raise refused(self.link, why, result)
        return result

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def split_link(link: str, like: str) -> SplitResult:
    """A link's parts. Raises `InputError`, which shows one `like` it, for what is none to `urllib` (brackets without an address)."""
    try:
        return urlsplit(link)
    except ValueError as error:
        raise InputError(f"{link}: not a link ({error})", f"write it like {like}") from None


def receiver(blob: Blob, remote: str, there: int) -> tuple[str, ...]:
    """The command that takes the rest of a blob from its standard input."""
    return script("receive", RECEIVE, remote, str(blob.size_bytes), blob.sha256, str(there))


def refused(link: str, why: str, result: Result) -> DeviceError:
    """A command failed on the device, in two lines."""
    complaint = result.complaint
    if "No space left" in complaint or "Disk quota" in complaint:
        return DeviceError(
            f"{link}: the disk is full ({why})", "free some space there (`edgesdk flash --status` lists bundles), then run it again"
        )
    if "Read-only" in complaint:
        hint = "nothing was changed; make it writable (mount -o remount,rw …; a card's lock, a worn-out disk?), or give a folder on another one: ?root=/path"
        return DeviceError(f"{link}: the disk is read-only ({why})", hint)
    if "Permission denied" in complaint:
        return DeviceError(f"{link}: {why}: {complaint}", "give a folder that can be written: ssh://…?root=/path, or local:/path")
    return DeviceError(f"{link}: {why}: {complaint}", "the device is reached, the command fails there; correct it and run it again")


class PipeStream:
    """A `Stream` over a process's pipes. stderr goes to a file, so that it can never block."""

    def __init__(self, argv: tuple[str, ...], cwd: str | None, failed: Callable[[Result], EdgeError]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(  # in a session of its own: Ctrl-C is the host's to handle
                argv, cwd=cwd, stdin=pipe, stdout=pipe, stderr=self._stderr, bufsize=0, start_new_session=True
            )
        except BaseException:
            self._stderr.close()
            raise
        self._failed, self._buffer = failed, b""

    def send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            view = memoryview(line)
            while view:
                view = view[self._process.stdin.write(view) or 0 :]
        except OSError:
            raise self._ended() from None

    def readline(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        fd, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise LinkError(f"no answer from the device in {timeout_s:.0f} s", "check that it is still up, then run the command again")
            chunk = os.read(fd, 1 << 20)
            if not chunk:
                raise self._ended()
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def ready(self, timeout_s: float) -> bool:
        """Whether `readline` has something to read, waited for `timeout_s` at most."""
        assert self._process.stdout is not None
        return b"\n" in self._buffer or bool(select.select([self._process.stdout.fileno()], [], [], timeout_s)[0])

    def _ended(self) -> EdgeError:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._stderr.seek(0)
        return self._failed(Result(code, b"", self._stderr.read()))

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


class ShellTransport(Transport):
    """A transport to something that runs `sh`: files are sent by the scripts of `transport.scripts`."""

    def get(self, remote: str) -> bytes:
        return self.must(("cat", remote), f"reading {remote}").out

    def put(self, data: Blob | bytes | Path, remote: str, *, resume: bool = True, progress: Progress | None = None) -> int:
        blob = data if isinstance(data, Blob) else Blob.of(data)
        there = 0
        if resume and blob.size_bytes >= RESUME_FROM_BYTES:
            sized = self.must(script("size", SIZE, remote + ".part"), f"looking for {remote}")
            there = int(sized.text or 0)
            there = there if there <= blob.size_bytes else 0
        result = self._stream(blob, remote, there, progress)
        if result.code == 65 and there:  # what was there is not a beginning of this file: once more, from the start
            there, result = 0, self._stream(blob, remote, 0, progress)
        if result.code == 0:
            return there
        if result.code == 65:
            what = f"{self.link}: {remote}: sha256 {result.complaint}, wanted {blob.sha256}"
            raise CheckFailed(what, "refused and removed; a bad cable, memory or disk?")
        if result.code == 66:
            raise LinkError(f"{self.link}: {remote}: the transfer was cut short", "run the same command again: it resumes where it stopped")
        if result.code == 74:
            self.run(script("unlink", 'rm -f "$@"', remote + ".part"))
        raise refused(self.link, f"writing {remote} ({show_bytes(blob.size_bytes)})", result)

    @abstractmethod
    def _stream(self, blob: Blob, remote: str, there: int, progress: Progress | None) -> Result:
        """Feed a blob from byte `there` on to the script that receives it."""


class PipeTransport(ShellTransport):
    """A transport whose every act is one local process: `_argv` turns a device's command into the process to start."""

    cwd: str | None = None

    def _argv(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        return argv

    def _own(self, result: Result) -> Result:
        """What the command itself left. Raises `LinkError` if it was the link that ended it."""
        return result

    def _popen(self, argv: tuple[str, ...], **pipes: Any) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(self._argv(argv), cwd=self.cwd, **pipes)
        except FileNotFoundError:
            hint = "install it, or give another one (--python PATH)"
            raise DeviceError(f"{self.link}: no program '{self._argv(argv)[0]}'", hint) from None

    def run(self, argv: tuple[str, ...], stdin: bytes | None = None, timeout: float = 60.0) -> Result:
        pipe = subprocess.PIPE
        process = self._popen(argv, stdin=subprocess.DEVNULL if stdin is None else pipe, stdout=pipe, stderr=pipe)
        try:
            out, err = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            hint = "check that the device is up, then run the command again"
            raise LinkError(f"{self.link}: no answer in {timeout:.0f} s", hint) from None
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return self._own(Result(process.returncode, out, err))

    def open(self, argv: tuple[str, ...]) -> Stream:
        def failed(result: Result) -> EdgeError:
            try:
                complaint = self._own(result).complaint
            except EdgeError as error:
                return error
            return DeviceError(
                f"{self.link}: the agent ended: {complaint}", "look at the line above; --python PATH picks another interpreter"
            )

        try:
            return PipeStream(self._argv(argv), self.cwd, failed)
        except FileNotFoundError:
            raise DeviceError(f"{self.link}: no program '{argv[0]}'", NO_PYTHON) from None

    def _stream(self, blob: Blob, remote: str, there: int, progress: Progress | None) -> Result:
        argv = receiver(blob, remote, there)
        with tempfile.TemporaryFile() as err:
            process = self._popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=err)
            assert process.stdin is not None
            try:
                with blob.open() as source:
                    source.seek(there)
                    sent = there
                    while chunk := source.read(CHUNK_BYTES):
                        process.stdin.write(chunk)
                        sent += len(chunk)
                        if progress:
                            progress(sent, blob.size_bytes)
                process.stdin.close()
            except OSError:  # the other side is gone: its exit code tells why
                pass
            except BaseException:
                process.kill()
                process.wait()
                raise
            try:
                code = process.wait(300 + blob.size_bytes / SLOWEST_BYTES_PER_S)  # much may wait in buffers on the way
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            finally:
                if not process.stdin.closed:
                    with contextlib.suppress(OSError):
                        process.stdin.close()
            err.seek(0)
            return self._own(Result(code, b"", err.read()))
