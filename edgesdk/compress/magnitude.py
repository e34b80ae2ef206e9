"""Magnitude pruning: the smallest weights become 0, more and more of them, while the others are trained towards the whole model.

Source: "To prune, or not to prune: exploring the efficacy of pruning for model compression" (arXiv:1710.01878). After t of T steps
s_t = s · (1 - (1 - t/T)³) of the weights are 0. Ours: the training needs no labels (`tune`), a weight's size counts times that of its input
(as Wanda, arXiv:2306.11695), the share of every layer may be set by what the outputs feel of it (`ecoflap`), and without training the weights that
stay are fitted in one shot (`masks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.ecoflap import keeping
from edgesdk.compress.masks import input_sizes, largest, one_shot, prunable, report, sparse_code
from edgesdk.compress.shrink import copy_of, remembered
from edgesdk.compress.tune import Tuner
from edgesdk.compress.types import Change, Config, Family, Need, Stats, Step, Weight
from edgesdk.compress.weights import holders, set_weight, stats_of
from edgesdk.model import ModelSpec

Allocation = Literal["even", "global", "ecoflap"]


class MagnitudeConfig(Config):
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.7  # share of the weights of linears and convolutions that become 0
    allocation: Allocation = "ecoflap"  # the same share of every layer, one threshold for all, or by what the outputs feel
    inputs: bool = True  # a weight counts times the size of its input; else for itself
    fit: bool = True  # choose and fit by second moments of the inputs before any training
    steps: Annotated[int, Field(ge=0, le=50000)] = 0  # of training towards the whole model's outputs while the share rises; 0: in one shot
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.6  # share of the steps over which it rises
    every: Annotated[int, Field(ge=1)] = 10  # steps between two choices of weights
    rate: Annotated[float, Field(gt=0, le=1)] = 1e-3  # of learning
    only: str = ""  # a regular expression over the names of the weights
    store: Literal["float16", "float32"] = "float16"  # the weights that stay, until a later stage codes them

    @property
    def needs_data(self) -> bool:
        return self.inputs or self.fit or self.steps > 0 or self.allocation == "ecoflap"


class Magnitude:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "magnitude"
    family: ClassVar[Family] = "pruning"
    source: ClassVar[str] = "To prune, or not to prune (arXiv:1710.01878), with ALPS-like one-shot fits"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[MagnitudeConfig]] = MagnitudeConfig

    def why_not(self, spec: ModelSpec, config: MagnitudeConfig) -> str | None:
        if spec.calibration is None and config.needs_data:
            return "it has no calibration data (allocation=global,inputs=false,fit=false,steps=0 need none)"
        return None

    def options(self, spec: ModelSpec) -> Sequence[MagnitudeConfig]:
        if spec.calibration is None:
            return [MagnitudeConfig(sparsity=s, allocation="global", inputs=False, fit=False) for s in (0.7, 0.6, 0.5, 0.4, 0.3)]
        return [MagnitudeConfig(sparsity=s) for s in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]

    def apply(self, spec: ModelSpec, config: MagnitudeConfig, step: Step) -> Change:
        spec = remembered(spec)
        weights = prunable(spec, config.only)
        stats = stats_of(spec, step=step) if config.inputs or config.fit else {}
        counts = keeping(spec, weights, stats if config.inputs else {}, config.sparsity, config.allocation, step=step)
        if config.steps:
            masks = gradual(spec, weights, stats, counts, config, step)
        else:
            masks = at_once(spec, weights, stats, counts, config, step)
        codes = stored(spec, masks, config.store == "float16")
        return Change((), report(weights, masks), codes)


def at_once(
    spec: ModelSpec,
    weights: Mapping[str, Weight],
    stats: Mapping[str, Stats],
    counts: Mapping[str, int],
    config: MagnitudeConfig,
    step: Step,
) -> dict[str, torch.Tensor]:
    """Prune every weight to its count, in place; the masks."""
    choices = {n: partial(largest, keep=counts[n]) for n in weights}
    return one_shot(spec, weights, stats, choices, step, inputs=config.inputs, fit=config.fit)


def cubic(share: float) -> float:
    """The part of the final sparsity that is reached after this share of the ramp."""
    return 1.0 - (1.0 - min(1.0, max(0.0, share))) ** 3


def gradual(
    spec: ModelSpec,
    weights: Mapping[str, Weight],
    moments: Mapping[str, Stats],
    counts: Mapping[str, int],
    config: MagnitudeConfig,
    step: Step,
) -> dict[str, torch.Tensor]:
    """Prune while training, in place; the masks, which only ever lose weights."""
    sizes = {n: input_sizes(w, moments.get(n) if config.inputs else None) for n, w in weights.items()}
    held = {n: uses[0][2].weight for n, uses in holders(spec).items() if n in weights}
    masks: dict[str, torch.Tensor] = {n: torch.ones_like(w.matrix, dtype=torch.bool) for n, w in weights.items()}
    tuner = Tuner(spec, spec.reference or copy_of(spec), steps=config.steps, rate=config.rate)
    last = round(config.ramp * config.steps)
    if not last:  # all at once, then training
        masks = at_once(spec, weights, moments, counts, config, step)
    try:
        for t in range(config.steps):
            if last and t <= last and (t % config.every == 0 or t == last):
                step(f"pruning and training, {t} of {config.steps}", t / config.steps)
                part = cubic(t / last if t + config.every <= last and t < last else 1.0)
                for name, weight in weights.items():
                    total = weight.matrix.numel()
                    keep = total - round(part * (total - counts[name]))
                    masks[name] = (
                        largest(held[name].detach().reshape(weight.matrix.shape).abs() * sizes[name] * masks[name], keep) & masks[name]
                    )
                _masked(held, masks)
            tuner.step()
            _masked(held, masks)
    finally:
        tuner.close()
    return masks


def _masked(held: Mapping[str, Any], masks: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            held[name].mul_(mask.reshape(held[name].shape))


def stored(
    spec: ModelSpec, masks: Mapping[str, torch.Tensor], half: bool, pattern: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, Any]:
    """Codes of the pruned weights; the modules hold what these decode to."""
    from edgesdk.compress.weights import weights_of
    from edgesdk.packed import decode

    now, codes = weights_of(spec), {}
    for name, mask in masks.items():
        codes[name] = sparse_code(now[name].matrix * mask, mask, half=half, pattern=(pattern or {}).get(name))
        set_weight(spec, name, torch.from_numpy(decode(codes[name])))
    return codes


METHOD: Any = Magnitude()
