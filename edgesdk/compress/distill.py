"""`distill`: training of a smaller model towards the one it was made from (after pruning or low rank), and of a student of any other architecture.

Sources: Distiller (arXiv:2109.11105), which makes a pipeline of augmentation, a loss on the outputs and one on intermediate values, and recommends
one; One-for-All (arXiv:2310.19444) for stages of different architectures. Weight perturbation (noise on the student's weights in every step, towards flat
minima) as in low-rank recovery by feature distillation. Ours: no labels; sequence models are trained over whole answers (see `lessons`).
`student` trains another model, also one of another layout (a decoder-only teacher, an encoder-decoder student).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.features import Comparison, Kind
from edgesdk.compress.generated import Values
from edgesdk.compress.lessons import Lessons, Set
from edgesdk.compress.training import Outcome, TrainConfig, Training, free_parameters, lessons_of, teacher_of, why_no_training
from edgesdk.compress.types import Change, Family, Need, Step
from edgesdk.errors import InputError

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

Pairs = Sequence[tuple[str, str]]


class DistillConfig(TrainConfig):
    rate: Annotated[float, Field(gt=0, le=1)] = 0.003  # a student that starts from nothing wants about 0.1
    features: Literal["none", "mse", "cka", "mi", "stages", "auto"] = "none"  # "auto": tries each shortly and takes the best
    weight: Annotated[float, Field(ge=0)] = 1.0  # of the features' loss
    perturb: Annotated[float, Field(ge=0, le=1)] = 0.0  # noise on the weights, as a share of their size
    stages: str = ""  # a regular expression over module names that are compared; by default up to 4 blocks that both models have


@dataclass(frozen=True)
class Pupil:
    """A student, its teacher, and the stages (student's, teacher's module paths) that are compared."""

    spec: ModelSpec
    teacher: ModelSpec
    pairs: tuple[tuple[str, str], ...]


class Distill:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "distill"
    family: ClassVar[Family] = "recovery"
    source: ClassVar[str] = "Distiller (arXiv:2109.11105), One-for-All (arXiv:2310.19444)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[DistillConfig]] = DistillConfig

    def why_not(self, spec: ModelSpec, config: DistillConfig) -> str | None:
        if not free_parameters(spec, spec.codes):
            return "all of it is stored as codes (qat trains those)"
        return why_no_training(spec, config)

    def options(self, spec: ModelSpec) -> Sequence[DistillConfig]:
        return [DistillConfig(steps=s) for s in (100, 300, 1000)]

    def apply(self, spec: ModelSpec, config: DistillConfig, step: Step) -> Change:
        teacher = teacher_of(spec)
        pupil = Pupil(spec, teacher, tuple((p, p) for p in common_stages(spec, teacher, config.stages)))
        notes: list[str] = []
        if config.features == "auto":
            ranking = recommend(pupil, config, step=step)
            notes.append("distill: tried " + ", ".join(f"{kind} ({loss:.4g})" for kind, loss in ranking))
            config = config.model_copy(update={"features": ranking[0][0]})
        outcome = teach(pupil, config, step)
        return Change((), (*notes, outcome.note(f"distill ({config.features})", config.steps)))


def student(
    model: ModelSpec, teacher: ModelSpec, config: DistillConfig | None = None, *, stages: Pairs = (), step: Step | None = None
) -> tuple[ModelSpec, Outcome]:
    """A trained copy of `model`, which learns what `teacher` answers to the teacher's calibration inputs.

    `stages`: pairs of module paths (student's, teacher's) whose values are compared; widths and kinds may differ.
    Raises `InputError`: other methods or outputs than the teacher's, nothing to train on.
    """
    config = config or DistillConfig()
    pupil = Pupil(replace(model, methods=copy.deepcopy(model.methods), codes={}), teacher, tuple(stages))
    if config.features not in ("none", "auto") and not stages:
        raise InputError(f"features={config.features}: no stages to compare", "name pairs of modules: stages=[(student's, teacher's), …]")
    if config.features == "auto":
        config = config.model_copy(update={"features": recommend(pupil, config, step=step)[0][0]})
    outcome = teach(pupil, config, step or (lambda text, share: None))
    return pupil.spec, outcome


def teach(pupil: Pupil, config: DistillConfig, step: Step) -> Outcome:
    """Train `pupil.spec` in place."""
    spec, teacher = pupil.spec, pupil.teacher
    lessons = lessons_of(spec, config, teacher)
    free = free_parameters(spec, spec.codes)
    try:
        compared = _Stages(pupil, lessons, config) if config.features != "none" and config.weight > 0 else None

        def loss(n: int, _: Values) -> torch.Tensor:
            values = _disturbed(spec, free, config.perturb, config.seed * 7919 + n) if config.perturb else None
            total = lessons.loss(n, values)
            return total if compared is None else total + config.weight * compared.loss(n, values)

        more = compared.comparison.parameters if compared else []
        return Training(spec, lessons, {}, free, config, extra=loss, more=more, name="distill").run(step)
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, RuntimeError) and "size" not in str(error) and "shape" not in str(error):
            raise
        raise InputError(
            f"{spec.name} cannot learn from {teacher.name}: their inputs or outputs differ ({str(error).splitlines()[0]})",
            "a student needs the teacher's methods, or another layout of the same vocabulary",
        ) from None


class _Stages:
    """The loss on intermediate values, over the inputs of a step."""

    def __init__(self, pupil: Pupil, lessons: Lessons, config: DistillConfig) -> None:
        if not pupil.pairs:
            raise InputError(f"{pupil.spec.name}: no stages to compare", 'name them (stages="…"), or use features="none"')
        self.lessons, self.config = lessons, config
        self.own, self.theirs = ([p[i] for p in pupil.pairs] for i in (0, 1))
        method = self._method(pupil.spec), self._method(pupil.teacher)
        for paths, spec, m in ((self.own, pupil.spec, method[0]), (self.theirs, pupil.teacher, method[1])):
            known = dict(spec.methods[m].module.named_modules(remove_duplicate=False))
            missing = [p for p in paths if p not in known]
            if missing:
                raise InputError(f"{spec.name}: {m} has no module '{missing[0]}'", "stages are names of named_modules()")
        self.methods = method
        chosen, index, _ = lessons.drawn(0)
        with torch.no_grad():
            mine, theirs, logits = self._values(chosen, index[:2], None)
        if config.features == "stages" and lessons.chain is not None:
            raise InputError('features="stages" is for models of one call', 'use "mse", "cka" or "mi" for sequence models')
        self.comparison = Comparison(_kind(config), mine, theirs, logits.shape[-1], config.seed)

    @staticmethod
    def _method(spec: ModelSpec) -> str:
        return "encode" if "encode" in spec.methods else next(iter(spec.methods))

    def _values(
        self, chosen: Set, index: torch.Tensor, values: Values | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        out = self.lessons.student(self.methods[0], [x[index] for x in chosen.own], values, self.own)
        with torch.no_grad():
            right = self.lessons.teacher(self.methods[1], [x[index] for x in chosen.inputs], taps=self.theirs)
        first = right[0]
        return out[-len(self.own) :], right[-len(self.theirs) :], first.reshape(len(first), -1, first.shape[-1])[:, -1]

    def loss(self, n: int, values: Values | None) -> torch.Tensor:
        chosen, index, _ = self.lessons.drawn(n)
        return self.comparison(*self._values(chosen, index, values))


def _kind(config: DistillConfig) -> Kind:
    return "none" if config.features == "auto" else config.features


def _disturbed(spec: ModelSpec, free: Sequence[torch.Tensor], share: float, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Every matrix with noise of that share of its typical size; the gradient goes to the matrix."""
    generator = torch.Generator().manual_seed(seed)
    noisy: dict[int, torch.Tensor] = {}
    for p in free:
        if p.dim() > 1:
            noisy[id(p)] = p + share * p.detach().square().mean().sqrt() * torch.randn(p.shape, generator=generator)
    return {m: {n: noisy[id(p)] for n, p in e.module.named_parameters() if id(p) in noisy} for m, e in spec.methods.items()}


def common_stages(spec: ModelSpec, teacher: ModelSpec, pattern: str = "", most: int = 4) -> list[str]:
    """Modules that both models have: those that match, else blocks (children of lists, or of the top), at most `most`, evenly spread."""
    method = "encode" if "encode" in spec.methods else next(iter(spec.methods))
    own, theirs = (dict(s.methods[method].module.named_modules()) for s in (spec, teacher))
    both = [p for p in own if p and p in theirs and not isinstance(own[p], torch.nn.ModuleList)]
    if pattern:
        found = [p for p in both if re.search(pattern, p)]
        if not found:
            raise InputError(f"stages='{pattern}': no module of {method} has such a name", "names are those of named_modules()")
        return found
    blocks = [p for p in both if re.search(r"\.\d+$", p)] or [p for p in both if "." not in p]
    called = _called(teacher, method)
    blocks = [p for p in blocks if p in called]
    return blocks[:: max(1, -(-len(blocks) // most))][:most]


def _called(spec: ModelSpec, method: str) -> set[str]:
    """Modules that give a float tensor when the method runs."""
    seen: set[str] = set()
    entry = spec.methods[method]

    def note(path: str) -> Any:
        def hook(_: Any, inputs: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple | list) and out else out
            if isinstance(first, torch.Tensor) and first.is_floating_point():
                seen.add(path)

        return hook

    hooks = [m.register_forward_hook(note(p)) for p, m in entry.module.named_modules()]
    try:
        with torch.no_grad():
            entry.module(*entry.example_inputs)
    finally:
        for h in hooks:
            h.remove()
    return seen


def recommend(pupil: Pupil, config: DistillConfig, *, share: float = 0.15, step: Step | None = None) -> list[tuple[str, float]]:
    """Every kind of feature loss tried for `share` of the steps, best first by the loss on held-out inputs (outputs only)."""
    kinds = ["none"] + (["mse", "cka", "mi"] if pupil.pairs else [])
    if pupil.pairs and pupil.teacher.layout == "plain":
        kinds.append("stages")
    found = []
    for i, kind in enumerate(kinds):
        if step:
            step(f"distill: trying {kind}", i / len(kinds))
        tried = Pupil(replace(pupil.spec, methods=copy.deepcopy(pupil.spec.methods)), pupil.teacher, pupil.pairs)
        short = config.model_copy(update={"features": kind, "steps": max(2, int(config.steps * share))})
        outcome = teach(tried, short, lambda text, share: None)
        found.append((kind, min(outcome.after, outcome.before)))
    return sorted(found, key=lambda f: f[1])


METHOD = Distill()
