"""The host's side of the agent's wire (see `wire`): what comes from a device may be anything."""

from __future__ import annotations

import json
import zlib
from typing import Any

from edgesdk.agent.wire import encode
from edgesdk.errors import LinkError

__all__ = ["decode", "encode", "is_frame"]


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
