"""The whole loop on an emulated arm64 board over real ssh, and what goes wrong on the way. Timings are an emulator's: they are labelled, never judged."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgesdk.bundles import bundle_digest, read_manifest
from edgesdk.errors import CheckFailed, DeviceError, EdgeError, LinkError
from edgesdk.flash import flash, roll_back, status
from edgesdk.intake import load_model
from edgesdk.lower import build
from edgesdk.plan import plan
from edgesdk.profile import profile
from edgesdk.run import run
from edgesdk.sequence.choose import Settings
from edgesdk.transport.local import LocalTransport
from tests.sequence_small import built
from tests.tiny import tiny_bundle

pytestmark = pytest.mark.board


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits example planned for a Pi 5 with LiteRT and built."""
    made = plan("example:digits-cnn", "raspberry-pi-5", runtime="litert")
    return build(made, load_model("example:digits-cnn"), tmp_path_factory.mktemp("bundle") / "digits.edge")


def test_plan_build_flash_profile(board, digits):
    deployment = flash(digits, board.url)
    assert deployment.current == bundle_digest(digits)
    assert deployment.good
    assert all(g.relative_error <= g.allowed for g in deployment.golden) and deployment.golden
    report = profile(digits, board.url, runs=20)
    assert report.conditions.machine.startswith("aarch64")
    assert report.conditions.emulated and report.trust.verdict == "emulated"
    assert len(report.methods[0].samples_s) == 20
    assert report.peak_rss_bytes > 10_000_000
    assert not [c for c in report.comparisons if c.unit == "s"], "an emulator's time is not held against a prediction"
    assert flash(digits, board.url).sent_bytes == 0, "what is there is not sent again"


def test_a_cut_transfer_resumes(board, tmp_path):
    path = tmp_path / "big.edge"
    tiny_bundle(path, seed=1, rows=16, cols=40000)
    program = next(m for m in read_manifest(path).members if m.name == "model.tflite")
    board.link.cut_after(1_000_000)
    with pytest.raises(LinkError):
        flash(path, board.cuttable_url)
    board.link.restore()
    deployment = flash(path, board.cuttable_url)
    assert deployment.current == bundle_digest(path)
    assert 0 < deployment.resumed_bytes < program.size_bytes


def test_a_half_sent_file_that_is_damaged_is_sent_anew(board, tmp_path):
    path = tmp_path / "big.edge"
    tiny_bundle(path, seed=6, rows=16, cols=40000)
    before = status(board.url).current
    board.link.cut_after(1_000_000)
    with pytest.raises(LinkError):
        flash(path, board.cuttable_url)
    board.link.restore()
    part = f"/data/edgesdk/store/{bundle_digest(path)}.part/model.tflite.part"
    assert board.ssh(f"printf x | dd of={part} bs=1 seek=5000 conv=notrunc").returncode == 0
    with contextlib.suppress(CheckFailed, DeviceError):  # refused, or sent anew at once: never installed with that byte
        flash(path, board.url)
    else_current = status(board.url).current
    assert else_current in (before, bundle_digest(path))
    assert flash(path, board.url).current == bundle_digest(path)
    got = board.ssh("sha256sum", "/data/edgesdk/current/model.tflite").stdout.split()[0]
    assert got == next(m.sha256 for m in read_manifest(path).members if m.name == "model.tflite")


def test_a_bad_install_is_rolled_back(board, digits, tmp_path):
    flash(digits, board.url)
    bad = tmp_path / "bad.edge"
    tiny_bundle(bad, seed=2, wrong=True)
    with pytest.raises(CheckFailed):
        flash(bad, board.url)
    state = status(board.url)
    assert state.current == bundle_digest(digits) and state.good


def test_a_full_disk_leaves_what_was(board, digits, tmp_path):
    flash(digits, board.url)
    big = tmp_path / "big.edge"
    tiny_bundle(big, seed=3, rows=16, cols=40000)
    board.fill_disk()
    try:
        with pytest.raises(DeviceError) as error:
            flash(big, board.url)
        assert error.value.exit_code == 3
    finally:
        board.free_disk()
    assert status(board.url).current == bundle_digest(digits)
    assert flash(big, board.url).current == bundle_digest(big)


def test_a_bundle_whose_digest_is_wrong_is_refused(board, digits, tmp_path):
    flash(digits, board.url)
    path = tmp_path / "changed.edge"
    data = bytearray(digits.read_bytes())
    middle = data.index(b"TFL3") + 2000  # in the program's bytes
    data[middle] ^= 1
    path.write_bytes(data)
    with pytest.raises(EdgeError) as error:
        flash(path, board.url)
    assert error.value.exit_code in (1, 2)
    assert status(board.url).current == bundle_digest(digits)


def test_rollback_goes_back(board, digits, tmp_path):
    flash(digits, board.url)
    other = tmp_path / "other.edge"
    tiny_bundle(other, seed=5)
    flash(other, board.url)
    assert roll_back(board.url).current == bundle_digest(digits)


def test_the_command_line_over_ssh(board, digits, tmp_path):
    def edgesdk(*args):
        done = subprocess.run([sys.executable, "-m", "edgesdk", *args], capture_output=True, text=True, timeout=180)
        assert "Traceback" not in done.stderr
        return done

    done = edgesdk("flash", str(digits), "--on", board.url, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["current"] == bundle_digest(digits)
    done = edgesdk("profile", "--on", board.url, "--runs", "5", "--warmup", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["conditions"]["emulated"] is True and report["trust"]["verdict"] == "emulated"
    board.link.cut_after(0)
    done = edgesdk("flash", "--status", "--on", board.cuttable_url)
    board.link.restore()
    assert done.returncode == 3 and len(done.stderr.strip().splitlines()) == 2, done.stderr


def test_a_sequence_model_answers_on_the_board(board, tmp_path):
    bundle = built("encoder_decoder", "raspberry-pi-5", "litert", tmp_path / "model.edge")
    prompts = ["hello you", "a", "longer prompt"]
    for settings in (Settings(), Settings(beams=2, max_tokens=6), Settings(temperature=0.5, seed=2, stop=("e",))):
        events = []
        answer = run(bundle, board.url, prompt=prompts, settings=settings, hear=events.append)
        here = run(bundle, LocalTransport(tmp_path / "root"), prompt=prompts, settings=settings)
        assert [(r.tokens, r.text, r.stopped) for r in answer.results] == [(r.tokens, r.text, r.stopped) for r in here.results]
        assert [e["prompt"] for e in events if e["event"] == "done"] == [0, 1, 2]
    seen = []
    (cut,) = run(bundle, board.url, prompt="hello you", hear=seen.append, cancelled=lambda: len(seen) >= 2).results
    assert cut.stopped in ("cancelled", "max-tokens") and cut.tokens
    report = profile(bundle, board.url, runs=3, warmup=1)
    assert {"first of 14 tokens", "each later token"} <= {m.method for m in report.methods} and report.trust.verdict == "emulated"


def test_a_native_program_answers_on_the_board(board, tmp_path):
    """Our own kernels for its core, in a library that came with the bundle: nothing is compiled there, and no runtime is installed."""
    ref = f"{Path(__file__).parent / 'sequence_small.py'}:encoder_decoder"
    bundle = build(plan(ref, "raspberry-pi-5", runtime="native"), load_model(ref), tmp_path / "model.edge")
    here = build(plan(ref, "host", runtime="native"), load_model(ref), tmp_path / "here.edge")
    prompts = ["hello you", "a", "longer prompt"]
    answer = run(bundle, board.url, prompt=prompts)
    twin = run(here, LocalTransport(tmp_path / "root"), prompt=prompts)
    assert [r.tokens for r in answer.results] == [r.tokens for r in twin.results]
    report = profile(bundle, board.url, runs=3, warmup=1)
    assert report.trust.verdict == "emulated" and {"encode"} <= {m.method for m in report.methods}
