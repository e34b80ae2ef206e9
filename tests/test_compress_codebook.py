"""Codebook and low-bit methods: tables, dense and sparse, vectors, ternary."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.compress import compress
from edgesdk.compress.kmeans import damped, feedback, line_kmeans, loss, refine
from edgesdk.compress.registry import configured
from edgesdk.compress.types import Stats, Weight
from edgesdk.compress.weights import output_error, weights_of
from edgesdk.errors import InputError
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import Code, decode, pack, unpack


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices are slower on many threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weight_of(matrix: torch.Tensor, groups: int = 1) -> Weight:
    return Weight("w", "linear", tuple(matrix.shape), matrix, groups)


def made(rows: int, cols: int, *, tails: bool = False, groups: int = 1, seed: int = 0, spread: float = 1.0) -> tuple[Weight, Stats]:
    """A weight (with `tails`: a few large entries) and the statistics of 512 correlated inputs; columns differ in size by e^±spread."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=g) * 0.1
    if tails:
        w[torch.rand(rows, cols, generator=g) < 0.01] *= 12
    mix = torch.randn(groups, cols, cols, generator=g) * (torch.rand(groups, 1, cols, generator=g) * 2 * spread - spread).exp()
    x = torch.randn(groups, 512, cols, generator=g) @ (mix / cols**0.5 + 0.3 * torch.eye(cols))
    gram = (x.transpose(1, 2) @ x / 512).double()
    fisher = x.pow(2).mean(1).repeat_interleave(rows // groups, 0)
    return weight_of(w, groups), Stats(512, gram, x.mean((0, 1)), x.abs().amax((0, 1)), fisher)


def coded(name: str, weight: Weight, stats: Stats | None, **settings: Any) -> tuple[Code, float, float]:
    """The code, its relative output error, and its stored bits a weight."""
    method, config = configured(name, settings)
    assert method.level == "weight"
    assert method.why_not(weight, config) is None
    code = method.apply(weight, stats, config)
    values = decode(code)
    assert values.shape == tuple(weight.matrix.shape)
    assert np.isfinite(values).all()
    data = pack(code)
    assert np.array_equal(decode(unpack(data)), values)
    return code, output_error(weight, torch.from_numpy(values), stats), 8 * len(data) / weight.matrix.numel()


class Mixed(nn.Module):
    """An embedding tied to the output layer, a convolution with groups, a depthwise one, and a linear layer of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 36)
        self.conv = nn.Conv1d(36, 24, 3, padding=1, groups=4)
        self.depthwise = nn.Conv1d(24, 24, 3, padding=1, groups=24)
        self.linear = nn.Linear(24, 36)
        self.head = nn.Linear(36, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = torch.relu(self.depthwise(torch.relu(self.conv(x)))).transpose(1, 2)
        return self.head(torch.relu(self.linear(x)))  # type: ignore[no-any-return]


@pytest.fixture
def mixed() -> ModelSpec:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    inputs = [(torch.randint(0, 50, (1, 12), generator=g),) for _ in range(24)]
    return ModelSpec(name="mixed", digest="0" * 64, methods={"forward": Method(Mixed().eval(), inputs[0])}, calibration=lambda _: inputs)


# ---- k-means on a line, error feedback


def test_kmeans_on_a_line_is_exact() -> None:
    rng = np.random.default_rng(0)
    x, w = np.sort(rng.standard_normal(11)), rng.random(11) + 0.1

    def cost(centres: Any) -> float:
        return float((w * np.abs(x[:, None] - np.asarray(centres)).min(1) ** 2).sum())

    for k in (1, 2, 3, 4):
        borders = ((0, *b, 11) for b in combinations(range(1, 11), k - 1))
        best = min(cost([np.average(x[i:j], weights=w[i:j]) for i, j in pairwise(b)]) for b in borders)
        assert cost(line_kmeans(x, w, k)) == pytest.approx(best)


def test_kmeans_on_a_line_of_few_many_or_unweighted_values() -> None:
    assert np.isfinite(line_kmeans([1.0, 1.0, 2.0], [1, 1, 1], 8)).all()
    assert np.isfinite(line_kmeans([0.0, 0.0], [0, 0], 4)).all()
    many = np.random.default_rng(0).standard_normal(20000)
    binned, exact = line_kmeans(many, np.ones(20000), 4), np.array([-1.510, -0.4528, 0.4528, 1.510])  # Lloyd-Max for a normal distribution
    assert np.allclose(binned, exact, atol=0.04)


def test_feedback_and_refinement_lower_the_error() -> None:
    weight, stats = made(16, 48)
    w, h = weight.matrix[None], damped(weight, stats)

    def pick(start: int, target: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return torch.round(target / 0.1) * 0.1

    plain = torch.round(w / 0.1) * 0.1
    fed = feedback(w, h, pick)
    assert loss(w, fed, h) < 0.7 * loss(w, plain, h)
    assert loss(w, refine(w, fed, h, pick), h) <= loss(w, fed, h)


# ---- any4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_any4_beats_a_uniform_grid(bits: int) -> None:
    weight, stats = made(48, 256, tails=True)
    grid, plain = coded("rtn", weight, stats, bits=bits, group=0), coded("any4", weight, stats, bits=bits, feedback=False)
    fed = coded("any4", weight, stats, bits=bits)
    assert fed[1] < 0.7 * plain[1] < 0.5 * grid[1]


def test_any4_has_a_table_a_row_where_rows_are_long() -> None:
    long, short = coded("any4", *made(8, 256), bits=4)[0], coded("any4", *made(8, 64), bits=4)[0]
    assert (long.arrays[1].shape, short.arrays[1].shape) == ((8, 16), (1, 16))
    assert len(pack(short, entropy=False)) <= 8 * 64 // 2 + 8 * 2 + 32 + 32  # indices, scales, one table, heads


def test_any4_weights_by_the_inputs() -> None:
    weight, stats = made(8, 64, spread=3.0)
    plain = coded("any4", weight, None, bits=3, feedback=False)[0]
    assert coded("any4", weight, stats, bits=3, feedback=False)[1] < output_error(weight, torch.from_numpy(decode(plain)), stats)


# ---- squeezellm


def test_squeezellm_weights_by_sensitivity() -> None:
    """Heavy tails: the k-means weighted by Fisher information has a lower weighted error than the unweighted one and than a uniform grid."""
    weight, stats = made(16, 256, tails=True)
    fisher = torch.rand(16, 256, generator=torch.Generator().manual_seed(5)) ** 6
    known = Stats(stats.count, stats.gram, stats.mean, stats.absmax, fisher)

    def objective(code: Code) -> float:
        return float((fisher.numpy() * (decode(code) - weight.matrix.numpy()) ** 2).sum())

    dense = {"bits": 3, "feedback": False, "outliers": 0, "sensitive": 0}
    weighted, plain = (coded("squeezellm", weight, s, **dense)[0] for s in (known, None))
    uniform = coded("rtn", weight, None, bits=3, group=0, symmetric=False)[0]
    assert weighted.kind == "table"
    assert objective(weighted) < 0.9 * objective(plain) < 0.7 * objective(uniform)


def test_squeezellm_outliers_pay() -> None:
    """At no more stored bytes than a finer table, dense and sparse is nearer to heavy-tailed weights; what is apart is kept as it is."""
    weight, stats = made(64, 512, tails=True)
    split, whole = coded("squeezellm", weight, stats, bits=3, outliers=0.01), coded("any4", weight, stats, bits=4, group=64)
    assert split[2] < whole[2]
    plain = coded("squeezellm", weight, stats, bits=3, outliers=0, sensitive=0)
    assert split[1] < 0.6 * plain[1]
    dense, sparse = split[0].parts
    assert (dense.kind, sparse.kind) == ("table", "sparse")
    apart = sparse.arrays[0].astype(bool)
    assert apart.sum() == int(0.01 * 64 * 512) + int(0.0005 * 64 * 512)
    still = coded("squeezellm", weight, stats, bits=3, outliers=0.01, feedback=False)[0]
    assert np.allclose(decode(still)[apart], weight.matrix.numpy()[apart], atol=2e-3)


METHODS = ["any4:bits=3", "any4:bits=2,group=7", "squeezellm:bits=3", "squeezellm:bits=2,group=7,outliers=0.02"]


@pytest.mark.parametrize("recipe", METHODS)
def test_methods_on_a_whole_model(mixed: ModelSpec, recipe: str) -> None:
    """Tied weights, embeddings, convolutions with groups: bytes counted are bytes written, the modules hold what is decoded, twice alike."""
    done = compress(mixed, recipe)
    assert {row.weight for row in done.report.weights} >= {"head.weight", "linear.weight", "conv.weight"}
    for row in done.report.weights:
        assert row.bytes == len(pack(done.spec.codes[row.weight]))
        assert torch.equal(weights_of(done.spec)[row.weight].matrix, torch.from_numpy(decode(done.spec.codes[row.weight])))
    module = done.spec.methods["forward"].module
    assert module.head.weight is module.embed.weight
    assert compress(mixed, recipe).report == done.report


@pytest.mark.parametrize("recipe", METHODS)
def test_zero_and_constant_rows_stay_sane(recipe: str) -> None:
    weight, stats = made(16, 40)
    weight.matrix[3], weight.matrix[4] = 0, 0.25
    dead = Stats(0, torch.zeros_like(stats.gram), stats.mean, stats.absmax, torch.zeros_like(weight.matrix))
    name, _, settings = recipe.partition(":")
    given = {k: float(v) for k, v in (item.split("=") for item in settings.split(",") if item)}
    for known in (stats, dead):
        code = coded(name, weight, known, **given)[0]
        assert np.abs(decode(code)[3]).max() < 0.05


@pytest.mark.parametrize("recipe", METHODS)
def test_bad_input_is_refused(mixed: ModelSpec, recipe: str) -> None:
    module = mixed.methods["forward"].module
    with torch.no_grad():
        module.linear.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        compress(mixed, recipe)


def test_unknown_and_senseless_settings_are_refused(mixed: ModelSpec) -> None:
    for recipe in ("any4:bits=5", "any4:bits=1", "any4:depth=3", "any4:table=column", "squeezellm:outliers=0.5"):
        with pytest.raises(InputError, match=recipe.partition(":")[0]):
            compress(mixed, recipe)
