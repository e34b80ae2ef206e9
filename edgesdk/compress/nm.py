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
from edgesdk.compress.masks import of_every, one_shot, prunable, report
from edgesdk.compress.pruning import Masked, PruneConfig, stored
from edgesdk.compress.types import Change, Family, Need, Stats, Step, Weight
from edgesdk.compress.weights import stats_of

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class NmConfig(PruneConfig):
    n: Annotated[int, Field(ge=1)] = 2  # weights that stay (on average over the model, unless allocation="even")
    m: Annotated[int, Field(ge=2, le=64)] = 4  # of so many next to each other
    recipe: Literal["flow", "adaptive", "fixed"] = "fixed"  # how masks are trained: gradient decay, adaptive masks, not at all
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.5
    every: Annotated[int, Field(ge=1)] = 5
    decay: Annotated[float, Field(ge=0)] = 1.0  # AST's λ at the end of the ramp, as a share of the gradient's size

    @model_validator(mode="after")
    def _fewer(self) -> NmConfig:
        if self.n >= self.m:
            raise ValueError("n must be less than m")
        return self


class Nm:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "nm"
    family: ClassVar[Family] = "pruning"
    source: ClassVar[str] = "Progressive Gradient Flow (arXiv:2402.04744), AST (arXiv:2407.20584), SparseGPT (arXiv:2301.00774)"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[NmConfig]] = NmConfig

    def why_not(self, spec: ModelSpec, config: NmConfig) -> str | None:
        reason = config.why_not(spec)
        if reason:
            return reason
        widest = max((w.cols for w in prunable(spec, config.only).values()), default=0)
        return f"no row is as long as m = {config.m}" if widest < config.m else None

    def options(self, spec: ModelSpec) -> Sequence[NmConfig]:
        data = spec.calibration is not None
        return [NmConfig(n=n, m=m, inputs=data, fit=data) for n, m in ((1, 8), (1, 4), (2, 4), (5, 8))]

    def apply(self, spec: ModelSpec, config: NmConfig, step: Step) -> Change:
        found = prunable(spec, config.only)
        weights = {n: w for n, w in found.items() if w.cols >= config.m}
        stats = stats_of(spec, step=step) if config.inputs or config.fit else {}
        counts = dict.fromkeys(weights, config.n)
        if config.allocation != "even":
            counts = of_every_counts(spec, weights, stats, config.n, config.m, config.allocation, step)
        masks: dict[str, torch.Tensor] = {}
        if config.recipe != "flow" or not config.steps:
            choices = {n: partial(of_every, n=counts[n], m=config.m) for n in weights}
            masks = one_shot(spec, weights, stats, choices, step, inputs=config.inputs, fit=config.fit)
        short = tuple(f"{n}: left as it is, its rows are shorter than {config.m}" for n in found if n not in weights)
        if not config.steps:
            patterns = {n: (counts[n], config.m) for n in weights}
            return Change((), (*report(weights, masks), *short), stored(spec, masks, config.store == "float16", patterns))
        made = Patterned(spec, weights, stats, counts, config, masks)
        outcome = made.train(self.name, step, each=None if config.recipe == "fixed" else made.choose)
        return Change((), (*report(weights, made.masks), *short, outcome.note(self.name, config.steps)), outcome.codes)


class Patterned(Masked):
    """Masks of n of every m that change while the weights behind them, all of them, are trained."""

    config: NmConfig

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, Weight], stats: Mapping[str, Stats], counts: Mapping[str, int], config: NmConfig,
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        start = masks or {n: torch.zeros_like(w.matrix, dtype=torch.bool) for n, w in weights.items()}
        super().__init__(spec, weights, stats, start, config, {n: (counts[n], config.m) for n in weights})
        self.counts = counts
        self.changed: list[float] = []  # share of the masks' weights that each new choice changed
        self.decay = 0.0
        if not masks:
            self._chosen()
        elif config.recipe == "adaptive":  # what one shot left out waits, smaller than what stays
            with torch.no_grad():
                for name, mask in self.masks.items():
                    self.latent[name] += 0.5 * weights[name].matrix * ~mask
        for name, latent in self.latent.items():
            latent.register_hook(partial(self._pulled, name))  # type: ignore[no-untyped-call]

    def choose(self, t: int) -> None:
        config, settled = self.config, max(1, self.config.settled)
        if (t % config.every == 0 or t == settled) and t <= settled:
            before = {n: m.clone() for n, m in self.masks.items()}
            self._chosen()
            moved = sum(int((m & ~before[n]).sum()) for n, m in self.masks.items())
            self.changed.append(moved / max(1, sum(int(m.sum()) for m in before.values())))
        self.under = max(0.0, 1 - t / settled) if config.recipe == "flow" else 0.0
        self.open = config.recipe == "adaptive" and t < settled
        self.decay = config.decay * t / settled if self.open else 0.0

    def _chosen(self) -> None:
        for name, mask in self.masks.items():
            mask.copy_(of_every(self.scores(name), self.counts[name], self.config.m))

    def _pulled(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient with the pull to 0 of the weights under the mask, relative to the sizes of the gradient and of the weights."""
        if not self.decay:
            return gradient
        latent = self.latent[name].detach()
        size = gradient.square().mean().sqrt() / latent.square().mean().sqrt().clamp_min(1e-12)
        return gradient + self.decay * size * latent * ~self.masks[name]


METHOD: Any = Nm()
