"""The verb `plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgesdk.cli.common import Json, console, emit_json, progress, say
from edgesdk.model_help import MODEL_HELP

if TYPE_CHECKING:
    from edgesdk.plan.lengths import Lengths
    from edgesdk.plan.types import Answers, Budget, Plan


def read_budget(
    memory: str | None, latency: list[str] | None, storage: str | None, quality_drop: str | None, energy: str | None = None
) -> Budget:
    """A Budget from what people type. Raises `InputError`."""
    from pydantic import ValidationError

    from edgesdk.errors import InputError
    from edgesdk.noun import describe
    from edgesdk.plan.types import Budget
    from edgesdk.units import parse_bytes, parse_joules, parse_latencies, parse_share

    times = parse_latencies(latency or [])
    try:
        return Budget(
            memory_bytes=parse_bytes(memory) if memory else None, latency_s=times.pop("", None), method_latency_s=times,
            storage_bytes=parse_bytes(storage) if storage else None, energy_j=parse_joules(energy) if energy else None,
            quality_drop=parse_share(quality_drop) if quality_drop else None,
        )  # fmt: skip
    except ValidationError as error:
        raise InputError(*describe(error, "the budget")) from None


Model = Annotated[str | None, typer.Option("--model", help=MODEL_HELP)]
Device = Annotated[
    str, typer.Option("--device", help="A name or alias (jetson, pi5, phone, …: `edgesdk devices list`), a TOML file, or host.")
]
Memory = Annotated[str | None, typer.Option("--memory", help="All a model may take in memory, its runtime included: 512MB, 4GiB.")]
Latency = Annotated[
    list[str] | None,
    typer.Option(
        "--latency", "--method-latency", help="Time of one whole answer: 20ms, 1.5s; of one call of a method: decode=5ms. May be repeated."
    ),
]
Energy = Annotated[
    str | None,
    typer.Option(
        "--energy", help="Energy of one whole answer, 5mJ: at most, by the watts of the device's power mode, where its profile has them."
    ),
]
Storage = Annotated[str | None, typer.Option("--storage", help="Bytes of weights on the device: 2MB.")]
QualityDrop = Annotated[str | None, typer.Option("--quality-drop", help="Quality that may be lost: 1% or 0.01. Default: 1%.")]
Runtime = Annotated[str | None, typer.Option("--runtime", help="Only this runtime. Default: every one the device has is weighed.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: 1.")]
Draft = Annotated[
    int | None,
    typer.Option(
        "--draft", min=2, help="Let a further program of a sequence model check so many tokens at once, and guess where that pays."
    ),
]
CacheBits = Annotated[
    int | None,
    typer.Option(
        "--cache-bits",
        help="Bits of a sequence model's caches: 32 or 8, with --runtime native also 16 or 4. Default: 32, and fewer where memory forces it or they are predicted to pay.",
    ),
]
Layout = Annotated[str | None, typer.Option("--layout", help="Only this layout of a sequence model. Default: all are weighed.")]

InputLength = Annotated[
    str | None,
    typer.Option(
        "--input-length",
        help="Tokens that a sequence model reads: 512; 64,128,256 (programs for each); 64-512; or a file with a length a line (and how often). Default: the model's own.",
    ),
]
OutputLength = Annotated[
    str | None, typer.Option("--output-length", help="Tokens of one answer, in the same forms. Default: the model's own.")
]
Buckets = Annotated[
    str | None,
    typer.Option(help="Input lengths that programs are made for: 128,512. Default: those of --input-length; for a range, powers of two."),
]


def read_lengths(input_length: str | None, output_length: str | None, buckets: str | None) -> tuple[Lengths | None, Lengths | None]:
    """Lengths read and written, from what people type. Raises `InputError`."""
    from edgesdk.errors import InputError
    from edgesdk.plan.lengths import parse_lengths

    if buckets and not input_length:
        raise InputError(f"--buckets {buckets}: no lengths to put in them", f"give --input-length {buckets}, or the lengths that occur")
    read = parse_lengths(input_length, buckets=buckets) if input_length else None
    return read, parse_lengths(output_length, "--output-length") if output_length else None


def read_cache_bits(bits: int | None) -> Literal[32, 16, 8, 4] | None:
    """What there is of `--cache-bits`. Raises `InputError`."""
    from edgesdk.sequence.sizes import Sizes

    if bits is not None:
        Sizes(cache_bits=bits)
    return bits  # type: ignore[return-value]


def plan(
    model: Model = None,
    device: Device = "host",
    memory: Memory = None,
    latency: Latency = None,
    storage: Storage = None,
    quality_drop: QualityDrop = None,
    energy: Energy = None,
    runtime: Runtime = None,
    threads: Threads = None,
    layout: Layout = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs in one answer, run one after another.")] = 1,
    input_length: InputLength = None,
    output_length: OutputLength = None,
    buckets: Buckets = None,
    draft: Draft = None,
    cache_bits: CacheBits = None,
    sustained: Annotated[
        bool, typer.Option("--sustained", help="Plan with the clocks the device holds for long, where its profile has them.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Build and evaluate every candidate of the front on this host (minutes).")
    ] = False,
    out: Annotated[str | None, typer.Option(help="Write the plan here.")] = None,
    as_json: Json = False,
) -> None:
    """Choose precisions, layout and runtime that fit a device and a budget (exit 1 if nothing does)."""
    from edgesdk.plan import DEFAULT_MODEL
    from edgesdk.plan import plan as make
    from edgesdk.plan.types import Workload

    if model is None:
        say(f"no --model: planning the built-in {DEFAULT_MODEL}")
    budget = read_budget(memory, latency, storage, quality_drop, energy)
    read, written = read_lengths(input_length, output_length, buckets)
    workload = Workload(
        batch=batch, input_length=read, output_length=written, sustained=sustained, draft=draft, cache_bits=read_cache_bits(cache_bits)
    )
    with progress("plan") as step:
        answer = make(
            model or DEFAULT_MODEL,
            device,
            budget=budget,
            workload=workload,
            runtime=runtime,
            threads=threads,
            layout=layout,
            verify=verify,
            step=step,
        )
    if out:
        answer.save(out)
        say(f"wrote {out}")
    if as_json:
        emit_json(answer)
    else:
        show(answer, out)
    if not answer.fits:
        raise typer.Exit(1)


def show(plan: Plan, out: str | None = None) -> None:
    """The plan as tables for people."""
    from rich.table import Table

    from edgesdk.units import show_bytes, show_seconds

    screen = console()
    head = f"{plan.model_name} ({plan.layout}) on {plan.device}: {plan.runtime}, {plan.unit}, {plan.threads} thread{'s' if plan.threads > 1 else ''}"
    screen.print(head if plan.fits else f"[red]Nothing fits.[/] The nearest plan: {head}", style="bold")
    table = Table(box=None, header_style="dim")
    for column in ("unit", "op", "precision", "weights", "a call", "80% interval", "bound by"):
        table.add_column(column, no_wrap=column == "unit")
    table.add_column("why", ratio=1)
    for u in [u for u in plan.units if u.weight_bytes or u.op in ("attention", "matmul")][:40]:
        name = u.unit if len(plan.method_latency) == 1 else f"{u.method}: {u.unit}"
        span = f"{show_seconds(u.latency.low)} … {show_seconds(u.latency.high)}"
        table.add_row(name, u.op, u.precision, show_bytes(u.weight_bytes), show_seconds(u.latency.value), span, u.bound, u.why)
    screen.print(table)
    screen.print(f"[dim]{len(plan.units)} units in all; --json has every one[/]")
    for method, e in plan.method_latency.items():
        screen.print(f"  {method:<10} {show_seconds(e.value):>9} a call, predicted ({show_seconds(e.low)} … {show_seconds(e.high)})")
    lost = "" if plan.quality_drop is None else f", quality −{plan.quality_drop:.2%} predicted"
    screen.print(
        f"  whole      {show_seconds(plan.latency.value):>9}, memory {show_bytes(plan.memory.peak_bytes)}, stored {show_bytes(plan.storage_bytes)}{lost}"
    )
    _answers(plan)
    _budgets(plan)
    _front(plan)
    for reason in plan.reasons:
        screen.print(f"  · {reason}")
    for warning in plan.warnings:
        screen.print(f"  [yellow]! {warning}[/]")
    screen.print(f"  solver: {plan.proof.name}, gap {plan.proof.gap:.2g}, {plan.proof.seconds * 1e3:.0f} ms")
    if plan.fits:
        screen.print(f"next: edgesdk build {out or 'plan.json'}" + ("" if out else "   (write the plan with --out plan.json)"))


def _answers(plan: Plan) -> None:
    """Of a sequence model: the lengths of its programs, and what answers of the workload's lengths take."""
    from edgesdk.units import show_seconds

    if (a := plan.answers) is None:
        return
    read, written = plan.workload.read, plan.workload.written
    asked = ", ".join(f"{n} tokens {verb}" for n, verb in ((read, "read"), (written, "written")) if n is not None)
    console().print(f"  {shown_sizes(a)}" + (f"; planned for {asked}" if asked else ""))
    for name, s in (("first token", a.first_token), ("answer", a.whole)):
        many = f", median {show_seconds(s.p50)}, 9 of 10 below {show_seconds(s.p90)}" if s.p50 != s.p90 else ""
        console().print(f"  {name} {show_seconds(s.mean.value)} expected{many}")
    console().print(f"  each further token {show_seconds(a.per_token.value)}")


def shown_sizes(answers: Answers) -> str:
    inputs, caches = (", ".join(map(str, sizes)) for sizes in (answers.inputs, answers.caches))
    return f"programs for inputs of {inputs} tokens, caches of {caches}"


def _front(plan: Plan) -> None:
    from rich.table import Table

    from edgesdk.units import show_bytes, show_seconds

    if len(plan.front) < 2:
        return
    table = Table(
        box=None, header_style="dim", title="the front: no other choice is both faster and smaller", title_justify="left", title_style="dim"
    )
    verified = any(c.built for c in plan.front)
    for column in (
        "layout",
        "runtime",
        "whole",
        "memory",
        "stored",
        "quality lost",
        "units",
        *(("built: program", "quality") if verified else ()),
    ):
        table.add_column(column)
    for c in plan.front:
        kinds = ", ".join(f"{n} {p}" for p, n in sorted(c.precisions.items()))
        row = [c.layout, c.runtime, show_seconds(c.latency.value), show_bytes(c.memory_bytes), show_bytes(c.storage_bytes)]
        row += ["unknown" if c.quality_drop is None else f"{c.quality_drop:.2%}", kinds]
        if c.built:
            row += [c.built.refused] if c.built.refused else [show_bytes(c.built.program_bytes or 0)]
            row += ["" if c.built.quality is None else f"{c.built.quality:.2%}"]
        table.add_row(*row)
    console().print(table)


def _budgets(plan: Plan) -> None:
    from edgesdk.units import show_amount

    for check in plan.checks:
        name = {"harm": "quality drop"}.get(check.name, check.name)
        mark = "[green]fits[/]" if check.fits else f"[red]needs {check.reached / check.limit:.2f}x[/]"
        console().print(f"  budget {name}: {show_amount(check.name, check.reached)} of {show_amount(check.name, check.limit)} {mark}")
    if not plan.fits:
        worst = plan.checks[0]
        console().print(f"  binding: {worst.name}; raise it {worst.reached / worst.limit:.2f}x and the plan above fits")


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)
