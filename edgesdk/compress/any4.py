"""any4: weights as indices into a learned table of 2^bits values, one table a row or one for the whole weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from edgesdk.compress.kmeans import damped, feedback, grouped, line_kmeans, loss, refine, refit, short
from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.packed import Code, groups_of

TABLE_LEAST = 128  # columns an entry of a row's own table must serve before it pays


class Any4Config(Config):
    bits: Annotated[int, Field(ge=2, le=4)] = 4
    group: Annotated[int, Field(ge=0)] = 0  # columns that share a scale; 0: a whole row
    table: Literal["auto", "row", "weight"] = "auto"  # whose table; auto: a row's own where it serves 128 columns an entry
    feedback: bool = True  # correct the rounding error as it is made (GPTQ) and in further rounds; false: nearest values only
    rounds: Annotated[int, Field(ge=0, le=20)] = 4  # of refitting the table and the scales, and choosing every index again


class Scalar:
    """A weight on its way to a table code: `codes` [groups, rows, cols], `table` [1, k] or [rows of all groups, k], `scale` [groups, rows, n].
    Where `free` [groups, rows, cols] is true, the weight is stored beside the table, as `loose`, and takes any value of float16.
    Where `kept` is false, it was pruned and stays 0: entry `none` [groups, rows, 1] of the table is then 0 and does not move."""

    def __init__(
        self, w: torch.Tensor, h: torch.Tensor, width: int, own: bool, free: torch.Tensor | None = None, kept: torch.Tensor | None = None
    ) -> None:
        self.w, self.h, self.width, self.own = w, h, width, own
        self.pruned = None if kept is None else ~kept.reshape(w.shape)
        self.none = torch.full((*w.shape[:2], 1), -1)
        self.codes = torch.zeros(w.shape, dtype=torch.int64)
        self.free = torch.zeros(w.shape, dtype=torch.bool) if free is None else free
        self.loose = w.where(self.free, torch.zeros(())).to(torch.float16).float()
        self.scaled = not own or width < w.shape[2]  # a table of a row's own needs no scale
        scale = group_scale(w.masked_fill(self.free, 0), width)
        self.set(torch.zeros(1, 1), scale if self.scaled else torch.ones_like(scale))

    def set(self, table: torch.Tensor, scale: torch.Tensor) -> None:
        """New values; `entries` is the table of every row [groups, rows, k], `wide` the scale of every column."""
        groups, rows, cols = self.w.shape
        self.table, self.scale = table, scale
        self.entries = table.expand(groups * rows, table.shape[1]).reshape(groups, rows, -1)
        self.wide = scale.repeat_interleave(self.width, 2)[:, :, :cols]

    def values(self) -> torch.Tensor:
        return self.loose.where(self.free, torch.gather(self.entries, 2, self.codes) * self.wide)

    def pick(self, start: int, target: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """The nearest value of one column; notes its index, or the value where it is free."""
        s = self.wide[:, :, start : start + 1]
        code = (target / s - self.entries).abs().argmin(-1, keepdim=True)
        if self.pruned is not None:
            code = self.none.where(self.pruned[:, :, start : start + 1], code)
        free = self.free[:, :, start : start + 1]
        self.codes[:, :, start] = code[:, :, 0]
        self.loose[:, :, start : start + 1] = target.clamp(-65504, 65504).to(torch.float16).float().where(free, torch.zeros(()))
        return self.loose[:, :, start : start + 1].where(free, torch.gather(self.entries, 2, code) * s)

    def state(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.codes.clone(), self.loose.clone(), self.table, self.scale

    def nearest(self) -> None:
        ready = self.w / self.wide
        for start in range(0, self.w.shape[2], 64):
            block = ready[:, :, start : start + 64]
            self.codes[:, :, start : start + 64] = (block[..., None] - self.entries[:, :, None]).abs().argmin(-1)
        if self.pruned is not None:
            self.codes = self.none.expand(self.w.shape).where(self.pruned, self.codes)

    def refit(self) -> None:
        """Table and scales to their least-squares places, for the codes as they are."""
        k, w, wide = self.table.shape[1], self.w - self.loose, self.wide.masked_fill(self.free | (self.codes == self.none), 0)
        basis = torch.stack([(self.codes == i) * wide for i in range(k)])
        shared = self.table.shape[0] == 1 and self.w.shape[0] * self.w.shape[1] > 1
        now = self.table[0].double() if shared else self.entries.double()
        self.set(refit(basis, w, self.h, now).reshape(-1, k).to(torch.float16).float(), self.scale)
        if not self.scaled:
            return
        plain, column = torch.gather(self.entries, 2, self.codes).masked_fill(self.free, 0), torch.arange(self.w.shape[2]) // self.width
        basis = torch.stack([plain * (column == g) for g in range(self.scale.shape[2])])
        new = refit(basis, w, self.h, self.scale.double()).float()
        self.set(self.table, short(torch.where(new > 1e-6, new, self.scale)))


def group_scale(w: torch.Tensor, width: int) -> torch.Tensor:
    """The largest weight of every group of `width` columns: [groups, rows, groups of columns], as it is stored."""
    padded = torch.nn.functional.pad(w, (0, -w.shape[2] % width)).reshape(*w.shape[:2], -1, width)
    return short(padded.abs().amax(-1))


def first_table(w: torch.Tensor, importance: torch.Tensor, k: int, own: bool) -> torch.Tensor:
    """k-means of scaled weights [groups, rows, cols], each counted with its importance: [rows, k] or [1, k]."""
    flat, weights = (t.reshape(-1, w.shape[2]).double().numpy() for t in (w, importance.expand(w.shape)))
    tables = [line_kmeans(x, i, k) for x, i in zip(flat, weights, strict=True)] if own else [line_kmeans(flat, weights, k)]
    return torch.from_numpy(np.stack(tables)).to(torch.float16).float()


def own_table(weight: Weight, config: Any4Config) -> bool:
    return config.table == "row" or (config.table == "auto" and weight.cols >= TABLE_LEAST * 2**config.bits)


def fit(state: Scalar, importance: torch.Tensor, config: Any4Config) -> None:
    """The best table code found: k-means, then `rounds` of error feedback, new tables and scales; the round of least error is kept."""
    w, h = state.w, state.h
    if state.pruned is None:
        state.set(first_table(w / state.wide, importance, 2**config.bits, state.own), state.scale)
    else:
        table = first_table(w / state.wide, importance.masked_fill(state.pruned, 0), 2**config.bits - 1, state.own)
        state.set(torch.cat([table, torch.zeros(len(table), 1)], 1).sort(1)[0], state.scale)
        state.none = state.entries.abs().argmin(-1, keepdim=True)
    if not config.feedback:
        state.nearest()
        return
    feedback(w, h, state.pick)
    best, least = state.state(), loss(w, state.values(), h)
    for _ in range(config.rounds):
        state.refit()
        refine(w, state.values(), h, state.pick)
        now = loss(w, state.values(), h)
        if now < least:
            best, least = state.state(), now
    state.codes, state.loose, table, scale = best
    state.set(table, scale)


class Any4:
    """Any4 (any4: Learned 4-bit Numeric Representation for LLMs): w ≈ table[index] · scale. The table is the k-means of the scaled weights,
    each weighted by scale² · H_jj (H: mean x·xᵀ of the inputs); exact, by dynamic programming. Beyond the paper: indices are chosen with
    error feedback and coordinate descent under the whole H, tables and scales refitted by least squares, and where rows are short
    (a table of 16 float16 values costs 256 bits) all rows share one table and differ by a scale."""

    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "any4"
    family: ClassVar[Family] = "codebook"
    source: ClassVar[str] = "any4: Learned 4-bit Numeric Representation for LLMs; error feedback as in GPTQ (arXiv:2210.17323)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[Any4Config]] = Any4Config

    def why_not(self, weight: Weight, config: Any4Config) -> str | None:
        if weight.matrix.numel() < 2 ** (config.bits + 2):
            return f"{weight.matrix.numel()} weights are too few for a table of {2**config.bits}"
        return None

    def options(self, weight: Weight) -> Sequence[Any4Config]:
        return [Any4Config(bits=b, group=g) for b in (2, 3, 4) for g in (0, 32) if g < weight.cols]

    def apply(self, weight: Weight, stats: Stats | None, config: Any4Config) -> Code:
        w, h = grouped(weight), damped(weight, stats)
        state = Scalar(w, h, config.group or weight.cols, own_table(weight, config), kept=weight.kept)
        importance = state.wide**2 * h.diagonal(dim1=1, dim2=2)[:, None].float()
        fit(state, importance, config)
        return to_code(weight, state, config.bits)


def to_code(weight: Weight, state: Scalar, bits: int) -> Code:
    """The table code, without what is stored beside it."""
    scale = state.scale.reshape(weight.rows, -1).to(torch.float16).numpy() if state.scaled else np.zeros(0, np.float16)
    codes = state.codes.reshape(weight.rows, weight.cols).to(torch.uint8).numpy()
    group = state.width if groups_of(weight.cols, state.width) > 1 else 0
    return Code("table", tuple(weight.matrix.shape), (bits, group), (codes, state.table.to(torch.float16).numpy(), scale))


METHOD = Any4()
