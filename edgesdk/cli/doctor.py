"""The verb `doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from edgesdk.cli.common import Json, console, emit_json

if TYPE_CHECKING:
    from edgesdk.doctor import Finding

_MARK = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "wrong": "[red]wrong[/]", "optional": "[yellow]absent[/]"}


def doctor(as_json: Json = False) -> None:
    """Tell what is installed, what is missing and the command that fixes it (exit 1 if something needed is)."""
    from edgesdk import doctor as core

    findings = core.doctor()
    if as_json:
        emit_json(core.to_dict(findings))
    else:
        _show(findings)
    if not core.healthy(findings):
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    from rich.table import Table

    table = Table("", "what", "found", "for", "to change it", box=None)
    for f in findings:
        table.add_row(_MARK[f.state], f.name, f.found, f.need, f.fix)
    console().print(table)


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)
