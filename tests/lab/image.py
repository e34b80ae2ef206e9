"""The emulated board's kernel, initramfs and disk: Debian's arm64 packages unpacked (nothing is executed), Python wheels for arm64, one ext4 image.

No root, no mount and no emulation is needed to build; the result is kept under the cache by the recipe's content.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgesdk.cache import cache_dir

PACKAGES = (
    "busybox-static", "dropbear-bin", "libtomcrypt1", "libtommath1", "libgmp10", "zlib1g", "libcrypt1", "libc6", "libgcc-s1", "libstdc++6",
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5", "libuuid1",
)  # fmt: skip
WHEELS = ("numpy==2.4.6", "ai-edge-litert==2.3.0", "flatbuffers", "typing-extensions")
MODULES = (
    "failover", "net_failover", "virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_mmio", "virtio_net",
    "virtio_blk", "crc32c_generic", "libcrc32c", "crc16", "mbcache", "jbd2", "ext4",
)  # fmt: skip
APPLETS = (
    "sh", "cat", "dd", "ls", "mkdir", "mv", "ln", "rm", "sha256sum", "df", "du", "readlink",
    "stat", "wc", "test", "[", "printf", "echo", "sleep", "sync", "hostname", "ifconfig", "route", "mount",
    "uname", "kill", "env", "tr", "head", "tail", "cut", "grep", "sed", "chmod", "cp", "find",
    "touch", "true", "false", "id", "tar", "gzip", "cmp", "dirname", "basename", "seq", "sort", "xargs",
    "awk", "date", "expr", "rmdir", "mktemp", "truncate", "od", "tee",
)  # fmt: skip
DISK_BYTES = 768 * 1024**2
DATA_BYTES = 48 * 1024**2
INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /new
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for pass in 1 2 3; do for m in $(cat /modules/order); do insmod /modules/$m.ko 2>/dev/null; done; done
for i in 1 2 3 4 5 6 7 8 9; do [ -b /dev/vda ] && break; sleep 0.1; done
mount -t ext4 -o ro /dev/vda /new
mount --move /dev /new/dev; mount --move /proc /new/proc; mount --move /sys /new/sys
mount -t tmpfs tmpfs /new/tmp; mount -t tmpfs -o size={DATA_BYTES} tmpfs /new/data; mount -t tmpfs tmpfs /new/root
mkdir -p /new/root/.ssh; cp /new/etc/lab_key.pub /new/root/.ssh/authorized_keys; chmod -R go= /new/root
exec switch_root /new /sbin/start
"""
START = """#!/bin/busybox sh
export PATH=/usr/local/bin:/usr/bin:/bin:/sbin:/usr/sbin HOME=/root
mkdir -p /dev/pts; mount -t devpts devpts /dev/pts
ifconfig lo 127.0.0.1 up; ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up; route add default gw 10.0.2.2
hostname board
mkdir -p /tmp/dropbear; /usr/sbin/dropbear -R -s -P /tmp/dropbear/pid
echo "BOARD-READY"
while true; do sleep 3600; done
"""


@dataclass(frozen=True)
class Image:
    """Paths of what qemu boots, and the private key that logs in as root."""

    kernel: Path
    initrd: Path
    disk: Path
    key: Path


def build() -> Image:
    """The image, from the cache when its recipe has not changed. Raises `CalledProcessError` when a package cannot be had."""
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    home = cache_dir("lab") / key
    image = Image(home / "vmlinuz", home / "initrd.gz", home / "disk.img", home / "key")
    if (home / "done").exists():
        return image
    shutil.rmtree(home, ignore_errors=True)
    work = home / "work"
    work.mkdir(parents=True)
    root = work / "root"
    _unpack(_download(work), root, work)
    shutil.copy(next((work / "kernel" / "boot").glob("vmlinuz*")), image.kernel)
    _wheels(root)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(image.key)], check=True)
    _complete(root, image.key.with_suffix(".pub"))
    _initramfs(work, root, image.initrd)
    with image.disk.open("wb") as disk:
        disk.truncate(DISK_BYTES)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", str(root), str(image.disk)], check=True)
    shutil.rmtree(work)
    (home / "done").touch()
    return image


def _download(work: Path) -> list[Path]:
    """arm64 packages through this machine's own apt sources, with an apt state of our own."""
    state = work / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()
    options = [
        "APT::Architecture=arm64", "APT::Architectures=arm64", f"Dir::State::Lists={state}/lists", f"Dir::State::status={state}/status",
        f"Dir::Cache={state}/cache", "APT::Sandbox::User=root", "Acquire::Languages=none", "Debug::NoLocking=1",
    ]  # fmt: skip
    flags = [word for o in options for word in ("-o", o)]
    subprocess.run(["apt-get", *flags, "-qq", "update"], check=True)
    depends = subprocess.run(["apt-cache", *flags, "depends", "linux-image-cloud-arm64"], check=True, capture_output=True, text=True).stdout
    kernel = next(line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line)
    into = work / "debs"
    into.mkdir()
    subprocess.run(["apt-get", *flags, "-qq", "download", *PACKAGES, kernel], check=True, cwd=into)
    return sorted(into.glob("*.deb"))


def _unpack(debs: list[Path], root: Path, work: Path) -> None:
    root.mkdir()
    for deb in debs:
        target = work / "kernel" if deb.name.startswith("linux-image") else root
        subprocess.run(["dpkg", "-x", str(deb), str(target)], check=True)


def _wheels(root: Path) -> None:
    platforms = [f"manylinux_2_{n}_aarch64" for n in (28, 27, 17)] + ["manylinux2014_aarch64"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.11",
        "--implementation",
        "cp",
    ]
    command += [word for p in platforms for word in ("--platform", p)]
    subprocess.run([*command, "--target", str(root / "usr/lib/python3/dist-packages"), *WHEELS], check=True)


def _complete(root: Path, public_key: Path) -> None:
    for folder in ("proc", "sys", "dev", "tmp", "data", "root", "etc/dropbear", "usr/local/bin", "sbin", "bin"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for applet in APPLETS:
        if not (root / "bin" / applet).exists():
            (root / "bin" / applet).symlink_to("/bin/busybox")
    (root / "usr/bin/python3").symlink_to("python3.11")
    (root / "sbin/start").write_text(START)
    (root / "sbin/start").chmod(0o755)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/shells").write_text("/bin/sh\n")
    (root / "etc/nsswitch.conf").write_text("passwd: files\n")
    shutil.copy(public_key, root / "etc/lab_key.pub")
    # dropbear makes its host key on the first connection: the disk is read-only, so the folder is in memory
    shutil.rmtree(root / "etc/dropbear")
    (root / "etc/dropbear").symlink_to("/tmp/dropbear")


def _initramfs(work: Path, root: Path, target: Path) -> None:
    tree = work / "initramfs"
    (tree / "bin").mkdir(parents=True)
    (tree / "modules").mkdir()
    shutil.copy(root / "bin/busybox", tree / "bin/busybox")
    order = []
    for name in MODULES:
        found = next((work / "kernel").rglob(f"{name}.ko"), None)
        if found:
            shutil.copy(found, tree / "modules" / f"{name}.ko")
            order.append(name)
    (tree / "modules/order").write_text("\n".join(order) + "\n")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    names = "\n".join(os.path.relpath(p, tree) for p in sorted(tree.rglob("*"))) + "\n"
    packed = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet", "-R", "0:0"], input=names.encode(), cwd=tree, check=True, capture_output=True
    ).stdout
    target.write_bytes(gzip.compress(packed, 1))
