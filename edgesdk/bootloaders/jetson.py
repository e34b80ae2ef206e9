"""Jetson boards through NVIDIA's own flasher: a bundle and its first check are put into its root file system, then its tool writes the board.

    jetson:/path/Linux_for_Tegra?board=jetson-orin-nano-devkit[&storage=nvme0n1p1&usb=1-6&timeout=60min&root=/var/lib/edgesdk]

The commands: Jetson Linux Developer Guide, "Quick Start" and "Flashing Support"; recovery mode's USB ids: tools/kernel_flash/l4t_initrd_flash.sh.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgesdk.bootloaders.flasher import run
from edgesdk.bootloaders.rootfs import Tree
from edgesdk.bootloaders.types import BoardWrite, Payload, Watch, Where, parse_where
from edgesdk.errors import DeviceError, InputError, UnknownName
from edgesdk.image import contents
from edgesdk.image.files import File
from edgesdk.units import parse_seconds, show_bytes

OPTIONS = ("board", "storage", "usb", "timeout", "root", "python")
NVIDIA = "0955"
MODULES = {
    "7f21": "Nano", "7018": "TX2", "7418": "TX2", "7c18": "TX2", "7019": "AGX Xavier", "7819": "AGX Xavier", "7919": "AGX Xavier", "7e19": "Xavier NX",
    "7023": "AGX Orin", "7223": "AGX Orin 32GB", "7323": "Orin NX 16GB", "7423": "Orin NX 8GB", "7523": "Orin Nano 8GB", "7623": "Orin Nano 4GB",
    "7026": "AGX Thor",
}  # fmt: skip
"""Product id in recovery mode → module."""
_FAMILIES = (
    ("orin-nano", "Orin N"),
    ("orin-nx", "Orin N"),
    ("agx-orin", "AGX Orin"),
    ("agx-xavier", "AGX Xavier"),
    ("xavier-nx", "Xavier NX"),
    ("agx-thor", "AGX Thor"),
)
"""What a board's name holds → how the modules that sit on it begin."""


@dataclass(frozen=True)
class Recovery:
    """A Jetson in recovery mode."""

    port: str  # as USB names it: bus and path, "1-6"
    product: str
    module: str

    def __str__(self) -> str:
        return f"{self.module} in recovery mode at USB {self.port} ({NVIDIA}:{self.product})"


def in_recovery(sysfs: Path = Path("/sys")) -> list[Recovery]:
    """The Jetsons in recovery mode that are plugged in."""
    found = []
    for device in sorted((sysfs / "bus/usb/devices").glob("*")):
        vendor, product = (_line(device / name) for name in ("idVendor", "idProduct"))
        if vendor == NVIDIA and product in MODULES:
            found.append(Recovery(device.name, product, MODULES[product]))
    return found


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def write_jetson(to: str, payload: Payload, *, dry_run: bool = False, watch: Watch | None = None, sysfs: Path = Path("/sys")) -> BoardWrite:
    """Put the bundle into NVIDIA's root file system and flash the board. Raises `InputError`, `MissingTool`, `DeviceError` or `LinkError`."""
    where = parse_where(to, OPTIONS)
    source = payload.source
    if source is None:
        raise InputError(f"{to}: a Jetson gets a bundle", "the system itself is what lies in NVIDIA's folder; leave --firmware out")
    folder, board = Path(where.path), where.options.get("board", "")
    release = _folder(folder, board)
    timeout_s = parse_seconds(where.options.get("timeout", "60min"))
    argv = _command(where, folder, board, release)
    found = in_recovery(sysfs)
    problem = _fits(found, board, where.options.get("usb"))
    root = where.options.get("root", contents.ROOT)
    if not root.startswith("/") or os.path.normpath(root) != root or root == "/":
        raise InputError(f"{to}: root={root}: not a whole path", f"write it like {contents.ROOT}")
    tree = Tree(folder / "rootfs")
    entries = contents.entries(
        source, tree, root, python=where.options.get("python", "python3"), signer=payload.signer.id if payload.signer else None
    )
    files = [e for e in entries if isinstance(e, File)]
    size = sum(e.blob.size_bytes for e in files)
    steps = (
        f"check  {folder}: Jetson Linux {release}, {board}.conf, a root file system",
        "find   a Jetson in recovery mode"
        + (f" at USB {where.options['usb']}" if "usb" in where.options else "")
        + (f": {', '.join(map(str, found))}" if found else ""),
        *(f"put    {e}" for e in entries if not (isinstance(e, File) and "/golden/" in e.path)),
        f"put    in all {len(files)} files, {show_bytes(size)}; the first boot checks the bundle's outputs there and makes it current",
        f"run    {' '.join(_shown(a) for a in argv)}  # in {folder}, as root",
    )
    answer = BoardWrite(
        action="dry-run", to=to, board=f"{board}, Jetson Linux {release}" + (f"; {found[0]}" if len(found) == 1 else ""),
        payload=f"bundle {source.path.name} ({source.manifest.model_name})", size_bytes=size, sha256=source.digest, signer=payload.signed_by,
        steps=steps, notes=(f"now: {problem.what}",) if problem else (),
    )  # fmt: skip
    if dry_run:
        return answer
    if not _is_root():
        raise InputError(
            f"{to}: the files of {tree.folder} and NVIDIA's flasher want root", "sudo -E " + 'env PATH="$PATH" edgesdk flash …'
        )
    if problem:
        raise problem
    gone = tree.forget(root, source.digest)
    tree.put(entries)
    success = run(argv, folder, timeout_s, watch)
    notes = (*(f"an older bundle was taken out of {tree.folder}: {d[:12]}" for d in gone),
             *(() if success else ("NVIDIA's flasher ended with code 0 and did not say that it was successful",)))  # fmt: skip
    verified = f"by NVIDIA's flasher ({success or 'code 0'}); the bundle is checked by its first boot: edgesdk flash --status --on ssh://…?root={root}"
    return answer.model_copy(update={"action": "written", "verified": verified, "notes": notes})


def _is_root() -> bool:
    return os.geteuid() == 0


def _shown(argument: str) -> str:
    return f'"{argument}"' if " " in argument else argument


def _folder(folder: Path, board: str) -> str:
    """The release in NVIDIA's folder, "36.4.3". Raises `InputError` for what is missing."""
    if not (folder / "flash.sh").is_file():
        raise InputError(f"{folder}: no flash.sh there", "give the folder Linux_for_Tegra that NVIDIA's Jetson Linux unpacks to")
    boards = sorted(p.name.removesuffix(".conf") for p in folder.glob("*.conf"))
    if not board:
        raise InputError(f"{folder}: which board?", f"?board=… is one of: {', '.join(boards[:12]) or 'none: unpack Jetson Linux again'}")
    if board not in boards:
        raise UnknownName("board", board, boards)
    if not (folder / "rootfs/etc/os-release").exists() and not (folder / "rootfs/etc/os-release").is_symlink():
        raise InputError(
            f"{folder}/rootfs: no root file system there", "unpack the sample root file system into it, as root, then run apply_binaries.sh"
        )
    text = _line(folder / "rootfs/etc/nv_tegra_release")
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    if not found:
        raise InputError(f"{folder}/rootfs/etc/nv_tegra_release: tells no release", "run NVIDIA's script: sudo ./apply_binaries.sh")
    return f"{found[1]}.{found[2]}"


def _command(where: Where, folder: Path, board: str, release: str) -> list[str]:
    """NVIDIA's own command for this storage. Raises `InputError` where its folder lacks what that needs."""
    storage = where.options.get("storage", "internal")
    usb = ["--usb-instance", where.options["usb"]] if "usb" in where.options else []
    if not re.fullmatch(r"internal|mmcblk\d+p\d+|nvme\d+n\d+p\d+|sd[a-z]\d+", storage):
        raise InputError(
            f"{where.text}: storage={storage}: not a partition of a Jetson's storage", "internal, mmcblk0p1, nvme0n1p1 or sda1"
        )
    if storage == "internal" or storage.startswith("mmcblk"):
        if int(release.split(".")[0]) >= 38:  # flash.sh writes no board by itself any more
            return [_needed(folder, "l4t_initrd_flash.sh", "tools/kernel_flash/l4t_initrd_flash.sh"), *usb, board, storage]
        return ["./flash.sh", *usb, board, storage]
    script = _needed(folder, "tools/kernel_flash/l4t_initrd_flash.sh", "l4t_initrd_flash.sh")
    layout = _needed(folder, "tools/kernel_flash/flash_l4t_t234_nvme.xml", "tools/kernel_flash/flash_l4t_external.xml")
    boot = _needed(folder, "bootloader/generic/cfg/flash_t234_qspi.xml", "bootloader/t186ref/cfg/flash_t234_qspi.xml")
    return [
        script,
        *usb,
        "--external-device",
        storage,
        "-c",
        layout.removeprefix("./"),
        "-p",
        f"-c {boot.removeprefix('./')}",
        "--network",
        "usb0",
        board,
        "internal",
    ]


def _needed(folder: Path, *names: str) -> str:
    for name in names:
        if (folder / name).is_file():
            return f"./{name}"
    raise InputError(
        f"{folder}/{names[0]}: not there", "unpack NVIDIA's Jetson Linux again; boards before Orin are flashed with ?storage=mmcblk0p1"
    )


def _fits(found: list[Recovery], board: str, usb: str | None) -> DeviceError | InputError | None:
    """What speaks against the boards that are plugged in, if anything does."""
    mine = [r for r in found if usb in (None, r.port)]
    if not mine:
        at = f" at USB {usb}" if usb else ""
        return DeviceError(
            f"no Jetson in recovery mode{at}",
            "connect its USB port for flashing, hold RECOVERY, tap RESET, let go; `edgesdk devices ports` shows it",
        )
    if len(mine) > 1:
        return DeviceError(f"{len(mine)} Jetsons are in recovery mode: {', '.join(r.port for r in mine)}", "name one: ?usb=" + mine[0].port)
    begins = next((begin for part, begin in _FAMILIES if part in board), "")
    if not mine[0].module.startswith(begins):
        return InputError(f"the board in recovery mode is a {mine[0].module}, {board} is for another", "give its own ?board=")
    return None
