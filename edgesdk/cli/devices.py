"""The verb `devices`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, progress, say
from edgesdk.cli.flash import PythonPath, Wait

if TYPE_CHECKING:
    from edgesdk.device import DeviceProfile
    from edgesdk.probe import Facts, Probed

app = typer.Typer(help="Devices that edgesdk knows, reading and checking your own.", no_args_is_help=True)


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
        names = f"one {d.board.based_on or 'board'}" if d.board else ", ".join(d.aliases), ", ".join(v.suffix for v in d.variants)
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
    if device.board:
        b = device.board
        screen.print(f"  one board alone: {b.id} ({b.model}), read {b.probed}" + ("; emulated" if b.emulated else ""), markup=False)
    for field, source in device.sources.items():
        screen.print(f"  source of {field}: {source}", style="dim")


@app.command("ports")
def ports(as_json: Json = False) -> None:
    """What is plugged in, and what to type for it after --to or --on: serial ports, UF2 volumes, Jetsons in recovery mode, phones."""
    from edgesdk.bootloaders.ports import list_ports

    found = list_ports()
    if as_json:
        emit_json(found)
        return
    for port in found.ports:
        console().print(f"{port.name}: {port.what}" + (f" ({port.usb})" if port.usb else ""), markup=False)
        for text in port.use:
            console().print(f"  {text}", markup=False)
    if not found.ports:
        say("nothing found: no serial port, no UF2 volume, no Jetson in recovery mode, no phone")


@app.command("check")
def check(file: Annotated[str, typer.Argument(help="Your own profile, a TOML file.")], as_json: Json = False) -> None:
    """Check a profile; every mistake is told by file and field (exit 2)."""
    from edgesdk.devices import check_profile

    device = check_profile(file)
    if as_json:
        emit_json({"kind": "device-check", "schema_version": 1, "file": file, "name": device.name, "ok": True})
    else:
        console().print(f"{file}: {device.title} is right; use it with --device {file}")


@app.command("probe")
def probe(
    link: Annotated[str, typer.Argument(help="local, ssh://user@host, adb:, adb://SERIAL, serial:/dev/ttyUSB0.")],
    name: Annotated[str | None, typer.Option("--name", help="What to call it.", show_default="as before, else its model and board")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time its memory, arithmetic and disk, too (half a minute).")] = False,
    python: PythonPath = None,
    wait: Wait = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the profile and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Read what a board is, and write a profile of that very board; `plan --device NAME` takes it from then on."""
    from edgesdk import probe as verb
    from edgesdk.units import parse_seconds

    wait_s = parse_seconds(wait) if wait else 0.0
    with progress("probe") as step:
        found = verb.probe(link, name=name, measure=measure, dry_run=dry_run, python=python, wait_s=wait_s, tell=step)
    if as_json:
        emit_json(found.to_dict())
        return
    if dry_run:
        console().print(found.text, markup=False, end="", soft_wrap=True)
        say("nothing was written")
        return
    _print_probed(found)


def _print_probed(found: Probed) -> None:
    out, profile = console(), found.profile
    out.print(f"{profile.name}: {profile.title}", style="bold", markup=False)
    for label, text in _facts(found.facts):
        out.print(f"  {label:<10}{text}", markup=False)
    if found.facts.emulated:
        out.print(f"  emulated: {'; '.join(found.facts.emulated)}: its times are an emulator's", markup=False)
    if found.again and not found.changes:
        out.print("  nothing has changed since it was read last")
    for c in found.changes:
        out.print(f"  changed   {c['field']}: {c['before']} -> {c['after']}", markup=False)
    say(f"wrote {found.path}; `edgesdk calibrate --on {found.facts.link} --device {profile.name}` measures what its runtimes reach")


def _facts(f: Facts) -> list[tuple[str, str]]:
    """What was read, a line each."""
    from edgesdk.units import show_bytes

    lines = [
        ("board", f"{f.model}; id {f.board_id or 'none'}" + (f" by {f.identified_by}" if f.identified_by else "")),
        ("system", f.kernel),
    ]
    for c in f.clusters:
        clock = f" at {c.max_hz / 1e9:.4g} GHz" if c.max_hz else ""
        least = f" (from {c.min_hz / 1e9:.4g})" if c.min_hz else ""
        if c.allowed_hz and c.max_hz and c.allowed_hz < c.max_hz:
            least += f", held to {c.allowed_hz / 1e9:.4g} GHz"
        lines.append(
            ("cores", f"{c.cores} x {c.core}{clock}{least}; {', '.join(c.isa) or 'no vector instructions'}; {c.governor or 'no governor'}")
        )
    free = f", {show_bytes(f.available_bytes)} free" if f.available_bytes else ""
    lines.append(("memory", show_bytes(f.memory_bytes) + free))
    disk = f"{show_bytes(f.disk.size_bytes)}, {show_bytes(f.disk.free_bytes or 0)} free" if f.disk.size_bytes else "size unknown"
    lines.append(("disk", disk + {True: "", False: "; cannot be written", None: ""}[f.disk.writable]))
    there = [f"{n} {v}" for n, v in (*f.runtimes.items(), *f.nvidia.items())] + [f"{n} at {p}" for n, p in f.programs.items()]
    lines.append(("runtimes", ", ".join(there) or ("none found" if f.via == "agent" else "no Python there")))
    zones = [f"{z.name} {z.temperature_c:.0f} °C" if z.temperature_c is not None else f"{z.name} (silent)" for z in f.zones]
    lines.append(("heat", ", ".join(zones) or "no thermal zone"))
    rails = [f"{r.name} ({r.kind}{'' if r.answers else ', silent'})" for r in f.rails]
    lines.append(("power", ", ".join(rails) or "no sensor of power"))
    return lines


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="devices")
