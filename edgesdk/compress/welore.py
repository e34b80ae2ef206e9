"""Ranks that differ from layer to layer: one threshold for all singular values, found by bisection, so that the model meets its size.

WeLore: "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients" (arXiv:2407.11239). What the threshold is on:

    spectra     σ_i / σ_1 of the weight itself, as in the paper; needs no data to choose the ranks
    outputs     σ_i² / Σσ² of the weight in the space of its inputs: a share of the layer's output energy
    gradients   σ_i² / (rows + cols) of the weight in the space of its inputs, each row times its mean squared gradient: the harm to the model's
                outputs that a singular value prevents, for each number stored for it. These add up over layers, so one threshold is the optimum
Layers that would not get smaller stay dense. The split layers are those of `lord`; the paper then trains only them (`lord.low_rank_parameters`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.lord import Layer, layers_of, split, told, unsplit, within, worth
from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.compress.weights import holders, weights_of
from edgesdk.errors import InputError

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

By = Literal["spectra", "outputs", "gradients"]


class WeloreConfig(Config):
    size: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of all the layers' weights that is kept
    by: By = "gradients"
    data: bool = True  # false: plain singular vectors and spectra, without calibration data
    only: str = ""  # a regular expression over the names of the weights


def worths(layer: Layer, by: By) -> torch.Tensor:
    """What each singular value is worth, falling."""
    if by == "spectra":
        values: torch.Tensor = torch.linalg.svdvals(layer.weight.matrix.double())
        return values / values[0].clamp_min(1e-30)
    squares = layer.spectrum.values**2
    if by == "outputs":
        return squares / squares.sum().clamp_min(1e-30)
    return squares / (layer.weight.rows + layer.weight.cols)


class Welore:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "welore"
    family: ClassVar[Family] = "low-rank"
    source: ClassVar[str] = "WeLore (arXiv:2407.11239): non-uniform ranks by one threshold; ours: on the harm to the outputs"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs", "gradients"})
    config: ClassVar[type[WeloreConfig]] = WeloreConfig

    def why_not(self, spec: ModelSpec, config: WeloreConfig) -> str | None:
        held = holders(spec)
        reasons = [unsplit(spec, w, held[n]) for n, w in weights_of(spec).items() if re.search(config.only, n)]
        return None if None in reasons else f"none of its layers can be split ({reasons[0] if reasons else 'no weight has such a name'})"

    def options(self, spec: ModelSpec) -> Sequence[WeloreConfig]:
        return [WeloreConfig(size=s) for s in (0.25, 0.5, 0.75)]

    def apply(self, spec: ModelSpec, config: WeloreConfig, step: Step) -> Change:
        by = config.by if config.data else "spectra"
        layers, refused = layers_of(spec, config.only, config.data, step, gradients=by == "gradients")
        if not layers:
            raise InputError("welore: no layer can be split", f"{next(iter(refused.items()), 'no weight has such a name')}")
        value = {n: worths(x, by) for n, x in layers.items()}
        most = max(float(v[0]) for v in value.values())

        def at(level: float) -> dict[str, int]:
            least = most * 10 ** (-12 * level)
            return worth(layers, {n: max(1, int((v >= least).sum())) for n, v in value.items()})

        ranks = within(layers, config.size, at)
        if not ranks:
            raise InputError(f"welore: no layer gets smaller at size={config.size}", "ask for a smaller size")
        return Change(tuple(split(spec, layers, ranks)), told(layers, ranks, refused))


METHOD = Welore()
