"""Fine-tuned models as small differences: low rank within a budget, DARE, masks; as files, programs and bundles over one base."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.compress.delta import DeltaConfig, delta, dropped, learn_masks, merge, ranks_within, spread_of, uniform_rank
from edgesdk.compress.saved import load
from edgesdk.compress.svd import factor_code, spectrum_of
from edgesdk.compress.weights import weights_of
from edgesdk.errors import InputError
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import decode, pack
from edgesdk.plan.harm import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def points(task: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around 8 centres, which each task turns a bit further, and their classes; every task but the first swaps two."""
    g, centres = torch.Generator().manual_seed(seed), torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    turn = torch.linalg.matrix_exp(0.35 * task * torch.randn(24, 24, generator=torch.Generator().manual_seed(2)).triu(1) * 0.3)
    y = torch.randint(0, 8, (count,), generator=g)
    x = (centres[y] + 0.8 * torch.randn(count, 24, generator=g)) @ turn
    return x, (torch.where(y // 2 == task - 1, y ^ 1, y) if task else y)


def spec_of(module: nn.Module, task: int, name: str) -> ModelSpec:
    x, y = points(task, 400, 77)

    def evaluate(run: Any) -> float:
        return float((np.array(run("forward", [x.numpy()])[0]).argmax(1) == y.numpy()).mean())

    return ModelSpec(
        name, f"digest of {name}", {"forward": Method(module.eval(), (x[:1],))}, calibration=lambda _: [(x[i : i + 20],) for i in range(0, 200, 20)],
        evaluate=evaluate, quality_name="accuracy",
    )  # fmt: skip


def train(module: nn.Module, task: int, steps: int, rate: float) -> nn.Module:
    optimiser = torch.optim.Adam(module.parameters(), lr=rate)
    for i in range(steps):
        x, y = points(task, 64, 1000 * task + i)
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimiser.step()
    return module


@pytest.fixture(scope="module")
def models() -> list[ModelSpec]:
    """The base model and three fine-tuned ones."""
    with one_thread():
        torch.manual_seed(0)
        base = train(
            nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.LayerNorm(96), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)), 0, 300, 3e-3
        )
        tuned = [train(copy.deepcopy(base), task, 150, 5e-4) for task in (1, 2, 3)]
        return [spec_of(m, task, f"task{task}") for task, m in enumerate([base, *tuned])]


def quality(spec: ModelSpec, task: ModelSpec) -> float:
    from edgesdk.plan.fake_quant import run

    assert task.evaluate is not None
    return task.evaluate(run(spec))


def test_low_rank_differences_keep_the_tasks(models: list[ModelSpec], tmp_path: Path) -> None:
    base = models[0]
    for tuned in models[1:]:
        assert quality(tuned, tuned) > quality(base, tuned) + 0.03
        made = delta(base, tuned, DeltaConfig(bits=1.0))
        assert made.report.quality is not None and made.report.quality > quality(tuned, tuned) - 0.02
        assert made.report.weight_bytes <= made.report.weight_elements / 8 + 40 < 0.04 * made.report.float_bytes
        assert made.report.weight_bytes == sum(len(pack(c)) for c in made.differences.values())
        again = load(made.save(tmp_path / f"{tuned.name}.edgec"), base)
        assert again.spec.digest == made.spec.digest and again.spec.codes == {}
        for name, w in weights_of(made.spec).items():
            assert torch.equal(weights_of(again.spec)[name].matrix, w.matrix)
        whole = sum(4 * v.numel() for v in tuned.methods["forward"].module.state_dict().values())
        assert (tmp_path / f"{tuned.name}.edgec").stat().st_size < 0.25 * whole  # most of it is what names the weights
    assert quality(base, base) == quality(replace(base, codes={}), base)


def test_more_bytes_keep_more_and_full_rank_keeps_all(models: list[ModelSpec]) -> None:
    base, tuned = models[0], models[3]
    made = [delta(base, tuned, DeltaConfig(bits=b, data=False), evaluate=False) for b in (0.2, 0.6, 2.0)]
    errors = [sum(float((weights_of(m.spec)[n].matrix - w.matrix).norm() ** 2) for n, w in weights_of(tuned).items()) for m in made]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[2]
    whole = delta(base, tuned, DeltaConfig(bits=32, factors=16, data=False), evaluate=False)
    for name, w in weights_of(tuned).items():
        got = weights_of(whole.spec)[name].matrix
        moved = w.matrix - weights_of(base)[name].matrix
        assert float((got - w.matrix).norm() / moved.norm()) < 2e-3


def test_an_own_rank_for_each_layer_beats_one_for_all(models: list[ModelSpec]) -> None:
    before, after = weights_of(models[0]), weights_of(models[3])
    from edgesdk.compress.delta import _tasks

    tasks = _tasks(models[3], after, DeltaConfig(), lambda text, share: None)
    moved = {n: after[n].matrix - before[n].matrix for n in after}
    spectra = {n: spectrum_of(moved[n], tasks[n].space) for n in after}
    for room in (800, 1600, 3200):
        lost = []
        for ranks in (ranks_within(spectra, room, 8), uniform_rank(spectra, room, 8)):
            codes = {n: factor_code(*spectra[n].factors(r), spectra[n].space, 8) for n, r in ranks.items() if r}
            left = {n: m - torch.from_numpy(decode(codes[n])) if n in codes else m for n, m in moved.items()}
            lost.append(sum(float((tasks[n].space.into(m) ** 2).sum()) for n, m in left.items()))
        assert lost[0] < lost[1]


def test_dropped_differences_keep_their_expectation() -> None:
    moved = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert torch.equal(dropped(moved, 0, 3), moved)
    for drop in (0.5, 0.9):
        mean = torch.stack([dropped(moved, drop, seed) for seed in range(3000)]).mean(0)
        assert float((mean - moved).norm() / moved.norm()) < 1.2 * (drop / (1 - drop) / 3000) ** 0.5
        assert abs(float((dropped(moved, drop, 1) == 0).float().mean()) - drop) < 0.03


def test_dare_drops_much_and_refuses_what_moved_far(models: list[ModelSpec]) -> None:
    base, tuned = models[:2]
    sizes, kept = [], []
    for drop in (0.0, 0.5, 0.9, 0.99):
        made = delta(base, tuned, DeltaConfig(how="dare", drop=drop, limit=2.0))
        sizes.append(made.report.weight_bytes)
        kept.append(made.report.quality or 0.0)
    assert sizes == sorted(sizes, reverse=True) and sizes[3] < 0.2 * sizes[1] < sizes[1] < 0.1 * made.report.float_bytes
    assert kept[0] > quality(tuned, tuned) - 0.02 and kept[1] > quality(tuned, tuned) - 0.04
    far = spec_of(train(copy.deepcopy(base.methods["forward"].module), 3, 300, 2e-2), 3, "far")
    widest = max(spread_of(w.matrix, weights_of(far)[n].matrix) for n, w in weights_of(base).items())
    assert widest > 2.0
    with pytest.raises(InputError, match="too large to be dropped"):
        delta(base, far, DeltaConfig(how="dare", limit=2.0))


def test_one_model_of_two(models: list[ModelSpec]) -> None:
    base, first = models[:2]
    alone = merge(base, [first], drop=0.0)
    for name, w in weights_of(first).items():
        assert torch.allclose(weights_of(alone)[name].matrix, w.matrix, atol=1e-6)
    both = merge(base, [models[2], models[3]], drop=0.5, share=0.5)
    assert min(quality(both, m) for m in models[2:]) > min(quality(base, m) for m in models[2:])


def test_masks_switch_tasks_bit_for_bit(models: list[ModelSpec]) -> None:
    base, task = models[0], models[2]

    def loss(spec: ModelSpec, step: int) -> torch.Tensor:
        x, y = points(2, 64, step)
        return nn.functional.cross_entropy(spec.methods["forward"].module(x), y)

    masked = learn_masks(base, loss, 60)
    assert quality(masked, task) > quality(base, task) + 0.05
    made = delta(base, masked, DeltaConfig(how="mask"))
    for name, w in weights_of(masked).items():
        assert torch.equal(weights_of(made.spec)[name].matrix, w.matrix)
    assert made.report.weight_bytes < made.report.weight_elements / 8 + 80  # a bit a weight
    with pytest.raises(InputError, match="some of it cut"):
        delta(base, task, DeltaConfig(how="mask"))


def test_bad_pairs_are_named(models: list[ModelSpec]) -> None:
    other = spec_of(nn.Sequential(nn.Linear(24, 8)), 0, "other")
    with pytest.raises(InputError, match="is no fine-tuned"):
        delta(models[0], other)
    with pytest.raises(InputError, match="has the weights of"):
        delta(models[0], models[0])
