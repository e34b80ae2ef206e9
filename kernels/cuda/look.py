"""Heads of queries, keys and values, and attention over keys and values as a sequence runtime keeps them: launches of the kernels in `look.cuh`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from edgesdk.errors import InputError

from .attention import PART
from .compile import Kernel
from .machine import Launch, Machine, Memory, Scratch, launch

HEADS = Kernel("heads_of_three", "look.cuh", "heads", "HeadsOfThree", 32)
TOGETHER = 3
"""So many sets of heads in one launch: queries, keys and values."""
BITS = (32, 16, 8, 4)
"""Of caches."""
_MOST_ROWS = 8


@lru_cache(maxsize=64)
def look_kernel(bits: int, dim: int, rows: int) -> Kernel:
    """Caches of 32, 16, 8 or 4 bits; `rows`: queries that a block takes over the same keys."""
    return Kernel(f"look_{bits}_{dim}x{rows}", "look.cuh", f"look<{bits}, {dim}, {rows}>", "Look", 128)


def heads(parts: Sequence[Mapping[str, Any]], rows: int) -> Launch:
    """Up to three sets of heads of `rows` rows each; a part has the values of struct `Heads`."""
    values = {f"part{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items()}
    return launch(HEADS, (rows, max(int(part["heads"]) for part in parts), len(parts)), values)


def heads_of(
    x: Memory,
    out: Memory,
    *,
    weight: Memory | None = None,
    eps: float = 0.0,
    turns: tuple[Memory, Memory] | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:
    """One part: x float32 [B · N, stride] → out float32 [B, heads, N, D], behind an RMS norm of each head (`weight` [D]), turned (cosines and sines
    [B · N, D / 2]: the first half against the second), times `scale`."""
    _, count, n, size = out.shape
    values: dict[str, Any] = {"x": x, "out": out, "weight": weight, "eps": eps, "scale": scale, "x_stride": x.shape[1]}
    return {**values, "n": n, "heads": count, "size": size, "cosines": turns and turns[0], "sines": turns and turns[1]}


def look(
    machine: Machine,
    q: Memory,
    caches: Mapping[str, Any],
    slots: int,
    kv_heads: int,
    out: Memory,
    *,
    new: tuple[Memory, Memory] | None = None,
    mask: Memory | None = None,
    mask_strides: tuple[int, int, int] = (0, 0, 0),
    bits: int = 32,
    scratch: Scratch | None = None,
) -> Launch:
    """out float16 [B · N, stride], heads side by side: attention of q float32 [B, heads, N, D], scaled already.

    `caches`: keys and values [B, kv_heads, slots, D] in float32, float16, or, with key_scales and value_scales, in int8 or half bytes, as
    `edgesdk.sequence.caches.held` gives them for `bits` 32, 16, 8 and 4.
    `new`: the newest [B, kv_heads, tokens, D], float32. `mask`: float32, added to the scores [slots + tokens]; `mask_strides`: numbers from one batch, head
    and row of it to the next. What a mask hides by 5000 or more is not read; a query that sees nothing gets zeros. Raises `InputError`.
    """
    b, count, n, size = q.shape
    if bits not in BITS or size % 8 or not 8 <= size <= 256 or count % kv_heads:
        raise InputError(
            f"attention of {count} heads of {size} over {kv_heads} in {bits} bits",
            "caches have 32, 16, 8 or 4 bits, heads a multiple of 8 up to 256 numbers, query heads are a multiple of key heads",
        )
    shared = count // kv_heads
    rows = rows_of(n * shared)
    chunks, tokens = -(-n * shared // rows), new[0].shape[2] if new else 0
    blocks = b * chunks
    splits = max(1, min(-(-(slots + tokens) // PART), 2 * machine.units // (blocks * kv_heads)))
    values: dict[str, Any] = {
        "q": q, **caches, "slots": slots, "tokens": tokens, "new_keys": new and new[0], "new_values": new and new[1], "mask": mask, "out": out,
        "n": n, "kv_heads": kv_heads, "shared": shared, "out_stride": out.shape[1],
        **dict(zip(("mask_batch", "mask_head", "mask_row"), mask_strides)),  # noqa: B905 (Python 3.9)
    }  # fmt: skip
    if splits > 1:
        scratch = scratch or Scratch(machine)
        values |= {"partial": scratch.sums(blocks * kv_heads * splits * rows * (size + 2)), "arrived": scratch.counters(blocks * kv_heads)}
    return launch(look_kernel(bits, size, rows), (kv_heads, splits, blocks), values, 16 * rows * (size + 2))


def rows_of(queries: int) -> int:
    """How many queries a block takes: 1, 2, 4 or 8."""
    return next((n for n in (1, 2, 4) if queries <= n), _MOST_ROWS)
