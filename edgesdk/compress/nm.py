"""N:M sparsity: n of every m weights in a row stay (2:4, 1:4, 1:16, …), chosen and fitted in one shot or while training.

Sources: "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers" (arXiv:2402.04744): weights under the mask act on with a
factor β that falls to 0, W̃ = (M + β (1 - M)) ⊙ W, and as much of the gradient reaches them. "Pruning Large Language Models with Semi-Structural
Adaptive Sparse Training" (AST, arXiv:2407.20584): gradients pass the mask straight through to all weights, those under it decay by λ · W with a
growing λ, and the mask is chosen anew all the time, so that it can change before it settles; the whole model is the teacher. Without training, masks
and weights come from the second moments of the inputs (`masks.sparsest`), as in SparseGPT (arXiv:2301.00774) but fitted jointly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from edgesdk.compress.ecoflap import of_every_counts
from edgesdk.compress.magnitude import stored
from edgesdk.compress.masks import input_sizes, of_every, one_shot, prunable, report
from edgesdk.compress.shrink import copy_of, remembered
from edgesdk.compress.tune import Tuner
from edgesdk.compress.types import Change, Config, Family, Need, Stats, Step, Weight
from edgesdk.compress.weights import holders, stats_of

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class NmConfig(Config):
    n: Annotated[int, Field(ge=1)] = 2  # weights that stay
    m: Annotated[int, Field(ge=2, le=64)] = 4  # of so many next to each other
    allocation: Literal["even", "ecoflap"] = "even"  # the same n everywhere, or n on average, by what the outputs feel
    inputs: bool = True  # a weight counts times the size of its input
    fit: bool = True  # choose and fit by second moments of the inputs (before any training with recipe="fixed")
    steps: Annotated[int, Field(ge=0, le=50000)] = 0  # of training towards the whole model's outputs
    recipe: Literal["flow", "adaptive", "fixed"] = "fixed"  # how masks are trained: gradient decay, adaptive masks, not at all
    ramp: Annotated[float, Field(gt=0, lt=1)] = 0.7  # share of the steps after which the masks no longer change
    decay: Annotated[float, Field(ge=0)] = 6e-2  # AST's λ at the end of the ramp
    every: Annotated[int, Field(ge=1)] = 5  # steps between two choices of masks
    rate: Annotated[float, Field(gt=0, le=1)] = 3e-4  # of learning
    only: str = ""  # a regular expression over the names of the weights
    store: Literal["float16", "float32"] = "float16"  # the weights that stay, until a later stage codes them

    @model_validator(mode="after")
    def _fewer(self) -> NmConfig:
        if self.n >= self.m:
            raise ValueError("n must be less than m")
        return self

    @property
    def needs_data(self) -> bool:
        return self.inputs or self.fit or self.steps > 0 or self.allocation == "ecoflap"


class Nm:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "nm"
    family: ClassVar[Family] = "pruning"
    source: ClassVar[str] = "Progressive Gradient Flow (arXiv:2402.04744), AST (arXiv:2407.20584), SparseGPT (arXiv:2301.00774)"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[NmConfig]] = NmConfig

    def why_not(self, spec: ModelSpec, config: NmConfig) -> str | None:
        if spec.calibration is None and config.needs_data:
            return "it has no calibration data (inputs=false,fit=false,steps=0 need none)"
        widest = max((w.cols for w in prunable(spec, config.only).values()), default=0)
        return f"no row is as long as m = {config.m}" if widest < config.m else None

    def options(self, spec: ModelSpec) -> Sequence[NmConfig]:
        data = spec.calibration is not None
        return [NmConfig(n=n, m=m, inputs=data, fit=data) for n, m in ((1, 8), (1, 4), (2, 4), (5, 8))]

    def apply(self, spec: ModelSpec, config: NmConfig, step: Step) -> Change:
        spec = remembered(spec)
        found = prunable(spec, config.only)
        weights = {n: w for n, w in found.items() if w.cols >= config.m}
        stats = stats_of(spec, step=step) if config.inputs or config.fit else {}
        counts = dict.fromkeys(weights, config.n)
        if config.allocation == "ecoflap":
            counts = of_every_counts(spec, weights, stats, config.n, config.m, step)
        teacher = spec.reference or copy_of(spec)
        masks: dict[str, torch.Tensor] = {}
        if config.recipe != "flow" or not config.steps:
            choices = {n: partial(of_every, n=counts[n], m=config.m) for n in weights}
            masks = one_shot(spec, weights, stats, choices, step, inputs=config.inputs, fit=config.fit)
        if config.steps:
            masks = Trained(spec, weights, stats, counts, config, masks).run(step, teacher)
        codes = stored(spec, masks, config.store == "float16", {n: (counts[n], config.m) for n in weights})
        short = tuple(f"{n}: left as it is, its rows are shorter than {config.m}" for n in found if n not in weights)
        return Change((), (*report(weights, masks), *short), codes)


class Trained:
    """Training of a model with masked weights, in place. The modules hold the weights behind the masks (all of them) between the steps and
    what the masks and their recipe make of them within one."""

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, Weight], stats: Mapping[str, Stats], counts: Mapping[str, int], config: NmConfig,
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.config, self.counts = spec, config, counts
        self.held = {n: uses[0][2].weight for n, uses in holders(spec).items() if n in weights}
        self.shapes = {n: w.matrix.shape for n, w in weights.items()}
        self.sizes = {n: input_sizes(w, stats.get(n) if config.inputs else None) for n, w in weights.items()}
        self.latent = {n: p.detach().clone() for n, p in self.held.items()}
        if masks and config.recipe == "adaptive":  # what one shot left out waits, smaller than what stays
            for name, mask in masks.items():
                self.latent[name] += (0.5 * weights[name].matrix * ~mask).reshape(self.latent[name].shape)
        self.masks = {n: m.reshape(self.held[n].shape) for n, m in masks.items()} if masks else self.chosen()
        self.settled = max(1, round(config.ramp * config.steps))
        self.changed: list[float] = []  # share of the masks' weights that each new choice changed

    def chosen(self) -> dict[str, torch.Tensor]:
        """Masks of the weights as they are, in the shape of the parameters."""
        return {
            n: of_every(w.reshape(self.shapes[n]).abs() * self.sizes[n], self.counts[n], self.config.m).reshape(w.shape)
            for n, w in self.latent.items()
        }

    def share(self, t: int) -> float:
        """How much of a weight under the mask acts at step t."""
        return max(0.0, 1.0 - t / self.settled) if self.config.recipe == "flow" else 0.0

    def run(self, step: Step, teacher: ModelSpec | None = None) -> dict[str, torch.Tensor]:
        """Train; the masks [rows, cols] at the end."""
        config = self.config
        tuner = Tuner(self.spec, teacher or copy_of(self.spec), steps=config.steps, rate=config.rate)
        try:
            for t in range(config.steps):
                if t % config.every == 0:
                    step(f"training under {config.m}-wide masks, {t} of {config.steps}", t / config.steps)
                if (t % config.every == 0 or t == self.settled) and t <= self.settled and config.recipe != "fixed":
                    self._choose()
                self._put({n: w * (m + self.share(t) * ~m) for (n, w), m in zip(self.latent.items(), self.masks.values(), strict=True)})
                tuner.step(lambda t=t: self._gradients(t))  # type: ignore[misc]
                self.latent = {n: p.detach().clone() for n, p in self.held.items()}
        finally:
            tuner.close()
        self._put({n: w * self.masks[n] for n, w in self.latent.items()})
        return {n: m.reshape(self.shapes[n]) for n, m in self.masks.items()}

    def _choose(self) -> None:
        before, self.masks = self.masks, self.chosen()
        moved = sum(int((self.masks[n] & ~before[n]).sum()) for n in before)
        self.changed.append(moved / max(1, sum(int(m.sum()) for m in before.values())))

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.held[name].copy_(value)

    def _gradients(self, t: int) -> None:
        """Gradients of what acts become those of the weights behind it; the step then moves these."""
        decay = self.config.decay * min(1.0, t / self.settled) if self.config.recipe == "adaptive" else 0.0
        for name, parameter in self.held.items():
            mask, gradient = self.masks[name], parameter.grad
            if gradient is None:
                continue
            if self.config.recipe == "flow":
                gradient.mul_(mask + self.share(t) * ~mask)
            elif self.config.recipe == "fixed" or t >= self.settled:
                gradient.mul_(mask)
            elif decay:
                gradient.add_(
                    decay
                    * gradient.square().mean().sqrt()
                    / self.latent[name].square().mean().sqrt().clamp_min(1e-12)
                    * self.latent[name]
                    * ~mask
                )
        self._put(self.latent)


METHOD: Any = Nm()
