"""Activation smoothing: input channels are scaled down and the weights that read them up, folded into what makes the inputs; nothing is added.

Sources: SmoothQuant (arXiv:2211.10438), s_c = max|x_c|^α / max|w_c|^(1-α), which moves outliers from activations into weights;
AWQ (arXiv:2306.00978), s_c = mean|x_c|^α, which protects the weights of large inputs. For every group of layers that read the same tensor both are
tried with every exponent against the precision to come, and no scaling at all; the one of least output error is folded in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.layers import (
    inputs_of,
    layers_of,
    lost,
    need_calibration,
    none_found,
    pairs_of,
    reads,
    rescale,
    round_matrix,
    round_rows,
)
from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.errors import InputError

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class SmoothConfig(Config):
    bits: Annotated[int, Field(ge=2, le=8)] = 4  # of the weights to come
    group: Annotated[int, Field(ge=0)] = 32  # columns that will share a scale; 0: a whole row
    activations: Literal[0, 4, 8] = 0  # bits of the activations to come; 0: they stay float
    exponents: Annotated[int, Field(ge=1, le=50)] = 10  # how many between 0 and 1 are tried
    only: str = ""


class Smooth:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "smooth"
    family: ClassVar[Family] = "integer"
    source: ClassVar[str] = "SmoothQuant (arXiv:2211.10438), AWQ (arXiv:2306.00978)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[SmoothConfig]] = SmoothConfig

    def why_not(self, spec: ModelSpec, config: SmoothConfig) -> str | None:
        return need_calibration(spec)

    def options(self, spec: ModelSpec) -> Sequence[SmoothConfig]:
        return [SmoothConfig(bits=4), SmoothConfig(bits=3), SmoothConfig(bits=8, group=0, activations=8), SmoothConfig(activations=4)]

    def apply(self, spec: ModelSpec, config: SmoothConfig, step: Step) -> Change:
        modules, inputs = layers_of(spec), inputs_of(spec)
        if not any(re.search(config.only, n) for n in modules):
            raise none_found(spec, config.only)
        step("looking for what makes the inputs", 0.0)
        pairs = [p for p in pairs_of(spec) if any(re.search(config.only, n) for n in p.readers) and all(n in inputs for n in p.readers)]
        if not pairs:
            raise InputError(f"{spec.name}: no layer's inputs can be scaled by what makes them", "leave smooth out of the recipe")
        gains, folded = [], 0
        for i, pair in enumerate(pairs):
            step(f"smoothing {pair.readers[0]}", i / len(pairs))
            x = inputs[pair.readers[0]]
            matrices = [modules[n].weight.detach().reshape(modules[n].weight.shape[0], -1).float() for n in pair.readers]
            best, least, first = None, _lost(x, matrices, None, config), 0.0
            first = least
            for s in candidates(x, matrices, reads(modules[pair.readers[0]]), config.exponents):
                now = _lost(x, matrices, s, config)
                if now < 0.99 * least:
                    best, least = s, now
            gains.append(least / max(first, 1e-30))
            if best is not None:
                folded += 1
                rescale(pair.producer, 1 / best, False)
                for n in pair.readers:
                    rescale(modules[n], best, True)
        text = f"smooth: {folded} of {len(pairs)} groups of layers scaled; their output error fell to {sum(gains) / len(gains):.2f} of what it was, on average"
        return Change(notes=(text,))


def candidates(x: torch.Tensor, matrices: list[torch.Tensor], channels: int, count: int) -> Iterator[torch.Tensor]:
    """Scales [channels] of both kinds; x [rows, channels · kernel]."""
    sizes = x.abs().reshape(len(x), channels, -1)
    largest, mean = sizes.amax((0, 2)), sizes.mean((0, 2))
    weights = torch.stack([m.abs().reshape(len(m), channels, -1).amax((0, 2)) for m in matrices]).amax(0)
    live = (largest > 0) & (weights > 0)
    for i in range(1, count + 1):
        alpha = i / count
        for s in (largest**alpha / weights.clamp_min(1e-30) ** (1 - alpha), mean**alpha):
            s = torch.where(live, s, torch.ones_like(s))
            middle = (s[live].max() * s[live].min()).sqrt() if bool(live.any()) else torch.tensor(1.0)
            yield torch.where(live, (s / middle.clamp_min(1e-30)).clamp(1e-3, 1e3), torch.ones_like(s))


def _lost(x: torch.Tensor, matrices: list[torch.Tensor], s: torch.Tensor | None, config: SmoothConfig) -> float:
    """The readers' output error with their inputs divided and their weights multiplied by s, both rounded as they will be."""
    wide = torch.ones(x.shape[1]) if s is None else s.repeat_interleave(x.shape[1] // len(s))
    seen = round_rows(x / wide, config.activations) * wide
    return sum(lost(x, m, seen, round_matrix(m * wide, config.bits, config.group) / wide) for m in matrices)


METHOD = Smooth()
