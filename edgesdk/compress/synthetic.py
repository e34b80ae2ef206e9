"""Calibration inputs for a model that comes without any: noise is changed until every batch norm meets the statistics it was trained with.

Sources: Genie, "Show Me the Data for Quantization" (arXiv:2212.04780), here without its generator, as ZeroQ (arXiv:2001.00281): the inputs themselves
are fitted, by Adam, to Σ over batch norms of mean((m - μ)² / σ² + (s / σ - 1)²), m and s the mean and deviation of what a norm is given, μ and σ
those that it keeps. In place of Genie's swing convolutions, images are shifted by up to a pixel or so before each step.
As a stage of a recipe ("synthetic", then "gptq:bits=4") it gives the stages behind it their inputs; in Python: `with_synthetic(spec)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.errors import InputError

if TYPE_CHECKING:
    import torch

    from edgesdk.model import ModelSpec


class SyntheticConfig(Config):
    count: Annotated[int, Field(ge=2, le=4096)] = 64  # inputs to make for each method
    steps: Annotated[int, Field(ge=0, le=20000)] = 300  # of fitting
    rate: Annotated[float, Field(gt=0, le=10)] = 0.05  # of fitting
    shift: Annotated[int, Field(ge=0, le=8)] = 1  # pixels that images are shifted by at most before each step
    low: float | None = None  # the least value of an input, where it is known
    high: float | None = None  # the largest
    seed: Annotated[int, Field(ge=0)] = 0


def norms_of(module: Any) -> list[Any]:
    """The batch norms of a module that keep statistics."""
    from torch import nn

    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


def distance(module: Any, x: torch.Tensor) -> torch.Tensor:
    """How far a batch's statistics are from those that the batch norms keep, the mean over norms; 0: the same. Differentiable in x."""
    import torch

    terms: list[torch.Tensor] = []

    def note(norm: Any, inputs: Any) -> None:
        seen = inputs[0].movedim(1, -1).reshape(-1, inputs[0].shape[1])
        deviation = (norm.running_var + norm.eps).sqrt()
        mean = ((seen.mean(0) - norm.running_mean) / deviation).square().mean()
        terms.append(mean + ((seen.var(0, unbiased=False) + norm.eps).sqrt() / deviation - 1).square().mean())

    with ExitStack() as undo:
        for norm in norms_of(module):
            undo.callback(norm.register_forward_pre_hook(note).remove)
        module(x)
    return torch.stack(terms).mean()


def why_not(spec: ModelSpec, method: str) -> str | None:
    """Why no inputs can be made for a method, or None."""
    import torch

    entry = spec.methods[method]
    if not norms_of(entry.module):
        return f"'{method}' has no batch norm whose statistics could be met"
    if len(entry.example_inputs) != 1 or not entry.example_inputs[0].is_floating_point():
        return f"'{method}' takes other inputs than one tensor of floats"
    try:
        with torch.no_grad():
            entry.module(torch.cat([entry.example_inputs[0]] * 2))
    except (RuntimeError, ValueError, TypeError):
        return f"'{method}' takes no batch"
    return None


def fitted(spec: ModelSpec, method: str, config: SyntheticConfig, step: Step | None = None) -> list[tuple[torch.Tensor]]:
    """`count` inputs of a method, each of batch 1. Raises `InputError` where they cannot be made."""
    import torch

    reason = why_not(spec, method)
    if reason:
        raise InputError(f"{spec.name}: no inputs can be made up: {reason}", "give the model a calibration function")
    entry = spec.methods[method]
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(config.count, *entry.example_inputs[0].shape[1:], generator=generator)
    x = _within(x, config).requires_grad_(True)
    optimiser = torch.optim.Adam([x], lr=config.rate)
    for i in range(config.steps):
        if step and i % 20 == 0:
            step(f"making up inputs of {method}", i / config.steps)
        optimiser.param_groups[0]["lr"] = config.rate * (1 - i / config.steps)
        with torch.enable_grad():
            loss = distance(entry.module, _shifted(x, config.shift if i < 0.8 * config.steps else 0, generator))
        (x.grad,) = torch.autograd.grad(loss, [x])
        optimiser.step()
        with torch.no_grad():
            x.copy_(_within(x, config))
    return [(row[None].clone(),) for row in x.detach()]


def _within(x: torch.Tensor, config: SyntheticConfig) -> torch.Tensor:
    return x if config.low is None and config.high is None else x.clamp(config.low, config.high)


def _shifted(x: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Images moved by up to `most` pixels, their edges repeated; other inputs as they are."""
    import torch

    if not most or x.dim() != 4 or min(x.shape[2:]) <= most:
        return x
    dy, dx = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    padded = torch.nn.functional.pad(x, (most, most, most, most), mode="replicate")
    return padded[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]


def with_synthetic(spec: ModelSpec, config: SyntheticConfig | None = None, step: Step | None = None) -> ModelSpec:
    """The same model and modules with calibration inputs that were made up for every method. Raises `InputError`."""
    made = {method: fitted(spec, method, config or SyntheticConfig(), step) for method in spec.methods}
    return replace(spec, calibration=made.__getitem__)


class Synthetic:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "synthetic"
    family: ClassVar[Family] = "data-free"
    source: ClassVar[str] = "Genie (arXiv:2212.04780) and ZeroQ (arXiv:2001.00281)"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[SyntheticConfig]] = SyntheticConfig

    def why_not(self, spec: ModelSpec, config: SyntheticConfig) -> str | None:
        return next(filter(None, (why_not(spec, method) for method in spec.methods)), None)

    def options(self, spec: ModelSpec) -> Sequence[SyntheticConfig]:
        return [SyntheticConfig()]

    def apply(self, spec: ModelSpec, config: SyntheticConfig, step: Step) -> Change:
        """Changes no weight: the stages that follow are calibrated on what is made up here, even where the model has inputs of its own."""
        import torch

        made = with_synthetic(spec, config, step)
        notes = []
        for method, entry in spec.methods.items():
            with torch.no_grad():
                far = float(distance(entry.module, torch.cat([x for (x,) in made.calibration(method)])))  # type: ignore[misc]
            notes.append(f"{config.count} inputs of {method} made up; their statistics are {far:.4f} from those of the batch norms")
        return Change((), tuple(notes), calibration=made.calibration)


METHOD: Any = Synthetic()
