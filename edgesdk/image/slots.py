"""Two slots for the whole system under U-Boot: write the one that does not run, boot it on trial, confirm it when it is healthy; else the old one boots.

The device says where U-Boot's environment is (`/etc/fw_env.config`) and which slot runs (`edgesdk.slot=A` on the kernel's command line); the
environment names the slots (`slot_disk`, `slot_A`, `slot_B`). `edgesdk.image.uboot.boot_script` is the other half. A trial that does not come up, or is
not confirmed, ends with the next start: U-Boot counts its tries (`upgrade_available`, `bootcount`, `bootlimit`, as in U-Boot's doc/README.bootcount).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from edgesdk.agent.client import Agent, failed_cases, require_python
from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError
from edgesdk.image.partitions import partitions
from edgesdk.image.source import Watch
from edgesdk.image.uboot import SLOTS, Env, Place, decode, places, update
from edgesdk.lease import lease
from edgesdk.noun import Noun
from edgesdk.survey import survey
from edgesdk.transport import Transport, parse_link
from edgesdk.transport.scripts import script
from edgesdk.units import show_bytes

CHUNK = 4 << 20
BATCH = 32
BOOT_S = 300.0
GONE_S = 60.0
LOOK = 'cat "$1" && echo && echo "---" && cat "$2"'
READ = 'dd if="$1" bs=512 skip="$2" count="$3" 2>/dev/null'
WRITE = 'dd of="$1" bs="$3" seek="$2" conv=notrunc,fsync 2>/dev/null'
ZERO = 'dd if=/dev/zero of="$1" bs="$3" seek="$2" count=1 conv=notrunc,fsync 2>/dev/null'
SIZE = 'if [ -b "$1" ]; then n=$(cat "/sys/class/block/${1##*/}/size") && echo $((n * 512)); else wc -c < "$1"; fi; grep -c "^$1 " /proc/mounts; exit 0'
HASH = """
import hashlib, os, sys
device, first, last, chunk, size = sys.argv[1], *map(int, sys.argv[2:])
with open(device, 'rb') as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for i in range(first, last):
        file.seek(i * chunk)
        print(hashlib.sha256(file.read(min(chunk, size - i * chunk))).hexdigest())
"""
"""Device, first chunk, the one behind the last, bytes of a chunk, bytes in all → a sha256 a line."""
FORGET = "import os, sys; os.posix_fadvise(os.open(sys.argv[1], os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)"
"""What is read of a device next comes from it, not from memory."""
REBOOT = "sync; (sleep 1; reboot; sleep 10; reboot -f) > /dev/null 2>&1 < /dev/null & exit 0"


@dataclass(frozen=True)
class Files:
    """Where a device tells of itself."""

    config: str = "/etc/fw_env.config"
    cmdline: str = "/proc/cmdline"
    boot_id: str = "/proc/sys/kernel/random/boot_id"


class SlotReport(Noun):
    """The slots of a device, and what was done to them."""

    KIND: ClassVar[str] = "slots"

    action: Literal["status", "confirmed", "dry-run"]
    link: str
    running: str
    first: str  # what U-Boot boots next
    on_trial: bool
    failed: str | None  # the slot whose last trial failed
    devices: dict[str, str]
    sent_bytes: int = 0
    same_bytes: int = 0  # were there already
    checked: bool = False  # the installed bundle's golden outputs, in the new system
    steps: tuple[str, ...] = ()


class Slots:
    """The slots of the device behind a transport."""

    def __init__(self, transport: Transport, files: Files = Files()) -> None:
        self.transport, self.files = transport, files
        text = transport.must(script("look", LOOK, files.cmdline, files.config), "looking for two slots").text
        cmdline, _, config = text.partition("\n---\n")
        running = re.search(r"\b(?:edgesdk|rauc)\.slot=(\S+)", cmdline)
        if not running or running[1] not in SLOTS:
            hint = "boot it with edgesdk's boot script (docs/images.md), which names the slot"
            raise DeviceError(f"{transport.link}: its kernel's command line does not say which slot runs (edgesdk.slot=A or B)", hint)
        self.running = running[1]
        self._root = re.search(r"\broot=(\S+)", cmdline)
        self.places = places(config, f"{transport.link}: {files.config}")
        self.env = self._read()
        missing = [n for n in ("slot_disk", "slot_A", "slot_B") if n not in self.env.variables]
        if missing:
            what = f"{transport.link}: U-Boot's environment has no {', '.join(missing)}"
            raise DeviceError(what, "set them with fw_setenv: slot_disk=/dev/mmcblk0p, slot_A=2, slot_B=3")

    @property
    def other(self) -> str:
        return SLOTS[1 - SLOTS.index(self.running)]

    def device(self, slot: str) -> str:
        return self.env.variables["slot_disk"] + self.env.variables[f"slot_{slot}"]

    @property
    def on_trial(self) -> bool:
        return self.env.variables.get("upgrade_available", "0") == "1"

    def _read(self) -> Env:
        copies = []
        for place in self.places:
            argv = script("read", READ, place.device, str(place.offset // 512), str(place.size // 512))
            copies.append(self.transport.must(argv, f"reading U-Boot's environment on {place.device}").out)
        return decode(copies)

    def set(self, changes: Mapping[str, str]) -> None:
        """Change variables in U-Boot's environment, read back. Raises `CheckFailed` if they are not there then."""
        index, data = update(self.env, changes, len(self.places), self.places[0].size)
        place: Place = self.places[index]
        result = self.transport.run(script("write", WRITE, place.device, str(place.offset // 512), "512"), stdin=data)
        self.transport.run((self.transport.python, "-c", FORGET, place.device))
        self.env = self._read()
        if result.code or any(self.env.variables.get(n, "") != v for n, v in changes.items()):
            what = f"{self.transport.link}: U-Boot's environment on {place.device} could not be written: {result.complaint}"
            raise CheckFailed(what, "the slots are as they were; log in as root, or look at the disk")

    def require(self, image: Path, slot: str) -> None:
        """Raises `InputError` and `DeviceError` where the image cannot be written into a slot."""
        device, size = self.device(slot), image.stat().st_size
        if (found := partitions(image))[0].number:
            raise InputError(
                f"{image}: a whole disk ({'; '.join(map(str, found))})", "a slot takes one file system: give that partition's image"
            )
        room, mounts = self._size(device)
        if mounts or device == self.device(self.running) or (self._root and self._root[1] == device):
            raise DeviceError(
                f"{self.transport.link}: slot {slot} ({device}) is in use", "unmount it, or correct slot_A and slot_B, then run it again"
            )
        if size > room:
            what = f"{image}: {show_bytes(size)}, slot {slot} ({device}) has {show_bytes(room)}"
            raise InputError(what, "make the file system smaller: resize2fs -M")

    def write(self, image: Path, slot: str, watch: Watch) -> tuple[int, int]:
        """Write an image into a slot that does not run: only what differs is sent, all is read back. Returns bytes sent and bytes there already."""
        device, size = self.device(slot), image.stat().st_size
        wanted = list(_chunks(image))
        sent = 0
        for i, there in enumerate(self._hashes(device, size, watch)):
            if there != wanted[i]:
                content = _chunk(image, i)
                self._put(device, i, content)
                sent += len(content)
            watch(f"slot {slot}", min((i + 1) * CHUNK, size), size)
        bad = [i for i, there in enumerate(self._hashes(device, size, watch)) if there != wanted[i]]
        if bad:
            what = f"{self.transport.link}: slot {slot} ({device}): {len(bad)} of {len(wanted)} chunks read back are not what was written"
            raise CheckFailed(what, "the running slot stays; the disk may be worn out")
        return sent, size - sent

    def _size(self, device: str) -> tuple[int, int]:
        words = self.transport.must(script("size", SIZE, device), f"looking at {device}").text.split()
        if len(words) < 2 or not words[0].isdigit():
            raise DeviceError(f"{self.transport.link}: no disk {device}", "correct slot_disk, slot_A and slot_B in U-Boot's environment")
        return int(words[0]), int(words[1])

    def _hashes(self, device: str, size: int, watch: Watch) -> Iterator[str]:
        count = -(-size // CHUNK)
        for at in range(0, count, BATCH):
            words = (str(at), str(min(at + BATCH, count)), str(CHUNK), str(size))
            watch("reading what is there", at * CHUNK, size)
            yield from self.transport.must(
                (self.transport.python, "-c", HASH, device, *words), f"reading {device}", timeout=600.0
            ).text.split()

    def _put(self, device: str, index: int, content: bytes) -> None:
        words = (device, str(index), str(CHUNK))
        if any(content) or len(content) < CHUNK:
            result = self.transport.run(script("write", WRITE, *words), stdin=content, timeout=300.0)
        else:
            result = self.transport.run(script("zero", ZERO, *words), timeout=300.0)
        if result.code:
            what = f"{self.transport.link}: {device} could not be written: {result.complaint}"
            raise DeviceError(
                what, "the running slot stays; log in as root, or look at the disk, then run it again: it goes on where it stopped"
            )


def _chunk(image: Path, index: int) -> bytes:
    with image.open("rb") as file:
        file.seek(index * CHUNK)
        return file.read(CHUNK)


def _chunks(image: Path) -> Iterator[str]:
    """sha256 of each chunk."""
    for index in range(-(-image.stat().st_size // CHUNK)):
        yield hashlib.sha256(_chunk(image, index)).hexdigest()


def slot_status(on: str | Transport, files: Files = Files()) -> SlotReport:
    """The slots of a device. Raises `DeviceError` where it has none that edgesdk knows."""
    with _link(on) as transport:
        return _report("status", Slots(transport, files))


def flash_slot(
    image: str | Path | None,
    on: str | Transport,
    *,
    dry_run: bool = False,
    wait_s: float = 0.0,
    boot_s: float = BOOT_S,
    watch: Watch = lambda what, done, total: None,
    files: Files = Files(),
) -> SlotReport:
    """Write an image (of one file system) into the slot that does not run, boot it on trial and confirm it; None: boot what is there, on trial.

    Raises `CheckFailed` (it did not come up or is not healthy: the old slot runs again), `LinkError` (the device did not come back in `boot_s`),
    `DeviceError` and `InputError`.
    """
    with _link(on) as transport:
        before = Slots(transport, files)
        _refuse(before, image)
        new, old = before.other, before.running
        if image:
            before.require(Path(image), new)
        steps = _steps(before, Path(image) if image else None)
        if dry_run:
            return _report("dry-run", before, steps=steps)
        require_python(transport, transport.python)
        with lease(transport, "install", wait_s=wait_s):
            sent, same = before.write(Path(image), new, watch) if image else (0, 0)
            before.set({"boot_slot": new, "upgrade_available": "1", "bootcount": "0", "bootlimit": "1", "slot_failed": ""})
            came = _reboot(transport, files)
    after = _again(on, files, came, boot_s, watch)
    with _link(on, after.transport):
        if after.running != new:
            what = f"{after.transport.link}: slot {new} did not come up; the device went back to slot {old} by itself"
            raise CheckFailed(what, "look at its console while it boots; the image in that slot is not used any more")
        try:
            checked = _healthy(after.transport)
        except (CheckFailed, DeviceError) as error:
            after.set({"boot_slot": old, "upgrade_available": "0", "bootcount": "0", "slot_failed": new})
            _reboot(after.transport, files)
            raise CheckFailed(f"slot {new} came up and is not healthy: {error.what}; going back to slot {old}", error.hint) from None
        after.set({"upgrade_available": "0", "bootcount": "0", "slot_failed": ""})
        return _report("confirmed", after, sent_bytes=sent, same_bytes=same, checked=checked, steps=steps)


def _refuse(slots: Slots, image: str | Path | None) -> None:
    variables = slots.env.variables
    if slots.on_trial:
        what = f"{slots.transport.link}: slot {slots.running} is on trial, not confirmed"
        raise DeviceError(what, "reboot the device: it goes back to the other slot; or confirm it: fw_setenv upgrade_available 0")
    if image is None and variables.get("slot_failed") == slots.other:
        raise DeviceError(
            f"{slots.transport.link}: the last trial of slot {slots.other} failed", "write an image into it: --slots --image FILE"
        )


def _steps(slots: Slots, image: Path | None) -> tuple[str, ...]:
    new, device = slots.other, slots.device(slots.other)
    write = [f"write {device}  # slot {new}: what differs of {show_bytes(image.stat().st_size)}", f"verify {device}"] if image else []
    place = slots.places[(1 - slots.env.newest) if len(slots.places) == 2 else 0]
    trial = f"env   boot_slot={new} upgrade_available=1 bootcount=0  # on {place.device} at {place.offset:#x}"
    return (
        *write,
        trial,
        "reboot",
        f"check slot {new}  # it runs, the agent answers, golden outputs if a bundle is installed",
        "env   upgrade_available=0",
    )


def _reboot(transport: Transport, files: Files) -> str:
    """Returns the id of the boot that ends."""
    boot = transport.must(("cat", files.boot_id), "reading the boot's id").text
    transport.must(script("reboot", REBOOT), "rebooting")
    return boot


def _again(on: str | Transport, files: Files, before: str, boot_s: float, watch: Watch) -> Slots:
    """The device behind its reboot, by a new link. Raises `LinkError`."""
    start = time.monotonic()
    while (passed := time.monotonic() - start) < boot_s:
        watch("reboot", int(passed), int(boot_s))
        transport = parse_link(on) if isinstance(on, str) else on
        try:
            now = transport.run(("cat", files.boot_id), timeout=min(GONE_S, boot_s))
            if now.code == 0 and now.text != before:
                return Slots(transport, files)
        except LinkError:
            pass
        if isinstance(on, str):
            transport.close()
        time.sleep(min(1.0, boot_s / 20))
    what = f"the device did not come back in {boot_s:.0f} s"
    raise LinkError(what, "switch it off and on: U-Boot goes back to the other slot; a hardware watchdog would do that by itself")


def _healthy(transport: Transport) -> bool:
    """The agent answers, and what is installed computes what it must; whether something is. Raises `CheckFailed` and `DeviceError`."""
    with Agent(transport) as agent:
        agent.ask("facts")
        current = survey(transport).current
        if current is None:
            return False
        if wrong := failed_cases(agent.ask("check", folder=f"{transport.root}/current")):
            raise CheckFailed(
                f"wrong outputs: {'; '.join(wrong[:3])}", "build the image with the runtime and version that the bundle is for"
            )
        return True


def _report(action: Literal["status", "confirmed", "dry-run"], slots: Slots, **fields: object) -> SlotReport:
    variables = slots.env.variables
    known = {
        "action": action,
        "link": slots.transport.link,
        "running": slots.running,
        "first": variables.get("boot_slot", slots.running),
        "on_trial": slots.on_trial,
        "failed": variables.get("slot_failed") or None,
        "devices": {s: slots.device(s) for s in SLOTS},
    }
    return SlotReport.check({**known, **fields}, "slots")


@contextmanager
def _link(on: str | Transport, transport: Transport | None = None) -> Iterator[Transport]:
    """A transport for a link, closed in the end; one that was given is left open."""
    found = transport or (parse_link(on) if isinstance(on, str) else on)
    try:
        yield found
    finally:
        if isinstance(on, str):
            found.close()
