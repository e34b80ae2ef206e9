"""The verb `build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, progress
from edgesdk.cli.plan import (
    Buckets,
    CacheBits,
    Device,
    Draft,
    Energy,
    InputLength,
    Latency,
    Layout,
    Memory,
    Model,
    OutputLength,
    QualityDrop,
    Runtime,
    Storage,
    Threads,
    read_budget,
    read_cache_bits,
    read_lengths,
    shown_sizes,
)

if TYPE_CHECKING:
    from edgesdk.bundle import Manifest
    from edgesdk.plan.types import Plan


def build(
    plan_file: Annotated[
        str | None, typer.Argument(metavar="[PLAN.JSON]", help="A saved plan; without it, --model is planned first.")
    ] = None,
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
    input_length: InputLength = None,
    output_length: OutputLength = None,
    buckets: Buckets = None,
    draft: Draft = None,
    cache_bits: CacheBits = None,
    out: Annotated[str | None, typer.Option(help="The bundle to write. Default: MODEL-DEVICE.edge.")] = None,
    sign: Annotated[str, typer.Option("--sign", help="Your key that signs it (see `edgesdk keys`); `none` for no signature.")] = "default",
    as_json: Json = False,
) -> None:
    """Lower a plan to a program, check it against the reference, and pack one bundle (exit 1 if the program is wrong)."""
    from edgesdk.bundles import bundle_digest, read_manifest
    from edgesdk.errors import DoesNotFit, InputError
    from edgesdk.intake import load_model
    from edgesdk.lower import build as make
    from edgesdk.plan import DEFAULT_MODEL, Plan, Workload
    from edgesdk.plan import plan as make_plan
    from edgesdk.signing import own_key

    if plan_file is not None and model is not None:
        raise InputError("a plan and --model were both given", "give one of them; a plan names its model")
    with progress("build") as step:
        if plan_file is not None:
            plan = Plan.load(plan_file)
        else:
            budget = read_budget(memory, latency, storage, quality_drop, energy)
            read, written = read_lengths(input_length, output_length, buckets)
            workload = Workload(input_length=read, output_length=written, draft=draft, cache_bits=read_cache_bits(cache_bits))
            plan = make_plan(
                model or DEFAULT_MODEL, device, budget=budget, workload=workload, runtime=runtime, threads=threads, layout=layout, step=step
            )
        if not plan.fits:
            worst = plan.checks[0]
            raise DoesNotFit(
                f"the plan does not fit: {worst.name} needs {worst.reached / worst.limit:.2f}x its limit", "raise that limit and plan again"
            )
        key = None if sign == "none" else own_key(sign).name
        target = Path(out or f"{plan.model_name}-{plan.device}.edge")
        path = make(plan, load_model(plan.model, plan.workload.sizes), target, step=step, key=key)
    manifest = read_manifest(path)
    if as_json:
        emit_json(
            {
                "kind": "build",
                "schema_version": 1,
                "path": str(path),
                "digest": bundle_digest(path),
                "manifest": manifest.model_dump(mode="json"),
            }
        )
    else:
        _show(path, plan, manifest)


def _show(path: Path, plan: Plan, manifest: Manifest) -> None:
    from edgesdk.units import show_bytes

    screen = console()
    program = next(m.size_bytes for m in manifest.members if m.name == manifest.program)
    screen.print(f"{path}: {manifest.model_name} for {manifest.device}, {manifest.runtime} {manifest.runtime_version}", style="bold")
    screen.print(
        f"  program {show_bytes(program)} (weights planned: {show_bytes(plan.storage_bytes)}), bundle {show_bytes(path.stat().st_size)}"
    )
    if plan.answers:
        screen.print(f"  {shown_sizes(plan.answers)}")
    for method, error in manifest.host_check.items():
        screen.print(f"  {method}: relative error {error:.2g} against the reference on this host")
    if not manifest.host_check:
        screen.print(f"  [yellow]not run on this host: {manifest.runtime} is checked on the device only[/]")
    if manifest.quality is not None:
        before = f" (reference {plan.quality:.2%})" if plan.quality is not None else ""
        screen.print(f"  quality of the built program: {manifest.quality:.2%}{before}")
        predicted = plan.quality - (plan.quality_drop or 0.0) if plan.quality is not None else None
        if predicted is not None and manifest.quality < predicted - 0.01:
            screen.print(f"  [yellow]that is {predicted - manifest.quality:.2%} less than planned: plan --verify measures candidates[/]")
    micro = manifest.runtime in ("tflite-micro", "executorch-ethos-u")
    link = "--to esp32:/dev/ttyUSB0   (or --to uf2:…; see edgesdk devices ports)" if micro else "--on local   (or --on ssh://user@host)"
    screen.print(f"next: edgesdk flash {path} {link}", markup=False)


def register(app: typer.Typer) -> None:
    app.command("build")(build)
