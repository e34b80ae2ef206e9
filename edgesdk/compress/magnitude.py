"""Magnitude pruning: the smallest weights become 0, more and more of them, while the others are trained towards the whole model.

Source: "To prune, or not to prune: exploring the efficacy of pruning for model compression" (arXiv:1710.01878). After t of T steps
s_t = s · (1 - (1 - t/T)³) of the weights are 0. Ours: the training needs no labels, a weight's size counts times that of its input
(as Wanda, arXiv:2306.11695), the share of every layer may be set by what the outputs feel of it (`ecoflap`), and without training the weights that
stay are fitted in one shot (`masks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.ecoflap import keeping
from edgesdk.compress.masks import largest, one_shot, prunable, report
from edgesdk.compress.pruning import Allocation, Masked, PruneConfig, stored
from edgesdk.compress.types import Change, Family, Need, Step
from edgesdk.compress.weights import stats_of
from edgesdk.model import ModelSpec


class MagnitudeConfig(PruneConfig):
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.7  # share of the weights of linears and convolutions that become 0
    allocation: Allocation = "ecoflap"
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of the steps over which the share rises; 0: in one shot, then training


class Magnitude:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "magnitude"
    family: ClassVar[Family] = "pruning"
    source: ClassVar[str] = "To prune, or not to prune (arXiv:1710.01878), with ALPS-like one-shot fits"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[MagnitudeConfig]] = MagnitudeConfig

    def why_not(self, spec: ModelSpec, config: MagnitudeConfig) -> str | None:
        return config.why_not(spec)

    def options(self, spec: ModelSpec) -> Sequence[MagnitudeConfig]:
        if spec.calibration is None:
            return [MagnitudeConfig(sparsity=s, allocation="global", inputs=False, fit=False) for s in (0.7, 0.6, 0.5, 0.4, 0.3)]
        return [MagnitudeConfig(sparsity=s) for s in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]

    def apply(self, spec: ModelSpec, config: MagnitudeConfig, step: Step) -> Change:
        weights = prunable(spec, config.only)
        stats = stats_of(spec, step=step) if config.inputs or config.fit else {}
        counts = keeping(spec, weights, stats if config.inputs else {}, config.sparsity, config.allocation, step=step)
        if config.settled:
            masks = {n: torch.ones_like(w.matrix, dtype=torch.bool) for n, w in weights.items()}
        else:
            choices = {n: partial(largest, keep=counts[n]) for n in weights}
            masks = one_shot(spec, weights, stats, choices, step, inputs=config.inputs, fit=config.fit)
            if not config.steps:
                return Change((), report(weights, masks), stored(spec, masks, config.store == "float16"))
        made = Gradual(spec, weights, stats, masks, config)
        made.counts = counts
        outcome = made.train(self.name, step, each=made.choose if config.settled else None)
        return Change((), (*report(weights, made.masks), outcome.note(self.name, config.steps)), outcome.codes)


def cubic(share: float) -> float:
    """The part of the final sparsity that is reached after this share of the ramp."""
    return 1.0 - (1.0 - min(1.0, max(0.0, share))) ** 3


class Gradual(Masked):
    """Masks that lose ever more weights, and win none back, until `counts` are left."""

    counts: dict[str, int]

    def choose(self, t: int) -> None:
        last, every = self.config.settled, self.config.every
        if t > last or (t % every and t != last):
            return
        part = cubic(t / last if t + every <= last and t < last else 1.0)
        for name, mask in self.masks.items():
            keep = mask.numel() - round(part * (mask.numel() - self.counts[name]))
            mask &= largest(self.scores(name) * mask, keep)


METHOD: Any = Magnitude()
