"""The verb `profile`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, emit_json, progress, say
from edgesdk.cli.flash import On, PythonPath, Wait
from edgesdk.cli.many import Jobs, on_each

if TYPE_CHECKING:
    from edgesdk.cli.common import Step
    from edgesdk.inventory import Entry
    from edgesdk.report import Report


def profile(
    bundle: Annotated[str | None, typer.Argument(help="What `edgesdk build` wrote; without it, what is installed there.")] = None,
    on: On = "local",
    runs: Annotated[int, typer.Option("--runs", help="Timed calls a method.", min=1)] = 50,
    warmup: Annotated[int, typer.Option("--warmup", help="Calls before, not counted.", min=0)] = 5,
    method: Annotated[str | None, typer.Option("--method", help="Only this one.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="The device's profile name.", show_default="what the bundle is for")
    ] = None,
    python: PythonPath = None,
    operators: Annotated[bool, typer.Option("--operators", help="Time each unit alone, too (on this host; slow).")] = False,
    wait: Wait = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Save the report, raw samples and all; of several devices, in this folder.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the samples as a picture (needs matplotlib).")] = None,
    jobs: Jobs = 8,
    as_json: Json = False,
) -> None:
    """Measure a bundle on a device, beside what was predicted."""
    from edgesdk import profile as verb
    from edgesdk.units import parse_seconds

    wait_s = parse_seconds(wait) if wait else 0.0

    def one(link: str, named: str | None, step: Step) -> Report:
        return verb.profile(
            bundle,
            link,
            runs=runs,
            warmup=warmup,
            method=method,
            device=device or named,
            python=python,
            operators=operators,
            wait_s=wait_s,
            tell=step,
        )

    def saved(link: str, entry: Entry, step: Step) -> Report:
        report = one(link, entry.device, step)
        if out:
            out.mkdir(parents=True, exist_ok=True)
            report.save(out / f"{re.sub('[^A-Za-z0-9._-]+', '-', entry.name)}.json")
        return report

    if on_each("profile", on, saved, _brief, jobs=jobs, as_json=as_json):
        return
    from edgesdk.inventory import chosen

    with progress("profile") as step:
        report = one(on, chosen(on)[0].device, step)
    if out:
        report.save(out)
        say(f"wrote {out}")
    if plot:
        from edgesdk.report_page import draw

        draw(report, plot)
        say(f"wrote {plot}")
    if as_json:
        emit_json(report)
    else:
        from edgesdk.cli.report import show

        show(report)


def _brief(report: Report) -> str:
    """One device's answer in a line."""
    from edgesdk.units import show_bytes, show_seconds

    times = ", ".join(f"{m.method} p50 {show_seconds(m.p50_s)} p90 {show_seconds(m.p90_s)}" for m in report.methods)
    return f"{times}; peak {show_bytes(report.peak_rss_bytes)}; {report.trust.verdict}"


def register(app: typer.Typer) -> None:
    app.command("profile")(profile)
