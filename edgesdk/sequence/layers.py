"""The layers of `model`: norms, grouped-query attention over parts that stay where they are, the feed-forward. Letters of shapes are those named there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesdk.sequence.config import SequenceConfig
from edgesdk.sequence.config import Stack as StackConfig

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values [B, K, time, D]; or the cosines and sines of places [B, 1, N, D / 2]."""
Held: TypeAlias = tuple[Tensor, ...]
"""A pair of keys and values, in float32 or float16; or their int8 codes and, for each, a scale a token and head [B, K, time]; or uint8, two codes
a byte [B, K, time, D / 2], and for each float16 scales and least values (see `caches.small_codes`)."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Norm(nn.Module):
    """RMS or layer norm over the last dimension."""

    averager: Tensor | None

    def __init__(self, dim: int, config: SequenceConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if config.norm == "layer" else None
        self.averager = None

    def by_product(self) -> None:
        """Take means by a product with a vector from now on: XNNPACK computes it, and computes no mean of three dimensions."""
        del self.averager
        self.register_buffer("averager", torch.full_like(self.weight, 1.0 / len(self.weight))[:, None], persistent=False)

    def mean(self, x: Tensor) -> Tensor:
        if self.averager is None:
            return x.mean(-1, keepdim=True)
        return (x.reshape(-1, x.shape[-1]) @ self.averager).reshape(*x.shape[:-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            x = x - self.mean(x)
        x = x * torch.rsqrt(self.mean(x * x) + self.eps) * self.weight
        return x if self.bias is None else x + self.bias


def rotate(x: Tensor, places: Pair | None) -> Tensor:
    """Rotary positions on [B, heads, N, D]: the first half of D against the second."""
    if places is None:
        return x
    cos, sin = places
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def split(x: Tensor, heads: int, norm: nn.Module | None = None) -> Tensor:
    """[B, N, heads · D] → [B, heads, N, D], each head behind `norm`: in three dimensions, as the converter to .tflite spoils products behind norms of four."""
    b, n, _ = x.shape
    x = x if norm is None else norm(x.reshape(b, n * heads, -1))
    return x.reshape(b, heads, 1, -1) if n == 1 else x.reshape(b, n, heads, -1).transpose(1, 2)


@torch.library.custom_op("edgesdk::from_small_codes", mutates_args=())
def from_small_codes(codes: Tensor, beside: Tensor) -> Tensor:
    """What `caches.small_codes` stands for: uint8 [..., D / 2] and float16 [..., 2 · groups] → float32 [..., D]."""
    both = torch.cat([codes & 15, codes >> 4], -1).to(torch.float32)
    pairs = beside.to(torch.float32).reshape(*beside.shape[:-1], -1, 2)
    parts = both.reshape(*pairs.shape[:-1], -1)
    numbers: Tensor = (parts * pairs[..., :1] + pairs[..., 1:]).flatten(-2)
    return numbers


@from_small_codes.register_fake
def _(codes: Tensor, beside: Tensor) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=torch.float32)


def attend(q: Tensor, parts: Sequence[Held], mask: Tensor) -> Tensor:
    """Softmax over all parts together, each of which stays where it is: q [B, K, R, D], mask [B, 1 or K, 1 or R, all their times],
    without B where it is 1.

    Products are of three dimensions: of four, exporters copy both sides first. Codes become numbers where they are read, one side at a time,
    and their scales go to the scores and to the weights, which are fewer.
    """
    b, heads, rows, size = q.shape
    q = q.reshape(b * heads, rows, size)

    def flat(part: Held, side: int) -> Tensor:
        x = part[side]
        if x.dtype == torch.uint8:
            x = from_small_codes(x, part[2 + side])
        return (x if x.dtype == torch.float32 else x.to(torch.float32)).reshape(b * heads, -1, size)

    def scaled(x: Tensor, part: Held, side: int) -> Tensor:
        return x * part[2 + side].reshape(b * heads, 1, -1) if part[side].dtype == torch.int8 else x

    scores = [scaled(torch.bmm(q, flat(p, 0).transpose(1, 2)), p, 0) for p in parts]
    weights = scores[0] if len(parts) == 1 else torch.cat(scores, -1)
    if b == 1:
        weights = torch.softmax(weights + mask, -1)
    else:
        weights = torch.softmax(weights.reshape(b, heads, rows, -1) + mask, -1).reshape(b * heads, rows, -1)
    first = parts[0][1].shape[2]
    out = torch.bmm(scaled(weights[..., :first], parts[0], 1), flat(parts[0], 1))
    if len(parts) == 2:
        out = out + torch.bmm(scaled(weights[..., first:], parts[1], 1), flat(parts[1], 1))
    return out.reshape(b, heads, rows, size)


class KeysValues(nn.Module):
    """Makes keys and values [B, K, N, D] of x [B, N, width]; with width 0 there is nothing to make: they are another layer's."""

    def __init__(self, config: SequenceConfig, stack: StackConfig, width: int, qk_norm: bool) -> None:
        super().__init__()
        self.kv_heads, self.size = stack.kv_heads, stack.head
        if width:
            self.k = nn.Linear(width, stack.kv_heads * stack.head, bias=config.qkv_bias and config.k_bias)
            self.v = nn.Linear(width, stack.kv_heads * stack.head, bias=config.qkv_bias)
            self.k_norm = Norm(stack.head, config) if qk_norm else None

    def keys_values(self, x: Tensor, places: Pair | None) -> Pair:
        return rotate(split(self.k(x), self.kv_heads, self.k_norm), places), split(self.v(x), self.kv_heads)


class Attention(KeysValues):
    """Grouped-query attention: queries of `stack.dim`, keys and values made of `width` (of other tokens, in cross-attention)."""

    def __init__(self, config: SequenceConfig, stack: StackConfig, width: int, qk_norm: bool) -> None:
        super().__init__(config, stack, width, qk_norm)
        self.heads = stack.heads
        self.scale = config.attention_scale if config.attention_scale is not None else stack.head**-0.5
        self.q = nn.Linear(stack.dim, stack.heads * stack.head, bias=config.qkv_bias)
        self.q_norm = Norm(stack.head, config) if qk_norm else None
        self.o = nn.Linear(stack.heads * stack.head, stack.dim, bias=config.out_bias)

    def forward(self, x: Tensor, places: Pair | None, parts: Sequence[Held], mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = rotate(split(self.q(x), self.heads, self.q_norm), places) * self.scale
        out = attend(q.reshape(b, self.kv_heads, -1, self.size), parts, mask)
        out = out.reshape(b, 1, -1) if n == 1 else out.reshape(b, self.heads, n, self.size).transpose(1, 2).reshape(b, n, -1)
        return self.o(out)  # type: ignore[no-any-return]


class SharedCache(KeysValues):
    """The decoder-decoder layout's one pair of keys and values, made of what the first layers give."""

    def __init__(self, config: SequenceConfig, stack: StackConfig) -> None:
        super().__init__(config, stack, stack.dim, config.qk_norm)
        self.norm = Norm(stack.dim, config) if config.norm_place == "pre" else nn.Identity()

    def forward(self, x: Tensor, places: Pair | None) -> Pair:
        return self.keys_values(self.norm(x), places)


class FeedForward(nn.Module):
    def __init__(self, config: SequenceConfig, stack: StackConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = nn.Linear(stack.dim, stack.ffn, bias=config.ffn_bias) if config.gated else None
        self.up = nn.Linear(stack.dim, stack.ffn, bias=config.ffn_bias)
        self.down = nn.Linear(stack.ffn, stack.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        act = _ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Self-attention, cross-attention where `memory` (the width it reads) is not 0, feed-forward. `reader`: keys and values are given."""

    def __init__(self, config: SequenceConfig, stack: StackConfig, memory: int = 0, reader: bool = False) -> None:
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.self_norm, self.self_attn = Norm(stack.dim, config), Attention(config, stack, 0 if reader else stack.dim, config.qk_norm)
        if memory:
            self.cross_norm, self.cross_attn = Norm(stack.dim, config), Attention(config, stack, memory, False)
        self.ffn_norm, self.ffn = Norm(stack.dim, config), FeedForward(config, stack)

    def around(self, norm: nn.Module, x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        return x + inner(norm(x)) if self.pre else norm(x + inner(x))

    def forward(
        self, x: Tensor, places: Pair | None, mask: Tensor, cache: Held | None = None, shared: Sequence[Held] = (),
        cross: Held | None = None, cross_mask: Tensor | None = None,
    ) -> tuple[Tensor, Pair | None]:  # fmt: skip
        """The layer's output and the new keys and values. It attends to `cache` and what x gives, or to `shared` alone."""
        made: list[Pair] = []

        def attention(h: Tensor) -> Tensor:
            if not shared:
                made.append(self.self_attn.keys_values(h, places))
            parts = shared or ([cache, *made] if cache is not None else made)
            out: Tensor = self.self_attn(h, places, parts, mask)
            return out

        x = self.around(self.self_norm, x, attention)
        if cross is not None and cross_mask is not None:
            x = self.around(self.cross_norm, x, lambda h: self.cross_attn(h, None, [cross], cross_mask))
        return self.around(self.ffn_norm, x, self.ffn), made[0] if made else None
