"""VPTQ: several weights of a row at once as one index into a codebook of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from edgesdk.compress.kmeans import damped, feedback, grouped, loss, nearest, refine, short, vector_kmeans
from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.packed import Code

GAIN = {1: 0.0, 2: 0.12, 3: 0.25, 4: 0.33, 5: 0.38, 6: 0.42, 8: 0.5}
"""Length of the vectors → bits a weight they save at equal error (the examples' weights at 2 bits, measured)."""
MOST = 12  # bits of an index


class VptqConfig(Config):
    bits: Annotated[float, Field(ge=0.5, le=6)] = 2.0  # of the indices, a weight
    length: Annotated[int, Field(ge=0, le=16)] = 0  # weights a vector; 0: what pays best with the bytes of the codebook counted
    residual: Annotated[int, Field(ge=0, le=12)] = 0  # bits of a second index into a codebook of what the first leaves; 0: none
    outliers: Annotated[float, Field(ge=0, le=0.5)] = (
        0.0  # share of the columns, those with the largest inputs, with a codebook of their own
    )
    outlier_bits: Annotated[float, Field(ge=0.5, le=6)] = 4.0  # of their indices, a weight
    feedback: bool = True  # correct the rounding error as it is made (GPTQ) and in further rounds; false: nearest vectors only
    weighted: bool = True  # k-means counts every vector by its inputs
    rounds: Annotated[int, Field(ge=0, le=20)] = 4  # of refitting the codebooks, and choosing every index again


@dataclass(frozen=True)
class Book:
    """Entries `start`…`end` of all codebooks' entries: stage `stage` of the blocks `first`…`last`."""

    stage: int
    first: int
    last: int
    start: int
    end: int


class Vectors:
    """A weight on its way to vector codes: `codes` [stages, groups, rows, blocks] are places in `table` [entries of all books, length]."""

    def __init__(self, w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, books: list[Book], length: int) -> None:
        self.w, self.h, self.scale, self.books, self.length = w, h, scale, books, length
        self.stages = 1 + max(b.stage for b in books)
        self.table = torch.zeros(max(b.end for b in books), length)
        self.step = torch.ones(len(books))
        self.codes = torch.zeros(self.stages, *w.shape[:2], w.shape[2] // length, dtype=torch.int64)
        for b in books:
            self.codes[b.stage, :, :, b.first : b.last] = b.start

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """[groups, rows, cols] → [groups, rows, blocks, length]."""
        return x.reshape(*x.shape[:2], -1, self.length)

    def values(self) -> torch.Tensor:
        return self.table[self.codes].sum(0).flatten(2) * self.scale

    def set(self, table: torch.Tensor) -> None:
        """New entries, rounded to the int8 steps they are stored in."""
        self.table = table.clone()
        for i, b in enumerate(self.books):
            part = table[b.start : b.end]
            self.step[i] = (part.abs().max() / 127).clamp(6e-8, 500).to(torch.float16).float()
            self.table[b.start : b.end] = (part / self.step[i]).round().clamp(-127, 127) * self.step[i]

    def pick(self, start: int, target: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """The nearest vector, or sum of two: stage after stage, from the best few of the first; notes the indices."""
        block = start // self.length
        books = [b for b in self.books if b.first <= block < b.last]
        t = (target / self.scale) @ factor
        seen = [self.table[b.start : b.end] @ factor for b in books]
        if len(books) == 1:
            found = nearest(t, seen[0])[0][None]
        else:
            half = (seen[0] ** 2).sum(-1)[:, None] / 2
            few = (half - t @ seen[0].transpose(1, 2)).topk(min(8, seen[0].shape[1]), largest=False).indices
            left = t[:, :, None] - torch.gather(
                seen[0][:, None].expand(-1, t.shape[1], -1, -1), 2, few[..., None].expand(*few.shape, self.length)
            )
            second, away = nearest(left.flatten(1, 2), seen[1])
            best = away.reshape(few.shape).argmin(-1, keepdim=True)
            found = torch.stack([few.gather(2, best)[..., 0], second.reshape(few.shape).gather(2, best)[..., 0]])
        out = torch.zeros_like(target)
        for b, index in zip(books, found, strict=True):
            self.codes[b.stage, :, :, block] = index + b.start
            out += self.table[index + b.start]
        return out * self.scale

    def first_books(self, importance: torch.Tensor) -> None:
        """k-means of the scaled vectors, each counted with its importance [groups, rows, cols]; the second stage's of what is left."""
        left = self.cut(self.w / self.scale)
        count = self.cut(importance).mean(3)
        table = self.table
        for b in self.books:
            points = left[:, :, b.first : b.last].reshape(-1, self.length)
            centres = vector_kmeans(points, count[:, :, b.first : b.last].reshape(-1), b.end - b.start)
            table[b.start : b.end] = centres
            which = nearest(points, centres)[0]
            self.codes[b.stage, :, :, b.first : b.last] = (which + b.start).reshape(*left.shape[:2], -1)
            left[:, :, b.first : b.last] -= centres[which].reshape(*left.shape[:2], -1, self.length)
        self.set(table)

    def refit(self, rounds: int = 12) -> None:
        """All entries towards their least-squares places under H, the indices as they are: conjugate gradients with a diagonal preconditioner."""
        h = self.h.float()

        def pulled(e: torch.Tensor) -> torch.Tensor:
            return self.spread(self.cut((e @ h) * self.scale))

        diagonal = self.spread(self.cut(h.diagonal(dim1=1, dim2=2)[:, None] * self.scale**2))
        ridge = 1e-4 * diagonal.mean() + 1e-20
        x, r = self.table.clone(), pulled(self.w - self.values())
        z = r / (diagonal + ridge)
        p, rz = z.clone(), (r * z).sum()
        for _ in range(rounds):
            ap = pulled(p[self.codes].sum(0).flatten(2) * self.scale) + ridge * p
            step = rz / (p * ap).sum().clamp_min(1e-30)
            x, r = x + step * p, r - step * ap
            z = r / (diagonal + ridge)
            now = (r * z).sum()
            if now < 1e-8 * rz or not bool(torch.isfinite(now)):
                break
            p, rz = z + now / rz.clamp_min(1e-30) * p, now
        if bool(torch.isfinite(x).all()):
            self.set(x)

    def spread(self, along: torch.Tensor) -> torch.Tensor:
        """What every entry is given by the places that use it [groups, rows, blocks, length] → [entries, length]."""
        total = torch.zeros_like(self.table)
        for codes in self.codes:
            total.index_add_(0, codes.flatten(), along.expand(*codes.shape, self.length).reshape(-1, self.length))
        return total


def length_for(numel: int, bits: float) -> int:
    """The length of vectors that saves most, its codebook of int8 counted; 1 where none pays."""
    saved = {n: gain - 8 * n * 2 ** round(bits * n) / numel for n, gain in GAIN.items() if round(bits * n) <= MOST}
    return max(saved, key=lambda n: saved[n]) if saved else 1


def row_scale(w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The root mean square of every row in its inputs' weight, [groups, rows, 1]."""
    d = h.diagonal(dim1=1, dim2=2)[:, None].float()
    size = ((w**2 * d).sum(2, keepdim=True) / d.sum(2, keepdim=True)).sqrt()
    return short(size)


class Vptq:
    """VPTQ (VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models, arXiv:2409.17066): a row's weights in vectors
    of `length`, w ≈ scale · codebook[index] (+ residual codebook[index2]). Codebooks start as k-means of the scaled vectors, each counted
    with scale² · H_jj (H: mean x·xᵀ of the inputs); vectors are rounded one block of columns after the other, later columns take up the
    error (channel-independent second-order optimisation); columns with the largest inputs may have a codebook of their own.
    Changed: vectors run along rows and are chosen under the whole block of H; then rounds of coordinate descent and of least-squares
    codebooks; entries are int8, and the length is chosen by what its codebook costs in this weight."""

    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "vptq"
    family: ClassVar[Family] = "codebook"
    source: ClassVar[str] = "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models (arXiv:2409.17066)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[VptqConfig]] = VptqConfig

    def why_not(self, weight: Weight, config: VptqConfig) -> str | None:
        if weight.kept is not None:
            return "it was pruned, and vectors would fill its zeros (any4, squeezellm and gptq keep them)"
        length = config.length or length_for(weight.matrix.numel(), config.bits)
        wanted = max(round(config.bits * length), config.residual, round(config.outlier_bits * length) if config.outliers else 0)
        if wanted > MOST:
            return f"an index of {wanted} bits; {MOST} at most (fewer bits or a smaller length)"
        if weight.matrix.numel() < 4 * length * 2**wanted:
            return f"{weight.matrix.numel()} weights are too few for a codebook of {2**wanted} vectors of {length}"
        return None

    def options(self, weight: Weight) -> Sequence[VptqConfig]:
        return [c for c in (VptqConfig(bits=b) for b in (1.5, 2, 2.5, 3)) if self.why_not(weight, c) is None]

    def apply(self, weight: Weight, stats: Stats | None, config: VptqConfig) -> Code:
        state, order = start(weight, stats, config)
        w, h = state.w, state.h
        if not config.feedback:
            return to_code(weight, state, order)
        feedback(w, h, state.pick, state.length)
        best, least = (state.codes.clone(), state.table, state.step.clone()), loss(w, state.values(), h)
        for _ in range(config.rounds):
            state.refit()
            refine(w, state.values(), h, state.pick, state.length)
            now = loss(w, state.values(), h)
            if now < least:
                best, least = (state.codes.clone(), state.table, state.step.clone()), now
        state.codes, state.table, state.step = best
        return to_code(weight, state, order)


def start(weight: Weight, stats: Stats | None, config: VptqConfig) -> tuple[Vectors, torch.Tensor]:
    """The weight with its first codebooks and nearest indices; the order its columns are in."""
    length = config.length or length_for(weight.matrix.numel(), config.bits)
    w, h = grouped(weight), damped(weight, stats)
    apart = round(config.outliers * weight.cols / length)
    order = torch.arange(weight.cols)
    if apart:
        order = torch.argsort(h.diagonal(dim1=1, dim2=2).sum(0), descending=True, stable=True)
        chosen, rest = order[: apart * length].sort().values, order[apart * length :].sort().values
        order = torch.cat([chosen, rest])
    w, h = w[:, :, order], h[:, order][:, :, order]
    scale = row_scale(w, h)
    w, h = padded(w, h, length)
    blocks = w.shape[2] // length
    books: list[Book] = []
    for first, last, bits in ((0, apart, config.outlier_bits), (apart, blocks, config.bits)):
        for stage, size in enumerate((round(bits * length), config.residual)):
            if last > first and (size or not stage):
                begin = books[-1].end if books else 0
                books.append(Book(stage, first, last, begin, begin + 2**size))
    state = Vectors(w, h, scale, books, length)
    importance = scale**2 * h.diagonal(dim1=1, dim2=2)[:, None].float() if config.weighted else torch.ones(1)
    state.first_books(importance.expand(w.shape))
    return state, order


def padded(w: torch.Tensor, h: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of zero, hardly weighted, up to a whole number of vectors."""
    more, cols = -w.shape[2] % length, w.shape[2]
    if not more:
        return w, h
    small = 1e-3 * h.diagonal(dim1=1, dim2=2).mean(1)
    wide = torch.nn.functional.pad(h, (0, more, 0, more))
    wide.diagonal(dim1=1, dim2=2)[:, cols:] = small[:, None]
    return torch.nn.functional.pad(w, (0, more)), wide


def to_code(weight: Weight, state: Vectors, order: torch.Tensor) -> Code:
    shape, none = (weight.rows, weight.cols), np.zeros(0, np.float16)
    sections: dict[int, list[Code]] = {}
    for b, step in zip(state.books, state.step, strict=True):
        cols = min(b.last * state.length, weight.cols) - b.first * state.length
        index = (state.codes[b.stage, :, :, b.first : b.last] - b.start).reshape(weight.rows, -1)
        q = index.numpy().astype(np.uint8 if b.end - b.start <= 256 else np.uint16)
        entries = (state.table[b.start : b.end] / step).round().to(torch.int8).numpy()
        part = Code("vector", (weight.rows, cols), (state.length, 0), (q, entries, np.full((1, 1), float(step), np.float16)))
        sections.setdefault(b.first, []).append(part)
    parts = [p[0] if len(p) == 1 else Code("sum", p[0].shape, (), (), tuple(p)) for p in sections.values()]
    code = parts[0] if len(parts) == 1 else Code("stack", shape, (1,), (), tuple(parts))
    scaled = Code("scaled", shape, (), (state.scale.reshape(-1).to(torch.float16).numpy(), none), (code,))
    if len(parts) == 1:
        return scaled
    return Code("pick", shape, (1,), (order.numpy().astype(np.uint16),), (scaled,))


METHOD = Vptq()
