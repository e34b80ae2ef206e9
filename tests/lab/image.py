"""The emulated board's kernel, initramfs and disk: Debian's arm64 packages unpacked (nothing is executed), Python wheels for arm64, one ext4 image.

No root, no mount and no emulation is needed to build; the result is kept under the cache by the recipe's content.
The packages are Debian 12's: this machine's own apt sources must offer them for arm64.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgesdk.cache import cache_dir

PACKAGES = (
    "busybox-static", "dropbear-bin", "libtomcrypt1", "libtommath1", "libgmp10", "zlib1g", "libcrypt1", "libc6", "libgcc-s1", "libstdc++6",
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5", "libuuid1",
)  # fmt: skip
WHEELS = ("numpy==2.4.6", "ai-edge-litert==2.3.0", "flatbuffers==25.12.19", "typing-extensions==4.12.2")
MODULES = (
    "failover", "net_failover", "virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_mmio", "virtio_net",
    "virtio_blk", "crc32c_generic", "libcrc32c", "crc16", "mbcache", "jbd2", "ext4",
)  # fmt: skip
APPLETS = (
    "sh", "cat", "dd", "ls", "mkdir", "mv", "ln", "rm", "sha256sum", "df", "du", "readlink",
    "stat", "wc", "test", "[", "printf", "echo", "sleep", "sync", "hostname", "ifconfig", "route", "mount",
    "uname", "kill", "env", "tr", "head", "tail", "cut", "grep", "sed", "chmod", "cp", "find",
    "touch", "true", "false", "id", "tar", "gzip", "cmp", "dirname", "basename", "seq", "sort", "xargs",
    "awk", "date", "expr", "rmdir", "mktemp", "truncate", "od", "tee", "umount", "ps", "dmesg",
)  # fmt: skip
DISK_BYTES = 768 * 1024**2
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /new
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for pass in 1 2 3; do for m in $(cat /modules/order); do insmod /modules/$m.ko 2>/dev/null; done; done
for i in 1 2 3 4 5 6 7 8 9; do [ -b /dev/vda ] && break; sleep 0.1; done
mount -t ext4 -o ro /dev/vda /new
mount --move /dev /new/dev; mount --move /proc /new/proc; mount --move /sys /new/sys
size=48M; for w in $(cat /new/proc/cmdline); do case $w in lab.data=*) size=${w#lab.data=};; esac; done
mount -t tmpfs tmpfs /new/tmp; mount -t tmpfs tmpfs /new/root
if [ -b /new/dev/vdb ]; then mount -t ext4 /new/dev/vdb /new/data; else mount -t tmpfs -o size=$size tmpfs /new/data; fi
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


def _silent(_: str) -> None:
    """Where progress goes when nobody listens."""


class LabError(RuntimeError):
    """The board cannot be had here: what failed, then what to do."""


def build(say: Callable[[str], None] = _silent) -> Image:
    """The image, from the cache when its recipe has not changed; one process builds, others wait for it. Raises `LabError`."""
    key = hashlib.sha256(Path(__file__).read_bytes() + b"%d.%d" % sys.version_info[:2]).hexdigest()[:16]
    home = cache_dir("lab") / key
    with (cache_dir("lab") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            with tempfile.TemporaryDirectory(prefix="making-", dir=home.parent) as folder:
                made = Path(folder) / "image"
                _build(made, Path(folder), say)
                made.rename(home)
    return _paths(home)


def _paths(home: Path) -> Image:
    return Image(home / "vmlinuz", home / "initrd.gz", home / "disk.img", home / "key")


def _build(home: Path, work: Path, say: Callable[[str], None]) -> None:
    home.mkdir()
    image, root = _paths(home), work / "root"
    debs = _download(work, say)
    say(f"unpacking {len(debs)} packages")
    _unpack(debs, root, work)
    shutil.copy(next((work / "kernel" / "boot").glob("vmlinuz*")), image.kernel)
    say(f"wheels for arm64: {', '.join(WHEELS)}")
    _wheels(root)
    _run("making a key", ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(image.key)])
    _complete(root, image.key.with_suffix(".pub"))
    say("byte code, initramfs and disk")
    _byte_code(root)
    _initramfs(work, root, image.initrd)
    with image.disk.open("wb") as disk:
        disk.truncate(DISK_BYTES)
    _run("writing the disk image", ["/sbin/mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", str(root), str(image.disk)])


def _run(what: str, argv: Sequence[str], hint: str = "", cwd: Path | None = None) -> str:
    """The command's output. Raises `LabError` with the end of what it said."""
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, timeout=900)
    except FileNotFoundError:
        raise LabError(f"{what}: {argv[0]} is not installed\n  hint: run .ci/board-packages as root") from None
    if done.returncode != 0:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-5:])
        raise LabError(f"{what}: `{' '.join(argv[:3])} …` ended with {done.returncode}:\n{said}" + (f"\n  hint: {hint}" if hint else ""))
    return done.stdout


def _download(work: Path, say: Callable[[str], None]) -> list[Path]:
    """arm64 packages through this machine's own apt sources, with an apt state of our own."""
    state, into = work / "apt", work / "debs"
    for folder in (state / "lists/partial", state / "cache/archives/partial", into):
        folder.mkdir(parents=True)
    (state / "status").touch()
    options = [
        "APT::Architecture=arm64", "APT::Architectures=arm64", f"Dir::State::Lists={state}/lists", f"Dir::State::status={state}/status",
        f"Dir::Cache={state}/cache", "APT::Sandbox::User=root", "Acquire::Languages=none", "Acquire::Retries=3", "Debug::NoLocking=1",
    ]  # fmt: skip
    flags = [word for o in options for word in ("-o", o)]
    hint = "this machine's apt sources must be Debian 12's and reachable"
    say("Debian's list of arm64 packages")
    _run("reading the list of arm64 packages", ["apt-get", *flags, "-qq", "update"], hint)
    depends = _run("looking for a kernel", ["apt-cache", *flags, "depends", "linux-image-cloud-arm64"], hint)
    kernel = next((line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line), None)
    if kernel is None:
        raise LabError(f"no arm64 kernel package is known here\n  hint: {hint}")
    say(f"fetching {kernel} and {len(PACKAGES)} packages, 40 MB")
    _run("fetching arm64 packages", ["apt-get", *flags, "-qq", "download", *PACKAGES, kernel], hint, into)
    return sorted(into.glob("*.deb"))


def _unpack(debs: list[Path], root: Path, work: Path) -> None:
    root.mkdir()
    for deb in debs:
        _run("unpacking", ["dpkg", "-x", str(deb), str(work / "kernel" if deb.name.startswith("linux-image") else root)])


def _wheels(root: Path) -> None:
    platforms = [f"manylinux_2_{n}_aarch64" for n in (28, 27, 17)] + ["manylinux2014_aarch64"]
    command = [
        sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--only-binary=:all:", "--python-version", "3.11",
        "--implementation", "cp", *(word for p in platforms for word in ("--platform", p)),
    ]  # fmt: skip
    hint = "pip's package index must be reachable"
    _run("fetching wheels", [*command, "--target", str(root / "usr/lib/python3/dist-packages"), *WHEELS], hint)


def _byte_code(root: Path) -> None:
    """Compile what the board imports (its disk is read-only): only Python 3.11's byte code is of use there."""
    if sys.version_info[:2] != (3, 11):
        return
    library = root / "usr/lib"
    for name in ("test", "lib2to3", "idlelib", "tkinter", "pydoc_data", "ensurepip"):
        shutil.rmtree(library / "python3.11" / name, ignore_errors=True)
    command = [sys.executable, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash", "-x", r"/tests?/"]
    subprocess.run([*command, str(library / "python3.11"), str(library / "python3")], capture_output=True, check=False)


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
    command = ["cpio", "-o", "-H", "newc", "--quiet", "-R", "0:0"]
    packed = subprocess.run(command, input=names.encode(), cwd=tree, check=True, capture_output=True).stdout
    target.write_bytes(gzip.compress(packed, 1))
