"""Choosing an option for every weight: exact where losses add up, refined on the true loss, within the budget, cached, the same everywhere."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.compress import Stage, compress
from edgesdk.compress.auto import AutoConfig, searched
from edgesdk.compress.engine import Engine
from edgesdk.compress.evolve import evolve
from edgesdk.compress.knapsack import choose
from edgesdk.compress.loss import Loss
from edgesdk.compress.scores import SCORES
from edgesdk.compress.table import drawn
from edgesdk.errors import DeviceError, DoesNotFit, InputError
from edgesdk.intake import load_model
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import pack


def _problem(seed: int, units: int, options: int, budgets: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    rng = np.random.default_rng(seed)
    bits, size = np.linspace(2, 8, options), rng.integers(1000, 100_000, units)
    loss = np.exp(rng.normal(0, 2, units))[:, None] * 4.0 ** -bits[None] * np.exp(rng.normal(0, 0.3, (units, options)))
    use = np.stack([size[:, None] * bits[None] / 8] + [rng.uniform(1, 10, (units, options)) for _ in range(budgets - 1)])
    return loss, use, [0.6 * units * float(use[0].mean()), *[1.1 * units * float(u.mean()) for u in use[1:]]]


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_the_choice_is_the_best_of_all_where_all_can_be_tried(budgets: int) -> None:
    for seed in range(5):
        loss, use, limits = _problem(seed, 6, 4, budgets)
        rows = np.arange(6)
        best = min(
            float(loss[rows, p].sum())
            for p in itertools.product(range(4), repeat=6)
            if all(u[rows, p].sum() <= limit for u, limit in zip(use, limits, strict=True))
        )
        found = choose(loss, use, limits, gap=0.0)
        assert found.loss == pytest.approx(best, rel=1e-9)
        assert all(u[rows, found.picked].sum() <= limit * (1 + 1e-9) for u, limit in zip(use, limits, strict=True))


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_the_gap_is_certified_at_full_size(budgets: int) -> None:
    for seed in range(3):
        loss, use, limits = _problem(seed, 196, 10, budgets)
        found = choose(loss, use, limits)
        assert found.gap <= 1e-3
        assert found.bound <= found.loss
        assert np.isclose(found.loss, loss[np.arange(196), found.picked].sum())


def test_options_that_a_unit_has_not_are_never_picked() -> None:
    loss, use, limits = _problem(0, 20, 5, 1)
    loss[::2, 3:] = np.inf
    assert (choose(loss, use, limits).picked[::2] < 3).all()


def test_a_budget_under_the_floor_says_so() -> None:
    loss, use, limits = _problem(0, 6, 4, 2)
    with pytest.raises(DoesNotFit, match="budget 1"):
        choose(loss, use, [limits[0], 0.1])


def test_evolution_keeps_the_budget_and_finds_what_sums_cannot_see() -> None:
    """Two weights whose errors cancel: additive losses never pick both small."""
    sizes = np.tile([1.0, 2.0, 3.0], (4, 1))

    def true(choice: tuple[int, ...]) -> float:
        alone = sum((2 - c) ** 2 for c in choice)
        return alone - (7.9 if choice[0] == 0 and choice[1] == 0 else 0.0)

    field = (-sizes, sizes[None], [8.0], [true])
    found = evolve([1, 1, 1, 1], *field, generations=20, seed=1)
    assert found.picked == (0, 0, 2, 2)
    assert found.loss < found.start
    assert evolve([1, 1, 1, 1], *field, generations=20, seed=1) == found


def test_evolution_holds_every_budget() -> None:
    loss, use, limits = _problem(3, 12, 6, 3)
    loss[::3, 4:] = np.inf
    rows = np.arange(12)
    start = choose(loss, use, limits).picked
    seen: list[tuple[int, ...]] = []

    def true(choice: Sequence[int]) -> float:
        seen.append(tuple(choice))
        return float(loss[rows, list(choice)].sum() - 0.5 * loss[0, choice[0]])

    found = evolve(start, loss, use, limits, [true], generations=10, seed=2)
    assert len(seen) > 50 and found.loss <= found.start
    for choice in seen:
        assert all(u[rows, list(choice)].sum() <= limit * (1 + 1e-9) for u, limit in zip(use, limits, strict=True))


def test_a_sequence_models_errors_travel_through_its_caches() -> None:
    spec = load_model("example:normalizer")
    loss = Loss(spec, every=16)
    assert [len(rows) for rows in loss.rows.values()] == [4] and list(loss.soft.values()) == [True]
    assert loss(spec) == pytest.approx(0.0, abs=1e-9)
    harmed = copy.deepcopy(spec.methods)
    with torch.no_grad():
        harmed["decode"].module.core.decoder.layers[1].self_attn.v.weight.mul_(0)
    assert loss(replace(spec, methods=harmed)) > 1e-3
    assert loss(spec) == pytest.approx(0.0, abs=1e-9)


def test_samples_may_differ_in_length() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs = [(torch.randn(1, n, 4),) for n in (2, 5, 5, 3)]
    spec = ModelSpec(name="ragged", digest="r-1", methods={"forward": Method(net, inputs[0])}, calibration=lambda _: inputs)
    loss = Loss(spec)
    assert loss(spec) == pytest.approx(0.0, abs=1e-12)
    with torch.no_grad():
        net[0].weight.mul_(1.2)
    assert loss(spec) > 1e-4


def test_the_loss_needs_calibration_data() -> None:
    with pytest.raises(InputError, match="no calibration data"):
        Loss(ModelSpec(name="bare", digest="b", methods={"forward": Method(nn.Linear(2, 2), (torch.randn(1, 2),))}))


def test_losses_between_measured_points() -> None:
    points = [(1e-1, 1e-2), (1e-3, 1e-4)]
    assert drawn(points, 1e-2) == pytest.approx(1e-3)
    assert drawn(points[:1], 1e-2) == pytest.approx(1e-3)
    assert drawn(points, 0.0) == drawn([], 1.0) == 0.0


FEW = ["rtn:bits=8,group=0", "rtn:bits=4,group=0", "rtn:bits=3,group=0", "rtn:bits=2,group=0"]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGESDK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


@pytest.fixture
def shared_cache(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that the tests of this file fill together."""
    monkeypatch.setenv("EDGESDK_CACHE", str(filled))
    return filled


def test_auto_meets_its_bits_and_beats_one_setting_for_all(shared_cache: Path) -> None:
    spec = load_model("example:digits-cnn")
    uniform = compress(spec, "rtn:bits=3,group=0", evaluate=False)
    made = compress(spec, Stage(method="auto", settings={"bits": uniform.report.bits, "methods": FEW, "generations": 2}))
    assert made.report.bits <= uniform.report.bits
    assert sum(r.bytes for r in made.report.weights) == sum(len(pack(c)) for c in made.spec.codes.values())
    loss = Loss(spec)
    assert loss(made.spec) < loss(uniform.spec)
    assert {r.method for r in made.report.weights} == {"rtn"}
    assert made.report.quality is not None and made.report.quality > 0.97


def test_bytes_count_as_a_kernel_reads_them_where_asked(shared_cache: Path) -> None:
    settings = {"bits": 3.5, "count": "resident", "methods": FEW, "generations": 0}
    made = compress("example:digits-cnn", Stage(method="auto", settings=settings), evaluate=False)
    held = sum(len(pack(c, entropy=False)) for c in made.spec.codes.values())
    assert made.report.weight_bytes < held <= 3.5 * made.report.weight_elements / 8


def test_another_budget_takes_everything_from_the_cache(own_cache: Path) -> None:
    spec = load_model("example:digits-cnn")
    compress(spec, Stage(method="auto", settings={"bits": 4, "methods": FEW, "generations": 0}), evaluate=False)
    start = time.perf_counter()
    small = compress(spec, Stage(method="auto", settings={"bits": 2.6, "methods": FEW, "generations": 0}), evaluate=False)
    assert time.perf_counter() - start < 5
    assert small.report.bits <= 2.6
    files = sorted((own_cache / "codes").iterdir())
    assert len(files) == len(FEW) * len(spec.methods["forward"].module.state_dict()) // 2
    files[0].unlink()
    again = compress(spec, Stage(method="auto", settings={"bits": 2.6, "methods": FEW, "generations": 0}), evaluate=False)
    assert again.report.compressed_digest == small.report.compressed_digest


@pytest.mark.parametrize("score", SCORES)
def test_every_score_gives_a_choice_within_the_budget(score: str, shared_cache: Path) -> None:
    spec = load_model("example:digits-cnn")
    made = compress(spec, Stage(method="auto", settings={"bits": 3, "methods": FEW, "generations": 0, "score": score}), evaluate=False)
    assert made.report.bits <= 3


def test_weights_alone_are_enough(shared_cache: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    spec = ModelSpec(name="bare", digest="bare-1", methods={"forward": Method(net, (torch.randn(1, 16),))})
    assert compress(spec, "auto:bits=4").report.bits <= 4


def test_a_promise_about_quality_is_kept(shared_cache: Path) -> None:
    made = compress("example:digits-cnn", Stage(method="auto", settings={"drop": 0.01, "methods": FEW, "generations": 0}))
    assert made.report.quality is not None and made.report.quality_before is not None
    assert made.report.quality >= made.report.quality_before - 0.01
    assert made.report.bits < 3.5
    assert "sizes evaluated" in made.report.notes[0]


def test_processes_give_the_same_codes(own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = load_model("example:digits-cnn")
    config = AutoConfig(bits=3, methods=tuple(FEW[3:]), generations=0, score="uniform")
    here = [r.key for r in searched(spec, config, lambda *_: None).options.table.rows]
    sizes = {p.name: p.read_bytes() for p in (own_cache / "codes").iterdir()}
    monkeypatch.setenv("EDGESDK_CACHE", str(tmp_path / "other"))
    there = searched(spec, config.model_copy(update={"engine": "processes:2"}), lambda *_: None)
    assert [r.key for r in there.options.table.rows] == here
    assert {p.name: p.read_bytes() for p in (tmp_path / "other" / "codes").iterdir()} == sizes


def test_bad_input_is_named() -> None:
    spec = load_model("example:digits-cnn")
    for settings, text in (
        ({}, "give a budget: bits, bytes or drop"),
        ({"bits": 4, "bytes": 100}, "give one of"),
        ({"bits": 4, "methods": ["lord:energy=0.9"]}, "changes whole models"),
        ({"bits": 4, "methods": ["nope"]}, "compression method"),
        ({"bits": 4, "score": "luck"}, "score"),
    ):
        with pytest.raises(InputError, match=text):
            compress(spec, Stage(method="auto", settings=settings))
    with pytest.raises(DoesNotFit, match="smallest options take"):
        compress(spec, Stage(method="auto", settings={"bytes": 100, "methods": FEW, "generations": 0}))
    with pytest.raises(InputError, match="no number of processes"):
        list(Engine("processes:x").map(str, [1, 2]))
    with pytest.raises(DeviceError, match="no Dask scheduler"):
        list(Engine("tcp://127.0.0.1:1").map(str, [1, 2]))


def test_a_dask_scheduler_gives_the_same_answers() -> None:
    """A cluster inside this process: nothing but loopback."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, protocol="tcp://") as cluster:
        assert list(Engine(cluster.scheduler_address).map(str.upper, ["a", "b", "c"])) == ["A", "B", "C"]
