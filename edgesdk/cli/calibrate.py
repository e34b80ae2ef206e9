"""The verb `calibrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, progress, say
from edgesdk.cli.flash import PythonPath, Wait

if TYPE_CHECKING:
    from edgesdk.efficiency import Efficiency


def calibrate(
    on: Annotated[
        str | None, typer.Option("--on", help="The link of a board that was probed: ssh://…, adb:, serial:…", show_default="this machine")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Its profile's name; `host` is this machine.", show_default="the one bound to that board")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="executorch, litert or native (our own kernels). Default: every one installed.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option("--precision", help="Only this one; may be given again.", show_default="all it builds")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; a calibration holds for this number only.")] = 1,
    allow_emulated: Annotated[bool, typer.Option("--allow-emulated", help="Measure an emulator, too; what it gives is marked so.")] = False,
    python: PythonPath = None,
    wait: Wait = None,
    as_json: Json = False,
) -> None:
    """Measure what the runtimes of this machine or of a board reach; `plan` uses it from then on."""
    import time

    from edgesdk.calibrate import calibrate as measure
    from edgesdk.units import parse_seconds

    start, wait_s = time.perf_counter(), parse_seconds(wait) if wait else 0.0
    with progress("calibrating") as step:
        answers = measure(
            device, on=on, runtime=runtime, threads=threads, precisions=precision, allow_emulated=allow_emulated, python=python, wait_s=wait_s, step=step
        )  # fmt: skip
    if as_json:
        emit_json({"kind": "calibration", "schema_version": 1, "efficiencies": [a.model_dump(mode="json") for a in answers]})
        return
    for answer in answers:
        show(answer)
    say(f"measured in {time.perf_counter() - start:.0f} s; `edgesdk plan --device {answers[0].device}` uses it")
    if answers[0].emulated:
        say("measured on an emulator: every plan that uses it says so")


def show(answer: Efficiency) -> None:
    """One runtime's rows as a table."""
    from rich.table import Table

    from edgesdk.units import show_seconds

    screen = console()
    speeds = ", ".join(f"{level} {speed / 1e9:.1f} GB/s" for level, speed in answer.bandwidth_bytes_per_s.items())
    screen.print(f"{answer.runtime} {answer.runtime_version}, {answer.threads} thread(s); reads: {speeds}", style="bold")
    table = Table(box=None, header_style="dim")
    for column in ("operator", "precision", "Gop/s", "an operator", "an output", "a tensor", "residual", "programs"):
        table.add_column(column)
    for r in answer.rows:
        rate = "" if r.op == "call" else f"{(r.ops_per_s or 0) / 1e9:.1f}"
        tensor = show_seconds(r.per_tensor_s) if r.per_tensor_s else ""
        each = (show_seconds(r.overhead_s), show_seconds(r.per_output_s), tensor, f"±{r.log_sd:.0%}", str(r.n))
        table.add_row(r.op, r.precision, rate, *each)
    screen.print(table)


def register(app: typer.Typer) -> None:
    app.command("calibrate")(calibrate)
