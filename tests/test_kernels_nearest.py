"""Grids of least square error for weights that nobody compressed."""

from __future__ import annotations

import numpy as np
import pytest

from edgesdk.kernels.nearest import nearest
from edgesdk.packed import decode


def error(weight: np.ndarray, bits: int, group: int) -> float:
    found = decode(nearest(weight, bits, group, True))
    assert found.shape == weight.shape and np.isfinite(found).all()
    return float(np.linalg.norm((found - weight).astype(float)) / np.linalg.norm(weight.astype(float)))


@pytest.mark.parametrize(("bits", "group", "most"), [(8, 0, 0.012), (4, 32, 0.0815), (4, 0, 0.11), (3, 32, 0.164), (2, 32, 0.336)])
def test_normal_weights_lose_what_a_search_leaves(bits: int, group: int, most: float) -> None:
    """By the largest value alone 4 bits in groups of 32 lose 0.097, 3 bits 0.227, 2 bits 0.658."""
    assert error(np.random.default_rng(0).standard_normal((128, 1024), np.float32), bits, group) < most


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("factor", [1e-20, 1e-3, 1.0, 1e20])
def test_no_size_of_weights_is_too_small_or_too_large(bits: int, factor: float) -> None:
    weight = np.random.default_rng(1).standard_normal((8, 96), np.float32)
    assert error(weight * np.float32(factor), bits, 32) == pytest.approx(error(weight, bits, 32), rel=1e-2)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_odd_shapes_zeros_and_single_values_come_back(bits: int) -> None:
    assert not decode(nearest(np.zeros((3, 40), np.float32), bits, 32, True)).any()
    one = np.zeros((5, 71), np.float32)
    one[2, 70], one[3, 0] = 3.0, -0.25
    assert np.allclose(decode(nearest(one, bits, 32, True)), one, rtol=1e-3)


def test_a_grid_already_stays_what_it_is() -> None:
    q = np.random.default_rng(2).integers(-8, 8, (16, 64)).astype(np.float32)
    q[:, ::32] = -8
    assert np.array_equal(decode(nearest(q * np.float32(0.5), 4, 32, True)), q * np.float32(0.5))
