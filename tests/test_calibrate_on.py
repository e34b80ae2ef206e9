"""Calibration through a link: programs are timed by the agent, what was timed survives a broken link, the answer holds for one board alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from edgesdk import calibrate as calibration
from edgesdk.agent.client import Agent
from edgesdk.agent.speed import read_rates, time_call
from edgesdk.calibrate import Sample, calibrate
from edgesdk.calibrate_on import runtimes_there
from edgesdk.calibrate_places import KEPT_S, PROGRAM, There
from edgesdk.cli import app
from edgesdk.devices import load_device
from edgesdk.efficiency import Efficiency
from edgesdk.errors import DeviceError, InputError, LinkError, MissingTool, UnknownName
from edgesdk.plan.rates import calibration_of, calibration_path, efficiency_for
from edgesdk.probe import facts_of, probe
from edgesdk.transport.fake import FakeTransport
from edgesdk.transport.local import LocalTransport
from tests import boards
from tests.test_cost import linear, method
from tests.tiny import tiny_tflite

WEIGHTS = np.ones((4, 64), np.float32)
INPUTS = {"one": [np.ones((1, 64), np.float32)]}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESDK_DEVICES", str(tmp_path / "devices"))
    monkeypatch.setenv("EDGESDK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def link(tmp_path):
    return LocalTransport(tmp_path / "root")


def few_programs(runtime, threads, step, place, precisions):
    """Stands in for `measure`: one real program, timed at `place`, said to be five."""
    timer = place.open({PROGRAM: tiny_tflite(WEIGHTS)}, runtime, threads, INPUTS)
    seconds = min(timer("forward", "one", turn) for turn in (0, 1))
    return [
        Sample(method(linear(rows=n, width=w)), "fp32", {}, seconds * n) for n, w in ((1, 16), (1, 256), (64, 64), (32, 256), (128, 128))
    ]


class CutAgent:
    """The agent, over a link that breaks at the n-th timing."""

    def __init__(self, agent, timings):
        self.agent, self.left = agent, timings

    def ask(self, verb, **arguments):
        if verb == "time":
            self.left -= 1
            if self.left < 0:
                raise LinkError("the link broke", "try again")
        return self.agent.ask(verb, **arguments)


def test_programs_are_timed_there_one_at_a_time_and_nothing_stays(link, tmp_path):
    with Agent(link) as agent:
        place = There(link, agent, tmp_path / "kept")
        timers = [place.open({PROGRAM: tiny_tflite(WEIGHTS * i)}, "litert", 1, INPUTS) for i in (1, 2)]
        assert not (tmp_path / "root" / "calibrate").exists(), "sent when first timed"
        for turn, timer in place.turns(timers, 2):
            assert 1e-7 < timer("forward", "one", turn) < 1.0
            assert len(list((tmp_path / "root" / "calibrate").iterdir())) == 1
        assert place.rates({"L1": 16384, "memory": 1 << 22})["L1"] > 1e8
        place.clean()
        assert not (tmp_path / "root" / "calibrate").exists()
        with pytest.raises(DeviceError, match="cannot be opened"):
            place.open({PROGRAM: b"no program"}, "litert", 1, INPUTS)("forward", "one", 0)


def test_what_was_timed_survives_a_broken_link(link, tmp_path):
    kept = tmp_path / "kept"
    with Agent(link) as agent:
        place = There(link, CutAgent(agent, 3), kept)
        timers = [place.open({PROGRAM: tiny_tflite(WEIGHTS * i)}, "litert", 1, INPUTS) for i in (1, 2)]
        with pytest.raises(LinkError) as error:
            _ = [timer("forward", "one", turn) for turn, timer in place.turns(timers, 2)]
        assert "3 timings are kept" in error.value.hint
        kept.write_text(kept.read_text() + "half a li")
        place = There(link, CutAgent(agent, 1), kept)
        timers = [place.open({PROGRAM: tiny_tflite(WEIGHTS * i)}, "litert", 1, INPUTS) for i in (1, 2)]
        assert place.resumed == 3
        assert len([timer("forward", "one", turn) for turn, timer in place.turns(timers, 2)]) == 4, "one more was all it took"
    old = kept.stat().st_mtime - KEPT_S - 10
    import os

    os.utime(kept, (old, old))
    assert There(link, None, kept).resumed == 0 and not kept.exists(), "another day is another day"


def test_a_board_is_calibrated_and_only_its_plans_take_it(link, monkeypatch):
    monkeypatch.setattr(calibration, "measure", few_programs)
    with pytest.raises(InputError, match="no profile is bound"):
        calibrate(on=link, runtime="litert")
    profile = probe(link, name="mine").profile
    done = CliRunner().invoke(app, ["calibrate", "--on", f"local:{link.root}", "--runtime", "litert", "--precision", "fp32", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["kind"] == "calibration" and len(answer["efficiencies"]) == 1
    found = Efficiency.check(answer["efficiencies"][0], "answer")
    assert found.device == "mine" and found.board == profile.board.id and found.origin == "calibrated" and not found.emulated
    assert efficiency_for(profile, profile.units[0], "litert", 1) == found
    assert efficiency_for(profile, profile.units[0], "litert", 2).origin != "calibrated", "for that number of threads only"
    pi = load_device("pi5")
    assert calibration_of(pi, "litert", 1) is None
    other = profile.model_copy(update={"board": profile.board.model_copy(update={"id": "0" * 16})})
    assert calibration_of(other, "litert", 1) is None
    newer = profile.model_copy(update={"board": profile.board.model_copy(update={"runtimes": {"litert": "99"}})})
    assert calibration_of(newer, "litert", 1) is None, "the runtime there is another one now"
    marked = found.model_copy(update={"emulated": True})
    marked.save(calibration_path(profile, "litert", 1))
    assert calibration_of(profile, "litert", 1) is None, "an emulator's numbers are no silicon's"
    calibration_path(profile, "litert", 1).write_text("{}")
    assert calibration_of(profile, "litert", 1) is None


def test_the_wrong_board_and_the_wrong_profile_are_refused(link):
    pi4 = FakeTransport(texts=boards.pi4())
    with pytest.raises(InputError, match="no profile of one board"):
        calibrate("pi4", on=pi4)
    probe(FakeTransport(texts=boards.pi5()), name="kitchen")
    with pytest.raises(InputError, match="is the profile of board") as error:
        calibrate("kitchen", on=pi4)
    assert "devices probe" in error.value.hint
    probe(pi4, name="a")
    probe(pi4, name="b")
    with pytest.raises(InputError, match="2 profiles are bound to it: a, b"):
        calibrate(on=pi4)
    with pytest.raises(UnknownName):
        calibrate("a", on=pi4, precisions=["int3"])
    with pytest.raises(InputError, match="without a link"):
        calibrate("a")
    probe(link, name="here")
    with pytest.raises(MissingTool, match="tensorrt is not installed"):
        calibrate("here", on=link, runtime="tensorrt")
    with pytest.raises(InputError, match=r"has \d+ cores"):
        calibrate("here", on=link, runtime="litert", threads=500)


def test_an_emulator_is_refused_unless_asked_for_and_a_device_needs_python(monkeypatch):
    texts = boards.pi5() | {"/proc/device-tree/compatible": "linux,dummy-virt"}
    device = FakeTransport(texts=texts)
    assert probe(device, name="virtual").profile.board.emulated
    with pytest.raises(InputError, match="an emulator") as error:
        calibrate(on=device)
    assert "--allow-emulated" in error.value.hint
    with pytest.raises(DeviceError, match="needs Python"):
        calibrate(on=device, allow_emulated=True)


def test_our_own_kernels_need_nothing_but_numpy_on_arm():
    facts = facts_of(FakeTransport(texts=boards.pi4()))
    profile = probe(FakeTransport(texts=boards.pi4()), name="p").profile
    assert list(runtimes_there(facts, profile, None)) == ["litert", "native"]
    newer = facts_of(FakeTransport(texts=boards.pi4() | {"!package litert": "9.9"}))
    with pytest.raises(InputError, match=r"litert is 9\.9 now, p was read with 2\.1\.0"):
        runtimes_there(newer, profile, None)


def test_long_calls_are_made_fewer_times():
    calls = []
    assert time_call(lambda: calls.append(1)) < 0.1 and len(calls) > 20
    import time

    calls.clear()
    time_call(lambda: (calls.append(1), time.sleep(0.11)))
    assert len(calls) == 4
    rates = read_rates({"L1": 16384, "L2": 1 << 18})
    assert rates["L1"] >= rates["L2"] > 0
