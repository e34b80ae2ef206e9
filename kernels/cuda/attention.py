"""Decode attention over cached keys and values in 16, 8 or 4 bits: launches of the kernels in `attention.cuh`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from edgesdk.errors import InputError

from .compile import Kernel
from .machine import Launch, Machine, Memory, Scratch, launch

GROUP = 32
"""Numbers of a vector that share a scale in caches of 8 and 4 bits."""
PART = 64
"""Positions that are worth a block of their own."""


@lru_cache(maxsize=64)
def attend_kernel(bits: int, dim: int, heads: int) -> Kernel:
    """`heads`: query heads that share a key head."""
    return Kernel(f"attend_{bits}_{dim}x{heads}", "attention.cuh", f"attend<{bits}, {dim}, {heads}>", "Attend", 128)


@lru_cache(maxsize=64)
def keep_kernel(bits: int, dim: int) -> Kernel:
    return Kernel(f"keep_{bits}_{dim}", "attention.cuh", f"keep<{bits}, {dim}>", "Keep", 32)


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, [batch, kv_heads, capacity, dim] in `bits`; scales float16 [batch, kv_heads, capacity, dim / 32]."""

    batch: int
    kv_heads: int
    capacity: int
    dim: int
    bits: int
    k: Memory
    v: Memory
    k_scale: Memory | None
    v_scale: Memory | None

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in (self.k, self.v, self.k_scale, self.v_scale) if m is not None)


def new_cache(machine: Machine, batch: int, kv_heads: int, capacity: int, dim: int, bits: int = 16) -> Cache:
    """Room for a layer's keys and values, of 16, 8 or 4 bits. Raises `InputError`."""
    if bits not in (16, 8, 4) or dim % 8 or not 8 <= dim <= 256:
        raise InputError(
            f"a cache of {bits} bits and heads of {dim}", "caches have 16, 8 or 4 bits, heads a multiple of 8 up to 256 numbers"
        )
    sizes = (batch, kv_heads, capacity, dim * bits // 8)
    k, v = (machine.put(np.zeros(sizes, np.uint8)) for _ in range(2))
    groups = (batch, kv_heads, capacity, -(-dim // GROUP))
    k_scale, v_scale = (machine.put(np.zeros(groups, np.float16)) if bits != 16 else None for _ in range(2))
    return Cache(batch, kv_heads, capacity, dim, bits, k, v, k_scale, v_scale)


def keep(
    cache: Cache, q: Memory, k: Memory, v: Memory, positions: Memory, q_out: Memory, turns: tuple[Memory, Memory] | None = None
) -> Launch:
    """Put k and v float16 [batch · tokens, kv_heads · dim] into the cache from int32 `positions` [batch] on, and q into q_out [batch · tokens, heads · dim].

    `turns`: cosines and sines float32 [positions, dim / 2], by which q and k are turned. A cache that wraps must hold a window and all new tokens but one.
    """
    heads, rows = q_out.shape[1] // cache.dim, q.shape[0]
    values: dict[str, Any] = {
        "q": q, "k": k, "v": v, "positions": positions, "q_out": q_out, "k_cache": cache.k, "v_cache": cache.v,
        "k_scale": cache.k_scale, "v_scale": cache.v_scale, "heads": heads, "kv_heads": cache.kv_heads, "capacity": cache.capacity,
        "cosines": turns and turns[0], "sines": turns and turns[1],
        "tokens": rows // cache.batch, "q_stride": q.shape[1], "k_stride": k.shape[1], "v_stride": v.shape[1],
    }  # fmt: skip
    return launch(keep_kernel(cache.bits, cache.dim), (heads + 2 * cache.kv_heads, rows), values, 4 * cache.dim)


def attend(
    machine: Machine,
    cache: Cache,
    q: Memory,
    positions: Memory,
    out: Memory,
    window: int = 0,
    cross: bool = False,
    scale: float | None = None,
) -> Launch:
    """out float16 [batch · tokens, heads · dim]: attention of q (the same shape) over a cache.

    Token i of a sequence sees positions 0 … positions[b] + i, at most the last `window` of them and what the ring still holds; with `cross`
    every token sees positions 0 … positions[b] - 1. `scale` of scores: dim^-½ if None. A query that sees nothing gets zeros.
    """
    rows, heads = q.shape[0], q.shape[1] // cache.dim
    if heads % cache.kv_heads:
        raise InputError(f"{heads} query heads over {cache.kv_heads} key heads", "query heads are a multiple of key heads")
    each, pairs = heads // cache.kv_heads, rows * cache.kv_heads
    most = min(cache.capacity, window) if window else cache.capacity
    splits = max(1, min(-(-most // PART), 2 * machine.units // pairs))
    values: dict[str, Any] = {
        "q": q, "k": cache.k, "v": cache.v, "k_scale": cache.k_scale, "v_scale": cache.v_scale, "positions": positions, "out": out,
        "kv_heads": cache.kv_heads, "capacity": cache.capacity, "window": window, "tokens": rows // cache.batch, "ahead": -1 if cross else 1,
        "scale": (cache.dim**-0.5 if scale is None else scale) * math.log2(math.e),
    }  # fmt: skip
    if splits > 1:
        scratch = Scratch(machine)
        values |= {"partial": scratch.sums(pairs * splits * each * (cache.dim + 2)), "arrived": scratch.counters(pairs)}
    return launch(attend_kernel(cache.bits, cache.dim, each), (cache.kv_heads, splits, rows), values, 16 * each * (cache.dim + 2))
