"""What `flash --image` does: a bundle put into a disk image, written to a file or a card; with `--slots` into a device's other slot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import console, emit_json, progress, show_steps

if TYPE_CHECKING:
    from edgesdk.cli.common import Step
    from edgesdk.image.slots import SlotReport
    from edgesdk.image.source import Watch
    from edgesdk.image.write import Content, ImageReport

ImageFile = Annotated[
    str | None,
    typer.Option("--image", help="A disk image (.img, .img.xz, .img.gz, .zip) to write to the disk or file --to."),
]
Inside = Annotated[str | None, typer.Option("--bundle", help="The bundle to put into the image; its first boot checks it.")]
Bmap = Annotated[
    str | None,
    typer.Option("--bmap", help="The image's block map.", show_default="one that lies beside it"),
]
Root = Annotated[
    str | None,
    typer.Option("--root", help="The bundle's folder in the image.", show_default="/var/lib/edgesdk"),
]
OwnerId = Annotated[str | None, typer.Option("--owner", help="Whose it is: UID or UID:GID.", show_default="0:0")]
RootPartition = Annotated[
    int | None,
    typer.Option("--partition", help="The number of the root partition.", show_default="the largest ext4"),
]
BootFile = Annotated[
    list[str] | None,
    typer.Option("--boot-file", help="FILE or FILE=NAME: a file for the FAT boot partition; may be given again."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Write although a disk's or file's content is lost.")]


SlotsOption = Annotated[
    bool,
    typer.Option(
        "--slots",
        help="A/B slots under U-Boot (--on): show them; with --image write the other one, boot it on trial and confirm it; with --rollback boot the other.",
    ),
]


def flash_image(
    image: str | None, slots: bool, to: str | None, on: str, bundle: str | None, *, inside: str | None, bmap: str | None, root: str | None, owner: str | None,
    python: str | None, partition: int | None, boot_files: list[str] | None, allow_unsigned: bool, yes: bool, rollback: bool, wait: str | None,
    dry_run: bool, as_json: bool, others: bool,
) -> bool:  # fmt: skip
    """Do what --image and --slots ask for; whether one was given. `others`: whether something was asked for that is neither's."""
    from edgesdk.errors import InputError

    if image is None and not slots:
        if any((inside, bmap, root, owner, partition is not None, boot_files, yes)):
            what = "--bundle, --bmap, --root, --owner, --partition, --boot-file and --yes are of a disk image"
            raise InputError(what, "edgesdk flash --image os.img --bundle model.edge --to /dev/sdX")
        return False
    of_bundle = any((root, owner, python, partition is not None, allow_unsigned))
    of_image = any((bundle, inside, bmap, boot_files, yes))
    if others or (bundle and inside) or (rollback and (image or not slots)) or (image is None and of_image) or (slots and yes):
        what = "--image goes with a bundle, --bmap, --boot-file, --to and --yes, or with --slots; --slots alone with --rollback"
        raise InputError(what, "edgesdk flash --image os.img --bundle model.edge --to /dev/sdX")
    if of_bundle and not (bundle or inside):
        what = "--root, --owner, --python, --partition and --allow-unsigned are of a bundle in an image"
        raise InputError(what, "edgesdk flash --image os.img --bundle model.edge --to /dev/sdX")
    from edgesdk.image.write import read_content

    content = read_content(
        inside or bundle,
        allow_unsigned=allow_unsigned,
        root=root,
        owner=owner,
        python=python,
        partition=partition,
        boot_files=boot_files or (),
    )
    if slots:
        _slots(image, on if to is None else to, content, bmap, rollback, wait, dry_run, as_json)
    else:
        _image(str(image), to, content, bmap, yes, dry_run, as_json)
    return True


def _image(image: str, to: str | None, content: Content, bmap: str | None, yes: bool, dry_run: bool, as_json: bool) -> None:
    from edgesdk.errors import InputError
    from edgesdk.image.write import write_image

    if to is None:
        raise InputError("--image wants a target", "edgesdk flash --image os.img --bundle model.edge --to /dev/sdX, or --to card.img")
    with progress("flash") as step:
        report = write_image(image, to, content, bmap=bmap, yes=yes, dry_run=dry_run, watch=_watch(step))
    if as_json:
        emit_json(report)
    else:
        _show(report)


def _slots(
    image: str | None, on: str, content: Content, bmap: str | None, rollback: bool, wait: str | None, dry_run: bool, as_json: bool
) -> None:
    from edgesdk.image.slots import flash_slot, slot_status
    from edgesdk.image.write import prepared
    from edgesdk.units import parse_seconds

    if image is None and not rollback:
        report = slot_status(on)
    else:
        with progress("flash") as step, prepared(image, content, bmap, _watch(step)) as ready:
            report = flash_slot(ready, on, dry_run=dry_run, wait_s=parse_seconds(wait) if wait else 0.0, watch=_watch(step))
    if as_json:
        emit_json(report)
    else:
        _show_slots(report)


def _watch(step: Step) -> Watch:
    from edgesdk.units import show_bytes

    is_terminal = console(stderr=True).is_terminal  # elsewhere each new text is a line

    def watch(what: str, done: int, total: int) -> None:
        share = done / total if total else 0.0
        step(f"{what} {show_bytes(done)}" + (f" of {show_bytes(total)}" if total else "") if is_terminal and done else what, share)

    return watch


def _show(report: ImageReport) -> None:
    from edgesdk.units import show_bytes

    out = console()
    if report.action == "dry-run":
        show_steps(report.steps, done="written")
        return
    out.print(f"[bold]{report.to}[/bold]: {show_bytes(report.written_bytes)} of {show_bytes(report.size_bytes)} written and read back")
    if report.bundle:
        out.print(f"  bundle    {report.bundle[:12]} ({report.model_name}), checked on the first boot", markup=False)
        if report.signer:
            out.print(f"  signed    by {report.signer}", markup=False)
        out.print(f"  then      edgesdk flash --status --on 'ssh://USER@HOST?root={report.root}'", markup=False)


def _show_slots(report: SlotReport) -> None:
    from edgesdk.units import show_bytes

    out = console()
    if report.action == "dry-run":
        show_steps(report.steps, f" on {report.link}")
        return
    out.print(f"[bold]{report.link}[/bold]: slot {report.running} {'runs' if report.action == 'status' else 'runs and is confirmed'}")
    for slot, device in report.devices.items():
        trial = report.on_trial and slot == report.first
        told = {
            "running": slot == report.running,
            "boots next": slot == report.first,
            "failed its trial": slot == report.failed,
            "on trial": trial,
        }
        out.print(f"  {slot}  {device}  {', '.join(text for text, holds in told.items() if holds)}".rstrip(), markup=False)
    if report.action == "confirmed":
        out.print(f"  sent      {show_bytes(report.sent_bytes)}, {show_bytes(report.same_bytes)} were there")
        out.print(
            f"  checked   {'golden outputs of the installed bundle' if report.checked else 'it came up and answers; no bundle is installed'}"
        )
