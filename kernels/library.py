"""The kernels of a target by name, however they were made: addresses of functions with one signature, their args, and what runs them.

gemv_4_block, gemm_8_row, embed_2_block_zeros  weights of so many bits; a scale a block of 32 columns or a row; with zeros of their own
gemv_4_row_table, gemm_4_block_super, embed_5_row_trits, …    see KINDS
gemv_8_row_2of4, gemm_4_block_blocks, …       without weights that are zero: two of every four, or blocks (`panels.SparsePanels`)
gemv_32, gemm_16, embed_16                     weights in float32 or float16 (`panels.FloatPanels`), inputs in float32
embed, pick, sparse                            a table in float32; a row of each batch; the few weights that are kept apart
round, rms_round, silu_gated_round, rms, …     see ROUNDINGS
heads_64, heads_turned_64, attend_int8_64, …   for heads of 64 floats
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .cpu import host_targets

LINEAR_ARGS = (
    "codes", "scales", "zeros", "row_scale", "sums", "q", "q_sums", "q_scale", "q_zero",
    "m", "blocks", "panel_bytes", "scale_bytes", "zero_bytes", "bias", "residual", "out", "stride", "tables", "table_bytes",
)  # fmt: skip
"""y = q_scale · (row_scale · Σ scale · (code - zero) · q - q_zero · sums) + bias + residual → out. int64 each: addresses, and at the end
counts. `bias`, `residual`: 0 for none. `stride`: bytes of a row of `out` and of `residual`. `table_bytes`: from a panel's tables to the next's,
0 where all share one. Parts: panels of a gemv, groups of a gemm."""
KEPT_ARGS = (*LINEAR_ARGS, "starts", "kept")
"""The same over the blocks that are kept: those of panel p are kept[starts[p]] … kept[starts[p + 1] - 1], int32. Codes, and where blocks have
scales and zeros those, lie in that order."""
FLOAT_ARGS = ("codes", "row_scale", "x", "x_stride", "m", "cols", "panel_bytes", "bias", "residual", "out", "stride")
"""y = row_scale · x · Wᵀ + bias + residual → out, all float32 but the weights. `x_stride`: bytes of a row of x. Parts: as in LINEAR_ARGS."""
ROUND_ARGS = ("x", "blocks", "stride", "m", "shift", "q", "q_sums", "q_scale", "q_zero", "other", "weight", "bias", "eps", "cols", "out")
"""`stride`: bytes of a row of x, other and out; `shift`: 0 for int8, 128 for unsigned bytes. `other`: what an activation's result is multiplied
with; `weight`, `bias` (or 0) and `eps` (the bits of a float32) of a norm over `cols` columns; `out`: where the row goes before it is rounded.
Parts: the M rows."""
EMBED_ARGS = (
    "ids", "codes", "scales", "zeros", "row_scale", "panel_bytes", "scale_bytes", "zero_bytes", "blocks", "factor", "places", "at", "offset",
    "out", "stride", "tables", "table_bytes",
)  # fmt: skip
"""ids int64 [M] → out float32 [M, 32 · blocks], rows of `stride` bytes: factor (bits of a float32) · row id, + row at[m] + offset of `places`
(float32, rows of `stride` bytes; at int64 [M]) where it is not 0. `codes`: panels, or in float32 rows of `stride` bytes. Parts: the M ids."""
PICK_ARGS = ("x", "stride", "n", "last", "out")
"""x: B · n rows of `stride` bytes; out[b] = row last[b] (int64) of batch b. Parts: the B batches."""
SPARSE_ARGS = ("x", "stride", "m", "starts", "columns", "values", "out", "out_stride")
"""out[m, n] += Σ values[i] · x[m, columns[i]], i from starts[n] to starts[n + 1]: starts, columns int32, values float32. Parts: the rows n."""
TOP_ARGS = ("x", "stride", "n", "k", "values", "ids")
"""Of each row of x (n floats, rows of `stride` bytes) the k largest, largest first, of equal ones the first: values float32 [rows, k], ids int64
[rows, k]; -infinity and -1 where there are no more. What is no number is never one of them. Parts: the rows."""
TURN_ARGS = ("x", "stride", "m", "out", "out_stride")
"""Rows of x [M, 32 · parts] as columns: out [32 · parts, M], whose rows have `out_stride` bytes. Parts: blocks of 32 columns. `sparse_turned` takes x
so, `stride` from a column to the next; its M is made a multiple of a vector with zeros. Its parts: as many rows n as a vector has lanes, so `starts`
goes on, with its last number, and `out` may be read and written, to whole parts."""
DEPTHWISE_ARGS = (
    "x", "nothing", "weights", "bias", "scales", "out", "height", "width", "channels", "rows", "columns", "top", "left", "zero", "low", "high",
)  # fmt: skip
"""x int8 [B, height, width, channels], `top` and `left` of it padded before it → out [B, rows, columns, channels], int8 or (`_float`) float32;
weights, bias, scales: `kernels.depthwise.pack`. `nothing`: a pixel of the input's zero point. A result is held between `low` and `high` (bits of
float32) and `zero` added to it where it is int8. Parts: B · rows."""
HEADS_ARGS = ("x", "stride", "n", "heads", "weight", "eps", "cos", "sin", "scale", "out")
"""x float32, B · N rows of `stride` bytes, each of `heads` heads → out [B, heads, N, D]. `weight` (or 0) and `eps` (the bits of a float32): an
RMS norm of each head. `cos`, `sin` (or 0): [B · N, D / 2], which turn the first half of D against the second. `scale`: bits of a float32.
Parts: the B · N rows."""
ATTEND_ARGS = (
    "q", "keys", "values", "slots", "new_keys", "new_values", "tokens", "mask", "mask_batch", "mask_head", "mask_row",
    "n", "heads", "shared", "out", "stride", "scores", "key_scales", "value_scales",
)  # fmt: skip
"""q [B, heads, N, D], scaled; keys and values [B, heads / shared, slots, D] and [B, heads / shared, tokens, D], of which one may be empty.
`mask`: float32, added to the scores [slots + tokens]; `mask_…`: bytes from one batch, head and row to the next. out: B · N rows of `stride`
bytes, heads side by side. `scores`: room for slots + tokens floats for each of the B · heads parts. Of `attend_int8` the keys and values in
slots are int8, with a float32 scale each [B, heads / shared, slots]. Parts: the B · heads heads."""

NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROUNDINGS = ("round", *NORMS, *(f"{n}_round" for n in (*NORMS, *ACTIVATIONS)), *(f"{n}_gated_round" for n in ACTIVATIONS))


def args_of(name: str) -> tuple[str, ...]:
    """What a kernel's args are, in order."""
    family, _, rest = name.partition("_")
    if family in ("gemv", "gemm") and (rest in FLOATS or rest.endswith("_blocks")):
        return FLOAT_ARGS if rest in FLOATS else KEPT_ARGS
    found = {
        "gemv": LINEAR_ARGS,
        "gemm": LINEAR_ARGS,
        "embed": EMBED_ARGS,
        "pick": PICK_ARGS,
        "sparse": SPARSE_ARGS,
        "turn": TURN_ARGS,
        "top": TOP_ARGS,
        "depthwise": DEPTHWISE_ARGS,
        "heads": HEADS_ARGS,
        "attend": ATTEND_ARGS,
    }
    return found.get(family, ROUND_ARGS)


def bits_of(value: float) -> int:
    """A float32 as an int64 arg."""
    return int(np.float32(value).view(np.int32))


FLOATS = ("32", "16")
"""Forms of weights that are floats: their bits."""
TABLES = ("table", "tables", "trits")
"""Codes that stand for int8 numbers in a table, one for all rows or one a row; codes of 5 bits that stand for three weights of -1, 0 or 1."""
KINDS = (*TABLES, "super")
"""More that a form may be. Super: blocks have whole steps beside a float of 8 blocks, and zeros in sixteenths."""


def form(bits: int, per_block: bool, zeros: bool, kind: str = "") -> str:
    """The part of a kernel's name that says how weights are stored."""
    return "_".join([str(bits), "block" if per_block else "row", *["zeros"] * zeros, *filter(None, [kind])])


class Library(Protocol):
    """`lanes`: rows of a panel; `together`: panels a gemm takes at a time; `half`: scales in float16; `shift_of(bits)`: `round`'s."""

    target: str
    lanes: int
    together: int
    half: bool

    def address(self, name: str) -> int:
        """Raises `KeyError` for a kernel that it has not."""

    def shift_of(self, bits: int) -> int: ...

    def run(self, steps: Any, threads: int) -> None:
        """Steps int64 [n, 4]: a kernel's address, its args' address, how many parts, how many parts a thread is worth."""


def library(target: str, path: str = "") -> Library:
    """The kernels of a target: those in the shared library at `path` where it is there, else compiled here.

    Raises `ImportError` where they cannot be loaded, what compiles them is not installed, or this CPU has not the target's instructions.
    """
    if target not in host_targets():
        raise ImportError(f"kernels for {target}; this CPU runs {', '.join(host_targets())}")
    if path and os.path.exists(path):
        from .neon.load import Neon

        return Neon(Path(path), target)
    from .numba.library import Compiled

    return Compiled(target)
