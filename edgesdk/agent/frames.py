"""The agent's wire: one message a line, `LENGTH CRC32 JSON\\n`, so that noise and cut lines are noticed."""

from __future__ import annotations

import json
import zlib
from typing import Any

from edgesdk.errors import LinkError


def encode(message: dict[str, Any]) -> bytes:
    """`message` as one framed line."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return b"%d %08x %s\n" % (len(body), zlib.crc32(body), body)


def is_frame(line: bytes) -> bool:
    """Whether `line` looks like a frame: a login banner does not."""
    head = line.split(b" ", 2)
    return len(head) == 3 and head[0].isdigit() and len(head[1]) == 8 and head[2].startswith(b"{")


def decode(line: bytes) -> dict[str, Any]:
    """The message in a line without its newline. Raises `LinkError` if it was damaged on the way."""
    if is_frame(line):
        length, crc, body = line.split(b" ", 2)
        if len(body) == int(length) and b"%08x" % zlib.crc32(body) == crc:
            message = json.loads(body)
            assert isinstance(message, dict)
            return message
    hint = "run the command again; if it repeats, something else prints on that line"
    raise LinkError(f"the device's answer was damaged on the way: {line[:60]!r}", hint)
