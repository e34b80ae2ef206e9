"""The verb `teach`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, progress


def teach(
    model: Annotated[
        str, typer.Argument(help="A sequence model: a .edgeseq file, an example:NAME of one, or a Hugging Face folder or id.")
    ],
    pairs: Annotated[str, typer.Option("--pairs", help='Lines of {"source": …, "target": …}, each text or a list of token ids (.jsonl).')],
    out: Annotated[str, typer.Option(help="Write the trained model here (.edgeseq).")],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="A model of the same tokens that it learns from as well, of any layout.")
    ] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Train on what the teacher answers to the sources, not on the targets.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pairs in a step.")] = 64,
    rate: Annotated[
        float, typer.Option("--rate", help="A step, as a share of a weight's size: 0.03 from nothing, 0.01 for an adapted model.")
    ] = 0.01,
    features: Annotated[str, typer.Option("--features", help="Compare hidden states with the teacher's: none, mse or cka.")] = "none",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of the pairs.")] = 0,
    device: Annotated[str, typer.Option("--on", help="Where PyTorch trains: cpu, cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Train a sequence model on pairs, from labels and a teacher; a run that was cut off goes on where it was."""
    from edgesdk.sequence.saved import teach_saved

    asked = {"steps": steps, "batch": batch, "rate": rate, "features": features, "seed": seed, "device": device}
    with progress("teach") as step:
        report = teach_saved(model, pairs, out, teacher=teacher, answers=answers, settings=asked, step=step)
    if as_json:
        emit_json(report)
        return
    screen = console()
    screen.print(f"loss on {report['held']} pairs held out: {report['before']:.4g} → {report['after']:.4g}", style="bold")
    if report["kept_before"]:
        screen.print("training did not help: what was there before is kept")
    screen.print(f"wrote {out}; next: edgesdk plan --model {out}")


def register(app: typer.Typer) -> None:
    app.command("teach")(teach)
