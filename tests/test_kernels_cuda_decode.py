"""The rest of a decoder in CUDA: rows, attention, a whole step; on a CPU, thread by thread, against float64, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgesdk.kernels.cuda import rows as of_rows
from edgesdk.kernels.cuda.attention import Cache, attend, keep, new_cache
from edgesdk.kernels.cuda.decode import Layer, decode_step
from edgesdk.kernels.cuda.linear import Linear
from edgesdk.kernels.cuda.machine import Machine
from edgesdk.packed import Code, decode
from tests.cuda_kernels import (
    TOLERANCE,
    codebook,
    far,
    poisoned,
    weights,
)

pytest_plugins = ["tests.cuda_fixture"]


# ---- rows


@pytest.mark.parametrize(("dtype", "layer"), [(np.float32, False), (np.float16, True)])
def test_norms_are_those_of_float64(machine: Machine, dtype: Any, layer: bool) -> None:
    rng = np.random.default_rng(0)
    for m, cols in ((1, 7), (3, 600)):
        x, add = (rng.standard_normal((m, cols)).astype(dtype) + dtype(3) for _ in range(2))
        weight, bias = (rng.standard_normal(cols).astype(np.float32) for _ in range(2))
        total, given = machine.put(x), {"bias": machine.put(bias)} if layer else {}
        out = poisoned(machine, (m, cols), np.float16)
        machine.run([of_rows.norm(total, machine.put(weight), out, add=machine.put(add), total=total, **given)])
        v = x.astype(np.float64) + add
        centred = v - v.mean(1, keepdims=True) if layer else v
        wanted = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6) * weight + (bias if layer else 0)
        assert far(machine.get(out), wanted) < 2 * TOLERANCE
        assert far(machine.get(total), v) < TOLERANCE


def test_float32_is_halved_without_overflow(machine: Machine) -> None:
    x = np.random.default_rng(0).standard_normal((6, 300)).astype(np.float32)
    x *= np.array([1e-37, 1e-9, 1, 1e5, 1e37, 0], np.float32)[:, None]
    out, scale = poisoned(machine, x.shape, np.float16), poisoned(machine, (6,), np.float32)
    machine.run([of_rows.halve(machine.put(x), out, scale)])
    back = machine.get(out).astype(np.float64) * machine.get(scale)[:, None].astype(np.float64)
    assert np.abs(back - x).max(1) == pytest.approx(np.zeros(6), abs=0) or (np.abs(back - x).max(1)[:5] < 5e-4 * np.abs(x).max(1)[:5]).all()
    assert not back[5].any()


def test_layers_take_float32_beyond_the_range_of_float16(machine: Machine) -> None:
    code = weights(4, 40, 128, 4, 32, True)
    x = np.random.default_rng(0).standard_normal((1, 128)).astype(np.float32) * np.float32(1e7)
    halved, scale, out = machine.empty(x.shape, np.float16), machine.empty((1,), np.float32), poisoned(machine, (1, 40), np.float32)
    machine.run([of_rows.halve(machine.put(x), halved, scale), Linear(machine, code).launch(halved, out, x_scale=scale)])
    assert far(machine.get(out), x.astype(np.float64) @ decode(code).astype(np.float64).T) < TOLERANCE


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_first_of_the_largest_is_found(machine: Machine, dtype: Any) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (5, 1000)).astype(dtype)
    x[1] = -np.inf
    x[2] = np.nan
    x[3, :999] = np.nan
    x[4, 700] = np.inf
    out, count = poisoned(machine, (5,), np.int32), machine.put(np.array([0, 1, 2, 3, 4], np.int32))
    history = machine.put(np.full((5, 4), -1, np.int32))
    machine.run([of_rows.argmax(machine.put(x), out, count, history)])
    assert machine.get(out).tolist() == [int(x[0].argmax()), 0, 0, 999, 700]
    assert machine.get(count).tolist() == [1, 2, 3, 4, 5]
    assert machine.get(history).max(1).tolist() == [int(x[0].argmax()), 0, 0, 999, -1]


@pytest.mark.parametrize(
    ("code", "half_out"),
    [(weights(1, 40, 200, 4, 32, True), True), (weights(1, 40, 77, 8, 0, False), False), (weights(1, 40, 200, 3, 64, True), False), (codebook(1, 40, 96, 32, True), False)],
)  # fmt: skip
def test_embeddings_are_rows_of_the_same_weights(machine: Machine, code: Code, half_out: bool) -> None:
    ids = np.array([0, 39, 8, 23, -1, 40, 7], np.int32)
    out = poisoned(machine, (7, code.shape[1]), np.float16 if half_out else np.float32)
    machine.run([of_rows.embed(Linear(machine, code), machine.put(ids), out)])
    wanted = decode(code).astype(np.float64)[np.clip(ids, 0, 39)] * ((ids >= 0) & (ids < 40))[:, None]
    assert far(machine.get(out), wanted) < TOLERANCE


# ---- attention


def kept(machine: Machine, cache: Cache) -> tuple[Any, Any]:
    """What a cache holds, float64 [batch, kv_heads, capacity, dim]."""
    out = []
    for codes, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        raw = machine.get(codes)
        if scales is None:
            out.append(raw.view(np.float16).astype(np.float64))
            continue
        ints = (
            raw.astype(np.int64) - 128
            if cache.bits == 8
            else np.stack([raw & 15, raw >> 4], -1).reshape(*raw.shape[:-1], -1).astype(np.int64) - 8
        )
        out.append(ints * np.repeat(machine.get(scales).astype(np.float64), 32, -1)[..., : cache.dim])
    return out[0], out[1]


def turned(x: Any, cosines: Any, sines: Any) -> Any:
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], -1)


@pytest.mark.parametrize(("bits", "dim", "worst"), [(16, 40, 1e-3), (16, 128, 1e-3), (8, 64, 8e-3), (4, 64, 0.12)])
def test_keys_and_values_are_turned_and_kept(machine: Machine, bits: int, dim: int, worst: float) -> None:
    rng = np.random.default_rng(bits)
    heads, kv_heads, capacity, tokens = 4, 2, 8, 3
    cache = new_cache(machine, 2, kv_heads, capacity, dim, bits)
    q, k, v = (rng.standard_normal((2 * tokens, n * dim)).astype(np.float16) for n in (heads, kv_heads, kv_heads))
    angles = np.arange(20)[:, None] * 10.0 ** -np.linspace(0, 4, dim // 2)
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions, q_out = np.array([6, 11], np.int32), poisoned(machine, q.shape, np.float16)
    turns = (machine.put(cosines), machine.put(sines))
    machine.run([keep(cache, machine.put(q), machine.put(k), machine.put(v), machine.put(positions), q_out, turns)])
    at = positions[:, None] + np.arange(tokens)
    split = [x.astype(np.float64).reshape(2, tokens, -1, dim) for x in (q, k, v)]
    c, s = cosines[at][:, :, None], sines[at][:, :, None]
    assert far(machine.get(q_out).reshape(split[0].shape), turned(split[0], c, s)) < 1e-3
    for found, wanted in zip(kept(machine, cache), (turned(split[1], c, s), split[2]), strict=True):
        for b in range(2):
            assert far(found[b][:, at[b] % capacity], wanted[b].swapaxes(0, 1)) < worst
        assert not found[0][:, [1, 2, 3, 4, 5]].any()


def filled(machine: Machine, batch: int, kv_heads: int, capacity: int, dim: int, bits: int, seed: int) -> Cache:
    """A cache of random keys and values in every slot."""
    cache = new_cache(machine, batch, kv_heads, capacity, dim, bits)
    rng = np.random.default_rng(seed)
    for codes, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        if scales is None:
            machine.put(rng.standard_normal((*codes.shape[:3], dim)).astype(np.float16), codes)
        else:
            machine.put(rng.integers(0, 256, codes.shape).astype(np.uint8), codes)
            machine.put((rng.random(scales.shape) / (1 << (bits - 1))).astype(np.float16), scales)
    return cache


def attention(machine: Machine, cache: Cache, q: Any, seen: Any) -> Any:
    """float64 [rows, heads · dim]; `seen`: the positions that each row sees."""
    k, v = kept(machine, cache)
    rows, each = len(q), q.shape[1] // cache.dim // cache.kv_heads
    parts = q.astype(np.float64).reshape(rows, cache.kv_heads, each, cache.dim)
    out = np.zeros(parts.shape)
    for r, positions in enumerate(seen):
        slots = np.array(list(positions), np.int64) % cache.capacity
        if len(slots):
            b = r * cache.batch // rows
            scores = np.einsum("hed,hsd->hes", parts[r], k[b][:, slots]) * cache.dim**-0.5
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[r] = np.einsum("hes,hsd->hed", p / p.sum(-1, keepdims=True), v[b][:, slots])
    return out.reshape(rows, -1)


SHAPES = [(16, 64, 1, 2), (16, 128, 4, 1), (8, 64, 2, 2), (4, 64, 8, 1), (16, 40, 3, 1)]


@pytest.mark.parametrize(("bits", "dim", "each", "kv_heads"), SHAPES)
def test_attention_is_that_of_float64(machine: Machine, bits: int, dim: int, each: int, kv_heads: int) -> None:
    rng = np.random.default_rng(dim)
    for capacity, lengths, window, tokens in ((70, [0, 69], 0, 1), (200, [180, 3], 0, 1), (40, [100, 17], 24, 3)):
        cache = filled(machine, 2, kv_heads, capacity, dim, bits, capacity)
        q = rng.standard_normal((2 * tokens, each * kv_heads * dim)).astype(np.float16)
        out = poisoned(machine, q.shape, np.float16)
        item = attend(machine, cache, machine.put(q), machine.put(np.array(lengths, np.int32)), out, window)
        machine.run([item])
        machine.put(np.full(q.shape, np.nan, np.float16), out)
        machine.run([item])  # the counters are back at 0
        ends = [lengths[b] + 1 + i for b in range(2) for i in range(tokens)]
        seen = [range(max(0, end - capacity, end - window if window else 0), end) for end in ends]
        assert far(machine.get(out), attention(machine, cache, q, seen)) < 2 * TOLERANCE


def test_cross_attention_sees_what_was_encoded(machine: Machine) -> None:
    cache = filled(machine, 2, 2, 150, 64, 8, 0)
    q = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float16)
    out = poisoned(machine, q.shape, np.float16)
    machine.run([attend(machine, cache, machine.put(q), machine.put(np.array([150, 0], np.int32)), out, cross=True)])
    assert far(machine.get(out), attention(machine, cache, q, [range(150), range(150), range(0), range(0)])) < 2 * TOLERANCE


# ---- a whole step


DIM, HEADS, KV_HEADS, HEAD, FEED, WORDS, LAYERS = 64, 2, 1, 64, 96, 40, 2


def model() -> tuple[list[dict[str, Code]], Code]:
    shapes = {
        "qkv": ((HEADS + 2 * KV_HEADS) * HEAD, DIM),
        "out": (DIM, HEADS * HEAD),
        "gate": (FEED, DIM),
        "up": (FEED, DIM),
        "down": (DIM, FEED),
    }
    layers = [{n: weights(10 * i + j, *shape, 4, 32, False) for j, (n, shape) in enumerate(shapes.items())} for i in range(LAYERS)]
    return layers, weights(99, WORDS, DIM, 4, 32, False)


def tokens_of_float64(turns: tuple[Any, Any], first: int, steps: int) -> tuple[list[int], Any]:
    """Tokens, and the logits of the last step, without rounding but that of the weights."""
    codes, head_code = model()
    layers, head = [{n: decode(c).astype(np.float64) for n, c in w.items()} for w in codes], decode(head_code).astype(np.float64)
    keys: list[list[Any]] = [[] for _ in layers]
    values: list[list[Any]] = [[] for _ in layers]
    out, token, logits = [], first, np.zeros(0)
    for position in range(steps):
        x = head[token]
        for i, w in enumerate(layers):
            normed = x / np.sqrt((x * x).mean() + 1e-6)
            qkv = (w["qkv"] @ normed).reshape(-1, HEAD)
            qk = turned(qkv[: HEADS + KV_HEADS], turns[0][position], turns[1][position])
            keys[i].append(qk[HEADS])
            values[i].append(qkv[-1])
            scores = qk[:HEADS] @ np.array(keys[i]).T * HEAD**-0.5
            p = np.exp(scores - scores.max(1, keepdims=True))
            x = x + w["out"] @ (p / p.sum(1, keepdims=True) @ np.array(values[i])).ravel()
            normed = x / np.sqrt((x * x).mean() + 1e-6)
            gate = w["gate"] @ normed
            x = x + w["down"] @ (gate / (1 + np.exp(-gate)) * (w["up"] @ normed))
        logits = head @ (x / np.sqrt((x * x).mean() + 1e-6))
        token = int(logits.argmax())
        out.append(token)
    return out, logits


def test_a_decode_loop_gives_the_tokens_of_float64(machine: Machine) -> None:
    codes, head = model()
    ones = machine.put(np.ones(DIM, np.float32))
    layers = [
        Layer(
            **{n: Linear(machine, c, activation="silu" if n == "gate" else "none") for n, c in w.items()},
            attention_norm=ones, feed_norm=ones, cache=new_cache(machine, 1, KV_HEADS, 16, HEAD, 8),
        )
        for w in codes
    ]  # fmt: skip
    angles = np.arange(16)[:, None] * 10.0 ** -np.linspace(0, 4, HEAD // 2)
    turns = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    launches, state = decode_step(machine, layers, Linear(machine, head), ones, 1, (machine.put(turns[0]), machine.put(turns[1])), 16)
    machine.put(np.array([7], np.int32), state.token)
    step = machine.graph(launches)
    for _ in range(5):
        step()
    tokens, logits = tokens_of_float64(turns, 7, 5)
    assert machine.get(state.history)[0, :5].tolist() == tokens
    assert machine.get(state.position).tolist() == [5]
    assert far(machine.get(state.logits)[0], logits) < 0.02
