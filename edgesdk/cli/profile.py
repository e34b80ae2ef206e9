"""The verb `profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgesdk.cli.common import Json, emit_json, progress, say
from edgesdk.cli.flash import On, PythonPath, Wait


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
    out: Annotated[Path | None, typer.Option("--out", help="Save the report, raw samples and all.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the samples as a picture (needs matplotlib).")] = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle on a device, beside what was predicted."""
    from edgesdk import profile as verb
    from edgesdk.units import parse_seconds

    with progress("profile") as step:
        report = verb.profile(
            bundle,
            on,
            runs=runs,
            warmup=warmup,
            method=method,
            device=device,
            python=python,
            operators=operators,
            wait_s=parse_seconds(wait) if wait else 0.0,
            tell=step,
        )
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


def register(app: typer.Typer) -> None:
    app.command("profile")(profile)
