"""Codes that can be trained: a `Code` as a differentiable function, and back to a `Code` that decodes to just what was trained.

Grids: a float weight w stands behind every integer, q = clamp(round(w / s + z)); the gradient passes the rounding unchanged, and the step size s
gets the gradient of Learned Step Size Quantization (arXiv:1902.08153): q - z outside the grid, q - z - w / s inside. Step sizes move in their
logarithm and are rounded as they are stored (float16, or the 8 significant bits that some runtimes keep) within every step.
Tables (learned values): the same, each w going to the nearest value of its table. Codebooks: the entries move, the indices stay.
Low-rank factors, sums, row and column scales, rotations, orders and masks: through to their parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edgesdk.compress.rtn import stored_scale
from edgesdk.packed import Code, decode, places, rotate, spread


@dataclass
class Learned:
    """`weight(mix)` is what it decodes to now, float32 [rows, cols], differentiable; with mix < 1 that share of the way from the float weights
    behind it. `code()` is the code of it. `parameters` are (tensor, typical size): a step is a share of that size."""

    weight: Callable[[float], torch.Tensor]
    code: Callable[[], Code]
    parameters: list[tuple[torch.Tensor, float]] = field(default_factory=list)


def learn(code: Code, original: torch.Tensor | None = None, *, scale: str = "learned") -> Learned:
    """A trainable form of `code`, starting from just what it decodes to; `original` [rows, cols]: the weights before rounding, if known,
    to which the weights behind the grid are moved as near as they round to the same integers. `scale` "kept": step sizes stay."""
    if code.kind == "grid":
        return _grid(code, original, scale)
    if code.kind == "table":
        return _table(code, original, scale)
    if code.kind == "dense":
        return _dense(code)
    if code.kind == "vector":
        return _vector(code)
    return _tree(code, original, scale)


def frozen(code: Code) -> Learned:
    """A code that stays as it is."""
    value = torch.from_numpy(decode(code))
    return Learned(lambda mix: value, lambda: code)


def through(exact: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
    """The value of `exact` with the gradient of `smooth`."""
    return smooth + (exact - smooth).detach()


def _variable(start: torch.Tensor, size: float | None = None) -> tuple[torch.Tensor, float]:
    value = start.detach().float().clone().requires_grad_(True)
    return value, float(value.detach().square().mean().sqrt().clamp_min(1e-8)) if size is None else size


def _half(x: torch.Tensor) -> torch.Tensor:
    """As float16 holds it; never 0 where it was not."""
    s = torch.sign(x) * x.abs().clamp(6e-8, 65504)
    return s.to(torch.float16).float()


class _Scale:
    """Step sizes [rows, groups], [1, 1] or none (all 1), spread over the columns."""

    def __init__(self, stored: Any, cols: int, group: int, kept: bool) -> None:
        self.start = torch.from_numpy(np.asarray(stored, np.float32))
        self.cols, self.group = cols, group
        self.round = stored_scale if bool((stored_scale(self.start) == self.start).all()) else _half
        self.kept = kept or not self.start.numel()
        self.log, self.size = _variable(torch.zeros_like(self.start), 1.0)

    @property
    def parameters(self) -> list[tuple[torch.Tensor, float]]:
        return [] if self.kept else [(self.log, self.size)]

    def now(self) -> torch.Tensor:
        """As stored."""
        if self.kept:
            return self.start
        smooth = self.start * torch.exp(self.log)
        return through(torch.sign(self.start) * self.round(smooth.detach().abs()), smooth)

    def spread(self) -> torch.Tensor:
        s = self.now()
        if not s.numel():
            return torch.ones(1, 1)
        return s if s.shape[1] == 1 else s.repeat_interleave(self.group, 1)[:, : self.cols]

    def stored(self, dtype: Any) -> Any:
        return self.now().detach().numpy().astype(dtype)


def _levels(q: Any, zero: Any, bits: int) -> tuple[float, float]:
    """The least and the greatest integer that a grid uses: training adds no level (entropy-coded sizes and runtimes' formats depend on them)."""
    if not q.size:
        return 0.0, 0.0
    if not zero.size:
        return min(1.0, float(q.min())), 2.0**bits - 1
    return min(0.0, float(q.min())), max(float(q.max()), 2.0 if bits == 2 else 1.0)


def _grid(code: Code, original: torch.Tensor | None, how: str) -> Learned:
    (bits, group), (q, stored, zero) = code.numbers, code.arrays
    cols = code.shape[1]
    scale = _Scale(stored, cols, group, how == "kept")
    z = torch.from_numpy(spread(zero.astype(np.float32), cols, group)) if zero.size else torch.tensor(float(1 << (bits - 1)))
    low, high = _levels(q, zero, bits)
    before = torch.from_numpy(q.astype(np.float32))
    start = before - z
    if original is not None:
        place = original.float() / scale.spread().detach() + z
        inside = torch.minimum(torch.maximum(place, before - 0.49), before + 0.49)
        far = ((before == low) & (place < low)) | ((before == high) & (place > high))
        start = torch.where(far, torch.minimum(torch.maximum(place, before - 1), before + 1), inside) - z
    steps = scale.spread().detach()
    usual = float((start * steps).square().mean().sqrt())
    latent, size = _variable(start * steps, usual or 0.05 * (high - low) * float(steps.abs().mean()))

    def digits(s: torch.Tensor) -> torch.Tensor:
        t = torch.clamp(latent / s + z, low, high)
        return through(torch.round(t.detach()), t)

    def weight(mix: float) -> torch.Tensor:
        s = scale.spread()
        w = (digits(s) - z) * s
        return w if mix >= 1 else mix * w + (1 - mix) * latent

    def made() -> Code:
        with torch.no_grad():
            found = digits(scale.spread()).numpy().astype(q.dtype)
            return Code("grid", code.shape, code.numbers, (found, scale.stored(stored.dtype), zero))

    return Learned(weight, made, [(latent, size), *scale.parameters])


def _table(code: Code, original: torch.Tensor | None, how: str) -> Learned:
    (_, group), (q, values, stored) = code.numbers, code.arrays
    cols = code.shape[1]
    scale = _Scale(stored, cols, group, how == "kept")
    table, size = _variable(torch.from_numpy(values.astype(np.float32)))
    latent, spread_of = _variable(torch.from_numpy(decode(code)))
    used = int(q.max()) + 1 if q.size else 1

    def rounded() -> torch.Tensor:
        if values.dtype == np.uint16:
            return through(table.detach().to(torch.bfloat16).float(), table)
        return through(table.detach().to(torch.float16).float(), table) if values.dtype == np.float16 else table

    def nearest(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        place = (latent / s).detach()
        return (place[:, :, None] - t.detach()[:, None, :used]).abs().argmin(-1)

    def weight(mix: float) -> torch.Tensor:
        t, s = rounded(), scale.spread()
        index = nearest(t, s)
        w = (t[0][index] if len(t) == 1 else t.gather(1, index)) * s
        w = w + (latent - latent.detach())  # the weights behind it get the gradient, too
        return w if mix >= 1 else mix * w + (1 - mix) * latent

    def made() -> Code:
        with torch.no_grad():
            t = rounded()
            index = nearest(t, scale.spread()).numpy().astype(q.dtype)
            written = t.numpy()
            written = (written.view(np.uint32) >> 16).astype(np.uint16) if values.dtype == np.uint16 else written.astype(values.dtype)
            return Code("table", code.shape, code.numbers, (index, written, scale.stored(stored.dtype)))

    return Learned(weight, made, [(latent, spread_of), (table, size), *scale.parameters])


def _as_stored(value: torch.Tensor, dtype: Any) -> tuple[torch.Tensor, Callable[[], Any]]:
    """A float tensor with the rounding of its storage, and how to write it."""
    if dtype == np.uint16:
        exact = value.detach().to(torch.bfloat16).float()
        return through(exact, value), lambda: (exact.numpy().view(np.uint32) >> 16).astype(np.uint16)
    if dtype == np.float16:
        return through(value.detach().clamp(-65504, 65504).to(torch.float16).float(), value), lambda: value.detach().numpy().astype(dtype)
    if dtype == np.int8:
        exact = value.detach().clamp(-127, 127).round()
        return through(exact, value), lambda: exact.numpy().astype(np.int8)
    return value, lambda: value.detach().numpy().astype(dtype)


def _dense(code: Code) -> Learned:
    kind = code.arrays[0].dtype
    value, size = _variable(torch.from_numpy(decode(code)))

    def made() -> Code:
        return Code("dense", code.shape, (), (_as_stored(value, kind)[1]().reshape(code.arrays[0].shape),))

    return Learned(lambda mix: _as_stored(value, kind)[0], made, [(value, size)])


def _vector(code: Code) -> Learned:
    (_, group), (q, codebook, stored) = code.numbers, code.arrays
    cols = code.shape[1]
    scale = _Scale(stored, cols, group, False)
    book, size = _variable(torch.from_numpy(codebook.astype(np.float32)))
    index = torch.from_numpy(q.astype(np.int64))

    def weight(mix: float) -> torch.Tensor:
        w = _as_stored(book, codebook.dtype)[0][index].reshape(code.shape[0], -1)[:, :cols]
        return w * scale.spread()

    def made() -> Code:
        with torch.no_grad():
            return Code("vector", code.shape, code.numbers, (q, _as_stored(book, codebook.dtype)[1](), scale.stored(stored.dtype)))

    return Learned(weight, made, [(book, size), *scale.parameters])


def _tree(code: Code, original: torch.Tensor | None, scale: str) -> Learned:
    """A code of other codes: only what is trainable by its kind gets a gradient; masks and orders stay."""
    if code.kind not in _JOINS:
        return frozen(code)
    if code.kind == "sparse":
        left = None if original is None else original.float()[_mask(code)].reshape(code.parts[0].shape)
        return joined(code, [learn(code.parts[0], left, scale=scale)])
    if code.kind == "masked":
        return joined(code, [learn(code.parts[0], original, scale=scale)])
    return joined(code, [learn(p, scale=scale) for p in code.parts])


def joined(code: Code, parts: list[Learned]) -> Learned:
    """`code` with these parts in place of its own."""
    join = _JOINS[code.kind](code)

    def weight(mix: float) -> torch.Tensor:
        return join([p.weight(mix) for p in parts])

    def made() -> Code:
        return Code(code.kind, code.shape, code.numbers, code.arrays, (*(p.code() for p in parts), *code.parts[len(parts) :]))

    return Learned(weight, made, [x for p in parts for x in p.parameters])


Join = Callable[[list[torch.Tensor]], torch.Tensor]


def _total(c: Code) -> Join:
    return lambda p: torch.stack(p).sum(0) if len(p) > 2 else p[0] + p[1] if len(p) == 2 else p[0]


def _scaled(c: Code) -> Join:
    row, col = (torch.from_numpy(np.asarray(a, np.float32)) for a in c.arrays)

    def join(p: list[torch.Tensor]) -> torch.Tensor:
        w = p[0] * row[:, None] if row.numel() else p[0]
        return w * col[None] if col.numel() else w

    return join


def _hadamard(c: Code) -> Join:
    turn = torch.from_numpy(rotate(np.eye(c.shape[1], dtype=np.float32), c.numbers[0], c.numbers[1]))
    return lambda p: p[0] @ turn


def _pick(c: Code) -> Join:
    axis, order = c.numbers[0], torch.from_numpy(c.arrays[0].astype(np.int64))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return lambda p: p[0].index_select(axis, back)


def _mask(code: Code) -> torch.Tensor:
    return torch.from_numpy(places(code))


def _sparse(c: Code) -> Join:
    mask = _mask(c)
    return lambda p: torch.zeros(c.shape).masked_scatter(mask, p[0].reshape(-1))


_JOINS: dict[str, Callable[[Code], Join]] = {
    "lowrank": lambda c: lambda p: p[0] @ p[1],
    "sum": _total,
    "scaled": _scaled,
    "hadamard": _hadamard,
    "pick": _pick,
    "sparse": _sparse,
    "masked": lambda c: lambda p: p[0] * torch.from_numpy(c.arrays[0] != 0),
    "stack": lambda c: lambda p: torch.cat(p, c.numbers[0]),
}
