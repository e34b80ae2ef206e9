"""Weights of int8 depthwise convolutions as the kernels take them, channels last.

Four neighbouring columns of a row make a quad, as in products; with the weights moved along inside the quad, it serves several places of the output.
Channels go in blocks of 4 · lanes, then of half as many, down to 16. Within a block vector r of four holds channels 16 g + 4 r … 16 g + 4 r + 3 of
each sixteen g: as bytes of four columns interleave without leaving their 128 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PLACES = {(3, 1): 2, (3, 2): 3, (5, 1): 4, (5, 2): 2}
"""Size of the kernel and stride → places of the output that are computed together."""


def shifts(size: int, stride: int, places: int = 0) -> list[tuple[int, int, int]]:
    """Which place reads which quad, and where the weights begin in it: [(place, quad, shift)], of `places` places (0: as many as go together)."""
    places = places or PLACES[size, stride]
    quads = -(-((places - 1) * stride + size) // 4)
    every = [(p, q, 4 * q - p * stride) for p in range(places) for q in range(quads)]
    return [(p, q, s) for p, q, s in every if -4 < s < size]


def table(size: int, stride: int) -> list[int]:
    """The shifts that weights are stored for, in order."""
    return sorted({s for _, _, s in shifts(size, stride)} | {s for _, _, s in shifts(size, stride, 1)})


def blocks(channels: int, lanes: int) -> list[tuple[int, int]]:
    """[(first channel, lanes of a vector)] of each block."""
    found, first = [], 0
    while first < channels:
        while 4 * lanes > channels - first:
            lanes //= 2
        found.append((first, lanes))
        first += 4 * lanes
    return found


@dataclass(frozen=True)
class Depthwise:
    """`weights` int8, of each block each row's shifts, four vectors of quads each; `bias` int32 and `scales` float32 in the order of the vectors."""

    weights: Any
    bias: Any
    scales: Any
    channels: int
    size: int
    stride: int


def pack(weights: Any, scales: Any, bias: Any, zero: int, stride: int, lanes: int, shift: int) -> Depthwise:
    """weights int8 [size, size, C], scales float32 [C] from sums to the output's steps, bias int32 [C] in sums or None; the input's `zero`.
    `lanes`, `shift`: the library's (`shift_of(8)`). Raises `ValueError` for other sizes, and channels that are no multiple of 16."""
    size, _, channels = weights.shape
    if (size, stride) not in PLACES or channels % 16 or weights.shape[1] != size:
        raise ValueError(f"depthwise weights {weights.shape}, stride {stride}: sizes 3 and 5, strides 1 and 2, channels in sixteens")
    sums = weights.astype(np.int64).sum((0, 1))
    total = (0 if bias is None else np.asarray(bias, np.int64)) - (zero + shift) * sums
    parts, order = [], []
    for first, n in blocks(channels, lanes):
        places = first + np.concatenate([[16 * g + 4 * r + i for g in range(n // 4) for i in range(4)] for r in range(4)])
        order.append(places)
        for row in range(size):
            for s in table(size, stride):
                quad = np.zeros((4 * n, 4), np.int8)
                for i in range(4):
                    if 0 <= s + i < size:
                        quad[:, i] = weights[row, s + i, places]
                parts.append(quad.reshape(-1))
    at = np.concatenate(order)
    return Depthwise(
        np.concatenate(parts), total[at].astype(np.int32), np.asarray(scales, np.float32)[at].copy(), channels, size, stride
    )  # fmt: skip
