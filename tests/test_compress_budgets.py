"""Several budgets at once: what options take on a device, as the planner says it, and choices that hold every budget or say which cannot be held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.cli import main
from edgesdk.compress import Stage, compress, table
from edgesdk.compress.forms import halves, split_units
from edgesdk.compress.saved import load
from edgesdk.compress.svd import METHOD as SVD
from edgesdk.compress.svd import SvdConfig
from edgesdk.compress.types import Weight
from edgesdk.devices import load_device
from edgesdk.errors import DoesNotFit, InputError, UnknownName
from edgesdk.graph.types import Unit
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import decode, pack
from edgesdk.plan import Budget, plan
from edgesdk.units import parse_joules, parse_latencies, show_amount

FEW = "rtn:bits=8,group=0|rtn:bits=4,group=0|rtn:bits=4,group=32|rtn:bits=3,group=0"
USUAL = {"methods": FEW, "generations": 0, "device": "pi5", "runtime": "litert"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESDK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _spec(width: int = 256, rank: int = 0, evaluate: bool = False) -> ModelSpec:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    if rank:
        with torch.no_grad():
            net[2].weight.copy_(torch.randn(width, rank) @ torch.randn(rank, width) / width)
    inputs = [(torch.randn(1, 64),) for _ in range(16)]
    wanted = [net(*i).detach().numpy() for i in inputs]

    def close(run: object) -> float:
        got = [run("forward", [i[0].numpy()])[0] for i in inputs]  # type: ignore[operator]
        return 1 - float(np.mean([np.abs(a - b).mean() / np.abs(b).mean() for a, b in zip(got, wanted, strict=True)]))

    methods = {"forward": Method(net, inputs[0])}
    return ModelSpec(f"net{width}", f"net-{width}-{rank}", methods, calibration=lambda _: inputs, evaluate=close if evaluate else None)


def _auto(**settings: object) -> Stage:
    return Stage(method="auto", settings={**USUAL, **settings})


def test_a_latency_budget_decides_what_weights_run_as() -> None:
    spec = _spec()
    free = compress(spec, _auto(bits=8)).report.runs
    assert free is not None and not set(free.forms.values()) & {"int8-dynamic", "int8-static"} and free.device == "raspberry-pi-5"
    limit = 0.965 * free.latency_s["forward"]
    made = compress(spec, _auto(bits=8, latency=f"forward={limit}")).report
    assert made.runs is not None and made.bits <= 8
    assert made.runs.latency_s["forward"] <= limit
    assert "int8-dynamic" in made.runs.forms.values()
    assert made.runs.memory_bytes <= free.memory_bytes
    assert made.runs.energy_j is None, "the profile has no power figure"
    assert "predicted on raspberry-pi-5 with litert" in made.notes[1]


def _only_int4_fits(spec: ModelSpec) -> int:
    """A limit of memory that int8 weights (3 bytes saved of 4) are too large for, and int4 ones are not."""
    free = compress(spec, _auto(bits=32, runtime="executorch")).report
    assert free.runs is not None
    return free.runs.memory_bytes - round(3.2 * free.weight_elements)


def test_int4_runs_where_the_code_is_its_grid() -> None:
    spec = _spec()
    limit = _only_int4_fits(spec)
    made = compress(spec, _auto(bits=8, runtime="executorch", memory=limit, generations=2)).report
    assert made.runs is not None and made.runs.memory_bytes <= limit
    four = {w for w, form in made.runs.forms.items() if form == "int4-g32"}
    assert four
    assert all(w.settings["bits"] == 4 and w.settings["group"] == 32 for w in made.weights if w.weight in four)


def test_the_planner_says_the_same_of_the_choice(tmp_path: Path) -> None:
    settings = {**USUAL, "bits": 8, "latency": "330us"}
    made = compress("example:digits-cnn", Stage(method="auto", settings=settings), evaluate=False)
    runs = made.report.runs
    assert runs is not None and "int8-dynamic" in runs.forms.values()
    made.save(tmp_path / "digits.edgec")
    fits = plan(str(tmp_path / "digits.edgec"), "pi5", budget=Budget(latency_s=330e-6, quality_drop=0.05), runtime="litert")
    assert fits.fits
    assert fits.latency.value <= runs.latency_s[""] * 1.02
    forms = {f"{u.unit}.weight": u.precision for u in fits.units if u.weight_bytes}
    assert {w for w, f in runs.forms.items() if f != "fp32"} <= {w for w, f in forms.items() if f != "fp32"}


def test_a_low_rank_option_becomes_two_layers_where_that_is_faster(tmp_path: Path) -> None:
    spec = _spec(768, rank=8)
    dense = compress(spec, _auto(bits=32, methods="svd:rank=16")).report.runs
    assert dense is not None
    made = compress(spec, _auto(latency=f"{0.7 * dense.latency_s['']}", methods="svd:rank=16"))
    runs = made.report.runs
    assert runs is not None and {"2.0.weight", "2.1.weight"} <= set(runs.forms)
    assert runs.latency_s["forward"] <= 0.7 * dense.latency_s["forward"]
    assert [m.in_features for m in made.spec.methods["forward"].module[2]] == [768, 16]
    assert {r.weight: r.bytes for r in made.report.weights} == {n: len(pack(c)) for n, c in made.spec.codes.items()}
    example = spec.methods["forward"].example_inputs
    assert torch.allclose(made.spec.methods["forward"].module(*example), spec.methods["forward"].module(*example), atol=0.02)
    path = made.save(tmp_path / "two.edgec")
    again = load(path, base=spec)
    assert torch.equal(again.spec.methods["forward"].module(*example), made.spec.methods["forward"].module(*example))
    assert not spec.codes, "the base stays as it was"


def test_halves_of_a_low_rank_code_multiply_to_it() -> None:
    weight = Weight("w", "linear", (24, 40), torch.randn(24, 40))
    for bits in (4, 8, 16):
        code = SVD.apply(weight, None, SvdConfig(rank=5, bits=bits))
        first, second = halves(code)
        assert np.allclose(decode(second) @ decode(first), decode(code), atol=1e-6)
        assert all(half.kind == "dense" or half.arrays[1].size for half in (first, second))


def test_a_unit_as_two_counts_as_two() -> None:
    unit = Unit(name="a", op="conv2d", weight="a.weight", rows=32, cols=90, macs=32 * 90 * 49, in_elements=490, out_elements=32 * 49)
    first, second = split_units(unit, 4)
    assert first.macs + second.macs == 49 * (4 * 90 + 32 * 4)
    assert (first.rows, first.cols, second.rows, second.cols) == (4, 90, 32, 4)
    assert first.out_elements == second.in_elements == 4 * 49


def test_energy_is_the_power_mode_for_as_long_as_it_takes() -> None:
    spec, device = _spec(), load_device("jetson")
    power = next(m.power_w for m in device.power_modes if m.name == device.default_power_mode)
    free = compress(spec, _auto(bits=8, device="jetson")).report.runs
    assert free is not None and power is not None
    assert free.energy_j == pytest.approx(power * free.latency_s[""])
    made = compress(spec, _auto(bits=8, device="jetson", energy=0.95 * free.energy_j)).report.runs
    assert made is not None and made.energy_j is not None and made.energy_j <= 0.95 * free.energy_j


def test_another_budget_or_device_codes_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _spec()
    compress(spec, _auto(bits=8))
    monkeypatch.setattr(table, "make_code", lambda job: pytest.fail("coded again"))
    monkeypatch.setattr("edgesdk.compress.auto.Loss", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setattr("edgesdk.compress.forms.stats_of", lambda *a, **k: pytest.fail("statistics taken again"))
    assert compress(spec, _auto(bits=5)).report.bits <= 5
    other = compress(spec, _auto(bits=5, device="jetson", latency="50ms")).report.runs
    assert other is not None and other.device == "jetson-orin-nano"


def test_the_best_runtime_is_taken_where_none_is_named() -> None:
    made = compress(_spec(), _auto(bits=8, runtime="", memory="40MB")).report.runs
    assert made is not None and made.runtime in ("litert", "tflite-runtime"), "ExecuTorch alone takes more"


def test_the_fastest_that_keeps_to_a_drop() -> None:
    spec = _spec(evaluate=True)
    slow = compress(spec, _auto(drop=0.02, minimise="bytes"))
    fast = compress(spec, _auto(drop=0.02, minimise="latency"))
    for made in (slow, fast):
        assert made.report.quality is not None and made.report.quality_before is not None and made.report.runs is not None
    assert fast.report.runs is not None and slow.report.runs is not None
    assert fast.report.runs.latency_s[""] <= slow.report.runs.latency_s[""]
    assert fast.report.weight_bytes >= slow.report.weight_bytes
    assert "latencies evaluated" in fast.report.notes[0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"latency": "1us"}, r"latency: its fastest options take .*, 1 µs are allowed: .* too little"),
        ({"latency": "forward=2us"}, "latency of forward"),
        ({"memory": "1MB"}, "memory: its smallest options"),
        ({"bits": 0.5}, "storage: its smallest options"),
        ({"device": "jetson", "energy": "1uJ"}, "energy: its thriftiest options"),
    ],
)
def test_a_budget_under_the_floor_is_named_with_what_is_missing(settings: dict[str, object], text: str) -> None:
    with pytest.raises(DoesNotFit, match=text):
        compress(_spec(), _auto(**settings))


def test_budgets_that_hold_alone_but_not_together() -> None:
    """Weights run as int4 only from its own grid, which stores more than 3 bits."""
    spec = _spec()
    settings = {"runtime": "executorch", "memory": _only_int4_fits(spec)}
    compress(spec, _auto(**settings))
    compress(spec, _auto(runtime="executorch", bits=3.2))
    with pytest.raises(DoesNotFit, match=r"(storage within memory|memory within storage)"):
        compress(spec, _auto(**settings, bits=3.2))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"device": "", "runtime": "", "latency": "2ms"}, "latency depends on the device"),
        ({"device": "", "bits": 4}, "runtime depends on the device"),
        ({"latency": "soon"}, "'soon' is not a time"),
        ({"latency": "2ms|3ms"}, "has one already"),
        ({"latency": 0.0}, "no time at all"),
        ({"latency": "decode=2ms"}, "unknown method of net256 'decode'"),
        ({"energy": "5mJ"}, "raspberry-pi-5 has no power_w"),
        ({"energy": "5 calories"}, "is not an energy"),
        ({"memory": "lots"}, "'lots' is not a size"),
        ({"runtime": "ncnn", "bits": 4}, "unknown runtime on raspberry-pi-5 'ncnn'"),
        ({"threads": 64, "bits": 4}, "has 4 cores"),
        ({"bits": 4, "minimise": "latency"}, "needs drop"),
        ({"drop": 0.1, "minimise": "loss"}, "drop holds the quality"),
        ({}, "give a budget"),
    ],
)
def test_bad_input_is_named(settings: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        compress(_spec(), _auto(**settings))
    assert caught.value.hint


def test_an_unknown_device() -> None:
    with pytest.raises(UnknownName, match="unknown device"):
        compress(_spec(), _auto(bits=4, device="jetsen"))


def test_amounts_as_people_write_them() -> None:
    assert parse_joules("5mJ") == pytest.approx(0.005)
    assert parse_latencies(["20ms", "decode=2ms"]) == {"": 0.02, "decode": 0.002}
    assert [show_amount(*a) for a in (("memory", 3e7), ("latency:decode", 2e-3), ("energy", 5e-3), ("harm", 0.01))] == [
        "30 MB", "2 ms", "5 mJ", "1.00%"
    ]  # fmt: skip


def test_plan_hands_its_budgets_on_and_has_one_of_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(ref: str, recipe: str, *_: object) -> ModelSpec:
        asked.append(recipe)
        raise DoesNotFit("not today", "")

    monkeypatch.setattr("edgesdk.compress.saved.compressed_model", refuse)
    budget = Budget(storage_bytes=60_000, method_latency_s={"forward": 0.5}, energy_j=1.0)
    answer = plan("example:digits-cnn", "jetson", budget=budget, runtime="litert")
    assert not answer.fits and "not today" in answer.reasons[-1]
    assert asked[0].endswith(",device=jetson-orin-nano,threads=1,runtime=litert,latency=forward=0.500000000,energy=1.0")
    assert asked[1:] == [asked[0].partition(",")[0]]
    tight = plan("example:digits-cnn", "jetson", budget=Budget(energy_j=1e-6), runtime="litert")
    assert not tight.fits and tight.checks[0].name == "energy"
    with pytest.raises(InputError, match="no power_w"):
        plan("example:digits-cnn", "pi5", budget=Budget(energy_j=1.0), runtime="litert")


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--latency", "2ms"], 2, "latency depends on the device"),
        (["--device", "pi5", "--energy", "5mJ"], 2, "no power_w"),
        (["--device", "pi5", "--latency", "0ms"], 2, "greater than 0"),
        (["--device", "pi5", "--latency", "forward=1us", "--method", "rtn:bits=8", "--generations", "0"], 1, "latency of forward"),
    ],
)
def test_the_command_line_says_which_budget(capsys: pytest.CaptureFixture[str], args: list[str], code: int, text: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--quiet", "compress", "--model", "example:digits-cnn", "--no-evaluate", *args])
    _, err = capsys.readouterr()
    assert (stop.value.code, err.count("\n")) == (code, 2)
    assert text in err
