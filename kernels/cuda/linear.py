"""A linear layer on a GPU: weights packed from a `Code`, the kernel that its form and the number of tokens ask for, and its launches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesdk.errors import InputError, select_by_name

from .compile import Kernel
from .machine import Launch, Machine, Memory, Scratch, launch
from .tiles import PARTS, STEP, TILE, WIDTH, Tiles

if TYPE_CHECKING:
    from edgesdk.packed import Code

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
WARPS = 8
FEW = 16
"""Tokens that the product kernel takes; more go to the prefill kernel."""


@lru_cache(maxsize=512)
def product_kernel(bits: int, table: bool, group: int, zeros: bool, eights: int, tiles: int, half_out: bool) -> Kernel:
    """y = x · Wᵀ for up to 8 · `eights` tokens, 16 · `tiles` rows a block."""
    flush = min(group, STEP[bits])
    flags = f"{bits}, {str(table).lower()}, {flush}, {str(zeros).lower()}, {eights}, {tiles}, {'u16' if half_out else 'float'}"
    name = f"product_{bits}{'t' if table else 'z' if zeros else ''}_{flush}_{8 * eights}x{TILE * tiles}_{'half' if half_out else 'float'}"
    return Kernel(name, "product.cuh", f"product<{flags}>", "Product", 32 * WARPS)


@lru_cache(maxsize=512)
def prefill_kernel(bits: int, table: bool, group: int, zeros: bool, eights: int, half_out: bool) -> Kernel:
    """y = x · Wᵀ for 16 · `eights` tokens and 128 rows a block."""
    flush = min(group, STEP[bits])
    flags = f"{bits}, {str(table).lower()}, {flush}, {str(zeros).lower()}, {eights}, {'u16' if half_out else 'float'}"
    name = f"prefill_{bits}{'t' if table else 'z' if zeros else ''}_{flush}_{16 * eights}_{'half' if half_out else 'float'}"
    return Kernel(name, "prefill.cuh", f"prefill<{flags}>", "Product", 32 * WARPS)


def prefill_shared(bits: int, table: bool, eights: int) -> int:
    """Bytes of shared memory: two slices of codes and of x (`Slice`), and tables."""
    columns = max(WIDTH, STEP[bits])
    codes = 8 * columns // STEP[bits] * (768 if bits == 3 else 512)
    return 2 * (codes + 16 * eights * columns * 2) + (128 * 32 if table else 0)


class Linear:
    """y [M, rows] = activation(x [M, cols] · Wᵀ + bias) · factor + residual. Raises `panels.UnfitWeights`.

    `code`: weights, packed here, or tiles that were. `place` puts an array into the machine's memory, or says where it is there.
    """

    def __init__(
        self, machine: Machine, code: Code | Tiles, bias: Any = None, activation: str = "none", place: Callable[[Any], Memory] | None = None
    ) -> None:
        self.machine = machine
        self.weights = code if isinstance(code, Tiles) else _tiles(code)
        self.activation = select_by_name("activation", activation, ACTIVATIONS)
        w, place = self.weights, place or machine.put
        given = {part: getattr(w, part) for part in PARTS}
        self.memory = {name: place(array) if array.size else None for name, array in given.items()}
        self.memory["bias"] = None if bias is None else machine.put(np.asarray(bias, np.float32))
        self.sizes = {"rows": w.rows, "cols": w.cols, "steps": w.steps, "groups": w.groups}
        self.sizes |= {"group_shift": w.group.bit_length() - 1 if w.group else 0, "row_tables": int(len(w.tables) > 1)}

    @property
    def rows(self) -> int:
        return self.weights.rows

    @property
    def value_bits(self) -> int:
        return self.weights.bits

    def scaled(self, factor: float) -> Linear:
        """The same weights times `factor`."""
        other = copy.copy(self)
        other.memory = {**self.memory, "row_scale": self.machine.put(self.weights.row_scale * np.float32(factor))}
        return other

    def tiles_of(self, tokens: int) -> tuple[int, int]:
        """Tokens / 8 and rows / 16 of a block: more rows where x is read as much as the weights are."""
        return -(-tokens // 8), 1 if tokens == 1 else 2

    def kernel(self, tokens: int, half_out: bool) -> Kernel:
        w = self.weights
        form = (w.bits, w.tables.size > 0, w.group, w.zeros.size > 0)
        if tokens > FEW:
            return prefill_kernel(*form, self.eights_of(tokens), half_out)
        return product_kernel(*form, *self.tiles_of(tokens), half_out)

    def eights_of(self, tokens: int) -> int:
        """Tokens / 16 of a block of the prefill kernel: what two slices leave of 48 KiB."""
        return 8 if tokens > 64 and self.weights.bits in (4, 8) and not self.weights.tables.size else 4

    def launch(
        self,
        x: Memory,
        out: Memory,
        residual: Memory | None = None,
        factor: Memory | None = None,
        x_scale: Memory | None = None,
        bias: Memory | None = None,
        scratch: Scratch | None = None,
    ) -> Launch:
        """x float16 [M, stride ≥ cols, a multiple of 8]; out, residual and factor [M, stride ≥ rows], all float16 or all float32; x_scale float32 [M].

        `bias` float32 [rows], in place of the layer's own; `scratch`: where sums lie that blocks share, in place of memory of its own. Raises
        `InputError` for memory of another shape or type.
        """
        tokens = x.shape[0]
        self._fit(x, out, [m for m in (residual, factor) if m is not None], x_scale)
        strides = {"x_stride": x.shape[1], "out_stride": out.shape[1]}
        given = {"x": x, "out": out, "residual": residual, "factor": factor, "x_scale": x_scale}
        values = {**self.memory, **self.sizes, **strides, **given, "tokens": tokens, "activation": self.activation}
        values["bias"] = self.memory["bias"] if bias is None else bias
        kernel = self.kernel(tokens, out.dtype == np.float16)
        return self._few(kernel, values, tokens, scratch or Scratch(self.machine)) if tokens <= FEW else self._many(kernel, values, tokens)

    def _fit(self, x: Memory, out: Memory, extras: list[Memory], x_scale: Memory | None) -> None:
        w, (tokens, stride) = self.weights, x.shape
        if x.dtype != np.float16 or stride < w.cols or stride % 8 or x.address % 16:
            raise InputError(
                f"x is {x.dtype} {list(x.shape)} at {x.address % 16} beyond 16 bytes",
                f"float16 [tokens, {-(-w.cols // 8) * 8}] at whole 16 bytes",
            )
        if out.dtype not in (np.float16, np.float32) or out.shape[0] != tokens or out.shape[1] < w.rows:
            raise InputError(f"out is {out.dtype} {list(out.shape)}", f"float16 or float32 [{tokens}, {w.rows}] or wider")
        for extra in extras:
            if (extra.dtype, extra.shape) != (out.dtype, out.shape):
                raise InputError(f"a residual or factor is {extra.dtype} {list(extra.shape)}", f"as out is: {out.dtype} {list(out.shape)}")
        if x_scale is not None and (x_scale.dtype != np.float32 or x_scale.shape != (tokens,)):
            raise InputError(f"x_scale is {x_scale.dtype} {list(x_scale.shape)}", f"float32 [{tokens}]")

    def _many(self, kernel: Kernel, values: dict[str, Any], tokens: int) -> Launch:
        w, eights = self.weights, self.eights_of(tokens)
        grid = (-(-w.tiles // 8), -(-tokens // (16 * eights)))
        return launch(kernel, grid, values, prefill_shared(w.bits, w.tables.size > 0, eights))

    def _few(self, kernel: Kernel, values: dict[str, Any], tokens: int, scratch: Scratch) -> Launch:
        eights, tiles = self.tiles_of(tokens)
        w = self.weights
        blocks = -(-w.tiles // tiles)
        size = TILE * tiles * 8 * eights
        splits = max(1, min(w.steps // (2 * WARPS), 4 * self.machine.units // blocks))
        if splits > 1:
            values |= {"partial": scratch.sums(splits * blocks * size), "arrived": scratch.counters(blocks)}
        shared = 4 * WARPS * size + (TILE * tiles * 32 if w.tables.size else 0)
        return launch(kernel, (blocks, splits), values, shared)


def _tiles(code: Code) -> Tiles:
    from .weights import pack  # which a device does not have

    return pack(code)
