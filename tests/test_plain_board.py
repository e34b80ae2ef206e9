"""Devices without Python, with other shells and tools than this machine's: busybox, Android's mksh and toybox, a real adbd."""

from __future__ import annotations

import os
import subprocess

import pytest

from edgesdk.bundles import bundle_digest
from edgesdk.errors import CheckFailed, DeviceError, LinkError
from edgesdk.flash import flash, roll_back, status
from edgesdk.lease import lease
from edgesdk.plain.profile import profile
from edgesdk.plain.scripts import HOLD
from edgesdk.transport import parse_link
from edgesdk.transport.local import LocalTransport
from edgesdk.transport.scripts import script
from tests.lab import boxes
from tests.lab.native_runner import install
from tests.tiny import tiny_bundle

pytestmark = pytest.mark.board


@pytest.fixture(params=["busybox", "toybox"])
def box(request, tmp_path, monkeypatch):
    """A device that has this userland and nothing else."""
    if problem := boxes.missing():
        pytest.fail(problem, pytrace=False)
    monkeypatch.setenv("PATH", str(boxes.userland(request.param)))
    device = LocalTransport(tmp_path / "root")
    device.python = "python3"
    return device


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for name, options in {"a": {}, "b": {"seed": 1}, "wrong": {"seed": 4, "wrong": True}}.items():
        tiny_bundle(folder / f"{name}.edge", **options)
    return {name: str(folder / f"{name}.edge") for name in ("a", "b", "wrong")}


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    return str(install(tmp_path_factory.mktemp("tool"), "benchmark_model"))


def test_without_a_runner_the_error_says_what_to_do(box, bundles):
    with pytest.raises(DeviceError, match="python3") as caught:
        flash(bundles["a"], box)
    assert "--runner" in caught.value.hint


def test_the_whole_loop_in_a_small_userland(box, bundles, tool):
    first = flash(bundles["a"], box, runner=tool)
    assert first.good and first.golden
    second = flash(bundles["b"], box, runner=tool)
    assert (second.current, second.previous) == (bundle_digest(bundles["b"]), first.current)
    with pytest.raises(CheckFailed, match="wrong outputs"):
        flash(bundles["wrong"], box, runner=tool)
    assert roll_back(box, runner=tool).current == first.current
    after = status(box)
    assert after.good and not after.damaged and [e.action for e in after.history][-1] == "rolled-back"
    report = profile(None, box, tool, runs=20, warmup=2)
    assert report.methods[0].summary is not None and report.peak_rss_bytes


def test_the_lock_of_a_small_userland_outlives_nothing(box):
    def hold() -> subprocess.Popen[str]:
        argv = script("hold", HOLD, box.root, "somebody")
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    for end in ("close", "kill"):
        with hold() as holder:
            assert holder.stdout is not None and holder.stdout.readline() == "yours\n"
            with pytest.raises(DeviceError, match="in use by somebody"), lease(box, "install", plain=True):
                pass
            holder.kill() if end == "kill" else holder.communicate()
        with lease(box, "install", plain=True):
            pass


def test_the_whole_loop_over_adb(phone, bundles, tool, tmp_path):
    link = f"{phone.url.partition('&python=')[0]}/plain&python=/no/python"
    first = flash(bundles["a"], link, runner=tool)
    assert first.good and flash(bundles["b"], link, runner=tool).good
    liar = str(install(tmp_path, "benchmark_model", scale=1.01))
    with pytest.raises(CheckFailed, match="is off by"):
        flash(bundles["wrong"], link, runner=liar)
    assert roll_back(link, runner=tool).current == first.current
    report = profile(bundles["a"], link, tool, runs=20, warmup=2)
    assert report.methods[0].summary is not None and report.methods[0].summary.calls == 20
    with parse_link(link) as device, pytest.raises(LinkError), lease(device, "profile", plain=True):
        phone.disconnect()
        device.run(("true",))
    with parse_link(link) as device, lease(device, "profile", plain=True):  # the lock went with the link
        assert device.run(("true",)).code == 0
    assert os.path.isdir(f"{phone.root}/plain/runners") and not os.path.exists(f"{phone.root}/plain/agent")
