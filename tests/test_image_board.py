"""An image made by `flash --image`, booted by U-Boot under qemu; and two slots there: a good trial stays, a system that panics gives way to the old one."""

from __future__ import annotations

import hashlib
import json
import shutil
import time

import pytest
from typer.testing import CliRunner

from edgesdk.bundles import bundle_digest
from edgesdk.cli import app
from edgesdk.errors import CheckFailed
from edgesdk.flash import status
from edgesdk.image.slots import flash_slot, slot_status
from tests.lab import disk
from tests.tiny import tiny_bundle

pytestmark = pytest.mark.board


@pytest.fixture(scope="module", autouse=True)
def tools():
    if problem := disk.missing():
        pytest.fail(problem, pytrace=False)


def wait_for(board, text, limit_s=240):
    """Until the console shows a text."""
    end = time.monotonic() + limit_s
    while text not in board.console.decode(errors="replace"):
        assert time.monotonic() < end, board.console.decode(errors="replace")[-2000:]
        time.sleep(0.2)


def test_the_first_boot_of_an_image_checks_its_bundle(tmp_path):
    image, card, bundle = disk.os_image(), tmp_path / "card.img", tmp_path / "tiny.edge"
    tiny_bundle(bundle)
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    shown = CliRunner().invoke(app, ["flash", "--image", str(image), "--bundle", str(bundle), "--to", str(card), "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["sha256"] == before == hashlib.sha256(image.read_bytes()).hexdigest()
    with disk.DiskBoard(card) as board:
        wait_for(board, "edgesdk: the bundle")
        state = status(board.url)
        assert state.good and state.current == bundle_digest(bundle) and not state.damaged, board.console.decode(errors="replace")[-2000:]
        assert state.history[-1].action == "first-boot" and state.history[-1].result.startswith("ok, 1 golden cases, the worst off by")
        assert board.ssh("ls /var/lib/edgesdk").stdout.split() == ["agent", "current", "first_boot.py", "history", "lease", "store"]


def test_slots(tmp_path):
    images = disk.slot_images()
    shutil.copy(images["disk"], tmp_path / "disk.img")
    with disk.DiskBoard(tmp_path / "disk.img", root="/data/edgesdk") as board:
        assert slot_status(board.url).running == "A" and board.ssh("cat", "/etc/version").returncode
        report = flash_slot(images["good"], board.url)
        assert (report.running, report.first, report.on_trial) == ("B", "B", False) and report.same_bytes > 4 * report.sent_bytes > 0
        assert board.ssh("cat", "/etc/version").stdout == "2\n" and "root=/dev/vda3" in board.ssh("cat", "/proc/cmdline").stdout
        with pytest.raises(CheckFailed, match="slot A did not come up; the device went back to slot B by itself"):
            flash_slot(images["broken"], board.url)
        report = slot_status(board.url)
        assert (report.running, report.first, report.failed, report.on_trial) == ("B", "B", "A", False)
        console = board.console.decode(errors="replace")
        assert "Attempted to kill init" in console and "SLOT A was not confirmed" in console
