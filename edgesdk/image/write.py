"""`edgesdk flash --image`: a copy of an image with a bundle in it, to a file or a card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from edgesdk.errors import CheckFailed, DeviceError, InputError
from edgesdk.image import blockmap, contents, disk, source
from edgesdk.image.files import ROOT_USER, Entry, ExtFiles, FatFiles, Owner, require_room
from edgesdk.image.partitions import Partition, ext4, partitions, pick
from edgesdk.install import Source, read_source
from edgesdk.noun import Noun
from edgesdk.signing import Signer, signer_of
from edgesdk.units import show_bytes


class ImageReport(Noun):
    """What was written where, or with --dry-run would be."""

    KIND: ClassVar[str] = "image"

    action: Literal["written", "dry-run"]
    image: str
    to: str
    size_bytes: int
    written_bytes: int  # to the target; less than its size with a block map
    sha256: str | None  # of the image as it came, unpacked; None for a dry run
    block_map: str | None = None
    bundle: str | None = None  # digest
    model_name: str | None = None
    signer: str | None = None
    root: str | None = None  # folder on the device
    partitions: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Content:
    """What is to be put into the image, and how."""

    bundle: Source | None = None
    signer: Signer | None = None
    root: str = contents.ROOT
    owner: Owner = ROOT_USER
    python: str = "python3"
    partition: int | None = None  # the root file system's number; None: the largest ext4
    boot_files: Mapping[str, bytes] | None = None  # name in the FAT partition → bytes


def write_image(
    image: str | Path,
    to: str | Path,
    content: Content = Content(),
    *,
    bmap: str | Path | None = None,
    yes: bool = False,
    dry_run: bool = False,
    watch: source.Watch = lambda what, done, total: None,
    machine: disk.Machine = disk.Machine(),
) -> ImageReport:
    """Write a copy of `image` with `content` in it to the file or disk `to`; `yes`: although something is there already.

    A block map is used if `bmap` names one or one lies beside the image. The image itself is never changed. Raises `InputError` (no such image,
    no such partition, a target that must not be written to), `CheckFailed` (damage, read back wrong) and `DeviceError` (no room, cannot be written).
    """
    image, to = Path(image), Path(to)
    found = Path(bmap) if bmap else blockmap.find(image)
    blocks = blockmap.read(found) if found else None
    card = disk.safe_disk(to, blocks.image_bytes if blocks else 0, machine) if disk.is_disk(to, machine) else None
    _refuse(image, to, card, yes or dry_run)
    steps = [f"copy  {image}  # to {_place(to, card)}, {f'{show_bytes(blocks.mapped_bytes)} by {found}' if blocks else 'all of it'}"]
    with _work(image, to, card, dry_run) as work:
        digest = None if work == image else source.copy(image, work, blocks, watch)
        size = work.stat().st_size
        if blocks and size != blocks.image_bytes:
            raise InputError(f"{image}: {size} bytes, its block map is of {blocks.image_bytes}", f"{found} belongs to another image")
        parts = partitions(work, image)
        steps += _fill(work, image, parts, content, dry_run, watch)
        written = size
        if card:
            card = disk.safe_disk(to, size, machine)
            written = sum(end - start for start, end in disk.extents(work, everything=blocks is None))
            steps += [f"write {card}  # {show_bytes(written)}", f"verify {card}  # every range read back from it, by sha256"]
            if not dry_run:
                disk.write(work, card, blocks is None, watch)
        elif not dry_run:
            _settle(work, to)
    return ImageReport(
        action="dry-run" if dry_run else "written",
        image=str(image),
        to=str(to),
        size_bytes=size,
        written_bytes=0 if dry_run else written,
        sha256=None if dry_run else digest,
        block_map=str(found) if found else None,
        bundle=content.bundle.digest if content.bundle else None,
        model_name=content.bundle.manifest.model_name if content.bundle else None,
        signer=f"{content.signer.name} ({content.signer.id})" if content.signer else None,
        root=content.root if content.bundle else None,
        partitions=tuple(map(str, parts)),
        steps=tuple(steps),
    )


@contextmanager
def prepared(image: str | Path | None, content: Content, bmap: str | Path | None, watch: source.Watch) -> Iterator[Path | None]:
    """The image, unpacked and with `content` in it where that is asked for: a temporary file then. None for None."""
    if image is None or not (source.is_packed(Path(image)) or content.bundle or content.boot_files or bmap):
        yield Path(image) if image else None
        return
    with tempfile.TemporaryDirectory(prefix="edgesdk-") as folder:
        write_image(image, Path(folder, "image"), content, bmap=bmap, watch=watch)
        yield Path(folder, "image")


def read_content(
    bundle: str | Path | None,
    *,
    allow_unsigned: bool = False,
    root: str | None = None,
    owner: str | None = None,
    python: str | None = None,
    partition: int | None = None,
    boot_files: Sequence[str] = (),
) -> Content:
    """A `Content` from what people type: `owner` as UID or UID:GID, a boot file as FILE or FILE=NAME. Raises `InputError` and `CheckFailed`."""
    if root is not None and not (root.startswith("/") and os.path.normpath(root) == root and root != "/"):
        raise InputError(f"--root {root}: not a whole path", f"write it like {contents.ROOT}")
    return Content(
        bundle=read_source(bundle) if bundle else None,
        signer=signer_of(bundle) if bundle and not allow_unsigned else None,
        root=root or contents.ROOT,
        owner=_owner(owner) if owner else ROOT_USER,
        python=python or "python3",
        partition=partition,
        boot_files=dict(_boot_file(text) for text in boot_files),
    )


def _owner(text: str) -> Owner:
    user, _, group = text.partition(":")
    if not user.isdecimal() or not (group or user).isdecimal():
        raise InputError(f"--owner {text}: not numbers", "write it like 1000:1000 (Raspberry Pi OS's first user)")
    return Owner(int(user), int(group or user))


def _boot_file(text: str) -> tuple[str, bytes]:
    given, _, name = text.partition("=")
    try:
        return name or Path(given).name, Path(given).read_bytes()
    except OSError as error:
        raise InputError(f"--boot-file {given}: cannot be read ({error.strerror})", "write it like --boot-file FILE or FILE=NAME") from None


def _refuse(image: Path, to: Path, card: disk.Disk | None, yes: bool) -> None:
    if not image.exists():
        raise InputError(f"{image}: no such file", "give a disk image: .img, .img.xz, .img.gz or .zip")
    if to.exists() and to.samefile(image):
        raise InputError(f"{to}: is the image itself, which is never changed", "give another file or a disk with --to")
    if to.is_dir():
        raise InputError(f"{to}: a folder", "give a file or a disk: --to card.img, --to /dev/sdX")
    if not yes and (card or to.exists()):
        what = f"{card}: everything on it would be lost" if card else f"{to}: is there already"
        raise InputError(what, "look at it with --dry-run, then give --yes")


def _place(to: Path, card: disk.Disk | None) -> str:
    return "a temporary file" if card else str(to)


@contextmanager
def _work(image: Path, to: Path, card: disk.Disk | None, dry_run: bool) -> Iterator[Path]:
    """The file that is worked on; removed in the end unless it became the target. A dry run looks at the image itself, or at it unpacked."""
    if dry_run and not source.is_packed(image):
        yield image
        return
    folder = None if card or dry_run else to.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=".edgesdk-", dir=folder) as name:
            yield Path(name, "image")
    except OSError as error:
        place = folder or tempfile.gettempdir()
        raise DeviceError(f"{place}: cannot be written ({error.strerror})", "choose another place: --to, or TMPDIR") from None


def _settle(work: Path, to: Path) -> None:
    with work.open("rb") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    work.chmod(0o666 & ~umask)
    work.replace(to)


def _fill(work: Path, image: Path, parts: list[Partition], content: Content, dry_run: bool, watch: source.Watch) -> list[str]:
    """Put everything in, the file systems checked before and after; returns the steps."""
    steps: list[str] = []
    if content.boot_files:
        boot = FatFiles(work, pick(parts, "fat", None, image), image)
        boot.free_bytes()
        for name, data in content.boot_files.items():
            steps.append(f"boot  {name}  # {show_bytes(len(data))}, in {boot.part}")
            if not dry_run:
                boot.put(name, data)
    if content.bundle is None:
        return steps
    part = pick(parts, "ext4", content.partition, image)
    system, fs = ExtFiles(work, part, image), ext4(work, part)
    watch("check", 0, 0)
    if not fs.clean:  # a journal that is replayed later would undo a part of what is put in now
        what = f"{image}: {part} was not unmounted cleanly, or errors were noted in it"
        raise CheckFailed(what, "take the image of a system that is shut down; `e2fsck -f` on the partition may repair it")
    system.check()
    entries: list[Entry] = contents.entries(
        content.bundle, system, content.root, content.owner, content.python, content.signer.id if content.signer else None
    )
    require_room(fs, part, entries, image)
    steps += [f"check {part}  # e2fsck", *map(str, entries), f"check {part}  # e2fsck, and every file read back"]
    if not dry_run:
        watch("bundle", 0, 0)
        system.put(entries)
        system.check()
    return steps
