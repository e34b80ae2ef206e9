"""The verb `adapt`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, progress


def adapt(
    model: Annotated[
        str, typer.Argument(help="A sequence model: a .edgeseq file, an example:NAME of one, or a Hugging Face folder or id.")
    ],
    encoder_layers: Annotated[int | None, typer.Option("--encoder-layers", min=1, help="Layers of the encoder. Default: all.")] = None,
    decoder_layers: Annotated[int | None, typer.Option("--decoder-layers", min=1, help="Layers of the decoder. Default: all.")] = None,
    cross: Annotated[
        str, typer.Option("--cross", help="What cross-attention begins with: self (copied from self-attention) or new.")
    ] = "self",
    encoder_from: Annotated[
        str | None, typer.Option("--encoder-from", help="Another model, which the encoder is made of. Default: the same.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Write the model here (.edgeseq): every --model takes it, `edgesdk teach` trains it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an encoder-decoder of a decoder-only model's weights, or a smaller encoder-decoder of a larger one's."""
    from edgesdk.sequence.saved import adapt_saved

    with progress("adapt") as step:
        report = adapt_saved(
            model, out, encoder_layers=encoder_layers, decoder_layers=decoder_layers, cross=cross, encoder_from=encoder_from, step=step
        )
    if as_json:
        emit_json(report)
        return
    screen = console()
    for name, layers in report.layers.items():
        screen.print(f"{name}: {len(layers)} layers, from layers {', '.join(map(str, layers))}")
    screen.print(f"{report.parameters:,} weights, {report.copied:,} copied, {report.new:,} new", style="bold")
    screen.print(
        f"wrote {out}; next: edgesdk teach {out} --pairs FILE.jsonl" if out else "nothing was written: give --out FILE.edgeseq to keep it"
    )


def register(app: typer.Typer) -> None:
    app.command("adapt")(adapt)
