"""The same work on several devices side by side: each one's error is its own, the rest goes on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgesdk.errors import EdgeError
from edgesdk.inventory import Entry

Tell = Callable[[str, float], None]
State = Literal["waiting", "running", "done", "failed", "stopped"]
STOPPED = 130
"""Exit code of what Ctrl-C ended."""
GOODBYE_S = 10.0
"""How long work that was told to stop may take to end."""


class Stopped(Exception):
    """Raised inside work at its next word of progress, once all is to end."""


@dataclass
class Row:
    """One device: how far it is, and what came of it."""

    entry: Entry
    state: State = "waiting"
    text: str = ""
    share: float = 0.0
    seconds: float | None = None
    answer: Any = None
    error: EdgeError | None = None

    @property
    def code(self) -> int:
        """As the verb alone would exit: 0 done, 1 no, 2 bad input, 3 device or link; 130 stopped."""
        return self.error.exit_code if self.error else 0 if self.state == "done" else STOPPED


def worst(rows: Sequence[Row]) -> int:
    """The exit code of all: the highest of theirs."""
    return max((r.code for r in rows), default=0)


def side_by_side(
    entries: Sequence[Entry],
    work: Callable[[Entry, Tell], Any],
    *,
    jobs: int = 8,
    changed: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """`work(entry, tell)` for each entry, `jobs` at a time; a row for each, in order. Raises nothing that a device's work raises.

    `changed` hears of every change, from several threads. Ctrl-C: what waits is not begun, what runs ends at its next word of progress
    (a device is then as after a cut link: it keeps what it had), and the rows are returned as they are.
    """
    rows = [Row(e) for e in entries]
    waiting: queue.SimpleQueue[Row] = queue.SimpleQueue()
    for row in rows:
        waiting.put(row)
    stop = threading.Event()

    def worker() -> None:
        while not stop.is_set():
            try:
                row = waiting.get_nowait()
            except queue.Empty:
                return
            _one(row, work, changed, stop)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(max(jobs, 1), len(rows)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
    except KeyboardInterrupt:
        _end(rows, threads, stop, changed)
    return rows


def _end(rows: list[Row], threads: list[threading.Thread], stop: threading.Event, changed: Callable[[Row], None]) -> None:
    stop.set()
    until = time.monotonic() + GOODBYE_S
    for thread in threads:
        if thread.ident is not None:  # Ctrl-C may come before all have begun
            thread.join(max(0.0, until - time.monotonic()))
    for row in rows:
        if row.state in ("waiting", "running"):
            row.text = "not begun" if row.state == "waiting" else "stopped on the way"
            row.state = "stopped"
            changed(row)


def _one(row: Row, work: Callable[[Entry, Tell], Any], changed: Callable[[Row], None], stop: threading.Event) -> None:
    def tell(text: str, share: float) -> None:
        if stop.is_set():
            raise Stopped
        row.text, row.share = text, share
        changed(row)

    start = time.perf_counter()
    row.state = "running"
    changed(row)
    try:
        row.answer = work(row.entry, tell)
        row.state, row.text, row.share = "done", "", 1.0
    except Stopped:
        row.state, row.text = "stopped", "stopped on the way"
    except EdgeError as error:  # a child that Ctrl-C ended looks like a broken link
        row.state, row.error, row.text = ("stopped", None, "stopped on the way") if stop.is_set() else ("failed", error, error.what)
    except Exception as error:
        row.error = EdgeError(
            f"unexpected: {type(error).__name__}: {error}", "this is a defect of edgesdk; --on that device alone, --verbose"
        )
        row.state, row.text = "failed", row.error.what
    row.seconds = time.perf_counter() - start
    changed(row)
