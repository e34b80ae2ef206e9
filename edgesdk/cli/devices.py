"""The verb `devices`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json

if TYPE_CHECKING:
    from edgesdk.device import DeviceProfile

app = typer.Typer(help="Devices that edgesdk knows, and checking your own.", no_args_is_help=True)


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """Every device, with its aliases, units and runtimes."""
    from rich.table import Table

    from edgesdk.devices import list_devices
    from edgesdk.units import show_bytes

    found = list_devices()
    if as_json:
        emit_json({"kind": "devices", "schema_version": 1, "devices": [d.model_dump(mode="json") for d in found]})
        return
    table = Table(box=None, header_style="dim")
    for column in ("name", "aliases", "variants", "memory", "bandwidth", "units", "runtimes"):
        table.add_column(column)
    for d in found:
        units = ", ".join(f"{u.core} x{u.cores}" for u in d.units)
        names = ", ".join(d.aliases), ", ".join(v.suffix for v in d.variants)
        table.add_row(
            d.name,
            *names,
            show_bytes(d.memory.size_bytes),
            f"{d.memory.bandwidth_bytes_per_s / 1e9:.4g} GB/s",
            units,
            ", ".join(r.name for r in d.runtimes),
        )
    console().print(table)
    console().print("and host: this machine, detected live")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="A name, an alias, a variant, a TOML file, or host.")], as_json: Json = False) -> None:
    """Every number of a device with its source, and how many of them no source confirms."""
    from edgesdk.devices import figures, load_device, not_confirmed

    device = load_device(name)
    if as_json:
        open_ones = not_confirmed(device)
        emit_json({**json.loads(device.to_json()), "figures": {"total": len(figures(device)), "not_confirmed": open_ones}})
    else:
        _print(device)


def _print(device: DeviceProfile) -> None:
    from edgesdk.devices import figures, not_confirmed
    from edgesdk.units import show_bytes

    screen = console()
    screen.print(f"{device.name}: {device.title}", style="bold")
    screen.print(
        f"  {device.family}, {device.arch}, {device.os}; memory {show_bytes(device.memory.size_bytes)}, {device.memory.usable_share:.0%} usable"
    )
    screen.print(f"  bandwidth {device.memory.bandwidth_bytes_per_s / 1e9:.4g} GB/s")
    for u in device.units:
        peaks = ", ".join(f"{k} {v / 1e9:.4g} Gop/s" for k, v in u.peak_ops_per_s.items())
        caches = ", ".join(f"L{c.level} {c.size_bytes // 1024} KiB" for c in u.caches)
        screen.print(
            f"  {u.name}: {u.kind}, {u.core} x{u.cores} at {u.clock_hz / 1e9:.4g} GHz; {peaks}" + (f"; {caches}" if caches else "")
        )
    for r in device.runtimes:
        screen.print(
            f"  {r.name} on {r.unit}: {', '.join(r.precisions)}" + (f"; {show_bytes(r.overhead_bytes)} itself" if r.overhead_bytes else "")
        )
    for m in device.power_modes:
        screen.print(
            f"  power mode {m.name}"
            + (f", {m.power_w:g} W" if m.power_w else "")
            + (" (default)" if m.name == device.default_power_mode else "")
        )
    screen.print(f"  {len(not_confirmed(device))} of {len(figures(device))} figures not confirmed")
    for field, source in device.sources.items():
        screen.print(f"  source of {field}: {source}", style="dim")


@app.command("check")
def check(file: Annotated[str, typer.Argument(help="Your own profile, a TOML file.")], as_json: Json = False) -> None:
    """Check a profile; every mistake is told by file and field (exit 2)."""
    from edgesdk.devices import check_profile

    device = check_profile(file)
    if as_json:
        emit_json({"kind": "device-check", "schema_version": 1, "file": file, "name": device.name, "ok": True})
    else:
        console().print(f"{file}: {device.title} is right; use it with --device {file}")


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="devices")
