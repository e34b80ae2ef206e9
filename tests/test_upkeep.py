"""Installs that are cut off at any command, the history they leave, what is mended, removed and refused, and devices with keys of their own."""

from __future__ import annotations

import copy
import json
import os
import subprocess

import pytest
from tiny import tiny_bundle
from typer.testing import CliRunner

from edgesdk.bundles import bundle_digest
from edgesdk.cli import app
from edgesdk.device_keys import give_keys, take_keys
from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError
from edgesdk.flash import clean, flash, roll_back, status
from edgesdk.history import Recorder, read_history
from edgesdk.run import run
from edgesdk.signing import new_key, revoke
from edgesdk.transport.fake import Failures, FakeTransport
from edgesdk.transport.local import LocalTransport


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """name → a bundle's path; `near` has a big file of `big`'s."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, options in {"a": {}, "b": {"seed": 1}, "c": {"seed": 2}, "big": {"seed": 3, "cols": 40000}}.items():
        tiny_bundle(folder / f"{name}.edge", **options)
    tiny_bundle(folder / "near.edge", seed=3, cols=40000, plan=b"{}")
    return {path.stem: path for path in folder.glob("*.edge")}


def device_with(bundles, *names: str) -> FakeTransport:
    device = FakeTransport()
    for name in names:
        flash(bundles[name], device, keep=4)
    return device


def like(device: FakeTransport, **failures: object) -> FakeTransport:
    """The same device once more, about to fail."""
    return FakeTransport(files=copy.copy(device.files), links=copy.copy(device.links), failures=Failures(**failures))  # type: ignore[arg-type]


def used(device: FakeTransport) -> int:
    return sum({id(content): len(content) for content in device.files.values()}.values())


@pytest.mark.parametrize("answer_lost", [False, True])
def test_an_install_cut_at_any_command_leaves_a_good_one_and_is_gone_on_with(bundles, answer_lost):
    start = device_with(bundles, "a", "b")
    a, b, c = (bundle_digest(bundles[n]) for n in "abc")
    cuts, seen = 0, set()
    while True:
        device = like(start, cut_at=cuts, answer_lost=answer_lost)
        try:
            flash(bundles["c"], device)
        except LinkError:
            pass
        else:
            break
        state = status(device)
        seen.add((state.current == c, state.interrupted))
        assert state.current in (b, c) and state.good and not state.damaged, f"cut at {cuts}"
        assert state.previous in (a, b, None)
        if state.interrupted and cuts % 2:  # whatever comes next puts it in order
            back = clean(device)
            assert not back.interrupted and (back.current, back.previous) in ((c, b), (b, a)), f"cut at {cuts}"
            assert back.history[-1].action in ("finished", "undone")
        done = flash(bundles["c"], device)
        assert (done.current, done.previous, done.interrupted) == (c, b, False), f"cut at {cuts}"
        assert {i.digest for i in done.installed} <= {a, b, c} and not [f for f in device.files if ".part" in f]
        numbers = [e.number for e in done.history]
        assert numbers == sorted(set(numbers))
        cuts += 1
    assert cuts > 12 and {(False, False), (False, True), (True, True)} <= seen


@pytest.mark.parametrize("answer_lost", [False, True])
def test_a_rollback_cut_at_any_command_is_finished_or_undone(bundles, answer_lost):
    start = device_with(bundles, "a", "b")
    a, b = (bundle_digest(bundles[n]) for n in "ab")
    for cut in range(100):
        device = like(start, cut_at=cut, answer_lost=answer_lost)
        try:
            roll_back(device)
        except LinkError:
            state = status(device)
            assert state.current in (a, b) and state.good
            after = clean(device)
            assert (after.current, after.previous) in ((a, b), (b, a)) and not after.interrupted, f"cut at {cut}"
        else:
            assert cut > 4
            return
    raise AssertionError("it never ended")


def test_a_cut_switch_to_what_is_damaged_is_undone(bundles):
    start = device_with(bundles, "a", "b")
    a, b, c = (bundle_digest(bundles[n]) for n in "abc")
    flash(bundles["c"], start, keep=4)
    start.files[".edgesdk/history"] = (
        b"\n".join(start.files[".edgesdk/history"].splitlines()[:-1]) + b"\n"
    )  # the last line was never written
    start.files[f".edgesdk/store/{c}/manifest.json"] += b" "
    after = clean(start)
    assert (after.current, after.previous, after.history[-1].action) == (b, a, "undone")
    assert flash(bundles["c"], start).current == c, "and is mended by the next flash"


def test_history_is_read_behind_torn_and_foreign_lines(bundles, tmp_path):
    device = LocalTransport(tmp_path)
    lines = tmp_path / "history"
    for number, result in enumerate(("ok", "a b  c", "it's $(no) `command` \\n %s\ttab\nline")):
        device.must(
            Recorder(device.root, read_history(lines.read_text().splitlines()) if number else ()).step("refused", None, result).argv, ""
        )
        if number == 0:
            with lines.open("ab") as file:
                file.write(b"0123456789abcdef 7 2026-01-0")  # torn by a power cut
    found = read_history(lines.read_text().split("\n"))
    assert [(e.number, e.result) for e in found] == [(1, "ok"), (2, "a b c"), (3, "it's $(no) `command` \\n %s tab line")]
    assert read_history(["", "x", lines.read_text().splitlines()[0].replace("refused", "installed"), "7" * 16 + " 1 2 3"]) == ()


def test_history_is_bounded_and_its_numbers_rise_on(tmp_path):
    device = LocalTransport(tmp_path)
    lines = tmp_path / "history"
    device.must(Recorder(device.root, ()).step("installed", "d" * 64).argv, "")
    lines.write_text(lines.read_text() + "x\n" * 400)
    device.must(Recorder(device.root, ()).step("installed", "d" * 64).argv, "")
    assert len(lines.read_text().splitlines()) == 201
    entry = read_history(lines.read_text().splitlines())[-1]
    assert Recorder(device.root, (entry,)).step("x", None).argv[5] == str(entry.number + 1)


def test_a_full_disk_makes_room_by_what_is_no_more_needed(bundles):
    device = device_with(bundles, "a", "b", "big")
    flash(bundles["a"], device, keep=4)  # current a, previous big, b to spare
    device.files[".edgesdk/store/" + "0" * 64 + ".part/model.tflite.part"] = bytes(500_000)
    device.failures.disk_bytes = used(device) + 30_000
    done = flash(bundles["near"], device)  # it shares its file with big, which therefore stays until then
    assert done.good and f"store/{'0' * 64}.part" in done.removed and done.sent_bytes < 100_000
    full = device_with(bundles, "a")
    full.failures.disk_bytes = used(full) + 100_000
    with pytest.raises(DeviceError, match=r"disk is full: .* needed, .* free"):
        flash(bundles["big"], full)
    assert status(full).current == bundle_digest(bundles["a"])
    full.files[f".edgesdk/store/{'0' * 64}.part/x.part"] = bytes(900_000)
    full.failures.disk_bytes = used(full) + 100_000
    done = flash(bundles["big"], full)
    assert done.good and f"store/{'0' * 64}.part" in done.removed


def test_what_arrived_counts_on_a_tight_disk(bundles):
    device = FakeTransport(failures=Failures(cut_after_bytes=500_000))
    with pytest.raises(LinkError):
        flash(bundles["big"], device)
    device.failures.disk_bytes = used(device) + 700_000
    assert flash(bundles["big"], device).resumed_bytes > 300_000


def test_a_disk_that_is_full_at_the_last_line_costs_only_the_line(bundles):
    device = device_with(bundles, "a", "b")
    device.failures.disk_bytes = 1
    assert roll_back(device).current == bundle_digest(bundles["a"])
    with pytest.raises(DeviceError, match="disk is full"):
        flash(bundles["c"], device)
    assert status(device).current == bundle_digest(bundles["a"])


def test_a_read_only_disk_is_named(bundles):
    device = device_with(bundles, "a", "b")
    device.failures.read_only = True
    for act in (lambda: flash(bundles["c"], device), lambda: roll_back(device), lambda: clean(device), lambda: give_keys(device)):
        with pytest.raises(DeviceError, match="disk is read-only") as caught:
            act()
        assert caught.value.exit_code == 3 and "remount" in caught.value.hint
    assert status(device).current == bundle_digest(bundles["b"])


def test_damaged_files_are_found_and_sent_alone(bundles, tmp_path):
    device = LocalTransport(tmp_path)
    good = flash(bundles["big"], device)
    model = tmp_path / "store" / str(good.current) / "model.tflite"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    assert status(device).damaged == ("model.tflite",)
    mended = flash(bundles["big"], device)
    assert mended.action == "installed" and mended.sent_bytes == len(content) and not status(device).damaged
    near = tmp_path / "store" / bundle_digest(bundles["near"])
    model.write_bytes(content)  # what is to be shared is damaged again
    assert flash(bundles["near"], device).good
    assert (near / "model.tflite").read_bytes() != bytes(content)


def test_what_the_device_cannot_run_is_found_before_anything_is_sent(bundles, tmp_path):
    tiny_bundle(tmp_path / "native.edge", plan=b"{}", library=b"\x7fELF\x02\x01\x01" + bytes(11) + (183).to_bytes(2, "little"))
    x86, arm = (b"\x7fELF\x02\x01\x01" + bytes(11) + bytes([machine, 0]) for machine in (62, 183))
    for failures, name, words in (
        (Failures(lacks=("ai_edge_litert", "tflite_runtime")), bundles["a"], "ai-edge-litert not found for python3"),
        (Failures(lacks=("numpy",)), bundles["a"], "numpy not found"),
        (
            Failures(elf=x86.hex()),
            tmp_path / "native.edge",
            r"libedgekernels\.so in the bundle is for arm64, the device's Python is for x86-64",
        ),
    ):
        device = FakeTransport(failures=failures)
        with pytest.raises(DeviceError, match=words) as caught:
            flash(name, device)
        assert caught.value.exit_code == 3 and "nothing was sent" in caught.value.hint and not device.files
    assert flash(tmp_path / "native.edge", FakeTransport(failures=Failures(elf=arm.hex()))).good


def test_garbage_is_removed_and_the_last_good_one_is_not(bundles):
    device = device_with(bundles, "a", "b", "c")
    root, digests = ".edgesdk", {n: bundle_digest(bundles[n]) for n in "abc"}
    device.failures.cut_after_bytes = 300_000
    with pytest.raises(LinkError):
        flash(bundles["big"], device)
    device.files[f"{root}/store/{'1' * 64}.gone/x"] = b"half removed"
    for number in range(3):
        device.files[f"{root}/agent/{number}/agent.zip"] = b"old"
    planned = clean(device, dry_run=True)
    assert planned.action == "dry-run" and len(planned.steps) == 1 and f"{root}/agent/0/agent.zip" in device.files
    done = clean(device)
    assert set(done.removed) == {f"store/{digests['a']}", f"store/{'1' * 64}.gone", "agent/0", "agent/1"}
    assert {i.digest for i in done.installed} == {digests["b"], digests["c"]}
    assert clean(device).removed == ()
    assert flash(bundles["big"], device).resumed_bytes > 0, "the transfer that was cut off was left"
    del device.links[f"{root}/current"]
    kept = clean(device)
    assert bundle_digest(bundles["big"]) in {i.digest for i in kept.installed}, "the last good one"


def test_a_device_with_keys_runs_only_what_they_signed(bundles, tmp_path, monkeypatch):
    device = LocalTransport(tmp_path / "root")
    first = flash(bundles["a"], device)
    keys = give_keys(device)
    assert status(device).trusted_keys and status(device).history[-1].action == "trusted" and "default" in [k.name for k in keys]
    import numpy as np

    x = np.ones((1, 256), np.float32)
    assert run(None, device, inputs=[x]).outputs
    monkeypatch.setenv("EDGESDK_KEYS", str(tmp_path / "other"))
    tiny_bundle(tmp_path / "foreign.edge", seed=9)
    with pytest.raises(CheckFailed, match=r"signed by [0-9a-f]{16}: this device trusts none of them; rolled back") as caught:
        flash(tmp_path / "foreign.edge", device)
    assert caught.value.exit_code == 1 and status(device).current == first.current
    assert status(device).history[-1].action == "refused"
    with pytest.raises(CheckFailed, match="signed by none of them"):
        give_keys(device)
    give_keys(device, regardless=True)
    with pytest.raises(DeviceError, match="trusts none of them"):
        run(None, device, inputs=[x])
    assert flash(tmp_path / "foreign.edge", device).good
    with pytest.raises(DeviceError, match="trusts none of them"):
        roll_back(device)
    take_keys(device)
    assert not status(device).trusted_keys and roll_back(device).current == first.current
    new_key("second")
    revoke("second"), revoke("default")
    with pytest.raises(InputError, match="no key is trusted here"):
        give_keys(device)


def test_command_line(bundles, tmp_path):
    on, runner = f"local:{tmp_path}", CliRunner()
    flash(bundles["a"], on)
    for age, name in enumerate(("newer", "older")):
        folder = tmp_path / "store" / f"{name}.part"
        folder.mkdir()
        os.utime(folder, (1e9 - age, 1e9 - age))
    planned = runner.invoke(app, ["flash", "--gc", "--dry-run", "--on", on])
    assert planned.exit_code == 0 and "remove" in planned.stdout
    done = json.loads(runner.invoke(app, ["flash", "--gc", "--on", on, "--json"]).stdout)
    assert done["action"] == "cleaned" and done["removed"] == ["store/older.part"]
    assert runner.invoke(app, ["keys", "trust", "--on", on]).exit_code == 0
    shown = runner.invoke(app, ["flash", "--status", "--on", on]).stdout
    assert "keys      of its own" in shown and "installed" in shown and "trusted" in shown
    subprocess.run(["sh", "-c", f"printf x >> {tmp_path}/current/model.tflite"], check=True)
    assert "damaged   model.tflite" in runner.invoke(app, ["flash", "--status", "--on", on]).stdout
    assert json.loads(runner.invoke(app, ["keys", "trust", "--on", on, "--anyone", "--json"]).stdout)["anyone"] is True
    for bad in (["keys", "trust"], ["keys", "trust", "--anyone"], ["keys", "trust", "--regardless"], ["flash", "--gc", "--status"]):
        assert runner.invoke(app, bad).exit_code != 0
