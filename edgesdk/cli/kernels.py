"""The verb `kernels`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json


def kernels(
    every: Annotated[bool, typer.Option("--every", help="Those of all targets, not only of this machine's best.")] = False,
    as_json: Json = False,
) -> None:
    """Our own kernels, which `--runtime native` and native-cuda are made of: what each computes, for which CPUs and GPUs, and how far it may be
    from its reference."""
    from rich.table import Table

    from edgesdk.kernels.cpu import host_targets
    from edgesdk.kernels.cuda.registry import kernels as of_gpus
    from edgesdk.kernels.registry import kernels as of_cpus

    best = host_targets()[0]
    found = [k for k in (*of_cpus(), *of_gpus()) if every or best in k.targets]
    if as_json:
        rows = [
            {"name": k.name, "operation": k.operation, "format": k.format, "targets": k.targets, "made": k.made, "tolerance": k.tolerance}
            for k in found
        ]
        emit_json({"kind": "kernels", "schema_version": 1, "host_targets": host_targets(), "kernels": rows})
        return
    table = Table(box=None, header_style="dim")
    for column in ("kernel", "computes", "on", "made of", *(["for"] if every else []), "tolerance"):
        table.add_column(column)
    for k in found:
        table.add_row(k.name, k.operation, k.format, k.made, *([", ".join(k.targets)] if every else []), f"{k.tolerance:.1e}")
    console().print(table)
    console().print(f"this machine runs kernels for {', '.join(host_targets())}")


def register(app: typer.Typer) -> None:
    app.command("kernels")(kernels)
