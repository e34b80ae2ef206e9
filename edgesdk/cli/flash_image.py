"""What `flash --image` does: a bundle put into a disk image, written to a file or a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import console, emit_json, progress, say

if TYPE_CHECKING:
    from edgesdk.cli.common import Step
    from edgesdk.image.source import Watch
    from edgesdk.image.write import ImageReport

PANEL = "Disk images"
ImageFile = Annotated[
    str | None,
    typer.Option("--image", help="A disk image (.img, .img.xz, .img.gz, .zip) to write to the disk or file --to.", rich_help_panel=PANEL),
]
Inside = Annotated[
    str | None, typer.Option("--bundle", help="The bundle to put into the image; its first boot checks it.", rich_help_panel=PANEL)
]
Bmap = Annotated[
    str | None,
    typer.Option("--bmap", help="The image's block map.", show_default="one that lies beside it", rich_help_panel=PANEL),
]
Root = Annotated[
    str | None,
    typer.Option("--root", help="The bundle's folder in the image.", show_default="/var/lib/edgesdk", rich_help_panel=PANEL),
]
OwnerId = Annotated[str | None, typer.Option("--owner", help="Whose it is: UID or UID:GID.", show_default="0:0", rich_help_panel=PANEL)]
RootPartition = Annotated[
    int | None,
    typer.Option("--partition", help="The number of the root partition.", show_default="the largest ext4", rich_help_panel=PANEL),
]
BootFile = Annotated[
    list[str] | None,
    typer.Option("--boot-file", help="FILE or FILE=NAME: a file for the FAT boot partition; may be given again.", rich_help_panel=PANEL),
]
Yes = Annotated[bool, typer.Option("--yes", help="Write although a disk's or file's content is lost.", rich_help_panel=PANEL)]


def flash_image(
    image: str,
    to: str | None,
    bundle: str | None,
    *,
    bmap: str | None,
    root: str | None,
    owner: str | None,
    python: str | None,
    partition: int | None,
    boot_files: list[str] | None,
    allow_unsigned: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write `image` with `bundle` in it to the file or disk `to`."""
    from edgesdk.errors import InputError
    from edgesdk.image.write import read_content, write_image

    if to is None:
        raise InputError("--image wants a target", "edgesdk flash --image os.img --bundle model.edge --to /dev/sdX, or --to card.img")
    content = read_content(
        bundle, allow_unsigned=allow_unsigned, root=root, owner=owner, python=python, partition=partition, boot_files=boot_files or ()
    )
    with progress("flash") as step:
        report = write_image(image, to, content, bmap=bmap, yes=yes, dry_run=dry_run, watch=_watch(step))
    if as_json:
        emit_json(report)
    else:
        _show(report)


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
        for line in report.steps:
            out.print(line, markup=False)
        say(f"{len(report.steps)} steps; nothing was written")
        return
    out.print(f"[bold]{report.to}[/bold]: {show_bytes(report.written_bytes)} of {show_bytes(report.size_bytes)} written and read back")
    if report.bundle:
        out.print(f"  bundle    {report.bundle[:12]} ({report.model_name}), checked on the first boot", markup=False)
        if report.signer:
            out.print(f"  signed    by {report.signer}", markup=False)
        out.print(f"  then      edgesdk flash --status --on 'ssh://USER@HOST?root={report.root}'", markup=False)
