"""Plans: options, the solver's proof, budgets that bind, quality, the command line."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

import pytest
from test_cost import device, linear

from edgesdk.errors import InputError, UnknownName
from edgesdk.graph.types import Unit
from edgesdk.plan import Budget, Plan, Workload, plan
from edgesdk.plan.lengths import Lengths
from edgesdk.plan.options import options
from edgesdk.plan.solve import Option, solve

MODELS = Path(__file__).parents[1].parent / "shared" / "data" / "models"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESDK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def digits(cache: object) -> Plan:
    return plan("example:digits-cnn", "pi5")


def test_int4_needs_groups_of_32() -> None:
    assert "int4-g32" in options(linear(width=64), "forward", "executorch", device())
    assert "int4-g32" not in options(linear(width=48), "forward", "executorch", device())


def test_a_weight_of_another_module_stays_float_in_executorch() -> None:
    tied = linear().model_copy(update={"weight": "table.weight"})
    assert options(tied, "forward", "executorch", device()) == ["fp32"]


def test_quantized_flatbuffers_are_kept() -> None:
    unit = linear().model_copy(update={"act_bytes": 1, "weight_dtype": "int8"})
    assert options(unit, "forward", "litert", device(), source="tflite") == ["as-is"]


def test_static_needs_data() -> None:
    assert "int8-static" not in options(linear(), "forward", "litert", device(), static=False)
    assert options(Unit(name="add", op="elementwise"), "forward", "litert", device(), static=False) == ["fp32"]


def test_an_absent_runtime_is_named() -> None:
    with pytest.raises(InputError, match="no runtime 'ncnn'"):
        options(linear(), "forward", "ncnn", device())


@pytest.mark.parametrize("seed", range(5))
def test_the_solver_equals_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    groups = [
        [Option(f"g{i}", p, {"latency": rng.uniform(1, 9), "memory": rng.uniform(1, 9), "harm": 0.0}) for p in ("a", "b", "c")]
        for i in range(5)
    ]
    limits, fixed = {"memory": 24.0}, {"latency": 3.0, "memory": 2.0}
    feasible = [c for c in product(*groups) if 2.0 + sum(o.use["memory"] for o in c) <= 24.0]
    found = solve([o for g in groups for o in g], fixed, limits)
    assert found.proof.gap <= 1e-3
    assert found.stretch == 1
    best = min(sum(o.use["latency"] for o in c) for c in feasible)
    assert sum(o.use["latency"] for o in found.chosen.values()) == pytest.approx(best, rel=1e-3)


def test_an_impossible_budget_gives_the_nearest_choice() -> None:
    table = [Option("g", "a", {"latency": 1.0, "memory": 40.0}), Option("g", "b", {"latency": 2.0, "memory": 20.0})]
    found = solve(table, {"memory": 0.0}, {"memory": 10.0})
    assert found.stretch == pytest.approx(2.0) and found.chosen["g"].precision == "b"


def test_the_plan_of_the_example(digits: Plan) -> None:
    assert digits.fits and digits.device == "raspberry-pi-5"
    assert digits.quality is not None and digits.quality > 0.97
    assert digits.quality_drop is not None and digits.quality_drop <= 0.01
    assert 0 < digits.latency.low < digits.latency.value < digits.latency.high
    assert digits.memory.peak_bytes > digits.memory.weights_bytes > 0
    assert digits.proof.name == "HiGHS" and digits.proof.gap < 1e-3
    assert {u.unit for u in digits.units if u.weight_bytes} == {"stem", "depthwise", "pointwise", "down", "hidden", "head"}
    assert Plan.from_json(digits.to_json()) == digits


def test_planning_again_gives_the_same_plan(digits: Plan) -> None:
    again = plan("example:digits-cnn", "pi5")
    assert again.units == digits.units and again.digests == digits.digests


def test_the_front_trades_memory_for_time(digits: Plan) -> None:
    times = [c.latency.value for c in digits.front]
    sizes = [c.memory_bytes for c in digits.front]
    assert times == sorted(times) and sizes == sorted(sizes, reverse=True)


def test_nothing_fits_in_2_mb(digits: Plan) -> None:
    tight = plan("example:digits-cnn", "pi-zero-2w", budget=Budget(memory_bytes=2_000_000))
    assert not tight.fits
    assert tight.checks[0].name == "memory" and tight.checks[0].reached > 2_000_000
    assert tight.units


def test_storage_forces_smaller_weights(digits: Plan) -> None:
    free = plan("example:digits-cnn", "pi5", runtime="executorch")
    tight = plan("example:digits-cnn", "pi5", runtime="executorch", budget=Budget(storage_bytes=int(free.storage_bytes * 0.9)))
    assert tight.storage_bytes < free.storage_bytes


def test_bad_names(digits: Plan) -> None:
    with pytest.raises(UnknownName, match="unknown device"):
        plan(device="jetsen")
    with pytest.raises(UnknownName, match="method"):
        plan(device="pi5", budget=Budget(method_latency_s={"decode": 1.0}))
    with pytest.raises(UnknownName):
        plan(device="pi5", runtime="ncnn-nonsense")
    with pytest.raises(InputError, match="cores"):
        plan(device="pi5", threads=99)


def test_the_command_line(digits: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgesdk.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["plan", "--device", "pi5", "--json", "--out", str(tmp_path / "plan.json")])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kind"] == "plan" and "digits-cnn" in err
    assert Plan.load(tmp_path / "plan.json").fits
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--device", "pi-zero-2w", "--model", "example:digits-cnn", "--memory", "2MB", "--json"])
    assert stop.value.code == 1 and json.loads(capsys.readouterr().out)["fits"] is False
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--device", "pi5", "--memory", "many"])
    assert stop.value.code == 2 and "is not a size" in capsys.readouterr().err


@pytest.mark.skipif(not MODELS.exists(), reason="needs ../shared/data/models")
@pytest.mark.parametrize("name", ["kws_int8", "resnet8_float"])
def test_flatbuffers_are_planned(name: str) -> None:
    made = plan(str(MODELS / f"mlperf_tiny_{name}.tflite"), "pi5")
    assert made.fits and made.runtime in ("litert", "tflite-runtime") and made.quality is None
    kinds = {u.precision for u in made.units if u.weight_bytes}
    assert kinds == {"as-is"} if name.endswith("int8") else "as-is" not in kinds


def test_the_front_is_a_front_and_its_ends_are_there(digits: Plan) -> None:
    assert digits.front
    for one, two in zip(digits.front, digits.front[1:], strict=False):
        assert one.latency.value <= two.latency.value and one.memory_bytes > two.memory_bytes


def test_more_tokens_take_longer_and_too_many_are_refused() -> None:
    lengths = (Lengths(values=(n,), shares=(1.0,), buckets=(12,)) for n in (4, 12))  # one set of programs
    short, long = (
        plan("example:normalizer", "pi5", runtime="litert", layout="encoder-decoder", workload=Workload(output_length=n, draft=4))
        for n in lengths
    )
    assert set(short.method_latency) == {"encode", "decode", "decode_x4"}
    decode = short.method_latency["decode"].value
    assert long.latency.value - short.latency.value == pytest.approx(8 * decode, rel=0.05)
    with pytest.raises(InputError, match="want more positions than the model's 56"):
        plan("example:normalizer", "pi5", layout="encoder-decoder", workload=Workload(output_length=400))
    with pytest.raises(InputError, match="writes no sequence"):
        plan("example:digits-cnn", "pi5", workload=Workload(output_length=4))


def test_verify_builds_every_candidate_of_the_front() -> None:
    answer = plan("example:digits-cnn", "host", runtime="litert", verify=True)
    assert answer.front and all(c.built for c in answer.front)
    built = [c.built for c in answer.front if c.built and c.built.refused is None]
    assert built and all(b.quality is not None and b.quality > 0.97 and b.program_bytes for b in built)
