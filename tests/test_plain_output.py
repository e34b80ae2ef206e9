"""What the runtimes' own tools print is read as they mean it, their flags are found, and what fails is explained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgesdk.errors import DeviceError
from edgesdk.plain import output
from edgesdk.plain.explain import explain, machine_of, wrong_machine
from edgesdk.plain.facts import read_facts
from edgesdk.plain.tflite import signature
from edgesdk.plain.tools import Call, Feed, identify
from edgesdk.transport.base import Result

FORMS = Path(__file__).parent / "plain_outputs"


def form(name: str) -> str:
    return "".join(line for line in (FORMS / f"{name}.txt").read_text().splitlines(keepends=True) if not line.startswith("#"))


def test_executor_runner_prints_every_call():
    told = output.executor_runner(form("executor_runner-iterations"))
    assert told.samples_s == pytest.approx((0.0018, 0.0011, 0.00101, 0.001, 0.00102, 0.00099))
    assert (told.load_s, told.first_s, told.calls) == (pytest.approx(0.003215), pytest.approx(0.0018), 6)
    assert told.mean_s == pytest.approx(0.00692 / 6)


def test_a_log_with_a_hole_gives_no_samples():
    told = output.executor_runner(form("executor_runner-logcat"))
    assert told.samples_s == () and told.first_s is None and told.mean_s == pytest.approx(0.0013) and told.calls == 3


def test_older_executor_runners_give_a_mean_or_nothing():
    told = output.executor_runner(form("executor_runner-total"))
    assert (told.samples_s, told.calls) == ((), 20) and told.mean_s == pytest.approx(0.001025) and told.load_s is None
    assert output.executor_runner(form("executor_runner-silent")) == output.Told()


def test_benchmark_model_of_litert():
    told = output.benchmark_model(form("benchmark_model-litert"))
    assert (told.calls, told.warmup_calls) == (20, 5)
    assert [told.load_s, told.first_s, told.warmup_mean_s, told.mean_s] == pytest.approx([0.012345, 0.0039, 0.00242, 0.0020305])
    assert [told.min_s, told.max_s, told.std_s, told.p5_s, told.p50_s, told.p95_s] == pytest.approx(
        [0.00199, 0.0022, 0.00005, 0.001995, 0.00202, 0.00218]
    )
    assert (told.load_bytes, told.all_bytes, told.peak_bytes) == (7_864_320, 9_699_328, 22_544_384)
    assert [(o.op, o.name, o.delegate) for o in told.operators] == [
        ("TfLiteXNNPackDelegate", "[y]:2", False),
        ("CUSTOM_OP", "[z]:3", False),
        ("Fully Connected (NC, F32) GEMM", "Delegate/Fully Connected (NC, F32) GEMM:0", True),
        ("Softmax (NC, F32)", "Delegate/Softmax (NC, F32):1", True),
    ]
    assert [o.mean_s for o in told.operators] == pytest.approx([0.0017, 0.0003, 0.00125, 0.00035])
    assert told.samples_s == ()


def test_benchmark_model_of_older_tensorflow():
    told = output.benchmark_model(form("benchmark_model-2.4"))
    assert (told.calls, told.warmup_calls, told.p50_s, told.peak_bytes) == (50, 1, None, None)
    assert [told.first_s, told.mean_s, told.warmup_mean_s] == pytest.approx([3.512391, 2.95034, 3.512391])
    assert [(o.op, o.name) for o in told.operators] == [("CONV_2D", "[a/Relu6]:0"), ("SOFTMAX", "[Predictions/Softmax]:1")]
    oldest = output.benchmark_model(form("benchmark_model-1.14"))
    assert [oldest.load_s, oldest.mean_s] == pytest.approx([0.038467, 0.0797609])
    assert [o.op for o in oldest.operators] == ["CONV_2D", "SOFTMAX"]


@pytest.mark.parametrize("line", ["count=1 curr=147", "INFO: count=3 curr=147(all same)"])
def test_equal_times_are_printed_once(line):
    told = output.benchmark_model(line)
    assert (told.min_s, told.max_s, told.mean_s, told.std_s) == (pytest.approx(147e-6), pytest.approx(147e-6), pytest.approx(147e-6), 0.0)


def test_run_model():
    told = output.run_model(form("run_model"))
    assert [told.first_s, told.min_s, told.max_s, told.mean_s] == pytest.approx([0.0019, 0.00099, 0.0019, 0.00104]) and told.calls == 40


NONSENSE = [
    "", "count= first=x", "count=0", "count=1 curr=1e", "count=1 curr=22..00", "\t[node type]\t[avg ms]\n\tx\ty",
    "Iteration 2 of 1: 1.0 ms", "Iteration 1 of 999999999999: 1.0 ms", "Iteration 1 of " + "9" * 5000 + ": 1.0 ms", "\0" * 50,
]  # fmt: skip


@pytest.mark.parametrize("read", [output.executor_runner, output.benchmark_model, output.run_model])
@pytest.mark.parametrize("text", NONSENSE, ids=lambda text: repr(text[:24]))
def test_nonsense_gives_nothing(read, text):
    told = read(text)
    assert told.samples_s == () and told.operators == () and told.mean_s is None


CALL = Call("/s/model", "forward", 1, 2, (Feed("in0.bin", (1, 256)), Feed("in1.bin", (2,))))


def test_flags_are_given_where_they_are_known():
    tool = identify("/r/executor_runner", form("help-executor_runner"))
    assert (tool.kind, tool.runtime, tool.unchecked) == ("executor_runner", "executorch", "")
    assert tool.outputs(CALL) == (
        "/r/executor_runner", "--model_path=/s/model", "--inputs=in0.bin,in1.bin", "--num_executions=1", "--cpu_threads=2",
        "--print_output=none", "--output_file=out",
    )  # fmt: skip
    assert "--num_executions=26" in tool.times(CALL, 20, 5)
    assert tool.refusal(Call("/s/model", "encode", 2, 1)) == "" and "--method_name=encode" in tool.times(
        Call("/s/model", "encode", 2, 1), 1, 0
    )
    first = identify("/r/executor_runner", form("help-executor_runner-first"))
    assert first.times(CALL, 20, 5) == ("/r/executor_runner", "--model_path=/s/model")
    assert first.unchecked == "this executor_runner has no --output_file and no --inputs"
    assert "one method alone" in first.refusal(Call("/s/model", "encode", 2, 1))


def test_flags_of_benchmark_model():
    tool = identify("/r/b", form("help-benchmark_model"))
    assert (tool.kind, tool.runtime, tool.unchecked) == ("benchmark_model", "litert", "")
    argv = tool.outputs(CALL)
    assert {"--input_layer=in0,in1", "--input_layer_shape=1,256:2", "--input_layer_value_files=in0:in0.bin,in1:in1.bin"} <= set(argv)
    assert {"--num_runs=1", "--warmup_runs=0", "--min_secs=0", "--warmup_min_secs=0", "--output_filepath=out"} <= set(argv)
    assert "--report_peak_memory_footprint=true" in (tool.memory(CALL) or ()) and "--enable_op_profiling=true" in (
        tool.operators(CALL, 9) or ()
    )
    old = identify("/r/b", form("help-benchmark_model-2.4"))
    assert old.unchecked == "this benchmark_model has no --output_filepath" and old.memory(CALL) is None
    run = identify("/r/run_model", form("help-run_model"))
    assert run.unchecked == "run_model gives no outputs" and run.times(CALL, 30, 0) == (
        "/r/run_model",
        "--graph=/s/model",
        "--iterations=30",
    )


def test_another_program_is_no_runner():
    with pytest.raises(DeviceError, match=r"no runner that edgesdk knows: its --help says 'Usage: ls"):
        identify("/bin/ls", "Usage: ls [OPTION]...\n  -a, --all\n  --color=when  colour\n")


FAILURES = [
    (126, "/system/bin/sh: /data/r: not executable: 32-bit ELF file", {}, "32-bit ELF file that this device does not run", "getprop"),
    (126, "sh: 1: /tmp/r: Exec format error", {}, "not for this device's CPU", "build it for this device"),
    (134, 'CANNOT LINK EXECUTABLE "/data/r": library "libc++_shared.so" not found: needed by main executable', {}, "needs libc++_shared.so", "beside"),
    (127, "/r: error while loading shared libraries: libfoo.so.1: cannot open shared object file", {}, "needs libfoo.so.1", "beside"),
    (1, "/r: /lib/libc.so.6: version `GLIBC_2.38' not found (required by /r)", {}, "GLIBC_2.38 of a newer C library", "statically"),
    (1, "ERROR: Didn't find op for builtin opcode 'FULLY_CONNECTED' version '12'. An older version", {}, "FULLY_CONNECTED version 12", "newer"),
    (134, "E 00:00 executorch:method.cpp:542] Missing operator: [5] aten::add.out\nF abort", {}, "without the operator aten::add.out", "build the runner"),
    (1, "E 00:00 executorch:method.cpp:1] Backend XnnpackBackend is not registered.", {}, "without XnnpackBackend", "XNNPACK=ON"),
    (1, "E 00:00 executorch:program.cpp:1] Program identifier 'ET13' != expected 'ET12'", {}, "format ET13, the runner reads ET12", "one version"),
    (134, "F 00:00 executorch:executor_runner.cpp:9] Loading of method forward failed with status 0x20", {}, "Loading of method forward failed", "not found: a backend"),
    (137, "", {}, "was killed", "smaller plan"),
    (137, "Killed", {"lmkd": "I/lowmemorykiller: Kill 'x'"}, "lmkd", "smaller plan"),
    (126, "sh: /sdcard/r: can't execute: Permission denied", {"options": "rw,nosuid,noexec", "mount": "/sdcard"}, "/sdcard is mounted noexec", "?root="),
    (126, "sh: /data/r: Permission denied", {"selinux": "Enforcing"}, "may not be run", "SELinux is enforcing"),
    (1, "avc: denied { execute } for path=/data/r", {}, "SELinux does not let it", "/data/local/tmp"),
    (127, "sh: /data/r: inaccessible or not found", {}, "no runner at /data/r", "--runner"),
    (127, "sh: /data/r: not found", {"there": "yes"}, "its loader or C library is not", "statically"),
    (132, "Illegal instruction", {}, "newer CPU", "by hand"),
    (1, "ERROR: Failed to load model /s/model.tflite", {}, "Failed to load model", "by hand"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "said", "facts", "what", "hint"), FAILURES, ids=[f[3][:30] for f in FAILURES])
def test_failures_are_explained_in_two_lines(code, said, facts, what, hint):
    error = explain("adb://X", "/data/r", Result(code, b"", said.encode()), facts)
    assert what in error.what and hint in error.hint and error.what.startswith("adb://X: ") and "\n" not in error.what + error.hint
    assert error.exit_code == 3


def test_a_program_for_another_machine_is_seen_before_it_is_sent():
    arm64 = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00"
    assert machine_of(arm64) == 183 and wrong_machine(arm64, "aarch64") == "" and wrong_machine(b"#!/bin/sh\n", "x86_64") == ""
    assert wrong_machine(arm64, "x86_64") == "is for 64-bit Arm, the device is x86_64"


def test_facts_of_a_phone():
    facts = read_facts(
        "machine aarch64\nsystem Linux 5.10.101-android12\nro.product.manufacturer Google\nro.product.model Pixel 6\nro.build.version.release 14\n"
        "cpuinfo CPU part\t: 0xd44\nkhz 1803000\nkhz 2802000\ngovernor sched_pixel\nmillicelsius 41300 big\nmillicelsius -274000 off\nkhz x\n"
    )
    assert (facts["board"], facts["system"], facts["cpu"]) == ("Google Pixel 6", "Android 14, Linux 5.10.101-android12", "0xd44")
    assert (facts["clock_hz"], facts["temperature_c"], facts["governor"], facts["emulated"]) == (2.802e9, 41.3, "sched_pixel", [])
    assert read_facts("machine x86_64\nro.boot.qemu 1\n")["emulated"] == ["ro.boot.qemu = 1"]
    assert read_facts("")["machine"] == "unknown" and read_facts("khz \u00b2\nmillicelsius " + "9" * 5000)["clock_hz"] is None


def two_by_two() -> bytes:
    """A `.tflite` with two inputs and two outputs whose signature names them in another order than the graph; one input is int8."""
    s = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="needs LiteRT")
    flatbuffers = pytest.importorskip("flatbuffers", reason="needs flatbuffers")

    def tensor(name: str, shape: list[int], kind: int, scale: float | None = None) -> object:
        t = s.TensorT()
        t.name, t.shape, t.type = name.encode(), shape, kind
        if scale is not None:
            t.quantization = s.QuantizationParametersT()
            t.quantization.scale, t.quantization.zeroPoint = [scale], [3]
        return t

    def named(name: str, index: int) -> object:
        m = s.TensorMapT()
        m.name, m.tensorIndex = name, index
        return m

    f32, i8 = s.TensorType.FLOAT32, s.TensorType.INT8
    graph = s.SubGraphT()
    graph.tensors = [tensor("b", [2], i8, 0.5), tensor("a", [1, 3], f32), tensor("y", [1, 2], f32), tensor("x", [2], i8, 0.25)]
    graph.inputs, graph.outputs, graph.operators = [0, 1], [2, 3], []
    key = s.SignatureDefT()
    key.signatureKey, key.subgraphIndex = "decode_1", 0
    key.inputs, key.outputs = [named("args_1", 0), named("args_0", 1)], [named("output_0", 3), named("output_1", 2)]
    model = s.ModelT()
    model.version, model.subgraphs, model.signatureDefs, model.buffers = 3, [graph], [key], [s.BufferT()]
    model.operatorCodes = []
    builder = flatbuffers.Builder(256)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_inputs_and_outputs_go_by_the_graphs_order():
    made = signature(two_by_two(), "decode_1")
    assert (made.name, made.methods, made.feed, made.give) == ("decode_1", 1, (1, 0), (1, 0))
    raw = made.raw_inputs([np.array([[1, 2, 3]], np.float32), np.array([1.0, -1.0], np.float32)])
    assert [shape for _, shape in raw] == [(2,), (1, 3)] and np.frombuffer(raw[0][0], np.int8).tolist() == [5, 1]  # 1 / 0.5 + 3
    content = np.array([[7, 8]], np.float32).tobytes() + np.array([3, 7], np.int8).tobytes()
    x, y = made.arrays(content)
    assert x.tolist() == [0.0, 1.0] and y.tolist() == [[7.0, 8.0]]
    for wrong in (content[:-1], content + b"0", b""):
        with pytest.raises(DeviceError, match=r"wrote \d+ bytes of outputs"):
            made.arrays(wrong)
    with pytest.raises(DeviceError, match="no method 'forward'"):
        signature(two_by_two(), "forward")
