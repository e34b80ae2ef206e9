"""Calibration inputs for a model that comes without any: made so that every batch norm meets the statistics it was trained with.

Sources: Genie, "Show Me the Data for Quantization" (arXiv:2212.04780): the inputs are what a small generator makes of latent vectors, one for each
input, and both are fitted, by Adam, to Σ over batch norms of mean((m - μ)² / σ² + (s / σ - 1)²), m and s the mean and deviation of what a norm is
given, μ and σ those that it keeps; convolutions with strides swing: before each step their inputs move by less than a stride, so that no pixel
is favoured. `by="inputs"` fits the inputs themselves, as ZeroQ (arXiv:2001.00281); what is no image is made so in any case.
As a stage of a recipe ("synthetic", then "gptq:bits=4") it gives the stages behind it their inputs; in Python: `with_synthetic(spec)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    by: Literal["generator", "inputs"] = "generator"  # what is fitted: latent vectors and a generator of images, or the inputs themselves
    swing: bool = True  # convolutions with strides read their inputs from another pixel at every step
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
    entry, shape = spec.methods[method], spec.methods[method].example_inputs[0].shape[1:]
    draw = torch.Generator().manual_seed(config.seed)
    make, parameters = _images(config, shape, draw) if config.by == "generator" and len(shape) == 3 else _inputs(config, shape, draw)
    optimiser = torch.optim.Adam(parameters, lr=config.rate)
    with ExitStack() as undo:
        if config.swing:
            _swing(entry.module, draw, undo)
        for i in range(config.steps):
            if step and i % 20 == 0:
                step(f"making up inputs of {method}", i / config.steps)
            optimiser.param_groups[0]["lr"] = config.rate * (1 - i / config.steps)
            with torch.enable_grad():
                loss = distance(entry.module, _shifted(make(), config.shift if i < 0.8 * config.steps else 0, draw))
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = gradient
            optimiser.step()
    return [(row[None].clone(),) for row in make().detach()]


Maker = tuple[Callable[[], "torch.Tensor"], list["torch.Tensor"]]
"""Makes all inputs [count, …], differentiable in the tensors beside it."""


def _inputs(config: SyntheticConfig, shape: Sequence[int], draw: torch.Generator) -> Maker:
    import torch

    x = torch.randn(config.count, *shape, generator=draw).requires_grad_(True)
    return (lambda: _within(x, config)), [x]


def _images(config: SyntheticConfig, shape: Sequence[int], draw: torch.Generator, width: int = 64, wide: int = 64) -> Maker:
    """Genie's generator: a latent vector to a small image of `width` channels, made larger and sharper by two convolutions, with batch norms."""
    import torch
    from torch.nn.functional import batch_norm, conv2d, interpolate, leaky_relu

    channels, height, across = shape
    low = (-(-height // 4), -(-across // 4))

    def drawn(*sizes: int, inputs: int) -> torch.Tensor:
        made: torch.Tensor = torch.randn(*sizes, generator=draw) * inputs**-0.5
        return made.requires_grad_(True)

    latent = torch.randn(config.count, wide, generator=draw).requires_grad_(True)
    first = drawn(wide, width * low[0] * low[1], inputs=wide)
    kernels = [drawn(o, i, 3, 3, inputs=9 * i) for i, o in ((width, width), (width, width // 2), (width // 2, channels))]
    gain, middle = (torch.full((channels, 1, 1), v).requires_grad_(True) for v in (1.0, 0.0))

    def normal(x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = batch_norm(x, None, None, training=True)
        return made

    def make() -> torch.Tensor:
        x = normal((latent @ first).reshape(config.count, width, *low))
        for size, kernel in zip(((-(-height // 2), -(-across // 2)), (height, across)), kernels[:2], strict=True):
            x = leaky_relu(normal(conv2d(interpolate(x, size=size), kernel, padding=1)), 0.2)
        return _within(normal(conv2d(x, kernels[2], padding=1)) * gain + middle, config)

    return make, [latent, first, *kernels, gain, middle]


def _swing(module: Any, draw: torch.Generator, undo: ExitStack) -> None:
    """Until `undo` closes, the inputs of convolutions with strides move by less than a stride, mirrored at the edges."""
    import torch
    from torch import nn

    def moved(conv: Any, inputs: Any) -> Any:
        (x,), (dy, dx) = inputs, (s - 1 for s in conv.stride)
        if min(x.shape[-2] - dy, x.shape[-1] - dx) < 1:
            return None
        padded = nn.functional.pad(x, (dx, dx, dy, dy), mode="reflect")
        top, left = (int(torch.randint(0, 2 * d + 1, (1,), generator=draw)) for d in (dy, dx))
        return (padded[..., top : top + x.shape[-2], left : left + x.shape[-1]],)

    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and max(conv.stride) > 1:
            undo.callback(conv.register_forward_pre_hook(moved).remove)


def _within(x: torch.Tensor, config: SyntheticConfig) -> torch.Tensor:
    """The values cut off at the bounds; the gradient passes."""
    return x if config.low is None and config.high is None else x + (x.clamp(config.low, config.high) - x).detach()


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
