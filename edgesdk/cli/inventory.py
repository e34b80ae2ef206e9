"""The verb `inventory`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json

if TYPE_CHECKING:
    from edgesdk.inventory import Inventory

app = typer.Typer(help="Your devices by name, tag and group, as `--on` takes them.", no_args_is_help=True)


@app.command("list")
def list_all(
    on: Annotated[str, typer.Argument(help="Only these: a name, group:NAME, tag:NAME, several with commas.")] = "group:all",
    as_json: Json = False,
) -> None:
    """Every device with its link, profile and tags; groups with their members."""
    from rich.table import Table

    from edgesdk.inventory import chosen

    inventory, entries = _there(), chosen(on)
    groups = {g: [d.name for d in inventory.select(f"group:{g}")] for g in inventory.groups}
    if as_json:
        devices = [{"name": e.name, "link": e.link, "device": e.device, "tags": list(e.tags)} for e in entries]
        emit_json({"kind": "inventory", "schema_version": 1, "file": inventory.path, "devices": devices, "groups": groups})
        return
    table = Table(box=None, header_style="dim")
    for column in ("device", "link", "profile", "tags", "groups"):
        table.add_column(column, overflow="fold")
    for e in entries:
        table.add_row(
            e.name,
            e.link or "by broker only",
            e.device or "",
            " ".join(e.tags),
            " ".join(g for g, names in groups.items() if e.name in names),
        )
    console().print(table)
    for group, names in groups.items():
        console().print(f"group:{group}: {len(names)} devices", emoji=False)


@app.command("check")
def check(as_json: Json = False) -> None:
    """Check the file; every mistake is told by file and field (exit 2)."""
    inventory = _there()
    counts = {"devices": len(inventory.devices), "groups": len(inventory.groups), "tags": len(inventory.tags())}
    if as_json:
        emit_json({"kind": "inventory-check", "schema_version": 1, "file": inventory.path, "ok": True, **counts})
    else:
        console().print(f"{inventory.path}: right; " + ", ".join(f"{n} {what}" for what, n in counts.items()))


def _there() -> Inventory:
    from edgesdk.errors import InputError
    from edgesdk.inventory import FILE, load_inventory

    inventory = load_inventory()
    if inventory.path is None:
        raise InputError(
            f"no inventory: {FILE} is not in this folder", "give one: --inventory FILE (docs/fleets.md shows how it is written)"
        )
    return inventory


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="inventory")
