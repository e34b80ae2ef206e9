"""Low rank plus integers: W = Q + L1·L2, and how many bits and ranks every weight gets, chosen at once for a number of stored bytes.

LQ-LoRA: "Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning" (arXiv:2311.12023). Q and L are found in turns,
L = the first r singular vectors of W - Q, Q = the rounded W - L, as long as the error falls; an integer program then picks one option for every
weight so that the summed error is least within the budget. Errors are weighted by Fisher information in the paper, by rows and columns; here a
change D costs Σ_r f_r · D_r · gram · D_rᵀ, with f_r the mean squared gradient of output row r and gram the mean x·xᵀ of the inputs, so that errors of
different weights add up. Q is rounded with error feedback (`gptq`); the factors have 8 bits (16 in the paper, which trains them afterwards).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from edgesdk.compress.eora import fixed_rank
from edgesdk.compress.gptq import GptqConfig, fixed
from edgesdk.compress.knapsack import choose
from edgesdk.compress.lord import row_weights
from edgesdk.compress.svd import Space, factor_code, space_of, spectrum_of
from edgesdk.compress.types import Change, Config, Family, Need, Stats, Step, Weight
from edgesdk.compress.weights import fisher_of, output_error, set_weight, stats_of, weights_of
from edgesdk.errors import DoesNotFit, InputError
from edgesdk.packed import Code, decode, pack

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

LEVELS = ((3, 0), (4, 0), (4, 32), (5, 0), (8, 0), (8, 32), (16, 0), (16, 32), (64, 0))
"""Levels and group of the integers that are tried without a low-rank part."""
BESIDE = (3, 4, 8, 16)
"""Levels, a whole row in a group, that are tried beside a low-rank part."""


class LqloraConfig(Config):
    bits: Annotated[float, Field(ge=1, le=8)] = 3.0  # stored a weight, of all that are coded together
    low_rank: tuple[float, ...] = (0.2, 0.5)  # bits a weight that low-rank parts may take; none: integers only
    rounds: Annotated[int, Field(ge=1, le=20)] = 2  # turns of Q and L
    gradients: bool = True  # rows weigh as the outputs depend on them; false: every weight's relative error counts alike
    only: str = ""  # a regular expression over the names of the weights


@dataclass(frozen=True)
class Setting:
    """One option of a weight. Rank 0: integers only."""

    levels: int
    group: int
    rank: int

    def __str__(self) -> str:
        return f"{math.log2(self.levels):.3g} bits" + (f" in groups of {self.group}" if self.group else "") + f", rank {self.rank}"


class Task:
    """One weight and how errors of it count."""

    def __init__(self, weight: Weight, stats: Stats | None, rows: torch.Tensor | None) -> None:
        self.weight, self.stats, self.rows = weight, stats, rows
        self.groups = 1 if stats is None else len(stats.gram)
        self.space = space_of(stats, rows=rows) if self.groups == 1 else Space()

    def error(self, decoded: torch.Tensor) -> float:
        """Σ_r f_r · D_r · gram · D_rᵀ; relative to that of the weight itself where there are no row weights."""
        size = self._size(self.weight.matrix) if self.rows is None else 1.0
        return self._size(self.weight.matrix - decoded) / max(size, 1e-30)

    def _size(self, d: torch.Tensor) -> float:
        if self.groups == 1:
            return float((self.space.into(d) ** 2).sum())
        assert self.stats is not None
        d = d.double().reshape(self.groups, -1, self.weight.cols)
        each = torch.einsum("gri,gij,grj->gr", d, self.stats.gram, d).reshape(-1)
        return float((each if self.rows is None else each * self.rows).sum())

    def rounded(self, matrix: torch.Tensor, setting: Setting, sweeps: int) -> Code:
        config = GptqConfig(bits=math.log2(setting.levels), group=setting.group, sweeps=sweeps)
        return fixed(replace(self.weight, matrix=matrix, original=None, coded=None), self.stats, config)

    def split(self, setting: Setting, rounds: int, sweeps: int = 0) -> tuple[Code, list[float]]:
        """The code of least error among the turns, and the error after each turn that was taken: it only falls.

        The first turn begins with no integers, as in the paper (the low-rank part takes up the weight's largest directions), and with those
        of the weight itself (it takes up what they lost); the better one goes on.
        """
        code = integers = self.rounded(self.weight.matrix, setting, sweeps)
        errors = [self.error(torch.from_numpy(decode(code)))]
        for turn in range(rounds if setting.rank else 0):
            found = [self._turn(integers, setting, sweeps)] + ([self._turn(None, setting, sweeps)] if turn == 0 else [])
            error, made = min(found, key=lambda f: f[0])
            if error >= errors[-1]:
                break
            code, integers = made, made.parts[0]
            errors.append(error)
        return code, errors

    def _turn(self, integers: Code | None, setting: Setting, sweeps: int) -> tuple[float, Code]:
        """Low rank for what the integers miss, then integers for what the low rank misses (the old ones if they are better)."""
        matrix = self.weight.matrix
        missing = matrix if integers is None else matrix - torch.from_numpy(decode(integers))
        low = factor_code(*spectrum_of(missing, self.space).factors(setting.rank), self.space, 8)
        rest = matrix - torch.from_numpy(decode(low))
        ways = [self.rounded(rest, setting, sweeps)] + ([] if integers is None else [integers])
        codes = [Code("sum", tuple(matrix.shape), (), (), (w, low)) for w in ways]
        errors = [self.error(torch.from_numpy(decode(c))) for c in codes]
        best = errors.index(min(errors))
        return errors[best], codes[best]


def settings_for(weight: Weight, low_rank: Sequence[float]) -> list[Setting]:
    """What is tried for a weight, without repeats."""
    found = [Setting(levels, group if group < weight.cols else 0, 0) for levels, group in LEVELS]
    if weight.groups == 1:
        rooms = {fixed_rank(weight.rows, weight.cols, 8, int(share * weight.matrix.numel() / 8)) for share in low_rank}
        found += [Setting(levels, 0, rank) for levels in BESIDE for rank in sorted(rooms - {0})]
    return list(dict.fromkeys(found))


def size_of(code: Code) -> float:
    """About how many bytes `pack` stores: integers at their entropy, all else as it is."""
    total = 12.0
    for array in code.arrays:
        if array.dtype.kind == "u" and array.size:
            counts = np.bincount(array.reshape(-1))
            share = counts[counts > 0] / array.size
            total += float(-(share * np.log2(share)).sum()) * array.size / 8 + 20
        else:
            total += array.nbytes
    return total + sum(size_of(p) for p in code.parts)


def program(loss: Any, use: Any, limit: float) -> list[int]:
    """The integer program: one option a unit, the least summed loss [units, options] within a limit on the summed use. Raises `DoesNotFit`."""
    return [int(i) for i in choose(loss, use[None], [limit], gap=1e-6).picked]


@dataclass
class Table:
    """Every weight's options: settings, codes, errors and bytes (about, until a code was packed)."""

    names: list[str]
    settings: list[list[Setting]]
    codes: list[list[Code]]
    errors: list[list[float]]
    bytes: list[list[float]]

    def pick(self, budget: float) -> list[int]:
        """The option of each weight: the least summed error of those whose packed bytes stay within `budget`. Raises `DoesNotFit`."""
        exact: set[tuple[int, int]] = set()
        width = max(len(e) for e in self.errors)
        loss = np.array([e + [np.inf] * (width - len(e)) for e in self.errors])
        while True:
            use = np.array([b + [0.0] * (width - len(b)) for b in self.bytes])
            picked = program(loss, use, budget)
            unknown = [(u, i) for u, i in enumerate(picked) if (u, i) not in exact]
            if not unknown and sum(b[i] for b, i in zip(self.bytes, picked, strict=True)) <= budget:
                return picked
            if not unknown:  # the solver's tolerance
                return self.pick(budget * (1 - 1e-6))
            for u, i in unknown:
                self.bytes[u][i] = len(pack(self.codes[u][i]))
                exact.add((u, i))


def tasks_of(spec: ModelSpec, config: LqloraConfig, step: Step) -> tuple[dict[str, Task], dict[str, str]]:
    """The weights that are coded and how their errors count, and why the others are not. Raises `InputError`."""
    stats = stats_of(spec, step=step)
    fisher = fisher_of(spec) if config.gradients else {}
    found, refused = {}, {}
    for name, weight in weights_of(spec).items():
        if not re.search(config.only, name):
            continue
        if name not in stats and weight.op != "embedding":
            refused[name] = "it is never called as a module"
            continue
        found[name] = Task(weight, stats.get(name), _rows(fisher.get(name), stats.get(name)))
    if not found:
        raise InputError(f"lqlora: no weight of {spec.name} can be coded", f"{next(iter(refused.items()), 'no weight has such a name')}")
    most = {n: float(t.rows.max()) for n, t in found.items() if t.rows is not None}
    if config.gradients and (len(most) < len(found) or not any(most.values())):
        for task in found.values():
            task.rows = None
            task.space = replace(task.space, row=None)
    return found, refused


def _rows(fisher: torch.Tensor | None, stats: Stats | None) -> torch.Tensor | None:
    """Row weights; an embedding's entries that calibration never met count as half the mean."""
    if fisher is None:
        return None
    if stats is not None:
        groups = len(stats.gram)
        if groups == 1:
            return row_weights(replace(stats, fisher=fisher))
        size = stats.gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30).repeat_interleave(len(fisher) // groups)
        return fisher.double().sum(1) / size
    rows = fisher.double().mean(1)
    return (rows + rows.mean()) / 2


def table_of(tasks: Mapping[str, Task], config: LqloraConfig, step: Step) -> Table:
    """Every option of every weight, rounded and measured."""
    table = Table(list(tasks), [], [], [], [])
    for i, (name, task) in enumerate(tasks.items()):
        step(f"lqlora: {name}", i / len(tasks))
        settings = settings_for(task.weight, config.low_rank)
        made = [task.split(s, config.rounds) for s in settings]
        table.settings.append(settings)
        table.codes.append([code for code, _ in made])
        table.errors.append([errors[-1] for _, errors in made])
        table.bytes.append([size_of(code) for code, _ in made])
    return table


class Lqlora:
    level: ClassVar[Any] = "model"
    name: ClassVar[str] = "lqlora"
    family: ClassVar[Family] = "low-rank"
    source: ClassVar[str] = "LQ-LoRA (arXiv:2311.12023); ours: error feedback, errors in the inputs' space, integer low-rank parts"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs", "gradients"})
    config: ClassVar[type[LqloraConfig]] = LqloraConfig

    def why_not(self, spec: ModelSpec, config: LqloraConfig) -> str | None:
        return None if any(re.search(config.only, n) for n in weights_of(spec)) else "no weight has such a name"

    def options(self, spec: ModelSpec) -> Sequence[LqloraConfig]:
        return [LqloraConfig(bits=b) for b in (2, 2.5, 3, 3.5, 4, 4.5)]

    def apply(self, spec: ModelSpec, config: LqloraConfig, step: Step) -> Change:
        tasks, refused = tasks_of(spec, config, step)
        table = table_of(tasks, config, step)
        count = sum(t.weight.matrix.numel() for t in tasks.values())
        try:
            picked = table.pick(config.bits * count / 8)
        except DoesNotFit:
            least = 8 * sum(min(b) for b in table.bytes) / count
            raise DoesNotFit(f"lqlora: {config.bits} bits a weight are too few", f"its smallest options take about {least:.2f}") from None
        codes = {name: table.codes[u][picked[u]] for u, name in enumerate(table.names)}
        made_by: dict[str, tuple[str, dict[str, Any], float]] = {}
        for u, (name, code) in enumerate(codes.items()):
            task, setting, decoded = tasks[name], table.settings[u][picked[u]], torch.from_numpy(decode(code))
            error = output_error(task.weight, decoded, task.stats)
            made_by[name] = self.name, {"bits": round(math.log2(setting.levels), 2), "group": setting.group, "rank": setting.rank}, error
            set_weight(spec, name, decoded)
        total = sum(table.bytes[u][i] for u, i in enumerate(picked))
        ranked = sum(table.settings[u][i].rank > 0 for u, i in enumerate(picked))
        notes = [f"{8 * total / count:.3f} bits a weight; {ranked} of {len(codes)} weights have a low-rank part"]
        notes += [f"{name}: {table.settings[u][picked[u]]}" for u, name in enumerate(table.names)]
        notes += [f"{name}: left as it is, {reason}" for name, reason in refused.items()]
        return Change((), tuple(notes), codes, made_by)


METHOD = Lqlora()
