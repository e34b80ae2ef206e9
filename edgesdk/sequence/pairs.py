"""Pairs of a source and a target as token ids, and the batches that training takes from them: alike in length, and decided by the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from edgesdk.errors import InputError

Tokens = Sequence[int]
IGNORED = -100  # where nothing is asked, as PyTorch's cross-entropy has it
WINDOW = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Pairs:
    """`sources[i]` is answered by `targets[i]`, which ends with `end`. `start` is put before a target, `pad` behind what is shorter than its batch.

    `start` None: the last token of the source stands there, as in pretrained decoder-only models, to whom both are one text.
    """

    sources: Sequence[Tokens]
    targets: Sequence[Tokens]
    start: int | None
    end: int
    pad: int = 0

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.targets) or not self.sources:
            raise InputError(
                f"{len(self.sources)} sources for {len(self.targets)} targets", "give as many of one as of the other, and at least one"
            )
        for name, rows in (("source", self.sources), ("target", self.targets)):
            empty = next((i for i, row in enumerate(rows) if not len(row)), None)
            if empty is not None:
                raise InputError(f"{name} {empty} is empty", "give at least its end token")
        other = next((i for i, row in enumerate(self.targets) if row[-1] != self.end), None)
        if other is not None:
            raise InputError(
                f"target {other} ends with token {self.targets[other][-1]}, not with {self.end}", "end every target with the end token"
            )

    def __len__(self) -> int:
        return len(self.sources)

    def split(self, held: int) -> tuple[Pairs, Pairs]:
        """All but the last `held` pairs, and those."""
        cut = len(self) - held
        return tuple(replace(self, sources=self.sources[a:b], targets=self.targets[a:b]) for a, b in ((0, cut), (cut, None)))  # type: ignore[return-value]

    def batch(self, rows: Sequence[int]) -> Batch:
        sources, starts = begun([self.sources[i] for i in rows], self.start, self.pad)
        return Batch(
            list(rows),
            padded(sources, self.pad),
            padded([[s, *self.targets[i][:-1]] for s, i in zip(starts, rows, strict=True)], self.pad),
            padded([self.targets[i] for i in rows], IGNORED),
        )

    def lengths(self) -> list[int]:
        return [len(s) + len(t) for s, t in zip(self.sources, self.targets, strict=True)]


@dataclass(frozen=True)
class Batch:
    """int64: `source` [B, S] and `given` [B, T] (the target behind `start`, without its end), padded; `wanted` [B, T], IGNORED behind its end."""

    rows: list[int]
    source: torch.Tensor
    given: torch.Tensor
    wanted: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.rows, self.source.to(device), self.given.to(device), self.wanted.to(device))


def begun(sources: Sequence[Tokens], start: int | None, pad: int) -> tuple[list[Tokens], list[int]]:
    """The sources as they stand before an answer, and what each answer begins behind."""
    if start is not None:
        return list(sources), [start] * len(sources)
    return [s[:-1] or [pad] for s in sources], [s[-1] for s in sources]


def padded(rows: Sequence[Tokens], pad: int) -> torch.Tensor:
    """int64 [rows, the longest's length]."""
    answer = torch.full((len(rows), max(len(r) for r in rows)), pad, dtype=torch.int64)
    for i, row in enumerate(rows):
        answer[i, : len(row)] = torch.tensor(list(row))
    return answer


class Batches:
    """Step n's pairs: those of an epoch in a new order each, sorted by length within every `WINDOW` batches so that little is padding."""

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed = lengths, min(size, len(lengths)), seed
        self.count = len(lengths) // self.size  # batches of an epoch; what is left over comes in another epoch
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, step: int) -> list[int]:
        epoch, at = divmod(step, self.count)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._made(epoch)
        return self._epoch[1][at]

    def _made(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()[: self.count * self.size]
        batches = []
        for start in range(0, len(order), WINDOW * self.size):
            part = sorted(order[start : start + WINDOW * self.size], key=lambda i: self.lengths[i])
            batches += [part[i : i + self.size] for i in range(0, len(part), self.size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
