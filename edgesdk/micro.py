"""Micro-programs: one small model per method, each of a few operators of one class, that calibration lowers and times."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from edgesdk.model import Method, ModelSpec

Make = Callable[[], tuple[nn.Module, tuple[int, ...]]]


class _Op(nn.Module):
    """`times` calls of a function of one tensor."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor], times: int = 1) -> None:
        super().__init__()
        self.call, self.times = call, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.call(x)
        return x


class _Pass(nn.Module):
    """As many inputs as come, half as many outputs, each the sum of two inputs: what passing tensors costs, with little to compute."""

    def forward(self, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = len(xs) // 2
        return tuple(a + b for a, b in zip(xs[:half], xs[half:], strict=True))


def _linear(rows: int, width: int, out: int, times: int = 1) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*[nn.Linear(width, out) for _ in range(times)]), (rows, width)


def _conv(size: int, channels: int, out: int, kernel: int, times: int = 1, stride: int = 1) -> tuple[nn.Module, tuple[int, ...]]:
    layers = [nn.Conv2d(channels if i == 0 else out, out, kernel, stride, kernel // 2) for i in range(times)]
    return nn.Sequential(*layers), (1, channels, size, size)


def _depthwise(size: int, channels: int, times: int = 1, stride: int = 1) -> tuple[nn.Module, tuple[int, ...]]:
    layers = [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels) for _ in range(times)]
    return nn.Sequential(*layers), (1, channels, size, size)


def _op(call: Callable[[torch.Tensor], torch.Tensor], *shape: int, times: int = 1) -> tuple[nn.Module, tuple[int, ...]]:
    return _Op(call, times), shape


def _between(rows: int, width: int, times: int) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(*[layer for _ in range(times) for layer in (nn.Linear(width, width), nn.Sigmoid())]), (rows, width)


def _norm(rows: int, width: int) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.LayerNorm(width), nn.LayerNorm(width)), (rows, width)


WEIGHTED: dict[str, Make] = {
    "linear_a": partial(_linear, 1, 32, 32, 2), "linear_b": partial(_linear, 1, 256, 256, 4),
    "linear_c": partial(_linear, 1, 1024, 1024, 2), "linear_d": partial(_linear, 48, 96, 96, 4), "linear_e": partial(_linear, 64, 384, 384, 2),
    "linear_f": partial(_linear, 256, 512, 1024),
    "conv_a": partial(_conv, 32, 3, 16, 3), "conv_b": partial(_conv, 16, 32, 48, 3, 2), "conv_c": partial(_conv, 8, 64, 96, 3, 2),
    "conv_d": partial(_conv, 20, 64, 64, 1, 3), "conv_e": partial(_conv, 6, 128, 160, 1, 3), "conv_f": partial(_conv, 8, 1, 32, 3),
    "depth_a": partial(_depthwise, 16, 32, 3), "depth_b": partial(_depthwise, 24, 64, 2), "depth_c": partial(_depthwise, 6, 160, 3),
    "depth_d": partial(_depthwise, 40, 32, 1, 2),
}  # fmt: skip
PLAIN: dict[str, Make] = {
    "add_a": partial(_op, lambda x: x + x, 1, 96, times=6), "add_b": partial(_op, lambda x: x + x, 1, 16, 32, 32, times=3),
    "act_a": partial(_op, torch.sigmoid, 48, 96, times=3), "act_b": partial(_op, nn.functional.gelu, 64, 256, times=2),
    "soft_a": partial(_op, lambda x: x.softmax(-1), 4, 48, 48, times=2), "norm_a": partial(_norm, 48, 96),
    "pool_a": partial(_op, lambda x: nn.functional.max_pool2d(x, 2, 2), 1, 32, 16, 16),
    "pool_b": partial(_op, lambda x: nn.functional.avg_pool2d(x, 6), 1, 128, 6, 6),
    "mean_a": partial(_op, lambda x: nn.functional.adaptive_avg_pool2d(x, 1), 1, 128, 6, 6),
    "mean_b": partial(_op, lambda x: nn.functional.adaptive_avg_pool2d(x, 1), 1, 32, 24, 24),
    "mat_a": partial(_op, lambda x: torch.matmul(x, x.transpose(-1, -2)), 4, 48, 24),
    "mat_b": partial(_op, lambda x: torch.matmul(x, x), 3, 160, 160), "mat_c": partial(_op, lambda x: torch.matmul(x, x), 1, 8, 8, times=2),
}  # fmt: skip
BETWEEN: dict[str, Make] = {
    "between_a": partial(_between, 1, 96, 4), "between_b": partial(_between, 1, 512, 3), "between_c": partial(_between, 32, 192, 3),
}  # fmt: skip
"""Linear layers with something of XNNPACK's between them: what its delegates cost that are entered anew behind each."""
PASSED = {"pass_a": (24, 64), "pass_b": (8, 8192)}
"""Inputs and their elements."""


def micro_spec(between: bool = False) -> ModelSpec:
    """All micro-programs as the methods of one model; weights and inputs are seeded noise. `between`: those of `BETWEEN` with them."""
    torch.manual_seed(0)
    methods = {}
    for name, make in {**WEIGHTED, **PLAIN, **(BETWEEN if between else {})}.items():
        module, shape = make()
        methods[name] = Method(module.eval().requires_grad_(False), (torch.randn(shape),))
    for name, (count, size) in PASSED.items():
        methods[name] = Method(_Pass().eval(), tuple(torch.randn(1, size) for _ in range(count)))
    code = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("micro.py", "micro_lower.py"))
    digest = hashlib.sha256(code + b"between" * between).hexdigest()
    return ModelSpec(name="calibration", digest=digest, methods=methods, calibration=lambda method: [methods[method].example_inputs] * 2)
