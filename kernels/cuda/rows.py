"""Norms, float32 made halves, the largest of a row, and embeddings: launches of the kernels in `rows.cuh`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .compile import Kernel
from .linear import Linear
from .machine import Launch, Memory, launch
from .weights import STEP

THREADS = 256


def _kind(memory: Memory) -> str:
    return "u16" if memory.dtype == np.float16 else "float"


@lru_cache(maxsize=64)
def row_kernel(name: str, struct: str, *parameters: str) -> Kernel:
    """A kernel of rows.cuh with its template parameters."""
    body = f"{name}<{', '.join(parameters)}>" if parameters else name
    return Kernel("_".join(("rows", name, *parameters)), "rows.cuh", body, struct, THREADS)


def norm(
    x: Memory,
    weight: Memory,
    out: Memory,
    bias: Memory | None = None,
    eps: float = 1e-6,
    add: Memory | None = None,
    total: Memory | None = None,
) -> Launch:
    """out float16 [M, stride] = the RMS norm of x (+ `add`) [M, cols], or its layer norm where there is a `bias`; `total` keeps x + add.

    x, add and total are float16 or float32, rows of equal stride; weight and bias float32 [cols]. `total` may be x or add.
    """
    kernel = row_kernel("norm", "Norm", _kind(x), str(bias is not None).lower())
    values: dict[str, Any] = {"x": x, "add": add, "sum": total, "weight": weight, "bias": bias, "out": out, "eps": eps}
    return launch(kernel, (x.shape[0],), {**values, "cols": weight.shape[0], "x_stride": x.shape[1], "out_stride": out.shape[1]}, 32)


def halve(x: Memory, out: Memory, scale: Memory) -> Launch:
    """x float32 [M, cols] → out float16 [M, stride], scale float32 [M]: x = out · scale."""
    values = {"x": x, "out": out, "scale": scale, "cols": x.shape[1], "x_stride": x.shape[1], "out_stride": out.shape[1]}
    return launch(row_kernel("halve", "Halve"), (x.shape[0],), values, 32)


def argmax(x: Memory, out: Memory, count: Memory | None = None, history: Memory | None = None) -> Launch:
    """out int32 [M]: the first of the largest of each row of x [M, cols]. `count` [M] grows by 1; history [M, N] keeps `out` at the count before."""
    values: dict[str, Any] = {"x": x, "out": out, "count": count, "history": history, "cols": x.shape[1], "stride": x.shape[1]}
    values["history_stride"] = history.shape[1] if history is not None else 0
    return launch(row_kernel("argmax", "Argmax", _kind(x)), (x.shape[0],), values, 64)


def embed_kernel(bits: int, table: bool, group: int, zeros: bool, half_out: bool) -> Kernel:
    flags = (str(bits), str(table).lower(), str(min(group, STEP[bits])), str(zeros).lower(), "u16" if half_out else "float")
    return row_kernel("embed", "Embed", *flags)


def embed(layer: Linear, ids: Memory, out: Memory) -> Launch:
    """out [M, stride], float16 or float32: the rows `ids` (int32 [M]) of a layer's weights; zeros where an id is no row."""
    w = layer.weights
    kernel = embed_kernel(w.bits, w.tables.size > 0, w.group, w.zeros.size > 0, out.dtype == np.float16)
    values: dict[str, Any] = {n: layer.memory[n] for n in ("codes", "high", "scales", "zeros", "tables", "row_scale")}
    values |= {n: layer.sizes[n] for n in ("rows", "cols", "steps", "groups", "group_shift", "row_tables")}
    return launch(kernel, (ids.shape[0],), {**values, "ids": ids, "out": out, "out_stride": out.shape[1]})
