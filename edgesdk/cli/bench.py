"""The verb `bench`: benchmarks of edgesdk itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgesdk.cli.common import Json, console, emit_json, progress, say

if TYPE_CHECKING:
    from edgesdk.predict import Prediction

Rows = Annotated[
    str, typer.Option("--rows", help="A CSV of published measurements: device,model,precision,runtime,threads,value,unit,note,source.")
]
Validate = Annotated[
    bool, typer.Option("--validate", help="Also fit again with whole devices and whole models left out, and print the errors reached.")
]
Anchors = Annotated[
    int,
    typer.Option(
        "--anchors",
        min=0,
        help="Also leave each device out but for 0, 1, 3, … K of its rows, and print the errors on the others; implies --validate.",
    ),
]


def _percent(x: float | None) -> str:
    return "–" if x is None else f"{x:.0%}"


def _rows_table(items: list[Prediction]) -> None:
    from rich.table import Table

    table = Table(title="Published beside predicted", title_justify="left")
    for name in ("line", "device", "model", "precision", "runtime", "threads"):
        table.add_column(name, overflow="fold")
    for name in ("published", "predicted", "interval", "error"):
        table.add_column(name, justify="right")
    for p in items:
        head = (str(p.line), p.device, p.model, p.precision.split(" (")[0], p.runtime, str(p.threads or "–"), f"{p.published:.4g} {p.unit}")
        if p.predicted is None or p.error is None:
            table.add_row(*head, "unknown", p.why or "", "–")
        else:
            mark = "" if p.inside else " outside"
            table.add_row(*head, f"{p.predicted:.4g}", f"{p.low:.3g} … {p.high:.3g}{mark}", f"{p.error:.0%}")
    console().print(table)


def _summary_table(title: str, groups: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for name in ("rows", "unknown", "median error", "within 10%", "within 25%", "inside interval"):
        table.add_column(name, justify="right")
    for name, g in groups.items():
        cells = (g["median_error"], g["within_10_percent"], g["within_25_percent"], g["inside_interval"])
        table.add_row(name, str(g["rows"]), str(g["unknown"]), *map(_percent, cells))
    console().print(table)


def predictions(rows: Rows, as_json: Json = False, check: Validate = False, anchors: Anchors = 0) -> None:
    """Predict published latencies without touching a device, and tell how far off the predictions are."""
    from edgesdk import predict

    items = predict.predict_rows(rows)
    summary = predict.summarise(items)
    validation = None
    if check or anchors:
        with progress("validate") as step:
            step("fitting with devices and models left out", 0.0)
            validation = predict.validate(rows, anchors)
    shipped = predict.fitted()
    if as_json:
        emit_json({
            "kind": "prediction-report", "schema_version": 1, "interval_claims": shipped["covers"], "fitted_on_points": shipped["points"],
            "rows": predict.to_json(items), "summary": summary, "validation": validation,
        })  # fmt: skip
        return
    _rows_table(items)
    for name in ("device", "runtime", "source"):
        _summary_table(f"By {name}", summary[name])
    _summary_table("All", {"all rows": summary["all"]})
    if validation:
        _summary_table("Left out of the fit", validation)
    unknown = [p for p in items if not p.known]
    claim = f"an interval claims {shipped['covers']:.0%}"
    say(f"{len(items)} rows, {len(unknown)} unknown; {claim}; parameters fitted on {shipped['points']} published numbers")


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Benchmarks of edgesdk itself.", no_args_is_help=True)
    bench.callback()(lambda: None)
    bench.command("predictions")(predictions)
    app.add_typer(bench, name="bench")
