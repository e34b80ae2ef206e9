"""The verb `layouts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, progress, say
from edgesdk.cli.plan import Buckets, CacheBits, read_cache_bits, read_lengths

if TYPE_CHECKING:
    from edgesdk.layouts import LayoutTable
    from edgesdk.sequence.estimate import Weights
    from edgesdk.sequence.search import LayoutSearch, ShapeRow

_TRAINED = "A trained model that names its alternatives (example:normalizer): these are planned, nothing is sized."


def layouts(
    parameters: Annotated[
        str | None, typer.Option(help="What every layout is sized to: 330M. Default: what fits --memory, else 330M.")
    ] = None,
    device: Annotated[str, typer.Option(help="A device name, an alias, a TOML file, or host.")] = "jetson",
    input_length: Annotated[
        str | None,
        typer.Option(
            "--input-length", help="Tokens read: 512; 64,128,256; 64-512; or a file with a length a line (and how often). Default: 512."
        ),
    ] = None,
    output_length: Annotated[str | None, typer.Option("--output-length", help="Tokens written, in the same forms. Default: 32.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts answered at once.")] = 1,
    memory: Annotated[str | None, typer.Option(help="All a model may take, its runtime included: 1GB.")] = None,
    weights: Annotated[str, typer.Option(help="What matrices are held in: fp32, int8 or int4.")] = "int8",
    cache_bits: CacheBits = None,
    dim: Annotated[int | None, typer.Option(min=64, help="Width. Default: in proportion to the parameters.")] = None,
    vocab: Annotated[int, typer.Option(min=2, help="Entries of the vocabulary.")] = 32128,
    config: Annotated[
        str | None,
        typer.Option(help="Whose widths and heads to take: a sequence-config JSON, a .edgeseq file, a Hugging Face folder or id."),
    ] = None,
    buckets: Buckets = None,
    runtime: Annotated[str | None, typer.Option(help="Only this runtime. Default: the fastest one for each layout.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: the target's.")] = None,
    model: Annotated[str | None, typer.Option(help=_TRAINED)] = None,
    place: Annotated[bool, typer.Option("--place", help="Also cost encoder and decoder on different units of the device.")] = False,
    helper: Annotated[str | None, typer.Option(help="And the encoder on this device, over a link.")] = None,
    link_rate: Annotated[str, typer.Option(help="What the link carries a second: 100Mbit, 12MB.")] = "100Mbit",
    link_latency: Annotated[str, typer.Option(help="The link's delay, one way.")] = "2ms",
    link_bits: Annotated[int, typer.Option(min=2, max=32, help="Bits of a value on the link.")] = 8,
    plot: Annotated[str | None, typer.Option(help="Draw time over input length into this file (.png, .svg, .pdf).")] = None,
    as_json: Json = False,
) -> None:
    """Compare decoder-only, encoder-decoder, CTC and other layouts of equal size on a device, over input and output lengths."""
    from edgesdk.layouts import layouts as compare
    from edgesdk.plan.types import Budget, Workload
    from edgesdk.units import parse_bytes, parse_rate, parse_seconds

    limit, bits = parse_bytes(memory) if memory else None, read_cache_bits(cache_bits)
    if model is not None:
        read, written = read_lengths(input_length, output_length, buckets)
        _refuse_with_model(parameters=parameters, dim=dim, config=config, plot=plot, place=place or None, helper=helper)
        say(f"planning every layout of {model} for {device}")
        table = compare(
            model,
            device,
            budget=Budget(memory_bytes=limit),
            workload=Workload(batch=batch, input_length=read, output_length=written, cache_bits=bits),
        )
        _trained(table) if not as_json else emit_json(table)
        return
    from edgesdk.sequence.placement import Link
    from edgesdk.sequence.search import placed, search
    from edgesdk.sequence.shapes import base_of

    texts, answers = read_lengths(input_length or "512", output_length or "32", buckets)
    assert texts and answers
    with progress("layouts") as step:
        answer = search(
            device, parameters=_count(parameters) if parameters else None, memory=limit, base=base_of(config) if config else None, dim=dim, vocab=vocab,
            input_length=texts, output_length=answers, batch=batch, weights=_weights(weights), runtime=runtime, threads=threads, cache_bits=bits or 32, step=step,
        )  # fmt: skip
    if place or helper:
        link = Link(bytes_per_s=parse_rate(link_rate), latency_s=parse_seconds(link_latency), bits=link_bits) if helper else None
        answer = placed(answer, helper, link)
    if plot:
        from edgesdk.sequence.plot import draw

        say(f"wrote {draw(answer, plot)}")
    emit_json(answer) if as_json else _show(answer)
    if not answer.best.fits:
        raise typer.Exit(1)


def _refuse_with_model(**given: object) -> None:
    from edgesdk.errors import InputError

    for name, value in given.items():
        if value is not None:
            raise InputError(f"--{name} with --model: a trained model has its size", f"leave --{name} out, or --model")


def _count(text: str) -> int:
    """`330M` → 330000000. Raises `InputError`."""
    import re

    from edgesdk.errors import InputError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGB]?)\s*", text)
    value = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[match[2]] if match else 0.0
    if value < 1:
        raise InputError(f"--parameters {text}: not a number of parameters", "write it like 330M or 1.3B")
    return round(value)


def _weights(text: str) -> Weights:
    from edgesdk.errors import select_by_name

    known: dict[str, Weights] = {"fp32": "fp32", "int8": "int8", "int4": "int4"}
    return select_by_name("weights", text, known)


def _trained(answer: LayoutTable) -> None:
    from rich.table import Table

    from edgesdk.units import show_bytes, show_seconds

    table = Table(title=f"layouts on {answer.device}, predicted", box=None)
    spread = any(r.whole_p50 != r.whole_p90 for r in answer.rows)
    many = ("median", "9 of 10 below") if spread else ()
    for column in (
        "layout",
        "model",
        "runtime",
        "first token",
        "per token",
        "answer",
        "80% interval",
        *many,
        "memory",
        "stored",
        "quality",
    ):
        table.add_column(column)
    for r in answer.rows:
        span = f"{show_seconds(r.whole_answer.low)} … {show_seconds(r.whole_answer.high)}"
        quality = "–" if r.quality is None else f"{r.quality:.2%}"
        token = show_seconds(r.per_token.value) if r.per_token else "–"
        memory = show_bytes(r.memory_bytes) + ("" if r.fits else " [red]does not fit[/]")
        table.add_row(
            r.layout, r.model, r.runtime, show_seconds(r.first_token.value), token, show_seconds(r.whole_answer.value), span,
            *((show_seconds(r.whole_p50), show_seconds(r.whole_p90)) if spread else ()), memory, show_bytes(r.storage_bytes), quality,
        )  # fmt: skip
    console().print(table)


def _show(answer: LayoutSearch) -> None:
    from rich.table import Table

    screen = console()
    lengths = f"{answer.input_length} tokens read, {answer.output_length} written, batch {answer.batch}"
    threads = f"{answer.threads} thread{'s' if answer.threads > 1 else ''}"
    power = f", {answer.power_mode}" if answer.power_mode else ""
    screen.print(f"[bold]{answer.device}[/] ({threads}{power}), {answer.weights} weights: {lengths}. All figures are predicted.")
    spread = not (answer.input_length.is_point and answer.output_length.is_point)
    times = Table(box=None, header_style="dim")
    for column in ("layout", "encoder", "decoder", "param.", "runtime", "first token", "per token", "answer", "80% interval"):
        times.add_column(column, no_wrap=True)
    for column in ("median", "9 of 10 below") if spread else ():
        times.add_column(column)
    times.add_column("tokens/s")
    room = Table(box=None, header_style="dim")
    for column in ("layout", "GFLOP", "weights", "self cache", "cross cache", "peak memory", "energy", "published quality"):
        room.add_column(column, no_wrap=column == "layout")
    for row in answer.rows:
        times.add_row(*_times(row, spread))
        room.add_row(*_room(row))
    screen.print(times)
    screen.print()
    screen.print(room)
    screen.print()
    if answer.placements:
        _places(answer)
    for c in answer.crossovers:
        unit, held = ("read", "written") if c.over == "input" else ("written", "read")
        lead = ", and leads" if c.leads else ""
        screen.print(f"  {c.metric}: from {c.at} tokens {unit} ({c.fixed} {held}) {c.by} overtakes {c.of}{lead}")
    for note in answer.notes:
        screen.print(f"  {note}", style="dim")


def _places(answer: LayoutSearch) -> None:
    """Each layout's best places, and for the fastest layout all that are worth a look."""
    from rich.table import Table

    from edgesdk.units import show_bytes, show_seconds

    table = Table(box=None, header_style="dim")
    for column in ("layout", "encoder", "decoder", "first token", "per token", "answer", "handed over", "in", "weights here"):
        table.add_column(column, no_wrap=True)
    best = answer.placements[0]
    for name, r in [*((best.layout, r) for r in best.rows[:6]), *((t.layout, t.rows[0]) for t in answer.placements[1:])]:
        over = (show_bytes(r.over_bytes), show_seconds(r.over_s)) if r.over_bytes else ("–", "–")
        table.add_row(
            name, r.encoder, r.decoder, show_seconds(r.first_token.value), show_seconds(r.per_token.value), show_seconds(r.answer.value), *over,
            show_bytes(r.weight_bytes),
        )  # fmt: skip
    console().print(table)
    console().print()


def _times(row: ShapeRow, spread: bool) -> list[str]:
    from edgesdk.units import show_seconds

    e, d, c = row.config.encoder, row.config.decoder, row.cost
    head = [row.layout, f"{e.layers} x {e.dim}" if e else "–", f"{d.layers} x {d.dim}" if d else "–", f"{row.parameters / 1e6:.4g}M"]
    if c is None:
        return [*head, f"[red]{row.refused}[/]"]
    whole = c.answer
    middle = [show_seconds(whole.p50), show_seconds(whole.p90)] if spread else []
    return [
        *head, row.runtime or "", show_seconds(c.first_token.mean.value), show_seconds(c.per_token.value) if c.per_token else "–",
        show_seconds(whole.mean.value), f"{show_seconds(whole.mean.low)} … {show_seconds(whole.mean.high)}", *middle, f"{c.tokens_per_s.value:.3g}",
    ]  # fmt: skip


def _room(row: ShapeRow) -> list[str]:
    from edgesdk.units import show_bytes

    c = row.cost
    if c is None:
        return [row.layout]
    peak = show_bytes(c.memory.peak_bytes) + ("" if row.fits else " [red]does not fit[/]")
    energy = f"{c.energy_j.value:.3g} J" if c.energy_j else "–"
    sizes = [show_bytes(n) for n in (c.weight_bytes, c.self_cache_bytes, c.cross_cache_bytes)]
    return [row.layout, f"{c.flops / 1e9:.4g}", *sizes, peak, energy, row.evidence or "none known"]


def register(app: typer.Typer) -> None:
    app.command("layouts")(layouts)
