"""What the methods share that prune single weights: their settings, training of weights under masks, and how what is left is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from edgesdk.compress.learned import Learned, through
from edgesdk.compress.masks import input_sizes, sparse_code
from edgesdk.compress.training import FLOOR, Outcome, TrainConfig, Training, free_parameters, lessons_of, why_no_training
from edgesdk.compress.types import Stats, Step, Weight
from edgesdk.compress.weights import set_weight, weights_of
from edgesdk.packed import Code, decode

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

Allocation = Literal["even", "global", "ecoflap"]
Pattern = tuple[int, int]
"""n of every m."""


class PruneConfig(TrainConfig):
    allocation: Allocation = "even"  # the same share of every layer, one threshold for all, or by what the outputs feel
    inputs: bool = True  # a weight counts times the size of its input; else for itself
    fit: bool = True  # choose and fit by second moments of the inputs before any training
    steps: Annotated[int, Field(ge=0, le=100_000)] = 0  # of training towards the uncompressed model's answers; 0: in one shot
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.6  # share of the steps after which the masks no longer change
    every: Annotated[int, Field(ge=1)] = 10  # steps between two choices of masks
    only: str = ""  # a regular expression over the names of the weights
    store: Literal["float16", "float32"] = "float16"  # the weights that stay, until a later stage codes them

    @property
    def settled(self) -> int:
        """The step at which masks are chosen for the last time."""
        return round(self.ramp * self.steps)

    def why_not(self, spec: ModelSpec) -> str | None:
        """The calibration data that is missing."""
        if spec.calibration is None and (self.inputs or self.fit or self.allocation == "ecoflap"):
            return "it has no calibration data (allocation=even,inputs=false,fit=false,steps=0 need none)"
        return why_no_training(spec, self) if self.steps else None


class Masked:
    """Weights that are trained under masks: what a mask leaves acts in full, the rest by the share `under`.

    `latent` are the weights behind the masks, `sizes` what each counts times when masks are chosen, all [rows, cols]. `open`: gradients pass
    the masks as if they were not there.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, Weight], stats: Mapping[str, Stats], masks: Mapping[str, torch.Tensor],
        config: PruneConfig, patterns: Mapping[str, Pattern] | None = None,
    ) -> None:  # fmt: skip
        now = weights_of(spec)
        self.spec, self.config, self.patterns = spec, config, patterns or {}
        self.masks = {n: m.clone() for n, m in masks.items()}
        self.latent = {n: now[n].matrix.requires_grad_(True) for n in masks}
        self.sizes = {n: input_sizes(weights[n], stats.get(n) if config.inputs else None) for n in masks}
        self.under, self.open = 0.0, False

    def scores(self, name: str) -> torch.Tensor:
        return self.latent[name].detach().abs() * self.sizes[name]

    def train(
        self, name: str, step: Step, *, teacher: ModelSpec | None = None, each: Callable[[int], None] | None = None
    ) -> Outcome:  # fmt: skip
        """Train in place towards the teacher; the codes of what is left. `each(t)`, before step t and after the last, chooses masks and
        sets `under` and `open`."""
        spec, config = self.spec, self.config
        learned = {n: self._learned(n) for n in self.latent}
        return Training(
            spec, lessons_of(spec, config, teacher), learned, free_parameters(spec, {**spec.codes, **learned}), config, each=each,
            state=list(self.masks.values()), name=name,
        ).run(step)  # fmt: skip

    def _learned(self, name: str) -> Learned:
        latent, mask = self.latent[name], self.masks[name]

        def weight(mix: float) -> torch.Tensor:
            acting = latent * (mask + self.under * ~mask)
            return through(acting, latent) if self.open else acting

        def code() -> Code:
            half = self.config.store == "float16"
            return sparse_code(latent.detach() * mask, mask, half=half, pattern=self.patterns.get(name))

        kept = latent.detach()[mask]
        return Learned(weight, code, [(latent, max(FLOOR, float(kept.square().mean().sqrt())) if kept.numel() else FLOOR)])


def stored(
    spec: ModelSpec, masks: Mapping[str, torch.Tensor], half: bool, patterns: Mapping[str, Pattern] | None = None
) -> dict[str, Code]:
    """Codes of the pruned weights; the modules hold what these decode to."""
    now, codes = weights_of(spec), {}
    for name, mask in masks.items():
        codes[name] = sparse_code(now[name].matrix * mask, mask, half=half, pattern=(patterns or {}).get(name))
        set_weight(spec, name, torch.from_numpy(decode(codes[name])))
    return codes
