"""Slots: U-Boot's environment as its own tools write it, and the whole of a trial on a device played by this machine, its reboots by a few lines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from edgesdk.cli import app
from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError
from edgesdk.image import slots, uboot
from edgesdk.image.slots import CHUNK, Files, flash_slot, slot_status
from edgesdk.image.uboot import Env, Place, decode, encode, places, update
from edgesdk.transport.base import Result
from edgesdk.transport.local import LocalTransport
from tests.image_small import MIB, mbr, superblock

SIZE = 0x2000


def test_an_environment_there_and_back():
    names = {"bootcmd": "run a; run b", "empty": "", "umlaut": "ä"}
    assert decode([encode(names, SIZE)]).variables == names
    first, second = encode({"a": "1"}, SIZE, 7), encode({"a": "2"}, SIZE, 8)
    assert decode([first, second]) == Env({"a": "2"}, 1, 8)
    assert decode([encode({"a": "3"}, SIZE, 0), encode({"a": "2"}, SIZE, 255)]).newest == 0, "0 comes behind 255"
    assert decode([encode({"a": "3"}, SIZE, 255), encode({"a": "2"}, SIZE, 0)]).newest == 1
    assert decode([first, b"\xff" * SIZE]) == Env({"a": "1"}, 0, 7), "a write that was cut off"
    with pytest.raises(CheckFailed, match="no copy of U-Boot's environment"):
        decode([b"\xff" * SIZE, bytes(SIZE)])


def test_a_change_goes_to_the_older_copy():
    env = decode([encode({"a": "1", "b": "2"}, SIZE, 255), encode({"a": "0"}, SIZE, 254)])
    index, data = update(env, {"b": "3"}, 2, SIZE)
    assert index == 1 and decode([encode({"a": "1", "b": "2"}, SIZE, 255), data]) == Env({"a": "1", "b": "3"}, 1, 0)
    assert update(Env({"a": "1"}), {"b": "2"}, 1, SIZE) == (0, encode({"a": "1", "b": "2"}, SIZE))
    with pytest.raises(InputError, match="has room for 59 bytes, 204 needed"):
        encode({"a": "x" * 200}, 64, 0)
    with pytest.raises(InputError, match="'a=b': not a name"):
        encode({"a=b": "x"}, 64)


@pytest.mark.skipif(shutil.which("mkenvimage") is None, reason="needs mkenvimage and mkimage: apt install u-boot-tools")
def test_what_u_boots_own_tools_write_and_read(tmp_path):
    (tmp_path / "env.txt").write_text("boot_slot=A\nbootcount=0\n")
    for options, counter in ((["-r"], 1), ([], None)):
        argv = ["mkenvimage", *options, "-p", "0", "-s", str(SIZE), "-o", tmp_path / "env.bin", tmp_path / "env.txt"]
        subprocess.run(argv, check=True, capture_output=True)
        assert (tmp_path / "env.bin").read_bytes() == encode({"boot_slot": "A", "bootcount": "0"}, SIZE, counter)
    (tmp_path / "boot.scr").write_bytes(uboot.script_image(uboot.boot_script(), 1_700_000_000))
    (tmp_path / "boot.cmd").write_text(uboot.boot_script())
    argv = [
        "mkimage",
        "-A",
        "arm64",
        "-O",
        "linux",
        "-T",
        "script",
        "-C",
        "none",
        "-n",
        "edgesdk slots",
        "-d",
        tmp_path / "boot.cmd",
        tmp_path / "its.scr",
    ]
    subprocess.run(argv, check=True, capture_output=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"})
    assert (tmp_path / "its.scr").read_bytes() == (tmp_path / "boot.scr").read_bytes()


def test_where_the_environment_is():
    text = "# comment\n/dev/mmcblk0 0x10000 0x2000\n\n/dev/mmcblk0\t131072\t8192 # second\n"
    assert places(text) == [Place("/dev/mmcblk0", 0x10000, 0x2000), Place("/dev/mmcblk0", 0x20000, 0x2000)]
    for wrong, said in (
        ("", "0 copies"),
        ("/dev/mtd0 0 0x2000", "without a block layer"),
        ("/dev/sda x", "not DEVICE OFFSET"),
        ("/dev/sda 5 64", "sectors"),
    ):
        with pytest.raises(InputError, match=said):
            places(wrong)


class Board(LocalTransport):
    """This machine with files as disks; `reboot` does what U-Boot and edgesdk's boot script do."""

    def __init__(self, folder, broken=(), gone=False):
        super().__init__(folder / "root")
        self.folder, self.broken, self.gone = folder, broken, gone
        self.files = Files(*(str(folder / n) for n in ("fw_env.config", "cmdline", "boot_id")))
        self.boots = []
        env = {"boot_slot": "A", "slot_disk": f"{folder}/disk", "slot_A": "2", "slot_B": "3", "kept": "yes"}
        (folder / "env").write_bytes(encode(env, SIZE, 3) + bytes(SIZE))
        (folder / "fw_env.config").write_text(f"{folder}/env 0 {SIZE}\n{folder}/env {SIZE:#x} {SIZE}\n")
        for part in (2, 3):
            (folder / f"disk{part}").write_bytes(bytes(2 * CHUNK + 8192))
        self.start("A")

    def start(self, slot):
        self.boots.append(slot)
        (self.folder / "cmdline").write_text(f"console=ttyAMA0 root=/dev/x edgesdk.slot={slot} quiet\n")
        (self.folder / "boot_id").write_text(f"{len(self.boots)}\n")

    @property
    def env(self):
        data = (self.folder / "env").read_bytes()
        return decode([data[:SIZE], data[SIZE:]])

    def set(self, **changes):
        index, data = update(self.env, changes, 2, SIZE)
        with (self.folder / "env").open("r+b") as file:
            file.seek(index * SIZE)
            file.write(data)

    def boot(self):
        """As in `uboot.boot_script`, and again if the system dies."""
        now = self.env.variables
        if now.get("upgrade_available") == "1" and int(now["bootcount"]) >= int(now["bootlimit"]):
            self.set(boot_slot="AB".replace(now["boot_slot"], ""), upgrade_available="0", bootcount="0", slot_failed=now["boot_slot"])
        elif now.get("upgrade_available") == "1":
            self.set(bootcount=str(int(now["bootcount"]) + 1))
        slot = self.env.variables["boot_slot"]
        self.start(slot)
        if slot in self.broken:
            self.boot()

    def run(self, argv, stdin=None, timeout=60.0):
        if argv[0] == "sh" and argv[3] == "edgesdk-reboot":
            if not self.gone:
                self.boot()
            return Result(0, b"", b"")
        return super().run(argv, stdin, timeout)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "new.ext4"
    path.write_bytes(bytes(1024) + superblock(2048) + os.urandom(CHUNK - 2048) + bytes(CHUNK) + os.urandom(4096))
    return path


def test_a_good_trial_is_confirmed(tmp_path, image, monkeypatch):
    board = Board(tmp_path)
    report = flash_slot(image, board, files=board.files)
    assert (report.action, report.running, report.first, report.on_trial) == ("confirmed", "B", "B", False)
    assert (tmp_path / "disk3").read_bytes() == image.read_bytes() + bytes(4096) and (tmp_path / "disk2").read_bytes() == bytes(
        2 * CHUNK + 8192
    )
    assert (report.sent_bytes, report.same_bytes) == (CHUNK + 4096, CHUNK) and board.boots == ["A", "B"]
    assert board.env.variables["kept"] == "yes" and board.env.variables["upgrade_available"] == "0"
    monkeypatch.setattr(slots, "_healthy", lambda transport: False)  # once is enough for the agent
    again = flash_slot(image, board, files=board.files)  # into A now
    assert again.running == "A" and board.boots == ["A", "B", "A"]
    back = flash_slot(None, board, files=board.files)
    assert (back.running, back.sent_bytes) == ("B", 0)
    assert flash_slot(image, board, files=board.files).sent_bytes == 0, "what is there is not sent again"


def test_a_trial_that_dies_falls_back(tmp_path, image):
    board = Board(tmp_path, broken=("B",))
    with pytest.raises(CheckFailed, match="slot B did not come up; the device went back to slot A by itself"):
        flash_slot(image, board, files=board.files)
    report = slot_status(board, board.files)
    assert (report.running, report.first, report.failed, report.on_trial) == ("A", "A", "B", False) and board.boots == ["A", "B", "A"]
    with pytest.raises(DeviceError, match="the last trial of slot B failed"):
        flash_slot(None, board, files=board.files)


def test_a_trial_that_is_not_healthy_goes_back(tmp_path, image, monkeypatch):
    board = Board(tmp_path)

    def ill(transport):
        raise CheckFailed("wrong outputs: forward[0]", "build it again")

    monkeypatch.setattr(slots, "_healthy", ill)
    with pytest.raises(CheckFailed, match=r"slot B came up and is not healthy: wrong outputs: .*; going back to slot A\nbuild it again"):
        flash_slot(image, board, files=board.files)
    assert board.boots == ["A", "B", "A"] and board.env.variables["slot_failed"] == "B"


def test_a_trial_that_never_comes_back(tmp_path, image):
    board = Board(tmp_path, gone=True)
    with pytest.raises(LinkError, match="did not come back in 0 s\nswitch it off and on: U-Boot goes back"):
        flash_slot(image, board, boot_s=0.3, files=board.files)
    assert board.env.variables["upgrade_available"] == "1"
    board.gone = False
    board.boot()
    with pytest.raises(DeviceError, match="slot B is on trial"):
        flash_slot(image, board, files=board.files)
    board.boot()
    assert slot_status(board, board.files).running == "A"


def test_what_is_refused(tmp_path, image):
    board = Board(tmp_path)
    plan = flash_slot(image, board, dry_run=True, files=board.files)
    assert plan.action == "dry-run" and plan.steps[0].startswith(f"write {tmp_path}/disk3") and "boot_slot=B" in plan.steps[2]
    image.write_bytes(image.read_bytes()[:2048] + bytes(3 * CHUNK - 2048))
    with pytest.raises(InputError, match=r"12.6 MB, slot B .* has 8.4 MB"):
        flash_slot(image, board, files=board.files)
    image.write_bytes(mbr([(0x83, 2048, 2048)]) + bytes(2 * MIB))
    with pytest.raises(InputError, match=r"a whole disk \(partition 1"):
        flash_slot(image, board, files=board.files)
    image.write_bytes(bytes(1024) + superblock(1024) + bytes(MIB - 2048))
    board.set(slot_B="2")
    with pytest.raises(DeviceError, match=r"slot B \(.*disk2\) is in use"):
        flash_slot(image, board, files=board.files)
    board.set(slot_B="9")
    with pytest.raises(DeviceError, match=r"no disk .*disk9"):
        flash_slot(image, board, files=board.files)
    assert board.boots == ["A"] and board.env.variables["boot_slot"] == "A"
    for text, said in (("root=/dev/sda\n", "does not say which slot runs"), ("rauc.slot=system0\n", "does not say which slot")):
        (tmp_path / "cmdline").write_text(text)
        with pytest.raises(DeviceError, match=said):
            slot_status(board, board.files)
    (tmp_path / "fw_env.config").unlink()
    with pytest.raises(DeviceError, match="looking for two slots"):
        slot_status(board, board.files)


def test_a_disk_that_forgets_is_noticed(tmp_path, image, monkeypatch):
    board = Board(tmp_path)
    monkeypatch.setattr(slots, "WRITE", "cat > /dev/null")
    with pytest.raises(CheckFailed, match="2 of 3 chunks read back are not what was written"):
        flash_slot(image, board, files=board.files)
    image.write_bytes(image.read_bytes()[:2048] + bytes(CHUNK - 2048))
    flash_slot(image, board, dry_run=True, files=board.files)
    (tmp_path / "disk3").write_bytes(image.read_bytes())
    with pytest.raises(CheckFailed, match=r"environment on .* could not be written"):
        flash_slot(image, board, files=board.files)
    assert board.boots == ["A"]


def test_on_the_command_line(tmp_path, monkeypatch):
    board = Board(tmp_path)
    monkeypatch.setattr(slots, "_healthy", lambda transport: False)
    monkeypatch.setattr(slots, "parse_link", lambda link: board)
    monkeypatch.setattr(slots.flash_slot, "__kwdefaults__", {**flash_slot.__kwdefaults__, "files": board.files})
    monkeypatch.setattr(slots.slot_status, "__defaults__", (board.files,))
    shown = CliRunner().invoke(app, ["flash", "--slots", "--on", "x"])
    assert shown.exit_code == 0 and f"A  {tmp_path}/disk2  running, boots next" in shown.stdout
    shown = CliRunner().invoke(app, ["flash", "--slots", "--rollback", "--on", "x", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["running"] == "B"
