"""Ternary weights, quantization-aware training, distillation and low-rank recovery."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgesdk.compress.registry import configured
from edgesdk.compress.types import Weight
from edgesdk.packed import Code, decode, pack, unpack

torch.set_num_threads(1)


def weight(rows: int = 40, cols: int = 70, seed: int = 0) -> Weight:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return Weight("layer.weight", "linear", (rows, cols), matrix)


def ternary(given: Weight, **settings: object) -> Code:
    method, config = configured("ternary", settings)
    code = method.apply(given, None, config)  # type: ignore[call-arg, arg-type]
    assert isinstance(code, Code) and np.array_equal(decode(unpack(pack(code))), decode(code))
    return code


def error(code: Code, given: Weight) -> float:
    return float(((torch.from_numpy(decode(code)) - given.matrix) ** 2).sum())


# ---- ternary without training


@pytest.mark.parametrize("fit", ["search", "mean", "median"])
@pytest.mark.parametrize(("per", "group"), [("tensor", 0), ("row", 0), ("row", 32), ("row", 7)])
def test_ternary_weights_take_three_values_a_scale_in_less_than_two_bits(fit: str, per: str, group: int) -> None:
    given = weight(64, 160)
    code = ternary(given, fit=fit, per=per, group=group)
    q, scale, _ = code.arrays
    assert set(np.unique(q)) <= {0, 1, 2} and np.array_equal(decode(ternary(given, fit=fit, per=per, group=group)), decode(code))
    digits = -(-q.size // 5)
    assert digits + scale.size * 2 <= len(pack(code, entropy=False)) <= digits + scale.size * 2 + 40


def test_the_searched_scale_has_the_least_error_of_all_scales() -> None:
    given = weight(6, 50)
    best = error(ternary(given), given)
    for fit in ("mean", "median"):
        assert best <= error(ternary(given, fit=fit), given)
    for row in given.matrix:
        found = ternary(Weight("w", "linear", (1, 50), row[None]))
        tried = [float(((torch.clamp(torch.round(row / s), -1, 1) * s - row) ** 2).sum()) for s in torch.linspace(0.05, 3, 600)]
        assert error(found, Weight("w", "linear", (1, 50), row[None])) <= min(tried) * 1.001


def test_bitnet_scale_and_sane_zero_rows() -> None:
    given = weight()
    code = ternary(given, fit="mean", per="tensor")
    assert code.arrays[1].shape == (1, 1) and abs(float(code.arrays[1][0, 0]) - float(given.matrix.abs().mean())) < 1e-3
    matrix = given.matrix.clone()
    matrix[3] = 0
    values = decode(ternary(Weight("w", "linear", (40, 70), matrix)))
    assert np.all(values[3] == 0) and np.isfinite(values).all()
    again = ternary(Weight("w", "linear", (40, 70), torch.from_numpy(values)))
    assert np.array_equal(decode(again), values)  # ternary weights stay as they are
