"""`compress`: a model and a recipe to a compressed model, with every byte counted."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from edgesdk.compress.masks import mask_of
from edgesdk.compress.registry import configured, method
from edgesdk.compress.types import Config, ModelMethod, Runs, Stats, Step, Weight, WeightMethod
from edgesdk.compress.weights import careful, need_finite, output_error, set_weight, stats_of, suited_threads, weights_of
from edgesdk.errors import InputError
from edgesdk.model import ModelSpec
from edgesdk.noun import Noun, Part
from edgesdk.packed import Code, decode, pack
from edgesdk.plan.fake_quant import run


class Stage(Part):
    """One step of a recipe: a method, its settings, and the weights it is for (a regular expression over their names; all by default)."""

    method: str
    settings: dict[str, Any] = {}
    only: str = ""


class CodedWeight(Part):
    weight: str
    method: str
    settings: dict[str, Any]
    bytes: int  # all that is stored for it
    float_bytes: int  # as float32
    error: float  # relative squared error of its outputs over the calibration inputs, or of the weight where there are none


class Compression(Noun):
    """What was done to a model: the recipe, every stored weight, what stayed as it was and why."""

    KIND: ClassVar[str] = "compression"

    model: str
    base: str = ""  # the reference it was loaded by; empty when a ModelSpec was given
    base_digest: str
    compressed_digest: str
    stages: tuple[Stage, ...]
    weights: tuple[CodedWeight, ...]
    kept: dict[str, str]  # weight → why it stayed float32
    weight_elements: int  # of all compressible weights after changes of shape
    weight_bytes: int  # of all compressible weights as they are stored now
    float_bytes: int  # of all compressible weights of the base model, as float32
    edits: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    quality: float | None = None  # after; None: the model has no evaluate, or it was not asked for
    quality_before: float | None = None
    runs: Runs | None = None  # where the last stage chose for a device

    @property
    def bits(self) -> float:
        """Stored bits per compressible weight."""
        return 8 * self.weight_bytes / max(1, self.weight_elements)


@dataclass(frozen=True)
class Compressed:
    """`spec` computes with the decoded weights and carries their codes; `report` says what was done to `base`."""

    spec: ModelSpec
    report: Compression
    base: ModelSpec
    differences: dict[str, Code] = field(default_factory=dict)  # weights that are stored as differences to those of `base` (see `delta`)

    def save(self, path: str | Path) -> Path:
        """Write a `.edgec` that every `--model` takes. Raises `EdgeError`."""
        from edgesdk.compress.saved import save

        return save(self, self.base, path)


def parse_stage(text: str) -> Stage:
    """`gptq:bits=3,group=64` or `rtn@encoder.*:bits=8` as a Stage. Raises `InputError`."""
    head, _, tail = text.partition(":")
    name, _, only = head.partition("@")
    settings: dict[str, Any] = {}
    for item in filter(None, tail.split(",")):
        key, sign, value = item.partition("=")
        if not sign:
            raise InputError(f"'{text}': '{item}' has no '='", "write a method like gptq:bits=3,group=64")
        try:
            settings[key.strip()] = json.loads(value)
        except ValueError:
            settings[key.strip()] = value
    return Stage(method=name.strip(), settings=settings, only=only)


def stages_of(config: str | Stage | Sequence[str | Stage]) -> tuple[Stage, ...]:
    """Whatever people write as a recipe, as stages: one or several, as text or as `Stage`."""
    items = [config] if isinstance(config, str | Stage) else list(config)
    return tuple(parse_stage(item) if isinstance(item, str) else item for item in items)


def compress(
    model: str | ModelSpec, config: str | Stage | Sequence[str | Stage], *, evaluate: bool = True, step: Step | None = None
) -> Compressed:
    """Compress a model (a reference or a `ModelSpec`) by the stages of `config`, in order; the given model stays as it was.

    A later stage sees what earlier ones left; a weight keeps the code of the last stage that coded it. Weights that a method does not apply to
    stay float32 and are listed with the reason. Raises `InputError`: unknown method or setting, NaN weights, no calibration data where a method
    needs it, a recipe that applies to nothing.
    """
    from edgesdk.intake import load_model

    step = step or (lambda text, share: None)
    base = load_model(model) if isinstance(model, str) else model
    stages = stages_of(config)
    ready = [configured(s.method, _with_only(s)) for s in stages]
    if not stages:
        raise InputError("the recipe is empty", "name at least one method: `edgesdk compress --list` names them")
    with suited_threads(base):
        work = _Work(base, step)
        for i, (stage, (found, settings)) in enumerate(zip(stages, ready, strict=True)):
            step(f"{stage.method} ({i + 1} of {len(stages)})", i / len(stages))
            work.runs = None
            if found.level == "model":
                work.change(found, settings)
            else:
                work.code(stage, found, settings)
        return work.finished(stages, model if isinstance(model, str) else "", evaluate)


def _with_only(stage: Stage) -> dict[str, Any]:
    """A stage's settings; a model method that can be kept to some weights takes `@REGEX` as its setting `only`. Raises `InputError`."""
    found = method(stage.method)
    if found.level == "weight" or not stage.only:
        return stage.settings
    if "only" not in found.config.model_fields:
        raise InputError(f"{stage.method}@{stage.only}: it works on the whole model", f"leave @{stage.only} out")
    return {**stage.settings, "only": stage.only}


class _Work:
    """A copy of the model on its way through the stages."""

    def __init__(self, base: ModelSpec, step: Step) -> None:
        if not base.methods:
            raise InputError(
                f"{base.name} is a .tflite", "compress the PyTorch model, or quantize the file with `edgesdk plan` and `build`"
            )
        need_finite(base)
        weights = weights_of(base)
        if not weights:
            raise InputError(
                f"{base.name} has no linear, convolution or embedding, so there is nothing to compress",
                "recurrent layers and weights of your own classes cannot be compressed yet",
            )
        self.base, self.step = base, step
        self.spec = replace(
            careful(base), methods=copy.deepcopy(base.methods), codes=dict(base.codes), reference=careful(base.reference or base)
        )
        self.float_bytes = sum(4 * w.matrix.numel() for w in weights.values())
        self.original: dict[str, torch.Tensor] = {}
        self.kept_weights: dict[str, torch.Tensor] = {}  # masks of pruned weights
        self.rows: dict[str, CodedWeight] = {}
        self.kept: dict[str, str] = {}
        self.edits: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.runs: Runs | None = None

    def change(self, found: ModelMethod, settings: Config) -> None:
        """A model method: afterwards codes hold only where they still decode to the weight."""
        reason = found.why_not(self.spec, settings)
        if reason:
            raise InputError(f"{found.name} does not apply to {self.spec.name}: {reason}", "leave it out of the recipe")
        before = weights_of(self.spec)
        done = found.apply(self.spec, settings, self.step)
        self.edits += done.edits
        self.notes += done.notes
        self.runs = done.runs
        if done.calibration is not None:
            self.spec = replace(self.spec, calibration=done.calibration)
        self.spec.codes.update(done.codes)
        now = weights_of(self.spec)
        self.kept_weights = {
            n: m for n, m in self.kept_weights.items() if n in now and m.shape == now[n].matrix.shape and not bool(now[n].matrix[~m].any())
        }
        for name, code in list(self.spec.codes.items()):
            if name not in now or not _same(now[name], code):
                del self.spec.codes[name]
                self.rows.pop(name, None)
        if found.family == "mixed" or done.made_by or (done.codes and not done.edits and found.family == "pruning"):
            self.original = {n: self.original.get(n, w.matrix) for n, w in before.items()}
        elif found.family != "recovery":  # that leaves every shape, and the weights it aims at
            self.original.clear()
        for name in done.codes:
            self._note(replace(now[name], original=self.original.get(name)), found.name, settings, None)
            if name in done.made_by:
                method, own, error = done.made_by[name]
                self.rows[name] = self.rows[name].model_copy(update={"method": method, "settings": own, "error": error})

    def code(self, stage: Stage, found: WeightMethod, settings: Config) -> None:
        """A weight method: every weight it applies to gets a code."""
        weights = {n: self._seen(w) for n, w in weights_of(self.spec).items() if re.search(stage.only, n)}
        if not weights:
            raise InputError(
                f"{stage.method}@{stage.only}: no weight of {self.spec.name} has such a name",
                "`edgesdk compress --list --model …` names them",
            )
        refused = {n: found.why_not(w, settings) for n, w in weights.items()}
        self.kept |= {n: f"{found.name}: {reason}" for n, reason in refused.items() if reason and n not in self.rows}
        if all(refused.values()):
            name, reason = next(iter(refused.items()))
            raise InputError(
                f"{stage.method} applies to no weight of {self.spec.name} ({name}: {reason})", "choose another method or settings"
            )
        stats = stats_of(self.spec, gradients="gradients" in found.needs, step=self.step) if found.needs else {}
        for i, (name, weight) in enumerate(weights.items()):
            if refused[name] or (found.needs and name not in stats and weight.op != "embedding"):
                continue
            self.step(f"{found.name}: {name}", i / len(weights))
            self.original.setdefault(name, weight.matrix)
            code = found.apply(weight, stats.get(name), settings)
            self.spec.codes[name] = code
            set_weight(self.spec, name, torch.from_numpy(decode(code)))
            self.kept.pop(name, None)
            self._note(weight, found.name, settings, stats.get(name))

    def _seen(self, weight: Weight) -> Weight:
        """A weight with what earlier stages did to it."""
        original = self.original.get(weight.name, weight.matrix)
        return replace(weight, coded=self.spec.codes.get(weight.name), original=original, kept=self.kept_weights.get(weight.name))

    def _note(self, weight: Weight, method: str, settings: Config, stats: Stats | None) -> None:
        code = self.spec.codes[weight.name]
        mask = mask_of(code)
        if mask is not None:
            self.kept_weights[weight.name] = mask
        target = replace(weight, matrix=weight.original) if weight.original is not None else weight
        self.rows[weight.name] = CodedWeight(
            weight=weight.name, method=method, settings=settings.model_dump(mode="json"), bytes=len(pack(code)), float_bytes=4 * weight.matrix.numel(),
            error=output_error(target, torch.from_numpy(decode(code)), stats),
        )  # fmt: skip

    def finished(self, stages: tuple[Stage, ...], ref: str, evaluate: bool) -> Compressed:
        now = weights_of(self.spec)
        stored = sum(self.rows[n].bytes if n in self.rows else 4 * w.matrix.numel() for n, w in now.items())
        quality = before = None
        if evaluate and self.base.evaluate and self.spec.evaluate:
            self.step(f"measuring {self.base.quality_name}", 0.95)
            before, quality = float(self.base.evaluate(run(self.base))), float(self.spec.evaluate(run(self.spec)))
        report = Compression(
            model=self.base.name, base=ref, base_digest=self.base.digest, compressed_digest=digest_of(self.spec, self.edits),
            stages=stages, weights=tuple(self.rows.values()), kept=self.kept,
            weight_elements=sum(w.matrix.numel() for w in now.values()), weight_bytes=stored, float_bytes=self.float_bytes, edits=tuple(self.edits),
            notes=tuple(self.notes), quality=quality, quality_before=before, runs=self.runs,
        )  # fmt: skip
        return Compressed(
            replace(self.spec, name=f"{self.base.name}-compressed", alternatives={}, digest=report.compressed_digest), report, self.base
        )


def _same(weight: Weight, code: Code) -> bool:
    return tuple(code.shape) == tuple(weight.matrix.shape) and bool(torch.equal(torch.from_numpy(decode(code)), weight.matrix))


def digest_of(spec: ModelSpec, edits: Sequence[dict[str, Any]]) -> str:
    """sha256 over the base, the edits and every parameter as it is now."""
    total = hashlib.sha256(json.dumps([spec.digest, list(edits)]).encode())
    for name, entry in spec.methods.items():
        for key, value in entry.module.state_dict().items():
            total.update(f"{name}/{key}".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
