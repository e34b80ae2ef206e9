"""Norms, float32 made halves, the largest of a row, and embeddings: launches of the kernels in `rows.cuh`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .compile import Kernel
from .linear import ACTIVATIONS, Linear
from .machine import Launch, Memory, launch
from .tiles import STEP

THREADS = 256


def _kind(memory: Memory) -> str:
    return "u16" if memory.dtype == np.float16 else "float"


@lru_cache(maxsize=64)
def row_kernel(name: str, struct: str, *parameters: str) -> Kernel:
    """A kernel of rows.cuh with its template parameters."""
    body = f"{name}<{', '.join(parameters)}>" if parameters else name
    return Kernel("_".join(("rows", name, *parameters)), "rows.cuh", body, struct, THREADS)


def norm_kernel(kind: str, layer: bool, out: str) -> Kernel:
    return row_kernel("norm", "Norm", kind, str(layer).lower(), out)


def norm(
    x: Memory,
    weight: Memory,
    out: Memory,
    bias: Memory | None = None,
    eps: float = 1e-6,
    add: Memory | None = None,
    total: Memory | None = None,
    cols: int = 0,
) -> Launch:
    """out [M, stride] = the RMS norm of x (+ `add`) [M, cols], or its layer norm where there is a `bias`; `total` keeps x + add.

    All but weight and bias (float32 [`cols`, or all of the weight's]) are float16 or float32; x, add and total are alike, rows of equal stride. `total` may be x or add,
    `out` may be x.
    """
    kernel = norm_kernel(_kind(x), bias is not None, _kind(out))
    values: dict[str, Any] = {"x": x, "add": add, "sum": total, "weight": weight, "bias": bias, "out": out, "eps": eps}
    return launch(
        kernel, (x.shape[0],), {**values, "cols": cols or weight.shape[0], "x_stride": x.shape[1], "out_stride": out.shape[1]}, 32
    )


def halve(x: Memory, out: Memory, scale: Memory, cols: int = 0, activation: str = "none", other: Memory | None = None) -> Launch:
    """x float32 [M, stride] → out float16 [M, stride], scale float32 [M]: activation(x) (· other, as x) = out · scale, of `cols` columns (0: all)."""
    values: dict[str, Any] = {"x": x, "other": other, "out": out, "scale": scale, "cols": cols or x.shape[1], "x_stride": x.shape[1]}
    values |= {"out_stride": out.shape[1], "activation": ACTIVATIONS[activation]}
    return launch(row_kernel("halve", "Halve"), (x.shape[0],), values, 32)


def pick(x: Memory, last: Memory, out: Memory, n: int, cols: int) -> Launch:
    """out float32 [B, stride]: of each n rows of x [B · n, stride] the one that `last` says (int32 or int64 [B])."""
    values: dict[str, Any] = {"x": x, "last": last, "out": out, "n": n, "cols": cols, "x_stride": x.shape[1], "out_stride": out.shape[1]}
    return launch(row_kernel("pick", "Pick"), (out.shape[0],), {**values, "last_words": words_of(last)})


def sparse(x: Memory, x_scale: Memory | None, starts: Memory, columns: Memory, weights: Memory, out: Memory) -> Launch:
    """out float32 [M, stride] += x float16 [M, stride] (· x_scale [M]) times single weights in compressed rows: starts, columns int32, weights float32."""
    rows = starts.shape[0] - 1
    values: dict[str, Any] = {"x": x, "x_scale": x_scale, "starts": starts, "columns": columns, "values": weights, "out": out}
    values |= {"rows": rows, "x_stride": x.shape[1], "out_stride": out.shape[1]}
    return launch(row_kernel("sparse", "Sparse"), (-(-rows // 8), out.shape[0]), values)


def words_of(whole: Memory) -> int:
    """32-bit words of one whole number: the kernels read the low one."""
    return int(np.dtype(whole.dtype).itemsize) // 4


def argmax(x: Memory, out: Memory, count: Memory | None = None, history: Memory | None = None) -> Launch:
    """out int32 [M]: the first of the largest of each row of x [M, cols]. `count` [M] grows by 1; history [M, N] keeps `out` at the count before."""
    values: dict[str, Any] = {"x": x, "out": out, "count": count, "history": history, "cols": x.shape[1], "stride": x.shape[1]}
    values["history_stride"] = history.shape[1] if history is not None else 0
    return launch(row_kernel("argmax", "Argmax", _kind(x)), (x.shape[0],), values, 64)


def embed_kernel(bits: int, table: bool, group: int, zeros: bool, half_out: bool) -> Kernel:
    flags = (str(bits), str(table).lower(), str(min(group, STEP[bits])), str(zeros).lower(), "u16" if half_out else "float")
    return row_kernel("embed", "Embed", *flags)


def embed(
    layer: Linear,
    ids: Memory,
    out: Memory,
    factor: float = 1.0,
    places: tuple[Memory, Memory, int] | None = None,
) -> Launch:
    """out [M, stride], float16 or float32: the rows `ids` (int32 or int64 [M]) of a layer's weights, times `factor`; zeros where an id is no row.

    `places`: a table float32 [positions, stride], positions like ids, and an offset: row position + offset is added.
    """
    w = layer.weights
    kernel = embed_kernel(w.bits, w.tables.size > 0, w.group, w.zeros.size > 0, out.dtype == np.float16)
    values: dict[str, Any] = {n: layer.memory[n] for n in ("codes", "high", "scales", "zeros", "tables", "row_scale")}
    values |= {n: layer.sizes[n] for n in ("rows", "cols", "steps", "groups", "group_shift", "row_tables")}
    return launch(kernel, (ids.shape[0],), {**values, **_placed(ids, out, factor, places)})


def lookup(
    table: Memory, cols: int, ids: Memory, out: Memory, factor: float = 1.0, places: tuple[Memory, Memory, int] | None = None
) -> Launch:
    """The same of a table float32 [rows, stride], the stride that of `places`."""
    values: dict[str, Any] = {"row_scale": table, "rows": table.shape[0], "cols": cols, **_placed(ids, out, factor, places)}
    return launch(row_kernel("lookup", "Embed", _kind(out)), (ids.shape[0],), {**values, "row_stride": table.shape[1]})


def _placed(ids: Memory, out: Memory, factor: float, places: tuple[Memory, Memory, int] | None) -> dict[str, Any]:
    values: dict[str, Any] = {"ids": ids, "id_words": words_of(ids), "out": out, "out_stride": out.shape[1], "factor": factor}
    if places is not None:
        table, at, offset = places
        values |= {"places": table, "row_stride": table.shape[1], "at": at, "offset": offset}
    return values
