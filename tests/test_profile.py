"""Profile, report, run: raw samples, trust, predicted beside measured."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import numpy as np
import pytest
from loopback import serve
from tiny import tiny_bundle

from edgesdk.errors import DeviceError, InputError
from edgesdk.measured import operators_of
from edgesdk.operators import read_etdump
from edgesdk.plan.types import Budget, BudgetCheck, Estimate, MemoryAnswer, Plan, SolverProof, Workload
from edgesdk.profile import profile
from edgesdk.report import Conditions, Report
from edgesdk.run import run
from edgesdk.trust import drift, judge, method_samples, percentile

CONDITIONS = Conditions(
    when="2026-01-01T00:00:00+00:00", device="host", link="local", emulated=False, machine="m", system="s", runtime="litert",
    runtime_version="2", threads=1, clock_after_hz=2e9, clock_before_hz=2e9,
)  # fmt: skip


def _plan(device: str = "host", runtime_bytes: int | None = None) -> Plan:
    one = Estimate(value=1e-5, low=1e-6, high=1e-3)
    memory = MemoryAnswer(
        weights_bytes=4096, activations_bytes=0, cache_bytes=0, cross_cache_bytes=0, io_bytes=1040, runtime_bytes=runtime_bytes,
        peak_bytes=5136 + (runtime_bytes or 0),
    )  # fmt: skip
    return Plan(
        model="tiny", model_name="tiny", layout="plain", device=device, runtime="litert", unit="cpu", threads=1, power_mode=None,
        workload=Workload(), budget=Budget(), fits=True,
        checks=(BudgetCheck(name="memory", limit=1, reached=0, fits=True),), units=(), latency=one,
        method_latency={"forward": one}, memory=memory, storage_bytes=1, quality=None, quality_drop=None,
        proof=SolverProof(name="HiGHS", status="optimal", objective=0, bound=0, gap=0, seconds=0), front=(), reasons=(), digests={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(bundle, link) with a plan for the host."""
    folder = tmp_path_factory.mktemp("profile")
    tiny_bundle(folder / "a.edge", plan=_plan(runtime_bytes=10_000_000).to_json().encode())
    return folder / "a.edge", f"local:{folder}/root"


@pytest.fixture(scope="module")
def report(place):
    return profile(*place, runs=40)


def _report(samples, **conditions) -> Report:
    c = CONDITIONS.model_copy(update=conditions)
    methods = (method_samples("forward", None, samples),)
    return Report(
        bundle_digest="0" * 64, model_name="tiny", conditions=c, load_cold_s=None, load_warm_s=None, methods=methods, peak_rss_bytes=None,
        trust=judge(c, methods),
    )  # fmt: skip


def test_a_report_holds_raw_samples_and_what_was_predicted(report):
    (m,) = report.methods
    assert len(m.samples_s) == 40 and m.p50_s == percentile(m.samples_s, 0.5) <= m.p90_s <= m.p99_s
    assert m.cold_s > 0 and report.load_cold_s > 0 and report.load_warm_s > 0
    assert report.peak_rss_bytes >= report.rss_before_load_bytes >= report.rss_start_bytes > 0
    rows = {c.name: c for c in report.comparisons}
    assert rows["latency forward"].predicted == 1e-5 and rows["latency forward"].measured == m.p50_s
    assert rows["memory of the program"].predicted == 5136
    assert rows["memory with the runtime"].predicted == 10_005_136
    assert report.conditions.device == "host" and report.trust.verdict in ("good", "noisy")


def test_saved_and_loaded_alone(report, tmp_path):
    assert Report.load(report.save(tmp_path / "r.json")) == report


def test_the_same_over_ssh_and_what_is_current(tmp_path, place):
    with serve(tmp_path) as server:
        link = server.link(tmp_path / "root")
        with pytest.raises(DeviceError, match="nothing is installed"):
            profile(None, link)
        first = profile(place[0], link, runs=5, device="host")
        again = profile(None, link, runs=5)
    assert first.bundle_digest == again.bundle_digest
    assert first.comparisons and first.trust.verdict == "noisy"  # five samples are few
    assert again.conditions.link.startswith("ssh://")


def test_a_plan_for_another_device_is_not_compared(tmp_path):
    tiny_bundle(tmp_path / "a.edge", plan=_plan("jetson-orin-nano").to_json().encode())
    found = profile(tmp_path / "a.edge", f"local:{tmp_path}/root", runs=2)
    assert found.comparisons == ()
    assert any("planned for jetson-orin-nano" in r for r in found.trust.reasons)


def test_bad_requests(place):
    for options in ({"runs": 0}, {"warmup": -1}):
        with pytest.raises(InputError):
            profile(*place, **options)
    with pytest.raises(InputError, match="no method 'decode'"):
        profile(*place, runs=1, method="decode")
    with pytest.raises(InputError, match="measures nothing"):
        profile(place[0], "fake")


def test_percentiles_and_drift():
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([1, 2], 0.5) == 1.5
    assert percentile([5], 0.99) == 5
    assert np.isclose(percentile(range(101), 0.9), np.quantile(np.arange(101), 0.9))
    assert drift([1.0] * 10 + [1.2] * 10) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("samples", "conditions", "verdict", "words"),
    [
        ([1e-3] * 30, {}, "good", None),
        ([1e-3] * 20 + [2e-3] * 10, {}, "noisy", "p90"),
        ([1e-3] * 15 + [1.15e-3] * 15, {}, "noisy", "last third"),
        ([1e-3] * 5, {}, "noisy", "5 samples"),
        ([1e-3] * 30, {"clock_after_hz": 1.5e9}, "throttled", "clock fell"),
        ([1e-3] * 30, {"throttled": True}, "throttled", "throttled"),
        ([1e-3] * 30, {"temperature_after_c": 90.0}, "throttled", "90 °C"),
        ([1e-3] * 30, {"emulated": True, "throttled": True}, "emulated", "silicon"),
        ([1e-3] * 30, {"clock_after_hz": None}, "good", "cannot be read"),
    ],
)
def test_trust(samples, conditions, verdict, words):
    trust = _report(samples, **conditions).trust
    assert trust.verdict == verdict
    assert words is None or any(words in r for r in trust.reasons)


def test_run_answers_with_arrays(place):
    x = np.ones((1, 256), np.float32)
    answer = run(*place, inputs=[x])
    assert answer.outputs[0].shape == (1, 4) and answer.text is None
    for options in (
        {},
        {"inputs": [x], "prompt": "x"},
        {"inputs": [x, x]},
        {"inputs": [x[:, :3]]},
        {"prompt": "x"},
        {"inputs": [x], "method": "m"},
    ):
        with pytest.raises(InputError):
            run(*place, **options)


def test_an_etdump_of_a_users_own_runner_is_read(tmp_path):
    """Operators keep their times; events that hold others are left out."""
    flatcc = pytest.importorskip("executorch.devtools.etdump.schema_flatcc", reason="needs executorch")
    from executorch.devtools.etdump.serialize import serialize_to_etdump_flatcc

    def event(name: str, instruction: int, start: int, end: int):
        return flatcc.Event(flatcc.ProfileEvent(name, 0, instruction, -1, None, None, start, end), None, None)

    events = [event("Method::execute", -1, 0, 4000), event("native_call_mm.out", 0, 0, 3000), event("native_call_relu.out", 1, 3000, 4000)]
    dump = flatcc.ETDumpFlatCC(0, [flatcc.RunData("forward", -1, [], events)])
    content = serialize_to_etdump_flatcc(dump)
    (tmp_path / "x.etdp").write_bytes(len(content).to_bytes(4, "little") + content)
    rows, route = read_etdump(tmp_path / "x.etdp")
    assert {r.unit: r.median_s for r in rows} == pytest.approx({"native_call_mm.out": 3e-6, "native_call_relu.out": 1e-6})
    assert sum(r.share for r in rows) == pytest.approx(1) and "x.etdp" in route
    on_device, route = operators_of({"etdump": base64.b64encode((tmp_path / "x.etdp").read_bytes()).decode()})
    assert on_device == rows and route == "ExecuTorch's event tracer on the device"


def test_operators_as_a_device_told_them():
    rows, route = operators_of({"rows": [["decode", "head", "gemv", [3.0, 1.0, 2.0]], ["decode", "embed", "embed", [6.0]]], "route": "r"})
    assert [(r.unit, r.median_s, r.share) for r in rows] == [("head", 2.0, 0.25), ("embed", 6.0, 0.75)] and route == "r"
    assert operators_of({"reason": "no tracer"}) == ((), "none: no tracer") and operators_of(None) == ((), None)


def _cli(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgesdk", *args], capture_output=True, text=True, timeout=120)


def test_command_lines(tmp_path, place, report):
    np.save(tmp_path / "x.npy", np.ones((1, 256), np.float32))
    (tmp_path / "not.npy").write_text("no")
    saved = report.save(tmp_path / "r.json")
    shown = _cli("profile", str(place[0]), "--on", place[1], "--runs", "5", "--json")
    assert json.loads(shown.stdout)["kind"] == "report", shown.stderr
    page = _cli("report", str(saved), "-o", str(tmp_path / "r.html"), "--plot", str(tmp_path / "r.png"))
    assert page.returncode == 0 and "trust" in page.stdout and "predicted" in page.stdout
    assert "<svg" in (tmp_path / "r.html").read_text() and (tmp_path / "r.png").stat().st_size > 1000
    assert json.loads(_cli("run", str(place[0]), "--on", place[1], "--input", str(tmp_path / "x.npy"), "--json").stdout)["outputs"][0][
        "shape"
    ] == [1, 4]
    for args, code, words in (
        (["report", str(tmp_path / "x.npy")], 2, "x.npy"),
        (["report", "--etdump", str(tmp_path / "x.npy")], 2, "not an ETDump"),
        (["run", str(place[0]), "--on", place[1], "--input", str(tmp_path / "not.npy")], 2, "cannot be read as .npy"),
        (["profile", "--on", "serial:/dev/no-such-port"], 3, "no such port"),
    ):
        done = _cli(*args)
        assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done.stderr
