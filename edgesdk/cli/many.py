"""Verbs on several devices at once: a live table on a terminal, a line for each change elsewhere, one JSON object."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgesdk.cli.common import console, emit_json, say

if TYPE_CHECKING:
    from rich.table import Table

    from edgesdk.cli.common import Step
    from edgesdk.inventory import Entry
    from edgesdk.many import Row

Jobs = Annotated[int, typer.Option("--jobs", help="Devices at a time, where --on names several.", min=1)]
ROOM = 30
"""Rows of a live table at most; what is done goes first."""


def on_each(
    verb: str,
    on: str,
    work: Callable[[str, Entry, Step], Any],
    says: Callable[[Any], str],
    *,
    jobs: int,
    as_json: bool,
) -> bool:
    """Do `work(link, entry, step)` on every device of `on` and show all; False, with nothing done, where `on` is one device.

    `says` is what a table tells of an answer. Raises `typer.Exit` with the highest exit code of the devices if that is not 0.
    """
    from edgesdk.inventory import chosen, is_several, reached
    from edgesdk.many import side_by_side, worst

    if not is_several(on):
        return False
    entries = chosen(on)
    with _shown(verb, len(entries), says) as (rows, changed):
        done = side_by_side(entries, lambda e, tell: work(reached(e), e, tell), jobs=jobs, changed=changed)
        rows[:] = done
    code = worst(done)
    if as_json:
        emit_json({"kind": "devices-side-by-side", "schema_version": 1, "verb": verb, "code": code, "devices": [_as_json(r) for r in done]})
    else:
        console().print(_table(done, says))
        for row in done:
            if row.error:
                say(f"{row.entry.name}: {row.error.what}" + (f"\n  hint: {row.error.hint}" if row.error.hint else ""))
    if code:
        raise typer.Exit(code)
    return True


def _as_json(row: Row) -> dict[str, Any]:
    answer = row.answer
    if hasattr(answer, "to_json"):
        answer = json.loads(answer.to_json())
    error = {"what": row.error.what, "hint": row.error.hint} if row.error else None
    head = {"name": row.entry.name, "link": row.entry.link, "state": row.state, "code": row.code}
    return {**head, "seconds": row.seconds, "error": error, "answer": answer}


def _table(rows: Sequence[Row], says: Callable[[Any], str]) -> Table:
    from rich.table import Table

    from edgesdk.units import show_seconds

    table = Table(box=None, header_style="dim")
    for column in ("device", "state", "", "time"):
        table.add_column(column, overflow="fold")
    colours = {"done": "green", "failed": "red", "running": "cyan", "waiting": "dim", "stopped": "yellow"}
    for row in rows:
        text = says(row.answer) if row.state == "done" else f"{row.text} {row.share:.0%}" if row.state == "running" else row.text
        table.add_row(
            row.entry.name, f"[{colours[row.state]}]{row.state}[/]", _plain(text), show_seconds(row.seconds) if row.seconds else ""
        )
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


@contextlib.contextmanager
def _shown(verb: str, count: int, says: Callable[[Any], str]) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """What hears of changes: a live table on stderr, or lines."""
    screen, lock = console(stderr=True), threading.Lock()
    rows: list[Row] = []
    if not screen.is_terminal:
        yield rows, lambda row: _line(verb, row, says, lock)
        return
    from rich.live import Live

    seen: dict[str, Row] = {}

    def picture() -> Table:
        with lock:
            now = sorted(seen.values(), key=lambda r: ("running", "failed", "stopped", "waiting", "done").index(r.state))
        table = _table(now[:ROOM], says)
        table.caption = f"{verb}: {sum(r.state == 'done' for r in now)} of {count} done, {sum(r.state == 'failed' for r in now)} failed"
        return table

    def changed(row: Row) -> None:
        with lock:
            seen[row.entry.name] = row

    with Live(get_renderable=picture, console=screen, refresh_per_second=4, transient=True):
        yield rows, changed


def _line(verb: str, row: Row, says: Callable[[Any], str], lock: threading.Lock) -> None:
    if row.state == "running" and row.text:
        return  # only that it began and how it ended
    words = {"running": "begun", "done": says(row.answer) if row.state == "done" else "", "failed": "failed"}
    with lock:
        say(f"{verb} {row.entry.name}: {words.get(row.state, row.text)}")
