"""A disk image that boots by itself: U-Boot reads kernel and initramfs from it, the root file system is the emulated board's with busybox's init.

`os_image`: MBR; partition 1 FAT (extlinux.conf, kernel, initramfs), partition 2 ext4. `slot_images`: a disk with two slots, each with its own kernel,
and images for them. Built without root and without a mount, kept under the cache.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from edgesdk.cache import cache_dir
from edgesdk.image import uboot
from edgesdk.image.files import Entry, ExtFiles, File, Folder, Symlink
from edgesdk.image.partitions import partitions
from edgesdk.transport.base import Blob
from tests.lab import board
from tests.lab.image import Image, LabError, _run, build

UBOOT = Path("/usr/lib/u-boot/qemu_arm64/u-boot.bin")
TOOLS = (*board.TOOLS, "sfdisk", "mkfs.vfat", "mcopy", "debugfs", "resize2fs", "mkimage")
MIB = 1 << 20
FAT_MIB, ROOT_MIB, SLOT_MIB = 48, 288, 84
ENV = (uboot.Place("/dev/vda", 0x10000, 0x2000), uboot.Place("/dev/vda", 0x20000, 0x2000))
APPEND = "console=ttyAMA0 quiet panic=1 mitigations=off"
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /new
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for pass in 1 2 3; do for m in $(cat /modules/order); do insmod /modules/$m.ko 2>/dev/null; done; done
for w in $(cat /proc/cmdline); do case $w in root=*) root=${w#root=};; esac; done
for i in 1 2 3 4 5 6 7 8 9; do [ -b $root ] && break; sleep 0.1; done
mount -t ext4 $root /new || { echo "NO-ROOT $root"; sleep 1; reboot -f; }
mount --move /dev /new/dev; mount --move /proc /new/proc; mount --move /sys /new/sys
exec switch_root /new /sbin/init
"""
INITTAB = "::sysinit:/etc/init.d/rcS\n::respawn:/bin/sleep 3600\n::ctrlaltdel:/bin/busybox reboot\n"
RCS = """#!/bin/sh
export PATH=/usr/local/bin:/usr/bin:/bin:/sbin:/usr/sbin HOME=/root
mount -t tmpfs tmpfs /tmp; mkdir -p /dev/pts; mount -t devpts devpts /dev/pts
ifconfig lo 127.0.0.1 up; ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up; route add default gw 10.0.2.2
[ ! -b /dev/vda4 ] || mount -t ext4 /dev/vda4 /data; mkdir -p /tmp/dropbear /data/dropbear
mkdir -p /root/.ssh; cp /etc/lab_key.pub /root/.ssh/authorized_keys; chmod -R go= /root
/usr/sbin/dropbear -R -s -P /tmp/dropbear.pid
for s in /etc/init.d/S??*; do [ -x "$s" ] && "$s" start; done
echo "BOARD-READY"
"""


def missing() -> str | None:
    """What to run when such a disk cannot be made or started here, else None."""
    path = ":".join(("/usr/sbin", "/sbin", "/usr/bin", "/bin"))
    absent = [t for t in TOOLS if not shutil.which(t) and not shutil.which(t, path=path)] + ([] if UBOOT.exists() else [str(UBOOT)])
    return f"{', '.join(absent)} not found\n  hint: run .ci/board-packages as root, then `make board`" if absent else None


def os_image() -> Path:
    """The disk image. Raises `LabError`."""
    return _kept() / "os.img"


def slot_images() -> dict[str, Path]:
    """ "disk" with slots A and B, and "good" and "broken" for a slot: the latter's system panics. Raises `LabError`."""
    return {name: _kept() / f"{name}.img" for name in ("disk", "good", "broken")}


def _kept() -> Path:
    """The images, from the cache when their recipe has not changed; one process builds, others wait for it."""
    parts = build()
    key = hashlib.sha256(Path(__file__).read_bytes() + Path(uboot.__file__).read_bytes() + parts.disk.parent.name.encode()).hexdigest()[:16]
    home = cache_dir("lab") / f"disk-{key}"
    with (cache_dir("lab") / "disk.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            with tempfile.TemporaryDirectory(prefix="making-", dir=home.parent) as folder:
                made = Path(folder) / "disk"
                made.mkdir()
                _build(made / "os.img", parts, Path(folder))
                _build_slots(made, parts, Path(folder))
                made.rename(home)
    return home


def _build(image: Path, parts: Image, work: Path) -> None:
    root, fat = work / "root.ext4", work / "boot.fat"
    _run("copying the root", ["cp", "--sparse=always", str(parts.disk), str(root)])
    _run("checking the root", ["/sbin/e2fsck", "-fy", str(root)])
    _run("making the root smaller", ["/sbin/resize2fs", str(root), f"{ROOT_MIB}M"])
    with root.open("r+b") as file:
        file.truncate(ROOT_MIB * MIB)
    make_bootable(root)
    initrd = work / "initrd.gz"
    initrd.write_bytes(initramfs(parts, work))
    (work / "extlinux.conf").write_text(
        f"default board\nlabel board\n kernel /vmlinuz\n initrd /initrd.gz\n append {APPEND} root=/dev/vda2\n"
    )
    _run("making FAT", ["/sbin/mkfs.vfat", "-n", "BOOT", "-C", str(fat), str(FAT_MIB * 1024)])
    _run("making FAT", ["mmd", "-i", str(fat), "::/extlinux"])
    for source, name in ((parts.kernel, "vmlinuz"), (initrd, "initrd.gz"), (work / "extlinux.conf", "extlinux/extlinux.conf")):
        _run(f"writing {name}", ["mcopy", "-i", str(fat), str(source), f"::/{name}"])
    assemble(image, [(fat, "c", True), (root, "83", False)])


def _build_slots(made: Path, parts: Image, work: Path) -> None:
    """Slots of 84 MiB: the board's system without its wheels, with kernel and initramfs; a fourth partition at /data for what both share."""
    tree, slot = work / "tree", work / "slot.ext4"
    tree.mkdir()
    _run("unpacking the root", ["/sbin/debugfs", "-R", f"rdump / {tree}", str(parts.disk)])
    for folder in (
        "python3/dist-packages",
        "aarch64-linux-gnu/gconv",
        "aarch64-linux-gnu/perl-base",
        "python3.11/asyncio",
        "python3.11/unittest",
    ):
        shutil.rmtree(tree / "usr/lib" / folder, ignore_errors=True)
    shutil.rmtree(tree / "lost+found")
    (tree / "etc/dropbear").unlink()
    (tree / "etc/dropbear").symlink_to("/data/dropbear")
    (tree / "etc/fw_env.config").write_text("".join(f"{p.device} {p.offset:#x} {p.size:#x}\n" for p in ENV))
    (tree / "boot").mkdir()
    shutil.copy(parts.kernel, tree / "boot/vmlinuz")
    (tree / "boot/initrd.gz").write_bytes(initramfs(parts, work))
    _run("making a slot", ["/sbin/mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", str(tree), str(slot), f"{SLOT_MIB}M"])
    make_bootable(slot)
    good, broken, data, fat = made / "good.img", made / "broken.img", work / "data", work / "slots.fat"
    for image, entry in ((good, File("/etc/version", Blob.of(b"2\n"))), (broken, Symlink("/sbin/init", "/nothing"))):
        _run("copying a slot", ["cp", "--sparse=always", str(slot), str(image)])
        ExtFiles(image, partitions(image)[0]).put([entry])
    _run("making /data", ["/sbin/mkfs.ext4", "-q", "-F", str(data), "16M"])
    script = uboot.boot_script("/dev/vda", (2, 3), APPEND, ENV)
    (work / "boot.scr").write_bytes(uboot.script_image(script))
    _run("making FAT", ["/sbin/mkfs.vfat", "-C", str(fat), "4096"])
    _run("writing boot.scr", ["mcopy", "-i", str(fat), str(work / "boot.scr"), "::/boot.scr"])
    assemble(made / "disk.img", [(fat, "c", True), (slot, "83", False), (slot, "83", False), (data, "83", False)])
    with (made / "disk.img").open("r+b") as file:
        start = {"slot_disk": "/dev/vda", "slot_A": "2", "slot_B": "3", "boot_slot": "A", "slot_args": APPEND}
        file.seek(ENV[0].offset)
        file.write(uboot.encode(start, ENV[0].size, 1))


def make_bootable(root: Path) -> None:
    """busybox's init and its start script in the board's root file system."""
    script = {"/etc/init.d/rcS": (RCS, 0o755), "/etc/inittab": (INITTAB, 0o644)}
    files: list[Entry] = [File(name, Blob.of(text.encode()), mode=mode) for name, (text, mode) in script.items()]
    folders = [Folder(f) for f in ("/etc/init.d", "/var", "/var/lib", "/boot")]
    ExtFiles(root, partitions(root)[0]).put([*folders, *files, Symlink("/sbin/init", "/bin/busybox")])


def initramfs(parts: Image, work: Path) -> bytes:
    """The board's initramfs with another /init behind it: of two archives in a row the later one counts."""
    tree = work / "initramfs"
    tree.mkdir(exist_ok=True)
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    command = ["cpio", "-o", "-H", "newc", "--quiet", "-R", "0:0"]
    return parts.initrd.read_bytes() + gzip.compress(
        subprocess.run(command, input=b"init\n", cwd=tree, check=True, capture_output=True).stdout
    )


def assemble(image: Path, contents: list[tuple[Path, str, bool]]) -> None:
    """A disk image with an MBR and these partitions (file, type, bootable), the first at 1 MiB."""
    at, lines = 1, ["label: dos", "label-id: 0xed6e5d10"]
    for content, kind, bootable in contents:
        size = -(-content.stat().st_size // MIB)
        lines.append(f"start={at}MiB, size={size}MiB, type={kind}{', bootable' if bootable else ''}")
        _run("placing a partition", ["dd", f"if={content}", f"of={image}", "bs=1M", f"seek={at}", "conv=sparse,notrunc", "status=none"])
        at += size
    with image.open("r+b") as file:
        file.truncate((at + 1) * MIB)
    done = subprocess.run(["/sbin/sfdisk", "-q", str(image)], input="\n".join(lines), capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"sfdisk: {done.stderr}")


class DiskBoard(board.Board):
    """A board with U-Boot as its firmware that boots from the disk image `disk_file`, and writes to it; its address is `url`."""

    def __init__(self, disk_file: Path, root: str = "/var/lib/edgesdk") -> None:
        super().__init__()
        self.disk_file, self.root = disk_file, root

    def _command(self) -> list[str]:
        return [
            "setpriv", "--pdeathsig", "KILL",
            "qemu-system-aarch64", "-M", "virt", "-cpu", self.cpu, "-smp", "2", "-m", str(self.memory_mb), "-display", "none", "-nodefaults",
            "-bios", str(UBOOT), "-drive", f"if=none,id=d,file={self.disk_file},format=raw", "-device", "virtio-blk-pci,drive=d",
            "-netdev", f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22", "-device", "virtio-net-pci,netdev=n,romfile=",
            "-serial", "stdio", "-monitor", "none",
        ]  # fmt: skip

    def _url(self, port: int) -> str:
        return super()._url(port).replace("root=/data/edgesdk", f"root={self.root}")
