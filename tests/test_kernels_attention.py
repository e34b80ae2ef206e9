"""Attention over caches in float32, float16, int8 and int4 on our kernels: every target that this machine runs, against float64."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesdk.kernels import reference
from edgesdk.kernels.attention import FORMS, ROWS, kernel, room
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.library import library
from edgesdk.kernels.tape import Tape
from edgesdk.sequence.caches import held
from edgesdk.sequence.card import groups

BEST = host_targets()[0]


def numbers(arrays: list[Any], form: str) -> list[Any]:
    """What keys and values stand for that are held so."""
    if form == "int8":
        return [h.astype(np.float64) * s[..., None] for h, s in zip(arrays[:2], arrays[2:], strict=True)]
    if form != "int4":
        return [a.astype(np.float64) for a in arrays[:2]]
    found = []
    for h, beside in zip(arrays[:2], arrays[2:], strict=True):
        q = np.concatenate([h & 15, h >> 4], -1).astype(np.float64)
        parts = q.reshape(*q.shape[:-1], groups(q.shape[-1]), -1)
        pairs = beside.astype(np.float64).reshape(*parts.shape[:-1], 2)
        found.append((parts * pairs[..., :1] + pairs[..., 1:]).reshape(q.shape))
    return found


def attended(
    target: str, form: str, q: Any, keys: Any, values: Any, new: tuple[Any, Any] | None, mask: Any, parts: int = 1
) -> tuple[Any, Any]:
    """What the kernel gives, called once for each of `parts` ranges of heads, and what float64 gives of the same codes."""
    b, heads, n, size = q.shape
    kv, slots = keys.shape[1:3]
    tokens = new[0].shape[2] if new else 0
    arrays = held([keys, values], FORMS[form])
    out = np.full((b * n, heads * size + 3), np.nan, np.float32)
    more = dict(zip(("key_scales", "value_scales"), arrays[2:], strict=False))
    if new:
        more |= {"new_keys": new[0], "new_values": new[1]}
    tape = Tape(library(target))
    args = tape.add(
        kernel(form, size), b * heads, q=q, keys=arrays[0], values=arrays[1], slots=slots, tokens=tokens, mask=mask, mask_batch=mask.strides[0],
        mask_head=mask.strides[1] if mask.shape[1] > 1 else 0, mask_row=mask.strides[2] if mask.shape[2] > 1 else 0, n=n, heads=heads,
        shared=heads // kv, out=out, stride=out.strides[0], scores=room(form, size, b * heads, slots + tokens) + np.nan, **more,
    )  # fmt: skip
    if parts == 1:
        tape.run()
    else:
        bounds = [b * heads * i // parts for i in range(parts + 1)]
        function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(library(target).address(kernel(form, size)))
        for first, last in itertools.pairwise(bounds):
            function(args.ctypes.data, first, last)
    assert np.isnan(out[:, heads * size :]).all()
    seen = numbers(arrays, form)
    if new:
        seen = [np.concatenate(x, 2) for x in zip(seen, new, strict=True)]
    return out[:, : heads * size], reference.attention(q, *seen, np.broadcast_to(mask, (b, mask.shape[1], n, slots + tokens)))


def random(rng: Any, *shape: int, size: float = 1.0) -> Any:
    return (rng.standard_normal(shape) * size).astype(np.float32)


CASES = ((2, 3, 4, 2, 19), (1, 1, 3, 3, 40), (1, 2, 4, 1, 1), (1, 1, 8, 2, 64), (2, 5, 2, 2, 33))


HEADS = [(t, size) for t in host_targets() for size in ((24, 64) if t != "plain" else (24,))]


@pytest.mark.parametrize(("target", "size"), [*HEADS, (BEST, 2), (BEST, 128)])
@pytest.mark.parametrize("form", FORMS)
def test_attention_over_slots_and_new_tokens(target: str, size: int, form: str) -> None:
    rng = np.random.default_rng(size)
    for b, n, heads, kv, slots in CASES:
        q, keys, values, new_keys, new_values = (
            random(rng, b, h, t, size) for h, t in ((heads, n), (kv, slots), (kv, slots), (kv, n), (kv, n))
        )
        mask = np.where(rng.random((b, 1, n, slots + n)) < 0.4, -1e4, rng.standard_normal((b, 1, n, slots + n))).astype(np.float32)
        mask[..., slots] = 0
        mask[0, :, :, slots // 2 : slots] = -1e4  # nothing there to see: not read
        got, wanted = attended(target, form, q, keys, values, (new_keys, new_values), mask)
        assert np.abs(got - wanted).max() < 2e-5 * size**0.5


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize("form", FORMS)
def test_slots_alone_masks_by_head_and_parts_of_the_heads(target: str, form: str) -> None:
    """Cross-attention, an encoder's windows, relative biases; heads divided over threads wherever they fall."""
    rng = np.random.default_rng(5)
    for b, n, heads, kv, slots, size, parts in (
        (1, 7, 6, 2, 50, 24, 4),
        (2, 1, 4, 4, 3, 24, 3),
        (1, 40, 2, 1, 40, 24, 1),
        (1, 9, 2, 2, 9, 24, 2),
    ):
        q, keys, values = (random(rng, b, h, t, size) for h, t in ((heads, n), (kv, slots), (kv, slots)))
        mask = random(rng, b, heads, n, slots)
        ahead = np.arange(slots)[None] - np.arange(n)[:, None]
        mask += np.where((ahead > 0) | (ahead < -20), np.float32(-1e4), np.float32(0)) if slots >= n > 1 else np.float32(0)
        got, wanted = attended(target, form, q, keys, values, None, mask, parts)
        assert np.abs(got - wanted).max() < 3e-5 * size**0.5


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_see_nothing_are_numbers(form: str) -> None:
    rng = np.random.default_rng(1)
    for slots in (5, 32, 35):
        q, keys, values = (random(rng, 1, 2, t, 24) for t in (ROWS + 1, slots, slots))
        assert np.isfinite(attended(BEST, form, q, keys, values, None, np.full((1, 1, ROWS + 1, slots), -1e4, np.float32))[0]).all()


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(list(FORMS)),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 70)),
    size=st.sampled_from([2, 24, 64, 128]),
    large=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_any_sizes_and_numbers(form: str, sizes: tuple[int, ...], size: int, large: float, seed: int) -> None:
    rng, (b, n, kv, shared, slots) = np.random.default_rng(seed), sizes
    q, new_keys, new_values = (random(rng, b, h, n, size) for h in (kv * shared, kv, kv))
    keys, values = (random(rng, b, kv, slots, size, size=large) for _ in range(2))
    mask = np.where(rng.random((b, 1, n, slots + n)) < 0.5, -1e4, 0).astype(np.float32)
    mask[..., slots] = 0
    got, wanted = attended(BEST, form, q, keys, values, (new_keys, new_values), mask)
    assert np.isfinite(got).all()
    assert np.abs(got - wanted).max() <= 2e-5 * size**0.5 * max(1.0, large) ** 2


@pytest.mark.parametrize("form", ["half", "int8", "int4"])
def test_numbers_that_the_form_cannot_hold_stay_finite(form: str) -> None:
    rng = np.random.default_rng(2)
    q, keys, values = (random(rng, 1, 2, t, 64) for t in (1, 20, 20))
    values[0, 0, 3] *= 1e6
    keys[0, 1, 4] = 0
    values[0, 1, 5] = 1e-9
    got, wanted = attended(BEST, form, q, keys, values, None, np.zeros((1, 1, 1, 20), np.float32))
    assert np.isfinite(got).all() and np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(got[:, 64:] - wanted[:, 64:]).max() < 1e-4
