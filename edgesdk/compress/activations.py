"""W8A8, W4A8, W4A4: weights and activations rounded together, and the layouts that bear it.

Source: Understanding INT4 Quantization for Transformer Models (arXiv:2301.12017): W4A4 is near lossless for encoder-only and encoder-decoder models
and loses much in decoder-only ones, which are refused here unless `force` is set. Activations are rounded row by row at run time (each row its own
range, zero included); with 4 bits a share of the range is cut off where that loses less on calibration inputs. Weights are rounded by second
order to symmetric grids for the inputs as they will be. A program holds the rounding of activations as operators of its own; runtimes with
int8 activations of their own (8da8w, 8da4w) are better served by `edgesdk plan`, which counts on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.gptq import GptqConfig, fixed
from edgesdk.compress.layers import inputs_of, layers_of, lost, need_calibration, none_found, round_matrix, round_rows
from edgesdk.compress.surgery import apply_edits
from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.compress.weights import holders, set_weight, stats_of, weights_of
from edgesdk.packed import Code, decode

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class ActivationsConfig(Config):
    weights: Literal[0, 4, 8] = 8  # bits; 0: left to other stages of the recipe
    activations: Literal[4, 8] = 8  # bits
    group: Annotated[int, Field(ge=0)] = 0  # columns that share a scale; 0: a whole row
    force: bool = False  # 4-bit activations in a decoder-only model all the same
    only: str = ""  # a regular expression over names of weights


class Activations:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "activations"
    family: ClassVar[Family] = "integer"
    source: ClassVar[str] = "Understanding INT4 Quantization for Transformer Models (arXiv:2301.12017)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[ActivationsConfig]] = ActivationsConfig

    def why_not(self, spec: ModelSpec, config: ActivationsConfig) -> str | None:
        if spec.layout == "decoder-only" and config.activations < 8 and not config.force:
            return (
                "it is decoder-only, where 4-bit activations lose much (arXiv:2301.12017); use activations=8 (W4A8), "
                "another layout (`edgesdk layouts`), or force=true"
            )
        return need_calibration(spec)

    def options(self, spec: ModelSpec) -> Sequence[ActivationsConfig]:
        made = [
            ActivationsConfig(weights=8, activations=8),
            ActivationsConfig(weights=4, activations=8),
            ActivationsConfig(weights=4, activations=4),
        ]
        return [c for c in made if self.why_not(spec, c) is None]

    def apply(self, spec: ModelSpec, config: ActivationsConfig, step: Step) -> Change:
        inputs, modules = inputs_of(spec), layers_of(spec)
        chosen = [n for n in modules if n in inputs and re.search(config.only, n)]
        if not chosen:
            raise none_found(spec, config.only)
        edits: list[dict[str, Any]] = []
        for i, name in enumerate(chosen):
            step(f"ranges of the inputs of {name}", 0.3 * i / len(chosen))
            module = modules[name]
            matrix = module.weight.detach().reshape(module.weight.shape[0], -1).float()
            share = _share(inputs[name], matrix, config) if config.activations < 8 else 1.0
            for path in dict.fromkeys(p for _, p, m in holders(spec)[name] if not isinstance(m, torch.nn.Embedding)):
                edits.append({"do": "round", "path": path, "bits": config.activations, "share": share})
        moved = {name: holders(spec)[name][0][2] for name in chosen}
        apply_edits(spec, edits)
        bits = f"W{config.weights}A{config.activations}" if config.weights else f"activations of {config.activations} bits"
        notes = [f"{bits} in {len(chosen)} layers"]
        if spec.layout == "decoder-only" and config.activations < 8:
            notes.append("4-bit activations were forced on a decoder-only model: expect a large loss (arXiv:2301.12017)")
        return Change(tuple(edits), tuple(notes), self._coded(spec, set(map(id, moved.values())), config, step))

    def _coded(self, spec: ModelSpec, modules: set[int], config: ActivationsConfig, step: Step) -> dict[str, Code]:
        """The layers' weights for the rounded inputs."""
        if not config.weights:
            return {}
        codes, weights, stats = {}, weights_of(spec), stats_of(spec, step=step)
        names = [n for n, uses in holders(spec).items() if {id(m) for _, _, m in uses} & modules and n in stats]
        for i, name in enumerate(names):
            step(f"rounding {name}", 0.5 + 0.5 * i / len(names))
            weight = replace(weights[name], kept=None)
            codes[name] = fixed(weight, stats[name], GptqConfig(bits=config.weights, group=config.group))
            set_weight(spec, name, torch.from_numpy(decode(codes[name])))
        return codes


def _share(x: torch.Tensor, matrix: torch.Tensor, config: ActivationsConfig) -> float:
    """How much of every row's range to keep: that of least output error."""
    made = round_matrix(matrix, config.weights, config.group)
    shares = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
    return min(shares, key=lambda s: lost(x, matrix, round_rows(x, config.activations, s), made))


METHOD = Activations()
