"""Integer methods: second-order rounding, adaptive groups, outliers kept apart, smoothing, rotations, activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import edgesdk.compress as compress
from edgesdk.compress.gptq import Problem
from edgesdk.compress.rate import Rounder, fair
from edgesdk.compress.registry import configured
from edgesdk.compress.types import Stats, Weight
from edgesdk.compress.weights import output_error, stats_of, weights_of
from edgesdk.errors import InputError
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import Code, decode, pack, unpack

torch.set_num_threads(1)


class Small(nn.Module):
    """A linear, an embedding tied to nothing, ordinary, grouped and depthwise convolutions; inputs are correlated and some are large."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.first = nn.Conv2d(12, 24, 3, padding=1)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.grouped = nn.Conv2d(24, 20, 1, groups=4)
        self.line = nn.Conv1d(20, 17, 3)
        self.linear = nn.Linear(17 * 7, 33)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).reshape(1, 9, 1, 12).permute(0, 3, 1, 2)
        x = torch.relu(self.depth(torch.relu(self.first(x))))
        x = torch.relu(self.grouped(x))[..., 0]
        out: torch.Tensor = self.linear(torch.relu(self.line(x)).reshape(1, -1))
        return out


def small() -> ModelSpec:
    torch.manual_seed(0)
    module = Small().eval()
    ids = [(torch.randint(0, 20, (9,)),) for _ in range(48)]
    return ModelSpec(name="small", digest="0" * 64, methods={"forward": Method(module, ids[0])}, calibration=lambda _: ids)


def layer(rows: int = 48, cols: int = 70, seed: int = 0) -> tuple[Weight, Stats]:
    """A linear weight and inputs that are correlated and of unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g) / cols**0.5 + torch.eye(cols)
    x = torch.relu(torch.randn(2000, cols, generator=g) @ mix) * torch.exp(torch.randn(cols, generator=g))
    stats = Stats(2000, (x.double().T @ x.double() / 2000)[None], x.mean(0), x.abs().amax(0))
    return Weight("layer.weight", "linear", (rows, cols), torch.randn(rows, cols, generator=g) / cols**0.5), stats


def coded(name: str, weight: Weight, stats: Stats | None, **settings: object) -> tuple[Code, float, int]:
    """(code, relative output error, stored bytes); what is stored is read back to the same weights."""
    method, config = configured(name, settings)
    code = method.apply(weight, stats, config)  # type: ignore[call-arg, arg-type]
    assert isinstance(code, Code) and tuple(code.shape) == tuple(weight.matrix.shape)
    values = torch.from_numpy(decode(code))
    assert bool(torch.isfinite(values).all()) and np.array_equal(decode(unpack(pack(code))), values.numpy())
    return code, output_error(weight, values, stats), len(pack(code))


# ---- gptq


@pytest.mark.parametrize("bits", [2, 2.6, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_gptq_is_far_better_than_nearest_at_the_same_levels(bits: float, group: int) -> None:
    weight, stats = layer()
    _, error, _ = coded("gptq", weight, stats, bits=bits, group=group)
    nearest = coded("rtn", weight, stats, bits=int(bits + 0.9), group=group)[1]
    assert error < 0.5 * nearest


def test_gptq_orders_errors_as_published() -> None:
    weight, stats = layer()
    full = coded("gptq", weight, stats, bits=3)[1]
    assert full < coded("gptq", weight, stats, bits=3, sweeps=0)[1] < coded("rtn", weight, stats, bits=3)[1]
    assert coded("gptq", weight, stats, bits=3, sweeps=0, search=False)[1] > coded("gptq", weight, stats, bits=3, sweeps=0)[1]


def test_gptq_leaves_what_is_on_the_grid() -> None:
    weight, stats = layer()
    code, _, _ = coded("gptq", weight, stats, bits=3, group=16, search=False, symmetric=False)
    again = Weight("w", "linear", weight.shape, torch.from_numpy(decode(code)))
    assert coded("gptq", again, stats, bits=8, group=16)[1] < 1e-4


def test_gptq_takes_a_model_with_every_kind_of_weight() -> None:
    made = compress(small(), "gptq:bits=4,group=10")  # type: ignore[operator]
    assert {w.weight for w in made.report.weights} == set(weights_of(small())) and not made.report.kept
    nearest = compress(small(), "rtn:bits=4,group=10")  # type: ignore[operator]
    better = {w.weight: w.error for w in made.report.weights}
    assert all(better[w.weight] <= w.error for w in nearest.report.weights)


@pytest.mark.parametrize("name, settings", [("gptq", {"bits": 4}), ("gptq", {"rate": 4})])
def test_zero_rows_dead_inputs_and_one_column_are_sane(name: str, settings: dict[str, object]) -> None:
    weight, stats = layer(6, 9)
    matrix = weight.matrix.clone()
    matrix[2] = 0
    gram = stats.gram.clone()
    gram[:, 4] = gram[:, :, 4] = 0
    code, _, _ = coded(name, Weight("w", "linear", (6, 9), matrix), Stats(9, gram, stats.mean, stats.absmax), **settings)
    assert np.abs(decode(code)[2]).max() < 1e-5
    coded(
        name, Weight("w", "linear", (6, 1), matrix[:, :1].clone()), Stats(9, gram[:, :1, :1], stats.mean[:1], stats.absmax[:1]), **settings
    )
    coded(name, Weight("w", "linear", (6, 9), torch.zeros(6, 9)), stats, **settings)


def test_missing_or_foreign_statistics_are_said() -> None:
    spec = small()
    with pytest.raises(InputError, match="calibration"):
        compress(ModelSpec("x", "0" * 64, spec.methods), "gptq:bits=3")  # type: ignore[operator]
    weight = layer(6, 9)[0]
    with pytest.raises(InputError, match="columns"):
        coded("gptq", weight, layer(6, 8)[1], bits=3)
    with pytest.raises(InputError, match="bits"):
        configured("gptq", {"bits": 11})
    assert stats_of(spec)["linear.weight"].count == 48


# ---- gptq to a rate


@pytest.mark.parametrize("bits", [2.3, 3])
def test_at_equal_stored_bytes_rate_beats_grids_and_nearest(bits: float) -> None:
    weight, stats = layer(96, 128)
    plain = [coded("gptq", weight, stats, bits=b, group=g) for b, g in ((bits, 0), (bits - 0.25, 64))]
    for _, error, size in plain:
        _, better, stored = coded("gptq", weight, stats, rate=8 * size / weight.matrix.numel())
        assert 0.97 * size < stored <= size * 1.002 and better < 0.8 * error


def test_the_trellis_pays() -> None:
    weight, stats = layer(96, 128)
    plain, trellis = (coded("gptq", weight, stats, rate=2.5, trellis=t)[1] for t in (False, True))
    assert trellis < 0.98 * plain


def test_weights_past_the_largest_index_of_the_model_are_not_cut_off() -> None:
    """What is fed back can push a weight beyond every index the model was made of; cut off there, its error would be many steps."""
    weight, stats = layer(24, 32)
    rounder = Rounder(Problem(weight, stats.gram, 0.01), trellis=False, water=False)
    steps = np.ones((1, 24), np.float32), np.full(32, 2.0 ** rounder.start(5), np.float32)
    free = [rounder._walk(0, None, [], steps, 0.0)]
    most = int(np.abs(free[0]).max())
    model = rounder._model([np.clip(free[0], -most + 2, most - 2)])
    again = [rounder._walk(0, model, [], steps, 0.0)]
    assert np.abs(again[0]).max() == most and np.array_equal(again[0], free[0])


def test_rate_keeps_zeros_where_pruned_and_takes_embeddings_and_grouped_convolutions() -> None:
    weight, stats = layer(40, 64)
    kept = torch.rand(weight.matrix.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    pruned = Weight("w", "linear", weight.shape, weight.matrix * kept, kept=kept)
    code, _, _ = coded("gptq", pruned, stats, rate=2)
    assert not decode(code)[~kept.numpy()].any()
    made = compress(small(), "gptq:rate=4")  # type: ignore[operator]
    large = {
        w.weight: 8 * w.bytes / (w.float_bytes / 4) / fair(4, w.float_bytes // 4) for w in made.report.weights if w.float_bytes > 4 * 1000
    }
    assert len(large) >= 2 and all(0.95 < share <= 1.001 for share in large.values())
    again = compress(small(), "gptq:rate=4")  # type: ignore[operator]
    assert again.report.compressed_digest == made.report.compressed_digest
