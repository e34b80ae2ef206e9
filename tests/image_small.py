"""Small disk images for the tests: an MBR written by hand, FAT and ext4 of a few MiB made by mkfs, and fake trees of /sys and /proc."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from edgesdk.image.disk import Machine

MIB = 1 << 20
SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"
TOOLS = ("mkfs.ext4", "mkfs.vfat", "debugfs", "e2fsck", "mcopy", "mdir")
needs_tools = pytest.mark.skipif(
    any(shutil.which(t, path=SBIN) is None for t in TOOLS), reason=f"needs {', '.join(TOOLS)}: apt install e2fsprogs dosfstools mtools"
)


def program(name: str) -> str:
    found = shutil.which(name, path=SBIN)
    assert found
    return found


def mbr(parts: list[tuple[int, int, int]]) -> bytes:
    """(type, first sector, sectors) of up to four partitions as a first sector."""
    entries = b"".join(struct.pack("<B3xB3xII", 0, kind, start, count) for kind, start, count in parts)
    return bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"


def superblock(blocks: int) -> bytes:
    """Of an ext4 of `blocks` of 1 kB."""
    data = bytearray(1024)
    struct.pack_into("<IIIIII", data, 0, 128, blocks, 100, 1000, 50, 1)
    struct.pack_into("<I", data, 24, 0)
    struct.pack_into("<HH", data, 56, 0xEF53, 1)
    data[120:126] = b"rootfs"
    return bytes(data)


def tree(folder: Path, init: str) -> Path:
    """A root folder with a python3 behind a link, and what `init` wants: systemd, rcS, sysv or nothing."""
    for name in ("usr/bin", "etc/init.d", "var/lib", "usr/lib"):
        (folder / name).mkdir(parents=True)
    (folder / "usr/bin/python3.11").write_text("no real one\n")
    (folder / "usr/bin/python3").symlink_to("python3.11")
    (folder / "lib").symlink_to("usr/lib")
    if init == "systemd":
        (folder / "usr/lib/systemd").mkdir()
        (folder / "usr/lib/systemd/systemd").write_text("")
    elif init == "rcS":
        (folder / "etc/init.d/rcS").write_text("")
    elif init == "sysv":
        for level in (2, 3, 5):
            (folder / f"etc/rc{level}.d").mkdir()
    return folder


def os_image(folder: Path, init: str = "systemd", root_mib: int = 8) -> Path:
    """An image with an MBR: FAT of 4 MiB at 1 MiB, ext4 of `root_mib` at 5 MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    image, root, boot = folder / "os.img", folder / "root", folder / "boot"
    source = tree(folder / "tree", init)
    subprocess.run([program("mkfs.ext4"), "-q", "-F", "-b", "1024", "-L", "rootfs", "-d", source, root, f"{root_mib}M"], check=True)
    subprocess.run([program("mkfs.vfat"), "-n", "BOOTFS", "-C", boot, "4096"], check=True, capture_output=True)
    with image.open("wb") as file:
        file.write(mbr([(0x0C, 2048, 8192), (0x83, 10240, root_mib * 2048)]))
        file.seek(MIB)
        file.write(boot.read_bytes())
        file.seek(5 * MIB)
        file.write(root.read_bytes())
        file.truncate((5 + root_mib) * MIB)
    return image


def block_map(image: Path, ranges: list[tuple[int, int]], block: int = 4096, **changed: str) -> str:
    """A map as bmaptool writes it, its checksums right unless `changed`: size, version, count, text."""
    data = image.read_bytes()
    rows = []
    for first, last in ranges:
        digest = hashlib.sha256(data[first * block : (last + 1) * block]).hexdigest()
        rows.append(f'        <Range chksum="{changed.get("range", digest)}"> {first if first == last else f"{first}-{last}"} </Range>')
    mapped = changed.get("count", str(sum(b - a + 1 for a, b in ranges)))
    size = int(changed.get("size", len(data)))
    text = f"""<?xml version="1.0" ?>
<bmap version="{changed.get("version", "2.0")}">
    <ImageSize> {size} </ImageSize>
    <BlockSize> {block} </BlockSize>
    <BlocksCount> {-(-size // block)} </BlocksCount>
    <MappedBlocksCount> {mapped} </MappedBlocksCount>
    <ChecksumType> sha256 </ChecksumType>
    <BmapFileChecksum> {"0" * 64} </BmapFileChecksum>
    <BlockMap>
{chr(10).join(rows)}
    </BlockMap>
</bmap>
"""
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1)


def machine(folder: Path) -> Machine:
    """A system with an SSD (root, swap), a USB stick sdb, an SD card mmcblk0 with two partitions, an empty reader sdc."""
    made = Machine(folder / "dev", folder / "sys", folder / "proc")
    (made.proc / "self").mkdir(parents=True)
    made.dev.mkdir()
    (made.proc / "self" / "mountinfo").write_text(
        "22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw\n30 22 0:5 / /dev rw - devtmpfs udev rw\n"
    )
    (made.proc / "swaps").write_text("Filename Type Size Used Priority\n")
    disk(made, "sda", "8:0", "pci0000/ata1", removable=0, parts={"sda1": "8:1", "sda2": "8:2"})
    disk(made, "sdb", "8:16", "pci0000/usb1/1-1")
    disk(made, "mmcblk0", "179:0", "pci0000/mmc_host/mmc0", removable=0, parts={"mmcblk0p1": "179:1", "mmcblk0p2": "179:2"})
    disk(made, "sdc", "8:32", "pci0000/usb1/1-2", sectors=0)
    return made


def disk(
    made: Machine, name: str, number: str, bus: str, removable: int = 1, sectors: int = 65536, parts: dict[str, str] | None = None
) -> Path:
    """One more disk; its device is a file of zeros."""
    place = made.sys / "devices" / bus / "block" / name
    (made.sys / "class" / "block").mkdir(parents=True, exist_ok=True)
    for folder, values in [(place, {"removable": removable, "ro": 0, "size": sectors, "dev": number})] + [
        (place / part, {"partition": i, "size": 1024, "dev": dev}) for i, (part, dev) in enumerate((parts or {}).items(), 1)
    ]:
        (folder / "holders").mkdir(parents=True)
        for key, value in values.items():
            (folder / key).write_text(f"{value}\n")
        (made.sys / "class" / "block" / folder.name).symlink_to(folder)
        (made.dev / folder.name).touch()
    (place / "device").mkdir()
    (place / "device" / "model").write_text(f"Card {name} \n")
    with (made.dev / name).open("wb") as file:
        file.truncate(sectors * 512)
    return place
