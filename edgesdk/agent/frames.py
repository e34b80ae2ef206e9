"""The host's side of the agent's wire (see `wire`): what comes from a device may be anything."""

from __future__ import annotations

from typing import Any

from edgesdk.agent.wire import encode, opened
from edgesdk.errors import LinkError

__all__ = ["decode", "encode", "is_frame"]


def is_frame(line: bytes) -> bool:
    """Whether `line` looks like a frame: a login banner does not."""
    head = line.split(b" ", 2)
    return len(head) == 3 and head[0].isdigit() and len(head[1]) == 8 and head[2].startswith(b"{")


def decode(line: bytes) -> dict[str, Any]:
    """The message in a line without its newline. Raises `LinkError` if it was damaged on the way."""
    if (message := opened(line)) is not None:
        return message
    hint = "run the command again; if it repeats, something else prints on that line"
    raise LinkError(f"the device's answer was damaged on the way: {line[:60]!r}", hint)
