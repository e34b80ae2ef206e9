"""Integer methods without or around second-order rounding: adaptive groups, outliers apart, rotations, smoothing, flattening, activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_compress_integer import coded, layer, small

import edgesdk.compress as compress
from edgesdk.compress.registry import configured
from edgesdk.compress.types import Stats, Weight
from edgesdk.compress.weights import weights_of
from edgesdk.errors import InputError
from edgesdk.packed import decode, pack

torch.set_num_threads(1)


def error(matrix: torch.Tensor, code: object) -> float:
    return float(((torch.from_numpy(decode(code)) - matrix) ** 2).sum())  # type: ignore[arg-type]


# ---- finequant


def blocky() -> Weight:
    """128 × 512; in rows 64 to 127 of columns 256 to 383 every 16th column is ten times larger."""
    matrix = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[64:, 256:384:16] *= 10
    return Weight("w", "linear", (128, 512), matrix)


def test_finequant_shrinks_groups_only_where_the_outliers_are() -> None:
    code, _, _ = coded("finequant", blocky(), None, bits=4, search=False)
    assert code.kind == "stack" and len(code.parts) == 2
    calm, rough = code.parts
    assert calm.kind == "grid" or len({p.numbers[1] for p in calm.parts}) == 1
    sizes = [p.numbers[1] or p.shape[1] for p in rough.parts]
    assert len(sizes) == 3 and sizes[1] < min(sizes[0], sizes[2])


def test_finequant_beats_fixed_groups_at_equal_bytes() -> None:
    weight = blocky()
    code, _, stored = coded("finequant", weight, None, bits=4, search=False)
    ours = np.log2(error(weight.matrix, code)) / 2 + 8 * stored / weight.matrix.numel()
    for group in (0, 128, 64, 32, 16, 8):
        fixed, _, size = coded("rtn", weight, None, bits=4, group=group)
        assert ours < np.log2(error(weight.matrix, fixed)) / 2 + 8 * size / weight.matrix.numel()


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (65, 130), (64, 128), (3, 300)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_finequant_takes_any_shape(shape: tuple[int, int], symmetric: bool) -> None:
    weight = Weight("w", "linear", shape, torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    _, err, _ = coded("finequant", weight, None, bits=4, symmetric=symmetric)
    assert err < 0.02


# ---- easyquant


def test_easyquant_lowers_the_error_step_by_step_and_keeps_few_apart() -> None:
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) < 0.004] *= 8
    weight = Weight("w", "linear", (64, 256), matrix)
    for bits in (3, 4):
        plain, apart, best = (
            coded("easyquant", weight, None, bits=bits, **settings)
            for settings in ({"outliers": 0.0, "optimise": False}, {"optimise": False}, {})
        )
        assert plain[1] > 2 * apart[1] and apart[1] > 1.05 * best[1]
        assert np.array_equal(decode(plain[0]), decode(coded("rtn", weight, None, bits=bits, group=0)[0]))
        mask = best[0].parts[1].arrays[0]
        assert 0 < mask.mean() < 0.01


def test_easyquant_looks_at_no_data_and_holds_outliers_as_they_are() -> None:
    weight, stats = layer()
    weight.matrix[3, 5] = 7.0
    with_data, without = (pack(coded("easyquant", weight, s, bits=3)[0]) for s in (stats, None))
    assert with_data == without
    assert decode(coded("easyquant", weight, None, bits=3)[0])[3, 5] == 7.0


# ---- hadamard


def test_rotation_spreads_outliers() -> None:
    weight, stats = layer(48, 64)
    weight.matrix[torch.rand(48, 64, generator=torch.Generator().manual_seed(2)) < 0.01] *= 10
    assert coded("hadamard", weight, stats, bits=3, group=0)[1] < 0.5 * coded("gptq", weight, stats, bits=3, group=0)[1]
    assert coded("hadamard", weight, stats, bits=8)[1] < 1e-4


def test_rotation_says_where_it_does_not_apply() -> None:
    weight, stats = layer(6, 9)
    method, config = configured("hadamard")
    assert "9 columns" in (method.why_not(weight, config) or "")  # type: ignore[arg-type]
    weight, stats = layer(6, 24)
    assert coded("hadamard", weight, stats, bits=8)[0].numbers == (0, 8)
    pruned = Weight("w", "linear", (6, 24), weight.matrix, kept=torch.zeros(6, 24, dtype=torch.bool))
    with pytest.raises(InputError, match="pruned"):
        coded("hadamard", pruned, stats)


# ---- all of them


WEIGHT_METHODS = [("finequant", {"bits": 4}), ("easyquant", {"bits": 4}), ("hadamard", {"bits": 4, "rate": 0}), ("hadamard", {"rate": 3})]


@pytest.mark.parametrize("name, settings", WEIGHT_METHODS)
def test_odd_matrices_are_sane_and_runs_repeat(name: str, settings: dict[str, object]) -> None:
    weight, stats = layer(6, 12)
    matrix = weight.matrix.clone()
    matrix[2] = 0
    gram = stats.gram.clone()
    gram[:, 4] = gram[:, :, 4] = 0
    odd = Weight("w", "linear", (6, 12), matrix)
    code, _, _ = coded(name, odd, Stats(9, gram, stats.mean, stats.absmax), **settings)
    assert np.abs(decode(code)[2]).max() < 1e-5
    assert pack(code) == pack(coded(name, odd, Stats(9, gram, stats.mean, stats.absmax), **settings)[0])
    coded(name, Weight("w", "linear", (6, 12), torch.zeros(6, 12)), stats, **settings)


@pytest.mark.parametrize("name", ["finequant", "easyquant", "hadamard"])
def test_every_kind_of_weight_goes_through_compress(name: str) -> None:
    made = compress(small(), f"{name}:bits=8")  # type: ignore[operator]
    named = {w.weight for w in made.report.weights} | set(made.report.kept)
    assert named == set(weights_of(small())) and all(w.error < 2e-3 for w in made.report.weights)
    assert {w.weight: len(pack(made.spec.codes[w.weight])) for w in made.report.weights} == {w.weight: w.bytes for w in made.report.weights}
