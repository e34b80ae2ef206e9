"""Where tokens are and what they may see: rotary turns, sinusoids, T5's relative buckets, and masks that hide what lies ahead or out of a window."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgesdk.sequence.config import SequenceConfig

HIDDEN = -1e4
"""Added to the score of a position that may not be seen."""


def frequencies(config: SequenceConfig, head: int) -> list[float]:
    """[D / 2]: radians by which a step turns each pair of channels, scaled as `rope_scaling` says."""
    turn = config.rope_theta ** -(torch.arange(0, head, 2, device="cpu", dtype=torch.float32) / head)
    if (scaling := config.rope_scaling) is not None:
        kept = torch.zeros(1, device="cpu")
        if scaling.kind != "linear":
            kept = ((scaling.original / (2 * math.pi) * turn - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        turn = turn * (kept + (1 - kept) / scaling.factor)
    return turn.tolist()


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """[B, N] → [B, N, dim]: sines, then cosines, of frequencies from 1 to 1 / 10000."""
    turns = torch.tensor([10000.0 ** (-2.0 * i / dim) for i in range(dim // 2)], device=positions.device)
    angles = positions.to(torch.float32).reshape(*positions.shape, 1) * turns
    return torch.cat([torch.sin(angles), torch.cos(angles)], -1)


def buckets(config: SequenceConfig, both_ways: bool) -> list[int]:
    """T5's bucket of each distance (seen - seeing) from -`relative_distance` to it: exact up to a quarter (half, where only the past is seen)
    of them, then logarithmic. Source: Raffel et al. 2020, section 2.1, and the released checkpoints, whose rounding it has."""
    distance = torch.arange(-config.relative_distance, config.relative_distance + 1, device="cpu")
    count = config.relative_buckets // 2 if both_ways else config.relative_buckets
    first = (distance > 0) * count if both_ways else 0
    distance = distance.abs() if both_ways else (-distance).clamp(min=0)
    exact = count // 2
    log = torch.log(distance.clamp(min=1) / exact) / math.log(config.relative_distance / exact) * (count - exact)
    found = first + torch.where(distance < exact, distance, (exact + log.to(torch.int64)).clamp(max=count - 1))
    return found.tolist()


def ordered(positions: Tensor, window: int, both_ways: bool = False) -> Tensor:
    """[B, N, N] of positions [B, N]: HIDDEN where the column's comes after the row's, or `window` or more before it (0: no window)."""
    b, n = positions.shape
    at = positions.to(torch.float32)
    back = at.reshape(b, n, 1) - at.reshape(b, 1, n)
    if both_ways:
        hidden = back.abs() - (window - 1)
    else:
        hidden = torch.maximum(-back, back - (window - 1)) if window else -back
    return hidden.clamp(0, 1) * HIDDEN
