"""The verb `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgesdk.cli.common import Json, console, emit_json


def compare(
    first: Annotated[Path, typer.Argument(help="A saved report.")],
    second: Annotated[Path, typer.Argument(help="Another one, set against the first.")],
    fail_above: Annotated[
        str | None, typer.Option("--fail-above", help="Exit 1 if a method's median is slower by more than this: 5%.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set two reports against each other: ratio of medians with a 95% interval, if they may be compared at all."""
    from edgesdk.compare import compare as verb
    from edgesdk.errors import CheckFailed
    from edgesdk.report import Report
    from edgesdk.units import parse_share

    limit = parse_share(fail_above) if fail_above else None
    answer = verb(Report.load(first), Report.load(second), fail_above=limit)
    if as_json:
        emit_json(answer)
    else:
        _show(answer)
    if answer["not_comparable"]:
        hint = "measure both on the same device under the same conditions"
        raise CheckFailed("the two may not be compared: " + "; ".join(answer["not_comparable"]), hint)
    if answer["regressions"]:
        raise CheckFailed(f"slower than allowed: {', '.join(answer['regressions'])}", f"--fail-above was {fail_above}")


def _show(answer: dict[str, Any]) -> None:
    from edgesdk.units import show_seconds

    out = console()
    for m in answer["methods"]:
        times = f"{show_seconds(m['first_p50_s'])} → {show_seconds(m['second_p50_s'])}"
        out.print(f"{m['method']:12} {times:22} ×{m['ratio']:.3f}  (95%: {m['low']:.3f} to {m['high']:.3f})  {m['verdict']}", markup=False)
    for line in answer["differs"]:
        out.print(f"  differs: {line}", markup=False)


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)
