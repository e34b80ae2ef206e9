"""Caches in few bits: what each part of GEAR brings, and that the bytes counted are the bytes held."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgesdk.sequence.gear import low_rank, pack


def caches(seed: int = 0, tokens: int = 128) -> np.ndarray:
    """[1, 4, tokens, 64] like keys are: some channels large, a few common directions, single outliers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, 4, tokens, 64)) * 0.5
    x += rng.standard_normal((1, 4, tokens, 3)) @ rng.standard_normal((1, 4, 3, 64))
    x[..., 5] *= 8
    x[0, 0, ::17, 9] += 20
    return x.astype(np.float32)


def error(array: np.ndarray, **how: object) -> float:
    return float(np.linalg.norm(pack(array, **how).expand() - array) / np.linalg.norm(array))  # type: ignore[arg-type]


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_part_lowers_the_error(bits: int, by_channel: bool) -> None:
    x = caches()
    plain = error(x, bits=bits, rank=0, outliers=0.0, by_channel=by_channel)
    sparse = error(x, bits=bits, rank=0, outliers=0.02, by_channel=by_channel)
    ranked = error(x, bits=bits, rank=4, outliers=0.0, by_channel=by_channel)
    both = error(x, bits=bits, rank=4, outliers=0.02, by_channel=by_channel)
    assert both < min(sparse, ranked) and max(sparse, ranked) < plain


def test_more_rank_is_worth_more_than_its_bytes_in_finer_groups() -> None:
    """At equal bytes: two bits with a low-rank part against two bits in finer groups."""
    x = caches(1, 256)
    gear, finer = pack(x, bits=2, rank=4, outliers=0.0, by_channel=True), pack(x, bits=2, rank=0, outliers=0.0, by_channel=True, group=16)
    assert gear.nbytes <= finer.nbytes
    assert np.linalg.norm(gear.expand() - x) < np.linalg.norm(finer.expand() - x)


@settings(max_examples=40, deadline=None, derandomize=True)
@example((1, 1, 0, 1), 2, True, 0, 0.0, 0)
@example((1, 1, 0, 5), 4, False, 2, 0.05, 0)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 70), st.integers(1, 65)),
    st.sampled_from([2, 4, 8]), st.booleans(), st.integers(0, 3), st.sampled_from([0.0, 0.05]), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_comes_back(shape: tuple[int, ...], bits: int, by_channel: bool, rank: int, outliers: float, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    packed = pack(x, bits=bits, rank=rank, outliers=outliers, by_channel=by_channel)
    back = packed.expand()
    assert back.shape == shape and back.dtype == np.float32
    if x.size:
        assert np.abs(back - x).max() <= (x.max() - x.min()) / (2**bits - 1) * 1.1 + 0.01
        per = 8 // bits
        vectors = shape[0] * shape[1] * (shape[3] if by_channel else shape[2])
        length = shape[2] if by_channel else shape[3]
        group = min(64, length)
        groups = vectors * -(-length // group)
        assert packed.codes.nbytes == -(-groups * group // per)
        assert packed.nbytes == packed.codes.nbytes + 4 * groups + 6 * len(packed.at) + 2 * (packed.left.size + packed.right.size)


def test_constant_zero_and_tiny_values() -> None:
    for x in (np.zeros((1, 1, 4, 8), np.float32), np.full((1, 1, 4, 8), 3.25, np.float32), np.full((1, 1, 4, 8), 1e-7, np.float32)):
        np.testing.assert_allclose(pack(x, bits=4).expand(), x, atol=1e-3)


def test_low_rank_finds_a_planted_subspace() -> None:
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((2, 3, 40, 2)) @ rng.standard_normal((2, 3, 2, 16))).astype(np.float32)
    left, right = low_rank(x, 2)
    np.testing.assert_allclose(left @ right, x, atol=1e-4)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="3 bits"):
        pack(caches(), bits=3)
    bad = caches()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        pack(bad)
