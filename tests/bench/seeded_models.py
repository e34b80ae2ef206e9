"""Models that nobody chose: shapes, depths and kernels drawn from a seed, for predictions on what was never looked at."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from torch import nn

from edgesdk.model import Method, ModelSpec


def seeded_models(seed: int, count: int) -> list[ModelSpec]:
    """`count` models, the families in turn: perceptrons, plain, separable and residual CNNs, transformer blocks."""
    chance = random.Random(seed)
    made = []
    for i in range(count):
        family = FAMILIES[i % len(FAMILIES)]
        net, shape = family(chance)
        made.append(_spec(f"{family.__name__.strip('_')}-{seed}-{i}", net, shape, seed * 1000 + i))
    return made


def precisions(spec: ModelSpec, runtime: str) -> list[str]:
    """What is tried of a model: static int8 except in transformers, dynamic int8 and int4 where linear layers carry it."""
    linear = spec.name.startswith(("perceptron", "transformer"))
    kinds = ["fp32"] + ([] if spec.name.startswith("transformer") else ["int8-static"]) + (["int8-dynamic"] if linear else [])
    return kinds + (["int4-g32"] if linear and runtime == "executorch" else [])


def _spec(name: str, net: nn.Module, shape: tuple[int, ...], seed: int) -> ModelSpec:
    torch.manual_seed(seed)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    inputs = (torch.randn(shape),)
    method = Method(net.eval().requires_grad_(False), inputs)
    return ModelSpec(name=name, digest=f"seeded-{name}-1", methods={"forward": method}, calibration=lambda _: [inputs])


def _between(chance: random.Random, low: int, high: int, step: int = 1) -> int:
    """Log-uniform from low to high, a multiple of step."""
    value = low * (high / low) ** chance.random()
    return max(step, round(value / step) * step)


def _perceptron(chance: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    widths = [_between(chance, 48, 1200, 4) for _ in range(chance.randint(3, 5))]
    widths[1:] = [round(w / 32) * 32 or 32 for w in widths[1:]]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], chance.randint(2, 100))), (chance.choice((1, 1, 6, 24)), widths[0])


def _head(channels: int, chance: random.Random) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, chance.randint(2, 100))]


def _plain(chance: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    size, channels = _between(chance, 16, 64, 2), chance.choice((1, 3))
    shape, layers = (1, channels, size, size), []
    for _ in range(chance.randint(2, 4)):
        out, kernel = _between(chance, 8, 96, 4), chance.choice((1, 3, 3, 5))
        layers += [nn.Conv2d(channels, out, kernel, chance.choice((1, 2)), kernel // 2), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, *_head(channels, chance)), shape


def _separable(chance: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    size, channels = _between(chance, 32, 96, 4), _between(chance, 8, 32, 4)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU6()]
    for _ in range(chance.randint(3, 6)):
        out, stride = max(8, round(channels * chance.choice((1, 1.5, 2)) / 4) * 4), chance.choice((1, 1, 2))
        layers += [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels), nn.ReLU6(), nn.Conv2d(channels, out, 1), nn.ReLU6()]
        channels = out
    return nn.Sequential(*layers, *_head(channels, chance)), (1, 3, size, size)


class _Sum(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.act = body, nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.body(x))


def _residual(chance: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    size, channels = _between(chance, 16, 48, 2), _between(chance, 12, 48, 4)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 1, 1), nn.ReLU()]
    for _ in range(chance.randint(1, 3)):
        layers.append(_Sum(nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1))))
        out = round(channels * 1.5 / 4) * 4
        layers += [nn.Conv2d(channels, out, 1, 2), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, *_head(channels, chance)), (1, 3, size, size)


class _Block(nn.Module):
    """Self-attention and a feed-forward layer, each behind a norm."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        n, width = x.shape[1], x.shape[2]
        q, k, v = (p(y).view(1, n, self.heads, width // self.heads).transpose(1, 2) for p in (self.q, self.k, self.v))
        held = torch.softmax(q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5, -1) @ v
        x = x + self.out(held.transpose(1, 2).reshape(1, n, width))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def _transformer(chance: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    heads, width = chance.choice((2, 4)), _between(chance, 64, 256, 32)
    blocks = [_Block(width, heads, width * chance.choice((2, 4))) for _ in range(chance.randint(1, 2))]
    return nn.Sequential(*blocks), (1, _between(chance, 8, 96), width)


FAMILIES: tuple[Callable[[random.Random], tuple[nn.Module, tuple[int, ...]]], ...] = (
    _perceptron, _plain, _separable, _residual, _transformer,
)  # fmt: skip
