"""Whole blocks left out: those that the model's outputs, or the stream that runs through them, miss least.

Source: "Entropy-Based Block Pruning for Efficient Large Language Models" (arXiv:2504.03794): a block that changes the entropy of the hidden
representation little adds little. Scores: "entropy", |H(out) - H(in)| with H of a histogram of all values, in nats, bins the same for all blocks;
"similarity", 1 - cos(in, out) averaged over positions (as ShortGPT, arXiv:2403.03853); "output", the mean squared change of the outputs, over their
variance, when the block is left out (forward passes only). One block leaves at a time, then the others are scored again.

A block is an entry of a list of modules of one class; it is taken out of its list, a layer of a sequence model with its caches. Where a model
cannot stand that, a block that gives the shape it gets becomes the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from edgesdk.compress.fewer_layers import STACKS, Lost, lost_of
from edgesdk.compress.generated import chain_of
from edgesdk.compress.shrink import copy_of
from edgesdk.compress.surgery import Edit, apply_edits
from edgesdk.compress.training import TrainConfig, trained
from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.errors import InputError
from edgesdk.plan.fake_quant import samples
from edgesdk.sequence.card import NAME

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class DepthConfig(Config):
    blocks: Annotated[int, Field(ge=1, le=200)] = 1  # to leave out
    score: Literal["entropy", "similarity", "output"] = "entropy"
    tune: Annotated[int, Field(ge=0, le=20000)] = 0  # steps of training towards the whole model's outputs
    rate: Annotated[float, Field(gt=0, le=1)] = 0.01  # of training
    only: str = ""  # blocks whose path begins so


@dataclass(frozen=True)
class Removal:
    """How a block leaves: its path, the edit, and, of a sequence model, what its methods lose."""

    path: str
    edit: Edit
    lost: dict[str, Lost] = field(default_factory=dict)


class Depth:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "depth"
    family: ClassVar[Family] = "pruning"
    source: ClassVar[str] = "Entropy-Based Block Pruning (arXiv:2504.03794), ShortGPT (arXiv:2403.03853)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[DepthConfig]] = DepthConfig

    def why_not(self, spec: ModelSpec, config: DepthConfig) -> str | None:
        if spec.calibration is None:
            return "it has no calibration data"
        return None if blocks_of(spec, config.only) else "it has no list of blocks of one class"

    def options(self, spec: ModelSpec) -> Sequence[DepthConfig]:
        return [DepthConfig(blocks=n) for n in range(min(3, max(1, len(blocks_of(spec)) - 1)), 0, -1)]

    def apply(self, spec: ModelSpec, config: DepthConfig, step: Step) -> Change:
        whole = copy_of(spec)
        edits: list[Edit] = []
        notes: list[str] = []
        for i in range(config.blocks):
            step(f"weighing blocks ({i + 1} of {config.blocks})", i / config.blocks)
            choices = [r for path in blocks_of(spec, config.only) if (r := removal(spec, path)) is not None]
            costs = scores(spec, choices, config.score)
            if not costs:
                raise InputError(
                    f"{spec.name}: after {i} of {config.blocks} blocks no further one can be left out",
                    "ask for fewer, or for another score",
                )
            best = min(choices, key=lambda r: costs.get(r.path, float("inf")))
            apply_edits(spec, [best.edit])
            edits.append(best.edit)
            notes.append(f"{best.path} left out: {config.score} {costs[best.path]:.4g}, the next best {_second(costs):.4g}")
        if config.tune:
            if chain_of(whole) is None and any(e["path"] == "core.decoder" for e in edits):
                raise InputError(
                    f"{spec.name}: tune = {config.tune}, but its answers are not trained whole",
                    "those of windows, batches and int8 caches are not: leave tune out",
                )
            taught = TrainConfig(steps=config.tune, rate=config.rate)
            notes.append(trained(spec, taught, step, teacher=whole, name=self.name).note(self.name, config.tune))
        return Change(tuple(edits), tuple(notes), calibration=spec.calibration)


def _second(costs: dict[str, float]) -> float:
    return sorted(costs.values())[min(1, len(costs) - 1)]


def blocks_of(spec: ModelSpec, only: str = "") -> list[str]:
    """The paths of all entries of lists that hold two or more modules of one class with weights; not what lies within them."""
    found: list[str] = []
    for entry in spec.methods.values():
        for path, module in entry.module.named_modules():
            if isinstance(module, nn.ModuleList | nn.Sequential) and not any(path.startswith(f + ".") for f in found):
                kinds = [type(m) for m in module]
                names = [
                    f"{path}.{i}" if path else str(i)
                    for i, k in enumerate(kinds)
                    if kinds.count(k) > 1 and any(True for _ in module[i].parameters())
                ]
                found += [
                    n
                    for n in names
                    if n not in found and not isinstance(module[int(n.rpartition(".")[2])], nn.Linear | nn.Conv1d | nn.Conv2d)
                ]
    return [f for f in found if f.startswith(only)]


# ---- taking one out


def removal(spec: ModelSpec, path: str) -> Removal | None:
    """How the block can leave, tried on a copy; None where the model does not stand it."""
    parent, _, number = path.rpartition(".")
    stack = parent.removesuffix(".layers")
    if NAME in spec.files and stack in STACKS:
        choices = [Removal(path, {"do": "layers", "path": stack, "index": [int(number)]}, lost_of(spec, stack, [int(number)]))]
    else:
        choices = [Removal(path, {"do": "drop", "path": parent, "index": [int(number)]}), Removal(path, {"do": "skip", "path": path})]
    return next((r for r in choices if _stands(spec, r)), None)


def _stands(spec: ModelSpec, choice: Removal) -> bool:
    """Whether every method still runs, and answers in the shapes that it should."""
    trial = copy_of(spec)
    try:
        apply_edits(trial, [choice.edit])
        return all([a.shape for a in had] == [b.shape for b in made] for _, had, made in answers(spec, trial, choice))
    except (InputError, RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return False


def answers(
    spec: ModelSpec, trial: ModelSpec, choice: Removal, most: int = 0
) -> Iterator[tuple[str, list[torch.Tensor], list[torch.Tensor]]]:
    """Method, its outputs (without those that leave) and those of the model without the block: for `most` calibration inputs, or the example."""
    with torch.no_grad():
        for method, entry in spec.methods.items():
            lost = choice.lost.get(method, Lost())
            for given in samples(spec, method, most) if most else [entry.example_inputs]:
                outs = entry.module(*given), trial.methods[method].module(*lost.given(given))
                had, made = (list(o) if isinstance(o, tuple | list) else [o] for o in outs)
                yield method, lost.made(had), made


# ---- scores


def scores(spec: ModelSpec, choices: Sequence[Removal], score: str, most: int = 12) -> dict[str, float]:
    """Block path → what leaving it out is taken to cost; blocks that cannot be scored are left out."""
    if score == "output":
        return {r.path: moved(spec, r, most) for r in choices}
    streams = {r.path: stream(spec, r.path, most) for r in choices}
    known = {p: s for p, s in streams.items() if s}
    if score == "similarity":
        return {p: sum(float((1 - nn.functional.cosine_similarity(a, b, dim=-1)).mean()) for a, b in s) / len(s) for p, s in known.items()}
    reach = max((float(x.abs().max()) for s in known.values() for pair in s for x in pair), default=1.0) or 1.0
    return {p: sum(abs(entropy(b, reach) - entropy(a, reach)) for a, b in s) / len(s) for p, s in known.items()}


def entropy(x: torch.Tensor, reach: float, bins: int = 512) -> float:
    """Of a histogram of all values in ± reach, in nats."""
    share = torch.histc(x.float(), bins, -reach, reach) / x.numel()
    return float(-(share * share.clamp_min(1e-12).log()).sum())


def moved(spec: ModelSpec, choice: Removal, most: int) -> float:
    """The squared change of all float outputs, over their variance, the mean over outputs, methods and inputs."""
    trial = copy_of(spec)
    apply_edits(trial, [choice.edit])
    total, count = 0.0, 0
    for _, had, made in answers(spec, trial, choice, most):
        for a, b in zip(had, made, strict=True):
            if a.is_floating_point():
                total, count = total + float((a - b).square().mean() / (a.var(unbiased=False) + 1e-9)), count + 1
    return total / max(1, count)


def stream(spec: ModelSpec, path: str, most: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What runs into a block and out of it, of every call: the first input of the first module called within it, and that of the first one after."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for method, entry in spec.methods.items():
        calls: list[tuple[bool, Any]] = []
        with ExitStack() as undo, torch.no_grad():
            for name, module in entry.module.named_modules():
                inside = name == path or name.startswith(path + ".")

                def note(m: Any, inputs: Any, inside: bool = inside, calls: list[tuple[bool, Any]] = calls) -> None:
                    calls.append((inside, inputs[0].detach() if inputs and isinstance(inputs[0], torch.Tensor) else None))

                undo.callback(module.register_forward_pre_hook(note).remove)
            for sample in samples(spec, method, most):
                calls.clear()
                out = entry.module(*sample)
                at = [i for i, (inside, _) in enumerate(calls) if inside]
                last = next((o for o in (out if isinstance(out, tuple | list) else (out,)) if o.is_floating_point()), None)
                if at:
                    a, b = calls[at[0]][1], calls[at[-1] + 1][1] if at[-1] + 1 < len(calls) else last
                    if a is not None and b is not None and a.shape == b.shape and a.is_floating_point():
                        found.append((a, b))
    return found


METHOD: Any = Depth()
