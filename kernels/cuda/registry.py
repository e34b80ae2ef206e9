"""Every kernel for GPUs: what it computes, on which numbers, and how far it may be from its reference. All are compiled by NVRTC, from templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgesdk.kernels import reference
from edgesdk.kernels.registry import Kernel

from .compile import ARCHITECTURES

TARGETS = tuple(f"cuda-{arch.replace('_', '')}" for arch in ARCHITECTURES)
_WEIGHTS = (
    *(f"int{bits}, a scale a {group}{zeros}" for bits in (8, 4, 3, 2) for group in ("group", "row") for zeros in ("", ", zeros")),
    "tables of up to 16 values, one or one a row",
)
_ATTENTION = (
    ("float32", "look"), ("float16", "look"), ("int8, a scale a token and head", "look"), ("int4, two numbers a group of columns", "look"),
    ("float16, filled on the GPU", "attend"), ("int8 or int4 filled on the GPU, a scale 32 columns", "attend"),
)  # fmt: skip


def kernels() -> list[Kernel]:
    """`name`: the function of the sources that a kernel is made of."""

    def row(name: str, operation: str, numbers: str, of: Callable[..., Any], tolerance: float) -> Kernel:
        return Kernel(name, operation, numbers, TARGETS, "nvrtc", of, tolerance)

    found = []
    for weights in _WEIGHTS:
        found.append(row("product", "linear, up to 16 tokens, inputs in float16", weights, reference.matrix, 2e-3))
        found.append(row("prefill", "linear, more tokens, inputs in float16", weights, reference.matrix, 2e-3))
        found.append(row("embed", "embedding", weights, reference.embedding, 1e-3))
    found += [row(name, "attention", f"caches in {numbers}", reference.attention, 2e-3) for numbers, name in _ATTENTION]
    return [
        *found,
        row("lookup", "embedding", "float32", reference.embedding, 1e-6),
        row("heads", "heads of queries, keys and values: norm, turns, scale", "float32", reference.heads, 1e-5),
        row("keep", "rotary positions; keys and values into a cache of the GPU's own", "float16, int8, int4", reference.heads, 2e-3),
        row("norm", "norm, result in float16 or float32", "float16, float32", reference.norm, 2e-3),
        row("halve", "activation, times a gate; result in float16 and a power of two a row", "float32", reference.activation, 1e-3),
        row("pick", "rows by number", "float32", reference.pick, 0.0),
        row("sparse", "linear, single weights", "inputs in float16", reference.sparse, 1e-5),
        row("argmax", "the first of the largest", "float16, float32", reference.top, 0.0),
    ]
