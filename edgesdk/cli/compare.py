"""The verb `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json

if TYPE_CHECKING:
    from edgesdk.compare import Row, Verdicts
    from edgesdk.report import Report


def compare(
    first: Annotated[Path, typer.Argument(help="A saved report, or a folder that holds several runs of one bundle.")],
    second: Annotated[Path, typer.Argument(help="What is set against it: a report or a folder.")],
    tolerance: Annotated[str, typer.Option("--tolerance", help="Changes up to this much do not count.")] = "3%",
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 as well where slower cannot be ruled out.")] = False,
    as_json: Json = False,
) -> None:
    """Say whether the second is faster, slower, the same within a tolerance, or cannot be told; exit 1 if it is slower.

    Medians, p90 and, where there are any, energy and memory, as ratios with intervals that hold all together with 95%.
    Exit 2 if the two may not be compared: another device, clock or power mode, or a throttled run.
    """
    from edgesdk.compare import compare as verb
    from edgesdk.errors import CheckFailed, InputError
    from edgesdk.units import parse_share

    answer = verb(_read(first), _read(second), tolerance=parse_share(tolerance))
    if as_json:
        emit_json(answer)
    else:
        _show(answer)
    if answer.not_comparable:
        hint = "measure both on the same device under the same conditions"
        raise InputError("the two may not be compared: " + "; ".join(answer.not_comparable), hint)
    if answer.regressions:
        raise CheckFailed(f"worse than allowed: {', '.join(answer.regressions)}", f"--tolerance was {tolerance}")
    if strict and not answer.not_worse:
        open_rows = ", ".join(r.name for r in answer.rows if r.unit == "s" and not r.not_worse)
        raise CheckFailed(f"not shown to be as fast: {open_rows}", "measure longer or more runs; without --strict this passes")


def _read(path: Path) -> list[Report]:
    """One report, or those of a folder in order of name."""
    from edgesdk.errors import InputError
    from edgesdk.report import Report

    if not path.is_dir():
        return [Report.load(path)]
    files = sorted(path.glob("*.json"))
    if not files:
        raise InputError(f"{path}: holds no .json", "save each run there: edgesdk profile … --out FOLDER/1.json")
    return [Report.load(f) for f in files]


def _show(answer: Verdicts) -> None:
    from rich.table import Table

    from edgesdk.compare import SHOW

    out = console()
    table = Table("", "first", "second", "ratio", "interval", "verdict", box=None, header_style="dim")
    for r in answer.rows:
        interval = f"{r.low:.3f} to {r.high:.3f}" if r.low is not None else "–"
        table.add_row(r.name, SHOW[r.unit](r.first), SHOW[r.unit](r.second), f"×{r.ratio:.3f}", interval, _words(r, answer))
    out.print(table)
    for line in answer.differs:
        out.print(f"  differs: {line}", markup=False)
    for line in answer.warnings:
        out.print(f"  note: {line}", markup=False)
    runs = "one run a side" if answer.runs == (1, 1) else f"{answer.runs[0]} and {answer.runs[1]} runs"
    out.print(f"{answer.verdict} (tolerance {answer.tolerance * 100:.3g}%, {answer.confidence:.0%} over all rows, {runs})", markup=False)


def _words(r: Row, answer: Verdicts) -> str:
    if r.verdict != "cannot tell":
        return r.verdict
    words = r.verdict + (", not worse" if r.not_worse else "")
    if r.why:
        words += f" ({r.why})"
    if r.low is not None:
        what = "samples" if answer.runs == (1, 1) else "runs"
        more = f"about {max(1.1, r.times_more):.2g}× as many {what} would" if r.times_more else f"100× as many {what} might not either"
        words += f": {more}"
    return words


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)
