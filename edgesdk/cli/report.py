"""The verb `report`, and how a report is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, say

if TYPE_CHECKING:
    from edgesdk.plan.types import Plan
    from edgesdk.report import Report


def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[REPORT]...", help="Saved reports (`edgesdk profile --out`), plans (`edgesdk plan --out`) or bundles."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write one page of all of them that stands alone: FILE.html.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a report's samples as a picture (needs matplotlib).")] = None,
    etdump: Annotated[Path | None, typer.Option("--etdump", help="An ETDump from your own ExecuTorch runner: print its operators.")] = None,
    etrecord: Annotated[Path | None, typer.Option("--etrecord", help="The ETRecord that belongs to it: real operator names.")] = None,
    as_json: Json = False,
) -> None:
    """Show saved reports and plans, write them as a page, or show the operator times in an ETDump.

    A plan or a bundle beside a report adds the roofline, the Pareto front and planned memory; several reports stand side by side and are
    compared with the first.
    """
    from edgesdk.errors import InputError

    if bool(paths) == bool(etdump):
        raise InputError("report wants reports, plans or bundles, or --etdump FILE", "edgesdk report report.json")
    if etdump is not None:
        _etdump(etdump, etrecord, as_json)
        return
    reports, plans = _read(paths or [])
    if out:
        from edgesdk.pages import page

        _write(out, page(reports, plans))
    if plot:
        from edgesdk.pages.picture import draw

        if len(reports) != 1:
            raise InputError(f"--plot draws one report, not {len(reports)}", "name one report, or write a page: -o page.html")
        draw(reports[0], plot)
        say(f"wrote {plot}")
    if as_json:
        _as_json(reports, plans)
    else:
        from edgesdk.cli.plan import show as show_plan

        for r in reports:
            show(r)
        for p in plans if not reports else ():
            show_plan(p)


def _read(paths: list[Path]) -> tuple[list[Report], list[Plan]]:
    """What each file is: by its kind, or a bundle, whose plan it is."""
    import zipfile

    from edgesdk.bundles import member_names, read_member
    from edgesdk.errors import InputError
    from edgesdk.plan.types import Plan
    from edgesdk.report import Report

    reports: list[Report] = []
    plans: list[Plan] = []
    for path in paths:
        if path.is_file() and zipfile.is_zipfile(path):
            if "plan.json" not in member_names(path):
                raise InputError(f"{path}: a bundle without a plan", "give the report of a profile, or a bundle that was built from a plan")
            plans.append(Plan.from_json(read_member(path, "plan.json"), f"plan.json of {path}"))
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error})", "give a saved report, a plan or a bundle") from None
        if f'"kind": "{Plan.KIND}"' in text[:200]:
            plans.append(Plan.from_json(text, str(path)))
        else:
            reports.append(Report.from_json(text, str(path)))
    return reports, plans


def _write(path: Path, content: str) -> None:
    from edgesdk.errors import InputError

    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error})", "name a file in a folder that exists") from None
    say(f"wrote {path}")


def _as_json(reports: list[Report], plans: list[Plan]) -> None:
    """One noun as it is; several with each report's comparison with the first."""
    import json

    from edgesdk.compare import compare
    from edgesdk.errors import InputError

    if len(reports) + len(plans) == 1:
        emit_json((*reports, *plans)[0])
        return
    comparisons = []
    for other in reports[1:]:
        try:
            comparisons.append(json.loads(compare(reports[0], other).to_json()))
        except InputError as error:
            comparisons.append({"kind": "comparison", "refused": error.what})
    emit_json(
        {
            "kind": "reports",
            "schema_version": 1,
            "reports": [json.loads(r.to_json()) for r in reports],
            "plans": [json.loads(p.to_json()) for p in plans],
            "comparisons": comparisons,
        }
    )


def _etdump(etdump: Path, etrecord: Path | None, as_json: bool) -> None:
    from edgesdk.operators import read_etdump
    from edgesdk.units import show_seconds

    rows, route = read_etdump(etdump, etrecord)
    if as_json:
        emit_json({"kind": "operators", "schema_version": 1, "route": route, "operators": [r.model_dump() for r in rows]})
        return
    out = console()
    out.print(f"operators ({route})", markup=False)
    for r in rows:
        out.print(f"  {r.method:10} {r.unit:48} {show_seconds(r.median_s):>9} {r.share:6.1%}", markup=False)


def show(r: Report) -> None:
    """A report for people."""
    from rich.table import Table

    from edgesdk.units import show_bytes, show_seconds

    out, c = console(), r.conditions
    threads = f"{c.threads} thread{'s' * (c.threads > 1)}"
    out.print(f"[bold]{r.model_name}[/bold] on {c.device} ({c.link}), {c.runtime} {c.runtime_version}, {threads}")
    out.print(f"  {c.machine}; {c.system}", markup=False)
    table = Table("method", "first call", "p50", "p90", "p99", "calls", box=None, header_style="dim")
    for m in r.methods:
        table.add_row(
            m.method,
            *(show_seconds(t) for t in (m.cold_s, m.p50_s, m.p90_s, m.p99_s)),
            str(m.summary.calls if m.summary else len(m.samples_s)),
        )
    out.print(table)
    for m in r.methods:
        if m.summary:
            told = {name: getattr(m.summary, f"{name}_s") for name in ("mean", "min", "p5", "p95", "max", "std")}
            figures = ", ".join(f"{name} {show_seconds(value)}" for name, value in told.items() if value is not None)
            out.print(f"  {m.method}: {figures} (a summary by {m.summary.tool}: no single times)", markup=False)
    cold, warm, imported = (show_seconds(t) for t in (r.load_cold_s, r.load_warm_s, r.runtime_import_s))
    out.print(f"  load      {cold} cold, {warm} warm; runtime import {imported}")
    out.print(f"  memory    {show_bytes(r.peak_rss_bytes)} peak, {show_bytes(r.rss_before_load_bytes)} before the program was loaded")
    out.print(f"  clock     {_hz(c.clock_before_hz)} before, {_hz(c.clock_after_hz)} after")
    if c.temperature_before_c is not None or c.temperature_after_c is not None:
        out.print(f"  warmth    {_c(c.temperature_before_c)} before, {_c(c.temperature_after_c)} after")
    _over_time(r)
    if r.comparisons:
        table = Table("", "predicted", "interval", "measured", "off by", box=None, header_style="dim")
        for row in r.comparisons:
            unit = show_seconds if row.unit == "s" else show_bytes
            interval = f"{unit(row.predicted_low)} to {unit(row.predicted_high)}" if row.predicted_low is not None else "–"
            off = f"{row.predicted / row.measured - 1:+.0%}" if row.predicted is not None and row.measured else "–"
            table.add_row(row.name, unit(row.predicted), interval, unit(row.measured), off)
        out.print(table)
    if r.operators:
        means = "; means" if any(o.is_mean for o in r.operators) else ""
        out.print(f"  operators ({r.operators_route}{means})", markup=False)
        for o in sorted(r.operators, key=lambda o: -o.median_s)[:15]:
            out.print(f"    {o.method:10} {o.unit:40} {o.op:16} {show_seconds(o.median_s):>9} {o.share:6.1%}", markup=False)
    colour = {"good": "green", "noisy": "yellow"}.get(r.trust.verdict, "red")
    out.print(f"  trust     [{colour}]{r.trust.verdict}[/{colour}]" + (": " + "; ".join(r.trust.reasons) if r.trust.reasons else ""))


def _over_time(r: Report) -> None:
    """What depends on how it was measured: waits, a sustained run, energy, what was dropped before cold runs."""
    from edgesdk.units import show_joules, show_seconds

    out = console()
    for m in r.methods:
        if m.wait_p50_s is not None:
            out.print(f"  queue     {m.method} waited {show_seconds(m.wait_p50_s)} (p50), {show_seconds(m.wait_p99_s)} (p99)", markup=False)
        if m.steady:
            times = f"{show_seconds(m.steady.burst_p50_s)} at first, {show_seconds(m.steady.sustained_p50_s)} later (×{m.steady.ratio:.2f})"
            out.print(f"  sustained {m.method} {times}", markup=False)
    for e in r.energy:
        net = "" if e.net_j is None else f", {show_joules(e.net_j)} above rest"
        out.print(f"  energy    {e.method} {show_joules(e.gross_j)}{net}, ± {show_joules(e.uncertainty_j)} a call", markup=False)
    if r.power:
        rest = "" if r.power.idle_w is None else f"; {r.power.idle_w:.3g} W at rest"
        out.print(f"            {r.power.sensor}: {r.power.covers}{rest}", markup=False)
    if r.how.page_cache:
        out.print(f"  cache     {r.how.page_cache}", markup=False)
    if r.operators_route and not r.operators:
        out.print(f"  operators {r.operators_route}", markup=False)


def _hz(value: float | None) -> str:
    return "unknown" if value is None else f"{value / 1e6:.0f} MHz"


def _c(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} °C"


def register(app: typer.Typer) -> None:
    app.command("report")(report)
