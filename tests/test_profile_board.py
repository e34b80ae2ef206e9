"""Measurements on the emulated arm64 board: a link that is cut, a machine that loses its power, a native program's own times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgesdk.errors import DeviceError, LinkError
from edgesdk.flash import status
from edgesdk.intake import load_model
from edgesdk.lease import lease
from edgesdk.lower import build
from edgesdk.plan import plan
from edgesdk.profile import attach, profile
from edgesdk.transport import parse_link
from tests.lab.board import Board
from tests.tiny import tiny_bundle


@pytest.mark.board
def test_a_cut_measurement_is_found_again_by_its_id(board, tmp_path):
    tiny_bundle(tmp_path / "a.edge", seed=11)
    argv = ["profile", str(tmp_path / "a.edge"), "--on", board.cuttable_url, "--mode", "sustained", "--duration", "4s", "--rate", "20"]
    edgesdk = subprocess.Popen(
        [sys.executable, "-m", "edgesdk", *argv, "--patience", "1s"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in edgesdk.stderr:
        said.append(line)
        if " of 4 s" in line:
            board.link.cut_after(0)
    assert edgesdk.wait(60) == 3
    edgesdk.stdout.close()
    edgesdk.stderr.close()
    board.link.restore()
    assert "Traceback" not in "".join(said)
    hint = said[-1].split("edgesdk ", 1)[1]
    job = hint.split()[2]
    assert f"job {job}\n" in said and hint.startswith("profile --attach p-")
    report = attach(job, board.url)
    (m,) = report.methods
    assert m.chunks[-1].end_s - m.chunks[0].start_s > 3.5 and len(m.samples_s) > 50, "it measured on while nobody listened"
    assert report.trust.verdict == "emulated" and report.how.job == job and len(report.moments) >= 4
    assert report.power is None and report.power_reasons


@pytest.mark.board
def test_a_native_program_tells_the_time_of_its_steps(board, tmp_path):
    ref = f"{Path(__file__).parent / 'sequence_small.py'}:encoder_decoder"
    bundle = build(plan(ref, "raspberry-pi-5", runtime="native"), load_model(ref), tmp_path / "model.edge")
    report = profile(bundle, board.url, runs=2, warmup=1, operators=True)
    assert "on the device" in report.operators_route and len(report.operators) > 20
    for method in {o.method for o in report.operators}:
        assert sum(o.share for o in report.operators if o.method == method) == pytest.approx(1)
    assert any(o.op.startswith("gemv") and o.unit == "head" for o in report.operators)


@pytest.mark.wide  # two boots and an install: a minute of processor time
def test_a_machine_that_lost_its_power_says_so(tmp_path):
    tiny_bundle(tmp_path / "a.edge", seed=12)
    with Board(keeps=True) as own:
        job = []

        def tell(text, share):
            if " of " in text:
                own.power_cut()

        with pytest.raises(LinkError, match="goes on there"):
            profile(
                tmp_path / "a.edge", own.url, mode="sustained", duration_s=60.0, rate_hz=5.0, patience_s=1.0, tell=tell, started=job.append
            )
        own.power_on()
        with pytest.raises(DeviceError, match=r"started anew while the job|left no state"):
            attach(job[0], own.url)
        with lease(parse_link(own.url), "see that it is free"):
            assert status(own.url).good
