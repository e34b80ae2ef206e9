"""The verb `flash`."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, progress, show_steps
from edgesdk.cli.flash_image import Bmap, BootFile, ImageFile, Inside, OwnerId, Root, RootPartition, SlotsOption, Yes, flash_image
from edgesdk.cli.many import Jobs, on_each

if TYPE_CHECKING:
    from edgesdk.cli.common import Step
    from edgesdk.deployment import Deployment
    from edgesdk.transport.steps import Watch

On = Annotated[
    str,
    typer.Option(
        "--on",
        help="A name of the inventory, local, local:/folder, ssh://user@host:port (?identity=FILE&root=FOLDER), adb://SERIAL, serial:/dev/ttyUSB0 (?baud=…&user=…), fake; "
        "several at once: group:NAME, tag:NAME, or some of these with commas.",
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        help="A board's bootloader: esp32:/dev/ttyUSB0, uf2:/media/RPI-RP2, smp:/dev/ttyACM0, jetson:/path/Linux_for_Tegra?board=…; with --image a disk or a file; else as --on.",
    ),
]
Wait = Annotated[
    str | None, typer.Option("--wait", help="How long to wait for others who use the device: 10min.", show_default="not at all")
]
PythonPath = Annotated[
    str | None, typer.Option("--python", help="The interpreter on the device.", show_default="python3; locally this one")
]

NativeRunner = Annotated[
    str | None,
    typer.Option(
        "--runner",
        help="For a device without Python: executor_runner, benchmark_model or run_model, a file here or a whole path there.",
        show_default="none: Python there",
    ),
]
AllowUnchecked = Annotated[
    bool, typer.Option("--allow-unchecked", help="With --runner: even one that gives no outputs; the bundle is then not marked good.")
]


def flash(
    bundle: Annotated[str | None, typer.Argument(help="What `edgesdk build` wrote.")] = None,
    on: On = "local",
    to: To = None,
    firmware: Annotated[str | None, typer.Option("--firmware", help="With --to: a firmware's file in place of a bundle.")] = None,
    python: PythonPath = None,
    runner: NativeRunner = None,
    allow_unchecked: AllowUnchecked = False,
    keep: Annotated[int, typer.Option("--keep", help="How many bundles stay installed.", min=2)] = 2,
    latency_gate: Annotated[str | None, typer.Option("--latency-gate", help="Refuse if a method's median call takes longer: 20ms.")] = None,
    allow_unsigned: Annotated[bool, typer.Option("--allow-unsigned", help="Install it although no trusted key signed it.")] = False,
    wait: Wait = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Make the previous bundle current again.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Show what is installed, whether it is whole, and what was done there.")] = False,
    gc: Annotated[
        bool, typer.Option("--gc", help="Remove old bundles, cut transfers and old agents; never the current, previous or last good one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps and change nothing.")] = False,
    jobs: Jobs = 8,
    image: ImageFile = None,
    slots: SlotsOption = False,
    inside: Inside = None,
    bmap: Bmap = None,
    root: Root = None,
    owner: OwnerId = None,
    partition: RootPartition = None,
    boot_file: BootFile = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Install a bundle: send, verify, check on the device, switch; or roll back."""
    if flash_image(
        image, slots, to, on, bundle, inside=inside, bmap=bmap, root=root, owner=owner, python=python, partition=partition, boot_files=boot_file,
        allow_unsigned=allow_unsigned, yes=yes, rollback=rollback, wait=wait, dry_run=dry_run, as_json=as_json,
        others=bool(firmware or runner or allow_unchecked or keep != 2 or latency_gate or status or gc),
    ):  # fmt: skip
        return
    from edgesdk.bootloaders.types import is_board

    if to is not None and not is_board(to):
        on, to = to, None
    if to is not None and not (rollback or status or gc):
        from edgesdk.cli.flash_board import flash_board

        flash_board(to, bundle, firmware, allow_unsigned=allow_unsigned, dry_run=dry_run, as_json=as_json)
        return
    from edgesdk import flash as verb
    from edgesdk.errors import InputError
    from edgesdk.units import parse_seconds

    if to is not None or firmware is not None:
        raise InputError(
            "--firmware wants --to; --rollback, --status and --gc are of running systems (--on)", "edgesdk flash --firmware app.uf2 --to …"
        )
    if sum((bundle is not None, rollback, status, gc)) != 1:
        raise InputError("flash wants one of: a bundle, --rollback, --status, --gc", "edgesdk flash model.edge --on local")
    gate, wait_s = parse_seconds(latency_gate) if latency_gate else None, parse_seconds(wait) if wait else 0.0

    def one(link: str, step: Step) -> Deployment:
        if status:
            return verb.status(link)
        if gc:
            return verb.clean(link, keep=keep, dry_run=dry_run, python=python, runner=runner, wait_s=wait_s, watch=_watch(step))
        if rollback:
            return verb.roll_back(link, dry_run=dry_run, python=python, runner=runner, wait_s=wait_s, watch=_watch(step))
        return verb.flash(
            str(bundle), link, dry_run=dry_run, python=python, keep=keep, latency_gate=gate, allow_unsigned=allow_unsigned, runner=runner,
            allow_unchecked=allow_unchecked, wait_s=wait_s, watch=_watch(step),
        )  # fmt: skip

    title = "flash --status" if status else "flash --rollback" if rollback else "flash --gc" if gc else "flash"
    if on_each(title, on, lambda link, entry, step: one(link, step), _brief, jobs=jobs, as_json=as_json):
        return
    with contextlib.nullcontext(lambda text, share: None) if status else progress("flash") as step:
        answer = one(on, step)
    if as_json:
        emit_json(answer)
    else:
        _show(answer)


def _watch(step: Step) -> Watch:
    from edgesdk.transport.steps import Put
    from edgesdk.units import show_bytes

    is_terminal = console(stderr=True).is_terminal  # elsewhere each new text is a line

    def watch(what: object, done: int, total: int) -> None:
        if isinstance(what, Put):
            name = what.remote.rpartition("/")[2]
            step(f"{name} {show_bytes(done)} of {show_bytes(total)}" if is_terminal else name, done / max(total, 1))
        else:
            step(str(what).rpartition("# ")[2], 1.0)

    return watch


_WORDS = {
    "installed": "installed and good",
    "already-installed": "already installed and good",
    "rolled-back": "rolled back",
    "cleaned": "cleaned",
}
_RECENT = 10
"""Lines of the history that --status prints; --json has all."""


def _brief(d: Deployment) -> str:
    """One device's answer in a line."""
    if d.action == "dry-run":
        return f"{len(d.steps)} steps, nothing was changed"
    current = f"current {d.current[:12]}{'' if d.good else ' (not checked here)'}" if d.current else "nothing is installed"
    done = "installed, NOT CHECKED" if d.unchecked else _WORDS.get(d.action)
    return ", ".join(filter(None, (done, current, d.previous and f"previous {d.previous[:12]}")))


def _show(d: Deployment) -> None:
    from edgesdk.units import show_bytes, show_seconds

    out = console()
    if d.action == "dry-run":
        show_steps(d.steps, f" on {d.link}")
        return
    done = "installed, its outputs NOT CHECKED" if d.unchecked else _WORDS.get(d.action, d.action)
    out.print(f"[bold]{d.link}[/bold]: {done}" + (f" ({d.model_name})" if d.model_name else ""))
    if d.unchecked:
        out.print(
            f"  [bold red]unchecked[/bold red] {d.unchecked}: nobody knows whether it computes the right thing here; it is not marked good"
        )
    if d.signer:
        out.print(f"  signed    by {d.signer}", markup=False)
    out.print(f"  current   {d.current[:12] if d.current else 'nothing'}{'' if d.good or not d.current else '  (not checked here)'}")
    out.print(f"  previous  {d.previous[:12] if d.previous else 'nothing'}")
    for extra in d.installed:
        if extra.digest not in (d.current, d.previous):
            out.print(f"  kept      {extra.digest[:12]}{'' if extra.good else '  (not checked here)'}")
    for case in d.golden:
        error = "NaN" if case.relative_error is None else f"{case.relative_error:.2g}"
        out.print(f"  golden    {case.method} {case.case}: off by {error}, allowed {case.allowed:.2g}", markup=False)
    for method, seconds in d.gate_s.items():
        out.print(f"  gate      {method}: {show_seconds(seconds)} a call")
    if d.action == "installed":
        resumed = f", {show_bytes(d.resumed_bytes)} were there from an earlier try" if d.resumed_bytes else ""
        out.print(f"  sent      {show_bytes(d.sent_bytes)}{resumed}")
    for folder in d.removed:
        out.print(f"  removed   {folder}", markup=False)
    if d.action == "status":
        _show_state(d)


def _show_state(d: Deployment) -> None:
    out = console()
    if d.damaged:
        out.print(f"  [bold red]damaged[/bold red]   {', '.join(d.damaged)}: flash it again, or --rollback")
    if d.interrupted:
        out.print("  a switch was cut off: the next flash, --rollback or --gc finishes or undoes it")
    if d.trusted_keys:
        out.print("  keys      of its own: it runs only what they signed")
    for entry in d.history[-_RECENT:]:
        by = f" signed by {entry.signer}" if entry.signer else ""
        out.print(
            f"  {entry.number:>5}  {entry.when}  {entry.action} {(entry.digest or '')[:12]}{by}: {_short(entry.result)}", markup=False
        )


def _short(text: str) -> str:
    """Digests by their first digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def register(app: typer.Typer) -> None:
    app.command("flash")(flash)
