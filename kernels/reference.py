"""What every kernel must compute, in float64 numpy: slow, plain, and the only word on what is right."""

from __future__ import annotations

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
    y = (scale[:, None] * (q - zero[:, None])) @ decode(code).astype(np.float64).T
    y = y if bias is None else y + np.asarray(bias, np.float64)
    return y if residual is None else y + np.asarray(residual, np.float64)
