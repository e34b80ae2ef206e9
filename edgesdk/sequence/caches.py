"""Keys and values of self-attention in numpy: written in place, slot by slot, as a ring where a layer has a window; and the masks over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .card import Card, SequenceError, groups, layout_of

HIDDEN = np.float32(-1e4)
Zeros = Callable[[Any, Any], Any]
"""Makes an array of a shape and a dtype, all zero."""
HALF_MOST = np.float32(65504)
"""The largest float16."""


def codes(array: Any) -> tuple[Any, Any]:
    """int8 codes of keys or values [..., K, N, D] and the scale [..., K, N] of each token and head: what is largest is 127."""
    scale = np.abs(array).max(-1) * np.float32(1 / 127)
    return np.rint(array / np.where(scale, scale, 1)[..., None]).astype(np.int8), scale


def small_codes(array: Any) -> tuple[Any, Any]:
    """uint8 codes of keys or values [..., K, N, D], two a byte [..., D / 2]: column i in the low half, column i + D / 2 in the high one; and
    float16 [..., 2 · groups], a scale and the least value of each group of columns: a number is scale · code + least."""
    size = array.shape[-1]
    parts = np.minimum(np.maximum(array, -HALF_MOST), HALF_MOST).reshape(*array.shape[:-1], groups(size), -1)
    least, most = parts.min(-1), parts.max(-1)
    beside = np.stack([(most - least) * np.float32(1 / 15), least], -1).astype(np.float16)
    scale, least = (np.asarray(beside[..., i, None], np.float32) for i in (0, 1))
    steps = np.rint((parts - least) / np.where(scale, scale, 1))
    found = np.minimum(np.maximum(steps, 0), 15).astype(np.uint8).reshape(array.shape)
    return found[..., : size // 2] | found[..., size // 2 :] << 4, beside.reshape(*array.shape[:-1], -1)


def held(pairs: Sequence[Any], bits: int) -> list[Any]:
    """Keys and values, pair by pair, as programs with caches of `bits` take them: with 8 and 4 both codes, then what stands beside each."""
    if bits == 32:
        return list(pairs)
    every = np.stack([np.asarray(p, np.float32) for p in pairs])  # all are of one shape
    if bits == 16:
        return list(np.minimum(np.maximum(every, -HALF_MOST), HALF_MOST).astype(np.float16))
    values, scales = (codes if bits == 8 else small_codes)(every)
    return [a for i in range(0, len(pairs), 2) for a in (values[i], values[i + 1], scales[i], scales[i + 1])]


def empty(bits: int, *shape: int, zeros: Zeros = np.zeros) -> list[Any]:
    """A pair of keys and values `shape` [rows, K, slots, D] as `held` gives it, all zero, made by `zeros`."""
    return [zeros((*shape[:-1], *([width] if width else [])), kind) for kind, width in layout_of(bits, shape[-1]) for _ in "kv"]


class Caches:
    """`arrays`: keys and values in the order of the inputs, [rows, K, slots, …] as `held` gives them for the card's bits; `each`: so many a cache.
    `lengths` [rows]: tokens kept of each row.

    A token's slot is its position; in a layer with a window W it is the position modulo W.
    """

    def __init__(self, card: Card, rows: int, slots: int, zeros: Zeros = np.zeros) -> None:
        """`zeros`: makes the arrays, in memory that programs read where it is."""
        self.slots, self.rows, self._zeros = slots, rows, zeros
        self.windows = [int(c.get("window", 0)) for c in card.caches]
        if len({w for w in self.windows if w}) > 1:
            raise SequenceError(f"layers with windows of {sorted(set(self.windows) - {0})} tokens", "one window a model is supported")
        self.window = max(self.windows, default=0)
        self.lengths = np.zeros(rows, np.int64)
        self.bits = card.cache_bits
        self.arrays: list[Any] = []
        for c, window in zip(card.caches, self.windows):  # noqa: B905 (Python 3.9)
            self.arrays += empty(self.bits, rows, int(c["heads"]), window or slots, int(c["head"]), zeros=zeros)
        self.each = len(self.arrays) // max(1, len(self.windows))

    @property
    def bounded(self) -> bool:
        """Whether the slots run out: not so where every layer has a window."""
        return not all(self.windows)

    @property
    def nbytes(self) -> int:
        return int(sum(a.nbytes for a in self.arrays))

    def window_of(self, array: int) -> int:
        """The window of the layer that an array belongs to, 0 where it sees all."""
        return self.windows[array // self.each]

    def grow(self, slots: int) -> None:
        """Move to caches of more slots."""
        for i, old in enumerate(self.arrays):
            if not self.window_of(i):
                new = self._zeros((*old.shape[:2], slots, *old.shape[3:]), old.dtype)
                new[:, :, : self.slots] = old
                self.arrays[i] = new
        self.slots = slots

    def write(self, new: Sequence[Any], counts: Any) -> None:
        """Keep the first `counts[b]` tokens of each row of `new`, keys and values [rows, K, N, D] in the order of the caches (or of the first ones)."""
        rows, new = np.flatnonzero(counts), held(new, self.bits)
        if len(rows) and int(np.max(counts)) == 1:
            at = self.lengths[rows]
            for i, array in enumerate(self.arrays[: len(new)]):
                window = self.window_of(i)
                if len(rows) == 1:
                    array[rows[0], :, at[0] % window if window else at[0]] = new[i][rows[0], :, 0]
                else:
                    array[rows, :, at % window if window else at] = new[i][rows, :, 0]
        else:
            for b in rows:
                self._write_row(new, int(b), int(counts[b]))
        self.lengths += counts

    def _write_row(self, new: Sequence[Any], b: int, count: int) -> None:
        first = int(self.lengths[b])
        for i, array in enumerate(self.arrays):
            window = self.window_of(i)
            if window:
                kept = np.arange(max(0, count - window), count)
                array[b][:, (first + kept) % window] = new[i][b][:, kept]
            else:
                array[b, :, first : first + count] = new[i][b, :, :count]

    def reorder(self, order: Any) -> None:
        """Row b becomes what row `order[b]` was: a beam goes on from another one."""
        filled = int(self.lengths.max())
        for array in self.arrays:
            part = array[:, :, : min(filled, array.shape[2])]
            part[...] = part[order]
        self.lengths = self.lengths[order]

    def take(self, order: Any) -> None:
        """The rows `order`, which may be more than there were."""
        for i, old in enumerate(self.arrays):
            self.arrays[i] = self._zeros((len(order), *old.shape[1:]), old.dtype)
            self.arrays[i][...] = old[order]
        self.lengths, self.rows = self.lengths[order], len(order)

    def mask(self, tokens: int) -> Any:
        """float32 [rows, tokens, slots + tokens]: what the next `tokens` may see."""
        mask = np.empty((self.rows, tokens, self.slots + tokens), np.float32)
        mask[:, :, : self.slots] = np.where(np.arange(self.slots) < self.lengths[:, None], np.float32(0), HIDDEN)[:, None]
        mask[:, :, self.slots :] = np.triu(np.full((tokens, tokens), HIDDEN), 1)
        return mask

    def window_mask(self, tokens: int) -> Any:
        """The same for layers with a window: float32 [rows, tokens, W + tokens]."""
        window, last = self.window, self.lengths[:, None] - 1
        held = last - (last - np.arange(window)) % window  # the position in each slot; negative: none yet
        query = self.lengths[:, None] + np.arange(tokens)
        seen = (held >= 0)[:, None] & (query[:, :, None] - held[:, None] < window)
        ahead = np.arange(tokens)[:, None] - np.arange(tokens)
        own = np.broadcast_to((ahead >= 0) & (ahead < window), (self.rows, tokens, tokens))
        return np.where(np.concatenate([seen, own], 2), np.float32(0), HIDDEN)
