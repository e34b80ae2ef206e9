"""Sparsity by layer from forward passes alone: how much the outputs move when a layer's weights are shaken sets how much of it may go.

Source: ECoFLaP, "Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models" (arXiv:2310.02998). Coarse: for a weight matrix W and
random z, g² = E‖(f(W + εz) - f(W - εz)) / 2ε‖² / |W|, the mean squared gradient of the outputs (each over its standard deviation), without a backward
pass. Pruning W to X costs about g² · ‖(W - X) · x‖², so that one threshold over g · |w| · |x| shares a total out. Fine: any pruner of one layer.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.generated import Calls, stacked
from edgesdk.compress.layers import need_calibration
from edgesdk.compress.masks import input_sizes, largest, one_shot, prunable, report
from edgesdk.compress.pruning import stored
from edgesdk.compress.types import Change, Config, Family, Need, Stats, Step, Weight
from edgesdk.compress.weights import replaced, stats_of
from edgesdk.plan.fake_quant import samples

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


def felt(
    spec: ModelSpec,
    weights: Mapping[str, Weight],
    *,
    most: int = 8,
    draws: int = 2,
    size: float = 1e-2,
    seed: int = 0,
    step: Step | None = None,
) -> dict[str, float]:
    """Name → mean squared gradient of the outputs by one of its weights, from forward passes with the weights ± size · rms · noise."""
    generator = torch.Generator().manual_seed(seed)
    work = [(m, stack) for m in spec.methods for stack in stacked(samples(spec, m, most))]
    calls, answer = Calls(spec), {}

    def outputs() -> list[list[torch.Tensor]]:
        return [[o for o in calls(method, stack) if o.is_floating_point()] for method, stack in work]

    with torch.no_grad():
        scales = [[float(o.std(unbiased=False)) + 1e-6 for o in outs] for outs in outputs()]
        for i, (name, weight) in enumerate(weights.items()):
            if step:
                step(f"how much the outputs feel {name}", i / len(weights))
            width, total = size * float(weight.matrix.square().mean().sqrt()), 0.0
            if width == 0:
                answer[name] = 0.0
                continue
            for _ in range(draws):
                noise = width * torch.randn(weight.matrix.shape, generator=generator)
                with replaced(spec, {name: weight.matrix + noise}):
                    up = outputs()
                with replaced(spec, {name: weight.matrix - noise}):
                    down = outputs()
                for a, b, s in zip(up, down, scales, strict=True):
                    total += sum(float(((x - y) / (2 * width * z)).square().mean()) for x, y, z in zip(a, b, s, strict=True))
            answer[name] = total / (draws * len(work) * weight.matrix.numel())
    return answer


def scores_of(
    spec: ModelSpec, weights: Mapping[str, Weight], stats: Mapping[str, Stats], allocation: str, step: Step | None = None
) -> dict[str, torch.Tensor]:
    """What pruning each weight is taken to cost, comparable between layers: (|w| · |x|)² and, for "ecoflap", times g²."""
    scores = {n: (w.matrix * input_sizes(w, stats.get(n))).double().square() for n, w in weights.items()}
    if allocation == "ecoflap":
        size = felt(spec, weights, step=step)
        scores = {n: s * size[n] for n, s in scores.items()}
    return scores


def keeping(
    spec: ModelSpec,
    weights: Mapping[str, Weight],
    stats: Mapping[str, Stats],
    sparsity: float,
    allocation: str,
    *,
    least: float = 0.02,
    step: Step | None = None,
) -> dict[str, int]:
    """Name → how many weights stay, Σ exactly (1 - sparsity) of all, rounded. No layer loses more than all but `least` of its share
    and one weight in fifty, so that none is cut off."""
    total = sum(w.matrix.numel() for w in weights.values())
    left = max(1, round((1 - sparsity) * total))
    if allocation == "even":
        wanted = {n: (1 - sparsity) * w.matrix.numel() for n, w in weights.items()}
        counts = {n: int(v) for n, v in wanted.items()}
        for n in sorted(wanted, key=lambda n: counts[n] - wanted[n])[: left - sum(counts.values())]:
            counts[n] += 1
        return counts
    scores = scores_of(spec, weights, stats, allocation, step)
    floor = {n: max(1, min(w.matrix.numel(), int(min(least, 0.3 * (1 - sparsity)) * w.matrix.numel()))) for n, w in weights.items()}
    flat = []
    for n, score in scores.items():
        ordered = score.reshape(-1).sort(descending=True).values
        ordered[: floor[n]] = float("inf")
        flat.append(ordered)
    mask = largest(torch.cat(flat), max(left, sum(floor.values())))
    parts = torch.split(mask, [len(f) for f in flat])
    return {n: int(part.sum()) for n, part in zip(scores, parts, strict=True)}


def of_every_counts(
    spec: ModelSpec, weights: Mapping[str, Weight], stats: Mapping[str, Stats], n: int, m: int, allocation: str = "ecoflap",
    step: Step | None = None,
) -> dict[str, int]:  # fmt: skip
    """Name → how many of every m weights stay there, n of m on average over all weights or less, for the least total cost."""
    scores = scores_of(spec, weights, stats, allocation, step)
    curves, chosen = {}, dict.fromkeys(weights, m)
    heap: list[tuple[float, str]] = []
    for name, score in scores.items():
        padded = torch.nn.functional.pad(score, (0, -score.shape[1] % m)).reshape(-1, m)
        curves[name] = padded.sort(dim=1).values.sum(0).tolist()  # what the smallest, the next, … of all groups cost
        heapq.heappush(heap, (curves[name][0] / score.numel(), name))
    room = sum(w.matrix.numel() for w in weights.values()) * n / m
    while heap and sum(chosen[k] / m * w.matrix.numel() for k, w in weights.items()) > room + 1e-9:
        _, name = heapq.heappop(heap)
        chosen[name] -= 1
        if chosen[name] > 1:
            heapq.heappush(heap, (curves[name][m - chosen[name]] / scores[name].numel(), name))
    return chosen


class EcoflapConfig(Config):
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.6  # share of the weights of linears and convolutions that become 0
    local: Literal["fit", "inputs"] = "fit"  # the pruner of a layer: chosen and fitted by second moments, or by |w| · |x| alone (Wanda)
    only: str = ""  # a regular expression over the names of the weights
    store: Literal["float16", "float32"] = "float16"


class Ecoflap:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "ecoflap"
    family: ClassVar[Family] = "pruning"
    source: ClassVar[str] = "ECoFLaP (arXiv:2310.02998)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[EcoflapConfig]] = EcoflapConfig

    def why_not(self, spec: ModelSpec, config: EcoflapConfig) -> str | None:
        return need_calibration(spec)

    def options(self, spec: ModelSpec) -> Sequence[EcoflapConfig]:
        return [EcoflapConfig(sparsity=s) for s in (0.8, 0.7, 0.6, 0.5)]

    def apply(self, spec: ModelSpec, config: EcoflapConfig, step: Step) -> Change:
        """No gradient is taken and nothing is trained."""
        weights = prunable(spec, config.only)
        stats = stats_of(spec, step=step)
        counts = keeping(spec, weights, stats, config.sparsity, "ecoflap", step=step)
        choices = {n: partial(largest, keep=counts[n]) for n in weights}
        masks = one_shot(spec, weights, stats, choices, step, inputs=True, fit=config.local == "fit")
        return Change((), report(weights, masks), stored(spec, masks, config.store == "float16"))


METHOD: Any = Ecoflap()
