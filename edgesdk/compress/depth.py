"""Whole blocks left out: those that the model's outputs, or the stream that runs through them, miss least.

Source: "Entropy-Based Block Pruning for Efficient Large Language Models" (arXiv:2504.03794): a block that changes the entropy of the hidden
representation little adds little. Scores: "entropy", |H(out) - H(in)| with H of a histogram of all values, in nats, bins the same for all blocks;
"similarity", 1 - cos(in, out) averaged over positions (as ShortGPT, arXiv:2403.03853); "output", the mean squared change of the outputs, over their
variance, when the block is left out (forward passes only). One block leaves at a time, then the others are scored again.

A block is an entry of a list of modules of one class; it is taken out of its list, and caches that have a row for each layer lose its row,
in every method at once. Where a model cannot stand that, a block that gives the shape it gets becomes the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from edgesdk.compress.generated import chain_of
from edgesdk.compress.shrink import copy_of
from edgesdk.compress.surgery import Edit, apply_edits, narrowed
from edgesdk.compress.training import TrainConfig, trained
from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.errors import InputError
from edgesdk.plan.fake_quant import samples

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
    """How a block leaves: its path, the edits, and the outputs that have fewer rows then, as (method, output, dim, rows left)."""

    path: str
    edits: tuple[Edit, ...]
    outputs: tuple[tuple[str, int, int, tuple[int, ...]], ...] = ()


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
        gone: list[tuple[str, int, int, tuple[int, ...]]] = []
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
            apply_edits(spec, best.edits)
            edits += best.edits
            gone += best.outputs
            notes.append(f"{best.path} left out: {config.score} {costs[best.path]:.4g}, the next best {_second(costs):.4g}")
        if config.tune:
            student, teacher = (spec, whole) if chain_of(whole) else paired(spec, whole, edits, gone)
            taught = TrainConfig(steps=config.tune, rate=config.rate)
            notes.append(trained(student, taught, step, teacher=teacher, name=self.name).note(self.name, config.tune))
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


def ran(spec: ModelSpec) -> dict[str, list[torch.Tensor] | None]:
    """All outputs of every method for its example inputs; None for a method that fails."""
    answer: dict[str, list[torch.Tensor] | None] = {}
    with torch.no_grad():
        for name, entry in spec.methods.items():
            try:
                out = entry.module(*entry.example_inputs)
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
                answer[name] = None
                continue
            answer[name] = list(out) if isinstance(out, tuple | list) else [out]
    return answer


def removal(spec: ModelSpec, path: str) -> Removal | None:
    """How the block can leave, tried on a copy; None where the model does not stand it."""
    parent, _, number = path.rpartition(".")
    before = ran(spec)
    trial = copy_of(spec)
    edits: list[Edit] = [{"do": "drop", "path": parent, "index": [int(number)]}]
    changed: dict[tuple[str, int], tuple[int, tuple[int, ...]]] = {}
    try:
        apply_edits(trial, edits)
        while True:
            after = ran(trial)
            fewer = _fewer(before, after, int(number))
            if fewer is None:
                break
            changed |= fewer
            more = _inputs(spec, trial, before, changed)
            if not more:
                if all(o is not None for o in after.values()):
                    return Removal(path, tuple(edits), tuple((m, i, d, kept) for (m, i), (d, kept) in changed.items()))
                break
            apply_edits(trial, more)
            edits += more
    except (InputError, RuntimeError, IndexError):
        pass
    trial, skip = copy_of(spec), {"do": "skip", "path": path}
    apply_edits(trial, [skip])
    after = ran(trial)
    if all(
        o is not None and b is not None and [x.shape for x in o] == [x.shape for x in b]
        for o, b in zip(after.values(), before.values(), strict=True)
    ):
        return Removal(path, (skip,))
    return None


def _fewer(
    before: dict[str, list[torch.Tensor] | None], after: dict[str, list[torch.Tensor] | None], number: int
) -> dict[tuple[str, int], tuple[int, tuple[int, ...]]] | None:
    """Outputs that lost one row: (method, output) → (dim, rows left). None where an output changed in any other way."""
    found = {}
    for method, made in after.items():
        had = before[method]
        if made is None or had is None:
            continue
        if len(made) != len(had):
            return None
        for i, (a, b) in enumerate(zip(had, made, strict=True)):
            differ = [d for d in range(a.dim()) if a.dim() == b.dim() and a.shape[d] != b.shape[d]]
            if a.dim() != b.dim() or len(differ) > 1:
                return None
            if differ:
                size = a.shape[differ[0]]
                if b.shape[differ[0]] != size - 1 or number >= size:
                    return None
                found[method, i] = (differ[0], tuple(k for k in range(size) if k != number))
    return found


def _inputs(
    spec: ModelSpec,
    trial: ModelSpec,
    before: dict[str, list[torch.Tensor] | None],
    changed: dict[tuple[str, int], tuple[int, tuple[int, ...]]],
) -> list[Edit]:
    """Edits for inputs that have the shape of an output that lost a row, and still have it."""
    shapes = {tuple((before[m] or [])[i].shape): how for (m, i), how in changed.items()}
    edits: list[Edit] = []
    for method, entry in trial.methods.items():
        for i, x in enumerate(entry.example_inputs):
            how = shapes.get(tuple(x.shape))
            if how is not None and x.is_floating_point() and x.shape == spec.methods[method].example_inputs[i].shape:
                edits.append({"do": "inputs", "path": "", "method": method, "input": i, "dim": how[0], "index": list(how[1])})
    return edits


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
    """The squared change of all float outputs, over their variance, the mean over outputs, methods and inputs. Of the caches that
    layers share, the rows that stay are compared: what comes after is read from them."""
    trial = copy_of(spec)
    apply_edits(trial, choice.edits)
    fewer = {(m, i): (dim, index) for m, i, dim, index in choice.outputs}
    total, count = 0.0, 0
    with torch.no_grad():
        for method, entry in spec.methods.items():
            for given, less in zip(samples(spec, method, most), samples(trial, method, most), strict=True):
                outs = (entry.module(*given), trial.methods[method].module(*less))
                had, made = (list(o) if isinstance(o, tuple | list) else [o] for o in outs)
                for i, (a, b) in enumerate(zip(had, made, strict=True)):
                    if (method, i) in fewer:
                        a = narrowed(a, *fewer[method, i])
                    if a.is_floating_point() and a.shape == b.shape:
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


# ---- training behind it


class _Fewer(nn.Module):
    """A method that is given, or gives, more rows than the other takes."""

    def __init__(self, module: nn.Module, inputs: Sequence[tuple[int, int, Any]], outputs: Sequence[tuple[int, int, Any]]) -> None:
        super().__init__()
        self.module, self.inputs, self.outputs = module, inputs, outputs

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = list(given)
        for i, dim, index in self.inputs:
            rows[i] = narrowed(rows[i], dim, index)
        out = self.module(*rows)
        made = list(out) if isinstance(out, tuple | list) else [out]
        for i, dim, index in self.outputs:
            made[i] = narrowed(made[i], dim, index)
        return tuple(made)


def paired(
    spec: ModelSpec, whole: ModelSpec, edits: Sequence[Edit], gone: Sequence[tuple[str, int, int, tuple[int, ...]]]
) -> tuple[ModelSpec, ModelSpec]:
    """The shortened model and the whole one where their methods are trained each for itself: given the same inputs they answer in the same shapes."""
    student, teacher = {}, {}
    for method, entry in whole.methods.items():
        inputs = [(e["input"], e["dim"], e["index"]) for e in edits if e["do"] == "inputs" and e["method"] == method]
        outputs = [(i, dim, index) for m, i, dim, index in gone if m == method]
        student[method] = replace(entry, module=_Fewer(spec.methods[method].module, inputs, ()))
        teacher[method] = replace(entry, module=_Fewer(entry.module, (), outputs))
    return replace(whole, methods=student), replace(whole, methods=teacher)


METHOD: Any = Depth()
