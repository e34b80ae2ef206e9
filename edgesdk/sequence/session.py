"""A generation that is under way: inputs read, caches filled, ready for the next tokens.

`feed` runs tokens without keeping them and `keep` writes as many of them as are wanted: what drafts and searches need, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .caches import HIDDEN, Caches, held
from .card import SequenceError
from .prefixes import Prefixes
from .programs import Programs, largest, nearest, smallest

CHUNK = 16
"""So many tokens of a prefill are taken to cost what one call of decode costs: both read all weights."""
Input = Any
"""Token ids, or the float32 [F, frames] of sound."""


def encode(programs: Programs, inputs: Sequence[Input], prefixes: Prefixes | None = None) -> tuple[list[Any], Any, int]:
    """The encoder's outputs for `inputs`, [rows, …] each, the mask over the source [rows, S], and S."""
    methods = programs.need("encode", len(inputs))
    sound = bool(np.ndim(inputs[0]) == 2)
    lengths = [-(-np.shape(x)[1] // 2) if sound else len(x) for x in inputs]
    name = smallest(methods, "source", max(lengths))
    if name is None:
        longest, unit = largest(methods, "source"), "frames of sound" if sound else "tokens"
        given, takes = (max(np.shape(x)[1] for x in inputs), 2 * longest) if sound else (max(lengths), longest)
        raise SequenceError(
            f"the prompt has {given} {unit}", f"the model takes {takes} at most: give fewer, or build it with a longer --input-length"
        )
    size, rows = int(methods[name]["source"]), len(inputs)
    if sound:
        source = np.zeros((rows, np.shape(inputs[0])[0], 2 * size), np.float32)
    else:
        source = np.full((rows, size), programs.card.pad, np.int64)
    for b, x in enumerate(inputs):
        source[b, ..., : np.shape(x)[-1]] = x
    mask = np.where(np.arange(size) < np.asarray(lengths)[:, None], np.float32(0), HIDDEN)
    alone = prefixes if rows == 1 and not sound else None
    if alone and (known := alone.source(inputs[0])):
        return known, mask, size
    outputs = programs.call_rows(name, [source, mask])
    if alone:
        alone.keep_source(inputs[0], outputs)
    return outputs, mask, size


def without(logits: Any, tokens: Sequence[int]) -> Any:
    """`logits` [..., V] by which none of `tokens` is chosen."""
    if tokens:
        logits = np.array(logits)
        logits[..., list(tokens)] = -np.inf
    return logits


class Session:
    """`logits` [rows, V] are those of each row's next token, once it is begun. Raises `SequenceError` for what cannot be generated from."""

    def __init__(self, programs: Programs, inputs: Sequence[Input], copies: int = 1, prefixes: Prefixes | None = None) -> None:
        """`copies`: rows for each input, side by side (beams); the input is read once. `prefixes` serve where there is one input."""
        self.programs, card = programs, programs.card
        self._prefixes = prefixes if len(inputs) == 1 else None
        self.rows, self.prompts = len(inputs) * copies, len(inputs)
        self.decodes = programs.need("decode", self.rows)
        self.batch = int(next(iter(self.decodes.values()))["batch"])
        self.source, self._cross, begin = 0, [], [[*x, *card.start] for x in inputs] if not programs.role("encode") else []
        if programs.role("encode"):
            outputs, mask, self.source = encode(programs, inputs, self._prefixes)
            self._cross, begin = [mask, *map(programs.placed, held(outputs, card.cache_bits))], [list(card.start) for _ in inputs]
        self.decodes = {n: m for n, m in self.decodes.items() if m["source"] == self.source}
        if not self.decodes:
            raise SequenceError(f"no program decodes behind a source of {self.source} tokens", "build the bundle again")
        self._pending: list[Any] = []
        self._grouped: list[list[Any]] = []
        self._open(len(begin), max(len(b) for b in begin))
        self._place(np.arange(len(begin)))
        self.logits = self._begin(begin)
        if copies > 1:
            order = np.repeat(np.arange(len(begin)), copies)
            self.logits = self.logits[order]
            self._place(order)

    def _open(self, rows: int, longest: int) -> None:
        """Caches of the smallest size that holds the prompt."""
        name = smallest(self.decodes, "cache", longest)
        slots = largest(self.decodes, "cache") if name is None else int(self.decodes[name]["cache"])
        self.caches = Caches(self.programs.card, rows, slots, self.programs.zeros)
        if name is None and self.caches.bounded:
            raise SequenceError(
                f"the prompt has {longest} tokens",
                f"the model's largest cache holds {slots}: give fewer, or build it with a longer --input-length",
            )

    def _place(self, order: Any) -> None:
        """Rows for the prompts `order`, filled up to whole batches; each batch's cross-attention inputs are laid out once."""
        rows, batch = len(order), self.batch
        padded = order[np.minimum(np.arange(-(-rows // batch) * batch), rows - 1)]
        if len(padded) != self.caches.rows or not np.array_equal(padded, np.arange(len(padded))):
            self.caches.take(padded)
        self.caches.lengths[rows:] = 0
        self._grouped = []
        for first in range(0, len(padded), batch):
            at = padded[first : first + batch]
            whole = np.array_equal(at, np.arange(at[0], at[0] + batch))
            self._grouped.append([a[at[0] : at[0] + batch] if whole else self.programs.placed(a[at]) for a in self._cross])

    def _begin(self, begin: list[list[int]]) -> Any:
        """Run each row's first tokens: `prefill` as far as it goes, `decode` for the rest. Logits [rows, V] behind each row's last."""
        lengths = np.asarray([len(b) for b in begin])
        if not lengths.all():
            raise SequenceError("the prompt is empty", "give some text")
        done, logits = np.zeros(len(begin), np.int64), None
        if self._prefixes and not self.source:
            done[0] = self._prefixes.fill(begin[0], self.caches, self._worth(len(begin[0])))
        prefills = {n: m for n, m in self.programs.role("prefill", len(begin)).items() if m["source"] == self.source}
        if prefills and not done.any():
            name = nearest(prefills, "tokens", int(lengths.max()))
            if lengths.max() > 1 or prefills[name]["tokens"] == 1:
                done = np.minimum(lengths, prefills[name]["tokens"])
                logits = self._prefill(name, begin, done)
        while (left := lengths - done).any():
            size = int(self.decodes[nearest(self._sized(), "tokens", int(left.max()))]["tokens"])
            counts = np.minimum(left, size)
            tokens = np.full((len(begin), size), self.programs.card.pad, np.int64)
            for b, count in enumerate(counts):
                tokens[b, :count] = begin[b][done[b] : done[b] + count]
            out = self.feed(tokens, counts)
            self.keep(counts)
            done = done + counts
            behind = out[np.arange(len(begin)), np.maximum(counts, 1) - 1]
            logits = behind if logits is None else np.where((counts > 0)[:, None], behind, logits)
        if self._prefixes and not self.source:
            self._prefixes.keep(begin[0], self.caches)
        return without(logits, self.programs.card.suppress_first)

    def _worth(self, length: int) -> int:
        """How many tokens of a prompt a kept beginning must have to be worth it: the rest goes through `decode`."""
        calls = 1 + length // CHUNK
        return max(1, length - calls * largest(self._sized(), "tokens"))

    def _prefill(self, name: str, begin: list[list[int]], counts: Any) -> Any:
        size, rows = int(self.programs.card.methods[name]["tokens"]), len(begin)
        tokens = np.full((rows, size), self.programs.card.pad, np.int64)
        for b, count in enumerate(counts):
            tokens[b, :count] = begin[b][:count]
        positions = np.minimum(np.arange(size), counts[:, None] - 1)
        mask = np.where(np.arange(size) < counts[:, None], np.float32(0), HIDDEN)
        out = self.programs.call_rows(name, [tokens, positions, counts - 1, mask, *self._cross])
        out[0] = without(out[0], self.programs.card.suppress)
        fill = np.zeros(self.caches.rows, np.int64)
        fill[:rows] = counts
        self.caches.write(out[1:], fill)
        return out[0]

    def _sized(self) -> dict[str, dict[str, Any]]:
        """The decodes over caches of the present size."""
        found = {n: m for n, m in self.decodes.items() if m["cache"] == self.caches.slots}
        return found or self.decodes

    @property
    def room(self) -> Any:
        """How many more tokens each row can keep [rows]."""
        size = largest(self.decodes, "cache") if self.caches.bounded else 1 << 40
        return size - self.caches.lengths[: self.rows]

    def feed(self, tokens: Any, counts: Any | None = None) -> Any:
        """Logits [rows, N, V] behind each of `tokens` [rows, N]; of row b the first `counts[b]` count (default: all), 0: it rests."""
        given, width = np.shape(tokens)
        rows = self.caches.rows
        name = smallest(self._sized(), "tokens", width)
        if name is None:
            raise SequenceError(f"no program decodes {width} tokens at once", f"at most {largest(self._sized(), 'tokens')}")
        size = int(self.decodes[name]["tokens"])
        used = np.zeros(rows, np.int64)
        used[:given] = width if counts is None else counts
        fed = np.full((rows, size), self.programs.card.pad, np.int64)
        fed[:given, :width] = tokens
        positions = self.caches.lengths[:, None] + np.minimum(np.arange(size), np.maximum(used - 1, 0)[:, None])
        shared = [fed, positions, self.caches.mask(size)]
        if self.caches.window:
            shared.append(self.caches.window_mask(size))
        parts: list[Any] = []
        for group, first in enumerate(range(0, rows, self.batch)):
            part = slice(first, first + self.batch)
            if not used[part].any():
                parts.append(None)
                continue
            own = [*(a[part] for a in shared), *self._grouped[group], *(a[part] for a in self.caches.arrays)]
            parts.append(self.programs.call(name, own))
        like = next(p for p in parts if p is not None)
        outs = [p if p is not None else [np.zeros_like(a) for a in like] for p in parts]
        merged = outs[0] if len(outs) == 1 else [np.concatenate([o[i] for o in outs]) for i in range(len(like))]
        self._pending = merged[1:]
        return without(merged[0][:given, :width], self.programs.card.suppress)

    def keep(self, counts: Any) -> None:
        """Write the first `counts[b]` of the tokens that row b was fed last; moves to larger caches when these are full."""
        fill = np.zeros(self.caches.rows, np.int64)
        fill[: len(counts)] = counts
        needed = int((self.caches.lengths + fill).max())
        if self.caches.bounded and needed > self.caches.slots:
            name = smallest(self.decodes, "cache", needed)
            if name is None:
                raise SequenceError(f"the cache is full at {self.caches.slots} tokens", "give a shorter prompt, or fewer tokens to write")
            self.caches.grow(int(self.decodes[name]["cache"]))
        self.caches.write(self._pending, fill)

    def sketch(self, token: int, most: int, sure: float) -> list[int]:
        """At most `most` tokens that the model's first layers (role "draft", with `layers` of them) put behind `token` in the first row,
        as long as they give each a probability of `sure`. What the caches held is as it was; slots behind it are written over."""
        found = {n: m for n, m in self.programs.role("draft").items() if m["source"] == self.source and m["cache"] == self.caches.slots}
        if not found or self.caches.window:
            return []
        name, method = next(iter(found.items()))
        kept, count = self.caches.lengths.copy(), self.caches.each * int(method["layers"])
        own, cross = self.caches.arrays[:count], self._grouped[0][: 1 + count] if self._cross else []
        drafted: list[int] = []
        while len(drafted) < most and self.caches.lengths[0] < self.caches.slots:
            fed = np.asarray([[token]], np.int64)
            out = self.programs.call(name, [fed, self.caches.lengths[:1, None].copy(), self.caches.mask(1)[:1], *cross, *own])
            logits = np.asarray(out[0])[0, -1].astype(np.float64)
            token = int(np.argmax(logits))
            if 1 / np.exp(logits - logits[token]).sum() < sure:
                break
            drafted.append(token)
            self.caches.write(out[1:], np.asarray([1]))
        self.caches.lengths = kept
        return drafted

    def reorder(self, order: Any) -> None:
        """Row b goes on from what row `order[b]` was; both of the same prompt."""
        whole = np.arange(self.caches.rows)
        whole[: len(order)] = order
        if not np.array_equal(whole, np.arange(len(whole))):
            self.caches.reorder(whole)
