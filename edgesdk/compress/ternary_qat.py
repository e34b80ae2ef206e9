"""`ternary-qat`: weights of -s, 0 and s by training, from the float weights, towards the float model's answers.

Sources: BitNet b1.58 (arXiv:2402.17764), BitNet b1.58 Reloaded (arXiv:2407.09527: mean or median scales, small models) and
When are 1.58 bits enough? (arXiv:2411.05882: encoders and encoder-decoders). Theirs: ternary values with a straight-through gradient, embeddings and the
head kept finer. Ours: no labels, scales that are learned (as in LSQ), a start at the scales of least error, and weights that become ternary bit by
bit over the first steps: (1 - m)·w + m·ternary(w) with m from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.learned import Learned, learn
from edgesdk.compress.qat import QatConfig
from edgesdk.compress.rtn import RtnConfig, grid_of, to_code
from edgesdk.compress.ternary import Fit, TernaryConfig, ternary_code, ternary_scale
from edgesdk.compress.training import Training, free_parameters, lessons_of, why_no_training
from edgesdk.compress.types import Change, Family, Need, Step, Weight
from edgesdk.compress.weights import weights_of
from edgesdk.errors import InputError
from edgesdk.packed import Code, decode

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class TernaryQatConfig(QatConfig):
    steps: Annotated[int, Field(ge=1, le=100_000)] = 500
    fit: Fit = "search"  # the scales it starts from, or (scales="kept") stays with
    per: Literal["tensor", "row"] = "row"
    group: Annotated[int, Field(ge=0)] = 0
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.3  # share of the steps over which weights become ternary
    edges: Literal[3, 4, 6, 8] = 8  # bits of embeddings, of the first and last weights, and of those of fewer than `least` columns
    least: Annotated[int, Field(ge=0)] = 16


class TernaryQat:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "ternary-qat"
    family: ClassVar[Family] = "recovery"
    source: ClassVar[str] = "BitNet b1.58 (arXiv:2402.17764), Reloaded (arXiv:2407.09527), arXiv:2411.05882, with learned scales (LSQ)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[TernaryQatConfig]] = TernaryQatConfig

    def why_not(self, spec: ModelSpec, config: TernaryQatConfig) -> str | None:
        if not any(re.search(config.only, n) for n in weights_of(spec)):
            return "no weight has such a name"
        return why_no_training(spec, config)

    def options(self, spec: ModelSpec) -> Sequence[TernaryQatConfig]:
        return [TernaryQatConfig(steps=s) for s in (300, 1000)]

    def apply(self, spec: ModelSpec, config: TernaryQatConfig, step: Step) -> Change:
        weights = {n: w for n, w in weights_of(spec).items() if re.search(config.only, n)}
        edges = edge_names(spec, config)
        learned: dict[str, Learned] = {}
        for name, w in weights.items():
            learned[name] = learn(_start(w, config, name in edges, spec.codes.get(name)), w.matrix, scale=config.scales)
        free = free_parameters(spec, {**spec.codes, **learned}) if config.others else []
        fixed = [n for n in spec.codes if n not in learned]
        outcome = Training(spec, lessons_of(spec, config), learned, free, config, ramp=config.ramp, name=self.name).run(step)
        ternary = sum(w.matrix.numel() for n, w in weights.items() if n not in edges)
        notes = [
            outcome.note(self.name, config.steps),
            f"{ternary} of {sum(w.matrix.numel() for w in weights.values())} weights are ternary; {', '.join(sorted(edges)) or 'none'} kept at"
            f" {config.edges} bits",
        ]
        notes += [f"{len(fixed)} weights keep the code they had"] if fixed else []
        return Change((), tuple(notes), outcome.codes)


def _start(weight: Weight, config: TernaryQatConfig, edge: bool, before: Code | None) -> Code:
    """The code that training starts from; of a pruned weight only what is left becomes ternary (with one scale)."""
    if before is not None and before.kind == "sparse":
        left = torch.from_numpy(decode(before.parts[0])).reshape(1, -1)
        part = _start(replace(weight, matrix=left), config.model_copy(update={"group": 0}), edge, None)
        return Code("sparse", before.shape, before.numbers, before.arrays, (part, *before.parts[1:]))
    if before is not None and before.kind == "masked":
        return Code("masked", before.shape, before.numbers, before.arrays, (_start(weight, config, edge, None),))
    if edge:
        grid = RtnConfig(bits=config.edges, group=0)
        scale, zero = grid_of(weight.matrix, grid)
        half = 2 ** (config.edges - 1)
        q = torch.clamp(torch.round(weight.matrix / scale) + zero, 1, 2 * half - 1)
        return to_code(q, scale, None, grid)
    settings = TernaryConfig(fit=config.fit, per=config.per, group=config.group)
    return ternary_code(weight.matrix, ternary_scale(weight.matrix, settings), config.group)


def edge_names(spec: ModelSpec, config: TernaryQatConfig) -> set[str]:
    """Weights that stay finer: embeddings, the first and the last that compute, and narrow ones (depthwise convolutions, stems)."""
    weights = weights_of(spec)
    computing = [n for n, w in weights.items() if w.op != "embedding"]
    if not computing:
        raise InputError(f"ternary-qat: {spec.name} has only embeddings", "use rtn or gptq")
    ends = {computing[-1]} if len(computing) > 2 else set()
    return ends | {n for n, w in weights.items() if w.op == "embedding" or w.cols < config.least}


METHOD = TernaryQat()
