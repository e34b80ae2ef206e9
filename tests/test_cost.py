"""The cost law: roofline terms, levels, intervals, fused clamps; and the calibration's fit on times it made itself."""

from __future__ import annotations

import pytest

from edgesdk.device import DeviceProfile
from edgesdk.efficiency import Efficiency, OpRate
from edgesdk.errors import InputError, MissingTool
from edgesdk.graph.types import MethodGraph, TensorInfo, Unit
from edgesdk.plan.cost import call_seconds, fused, kind_of, level_of, method_costs, padding, stream_seconds, total, unit_cost


def device() -> DeviceProfile:
    cpu = {
        "name": "cpu", "kind": "cpu", "core": "test", "cores": 4, "clock_hz": 1e9, "peak_ops_per_s": {"fp32": 4e10, "int8": 16e10},
        "caches": [{"level": 1, "size_bytes": 32768}, {"level": 2, "size_bytes": 524288}],
    }  # fmt: skip
    return DeviceProfile.check(
        {
            "name": "board", "title": "a board", "family": "raspberry-pi", "arch": "aarch64", "os": "linux", "units": [cpu],
            "memory": {"size_bytes": 10**9, "usable_share": 0.8, "bandwidth_bytes_per_s": 8e9, "one_thread_bytes_per_s": 4e9},
            "runtimes": [{"name": "litert", "unit": "cpu", "precisions": ["fp32", "int8-static", "int8-dynamic", "int8-weight-only"]},
                         {"name": "executorch", "unit": "cpu", "precisions": ["fp32", "int8-static", "int8-dynamic", "int4-g32"]}],
            "sources": {"units": "test", "memory": "test"},
        },
        "board",
    )  # fmt: skip


def law(share: float = 0.5, overhead: float = 1e-6, log_sd: float = 0.1, origin: str = "fitted") -> Efficiency:
    row = OpRate(op="*", precision="*", share_of_peak=share, overhead_s=overhead, log_sd=log_sd, source="test")
    return Efficiency.check({"device": "board", "runtime": "litert", "origin": origin, "rows": [row], "call_overhead_s": 5e-6}, "test")


def linear(rows: int = 1, width: int = 256) -> Unit:
    return Unit(
        name="fc", op="linear", weight="fc.weight", rows=width, cols=width, macs=rows * width * width, in_elements=rows * width,
        out_elements=rows * width,
    )  # fmt: skip


def method(*units: Unit) -> MethodGraph:
    ends = TensorInfo(name="x", shape=(1, 256), dtype="float32")
    return MethodGraph(name="forward", units=units, inputs=(ends,), outputs=(ends,), peak_activation_bytes=2048)


def test_many_rows_are_bound_by_compute() -> None:
    cost = unit_cost(linear(rows=256), "fp32", device(), "litert", 1, law())
    assert cost.bound == "compute"
    assert cost.seconds == pytest.approx(1e-6 + 2 * 256**3 / (0.5 * 1e10))


def test_one_row_of_large_weights_is_bound_by_memory() -> None:
    cost = unit_cost(linear(width=2048), "fp32", device(), "litert", 1, law())
    assert cost.bound == "memory"
    assert cost.seconds == pytest.approx(1e-6 + 4 * 2048**2 / 4e9, rel=0.02)


def test_smaller_weights_are_faster_where_memory_binds() -> None:
    times = [unit_cost(linear(width=2048), p, device(), "executorch", 1, law()).seconds for p in ("fp32", "int8-dynamic", "int4-g32")]
    assert times == sorted(times, reverse=True)


def test_weight_only_saves_storage_and_no_traffic() -> None:
    wide = linear(width=2048)
    light, full = (unit_cost(wide, p, device(), "litert", 1, law()).seconds for p in ("int8-weight-only", "fp32"))
    assert light == full


def test_a_tiny_operator_is_bound_by_its_overhead() -> None:
    assert unit_cost(linear(width=8), "fp32", device(), "litert", 1, law()).bound == "overhead"


def test_the_working_set_decides_the_level() -> None:
    cpu = device().units[0]
    assert [level_of(n, cpu) for n in (1000, 100_000, 10**7)] == ["L1", "L2", "memory"]
    unit = linear(width=256)
    alone, among = (unit_cost(unit, "fp32", device(), "litert", 1, law(share=1.0), working_set=n).seconds for n in (None, 10**8))
    assert among > alone


def test_weights_that_nearly_fill_a_cache_come_partly_from_beyond() -> None:
    board, levels = device(), {"L1": 8e10, "L2": 4e10, "memory": 4e9}
    measured = law(origin="calibrated").model_copy(update={"bandwidth_bytes_per_s": levels})
    sizes = [1e4, 2e5, 2.6e5, 3.5e5, 4.5e5, 524288, 6e5, 1e7]
    times = [stream_seconds(1e6, n, board, measured, board.units[0], 1) for n in sizes]
    assert times == sorted(times), "a larger working set is never faster"
    assert times[1] == 1e6 / 4e10 < times[3] < times[4] < times[5] == times[6] == pytest.approx(1e6 / 4e9)
    guessed = law().model_copy(update={"bandwidth_bytes_per_s": levels})
    assert stream_seconds(1e6, 4.5e5, board, guessed, board.units[0], 1) == 1e6 / 4e10, "only where half of a cache was measured"


def test_threads_speed_up_compute_and_not_beyond_the_cores() -> None:
    one, four, eight = (unit_cost(linear(rows=256), "fp32", device(), "litert", n, law(overhead=0.0)).seconds for n in (1, 4, 8))
    assert one / four == pytest.approx(4) and four == eight


def test_intervals_hold_the_value_and_grow_with_the_residual() -> None:
    narrow, wide = (unit_cost(linear(), "fp32", device(), "litert", 1, law(log_sd=sd)) for sd in (0.1, 0.5))
    assert wide.low < narrow.low < narrow.seconds < narrow.high < wide.high


def test_independent_residuals_average_out_only_when_calibrated() -> None:
    costs = [unit_cost(linear(), "fp32", device(), "litert", 1, law())] * 20
    fitted, calibrated = total(costs, law()), total(costs, law(origin="calibrated"))
    assert fitted.value == calibrated.value == pytest.approx(20 * costs[0].seconds + 5e-6)
    assert calibrated.high < fitted.high


def test_a_clamp_after_a_weight_costs_nothing() -> None:
    clamp = Unit(name="relu", op="activation", in_elements=256, out_elements=256)
    lone = Unit(name="relu_1", op="activation", in_elements=256, out_elements=256)
    other = Unit(name="gelu", op="activation", in_elements=256, out_elements=256)
    graph = method(linear(), clamp, other, lone)
    assert fused(graph) == {"relu"}
    costs, call = method_costs(graph, lambda unit: "fp32", device(), "litert", 1, law())
    assert costs["relu"].seconds == 0 < costs["gelu"].seconds and call == 5e-6


def test_a_call_row_counts_inputs_and_outputs() -> None:
    row = OpRate(op="call", precision="fp32", ops_per_s=1.0, overhead_s=1e-6, per_output_s=1e-9, log_sd=0.1, source="test")
    both = law().model_copy(update={"rows": (*law().rows, row)})
    assert call_seconds(method(linear()), "int8-dynamic", both) == pytest.approx(1e-6 + 512e-9)


def test_each_tensor_that_is_passed_costs_and_caches_stay_where_they_are() -> None:
    row = OpRate(
        op="call", precision="fp32", ops_per_s=1.0, overhead_s=1e-6, per_tensor_s=2e-6, per_output_s=1e-9, log_sd=0.1, source="test"
    )
    cache = TensorInfo(name="self_k_0", shape=(1, 2, 100, 10), dtype="float32")
    plain = method(linear())
    more = plain.model_copy(update={"inputs": (*plain.inputs, cache), "cache_inputs": ("self_k_0",)})
    for runtime, elements in (("litert", 2512), ("executorch", 256)):  # ExecuTorch reads caches in place; LiteRT copies them
        both = law().model_copy(update={"rows": (*law().rows, row), "runtime": runtime})
        assert call_seconds(more, "fp32", both) == pytest.approx(1e-6 + 3 * 2e-6 + elements * 1e-9)


def test_a_device_that_was_not_calibrated_pays_for_tensors_by_its_clock() -> None:
    from edgesdk.plan.rates import TENSOR_CYCLES, prior

    for runtime in ("litert", "executorch"):
        row = prior(device(), device().units[0], runtime, 1).row("call", "fp32")
        assert row and row.op == "call" and row.per_tensor_s == pytest.approx(TENSOR_CYCLES[runtime] / 1e9)


def test_bandwidth_is_the_least_disturbed_measurement() -> None:
    from edgesdk.calibrate import bandwidths, least_disturbed

    best = least_disturbed({"L1": 9e10, "memory": 1e10}, {"L1": 8e10, "memory": 3e10})
    assert best == {"L1": 9e10, "memory": 3e10}
    small = device()
    found = bandwidths(small)
    assert list(found) == ["L1", "L2", "memory"] and found["L1"] >= found["L2"] >= found["memory"] > 0


def test_micro_programs_of_many_tensors_run_side_by_side() -> None:
    import torch

    from edgesdk.micro import PASSED, micro_spec
    from edgesdk.micro_lower import combined, ends_of

    spec = micro_spec()
    inputs, outputs = ends_of(spec, {"one": "add_a", "two": "pass_a"})
    assert inputs == ["one"] + ["two"] * PASSED["pass_a"][0] and outputs == ["one"] + ["two"] * (PASSED["pass_a"][0] // 2)
    whole = combined(spec, ["add_a", "pass_a"]).methods["forward"]
    made = whole.module(*whole.example_inputs)
    assert len(made) == len(outputs)
    for mine, own in zip(made[1:], spec.methods["pass_a"].module(*spec.methods["pass_a"].example_inputs), strict=True):
        assert torch.equal(mine, own)


def test_efficiency_saves_and_loads(tmp_path: object) -> None:
    text = law().to_json()
    assert Efficiency.from_json(text) == law()
    assert law().row("conv2d", "int8-static") is not None


def test_the_fit_finds_the_law_that_made_the_times() -> None:
    from edgesdk.calibrate import Sample, fit, predict

    board, levels = device(), {"L1": 4e10, "L2": 2e10, "memory": 4e9}
    rows = tuple(
        OpRate(op=op, precision="fp32", ops_per_s=rate, overhead_s=over, log_sd=0.1, source="test")
        for op, rate, over in (("linear", 5e9, 2e-6), ("call", 1e12, 8e-6))
    )
    true = Efficiency(device="board", runtime="litert", origin="calibrated", rows=rows, bandwidth_bytes_per_s=levels)
    blank = [Sample(method(linear(rows=n, width=w)), "fp32", {}, 1.0) for n, w in ((1, 16), (1, 256), (64, 64), (32, 256), (128, 128))]
    samples = [Sample(s.method, s.precision, s.choice, predict(s, board, "litert", true)) for s in blank]
    found = fit(board, "litert", "0", 1, levels, samples)
    for s in samples:
        assert predict(s, board, "litert", found) == pytest.approx(s.seconds, rel=0.1)
    left_out = Sample(method(linear(rows=16, width=256)), "fp32", {}, 1.0)
    assert predict(left_out, board, "litert", found) == pytest.approx(predict(left_out, board, "litert", true), rel=0.15)


def test_only_this_machine_can_be_calibrated() -> None:
    from edgesdk.calibrate import calibrate

    with pytest.raises(InputError, match="only this machine"):
        calibrate("jetson")
    with pytest.raises(MissingTool):
        calibrate(runtime="tensorrt")


def test_channels_beyond_a_tile_are_computed_too():

    law = Efficiency(device="host", runtime="litert", origin="calibrated", rows=(), tile=16)
    conv = Unit(name="c", op="conv2d", rows=20, cols=27, macs=20 * 27 * 100)
    assert padding(conv, law) == 32 / 20
    assert padding(conv.model_copy(update={"rows": 48}), law) == 1
    assert padding(conv.model_copy(update={"op": "depthwise_conv2d"}), law) == 1
    assert padding(conv, law.model_copy(update={"tile": None})) == 1, "rows fitted without it are used without it"


def test_means_averages_and_maxima_are_three_classes():

    names = ("adaptive_avg_pool2d", "mean#2", "op3_mean", "avg_pool2d", "op4_average_pool_2d", "max_pool2d")
    kinds = ["pool-mean"] * 3 + ["pool-average"] * 2 + ["pool"]
    assert [kind_of(Unit(name=n, op="pool")) for n in names] == kinds
