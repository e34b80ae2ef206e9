"""Jetson: a stand-in of NVIDIA's folder whose scripts print what the real ones print; what is put into its root file system, and how failures are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_bundle
from typer.testing import CliRunner

from edgesdk.bootloaders import flasher, jetson
from edgesdk.bootloaders.rootfs import Tree
from edgesdk.bootloaders.types import read_payload
from edgesdk.bundles import bundle_digest
from edgesdk.cli import app
from edgesdk.errors import DeviceError, EdgeError, InputError, LinkError, MissingTool, UnknownName
from edgesdk.image.files import File, Folder, Symlink
from edgesdk.transport.base import Blob

BANNER = """###############################################################################
# L4T BSP Information:
# R36 , REVISION: 4.3
# User release: 0.0
###############################################################################
"""
FLASHED = (
    BANNER
    + "[  12.1 ] Flashing completed\\n\n*** The target generic has been flashed successfully. ***\nReset the board to boot from internal eMMC.\n"
)
INITRD = """Step 1: Build the flashing environment
Finish generating flash package.
Step 2: Boot the device with flash initrd image
Waiting for target to boot-up...
Step 3: Start the flashing process
Waiting for device to expose ssh ......Run command: flash on fc00:1:1:0::2
SSH ready
Starting to flash to qspi
Flash is successful
Reboot device
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("jetson") / "tiny.edge"
    tiny_bundle(path)
    return path


@pytest.fixture
def l4t(tmp_path) -> Path:
    """Linux_for_Tegra after apply_binaries.sh, as far as it is looked at."""
    folder = tmp_path / "Linux_for_Tegra"
    script = '#!/bin/sh\necho "$0 $* as $USER" >> ran\ncat says\nexit "$(cat code)"\n'
    for name in ("flash.sh", "tools/kernel_flash/l4t_initrd_flash.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(script.replace("cat says", f"cd {folder}; cat says"))
        (folder / name).chmod(0o755)
    for name in ("jetson-orin-nano-devkit.conf", "jetson-agx-orin-devkit.conf", "tools/kernel_flash/flash_l4t_t234_nvme.xml",
                 "bootloader/generic/cfg/flash_t234_qspi.xml", "rootfs/usr/lib/systemd/systemd", "rootfs/usr/bin/python3.10", "rootfs/usr/lib/os-release"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    root = folder / "rootfs"
    (root / "etc").mkdir()
    (root / "etc/os-release").symlink_to("../usr/lib/os-release")
    (root / "etc/nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n# KERNEL_VARIANT: oot\n"
    )
    (root / "usr/bin/python3").symlink_to("python3.10")
    (root / "lib").symlink_to("usr/lib")
    (root / "var").symlink_to("/data/var")  # absolute: of the board, never of this machine
    (root / "data/var/lib").mkdir(parents=True)
    (folder / "says").write_text(FLASHED)
    (folder / "code").write_text("0")
    return folder


def usb(tmp_path: Path, *devices: tuple[str, str, str]) -> Path:
    """A /sys with USB devices: name, vendor, product."""
    for name, vendor, product in (("usb1", "1d6b", "0002"), *devices):
        place = tmp_path / "sys/bus/usb/devices" / name
        place.mkdir(parents=True)
        (place / "idVendor").write_text(vendor + "\n")
        (place / "idProduct").write_text(product + "\n")
    return tmp_path / "sys"


@pytest.fixture
def sysfs(tmp_path) -> Path:
    return usb(tmp_path, ("1-6", "0955", "7523"), ("1-7", "0955", "7020"))


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.setattr(jetson, "_is_root", lambda: True)


def write(l4t: Path, bundle: Path, sysfs: Path, options: str = "board=jetson-orin-nano-devkit", **more: object):
    return jetson.write_jetson(f"jetson:{l4t}?{options}", read_payload(str(bundle), None, micro=False), sysfs=sysfs, **more)  # type: ignore[arg-type]


def test_a_bundle_is_put_into_the_root_file_system_and_the_board_is_flashed(l4t, bundle, sysfs):
    seen: list[tuple[str, float]] = []
    answer = write(l4t, bundle, sysfs, watch=lambda text, share: seen.append((text, share)))
    assert (
        answer.action == "written"
        and "Orin Nano 8GB in recovery mode at USB 1-6" in answer.board
        and "flashed successfully" in answer.verified
    )
    assert (l4t / "ran").read_text().startswith("./flash.sh jetson-orin-nano-devkit internal")
    home, digest = l4t / "rootfs/data/var/lib/edgesdk", bundle_digest(bundle)
    assert (home / f"store/{digest}/model.tflite").is_file() and (home / f"store/{digest}/manifest.json").is_file()
    assert (home / "first-boot.pending").read_text().split()[0] == digest and (home / "first_boot.py").is_file()
    unit = l4t / "rootfs/etc/systemd/system/edgesdk-first-boot.service"
    assert "/usr/bin/python3 -B /data/var/lib/edgesdk/first_boot.py" in unit.read_text()
    assert os.readlink(unit.parent / "multi-user.target.wants" / unit.name) == f"../{unit.name}"
    assert "flashed successfully" in (l4t / "edgesdk-flash.log").read_text() and seen[-1][0].startswith("Reset the board")
    other = bundle.with_name("other.edge")
    tiny_bundle(other, seed=5)
    again = write(l4t, other, sysfs)
    assert [p.name for p in (home / "store").iterdir()] == [bundle_digest(other)] and digest[:12] in again.notes[0]


def test_external_storage_goes_through_the_initrd_flasher(l4t, bundle, sysfs):
    (l4t / "says").write_text(INITRD)
    seen: list[float] = []
    answer = write(
        l4t, bundle, sysfs, "board=jetson-orin-nano-devkit&storage=nvme0n1p1&usb=1-6", watch=lambda text, share: seen.append(share)
    )
    assert "Flash is successful" in answer.verified and seen == sorted(seen) and seen[-1] > 0.9
    ran = (l4t / "ran").read_text()
    assert "--usb-instance 1-6 --external-device nvme0n1p1 -c tools/kernel_flash/flash_l4t_t234_nvme.xml" in ran
    assert "-p -c bootloader/generic/cfg/flash_t234_qspi.xml --network usb0 jetson-orin-nano-devkit internal" in ran
    if os.geteuid() == 0:
        assert ran.strip().endswith("as root")
    (l4t / "rootfs/etc/nv_tegra_release").write_text("# R38 (release), REVISION: 2.0, GCID: 1\n")
    write(l4t, bundle, sysfs)
    assert "l4t_initrd_flash.sh jetson-orin-nano-devkit internal" in (l4t / "ran").read_text().splitlines()[-1]


def test_a_dry_run_prints_every_step_and_changes_nothing(l4t, bundle, tmp_path):
    before = sorted(str(p) for p in l4t.rglob("*"))
    shown = CliRunner().invoke(app, ["flash", str(bundle), "--to", f"jetson:{l4t}?board=jetson-agx-orin-devkit", "--dry-run", "--json"])
    answer = json.loads(shown.stdout)
    assert shown.exit_code == 0 and answer["action"] == "dry-run" and sorted(str(p) for p in l4t.rglob("*")) == before
    steps = answer["steps"]
    assert (
        steps[0].endswith("jetson-agx-orin-devkit.conf, a root file system") and "./flash.sh jetson-agx-orin-devkit internal" in steps[-1]
    )
    assert any("edgesdk-first-boot.service" in s for s in steps) and any("model.tflite" in s for s in steps)
    assert "no Jetson in recovery mode" in answer["notes"][0]


def test_what_is_missing_is_told_before_anything_is_touched(l4t, bundle, sysfs, tmp_path, monkeypatch):
    for options, error, message in [
        ("", InputError, "which board"), ("board=jetson-orin-nan-devkit", UnknownName, "unknown board"), ("board=jetson-agx-orin-devkit", InputError, "is for another"),
        ("board=jetson-orin-nano-devkit&storage=/dev/sda", InputError, "not a partition"), ("board=jetson-orin-nano-devkit&usb=2-1", DeviceError, "at USB 2-1"),
        ("board=jetson-orin-nano-devkit&disk=sda1", UnknownName, "disk"), ("board=jetson-orin-nano-devkit&root=../x", InputError, "not a whole path"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            write(l4t, bundle, sysfs, options)
    with pytest.raises(DeviceError, match="no Jetson in recovery mode") as caught:
        write(l4t, bundle, tmp_path / "none")
    assert "RECOVERY" in caught.value.hint
    two = usb(tmp_path / "two", ("1-6", "0955", "7523"), ("1-8", "0955", "7323"))
    with pytest.raises(DeviceError, match="2 Jetsons are in recovery mode: 1-6, 1-8"):
        write(l4t, bundle, two)
    monkeypatch.setattr(jetson, "_is_root", lambda: False)
    with pytest.raises(InputError, match="want root") as caught:
        write(l4t, bundle, sysfs)
    assert caught.value.exit_code == 2 and "sudo" in caught.value.hint
    monkeypatch.setattr(jetson, "_is_root", lambda: True)
    for name, message in [
        ("tools/kernel_flash/flash_l4t_t234_nvme.xml", "not there"), ("rootfs/etc/nv_tegra_release", "tells no release"),
        ("rootfs/usr/bin/python3", "has no python3"), ("rootfs/etc/os-release", "no root file system"), ("flash.sh", "no flash.sh"),
    ]:  # fmt: skip
        (l4t / name).rename(l4t / "away")
        with pytest.raises(InputError, match=message):
            write(l4t, bundle, sysfs, "board=jetson-orin-nano-devkit&storage=nvme0n1p1")
        (l4t / "away").rename(l4t / name)
    assert not (l4t / "ran").exists() and not (l4t / "rootfs/data/var/lib/edgesdk").exists()


SAID: list[tuple[str, int, type[EdgeError], str, str]] = [
    ("ECID is \nError: probing the target board failed.\n       Make sure the target board is connected through \n       USB port and is in recovery mode.",
     1, DeviceError, "no Jetson answers in recovery mode", "RECOVERY"),
    ("Finish generating flash package.\nNo devices to flash", 1, DeviceError, "no Jetson answers in recovery mode", "RECOVERY"),
    ("Error, too many devices in RCM mode\nFor signing and flashing, only one device is supported", 1, DeviceError, "several Jetsons", "usb="),
    ("flash.sh requires root privilege", 21, InputError, "wants root", "sudo"),
    ("Error: Invalid target board - jetson-orin.", 1, InputError, "knows no such board", "conf"),
    ("Error: Unrecognized module SKU\nError: failed to generate images\nCleaning up...", 1, InputError, "not of this board", "board="),
    ("./flash.sh: line 2314: dtc: command not found", 127, MissingTool, "a program that NVIDIA's flasher needs", "l4t_flash_prerequisites.sh"),
    ("cp: error writing 'mnt/usr/lib/x': No space left on device\nFailed.", 8, DeviceError, "disk of this machine is full", "free"),
    ("Waiting for target to boot-up...\nTimeout\nDevice ping failed after RCM boot.", 4, DeviceError, "did not start", "cable"),
    ("Waiting for device to expose ssh ......Timeout\nDevice should have booted into initrd kernel now. "
     "However, the host cannot connect to its ssh server", 5, DeviceError, "not reached over USB", "firewall"),
    ("IPv6 is disabled. Please enable ipv6 to use this tool", 1, DeviceError, "IPv6 is off", "sysctl"),
    ("SSH ready\nmount.nfs: Connection timed out\nFlash failure\n"
     "Either the device cannot mount the NFS server on the host or a flash command has failed.", 1, DeviceError, "NFS server", "nfs-kernel-server"),
    ("tegrarcm_v2 --isapplet\nError: Return value 8\nCommand tegrarcm_v2 --isapplet", 8, LinkError, "USB link", "hub"),
    ("SSH ready\nError flashing qspi\nFlash failure", 1, DeviceError, "a command on the board failed", "log"),
    ("something that nobody has seen", 3, DeviceError, "flash.sh ended with code 3: something", "edgesdk-flash.log"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "code", "error", "what", "hint"), SAID, ids=[row[3] for row in SAID])
def test_its_failures_are_told_in_two_lines(l4t, bundle, sysfs, said, code, error, what, hint):
    (l4t / "says").write_text(BANNER + said + "\n")
    (l4t / "code").write_text(str(code))
    with pytest.raises(error, match=what) as caught:
        write(l4t, bundle, sysfs)
    assert type(caught.value) is error and hint in caught.value.hint and "\n" not in caught.value.what + caught.value.hint
    assert isinstance(caught.value, EdgeError) and caught.value.exit_code == {InputError: 2, MissingTool: 2}.get(error, 3)


def test_a_flasher_that_hangs_is_ended_with_all_that_it_started(l4t, bundle, sysfs):
    (l4t / "flash.sh").write_text("#!/bin/sh\nsleep 300 &\necho $! > child\necho waiting; wait\n")
    start = time.monotonic()
    with pytest.raises(DeviceError, match="did not end in"):
        write(l4t, bundle, sysfs, "board=jetson-orin-nano-devkit&timeout=1500ms")
    assert time.monotonic() - start < 10
    state, end = Path(f"/proc/{(l4t / 'child').read_text().strip()}/stat"), time.monotonic() + 5
    while (alive := state.exists() and state.read_text().split()[2] != "Z") and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive
    (l4t / "flash.sh").chmod(0o644)
    with pytest.raises(DeviceError, match="cannot be started"):
        flasher.run(["./flash.sh"], l4t, 5, None)


def test_nothing_is_written_outside_the_root_file_system(tmp_path):
    tree = Tree(tmp_path / "rootfs")
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "rootfs/up").symlink_to("../../../../../../../tmp")
    (tmp_path / "rootfs/round").symlink_to("round")
    assert tree.resolve("/up/x") == "/tmp/x" and tree.resolve("/a/../../b") == "/b"
    with pytest.raises(InputError, match="in a circle"):
        tree.resolve("/round/x")
    (tmp_path / "rootfs/tmp").mkdir()
    tree.put([Folder("/up/made"), File("/up/made/f", Blob.of(b"1"), mode=0o600), Symlink("/up/made/l", "f")])
    made = tmp_path / "rootfs/tmp/made"
    assert made.joinpath("f").read_bytes() == b"1" and made.joinpath("f").stat().st_mode & 0o777 == 0o600 and os.readlink(made / "l") == "f"
    with pytest.raises(DeviceError, match="cannot be written"):
        tree.put([File("/nowhere/f", Blob.of(b"1"))])


def test_the_first_boots_program_is_whole(l4t, bundle, sysfs):
    write(l4t, bundle, sysfs)
    home = l4t / "rootfs/data/var/lib/edgesdk"
    done = subprocess.run([sys.executable, "-m", "py_compile", home / "first_boot.py"], capture_output=True, check=False)
    assert done.returncode == 0
