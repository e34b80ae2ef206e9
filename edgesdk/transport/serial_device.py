"""The device's end of a serial link: it runs commands and passes their streams, over `serial_line`. Goes to the device as it is, behind that file."""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import termios
import time
import tty
from typing import Any

from .serial_line import BYE, DEVICE, Line, frame

HEAD = struct.Struct(">BHI")
START, STDIN, EOF, KILL, OUT, ERR, EXIT, NONE = range(1, 9)
"""Kinds of messages: a command to start, its input, the end of that, end it; what it says, how it ended, and that there is no such program."""
IDLE_S = 150.0
"""Without a word from the host for so long the console is given back."""
AHEAD = 8192


def messages(held: bytearray) -> list[tuple[int, int, bytes]]:
    """Kind, channel and content of the whole messages at the beginning of `held`, taken off it."""
    found = []
    while len(held) >= HEAD.size:
        kind, channel, size = HEAD.unpack_from(held)
        if len(held) < HEAD.size + size:
            break
        found.append((kind, channel, bytes(held[HEAD.size : HEAD.size + size])))
        del held[: HEAD.size + size]
    return found


class Child:
    """One command: its process, what is to go in, whether that ends there."""

    def __init__(self, argv: list[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True)
        self.input, self.ends = bytearray(), False
        assert self.process.stdin and self.process.stdout and self.process.stderr
        os.set_blocking(self.process.stdin.fileno(), False)
        self.outputs: dict[int, int] = {self.process.stdout.fileno(): OUT, self.process.stderr.fileno(): ERR}

    def feed(self) -> None:
        """Write what the command takes now; close its input behind the last byte."""
        pipe = self.process.stdin
        if pipe is None or pipe.closed:
            self.input.clear()
            return
        try:
            while self.input:
                count = pipe.write(self.input[:65536])
                if not count:
                    return
                del self.input[:count]
            if self.ends:
                pipe.close()
        except OSError:  # it reads no more
            self.input.clear()
            with contextlib.suppress(OSError):
                pipe.close()

    def end(self) -> int:
        """Its exit code."""
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(OSError):
                    pipe.close()
        return self.process.wait()


class Console:
    """`into`, `out`: the terminal's file descriptors."""

    def __init__(self, session: int, into: int, out: int) -> None:
        self.line, self.into, self.out = Line(session, DEVICE), into, out
        self.children: dict[int, Child] = {}
        self.held = bytearray()

    def say(self, kind: int, channel: int, content: bytes = b"") -> None:
        self.line.write(HEAD.pack(kind, channel, len(content)) + content)

    def turn(self) -> None:
        waiting = sum(len(c.input) for c in self.children.values())
        reads: list[int] = [self.into] if waiting < 1 << 20 else []
        if self.line.pending < AHEAD:
            reads += [fd for c in self.children.values() for fd in c.outputs]
        writes: list[Any] = [c.process.stdin for c in self.children.values() if c.input and c.process.stdin and not c.process.stdin.closed]
        ready, _, _ = select.select(
            reads, writes, [], 0.02 if self.line.pending or any(not c.outputs for c in self.children.values()) else 0.2
        )
        if self.into in ready:
            came = os.read(self.into, 4096)
            if not came:
                raise EOFError
            self.line.feed(came, time.monotonic())
            self.held += self.line.take()
            for kind, channel, content in messages(self.held):
                self.do(kind, channel, content)
        for channel, child in list(self.children.items()):
            self.pass_on(channel, child, ready)
        if sent := self.line.frames(time.monotonic()):
            view = memoryview(sent)
            while view:
                view = view[os.write(self.out, view) :]

    def pass_on(self, channel: int, child: Child, ready: list[int]) -> None:
        for fd, kind in list(child.outputs.items()):
            if fd in ready:
                data = os.read(fd, 4096)
                if data:
                    self.say(kind, channel, data)
                else:
                    del child.outputs[fd]
        child.feed()
        if not child.outputs and child.process.poll() is not None:
            self.say(EXIT, channel, struct.pack(">i", child.end()))
            del self.children[channel]

    def do(self, kind: int, channel: int, content: bytes) -> None:
        child = self.children.get(channel)
        if kind == START:
            try:
                self.children[channel] = Child(json.loads(content))
            except OSError as error:
                self.say(NONE, channel, str(error.strerror).encode())
        elif child is not None and kind == STDIN:
            child.input += content
        elif child is not None and kind == EOF:
            child.ends = True
        elif child is not None and kind == KILL:
            child.process.kill()
            child.outputs.clear()

    def close(self) -> None:
        for child in self.children.values():
            child.process.kill()
            child.end()
        self.children.clear()


def serve(session: int, into: int = 0, out: int = 1) -> None:
    """Until the host says goodbye, is silent for long, or the terminal goes; another session may take over."""
    before = termios.tcgetattr(into)
    tty.setraw(into)
    console = Console(session, into, out)
    console.line.heard = time.monotonic()
    try:
        while not console.line.ended and time.monotonic() - console.line.heard < IDLE_S:
            console.turn()
            if console.line.reset not in (None, console.line.session):
                asked = console.line.reset
                console.close()
                console = Console(int(asked or 0), into, out)
                console.line.heard = time.monotonic()
    except (EOFError, OSError):
        sys.exit(1)
    finally:
        console.close()
        termios.tcsetattr(into, termios.TCSADRAIN, before)
    os.write(out, frame(BYE | DEVICE, console.line.session))
