"""What was done to a device, kept on it: one line more for each act, read back behind torn and foreign lines.

A line is `CHECK NUMBER TIME ACTION DIGEST SIGNER RESULT`. The device's clock may jump: the number alone tells the order. `switching` is written before
the links move and followed by what came of it, so that a switch which a power cut ended is known by its being the last line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from edgesdk.deployment import Entry
from edgesdk.transport.scripts import RECORD, script
from edgesdk.transport.steps import Run

_LINE = re.compile(r"([0-9a-f]{16}) ((\d{1,15}) (\S+) (\S+) (\S+) (\S+) (.*))", re.DOTALL)
_FROM = re.compile(r"from (\S+), previous (\S+)")


def read_history(lines: Iterable[str]) -> tuple[Entry, ...]:
    """The entries in `lines`, the oldest first; a line that is not whole is left out."""
    found = []
    for line in lines:
        match = _LINE.fullmatch(line)
        if match and hashlib.sha256(match[2].encode()).hexdigest()[:16] == match[1]:
            number, when, action, digest, signer, result = match.groups()[2:]
            found.append(Entry(number=int(number), when=when, action=action, digest=_named(digest), signer=_named(signer), result=result))
    return tuple(found)


class Recorder:
    """The steps that write the next lines of a history."""

    def __init__(self, root: str, before: tuple[Entry, ...], signer: str | None = None) -> None:
        self._root, self._signer, self._number = root, signer or "-", max((e.number for e in before), default=0)

    def step(self, action: str, digest: str | None, result: str = "ok") -> Run:
        self._number += 1
        words = (str(self._number), action, digest or "-", self._signer, " ".join(result.split()) or "-")
        return Run(script("record", RECORD, self._root, *words), "to the history")

    def switching(self, digest: str, current: str | None, previous: str | None) -> Run:
        """Before the links move: what `unfinished` reads behind a power cut."""
        return self.step("switching", digest, f"from {current or '-'}, previous {previous or '-'}")


def unfinished(history: tuple[Entry, ...]) -> tuple[str, str | None, str | None] | None:
    """(what a switch that never ended led to, what was current, what was previous), or None."""
    last = max(history, key=lambda e: e.number, default=None)
    match = _FROM.fullmatch(last.result) if last and last.action == "switching" else None
    return (last.digest, _named(match[1]), _named(match[2])) if match and last and last.digest else None


def _named(word: str) -> str | None:
    return None if word == "-" else word
