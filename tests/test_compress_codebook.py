"""Codebook and low-bit methods: tables, dense and sparse, vectors, ternary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.compress import compress
from edgesdk.compress.kmeans import damped, feedback, line_kmeans, loss, nearest, refine, vector_kmeans
from edgesdk.compress.learned import learn
from edgesdk.compress.registry import configured
from edgesdk.compress.types import Stats, Weight
from edgesdk.compress.weights import output_error, weights_of
from edgesdk.errors import InputError
from edgesdk.intake import load_model
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
    long, short = coded("any4", *made(8, 512), bits=2)[0], coded("any4", *made(8, 64), bits=4)[0]
    assert (long.arrays[1].shape, short.arrays[1].shape) == ((8, 4), (1, 16))
    assert (long.arrays[2].size, short.arrays[2].size) == (0, 8)
    assert len(pack(short, entropy=False)) <= 8 * 64 // 2 + 8 * 2 + 32 + 32  # indices, scales, one table, heads


def test_any4_weights_by_the_inputs() -> None:
    weight, stats = made(8, 64, spread=3.0)
    plain = coded("any4", weight, None, bits=3, feedback=False)[0]
    assert coded("any4", weight, stats, bits=3, feedback=False)[1] < output_error(weight, torch.from_numpy(decode(plain)), stats)


NF4 = [
    -1,
    -0.6962,
    -0.5251,
    -0.3949,
    -0.2844,
    -0.1848,
    -0.0911,
    0,
    0.0796,
    0.1609,
    0.2461,
    0.3379,
    0.4407,
    0.5626,
    0.723,
    1,
]  # arXiv:2305.14314
FP4 = [-1, -2 / 3, -0.5, -1 / 3, -0.25, -1 / 6, -1 / 12, 0, 1 / 12, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1]  # 2 exponent bits, 1 of mantissa


def test_any4_beats_fixed_tables_of_16_values() -> None:
    """At an equal row size the learned table has a lower output error than int4, fp4 and nf4, even by nearest values alone."""
    for tails in (False, True):
        weight, stats = made(48, 128, tails=tails)
        scale = weight.matrix.abs().amax(1, keepdim=True)

        def fixed(values: list[float], weight: Weight = weight, stats: Stats = stats, scale: torch.Tensor = scale) -> float:
            table = torch.tensor(values)
            return output_error(weight, table[(weight.matrix / scale)[..., None].sub(table).abs().argmin(-1)] * scale, stats)

        int4 = coded("rtn", weight, stats, bits=4, group=0)[1]
        assert coded("any4", weight, stats, bits=4, feedback=False)[1] < min(int4, fixed(NF4), fixed(FP4))


@pytest.mark.parametrize("recipe", ["any4:bits=3", "squeezellm:bits=3,outliers=0.02"])
def test_products_by_table_and_sparse_rows(recipe: str) -> None:
    """What a kernel does: inputs added up by the index of their weight, a few products with values, and the sparse rows beside them."""
    weight, stats = made(20, 70, tails=True)
    name, _, settings = recipe.partition(":")
    code = coded(name, weight, stats, **{k: float(v) for k, v in (item.split("=") for item in settings.split(","))})[0]
    dense, sparse = code.parts if code.parts else (code, None)
    q, table, scale = dense.arrays
    x = np.random.default_rng(0).standard_normal(70).astype(np.float32)
    sums = np.stack([np.bincount(row, weights=x, minlength=table.shape[1]) for row in q])  # [rows, 2^bits]
    y = (sums * table.astype(np.float32)).sum(1) * scale[:, 0].astype(np.float32)
    if sparse is not None:
        row, col = np.nonzero(sparse.arrays[0])
        np.add.at(y, row, sparse.parts[0].arrays[0][0].astype(np.float32) * x[col])
    assert np.allclose(y, decode(code) @ x, rtol=1e-3, atol=1e-4)


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
    assert np.allclose(decode(still)[apart], weight.matrix.numpy()[apart], rtol=0.02, atol=0.01)


# ---- vptq


def test_vptq_is_second_order() -> None:
    """Correlated inputs: below plain k-means of vectors and below scalars of 2 bits, at equal bits of the indices."""
    weight, stats = made(64, 258)
    plain = coded("vptq", weight, stats, length=3, feedback=False, weighted=False)
    weighted, fed = coded("vptq", weight, stats, length=3, feedback=False), coded("vptq", weight, stats, length=3)
    scalar = coded("any4", weight, stats, bits=2)
    assert fed[1] < 0.7 * weighted[1] < 0.7 * plain[1]
    assert fed[1] < 0.9 * scalar[1]
    assert fed[2] < scalar[2] + 0.15  # the codebook of 64 vectors
    assert fed[2] < 2 + 8 * 3 * 64 / (64 * 258) + 16 / 258 + 0.03


def test_vptq_residual_and_outlier_codebooks_lower_the_error() -> None:
    weight, stats = made(64, 256, spread=2.0)
    one = coded("vptq", weight, stats, bits=2, length=2)
    two, apart = (
        coded("vptq", weight, stats, bits=2, length=2, residual=2),
        coded("vptq", weight, stats, bits=2, length=2, outliers=0.1, outlier_bits=3),
    )
    assert two[1] < 0.5 * one[1]
    assert two[2] < one[2] + 1.05
    assert apart[1] < 0.8 * one[1]
    assert apart[2] < one[2] + 0.35
    assert (two[0].parts[0].kind, apart[0].kind, apart[0].parts[0].parts[0].kind) == ("sum", "pick", "stack")


def test_vptq_products_by_lookup() -> None:
    """What a kernel does: the products of every vector of the codebook with every piece of the input, looked up and added."""
    weight, stats = made(24, 62)
    code = coded("vptq", weight, stats, bits=1.5, length=4)[0]
    row, vector = code.arrays[0].astype(np.float32), code.parts[0]
    (length, _), (q, codebook, scale) = vector.numbers, vector.arrays
    x = np.random.default_rng(0).standard_normal(62).astype(np.float32)
    pieces = np.concatenate([x, np.zeros(-62 % length, np.float32)]).reshape(-1, length)
    products = pieces @ codebook.astype(np.float32).T  # [blocks, k]
    y = row * scale.astype(np.float32)[0, 0] * products[np.arange(len(pieces))[None], q].sum(1)
    assert np.allclose(y, decode(code) @ x, rtol=1e-4, atol=1e-5)


def test_vptq_chooses_a_length_that_pays() -> None:
    lengths = [coded("vptq", *made(rows, 64))[0].parts[0].numbers[0] for rows in (8, 64, 512)]
    assert lengths == sorted(lengths)
    assert lengths[0] <= 2 < lengths[2]


def test_kmeans_of_vectors() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 3, generator=g) * 10
    points = (centres[torch.arange(400) % 8] + 0.01 * torch.randn(400, 3, generator=g)).contiguous()
    found = vector_kmeans(points, torch.ones(400), 8)
    assert float(nearest(centres, found)[1].max()) < 0.01
    assert torch.isfinite(vector_kmeans(points[:3], torch.zeros(3), 8)).all()
    assert torch.equal(vector_kmeans(points, torch.ones(400), 5), vector_kmeans(points, torch.ones(400), 5))


def test_vptq_can_be_trained() -> None:
    """Its int8 entries move in whole steps: what is stored is what was trained."""
    weight, stats = made(32, 60)
    learned = learn(coded("vptq", weight, stats, length=2)[0])
    target = weight.matrix + 0.02
    optimiser = torch.optim.Adam([{"params": [t], "lr": 0.02 * size} for t, size in learned.parameters])
    first = float((learned.weight(1.0).detach() - target).square().sum())
    for _ in range(60):
        optimiser.zero_grad()
        (learned.weight(1.0) - target).square().sum().backward()
        optimiser.step()
    stored = torch.from_numpy(decode(learned.code()))
    assert torch.allclose(stored, learned.weight(1.0).detach(), atol=1e-6)
    assert float((stored - target).square().sum()) < 0.98 * first


def test_a_trained_network_in_two_bits() -> None:
    """On the built-in classifier at about 2 stored bits a weight: codebooks stay near the float model, a grid by nearest values falls."""
    spec = load_model("example:digits-cnn")
    grid, table, vectors = (compress(spec, r).report for r in ("rtn:bits=2,group=0", "any4:bits=2", "vptq:bits=2"))
    assert max(table.bits, vectors.bits) < 2.1
    assert table.quality is not None
    assert vectors.quality is not None
    assert grid.quality is not None
    assert min(table.quality, vectors.quality) > 0.97 > grid.quality + 0.05


METHODS = [
    "any4:bits=3", "any4:bits=2,group=7", "squeezellm:bits=3", "squeezellm:bits=2,group=7,outliers=0.02",
    "vptq:bits=2", "vptq:bits=1.5,length=2,residual=2,outliers=0.3,outlier_bits=2",
]  # fmt: skip


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


@pytest.mark.parametrize("settings", [{}, {"table": "row"}, {"feedback": False}])
@pytest.mark.parametrize("name", ["any4", "squeezellm"])
def test_what_was_pruned_stays_zero(name: str, settings: dict[str, Any]) -> None:
    weight, stats = made(16, 64)
    kept = weight.matrix.abs() > 0.07
    kept[2] = False
    pruned = replace(weight, matrix=weight.matrix * kept, kept=kept)
    code, error, _ = coded(name, pruned, stats, bits=3, **settings)
    assert not decode(code)[~kept.numpy()].any()
    assert error < (0.02 if "feedback" not in settings else 0.1)
    vptq, config = configured("vptq", {"bits": 2})
    assert vptq.level == "weight"
    assert "pruned" in (vptq.why_not(pruned, config) or "")


@pytest.mark.parametrize("recipe", METHODS)
def test_bad_input_is_refused(mixed: ModelSpec, recipe: str) -> None:
    module = mixed.methods["forward"].module
    with torch.no_grad():
        module.linear.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        compress(mixed, recipe)


def test_unknown_and_senseless_settings_are_refused(mixed: ModelSpec) -> None:
    for recipe in ("any4:bits=5", "any4:bits=1", "any4:depth=3", "any4:table=column", "squeezellm:outliers=0.5", "vptq:bits=9"):
        with pytest.raises(InputError, match=recipe.partition(":")[0]):
            compress(mixed, recipe)
