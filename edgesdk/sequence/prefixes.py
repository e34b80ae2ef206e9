"""What prompts had in common need not be read again: keys and values of earlier prompts, kept within a number of bytes.

A prompt that begins as one that is kept goes on from there; behind an encoder the same source is not encoded twice. Kept in few bits
(`gear`) they take a fraction of the room, and the answer may differ from the one without: 32 bits, the default, keep it as it is.
Standard library and numpy; Python 3.9 and later.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .caches import Caches
from .card import SequenceError
from .gear import pack

BITS = (4, 8, 32)


@dataclass(frozen=True)
class _Kept:
    arrays: tuple[Any, ...]  # numpy arrays, or `gear.Packed`; of one row
    nbytes: int

    def expanded(self) -> list[Any]:
        return [a if isinstance(a, np.ndarray) else a.expand() for a in self.arrays]


class Prefixes:
    """The least lately used goes where `limit_bytes` would be exceeded. `hits` counts prompts that went on from a kept one, `saved` their tokens."""

    def __init__(self, limit_bytes: int, bits: int = 32) -> None:
        if bits not in BITS:
            raise SequenceError(f"prefixes in {bits} bits", f"known: {', '.join(map(str, BITS))}")
        self.limit_bytes, self.bits, self.nbytes, self.hits, self.saved = limit_bytes, bits, 0, 0, 0
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], _Kept] = OrderedDict()

    def source(self, tokens: Sequence[int]) -> list[Any] | None:
        """What the encoder gave for these tokens, or None."""
        key = ("source", tuple(tokens))
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        self.hits, self.saved = self.hits + 1, self.saved + len(tokens)
        return self._kept[key].expanded()

    def keep_source(self, tokens: Sequence[int], outputs: Sequence[Any]) -> None:
        self._keep(("source", tuple(tokens)), outputs, [a.shape[2] if a.ndim == 4 else 0 for a in outputs])

    def fill(self, tokens: Sequence[int], caches: Caches, least: int) -> int:
        """Write the longest kept beginning of `tokens` into the empty `caches`' first row; how many tokens that is. Less than `least` is left.

        The last token is never taken: running it gives the logits. A ring holds only the end of its text, so with windows a kept
        prompt serves whole or not at all.
        """
        wanted, best, shared = tuple(tokens), None, 0
        for kind, known in self._kept:
            if kind != "prompt" or (caches.window and wanted[: len(known)] != known):
                continue
            same = min(_same(known, wanted), len(wanted) - 1)
            if same > shared and not (caches.window and same < len(known)):
                best, shared = known, same
        if best is None or shared < least:
            return 0
        self._kept.move_to_end(("prompt", best))
        for i, (array, kept) in enumerate(zip(caches.arrays, self._kept["prompt", best].expanded())):  # noqa: B905 (Python 3.9)
            slots = min(kept.shape[2], array.shape[2]) if caches.window_of(i) else shared
            array[:1, :, :slots] = kept[:, :, :slots]
        caches.lengths[0] = shared
        self.hits, self.saved = self.hits + 1, self.saved + shared
        return shared

    def keep(self, tokens: Sequence[int], caches: Caches) -> None:
        """Keep the first row of `caches`, which holds `tokens`."""
        slots = [min(caches.window_of(i) or len(tokens), len(tokens)) for i in range(len(caches.arrays))]
        self._keep(("prompt", tuple(tokens)), [a[:1] for a in caches.arrays], slots)

    def _keep(self, key: tuple[str, tuple[int, ...]], arrays: Sequence[Any], slots: Sequence[int]) -> None:
        if key in self._kept:
            return
        held: list[Any] = []
        for i, (a, n) in enumerate(zip(arrays, slots)):  # noqa: B905
            if a.ndim == 4 and a.dtype == np.float32 and self.bits < 32:
                held.append(pack(a[:, :, :n], bits=self.bits, by_channel=i % 2 == 0))  # keys by channel, values by token
            else:
                held.append(np.array(a[:, :, :n] if n or a.ndim == 4 else a))
        size = sum(int(a.nbytes) for a in held)
        if size > self.limit_bytes:
            return
        self._kept[key], self.nbytes = _Kept(tuple(held), size), self.nbytes + size
        while self.nbytes > self.limit_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b):  # noqa: B905
        if x != y:
            break
        n += 1
    return n
