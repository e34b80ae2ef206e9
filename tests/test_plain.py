"""Installs and profiles without Python on the device: the runtimes' own tools, played by programs that really run the bundle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from tiny import tiny_bundle

from edgesdk.bundle import GoldenCase
from edgesdk.bundles import array_bytes, bundle_digest, write_bundle
from edgesdk.cli import main
from edgesdk.errors import CheckFailed, DeviceError, InputError
from edgesdk.flash import clean, flash, roll_back, status
from edgesdk.lease import lease
from edgesdk.plain.profile import profile
from edgesdk.report import Report
from edgesdk.transport.local import LocalTransport
from tests.lab.native_runner import install


@pytest.fixture
def device(tmp_path):
    made = LocalTransport(tmp_path / "root")
    made.python = "/no/python/here"
    return made


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for name, options in {"a": {}, "b": {"seed": 1}, "wrong": {"seed": 4, "wrong": True}}.items():
        tiny_bundle(folder / f"{name}.edge", **options)
    return {name: folder / f"{name}.edge" for name in ("a", "b", "wrong")}


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    return install(tmp_path_factory.mktemp("tool"), "benchmark_model")


def test_install_switch_roll_back_and_clean(device, bundles, tool):
    first = flash(bundles["a"], device, runner=str(tool))
    assert first.good and first.unchecked is None and first.current == bundle_digest(bundles["a"])
    assert first.golden[0].relative_error is not None and first.golden[0].relative_error < 1e-4
    root = Path(device.root)
    sent = list((root / "runners").glob("*/benchmark_model"))
    assert len(sent) == 1 and not (root / "agent").exists() and not (root / "scratch").exists()
    assert flash(bundles["a"], device, runner=str(tool)).action == "already-installed"
    again = flash(bundles["b"], device, runner=str(sent[0]))  # it is there
    assert again.current == bundle_digest(bundles["b"]) and not any("put   " in s and "runners" in s for s in again.steps)
    back = roll_back(device, runner=str(tool))
    assert (back.current, back.previous) == (first.current, again.current)
    assert clean(device, runner=str(tool)).removed == ("runners",) and not (root / "runners").exists()
    assert status(device).history[-1].action == "rolled-back"


def test_wrong_outputs_are_refused_and_what_was_stays(device, bundles, tool, tmp_path):
    good = flash(bundles["a"], device, runner=str(tool))
    with pytest.raises(CheckFailed, match=rf"wrong outputs.*current stays {good.current[:12]}"):
        flash(bundles["wrong"], device, runner=str(tool))
    liar = install(tmp_path, "benchmark_model", scale=1.01)  # the program is right, what runs it is not
    with pytest.raises(CheckFailed, match=r"forward\[0\] is off by 0\.01, allowed 0\.001"):
        flash(bundles["b"], device, runner=str(liar))
    after = status(device)
    assert (after.current, after.good, len(after.installed)) == (good.current, True, 1)


def test_a_tool_without_outputs_is_refused_unless_allowed(device, bundles, tmp_path):
    old = install(tmp_path, "benchmark_model", lacks=("output_filepath",))
    with pytest.raises(CheckFailed, match=r"has no --output_filepath: the golden outputs cannot be compared; rolled back") as caught:
        flash(bundles["a"], device, runner=str(old))
    assert "--allow-unchecked" in caught.value.hint and status(device).current is None
    done = flash(bundles["a"], device, runner=str(old), allow_unchecked=True)
    assert done.unchecked == "this benchmark_model has no --output_filepath" and not done.good and done.golden == ()
    assert status(device).history[-1].result == "its outputs were not checked"


def test_latency_gate_and_dry_run(device, bundles, tool):
    dry = flash(bundles["a"], device, runner=str(tool), dry_run=True)
    assert any("runners" in s for s in dry.steps) and not any("agent" in s for s in dry.steps) and not Path(device.root).exists()
    with pytest.raises(CheckFailed, match=r"too slow on the device: forward takes"):
        flash(bundles["a"], device, runner=str(tool), latency_gate=1e-9)


def test_runners_that_do_not_suit(device, bundles, tmp_path):
    other = install(tmp_path, "executor_runner")
    with pytest.raises(DeviceError, match=r"the bundle is for litert, executor_runner is a executor_runner") as caught:
        flash(bundles["a"], device, runner=str(other))
    assert caught.value.hint == "give a benchmark_model"
    arm = tmp_path / "arm"
    arm.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00" + bytes(100))
    with pytest.raises(InputError, match="is for 64-bit Arm, the device is"):
        flash(bundles["a"], device, runner=str(arm))
    with pytest.raises(InputError, match=r"no such file here, and none on local:"):
        flash(bundles["a"], device, runner="/no/such/runner")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\x3e\x00" + bytes(100))
    with pytest.raises(DeviceError, match="is not for this device's CPU"):
        flash(bundles["a"], device, runner=str(broken))
    assert status(device).current is None


def test_the_lock_is_the_same_with_and_without_python(tmp_path, bundles, tool):
    plain, full = LocalTransport(tmp_path / "root"), LocalTransport(tmp_path / "root")
    with lease(full, "profile"), pytest.raises(DeviceError, match=r"in use by .* to profile, since"):
        flash(bundles["a"], plain, runner=str(tool))
    with lease(plain, "install", plain=True), pytest.raises(DeviceError, match=r"in use by .* to install, since"), lease(full, "profile"):
        pass
    with lease(full, "profile"):
        pass


def test_profile_of_a_summary(device, bundles, tool):
    report = profile(bundles["a"], device, str(tool), runs=30, warmup=2)
    m = report.methods[0]
    assert m.samples_s == () and m.p90_s is None and m.summary is not None and m.summary.tool == "benchmark_model"
    assert (m.summary.calls, m.summary.warmup_calls) == (30, 2) and m.summary.mean_s is not None and m.p50_s is not None
    assert m.cold_s is not None and report.load_cold_s is not None and report.peak_rss_bytes is not None and report.peak_rss_bytes > 1e7
    assert report.trust.verdict == "noisy" and any("no single times" in r for r in report.trust.reasons)
    assert report.conditions.runtime_version.startswith("benchmark_model ") and report.conditions.device == "host"
    assert Report.from_json(report.to_json()) == report


def test_a_profile_of_what_no_tool_tells_is_refused(device, bundles, tool, tmp_path):
    with pytest.raises(DeviceError, match="nothing is installed"):
        profile(None, device, str(tool), runs=3, warmup=0)
    old = install(tmp_path, "benchmark_model", lacks=("enable_op_profiling", "report_peak_memory_footprint"))
    with pytest.raises(InputError, match="times no single operators"):
        profile(bundles["a"], device, str(old), runs=3, warmup=0, operators=True)


def cli(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    return int(ended.value.code or 0)


def test_the_command_line_says_loudly_what_was_not_checked(tmp_path, bundles, capsys):
    old = install(tmp_path, "benchmark_model", lacks=("output_filepath",))
    link = f"local:{tmp_path / 'root'}"
    assert cli("flash", str(bundles["a"]), "--on", link, "--runner", str(old), "--allow-unchecked") == 0
    shown = capsys.readouterr().out
    assert "NOT CHECKED" in shown and "not marked good" in shown
    assert cli("profile", "--on", link, "--runner", str(old), "--allow-unchecked", "--runs", "5") == 0
    assert "no single times" in capsys.readouterr().out
    assert cli("profile", "--on", link, "--runner", str(old), "--mode", "cold") == 2


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "other.edge"
    tiny_bundle(path, runtime="executorch")
    return path


def test_executor_runner_gives_outputs_and_every_call(device, other, tmp_path):
    tool = install(tmp_path / "tool", "executor_runner", lacks=("etdump_path",))
    assert flash(other, device, runner=str(tool)).good
    report = profile(other, device, str(tool), runs=25, warmup=3)
    m = report.methods[0]
    assert len(m.samples_s) == 25 and m.summary is None and m.p99_s is not None and m.cold_s is not None
    assert report.load_cold_s is not None and report.peak_rss_bytes is not None and report.peak_rss_bytes > 1e7
    with pytest.raises(InputError, match=r"executor_runner times no single operators") as caught:
        profile(other, device, str(tool), runs=3, warmup=0, operators=True)
    assert "EVENT_TRACER" in caught.value.hint


def test_an_older_executor_runner(device, other, tmp_path):
    liar = install(tmp_path / "liar", "executor_runner", lacks=("etdump_path",), scale=0.5)
    with pytest.raises(CheckFailed, match=r"is off by 0\.5"):
        flash(other, device, runner=str(liar))
    old = install(tmp_path / "old", "executor_runner", lacks=("inputs", "output_file", "print_output", "cpu_threads", "etdump_path"))
    with pytest.raises(CheckFailed, match="has no --output_file and no --inputs"):
        flash(other, device, runner=str(old))
    report = profile(other, device, str(old), runs=20, warmup=0, allow_unchecked=True)
    assert len(report.methods[0].samples_s) == 20 and "made up the inputs" in " ".join(report.trust.reasons)


@pytest.mark.wide
def test_a_real_program_and_the_operators_of_an_event_tracer(device, tmp_path, monkeypatch):
    """A .pte under ExecuTorch; what the tracer recorded is of another run."""
    torch = pytest.importorskip("torch", reason="needs executorch")
    flatcc = pytest.importorskip("executorch.devtools.etdump.schema_flatcc", reason="needs executorch")
    from executorch.devtools.etdump.serialize import serialize_to_etdump_flatcc
    from executorch.exir import to_edge_transform_and_lower

    torch.manual_seed(0)
    model, x = torch.nn.Linear(64, 4).eval(), torch.randn(1, 64)
    program = to_edge_transform_and_lower(torch.export.export(model, (x,))).to_executorch().buffer
    members = {"model.pte": program, "in.npy": array_bytes(x.numpy()), "out.npy": array_bytes(model(x).detach().numpy())}
    case = GoldenCase(method="forward", inputs=("in.npy",), outputs=("out.npy",), max_relative_error=1e-3)
    write_bundle(
        tmp_path / "real.edge", members, model_name="linear", device="host", runtime="executorch", runtime_version="1", program="model.pte",
        methods=("forward",), threads=1, plan_digest="0" * 64, host_check={}, golden=(case,), memory={}, edgesdk_version="0.1.0",
    )  # fmt: skip
    event = flatcc.Event(flatcc.ProfileEvent("native_call_mm.out", 0, 0, -1, None, None, 0, 3000), None, None)
    content = serialize_to_etdump_flatcc(flatcc.ETDumpFlatCC(0, [flatcc.RunData("forward", -1, [], [event])]))
    (tmp_path / "recorded").write_bytes(len(content).to_bytes(4, "little") + content)
    monkeypatch.setenv("EDGESDK_TEST_ETDUMP", str(tmp_path / "recorded"))
    tool = install(tmp_path / "tool", "executor_runner")
    report = profile(tmp_path / "real.edge", device, str(tool), runs=5, warmup=0, operators=True)
    assert [(o.method, o.unit, o.median_s, o.is_mean) for o in report.operators] == [
        ("forward", "native_call_mm.out", pytest.approx(3e-6), False)
    ]
    assert status(device).good


def test_outputs_of_a_case_before_are_not_taken_for_this_ones(device, other, tmp_path):
    """A tool that ends well and writes nothing, after one that wrote."""
    lazy = tmp_path / "executor_runner"
    good = install(tmp_path / "good", "executor_runner", lacks=("etdump_path",))
    lazy.write_text(f'#!/bin/sh\ncase "$*" in *--help*) exec {good} --help;; esac\nexit 0\n')
    lazy.chmod(0o755)
    scratch = Path(device.root, "scratch")
    scratch.mkdir(parents=True)
    with zipfile.ZipFile(other) as archive:
        (scratch / "out-0.bin").write_bytes(archive.read("golden/forward/0/out0.npy")[128:])
    with pytest.raises(CheckFailed, match=r"out-0\.bin"):
        flash(other, device, runner=str(lazy))
    assert status(device).current is None
