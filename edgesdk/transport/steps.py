"""Effects as values: flash yields them, `--dry-run` prints them, `perform` does them. Two equal lists mean the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgesdk.transport.base import Blob
from edgesdk.units import show_bytes


@dataclass(frozen=True)
class Run:
    """A command on the device."""

    argv: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        name = self.argv[3].removeprefix("edgesdk-") if self.argv[0] == "sh" else self.argv[0]
        return f"run   {name} {' '.join(self.argv[4:] if self.argv[0] == 'sh' else self.argv[1:])}  # {self.why}"


@dataclass(frozen=True)
class Put:
    """A file of the bundle to the device, resumable, verified by sha256 there."""

    remote: str
    blob: Blob = field(compare=False)
    sha256: str
    size_bytes: int

    def __str__(self) -> str:
        return f"put   {self.remote}  # {show_bytes(self.size_bytes)}, sha256 {self.sha256[:12]}…"


@dataclass(frozen=True)
class Link:
    """A symbolic link, replaced in one move."""

    link: str
    target: str
    python: str

    def __str__(self) -> str:
        return f"link  {self.link} -> {self.target}"


@dataclass(frozen=True)
class Ask:
    """A question to the agent; its answer goes back to whoever yielded the step."""

    verb: str
    arguments: tuple[tuple[str, Any], ...]
    why: str

    def __str__(self) -> str:
        return f"ask   {self.verb} {' '.join(f'{k}={v}' for k, v in self.arguments)}  # {self.why}"


Step = Run | Put | Link | Ask
Watch = Callable[[Step, int, int], None]
"""`watch(step, done, total)`: bytes of a Put, (0, 0) as any other step begins."""
