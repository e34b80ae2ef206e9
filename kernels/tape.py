"""A list of steps being written: rooms for what is computed, and one kernel after the other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .library import Library, args_of, bits_of
from .panels import BLOCK, FloatPanels, Panels, SparsePanels, aligned

THREAD_BYTES = 1 << 17
"""Bytes of weights (or of inputs, times the rows they meet) that are worth a thread of their own."""


@dataclass(frozen=True)
class Rows:
    """float32 [M, width], zero beyond `cols`; a view of `cols` columns of it begins at column `first`."""

    values: Any
    cols: int
    first: int = 0

    @property
    def rows(self) -> int:
        return len(self.values)

    @property
    def stride(self) -> int:
        return int(self.values.strides[0])

    @property
    def address(self) -> int:
        return int(self.values.ctypes.data) + 4 * self.first

    @property
    def blocks(self) -> int:
        return -(-self.cols // BLOCK)

    def part(self, first: int, cols: int) -> Rows:
        """Columns first … first + cols - 1, a whole number of blocks if they are to be rounded."""
        return Rows(self.values, cols, self.first + first)

    @property
    def array(self) -> Any:
        return self.values[:, self.first : self.first + self.cols]


@dataclass(frozen=True)
class Rounded:
    """What `round` gives and a product takes."""

    q: Any
    q_sums: Any
    q_scale: Any
    q_zero: Any
    blocks: int
    rows: int
    shift: int


class Tape:
    """Steps over `library`'s kernels. Everything they point to lives as long as the tape."""

    def __init__(self, library: Library, threads: int = 1) -> None:
        self.library, self.threads = library, threads
        self._rows: list[tuple[int, int, int, int]] = []
        self._kept: list[Any] = []
        self._shared: dict[Any, Any] = {}
        self._own: list[Any] = []
        self._steps: Any = None
        self.place = ""  # what part of a model is being written
        self.names: list[tuple[str, str]] = []  # (place, kernel) of each step

    def room(self, rows: int, cols: int, key: str = "") -> Rows:
        """Zeros; rows are padded to whole blocks, and to what a product writes. What one step leaves in a room with a `key` may be
        overwritten by the next that asks for it."""
        if key and (key, rows, cols) in self._shared:
            found: Rows = self._shared[key, rows, cols]
            return found
        unit = max(BLOCK, self.library.lanes * self.library.together)
        width = -(-cols // unit) * unit
        values = aligned(np.zeros(rows * width, np.float32)).view(np.float32).reshape(rows, width)
        self._own.append(values)
        made = Rows(values, cols)
        if key:
            self._shared[key, rows, cols] = made
        return made

    def add(self, name: str, parts: int, least: int = 1, **values: Any) -> Any:
        """A step of kernel `name`; args left out are 0. Returns the args, which may be changed before a run."""
        names = args_of(name)
        unknown = set(values) - set(names)
        if unknown:
            raise KeyError(f"{name} has no {', '.join(sorted(unknown))}")
        self._kept += [v for v in values.values() if isinstance(v, np.ndarray)]
        given = {
            n: v.ctypes.data * bool(v.size) if isinstance(v, np.ndarray) else v.address if isinstance(v, Rows) else int(v)
            for n, v in values.items()
        }
        args = np.array([given.get(n, 0) for n in names], np.int64)
        self._kept.append(args)
        self._rows.append((self.library.address(name), args.ctypes.data, parts, max(1, least)))
        self.names.append((self.place, name))
        self._steps = None
        return args

    def round(
        self,
        x: Rows,
        shift: int,
        *,
        before: str = "",
        other: Rows | None = None,
        norm: tuple[Any, Any, float] | None = None,
        out: Rows | None = None,
        key: str = "",
    ) -> Rounded:
        """x rounded, behind a norm ("rms" or "layer", `norm` its weight, bias or None, and eps) or an activation (times `other`) that goes to `out`."""
        m, blocks = x.rows, x.blocks
        made = self._rounded(blocks, m, shift, key)
        more: dict[str, Any] = {"out": out if out is not None else x, "cols": x.cols}
        more |= {"other": other} if other is not None else {}
        more |= _norm_args(norm)
        name = "_".join(filter(None, [before, "gated" if other is not None else "", "round"]))
        self.add(
            name, m, max(1, THREAD_BYTES // (8 * x.cols)), x=x, blocks=blocks, stride=x.stride, m=m, shift=shift,
            q=made.q, q_sums=made.q_sums, q_scale=made.q_scale, q_zero=made.q_zero, **more,
        )  # fmt: skip
        return made

    def _rounded(self, blocks: int, m: int, shift: int, key: str) -> Rounded:
        """Room for rounded inputs; the next rounding of this size, shift and key overwrites it."""
        if (key, blocks, m, shift) not in self._shared:
            self._shared[key, blocks, m, shift] = Rounded(
                np.zeros((blocks, m, BLOCK), np.uint8), np.zeros((blocks, m), np.int32), np.zeros(m, np.float32), np.zeros(m, np.float32), blocks, m, shift
            )  # fmt: skip
        found: Rounded = self._shared[key, blocks, m, shift]
        return found

    def norm(self, x: Rows, kind: str, norm: tuple[Any, Any, float], out: Rows) -> None:
        """A norm of x alone, to `out`."""
        least = max(1, THREAD_BYTES // (8 * x.cols))
        self.add(kind, x.rows, least, x=x, blocks=x.blocks, stride=x.stride, m=x.rows, cols=x.cols, out=out, **_norm_args(norm))

    def _divided(self, p: Panels | FloatPanels, rows: int) -> tuple[str, int, int]:
        """The kernel of a product, its parts, and how many of them a thread is worth."""
        each, together = p.nbytes // p.panels, self.library.together
        if rows == 1:
            return "gemv", p.panels, THREAD_BYTES // each
        return "gemm", p.panels // together, THREAD_BYTES // (each * together * min(rows, 16))

    def linear(self, weights: Panels, x: Rounded, out: Rows, *, bias: Any = None, residual: Rows | None = None) -> Any:
        """out = x · Wᵀ (+ bias [padded rows]) (+ residual, which may be `out`)."""
        p = weights
        kernel, parts, least = self._divided(p, x.rows)
        kept = {"starts": p.starts, "kept": p.kept} if isinstance(p, SparsePanels) and p.starts.size else {}
        more = kept | {n: v for n, v in (("bias", bias), ("residual", residual)) if v is not None}
        return self.add(
            f"{kernel}_{p.form}", parts, least,
            codes=p.codes, scales=p.scales, zeros=p.zeros, row_scale=p.row_scale, sums=p.sums, tables=p.tables,
            q=x.q, q_sums=x.q_sums, q_scale=x.q_scale, q_zero=x.q_zero, m=x.rows, blocks=x.blocks, out=out, stride=out.stride, **panel_sizes(p), **more,
        )  # fmt: skip

    def floats(self, weights: FloatPanels, x: Rows, out: Rows, *, bias: Any = None, residual: Rows | None = None) -> Any:
        """The same with weights and inputs that are floats."""
        p = weights
        kernel, parts, least = self._divided(p, x.rows)
        more = {n: v for n, v in (("bias", bias), ("residual", residual)) if v is not None}
        return self.add(
            f"{kernel}_{p.form}", parts, least, codes=p.codes, row_scale=p.row_scale, x=x, x_stride=x.stride, m=x.rows, cols=p.cols,
            panel_bytes=p.codes.nbytes // p.panels, out=out, stride=out.stride, **more,
        )  # fmt: skip

    def turn(self, x: Rows) -> Rows:
        """x as columns, whole blocks of them."""
        out = self.room(x.blocks * BLOCK, x.rows, "turned")
        self.add("turn", x.blocks, x=x, stride=x.stride, m=x.rows, out=out, out_stride=out.stride)
        return out

    @property
    def nbytes(self) -> int:
        """Of everything that was made for these steps."""
        rounded = [r for r in self._shared.values() if isinstance(r, Rounded)]
        rooms = {id(v): v for r in rounded for v in (r.q, r.q_sums, r.q_scale, r.q_zero)}
        return sum(int(v.nbytes) for v in (rooms | {id(v): v for v in self._own}).values())

    def run(self) -> None:
        if self._steps is None:
            self._steps = np.array(self._rows, np.int64).reshape(-1, 4)
        self.library.run(self._steps, self.threads)

    def timed(self) -> list[float]:
        """Run once, step by step: seconds of each, one call of the library included."""
        self._steps = np.array(self._rows, np.int64).reshape(-1, 4)
        found = []
        for i in range(len(self._steps)):
            start = time.perf_counter_ns()
            self.library.run(self._steps[i : i + 1], self.threads)
            found.append((time.perf_counter_ns() - start) / 1e9)
        return found


def singles(tape: Any, x: Rows, turned: Rows | None, weights: tuple[Any, Any, Any], out: Rows) -> None:
    """out += x · Wᵀ with single weights: where each row's begin, their columns, their values. `turned`: x as columns, for many rows."""
    starts, columns, values = weights
    least = max(1, 16384 * out.cols // (max(1, len(values)) * out.rows))
    given = {"m": out.rows, "columns": columns, "values": values, "out": out, "out_stride": out.stride}
    if turned is None:
        tape.add("sparse", out.cols, least, x=x, stride=x.stride, starts=starts, **given)
        return
    lanes = tape.library.lanes
    parts = -(-out.cols // lanes)
    starts = np.pad(starts, (0, parts * lanes - out.cols), mode="edge")
    tape.add("sparse_turned", parts, max(1, least // lanes), x=turned, stride=turned.stride, starts=starts, **given)


def panel_sizes(p: Panels) -> dict[str, int]:
    """Bytes of a panel in each array of the weights."""
    return {
        "panel_bytes": p.codes.nbytes // p.panels,
        "scale_bytes": p.scales.nbytes // p.panels,
        "zero_bytes": p.zeros.nbytes // p.panels,
        "table_bytes": p.tables.nbytes // p.panels if len(p.tables) == p.panels else 0,
    }


def _norm_args(norm: tuple[Any, Any, float] | None) -> dict[str, Any]:
    if norm is None:
        return {}
    weight, bias, eps = norm
    return {"weight": weight, "eps": bits_of(eps), **({} if bias is None else {"bias": bias})}
