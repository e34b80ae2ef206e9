"""The verb `rollout`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgesdk.cli.common import Json, console, emit_json, say

if TYPE_CHECKING:
    from rich.console import Group

    from edgesdk.fleet.journal import Folder
    from edgesdk.fleet.rollout import Rollout

app = typer.Typer(help="Bring a bundle to devices that only a message broker reaches, stage by stage.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(help="The rollout.", show_default="the newest")]
LINE_S = 1.0
STATES = ("waiting", "told", "fetching", "checking", "installing", "good", "failed", "going-back", "rolled-back", "held", "superseded")


@app.command("start")
def start(
    bundle: Annotated[str, typer.Argument(help="What `edgesdk build` wrote.")],
    broker: Annotated[str, typer.Option("--broker", help="mqtt://host:1883 or mqtts://user@host:8883.")],
    on: Annotated[str, typer.Option("--on", help="Devices of the inventory: group:NAME, tag:NAME, names, with commas.")] = "group:all",
    fleet: Annotated[str, typer.Option(help="The fleet's name, as its agents have it.")] = "default",
    stages: Annotated[str, typer.Option(help="Devices that have it by the end of each stage, as counts or shares.")] = "1,10%,50%,100%",
    canary: Annotated[list[str] | None, typer.Option(help="Devices that get it first; may be repeated.")] = None,
    halt_on: Annotated[
        str, typer.Option(help="So many failures, or such a share of those that were told, end it; one of the first stage always does.")
    ] = "1",
    wait: Annotated[str, typer.Option("--wait", help="How long a stage has to be good before the next: 10min.")] = "0s",
    timeout: Annotated[str, typer.Option(help="A device that is there and has not ended by then is one that failed.")] = "30min",
    away: Annotated[str, typer.Option(help="Devices that were gone for so long are not waited for; they catch up.")] = "60s",
    latency_gate: Annotated[
        str | None, typer.Option("--latency-gate", help="Devices refuse it if a method's median call takes longer: 20ms.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Where devices fetch this very file over HTTP(S), in place of the broker.")] = None,
    sign: Annotated[str, typer.Option(help="The key of yours that signs the orders.")] = "default",
    password_file: Annotated[str | None, typer.Option(help="The broker's password, in a file (or EDGESDK_MQTT_PASSWORD).")] = None,
    ca: Annotated[str | None, typer.Option(help="Certificates that the broker's is checked against.", show_default="the system's")] = None,
    cert: Annotated[str | None, typer.Option(help="A certificate of your own, PEM.")] = None,
    key: Annotated[str | None, typer.Option(help="Its key, PEM.")] = None,
    name: Annotated[str | None, typer.Option("--id", help="The rollout's name.", show_default="by date and time")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print stages and devices and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Begin a rollout and drive it; Ctrl-C leaves it where it is, `rollout resume` goes on."""
    from edgesdk.fleet.begin import spec_of
    from edgesdk.fleet.journal import Folder
    from edgesdk.fleet.rollout import Rollout
    from edgesdk.inventory import chosen
    from edgesdk.units import parse_seconds

    files = {"password_file": password_file, "ca": ca, "cert": cert, "key": key}
    spec = spec_of(
        bundle, [e.name for e in chosen(on)], broker, fleet=fleet, stages=stages, canaries=canary or (), halt_on=halt_on,
        wait_s=parse_seconds(wait), timeout_s=parse_seconds(timeout), away_s=parse_seconds(away),
        gate_s=parse_seconds(latency_gate) if latency_gate else None, url=url, sign=sign, id=name,
        login={k: v for k, v in files.items() if v},
    )  # fmt: skip
    if not dry_run:
        folder = Folder.create(spec, bundle)
        say(f"rollout {spec.id} of {spec.model_name} {spec.bundle[:12]} to {len(spec.devices)} devices")
        _drive(folder, as_json)
        return
    rollout = Rollout(spec)
    if as_json:
        emit_json({**_as_json(rollout), "dry_run": True})
        return
    for number, names in enumerate(rollout.stages(), 1):
        console().print(f"stage {number}: {len(names)} devices: {' '.join(names)}", markup=False, emoji=False)
    say("nothing was begun")


@app.command("status")
def status(
    rollout: Id = "",
    follow: Annotated[bool, typer.Option("--follow", help="Until it has ended.")] = False,
    devices: Annotated[bool, typer.Option("--devices", help="Every device, not only the stages.")] = False,
    as_json: Json = False,
) -> None:
    """How far a rollout is, from its journal."""
    from edgesdk.fleet.journal import Folder

    folder = Folder(rollout)
    state = folder.read()
    if follow:
        with _shown() as changed:
            while not state.ended:
                changed(state)
                time.sleep(0.5)
                state = folder.read()
    if as_json:
        emit_json(_as_json(state))
        return
    console().print(_table(state))
    if devices:
        for device in state.spec.devices:
            told = state.told.get(device)
            words = f"{told.step} {told.state}{' (late)' if told.late else ''} {told.why}" if told else "waiting"
            console().print(f"  {device}: {words}".rstrip(), markup=False, emoji=False)


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """Every rollout on this machine, the newest first."""
    from edgesdk.fleet.journal import Folder, rollout_ids

    found = [Folder(i).read() for i in rollout_ids()]
    if as_json:
        emit_json(
            {"kind": "rollouts", "schema_version": 1, "rollouts": [{"id": r.spec.id, "status": r.status, "ended": r.ended} for r in found]}
        )
        return
    if not found:
        say("no rollouts on this machine; begin one: edgesdk rollout start BUNDLE --broker mqtts://… --on group:…")
    for r in found:
        console().print(
            f"{r.spec.id}  {r.status}{'' if r.ended else ', not ended'}  {r.spec.model_name} {r.spec.bundle[:12]}  {_words(r)}", emoji=False
        )


@app.command("pause")
def pause(rollout: Id = "") -> None:
    """Begin no further stage until `rollout resume`."""
    from edgesdk.fleet.journal import Folder

    folder = Folder(rollout)
    folder.ask("pause")
    say(f"rollout {folder.id}: no further stage is begun")


@app.command("resume")
def resume(rollout: Id = "", as_json: Json = False) -> None:
    """Go on with a rollout that was paused, left or cut off; collect devices that were away."""
    _command(rollout, "resume", as_json)


@app.command("abort")
def abort(rollout: Id = "", as_json: Json = False) -> None:
    """End it: who has it keeps it, who has not is told to leave it."""
    _command(rollout, "abort", as_json)


@app.command("rollback")
def rollback(rollout: Id = "", as_json: Json = False) -> None:
    """Every device that took it goes back to what it had before."""
    _command(rollout, "rollback", as_json)


def _command(rollout: str, command: str, as_json: bool) -> None:
    """Leave a command; drive the rollout if nobody does."""
    from edgesdk.errors import DeviceError
    from edgesdk.fleet.journal import Folder

    folder = Folder(rollout)
    folder.ask(command)
    try:
        with folder.alone():
            pass
    except DeviceError as error:
        say(f"{error.what}; it has been told to {command}")
        return
    _drive(folder, as_json)


def _drive(folder: Folder, as_json: bool) -> None:
    """Until it has ended. Raises `typer.Exit` with 1 where a device lacks it that was there."""
    from edgesdk.fleet.broker import Broker
    from edgesdk.fleet.controller import Controller

    spec = folder.spec
    try:
        with _shown() as changed:
            rollout = Controller(folder, Broker(spec.broker, **spec.login), changed).run()
    except KeyboardInterrupt:
        say(f"left; what was told to devices stays so. Go on with: edgesdk rollout resume {spec.id}")
        raise
    if as_json:
        emit_json(_as_json(rollout))
    else:
        console().print(_table(rollout))
        for device, told in rollout.told.items():
            if told.failed:
                say(f"{device}: {told.why}")
        if rollout.status == "finished" and rollout.unsettled:
            say(
                f"{len(rollout.unsettled)} devices are away: they get it once they are back; edgesdk rollout resume {spec.id} collects them"
            )
    if rollout.status != "finished" or rollout.counts().get("failed"):
        raise typer.Exit(1)


def _words(rollout: Rollout) -> str:
    counts = rollout.counts()
    return ", ".join(f"{counts[s]} {s}" for s in STATES if s in counts)


def _table(rollout: Rollout) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    counts = [rollout.counts(names) for names in rollout.stages()]
    states = [s for s in STATES if any(s in c for c in counts)]
    title = f"{rollout.spec.id}: {rollout.status}{'' if rollout.ended else ', not ended'}" + (f": {rollout.why}" if rollout.why else "")
    table = Table(box=None, header_style="dim")
    for column in ("stage", "devices", *states):
        table.add_column(column, justify="right")
    for number, (names, found) in enumerate(zip(rollout.stages(), counts, strict=True), 1):
        mark = ">" if number == rollout.stage and not rollout.ended else ""
        table.add_row(f"{mark}{number}", str(len(names)), *(str(found.get(s, "")) for s in states))
    return Group(Text(title, style="bold"), table)


def _as_json(rollout: Rollout) -> dict[str, Any]:
    devices = []
    for number, names in enumerate(rollout.stages(), 1):
        for name in names:
            told = rollout.told.get(name)
            order = {"step": told.step, "counter": told.counter, "state": told.state, "late": told.late, "why": told.why} if told else None
            devices.append({"name": name, "stage": number, "order": order})
    spec = rollout.spec
    head = {
        "kind": "rollout-status",
        "schema_version": 1,
        "id": spec.id,
        "bundle": spec.bundle,
        "model_name": spec.model_name,
        "broker": spec.broker,
    }
    return {
        **head, "status": rollout.status, "why": rollout.why, "ended": rollout.ended, "stage": rollout.stage, "stages": list(spec.stages),
        "counts": rollout.counts(), "devices": devices,
    }  # fmt: skip


@contextlib.contextmanager
def _shown() -> Iterator[Any]:
    """What hears of changes: a live table on a terminal, a line whenever the counts are others elsewhere."""
    screen = console(stderr=True)
    latest: list[Rollout] = []
    said, at = "", 0.0

    def changed(rollout: Rollout) -> None:
        nonlocal said, at
        latest[:] = [rollout]
        if screen.is_terminal or time.monotonic() - at < LINE_S:
            return
        text = f"stage {rollout.stage} of {len(rollout.spec.stages)}, {rollout.status}: {_words(rollout)}"
        if text != said:
            said, at = text, time.monotonic()
            say(text)

    if not screen.is_terminal:
        yield changed
        return
    from rich.live import Live

    with Live(get_renderable=lambda: _table(latest[0]) if latest else "connecting …", console=screen, refresh_per_second=2, transient=True):
        yield changed


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="rollout")
