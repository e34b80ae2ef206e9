"""Low rank in one shot: a layer becomes two thinner ones wherever that is less arithmetic. The model keeps dense kernels only, and can be trained on.

LORD: "Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression" (arXiv:2309.14021), with the activation-whitened SVD of `svd`.
A linear in → out becomes in → r → out, a convolution k×k in → out becomes k×k in → r, then 1×1 r → out; only where r·(rows + cols) < rows·cols.
Where the layer has a bias, it takes up the mean error of the outputs, and only the inputs' deviation from their mean is decomposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from edgesdk.compress.surgery import apply_edits
from edgesdk.compress.svd import Spectrum, even_rank, space_of, spectrum_of
from edgesdk.compress.types import Change, Config, Family, Need, Stats, Step, Weight
from edgesdk.compress.weights import holders, stats_of, weights_of
from edgesdk.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from edgesdk.compress.pipeline import Compressed
    from edgesdk.model import ModelSpec


@dataclass(frozen=True)
class Layer:
    """A layer that can be split: its weight, inputs and spectrum, and every path that leads to its module."""

    weight: Weight
    stats: Stats | None
    spectrum: Spectrum
    paths: tuple[str, ...]
    bias: bool


def unsplit(spec: ModelSpec, weight: Weight, uses: Sequence[tuple[str, str, Any]]) -> str | None:
    """Why a weight's layer cannot become two, or None."""
    if weight.op == "embedding" or weight.tied:
        return "an embedding, or tied to one"
    if weight.groups > 1:
        return "its channels are in groups"
    if len({id(m) for _, _, m in uses}) > 1:
        return "several layers share it"
    if not uses[0][1]:
        return "it is the whole model"
    if getattr(uses[0][2], "padding_mode", "zeros") != "zeros":
        return f"its padding is {uses[0][2].padding_mode}"
    if even_rank(weight.rows, weight.cols) < 1:
        return f"two factors of {weight.rows}x{weight.cols} are never smaller than it"
    return None


def layers_of(spec: ModelSpec, only: str, data: bool, step: Step, gradients: bool = False) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that can be split, by weight name, and why the others cannot. Raises `InputError` without calibration data where `data`.

    With `gradients` the rows of a layer count by how much the model's outputs depend on them, so that errors of layers can be added.
    """
    stats = stats_of(spec, gradients=gradients, step=step) if data else {}
    held, found, refused = holders(spec), {}, {}
    for name, weight in weights_of(spec).items():
        if not re.search(only, name):
            continue
        reason = unsplit(spec, weight, held[name])
        if reason is None and data and name not in stats:
            reason = "it is never called as a module"
        if reason:
            refused[name] = reason
            continue
        module, seen = held[name][0][2], stats.get(name)
        bias = getattr(module, "bias", None) is not None
        space = space_of(seen, centred=bias, rows=row_weights(seen) if gradients and seen else None)
        found[name] = Layer(weight, seen, spectrum_of(weight.matrix, space), _paths(spec, module), bias)
    return found, refused


def row_weights(stats: Stats) -> torch.Tensor | None:
    """What a squared error of each output row does to the model's outputs: its mean squared gradient, summed over a sample's positions.

    The gradient of a weight is that of its row times its input, so fisher[r, c] = E[g_r²] · E[x_c²] where the two are independent.
    """
    if stats.fisher is None:
        return None
    size = float(stats.gram[0].diagonal().sum())
    weights = stats.fisher.double().sum(1) / max(size, 1e-30)
    return weights if float(weights.max()) > 0 else None


def _paths(spec: ModelSpec, module: Any) -> tuple[str, ...]:
    paths = [p for e in spec.methods.values() for p, m in e.module.named_modules(remove_duplicate=False) if m is module]
    return tuple(dict.fromkeys(paths))


def split(spec: ModelSpec, layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> list[dict[str, Any]]:
    """Make two layers of each that has a rank, in place, and set their weights; the edits that make the same shapes again."""
    held, edits = holders(spec), []
    with torch.no_grad():
        for name, rank in ranks.items():
            layer, (method, path, _) = layers[name], held[name][0]
            left, right = layer.spectrum.factors(rank)
            made = [{"do": "split", "path": p, "rank": rank} for p in layer.paths]
            apply_edits(spec, made)
            edits += made
            pair: Any = spec.methods[method].module.get_submodule(path)
            down, up = pair
            down.weight.copy_(right.reshape(down.weight.shape))
            up.weight.copy_(left.reshape(up.weight.shape))
            if layer.bias and layer.stats is not None:
                missing = layer.weight.matrix.double() - left @ right
                up.bias += (missing @ layer.stats.mean.double()).to(up.bias.dtype)
    return edits


def told(layers: Mapping[str, Layer], ranks: Mapping[str, int], refused: Mapping[str, str]) -> tuple[str, ...]:
    """What was done, for people."""
    before, after = numbers(layers, {}), numbers(layers, ranks)
    dense = [n for n in layers if n not in ranks]
    lines = [
        f"{len(ranks)} of {len(layers)} layers split in two: {after / max(1, before):.1%} of their weights and multiplications are left"
    ]
    lines += [f"{n}: rank {r} of {min(layers[n].weight.rows, layers[n].weight.cols)}" for n, r in ranks.items()]
    lines += [f"{n}: left dense, no rank within the settings is smaller" for n in dense]
    return (*lines, *(f"{n}: left as it is, {reason}" for n, reason in refused.items()))


def numbers(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> int:
    """How many weights are left when the layers in `ranks` are split."""
    return sum(ranks[n] * (x.weight.rows + x.weight.cols) if n in ranks else x.weight.matrix.numel() for n, x in layers.items())


def worth(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> dict[str, int]:
    """Only the ranks that make a layer smaller."""
    return {n: r for n, r in ranks.items() if r <= even_rank(layers[n].weight.rows, layers[n].weight.cols)}


def within(layers: Mapping[str, Layer], size: float, ranks_at: Callable[[float], dict[str, int]]) -> dict[str, int]:
    """`ranks_at(level)` for the greatest level in 0..1 that leaves at most `size` of the layers' weights (by bisection: more level, more rank).

    Raises `InputError` where even level 0 leaves more.
    """
    whole = sum(x.weight.matrix.numel() for x in layers.values())
    room, low, high = size * whole, 0.0, 1.0
    least = numbers(layers, ranks_at(0.0))
    if least > room:
        raise DoesNotFit(f"size={size}: the smallest ranks leave {least / whole:.1%} of the layers' weights", "ask for a larger size")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if numbers(layers, ranks_at(middle)) <= room else (low, middle)
    return ranks_at(low)


class LordConfig(Config):
    rank: Annotated[int, Field(ge=1)] | None = None  # the same for all
    energy: Annotated[float, Field(gt=0, le=1)] | None = None  # share of each layer's output energy that is kept
    size: Annotated[float, Field(gt=0, lt=1)] | None = None  # share of all the layers' weights that is kept, at equal energy
    data: bool = True  # weigh by the calibration inputs
    only: str = ""  # a regular expression over the names of the weights

    @model_validator(mode="after")
    def _one(self) -> LordConfig:
        if sum(v is not None for v in (self.rank, self.energy, self.size)) != 1:
            raise ValueError("give one of rank, energy and size")
        return self


class Lord:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "lord"
    family: ClassVar[Family] = "low-rank"
    source: ClassVar[str] = "LORD (arXiv:2309.14021); whitening as SVD-LLM (arXiv:2403.07378)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[LordConfig]] = LordConfig

    def why_not(self, spec: ModelSpec, config: LordConfig) -> str | None:
        held = holders(spec)
        reasons = [unsplit(spec, w, held[n]) for n, w in weights_of(spec).items() if re.search(config.only, n)]
        return None if None in reasons else f"none of its layers can be split ({reasons[0] if reasons else 'no weight has such a name'})"

    def options(self, spec: ModelSpec) -> Sequence[LordConfig]:
        return [LordConfig(energy=e) for e in (0.95, 0.98, 0.99, 0.995)]

    def apply(self, spec: ModelSpec, config: LordConfig, step: Step) -> Change:
        layers, refused = layers_of(spec, config.only, config.data, step)

        def at(energy: float) -> dict[str, int]:
            return worth(layers, {n: x.spectrum.rank_for(energy) for n, x in layers.items()})

        if config.size is not None:
            ranks = within(layers, config.size, at)
        elif config.energy is not None:
            ranks = at(config.energy)
        else:
            ranks = worth(layers, dict.fromkeys(layers, config.rank or 1))
        if not ranks:
            raise InputError("lord: no layer gets smaller at these settings", "ask for less energy, a smaller size or a smaller rank")
        return Change(tuple(split(spec, layers, ranks)), told(layers, ranks, refused))


def low_rank_parameters(made: Compressed) -> list[torch.nn.Parameter]:
    """The factors of the layers that were split, for training them alone (WeLore): everything else can be left without gradients."""
    paths = {e["path"] for e in made.report.edits if e["do"] == "split"}
    found = {id(p): p for e in made.spec.methods.values() for path, m in e.module.named_modules() if path in paths for p in m.parameters()}
    return list(found.values())


METHOD = Lord()
