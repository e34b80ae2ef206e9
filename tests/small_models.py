"""Small models for the tests of pruning, with random inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgesdk.model import Method, ModelSpec


def spec_of(module: nn.Module, *shape: int, count: int = 24, calibration: bool = True, rank: int = 0) -> ModelSpec:
    """A model with random inputs; `rank` makes inputs that lie in so few dimensions."""
    generator = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(1, *shape, generator=generator),) for _ in range(count)]
    if rank:
        basis = torch.randn(rank, shape[-1], generator=generator)
        inputs = [(torch.randn(1, *shape[:-1], rank, generator=generator) @ basis,) for _ in range(count)]
    module = module.eval().requires_grad_(False)
    return ModelSpec(
        name="small",
        digest="0" * 64,
        methods={"forward": Method(module, inputs[0])},
        calibration=(lambda method: inputs) if calibration else None,
    )


class Residual(nn.Module):
    """Two channels of a residual join are one unit; batch-norm and depthwise follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner, self.inner_norm = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.last, self.head = nn.Conv2d(12, 10, 1), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.norm(self.stem(x)))
        x = x + torch.relu(self.inner_norm(self.inner(x)))
        return self.head(torch.relu(self.last(self.depthwise(x))).mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(14, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.a(x))
        b = nn.functional.interpolate(torch.relu(self.b(a)), scale_factor=2.0)
        return self.c(torch.cat([a, b], 1))


class Attention(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.width = heads, dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            f(x).reshape(x.shape[0], x.shape[1], self.heads, self.width // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.width))


class Transformer(nn.Module):
    def __init__(self, dim: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.attention, self.norm, self.gate, self.up = Attention(dim), nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.down, self.head = nn.Linear(hidden, dim), nn.Linear(dim, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        h = self.norm(x)
        return self.head(x + self.down(nn.functional.silu(self.gate(h)) * self.up(h)))


def seeded(make: Any, *args: Any) -> nn.Module:
    torch.manual_seed(0)
    module = make(*args)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return module
