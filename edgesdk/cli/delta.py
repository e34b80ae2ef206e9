"""The verb `delta`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgesdk.cli.common import Json, console, emit_json, progress

if TYPE_CHECKING:
    from edgesdk.compress.delta_bundle import Delta
    from edgesdk.compress.pipeline import Compression

Out = Annotated[str | None, typer.Option(help="The file to write.", show_default="TUNED.edgec, TUNED.edged or DELTA.edge")]


def make(
    base: Annotated[str, typer.Argument(help="The base: a model as --model takes it, or a built bundle.")],
    tuned: Annotated[str, typer.Argument(help="What was fine-tuned from it: a model, or the bundle built of it for the same runtime.")],
    how: Annotated[str | None, typer.Option("--how", help="Of models: lowrank, dare or mask.", show_default="lowrank")] = None,
    bits: Annotated[
        float | None, typer.Option("--bits", help="Of models, lowrank: bits a weight for all differences together.", show_default="2")
    ] = None,
    factors: Annotated[
        int | None, typer.Option("--factors", help="Of models, lowrank: bits of the factors, 4, 6, 8 or 16.", show_default="4")
    ] = None,
    drop: Annotated[
        float | None, typer.Option("--drop", help="Of models, dare: the share of the differences that is dropped.", show_default="0.9")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Of bundles: the .edgec that TUNED was built of; its weights are then stored as it stores them."),
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Store a fine-tuned model, or its bundle, as a small difference to a base that is there already (exit 1 if it would not be smaller)."""
    from edgesdk.errors import InputError

    settings = {k: v for k, v in (("how", how), ("bits", bits), ("factors", factors), ("drop", drop)) if v is not None}
    bundles = [_is_bundle(path) for path in (base, tuned)]
    if bundles[0] != bundles[1]:
        raise InputError(f"{base} and {tuned} are of two kinds", "give two models, or two built bundles")
    if bundles[0]:
        if settings:
            raise InputError(
                f"--{next(iter(settings))} is for models, {base} is a bundle", "make the .edgec with it, build that, then give --model"
            )
        _make_bundle(base, tuned, model, out or f"{Path(tuned).stem}.edged", as_json)
    else:
        if model is not None:
            raise InputError(f"--model is for bundles, {base} is a model", "leave it out")
        _make_model(base, tuned, settings, out or f"{_stem(tuned)}-delta.edgec", as_json)


def _is_bundle(path: str) -> bool:
    from edgesdk.bundles import member_names
    from edgesdk.errors import InputError

    if not Path(path).is_file():
        return False
    try:
        return "manifest.json" in member_names(path)
    except InputError:
        return False


def _stem(ref: str) -> str:
    return Path(ref.rpartition(":")[2] if ref.startswith("example:") else ref.partition(":")[0]).stem


def _make_model(base: str, tuned: str, settings: dict[str, Any], out: str, as_json: bool) -> None:
    from pydantic import ValidationError

    from edgesdk.compress.delta import DeltaConfig, delta
    from edgesdk.errors import InputError
    from edgesdk.intake import load_model
    from edgesdk.noun import describe

    try:
        config = DeltaConfig.model_validate(settings)
    except ValidationError as error:
        raise InputError(*describe(error, "delta")) from None
    with progress("delta") as step:
        made = delta(load_model(base), load_model(tuned), config, ref=base, step=step)
        made.save(out)
    if as_json:
        emit_json(made.report)
    else:
        _show_model(made.report, out)


def _show_model(report: Compression, out: str) -> None:
    from edgesdk.units import show_bytes

    screen = console()
    whole = show_bytes(report.float_bytes)
    screen.print(
        f"{report.model}: weights {whole} → {show_bytes(report.weight_bytes)} over {report.base}, {report.bits:.2f} bits each", style="bold"
    )
    if report.quality is not None and report.quality_before is not None:
        screen.print(f"quality {report.quality_before:.2%} → {report.quality:.2%} on held-out data of the fine-tuned model")
    screen.print(f"wrote {out} ({show_bytes(Path(out).stat().st_size)}); next: edgesdk plan --model {out}")


def _make_bundle(base: str, tuned: str, model: str | None, out: str, as_json: bool) -> None:
    from edgesdk.compress.delta_bundle import make as verb
    from edgesdk.compress.saved import load
    from edgesdk.units import show_bytes

    with progress("delta") as step:
        step("comparing the programs", 0.1)
        about = verb(base, tuned, out, load(model) if model is not None else None)
    if as_json:
        emit_json(about)
        return
    size = Path(out).stat().st_size
    screen = console()
    screen.print(f"{about.model_name}: {show_bytes(about.whole_bytes)} → {show_bytes(size)} over {about.base_model}", style="bold")
    screen.print(f"  program   {show_bytes(about.program_bytes)}, {about.weights} weights by their own codes, the rest byte by byte")
    screen.print(f"  base      {about.base_digest[:12]}, stays on the device")
    screen.print(f"wrote {out}; next: edgesdk delta apply {base} {out}")


def apply(
    base: Annotated[str, typer.Argument(help="The bundle that the package was made over.")],
    package: Annotated[str, typer.Argument(help="What `edgesdk delta make` wrote of two bundles.")],
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Put a package and its base bundle together again: a bundle that every verb takes; `flash` then sends what the device lacks."""
    from edgesdk.compress.delta_bundle import apply as verb
    from edgesdk.errors import InputError

    if package.endswith(".edgec"):
        raise InputError(f"{package}: is a model, not a package of a bundle", f"it names its base itself: edgesdk plan --model {package}")
    target = out or f"{Path(package).stem}.edge"
    about = verb(base, package, target)
    if as_json:
        emit_json(about)
    else:
        _show_applied(about, target)


def _show_applied(about: Delta, out: str) -> None:
    console().print(f"wrote {out}: {about.model_name}, bundle {about.bundle_digest[:12]}; next: edgesdk flash {out}")


def register(app: typer.Typer) -> None:
    delta = typer.Typer(help="Fine-tuned models as small packages over one base.", no_args_is_help=True)
    delta.command("make")(make)
    delta.command("apply")(apply)
    app.add_typer(delta, name="delta")
