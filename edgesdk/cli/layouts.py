"""The verb `layouts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, say

if TYPE_CHECKING:
    from edgesdk.layouts import LayoutTable

DEFAULT_MODEL = "example:normalizer"


def layouts(
    model: Annotated[str, typer.Option(help="A sequence model that names its alternatives.")] = DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="A device name, an alias or a TOML file.")] = "jetson",
    memory: Annotated[str | None, typer.Option(help="What a plan may take, like 512MB.")] = None,
    as_json: Json = False,
) -> None:
    """Compare encoder-decoder, decoder-only and other layouts of one task on a device."""
    from edgesdk.layouts import layouts as compare
    from edgesdk.plan.types import Budget
    from edgesdk.units import parse_bytes

    say(f"planning every layout of {model} for {device}")
    table = compare(model, device, budget=Budget(memory_bytes=parse_bytes(memory) if memory else None))
    if as_json:
        emit_json(table)
    else:
        _show(table)


def _show(answer: LayoutTable) -> None:
    from rich.table import Table

    from edgesdk.units import show_bytes, show_seconds

    table = Table(title=f"layouts on {answer.device}, predicted", box=None)
    for column in ("layout", "model", "runtime", "first token", "per token", "whole answer", "80% interval", "memory", "stored", "quality"):
        table.add_column(column)
    for r in answer.rows:
        span = f"{show_seconds(r.whole_answer.low)} … {show_seconds(r.whole_answer.high)}"
        quality = "–" if r.quality is None else f"{r.quality:.2%}"
        token = show_seconds(r.per_token.value) if r.per_token else "–"
        memory = show_bytes(r.memory_bytes) + ("" if r.fits else " [red]does not fit[/]")
        table.add_row(
            r.layout, r.model, r.runtime, show_seconds(r.first_token.value), token, show_seconds(r.whole_answer.value), span,
            memory, show_bytes(r.storage_bytes), quality,
        )  # fmt: skip
    console().print(table)


def register(app: typer.Typer) -> None:
    app.command("layouts")(layouts)
