"""What every kernel must compute, in float64 numpy: slow, plain, and the only word on what is right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgesdk.packed import Code, decode


def round_inputs(x: Any) -> tuple[Any, Any, Any]:
    """x float32 [M, K] → (q [M, K] from -128 to 127, scale [M], zero [M]): x ≈ scale · (q - zero), a row at a time, 0 kept exactly."""
    low, high = np.minimum(x.min(1, initial=0), 0), np.maximum(x.max(1, initial=0), 0)
    scale = ((high - low) / np.float32(255)).astype(np.float32)
    scale[scale < np.float32(2.0**-126)] = 1  # whose inverse is no number
    inverse = np.float32(1) / scale
    zero = np.rint(np.float32(-128) - low * inverse)
    q = np.rint(np.clip(x * inverse[:, None] + zero[:, None], -128, 127))
    return q.astype(np.float64), scale.astype(np.float64), zero.astype(np.float64)


def linear(x: Any, code: Code, bias: Any = None, residual: Any = None) -> Any:
    """y [M, rows] = x̂ · Wᵀ + bias + residual, where x̂ is x [M, cols] rounded to 8 bits and W what `code` decodes to."""
    q, scale, zero = round_inputs(np.asarray(x, np.float32))
    return matrix(scale[:, None] * (q - zero[:, None]), decode(code), bias, residual)


def matrix(x: Any, weights: Any, bias: Any = None, residual: Any = None) -> Any:
    """y [M, rows] = x [M, cols] · Wᵀ + bias + residual, W [rows, cols]."""
    y = np.asarray(x, np.float64) @ np.asarray(weights, np.float64).T
    y = y if bias is None else y + np.asarray(bias, np.float64)
    return y if residual is None else y + np.asarray(residual, np.float64)


def embedding(table: Any, ids: Any, factor: float = 1.0, places: Any = None) -> Any:
    """factor · rows `ids` of a table (an array or a `Code`) + `places`, rows of the same shape."""
    rows = (decode(table) if isinstance(table, Code) else np.asarray(table)).astype(np.float64)[ids] * factor
    return rows if places is None else rows + places


def pick(x: Any, last: Any) -> Any:
    """x [B, N, width] at row last[b] of each batch: [B, width]."""
    return np.asarray(x)[np.arange(len(x)), last]


def depthwise(x: Any, weights: Any, scales: Any, bias: Any, zero: int, stride: int, pads: tuple[int, int, int, int]) -> Any:
    """x int8 [B, H, W, C] with weights int8 [size, size, C] → Σ (x - zero) · w + bias, times scales: [B, rows, columns, C]. `pads`: above, below,
    left, right, of the input's zero."""
    above, below, left, right = pads
    x = np.pad(np.asarray(x, np.float64) - zero, ((0, 0), (above, below), (left, right), (0, 0)))
    size = len(weights)
    rows, columns = ((x.shape[i] - size) // stride + 1 for i in (1, 2))
    total = np.zeros((len(x), rows, columns, x.shape[3])) + (0 if bias is None else bias)
    for i in range(size):
        for j in range(size):
            part = x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
            total += part * np.asarray(weights, np.float64)[i, j]
    return total * scales


def top(x: Any, k: int) -> tuple[Any, Any]:
    """The k largest of each row of x [M, n], largest first, of equal ones the first, and where they are; -infinity and -1 where there are no more."""
    x = np.asarray(x, np.float64)
    order = np.argsort(np.where(np.isnan(x), np.inf, -x), 1, kind="stable")[:, :k]
    values = np.take_along_axis(x, order, 1)
    none = np.isnan(values) | np.isneginf(values)
    values, order = np.where(none, -np.inf, values), np.where(none, -1, order)
    more = ((0, 0), (0, k - order.shape[1]))
    return np.pad(values, more, constant_values=-np.inf), np.pad(order, more, constant_values=-1)


def sparse(x: Any, starts: Any, columns: Any, values: Any) -> Any:
    """x [M, cols] times the transpose of a matrix in compressed rows: [M, rows]."""
    out = np.zeros((len(x), len(starts) - 1))
    for n in range(len(starts) - 1):
        part = slice(starts[n], starts[n + 1])
        out[:, n] = np.asarray(x, np.float64)[:, columns[part]] @ np.asarray(values, np.float64)[part]
    return out


def norm(kind: str, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """RMS norm ("rms": `bias` is not used) or layer norm ("layer") of each row of x [M, cols]."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    return x + bias if kind == "layer" else x


def activation(name: str, x: Any, other: Any = 1.0) -> Any:
    """silu, gelu, gelu_tanh or relu of x, times `other`."""
    x = np.asarray(x, np.float64)
    if name == "relu":
        return np.maximum(x, 0) * other
    if name == "silu":
        return x / (1 + np.exp(-np.clip(x, -700, 700))) * other
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) * other
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) * other


def heads(x: Any, count: int, *, weight: Any = None, eps: float = 0.0, turns: Any = None, scale: float = 1.0) -> Any:
    """x [B, N, count · D] → [B, count, N, D], times `scale`: with `weight` [D] each head behind an RMS norm, with `turns` (cosines and sines
    [B, N, D / 2]) its first half turned against its second."""
    b, n, width = x.shape
    x = np.asarray(x, np.float64).reshape(b, n, count, width // count).transpose(0, 2, 1, 3)
    x = (x if weight is None else norm("rms", x, weight, None, eps)) * scale
    if turns is None:
        return x
    cos, sin = (np.asarray(t, np.float64)[:, None] for t in turns)
    one, two = np.split(x, 2, -1)
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


def attention(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    """q [B, H, N, D] (scaled), keys and values [B, K, T, D] that H / K heads share, mask [B, 1 or H, N, T] → [B · N, H · D]."""
    b, h, n, size = q.shape
    keys, values = (np.asarray(x, np.float64).repeat(h // x.shape[1], 1) for x in (keys, values))
    scores = np.einsum("bhnd,bhtd->bhnt", np.asarray(q, np.float64), keys) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnt,bhtd->bnhd", weights, values).reshape(b * n, h * size)
