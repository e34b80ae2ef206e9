"""Probe, plan and calibrate an emulated arm64 board over ssh and a phone's stand-in over adb. The board's times are an emulator's, and are marked so."""

from __future__ import annotations

import json
import sys

import pytest

from edgesdk import micro
from edgesdk.calibrate import calibrate
from edgesdk.devices import bound_to, load_device
from edgesdk.errors import LinkError
from edgesdk.plan import plan
from edgesdk.probe import facts_of, probe
from edgesdk.probe.facts import read_facts
from edgesdk.probe.gather import by_shell
from edgesdk.transport import parse_link
from tests.consoles import Console

pytestmark = pytest.mark.board


@pytest.fixture(autouse=True)
def few(tmp_path, monkeypatch):
    """Seven small programs instead of forty, and a cache of their own."""
    monkeypatch.setenv("EDGESDK_DEVICES", str(tmp_path / "devices"))
    monkeypatch.setenv("EDGESDK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(micro, "WEIGHTED", {n: micro.WEIGHTED[n] for n in ("linear_a", "linear_d", "conv_a", "depth_a")})
    monkeypatch.setattr(micro, "PLAIN", {n: micro.PLAIN[n] for n in ("add_a", "pool_a")})
    monkeypatch.setattr(micro, "PASSED", {"pass_a": (4, 64)})


def test_an_emulated_board_over_ssh(board):
    found = probe(board.url, name="virtual", measure=True)
    profile, facts = load_device("virtual"), found.facts
    with parse_link(board.url) as link:
        shell = read_facts(by_shell(link), board.url, "shell")
    assert facts.via == "agent" and shell.clusters == facts.clusters and shell.board_id == facts.board_id, "busybox says the same"
    assert facts.emulated and profile.board.emulated and facts.clusters[0].core == "cortex-a76" and facts.clusters[0].cores == 2
    assert profile.board.runtimes["litert"] and profile.family == "linux" and profile.board.id
    assert profile.sources["memory.bandwidth_bytes_per_s"].startswith("measured ")
    assert facts.disk.size_bytes and profile.storage.read_bytes_per_s is None, "its disk is in memory: nothing is claimed"
    board.link.cut_after(60_000)
    with pytest.raises(LinkError):
        calibrate(on=board.cuttable_url, runtime="litert", precisions=["fp32"], allow_emulated=True)
    board.link.restore()
    (law,) = calibrate(on=board.url, runtime="litert", precisions=["fp32"], allow_emulated=True)
    assert law.emulated and law.board == profile.board.id
    made = plan("example:digits-cnn", "virtual", runtime="litert")
    assert any("emulator" in w for w in made.warnings)
    assert board.ssh("ls /data/edgesdk/calibrate").returncode != 0, "nothing stays there"


def test_a_phones_stand_in_over_adb(phone):
    found = probe(phone.url, name="phone-here")
    assert found.facts.via == "agent" and not found.facts.emulated
    bare = facts_of(phone.url.partition("&python=")[0] + "&python=/no/such/python")
    assert bare.via == "shell" and bare.board_id == found.facts.board_id and bare.clusters == found.facts.clusters and not bare.runtimes
    (law,) = calibrate(on=phone.url, runtime="litert", precisions=["fp32"])
    assert law.device == "phone-here" and not law.emulated
    made = plan("example:digits-cnn", "phone-here", runtime="litert")
    assert "times: calibrated" in json.dumps(made.model_dump(mode="json"))


def test_the_two_are_two_boards(board, phone):
    mine = probe(phone.url, name="one").profile
    assert "behind" in bound_to(mine, facts_of(board.url).model_dump(), board.url)


def test_over_a_serial_console_that_spoils_bytes(tmp_path):
    with Console(tmp_path, noise=0.001, seed=3) as console:
        far = facts_of(f"serial:{console.path}?root={tmp_path}/root&python={sys.executable}")
    here = facts_of(f"local:{tmp_path}/root")
    assert far.board_id == here.board_id and far.clusters == here.clusters and far.runtimes == here.runtimes and far.via == "agent"
