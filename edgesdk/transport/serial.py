"""A board over its serial console: log in, leave the terminal to a small program there (`serial_device`), talk to it in frames that survive noise.

    serial:/dev/ttyUSB0[?baud=115200&user=root&password_file=FILE&root=FOLDER&python=PATH]

The password may also stand in the environment, as EDGESDK_SERIAL_PASSWORD; it never stands on a command line. A port that is unplugged is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

from edgesdk.errors import DeviceError, InputError, LinkError, MissingTool, UnknownName
from edgesdk.transport.base import Blob, Progress, Result, ShellTransport, Stream, receiver, split_link
from edgesdk.transport.serial_device import EOF, ERR, EXIT, HEAD, KILL, NONE, OUT, START, STDIN, messages
from edgesdk.transport.serial_line import BYE, WINDOW, Line, frame
from edgesdk.transport.serial_login import Login, Port

QUERY = ("baud", "user", "password_file", "root", "python")
AWAY_S = 60.0
"""How long an unplugged port is waited for."""
SILENT_S = 20.0
"""How long the device may say nothing while it owes an answer."""
PIECE = 1024
"""Bytes of one message: what a cut link loses of a transfer."""


class Channel:
    """One command there: what it said, and its exit code once it ended. A `Stream`."""

    def __init__(self, link: Link, number: int) -> None:
        self.link, self.number = link, number
        self.out, self.err = bytearray(), bytearray()
        self.code: int | None = None

    def send(self, line: bytes) -> None:
        for i in range(0, len(line), PIECE):
            self.link.say(STDIN, self.number, line[i : i + PIECE])
            self.link.until(lambda: self.link.line.pending < 8 * WINDOW or self.code is not None)
        if self.code is not None:
            raise self._ended()

    def readline(self, timeout_s: float) -> bytes:
        if not self.ready(timeout_s):
            raise LinkError(f"no answer from the device in {timeout_s:.0f} s", "check that it is still up, then run the command again")
        if b"\n" not in self.out:
            raise self._ended()
        line, _, rest = bytes(self.out).partition(b"\n")
        self.out[:] = rest
        return line

    def ready(self, timeout_s: float) -> bool:
        return self.link.until(lambda: b"\n" in self.out or self.code is not None, timeout_s)

    def _ended(self) -> DeviceError:
        complaint = Result(self.code or 0, b"", bytes(self.err)).complaint
        return DeviceError(
            f"{self.link.name}: the agent ended: {complaint}", "look at the line above; ?python=PATH picks another interpreter"
        )

    def finish(self) -> None:
        """No more input comes."""
        self.link.say(EOF, self.number)

    def close(self) -> None:
        if self.code is None and self.link.error is None:
            self.finish()
            with contextlib.suppress(LinkError):
                if not self.link.until(lambda: self.code is not None, 5.0):
                    self.link.say(KILL, self.number)


class Link:
    """The line, moved on by a thread of its own so that the other end always hears of us."""

    def __init__(self, port: Port, session: int, name: str) -> None:
        self.port, self.line, self.name = port, Line(session), name
        self.error: LinkError | None = None
        self.channels: dict[int, Channel] = {}
        self._held, self._change, self._over = bytearray(), threading.Condition(), False
        self.line.heard = time.monotonic()
        self._thread = threading.Thread(target=self._move, name=f"edgesdk {name}", daemon=True)
        self._thread.start()

    def start(self, argv: tuple[str, ...]) -> Channel:
        channel = Channel(self, max(self.channels, default=0) % 60000 + 1)
        self.channels[channel.number] = channel
        self.say(START, channel.number, json.dumps(argv).encode())
        return channel

    def say(self, kind: int, channel: int, content: bytes = b"") -> None:
        with self._change:
            if self.error is not None:
                raise self.error
            self.line.write(HEAD.pack(kind, channel, len(content)) + content)

    def until(self, true: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait for something to become true; whether it did. Raises `LinkError` where the link fails before."""
        with self._change:
            self._change.wait_for(lambda: true() or self.error is not None, timeout_s)
            if true():
                return True
            if self.error is not None:
                raise self.error
            return False

    def _move(self) -> None:
        while not self._over:
            came = self.port.read()
            now = time.monotonic()
            with self._change:
                if self.port.gone is not None:
                    self.line.heard, out = now, b""
                else:
                    self.line.feed(came, now)
                    self._hear()
                    out = self.line.frames(now)
                self.error = self.error or self._failure(now)
                self._change.notify_all()
            if out:
                self.port.write(out)

    def _hear(self) -> None:
        self._held += self.line.take()
        for kind, number, content in messages(self._held):
            channel = self.channels.get(number)
            if channel is None:
                continue
            if kind == OUT:
                channel.out += content
            elif kind == ERR:
                channel.err += content
            elif kind in (EXIT, NONE):
                channel.code = struct.unpack(">i", content)[0] if kind == EXIT else 127
                channel.err += content if kind == NONE else b""
                del self.channels[number]

    def _failure(self, now: float) -> LinkError | None:
        again = "then run the same command again: a transfer resumes where it stopped"
        if self.port.gone is not None and now - self.port.gone > AWAY_S:
            return LinkError(f"{self.name}: the port has been away for {AWAY_S:.0f} s", f"plug it in again, {again}")
        if self.line.ended:
            return LinkError(f"{self.name}: the device's end of the link ended", f"see whether the board was restarted, {again}")
        if now - self.line.heard > SILENT_S:
            return LinkError(f"{self.name}: no word from the device for {SILENT_S:.0f} s", f"check cable and board, {again}")
        return None

    def close(self) -> None:
        """Say goodbye, so that the console is given back, and stop."""
        self._over = True
        self._thread.join(15)
        for _ in range(3 if self.error is None else 0):
            self.port.write(frame(BYE, self.line.session))
            self.line.feed(self.port.read(), time.monotonic())
            if self.line.ended:
                break
        self.port.close()


class SerialTransport(ShellTransport):
    """Commands run side by side over one line; the login happens when the first one does."""

    def __init__(self, link: str) -> None:
        url = split_link(link, "serial:/dev/ttyUSB0?baud=115200")
        query = {k: v[-1] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        for name in query:
            if name not in QUERY:
                raise UnknownName("serial option", name, QUERY)
        baud = query.get("baud", "115200")
        if not url.path.startswith("/") or url.netloc or not re.fullmatch("[1-9][0-9]{1,7}", baud):
            raise InputError(f"{link}: not a serial link", "write it like serial:/dev/ttyUSB0?baud=115200&user=root")
        try:
            import serial  # noqa: F401
        except ImportError:
            raise MissingTool("pyserial is not installed", "pip install 'edgesdk[serial]'") from None
        self.link = link.split("?")[0]
        self.root = query.get("root", ".edgesdk")
        self.python = query.get("python", "python3")
        self._path, self._baud, self._user = url.path, int(baud), query.get("user", "")
        self._password = os.environ.get("EDGESDK_SERIAL_PASSWORD", "")
        if "password_file" in query:
            try:
                self._password = Path(query["password_file"]).expanduser().read_text().rstrip("\n")
            except OSError as error:
                raise InputError(
                    f"{query['password_file']}: cannot be read ({error.strerror})", "give the file that holds the password"
                ) from None
        self._link: Link | None = None

    def _there(self) -> Link:
        if self._link is not None and self._link.error is not None:
            self.close()
        if self._link is None:
            port, session = Port(self._path, self._baud, self.link), random.SystemRandom().randrange(1, 1 << 16)
            try:
                Login(port, self.link, self._user, self._password, self.python).begin(session)
            except BaseException:
                port.close()
                raise
            self._link = Link(port, session, self.link)
        return self._link

    def run(self, argv: tuple[str, ...], stdin: bytes | None = None, timeout: float = 60.0) -> Result:
        link = self._there()
        channel = link.start(argv)
        for i in range(0, len(stdin or b""), PIECE):
            link.say(STDIN, channel.number, (stdin or b"")[i : i + PIECE])
        channel.finish()
        if not link.until(lambda: channel.code is not None, timeout):
            link.say(KILL, channel.number)
            raise LinkError(f"{self.link}: no answer in {timeout:.0f} s", "check that the device is up, then run the command again")
        return Result(channel.code or 0, bytes(channel.out), bytes(channel.err))

    def open(self, argv: tuple[str, ...]) -> Stream:
        return self._there().start(argv)

    def _stream(self, blob: Blob, remote: str, there: int, progress: Progress | None) -> Result:
        link = self._there()
        channel, arrived = link.start(receiver(blob, remote, there)), there
        with blob.open() as source:
            source.seek(there)
            while channel.code is None and (chunk := source.read(PIECE)):
                link.say(STDIN, channel.number, chunk)
                link.until(lambda: link.line.pending < 2 * WINDOW or channel.code is not None)
                if progress:
                    arrived = max(arrived, source.tell() - link.line.pending)
                    progress(arrived, blob.size_bytes)
        if channel.code is None:
            channel.finish()
        link.until(lambda: channel.code is not None, 300.0)
        if progress and channel.code == 0:
            progress(blob.size_bytes, blob.size_bytes)
        return Result(66 if channel.code is None else channel.code, bytes(channel.out), bytes(channel.err))

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
