"""Neurons, channels and heads cut out after training, from unlabeled inputs alone: no gradients, no labels, no training.

Sources: "Gradient-Free Structured Pruning with Unlabeled Data" (arXiv:2303.04185) ranks neurons by how well they represent the others and by how
active they are; STAT, "Shrinking Transformers After Training" (arXiv:2406.00061) picks them by a pivoted factorisation of their activations and
corrects the layer that reads them. Here: with G the second moments of what a layer W reads (a constant 1 beside it where W has a bias), units
are kept one after the other, each time the one with the largest part that the kept ones cannot replace, tr(W_J R_JJ W_Jᵀ) with
R = G - G_:K (G_KK)⁻¹ G_K: (a pivoted Cholesky factorisation in blocks). What is left of tr(W R Wᵀ), as a share of tr(W G Wᵀ), is the error that
shares the cuts out over layers. Then W is fitted by least squares to what it gave before (`shrink.refit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgesdk.compress.cut_costs import Order
from edgesdk.compress.dependency import Family, trace
from edgesdk.compress.layers import need_calibration
from edgesdk.compress.refit import Rows, damped, matrix_of, moments
from edgesdk.compress.shrink import copy_of, cuttable, module_at
from edgesdk.compress.structured import cut, elements
from edgesdk.compress.types import Change, Config, Need, Step
from edgesdk.compress.types import Family as Kind
from edgesdk.errors import InputError

if TYPE_CHECKING:
    import torch

    from edgesdk.model import ModelSpec


class NeuronsConfig(Config):
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2  # share of the parameters (or MACs) to cut out
    of: Literal["weights", "macs"] = "weights"
    rank: Literal["pivots", "leverage", "activity"] = "pivots"  # STAT's, or one score for each unit: representative, or merely active
    correct: bool = True  # fit the layers that read what was cut
    multiple: Annotated[int, Field(ge=1, le=64)] = 1  # layers keep a multiple of this many units where they had one
    damp: Annotated[float, Field(gt=0, le=0.1)] = 1e-3  # of the fits, as a share of G's diagonal


class Neurons:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "neurons"
    family: ClassVar[Kind] = "pruning"
    source: ClassVar[str] = "Gradient-Free Structured Pruning with Unlabeled Data (arXiv:2303.04185), STAT (arXiv:2406.00061)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[NeuronsConfig]] = NeuronsConfig

    def why_not(self, spec: ModelSpec, config: NeuronsConfig) -> str | None:
        return need_calibration(spec)

    def options(self, spec: ModelSpec) -> Sequence[NeuronsConfig]:
        return [NeuronsConfig(ratio=r) for r in (0.5, 0.3, 0.2, 0.1)]

    def apply(self, spec: ModelSpec, config: NeuronsConfig, step: Step) -> Change:
        teacher, found, rows = copy_of(spec), trace(spec), Rows()
        before = elements(spec, found)
        families = cuttable(spec, [f for f in found.families if f.exact], step)
        if not families:
            raise InputError(
                f"{spec.name} has no neurons, channels or heads that can be cut out", "use magnitude or nm, which keep all shapes"
            )
        step("ranking units", 0.3)
        orders = orders_of(spec, families, config.rank, config.damp)
        edits, notes = cut(
            spec, teacher, found, orders, config.ratio, rows, macs=config.of == "macs", multiple=config.multiple, fit=config.correct, step=step, share=config.damp,
        )  # fmt: skip
        after = elements(spec, found)
        notes.append(f"{1 - after[0] / before[0]:.1%} of the weights and {1 - after[1] / max(before[1], 1):.1%} of the MACs were cut out")
        return Change(tuple(edits), tuple(notes))


def orders_of(spec: ModelSpec, families: Sequence[Family], rank: str, damp: float) -> list[Order]:
    """For each family its units from the first to go to the last, with the error of each cut as a share of what its readers give."""
    import torch

    paths = sorted({a.path for f in families for a in f.readers if hasattr(module_at(spec, a.path), "bias")})
    found = moments(spec, None, paths)
    answer = []
    for family in families:
        parts = []
        for axis in family.readers:
            if axis.path not in found:
                continue
            module, gram = module_at(spec, axis.path), found[axis.path][0]
            matrix, kernel = matrix_of(module), int(module.weight[0, 0].numel())
            own = [[i * kernel + k for i in unit[axis] for k in range(kernel)] for unit in family.units]
            if module.bias is None:  # nothing can stand for a constant
                gram, matrix = gram[:-1, :-1], matrix[:, :-1]
            parts.append(Part(matrix, damped(gram, damp * 1e-3), own, damp))
        if not parts or any(not torch.isfinite(p.rest).all() for p in parts):
            continue
        answer.append(order_of(family, parts, rank))
    return answer


class Part:
    """What one layer reads of a family: its weight, and what the units that are kept so far cannot replace of its inputs."""

    def __init__(self, matrix: torch.Tensor, gram: torch.Tensor, columns: list[list[int]], damp: float) -> None:
        self.columns, self.weight = columns, matrix.T @ matrix
        self.power = float((self.weight * gram).sum()) or 1e-30
        self.rest, self.least = gram.clone(), damp * 1e-6 * float(gram.diagonal().mean())
        free = sorted(set(range(len(gram))) - {c for unit in columns for c in unit})
        if free:  # other families' inputs, and the constant, stay in any case
            self.keep(free)

    def scores(self, units: Sequence[int]) -> torch.Tensor:
        """How much of the output each unit would carry that the kept ones cannot, tr(W_J R_JJ W_Jᵀ), as a share of all."""
        import torch

        index = torch.tensor([self.columns[u] for u in units])
        weight, rest = (m[index[:, :, None], index[:, None, :]] for m in (self.weight, self.rest))
        return (weight * rest).sum((1, 2)) / self.power

    def keep(self, columns: Sequence[int]) -> None:
        import torch

        j = torch.as_tensor(columns)
        block = self.rest[j][:, j] + self.least * torch.eye(len(j), dtype=self.rest.dtype)
        self.rest = self.rest - self.rest[:, j] @ torch.linalg.solve(block, self.rest[j])
        self.rest[j] = self.rest[:, j] = 0

    def left(self) -> float:
        return max(0.0, float((self.weight * self.rest).sum()) / self.power)

    def leverage(self) -> torch.Tensor:
        """How hard each unit is to represent by the others: 1 - R²-like leverage of the activations, weighted by what reads them."""
        import torch

        size = self.weight.diagonal().clamp_min(0).sqrt()
        g = self.rest * size[:, None] * size[None]
        ridge = 1e-2 * float(g.diagonal().mean()) + 1e-30
        h = (g @ torch.linalg.inv(g + ridge * torch.eye(len(g), dtype=g.dtype))).diagonal()
        return torch.stack([(h[c] * g.diagonal()[c]).sum() for c in map(torch.tensor, self.columns)])


def order_of(family: Family, parts: Sequence[Part], rank: str) -> Order:
    """Keep one unit after the other; the order to cut is the reverse."""
    import torch

    waiting, kept = list(range(len(family.units))), list[int]()
    fixed: list[int] = []
    if rank != "pivots":
        total = sum((p.leverage() if rank == "leverage" else p.scores(waiting)) for p in parts)
        fixed = torch.argsort(torch.as_tensor(total), descending=True, stable=True).tolist()
    chunk, left = max(1, len(waiting) // 512), [sum(p.left() for p in parts)]
    while waiting:
        if fixed:
            picked = fixed[len(kept) : len(kept) + chunk]
        else:
            scores = torch.stack([p.scores(waiting) for p in parts]).sum(0)
            picked = [waiting[i] for i in torch.argsort(scores, descending=True, stable=True)[:chunk].tolist()]
        for part in parts:
            part.keep([c for u in picked for c in part.columns[u]])
        kept += picked
        gone = set(picked)
        waiting = [u for u in waiting if u not in gone]
        now = sum(p.left() for p in parts)
        left += [now] * len(picked)
    error = [max(0.0, e - left[-1]) for e in left[::-1]]
    return Order(family, kept[::-1][:-1], error[:-1])


METHOD: Any = Neurons()
