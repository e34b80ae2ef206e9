"""`qat`: training with rounded weights, for the codes of earlier stages.

Sources: Learned Step Size Quantization (arXiv:1902.08153) for grids; LLM-QAT (arXiv:2305.17888) for training towards the float model's answers,
for inputs of its own (`data="self"`) and for separate bits of weights, activations and caches.
Ours: any code is trained in its own form (see `learned`); training starts from the rounding of the earlier stage, not from the nearest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.learned import learn
from edgesdk.compress.training import TrainConfig, Training, free_parameters, lessons_of, why_no_training
from edgesdk.compress.types import Change, Family, Need, Step
from edgesdk.compress.weights import weights_of

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class QatConfig(TrainConfig):
    only: str = ""  # a regular expression over the names of the weights
    scales: Literal["learned", "kept"] = "learned"
    others: bool = True  # biases, norms and weights without a code are trained, too
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of the steps over which weights go from float to rounded


def originals(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The uncompressed weights that still have the same name and shape."""
    if spec.reference is None:
        return {}
    now = weights_of(spec)
    return {n: w.matrix for n, w in weights_of(spec.reference).items() if n in now and now[n].matrix.shape == w.matrix.shape}


class Qat:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "qat"
    family: ClassVar[Family] = "recovery"
    source: ClassVar[str] = "LSQ (arXiv:1902.08153), LLM-QAT (arXiv:2305.17888)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[QatConfig]] = QatConfig

    def why_not(self, spec: ModelSpec, config: QatConfig) -> str | None:
        if not any(re.search(config.only, n) for n in spec.codes):
            return "none of its weights is stored as a code yet (put a method like rtn:bits=3 before it)"
        return why_no_training(spec, config)

    def options(self, spec: ModelSpec) -> Sequence[QatConfig]:
        return [QatConfig(steps=s) for s in (100, 300, 1000)]

    def apply(self, spec: ModelSpec, config: QatConfig, step: Step) -> Change:
        known = originals(spec)
        learned = {n: learn(c, known.get(n), scale=config.scales) for n, c in spec.codes.items() if re.search(config.only, n)}
        free = free_parameters(spec, spec.codes) if config.others else []
        outcome = Training(spec, lessons_of(spec, config), learned, free, config, ramp=config.ramp, name=self.name).run(step)
        return Change((), (outcome.note(self.name, config.steps),), outcome.codes)


METHOD = Qat()
