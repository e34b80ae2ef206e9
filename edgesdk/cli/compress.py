"""The verb `compress`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgesdk.cli.common import Json, console, emit_json, progress
from edgesdk.cli.plan import Energy, Latency, Memory, Model, Runtime, Storage, Threads, read_budget

if TYPE_CHECKING:
    from edgesdk.compress.listing import Listing
    from edgesdk.compress.pipeline import Compression, Stage
    from edgesdk.plan.types import Budget


def compress(
    model: Model = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A method and its settings: gptq:bits=3,group=32, or rtn@REGEX:bits=8 for some weights. Repeat for stages.",
        ),
    ] = None,
    bits: Annotated[
        float | None, typer.Option("--bits", help="Choose for every weight, to this many stored bits a weight on average.")
    ] = None,
    storage: Storage = None,
    quality_drop: Annotated[
        str | None,
        typer.Option("--quality-drop", help="Choose for every weight: the smallest found that loses no more than this, 1% or 0.01."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="Choose for every weight as it will run there: a name, an alias or a TOML file. For the budgets below."
        ),
    ] = "",
    memory: Memory = None,
    latency: Latency = None,
    energy: Energy = None,
    runtime: Runtime = None,
    threads: Threads = None,
    fastest: Annotated[
        bool,
        typer.Option("--fastest", help="With --quality-drop and --device: the fastest found that loses no more, instead of the smallest."),
    ] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="What may be chosen, written like a stage of --recipe. Default: gptq at stored rates of 0.75 to 8 bits. Repeat.",
        ),
    ] = None,
    generations: Annotated[
        int | None,
        typer.Option("--generations", min=0, help="Of evolution on the measured loss. 0: the exact answer of the additive problem only."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine", help="Where codes are made: processes:N, dask, or a Dask scheduler's tcp://host:port. Default: this process."
        ),
    ] = "",
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure quality before and after, where the model can.")
    ] = True,
    out: Annotated[str | None, typer.Option(help="Write the compressed model here (.edgec): every --model takes it.")] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the methods, their settings, and with --model its weights; compress nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller by a recipe, or to a size or a quality, every stored byte counted."""
    from edgesdk.errors import InputError

    if list_:
        _list(model, as_json)
        return
    if model is None:
        raise InputError("no --model", "name one, such as --model example:normalizer; `edgesdk compress --list` shows the methods")
    budget = read_budget(memory, latency, storage, quality_drop, energy)
    place: dict[str, Any] = {"device": device, "runtime": runtime, "threads": threads, "minimise": "latency" if fastest else None}
    own: dict[str, Any] = {"methods": method, "generations": generations, "engine": engine}
    stages = _stages(recipe or [], budget, {"bits": bits, **place}, own)
    from edgesdk.compress import compress as make

    with progress("compress") as step:
        made = make(model, stages, evaluate=evaluate, step=step)
        if out:
            step(f"writing {out}", 0.99)
            made.save(out)
    if as_json:
        emit_json(made.report)
    else:
        _show(made.report, out)


def _stages(recipe: list[str], budget: Budget, choice: dict[str, Any], own: dict[str, Any]) -> list[Stage]:
    """The stages of a recipe, and one of `auto` where there is a budget. `choice` and `own` hold further settings of that."""
    from edgesdk.compress.auto import as_settings
    from edgesdk.compress.pipeline import Stage, parse_stage
    from edgesdk.errors import InputError

    stages = [parse_stage(text) for text in recipe]
    given = {k: v for k, v in {**as_settings(budget), **choice}.items() if v not in (None, "")}
    own = {k: v for k, v in own.items() if v not in (None, "", [])}
    if given:
        stages.append(Stage(method="auto", settings={**given, **own}))
    elif own:
        raise InputError(
            f"--{next(iter(own)).rstrip('s')}: nothing is to be chosen",
            "give --bits, --storage, --quality-drop or a budget of a --device as well",
        )
    if not stages:
        raise InputError("nothing says how to compress", "give --recipe gptq:bits=4, or --bits, --storage or --quality-drop")
    return stages


def _show(report: Compression, out: str | None) -> None:
    from rich.table import Table

    from edgesdk.compress.registry import method
    from edgesdk.units import show_bytes

    screen = console()
    table = Table(title=f"{report.model}, compressed", box=None)
    for column in ("weight", "method", "settings", "stored", "bits", "output error"):
        table.add_column(column)
    for r in report.weights:
        fields = method(r.method).config.model_fields
        changed = ", ".join(f"{k}={v}" for k, v in r.settings.items() if k not in fields or fields[k].default != v)
        table.add_row(
            r.weight, r.method, changed, show_bytes(r.bytes), f"{32 * r.bytes / max(1, r.float_bytes):.2f}", f"{r.error:.2g}"
        )  # fmt: skip
    screen.print(table)
    for name, reason in report.kept.items():
        screen.print(f"  kept as it was: {name} ({reason})")
    for note in report.notes:
        screen.print(f"  {note}")
    share = report.float_bytes / max(1, report.weight_bytes)
    screen.print(
        f"weights {show_bytes(report.float_bytes)} → {show_bytes(report.weight_bytes)}: {report.bits:.2f} bits each, {share:.1f}x smaller",
        style="bold",
    )
    if report.quality is not None and report.quality_before is not None:
        screen.print(f"quality {report.quality_before:.2%} → {report.quality:.2%} on held-out data")
    screen.print(f"wrote {out}; next: edgesdk plan --model {out}" if out else "nothing was written: give --out FILE.edgec to keep it")


def _list(model: str | None, as_json: bool) -> None:
    from edgesdk.compress.listing import listing

    answer = listing(model)
    if as_json:
        emit_json(answer)
    else:
        _show_list(answer)


def _show_list(answer: Listing) -> None:
    from rich.table import Table

    methods = Table(title="methods", box=None)
    for column in ("method", "family", "works on", "needs", "settings", "source"):
        methods.add_column(column)
    for m in answer.methods:
        settings = ", ".join(f"{k}={v}" for k, v in m.settings.items())
        methods.add_row(m.name, m.family, m.level, ", ".join(m.needs) or "nothing", settings, m.source)
    console().print(methods)
    if not answer.weights:
        return
    weights = Table(title=f"weights of {answer.model}", box=None)
    for column in ("weight", "operator", "shape", "elements"):
        weights.add_column(column)
    for w in answer.weights:
        weights.add_row(w.name, w.op, "x".join(map(str, w.shape)), f"{w.elements:,}")
    console().print(weights)


def register(app: typer.Typer) -> None:
    app.command("compress")(compress)
