"""The one training of all methods that train: Adam on trainable codes and free parameters towards the uncompressed model's answers.

Bounded by its number of steps, decided by its seed alone, and resumed where it was cut off (its state is kept in the cache while it runs).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from edgesdk.cache import cache_dir
from edgesdk.compress.learned import Learned
from edgesdk.compress.lessons import Course, Data, Lessons, Loss
from edgesdk.compress.types import Config, Step
from edgesdk.compress.weights import holders, set_weight, suited_threads
from edgesdk.errors import InputError
from edgesdk.packed import Code, decode, pack

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

SAVE_S = 20.0  # seconds between two saved states
FLOOR = 0.02  # the least size a free parameter (a bias of zeros) is taken to have


class Pace(Config):
    """What every training takes."""

    steps: Annotated[int, Field(ge=1, le=100_000)] = 300
    rate: Annotated[float, Field(gt=0, le=1)] = 0.01  # of a step, as a share of a weight's typical size
    batch: Annotated[int, Field(ge=1, le=1024)] = 32
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0


class TrainConfig(Pace):
    """And what one towards another model's answers takes."""

    pool: Annotated[int, Field(ge=2, le=100_000)] = 512  # different inputs
    data: Data = "auto"  # calibration inputs, with more of their kind; those alone; or none, the model's own
    mix: bool = True  # also mixtures of two inputs (float inputs only)
    loss: Loss = "auto"  # "logits": also the divergence of distributions
    activations: Literal[4, 8, 16] = 16  # bits of the inputs of coded weights while training (a range for each row); 16: as they are
    cache: Literal[4, 8, 16] = 16  # bits of a sequence model's caches while training
    whole: bool = True  # a sequence model is run from its source to its last token; false: each method for itself, on the teacher's inputs


def teacher_of(spec: ModelSpec) -> ModelSpec:
    """The uncompressed model. Its own weights, where nothing else is known."""
    found = spec.reference or spec
    if found.calibration is None and spec.calibration is not None:  # inputs that an earlier stage made
        found = replace(found, calibration=spec.calibration)
    return found


def lessons_of(spec: ModelSpec, config: TrainConfig, teacher: ModelSpec | None = None) -> Lessons:
    """Raises `InputError` where there is nothing to train on."""
    return Lessons(
        spec, teacher or teacher_of(spec), data=config.data, pool=config.pool, batch=config.batch, loss=config.loss, mix=config.mix,
        cache_bits=config.cache, whole=config.whole, seed=config.seed,
    )  # fmt: skip


def trained(spec: ModelSpec, config: TrainConfig, step: Step, *, teacher: ModelSpec | None = None, name: str = "training") -> Outcome:
    """All that is not stored as codes, trained in place."""
    return Training(spec, lessons_of(spec, config, teacher), {}, free_parameters(spec, spec.codes), config, name=name).run(step)


def why_no_training(spec: ModelSpec, config: TrainConfig) -> str | None:
    if config.data != "self" and teacher_of(spec).calibration is None:
        return 'it has no calibration data (language models can make their own: data="self")'
    return None


@dataclass(frozen=True)
class Outcome:
    """The loss on held-out samples before and after, and the codes to keep; `back`: those from before, as training did not help."""

    before: float
    after: float
    codes: dict[str, Code]
    back: bool = False

    def note(self, name: str, steps: int) -> str:
        done = f"{name}: loss on held-out inputs {self.before:.4g} → {self.after:.4g} in {steps} steps"
        return f"{done}; what was there before is kept" if self.back else done


class Training:
    """`learned`: weight name → its trainable code; `free`: parameters of `spec` that are trained as they are.

    `extra(step, values)` adds to the loss. With `ramp`, the weights go from float to coded over that share of the steps.
    `each(step)` comes before every step and after the last; `state` is what it changes, which is saved with the rest. With `each`, what there is before
    training is no answer yet, so that what comes out is kept in any case.
    """

    def __init__(
        self, spec: ModelSpec, lessons: Course, learned: Mapping[str, Learned], free: Sequence[torch.nn.Parameter], config: Pace, *,
        ramp: float = 0.0, extra: Any = None, more: Sequence[torch.Tensor] = (), each: Callable[[int], None] | None = None,
        state: Sequence[torch.Tensor] = (), name: str = "training",
    ) -> None:  # fmt: skip
        self.spec, self.lessons, self.learned, self.config, self.name = spec, lessons, learned, config, name
        self.ramp, self.extra, self.each, self.free, self.state = ramp, extra, each, list(free), list(state)
        self.places = {n: [(m, f"{p}.weight" if p else "weight", module) for m, p, module in uses] for n, uses in holders(spec).items()}
        pairs = [x for made in learned.values() for x in made.parameters]
        pairs += [(p, max(FLOOR, float(p.detach().square().mean().sqrt()))) for p in self.free]
        pairs += [(p, max(FLOOR, float(p.detach().square().mean().sqrt()))) for p in more]
        self.tensors = [t for t, _ in pairs]
        self.sizes = [size for _, size in pairs]
        if not pairs:
            raise InputError(f"{name}: {spec.name} has nothing that can be trained", "see which weights the recipe left to it")

    def values(self, mix: float) -> dict[str, dict[str, torch.Tensor]]:
        """What every method's module computes with."""
        answer: dict[str, dict[str, torch.Tensor]] = {}
        for name, made in self.learned.items():
            weight = made.weight(mix).reshape(self.places[name][0][2].weight.shape)
            for method, path, _ in self.places[name]:
                answer.setdefault(method, {})[path] = weight
        return answer

    def run(self, step: Step) -> Outcome:
        """Train, put back what was there before where that is better, and put the weights into the modules. Raises `InputError` when the loss is not finite."""
        start = {n: made.code() for n, made in self.learned.items()}
        first = [t.detach().clone() for t in self.tensors]
        wanted = [p.requires_grad for p in self.free]
        with ExitStack() as undo, torch.enable_grad(), suited_threads(self.spec):
            for p in self.free:
                p.requires_grad_(True)
            self._round_inputs(undo)
            before = self.lessons.held_out(self.values(1.0))
            self._steps(step)
            after = self.lessons.held_out(self.values(1.0))
        back = self.each is None and not after < before
        with torch.no_grad():
            for t, old in zip(self.tensors, first, strict=True):
                if back:
                    t.copy_(old)
                t.grad = None
        for p, flag in zip(self.free, wanted, strict=True):
            p.requires_grad_(flag)
        codes = start if back else {n: made.code() for n, made in self.learned.items()}
        for name, code in codes.items():
            set_weight(self.spec, name, torch.from_numpy(decode(code)))
        return Outcome(before, after, codes, back)

    def _steps(self, step: Step) -> None:
        steps, path = self.config.steps, cache_dir("training") / f"{self._key()}.pt"
        optimiser = torch.optim.Adam(
            [{"params": [t], "size": s} for t, s in zip(self.tensors, self.sizes, strict=True)], betas=(0.9, 0.98), eps=1e-12
        )
        done, saved = self._resumed(path, optimiser), time.monotonic()
        for n in range(done, steps):
            share = n / steps
            rate = self.config.rate * min(1.0, 20 * (n + 1) / steps) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-12
            for group in optimiser.param_groups:
                group["lr"] = rate * group["size"]
            optimiser.zero_grad()
            if self.each:
                self.each(n)
            values = self.values(min(1.0, share / self.ramp) if self.ramp > 0 else 1.0)
            loss = self.lessons.loss(n, values) if self.extra is None else self.extra(n, values)
            if not bool(torch.isfinite(loss)):
                raise InputError(f"{self.name}: the loss is not finite at step {n}", "take a smaller rate")
            loss.backward()
            optimiser.step()
            if n % 10 == 0:
                step(f"{self.name}: step {n} of {steps}, loss {float(loss.detach()):.3g}", share)
            if time.monotonic() - saved > SAVE_S:
                self._save(path, optimiser, n + 1)
                saved = time.monotonic()
        if self.each:
            self.each(steps)
        path.unlink(missing_ok=True)

    def _round_inputs(self, undo: ExitStack) -> None:
        bits = self.config.activations if isinstance(self.config, TrainConfig) else 16
        if bits >= 16:
            return
        for name in self.learned:
            for _, _, module in self.places[name]:
                if not isinstance(module, torch.nn.Embedding):
                    undo.callback(module.register_forward_pre_hook(lambda _, inputs: (rounded_rows(inputs[0], bits), *inputs[1:])).remove)

    def _key(self) -> str:
        total = hashlib.sha256(f"{torch.__version__} {self.name} {self.ramp} {self.config!r}".encode())
        for t in self.tensors:
            total.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for made in self.learned.values():
            total.update(pack(made.code(), entropy=False))
        total.update(self.lessons.digest.encode())
        return total.hexdigest()

    def _save(self, path: Path, optimiser: torch.optim.Adam, done: int) -> None:
        part = path.with_suffix(f".{time.monotonic_ns()}.part")
        with contextlib.suppress(OSError):  # a full disk costs time, not the answer
            held = [t.detach() for t in (*self.tensors, *self.state)]
            torch.save({"done": done, "tensors": held, "adam": optimiser.state_dict()}, part)
            part.replace(path)

    def _resumed(self, path: Path, optimiser: torch.optim.Adam) -> int:
        """The steps that an interrupted run has done; its state is taken over."""
        if not path.exists():
            return 0
        try:
            state = torch.load(path, weights_only=True)
            optimiser.load_state_dict(state["adam"])
            with torch.no_grad():
                for t, old in zip((*self.tensors, *self.state), state["tensors"], strict=True):
                    t.copy_(old)
            return int(state["done"])
        except Exception:  # a damaged state: from the beginning
            path.unlink(missing_ok=True)
            optimiser.state.clear()
            return 0


def rounded_rows(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Activations as runtimes round them on the fly: a range with zero for each row of the last dimension. The gradient passes unchanged."""
    low, high = x.detach().amin(-1, keepdim=True).clamp_max(0), x.detach().amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(1e-12) / (2**bits - 1)
    change: torch.Tensor = torch.round((x.detach() - low) / scale) * scale + low - x.detach()
    return x + change


def free_parameters(spec: ModelSpec, coded: Mapping[str, Any]) -> list[torch.nn.Parameter]:
    """Float parameters of the model's modules that are not stored as codes, each once."""
    held = {id(uses[0][2].weight) for name, uses in holders(spec).items() if name in coded}
    found = {id(p): p for e in spec.methods.values() for p in e.module.parameters() if p.is_floating_point() and id(p) not in held}
    return list(found.values())
