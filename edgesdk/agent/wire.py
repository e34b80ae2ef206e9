"""Requests and answers as framed lines, `LENGTH CRC32 JSON`, so that noise and cut lines are noticed. Goes to the device as it is."""

from __future__ import annotations

import json
import os
import select
import zlib
from typing import Any

VERSION = 2
"""Of the requests and answers: host and device must have the same."""


class Refused(Exception):
    """A request that cannot be answered: what is wrong, and what to do."""

    def __init__(self, what: str, hint: str = "", bad_input: bool = False) -> None:
        super().__init__(what)
        self.what, self.hint, self.bad_input = what, hint, bad_input


def encode(message: dict[str, Any]) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return b"%d %08x %s\n" % (len(body), zlib.crc32(body), body)


def decode(line: bytes) -> dict[str, Any]:
    message = opened(line.rstrip(b"\n"))
    if message is None:
        raise Refused("the request was damaged on the way", "run the command again")
    return message


def opened(line: bytes) -> dict[str, Any] | None:
    """The message in a line without its newline; None where it was damaged on the way, or is none."""
    try:
        length, crc, body = line.split(b" ", 2)
        if len(body) != int(length) or b"%08x" % zlib.crc32(body) != crc:
            return None
        message = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


class Lines:
    """Lines from a file descriptor, and whether one waits."""

    def __init__(self, fd: int) -> None:
        self.fd, self.held, self.ended = fd, bytearray(), False

    def _more(self) -> None:
        chunk = os.read(self.fd, 1 << 20)
        self.ended = not chunk
        self.held += chunk

    def next(self) -> bytes:
        """The next line; nothing at the end."""
        at = 0
        while (end := self.held.find(b"\n", at)) < 0:
            if self.ended:
                return b""
            at = len(self.held)
            self._more()
        line = bytes(self.held[: end + 1])
        del self.held[: end + 1]
        return line

    def cancelled(self) -> bool:
        """Whether a request has come (the only one that comes before an answer is `cancel`) or the other side is gone."""
        while not self.ended and b"\n" not in self.held and select.select([self.fd], [], [], 0)[0]:
            self._more()
        return self.ended or b"\n" in self.held
