"""The verb `profile`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgesdk.cli.common import Json, console, emit_json, progress, say
from edgesdk.cli.flash import AllowUnchecked, NativeRunner, On, PythonPath, Wait
from edgesdk.cli.many import Jobs, on_each

if TYPE_CHECKING:
    from edgesdk.cli.common import Step
    from edgesdk.inventory import Entry
    from edgesdk.report import Report


def profile(
    bundle: Annotated[str | None, typer.Argument(help="What `edgesdk build` wrote; without it, what is installed there.")] = None,
    on: On = "local",
    mode: Annotated[
        Literal["cold", "warm", "burst", "sustained"],
        typer.Option("--mode", help="cold: each call in a fresh process; burst: ten calls and a pause; sustained: for minutes."),
    ] = "warm",
    duration: Annotated[
        str | None, typer.Option("--duration", help="Go on for so long: 5min.", show_default="sustained: 5min; else --runs")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Calls arrive so often a second; their wait is told apart from their run time.")
    ] = None,
    runs: Annotated[int | None, typer.Option("--runs", help="Timed calls a method.", show_default="50; cold: 10", min=1)] = None,
    warmup: Annotated[int, typer.Option("--warmup", help="Calls before, not counted.", min=0)] = 5,
    method: Annotated[str | None, typer.Option("--method", help="Only this one.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="The device's profile name.", show_default="what the bundle is for")
    ] = None,
    python: PythonPath = None,
    runner: NativeRunner = None,
    allow_unchecked: AllowUnchecked = False,
    operators: Annotated[
        bool,
        typer.Option(
            "--operators", help="Time single operators, too: on the device where its runtime tells, else alone on this host (slow)."
        ),
    ] = False,
    energy: Annotated[bool, typer.Option("--energy/--no-energy", help="Read a power sensor, after three seconds at rest.")] = True,
    wait: Wait = None,
    attach: Annotated[str | None, typer.Option("--attach", metavar="JOB", help="The report of a measurement begun before.")] = None,
    cancel: Annotated[str | None, typer.Option("--cancel", metavar="JOB", help="End a measurement.")] = None,
    status: Annotated[bool, typer.Option("--status", help="Show the measurements on the device.")] = False,
    patience: Annotated[str, typer.Option("--patience", help="How long to try again where the link broke.")] = "1min",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Save the report, raw samples and all; of several devices, in this folder.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the samples as a picture (needs matplotlib).")] = None,
    jobs: Jobs = 8,
    as_json: Json = False,
) -> None:
    """Measure a bundle on a device, beside what was predicted. It goes on there when the link breaks."""
    from edgesdk import profile as verb
    from edgesdk.errors import InputError
    from edgesdk.units import parse_seconds

    if (attach is not None) + (cancel is not None) + status + (bundle is not None) > 1:
        raise InputError(
            "profile wants one of: a bundle, --attach JOB, --cancel JOB, --status", "edgesdk profile --attach p-0123abcd --on …"
        )
    if cancel is not None or status:
        _manage(cancel, on, python, as_json)
        return
    patience_s = parse_seconds(patience)
    asked: dict[str, Any] = {
        "mode": mode, "duration_s": parse_seconds(duration) if duration else None, "rate_hz": rate, "runs": runs, "warmup": warmup,
        "method": method, "python": python, "operators": operators, "energy": energy, "wait_s": parse_seconds(wait) if wait else 0.0,
        "patience_s": patience_s, "runner": runner, "allow_unchecked": allow_unchecked,
    }  # fmt: skip

    def saved(link: str, entry: Entry, step: Step) -> Report:
        report = verb.profile(bundle, link, **asked, device=device or entry.device, tell=step)
        if out:
            out.mkdir(parents=True, exist_ok=True)
            report.save(out / f"{re.sub('[^A-Za-z0-9._-]+', '-', entry.name)}.json")
        return report

    if attach is None and on_each("profile", on, saved, _brief, jobs=jobs, as_json=as_json):
        return
    from edgesdk.inventory import chosen

    with progress("profile") as step:
        if attach is not None:
            report = verb.attach(attach, on, python=python, patience_s=patience_s, tell=step)
        else:
            named = device or chosen(on)[0].device
            report = verb.profile(bundle, on, **asked, device=named, tell=step, started=lambda job: say(f"job {job}"))
    _tell(report, out, plot, as_json)


def _tell(report: Report, out: Path | None, plot: Path | None, as_json: bool) -> None:
    if out:
        report.save(out)
        say(f"wrote {out}")
    if plot:
        from edgesdk.pages.picture import draw

        draw(report, plot)
        say(f"wrote {plot}")
    if as_json:
        emit_json(report)
    else:
        from edgesdk.cli.report import show

        show(report)


def _manage(cancel: str | None, on: str, python: str | None, as_json: bool) -> None:
    """Show the measurements on a device, or end one."""
    from edgesdk import jobs as verb

    found = [verb.cancel(cancel, on, python)] if cancel is not None else verb.jobs(on, python)
    if as_json:
        emit_json({"kind": "profile-jobs", "schema_version": 1, "jobs": found})
        return
    out = console()
    for state in found:
        said = state.get("error") or f"{state['progress'][1]:.0%} {state['progress'][0]}"
        out.print(f"{state['job']}  {state['state']:9}  {state.get('since', '')}  {said}", markup=False)
    if not found:
        out.print("no measurements there")


def _brief(report: Report) -> str:
    """One device's answer in a line."""
    from edgesdk.units import show_bytes, show_seconds

    times = ", ".join(f"{m.method} p50 {show_seconds(m.p50_s)} p90 {show_seconds(m.p90_s)}" for m in report.methods)
    return f"{times}; peak {show_bytes(report.peak_rss_bytes)}; {report.trust.verdict}"


def register(app: typer.Typer) -> None:
    app.command("profile")(profile)
