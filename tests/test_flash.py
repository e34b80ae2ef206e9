"""Flash: verified installs, switched only after the check on the device; resume, refusal, rollback; steps are the plan."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from loopback import cutting_proxy, serve
from tiny import tiny_bundle

from edgesdk.bundles import bundle_digest
from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError
from edgesdk.flash import flash, roll_back, status
from edgesdk.lease import HOLD
from edgesdk.profile import profile
from edgesdk.transport.fake import Failures, FakeTransport
from edgesdk.transport.local import LocalTransport


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """name → a bundle's path."""
    folder = tmp_path_factory.mktemp("bundles")
    kinds = {"a": {}, "b": {"seed": 1}, "c": {"seed": 2}, "big": {"seed": 3, "cols": 40000}, "wrong": {"seed": 4, "wrong": True}}
    for name, options in kinds.items():
        tiny_bundle(folder / f"{name}.edge", **options)
    return {name: folder / f"{name}.edge" for name in kinds}


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("sshd")) as server:
        yield server


def _cli(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgesdk", *args], capture_output=True, text=True, timeout=120)


def test_install_again_switch_and_roll_back(tmp_path, bundles):
    device = LocalTransport(tmp_path / "root")
    first = flash(bundles["a"], device)
    assert first.action == "installed" and first.good and first.current == bundle_digest(bundles["a"])
    assert first.golden[0].relative_error is not None and first.golden[0].relative_error < 1e-4
    assert (tmp_path / "root/current/model.tflite").is_file() and (tmp_path / "root/current").is_symlink()
    again = flash(bundles["a"], device)
    assert again.action == "already-installed" and again.steps == () and again.sent_bytes == 0
    second = flash(bundles["b"], device)
    assert (second.current, second.previous) == (bundle_digest(bundles["b"]), first.current)
    back = roll_back(device)
    assert (back.action, back.current, back.previous) == ("rolled-back", first.current, second.current)
    third = flash(bundles["c"], device)
    assert {i.digest for i in third.installed} == {third.current, first.current}  # keep = 2
    assert not list((tmp_path / "root/store").glob("*.part"))


def test_a_bundle_with_wrong_outputs_never_becomes_current(tmp_path, bundles):
    device = LocalTransport(tmp_path)
    with pytest.raises(CheckFailed, match=r"wrong outputs.*current stays empty"):
        flash(bundles["wrong"], device)
    assert status(device).current is None
    good = flash(bundles["a"], device)
    with pytest.raises(CheckFailed, match=rf"rolled back: current stays {good.current[:12]}") as caught:
        flash(bundles["wrong"], device)
    assert caught.value.exit_code == 1
    after = status(device)
    assert after.current == good.current and after.good and len(after.installed) == 1


def test_latency_gate_refuses(tmp_path, bundles):
    device = LocalTransport(tmp_path)
    with pytest.raises(CheckFailed, match=r"too slow on the device: forward takes"):
        flash(bundles["a"], device, latency_gate=1e-9)
    assert status(device).current is None
    assert flash(bundles["a"], device, latency_gate=5.0).gate_s["forward"] < 5.0


def test_dry_run_prints_the_steps_that_are_then_done(tmp_path, bundles):
    device = LocalTransport(tmp_path / "root")
    for name in ("a", "b", "c"):
        planned = flash(bundles[name], device, dry_run=True)
        assert planned.action == "dry-run" and planned.current != bundle_digest(bundles[name])
        if name == "a":
            assert not (tmp_path / "root").exists()
        assert flash(bundles[name], device).steps == planned.steps
    planned = roll_back(device, dry_run=True)
    assert roll_back(device).steps == planned.steps


def test_files_that_the_device_has_are_not_sent_again(tmp_path, bundles):
    tiny_bundle(tmp_path / "other.edge", seed=3, cols=40000, plan=b"{}")
    device = LocalTransport(tmp_path / "root")
    assert flash(bundles["big"], device).sent_bytes > 600_000
    assert flash(tmp_path / "other.edge", device).sent_bytes < 5_000


def test_a_damaged_bundle_is_refused_before_anything_is_sent(tmp_path, bundles):
    damaged = bytearray(bundles["big"].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "x.edge").write_bytes(damaged)
    with pytest.raises((CheckFailed, InputError), match=r"model\.tflite"):
        flash(tmp_path / "x.edge", f"local:{tmp_path}/root")
    assert not (tmp_path / "root").exists()


def test_a_change_on_the_devices_disk_is_found(tmp_path, bundles):
    device = LocalTransport(tmp_path)
    flash(bundles["a"], device)
    flash(bundles["b"], device)
    next((tmp_path / "store").glob(f"{bundle_digest(bundles['a'])}/model.tflite")).write_bytes(b"?")
    with pytest.raises(CheckFailed, match="is damaged on the device"):
        roll_back(device)
    assert status(device).current == bundle_digest(bundles["b"])


def test_fake_full_disk_keeps_what_is_current(bundles):
    device = FakeTransport()
    good = flash(bundles["a"], device)
    device.failures.disk_bytes = sum(map(len, device.files.values())) + 100_000
    with pytest.raises(DeviceError, match=r"disk is full: .* needed, .* free") as caught:
        flash(bundles["big"], device)
    assert caught.value.exit_code == 3
    assert status(device).current == good.current
    device.failures.disk_bytes = None
    assert flash(bundles["big"], device).previous == good.current


def test_fake_cut_then_resume_and_failed_check_and_corruption(bundles):
    device = FakeTransport(failures=Failures(cut_after_bytes=300_000))
    with pytest.raises(LinkError):
        flash(bundles["big"], device)
    assert status(device).current is None
    resumed = flash(bundles["big"], device)
    assert resumed.good and resumed.resumed_bytes > 100_000
    device.failures.check_error = 0.5
    with pytest.raises(CheckFailed, match=r"off by 0\.5"):
        flash(bundles["a"], device)
    assert status(device).current == resumed.current
    with pytest.raises(CheckFailed, match="sha256"):
        flash(bundles["a"], FakeTransport(failures=Failures(corrupt=True)))


def test_fake_crash_of_the_program_rolls_back(bundles):
    device = FakeTransport()
    good = flash(bundles["a"], device)
    device.failures.agent_crashes = True
    with pytest.raises(CheckFailed, match="rolled back"):
        flash(bundles["b"], device)
    assert status(device).current == good.current


def test_over_ssh_cut_in_the_middle_then_resumed(tmp_path, bundles, sshd):
    with cutting_proxy(sshd.port, 500_000) as port, pytest.raises(LinkError) as caught:
        flash(bundles["big"], sshd.link(tmp_path / "root", port))
    assert caught.value.exit_code == 3
    assert status(sshd.link(tmp_path / "root")).current is None
    done = flash(bundles["big"], sshd.link(tmp_path / "root"))
    assert done.action == "installed" and done.good and done.resumed_bytes > 0
    assert not list(Path(tmp_path / "root/store").glob("*.part"))
    with pytest.raises(CheckFailed, match="rolled back"):
        flash(bundles["wrong"], sshd.link(tmp_path / "root"))


def test_command_line_codes(tmp_path, bundles):
    on = f"local:{tmp_path}/root"
    done = _cli("flash", str(bundles["a"]), "--on", on, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "deployment"
    assert _cli("flash", str(bundles["wrong"]), "--on", on).returncode == 1
    for args, code, words in (
        (["flash"], 2, "flash wants one of"),
        (["flash", "nowhere.edge", "--on", on], 2, "nowhere.edge"),
        (["flash", "--rollback", "--on", on], 3, "nothing to roll back to"),
        (["flash", "--status", "--on", "ssh://u@127.0.0.1:1"], 3, "nothing listens"),
    ):
        done = _cli(*args)
        assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
    dry = _cli("flash", str(bundles["b"]), "--on", on, "--dry-run")
    assert dry.returncode == 0 and "put   " in dry.stdout and "link  " in dry.stdout


# ---- one user at a time


def holder(root: Path) -> subprocess.Popen[str]:
    """Another user's process that holds the device."""
    argv = [sys.executable, "-u", "-c", HOLD, str(root), "ann@lab, to profile"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "yours\n"
    return process


def test_a_device_in_use_is_refused_and_free_once_its_user_is_gone(tmp_path, bundles):
    device = LocalTransport(tmp_path)
    other = holder(tmp_path)
    with pytest.raises(DeviceError, match="in use by ann@lab, to profile") as caught:
        flash(bundles["a"], device)
    assert caught.value.exit_code == 3 and "--wait" in caught.value.hint and status(device).current is None
    with pytest.raises(DeviceError, match="in use"):
        profile(bundles["a"], device, runs=1)
    assert flash(bundles["a"], device, dry_run=True).steps
    other.kill()  # no goodbye: its link broke
    other.communicate()
    assert flash(bundles["a"], device).good
    assert profile(bundles["a"], device, runs=20).methods  # which installs within its own lease


def test_a_device_in_use_is_waited_for(tmp_path, bundles):
    other = holder(tmp_path)
    threading.Timer(1.5, other.kill).start()
    assert flash(bundles["a"], LocalTransport(tmp_path), wait_s=30).good
    other.communicate()


def test_two_installers_at_once_one_is_refused(tmp_path, bundles):
    done: list[object] = []

    def install(name: str) -> None:
        try:
            done.append(flash(bundles[name], LocalTransport(tmp_path)).current)
        except DeviceError as error:
            done.append(error)

    threads = [threading.Thread(target=install, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [d for d in done if isinstance(d, DeviceError)]
    assert len(refused) <= 1 and all("in use by" in str(r) for r in refused)
    assert status(LocalTransport(tmp_path)).current in [d for d in done if isinstance(d, str)]


def test_a_fake_device_in_use(bundles):
    with pytest.raises(DeviceError, match="in use by bob@desk"):
        flash(bundles["a"], FakeTransport(failures=Failures(held_by="bob@desk")))
