"""A compressed weight's own integers and scales in place of those that a converter would round again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgesdk.packed import Code, decode
from edgesdk.packed.program import to_int8

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


def codes_by_module(spec: ModelSpec) -> dict[tuple[str, str], Code]:
    """(method, module path) → the code its weight is stored as."""
    from edgesdk.compress.weights import holders

    return {
        (method, path): spec.codes[name] for name, uses in holders(spec).items() if name in spec.codes for method, path, _ in uses
    }  # fmt: skip


def is_grid(code: Code, bits: int, group: int) -> bool:
    """Whether a code is a symmetric grid of `bits` with a scale for `group` columns (0: a row)."""
    if code.kind != "grid" or code.numbers[0] != bits or code.arrays[2].size:
        return False
    return code.numbers[1] == group or (code.numbers[1] == 0 and code.shape[1] == group)


def inject(weight: Any, code: Code, precision: str) -> None:
    """Put a code into a torchao tensor of int8 with a scale a row, or int4 with a scale for 32 columns, in place.

    A grid of that very form goes in as it is. Any other code goes in as int8 of what it decodes to, its largest value at 127;
    int4 keeps torchao's own rounding of the decoded values.
    """
    import torch

    if precision == "int4-g32" and is_grid(code, 4, 32):
        q, scale = code.arrays[0].astype(np.int8) - 8, code.arrays[1].astype(np.float32)
    elif precision == "int8-dynamic" and is_grid(code, 8, 0):
        q, scale = (code.arrays[0].astype(np.int16) - 128).astype(np.int8), code.arrays[1].astype(np.float32)
    elif precision == "int8-dynamic":
        values = decode(code)
        scale = (np.abs(values).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
        scale[scale == 0] = np.finfo(np.float32).eps
        q = to_int8(values, scale[:, 0])
    else:
        return
    with torch.no_grad():
        weight.qdata.copy_(torch.from_numpy(q))
        weight.scale.copy_(torch.from_numpy(scale).reshape(weight.scale.shape))
        weight.zero_point.zero_()
