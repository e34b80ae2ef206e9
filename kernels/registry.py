"""Every kernel: what it computes, on which weights or numbers, for which target, how it is made, and how far it may be from its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import reference
from .cpu import TARGETS
from .depthwise import PLACES
from .library import ACTIVATIONS, FLOATS, NORMS, form
from .patterns import BITS as NM_BITS
from .patterns import BLOCKS, PATTERNS, pays

BITS = (8, 4, 3, 2)
TABLE_BITS = (4, 3, 2)
ARM = ("arm-i8mm", "arm-dotprod", "arm-neon")


@dataclass(frozen=True)
class Kernel:
    """`name` as `library.Library.address` takes it (of heads, without their size). `tolerance`: of the largest output, against `reference`."""

    name: str
    operation: str
    format: str
    targets: tuple[str, ...]
    made: str
    reference: Callable[..., Any]
    tolerance: float


def _linear() -> list[Kernel]:
    found = []
    for bits in BITS:
        for per_block in (False, True):
            for zeros in (False, True):
                weights = f"int{bits}, a scale {'a group of 32 columns or more' if per_block else 'a row'}{', zeros' * zeros}"
                name = form(bits, per_block, zeros)
                for kind, operation in (("gemv", "linear, one token"), ("gemm", "linear, many tokens")):
                    for made, targets in (("llvm", tuple(TARGETS)), ("c", ARM)):
                        found.append(Kernel(f"{kind}_{name}", operation, weights, targets, made, reference.linear, 2e-3))
                found.append(Kernel(f"embed_{name}", "embedding", weights, tuple(TARGETS), "llvm", reference.embedding, 1e-3))
    return found


def _coded() -> list[Kernel]:
    """Forms that are no plain grids; references take what panels keep of a code (`pack.as_kept`)."""
    forms = {form(4, True, False, "super"): "int4, a step and an offset of 8 bits a block, a float16 for 8 blocks"}
    for per_block in (False, True):
        forms[form(5, per_block, False, "trits")] = f"ternary, three weights in 5 bits, a scale {'a group' if per_block else 'a row'}"
    for bits in TABLE_BITS:
        for kind in ("table", "tables"):
            for per_block in (False, True):
                whose, scale = "one" if kind == "table" else "one a row", "a group" if per_block else "a row"
                forms[form(bits, per_block, False, kind)] = f"a table of {1 << bits} int8 numbers, {whose}, a scale {scale}"
    found = []
    for name, weights in forms.items():
        for family, operation in (("gemv", "linear, one token"), ("gemm", "linear, many tokens"), ("embed", "embedding")):
            what = reference.embedding if family == "embed" else reference.linear
            found.append(Kernel(f"{family}_{name}", operation, weights, tuple(TARGETS), "llvm", what, 2e-3))
    return found


def _sparse() -> list[Kernel]:
    """Products without zero weights, and those with weights in floats."""
    found, families = [], (("gemv", "linear, one token"), ("gemm", "linear, many tokens"))
    forms = [
        (bits, per_block, False, pattern) for bits in NM_BITS for per_block in (False, True) for pattern in PATTERNS if pays(bits, pattern)
    ]
    forms += [(bits, per_block, zeros, BLOCKS) for bits in BITS for per_block in (False, True) for zeros in (False, True)]
    for bits, per_block, zeros, pattern in forms:
        which = "blocks that are not zero" if pattern == BLOCKS else f"{pattern.replace('of', ' of every ')} columns"
        weights = f"int{bits}, {which}, a scale {'a group' if per_block else 'a row'}{', zeros' * zeros}"
        for family, operation in families:
            name = f"{family}_{form(bits, per_block, zeros)}_{pattern}"
            found.append(Kernel(name, operation, weights, tuple(TARGETS), "llvm", reference.linear, 2e-3))
    for name in FLOATS:
        targets = tuple(t for t in TARGETS if name == "32" or t != "plain")
        for family, operation in (*families, ("embed", "embedding")):
            what = reference.embedding if family == "embed" else reference.matrix
            found.append(Kernel(f"{family}_{name}", operation, f"float{name}", targets, "llvm", what, 5e-6))
    return found


def _rest() -> list[Kernel]:
    every, floats = tuple(TARGETS), "float32"
    found = [
        Kernel("embed", "embedding", floats, every, "llvm", reference.embedding, 1e-6),
        Kernel("pick", "rows by number", floats, every, "llvm", reference.pick, 0.0),
        Kernel("sparse", "linear, single weights", floats, every, "llvm", reference.sparse, 1e-5),
        Kernel("sparse_turned", "linear, single weights, many tokens", floats, every, "llvm", reference.sparse, 1e-5),
        Kernel("turn", "rows as columns", floats, every, "llvm", np.transpose, 0.0),
        Kernel("top", "largest numbers", floats, every, "llvm", reference.top, 0.0),
        *(
            Kernel(f"depthwise_{size}_{stride}{ending}", "depthwise convolution", f"int8 → {out}", every, "llvm", reference.depthwise, 1e-6)
            for size, stride in PLACES
            for ending, out in (("", "int8"), ("_float", "float32"))
        ),
        Kernel("attend", "attention", "caches in float32", every, "llvm", reference.attention, 2e-5),
        Kernel("attend_half", "attention", "caches in float16", every, "llvm", reference.attention, 2e-5),
        Kernel("attend_int8", "attention", "caches in int8, a scale a token and head", every, "llvm", reference.attention, 2e-5),
        Kernel(
            "attend_int4",
            "attention",
            "caches in int4, a scale and a least value a token and 64 columns",
            every,
            "llvm",
            reference.attention,
            2e-5,
        ),
        *(
            Kernel("round", "inputs to int8", floats, every if made == "llvm" else ARM, made, reference.round_inputs, 0.51 / 255)
            for made in ("llvm", "c")
        ),
    ]
    for normed in ("", "_normed"):
        for turned in ("", "_turned"):
            found.append(Kernel(f"heads{normed}{turned}", "heads, their norm and turns", floats, every, "llvm", reference.heads, 1e-5))
    for norm in NORMS:
        found.append(Kernel(norm, "norm", floats, every, "llvm", reference.norm, 3e-6))
        found.append(Kernel(f"{norm}_round", "norm, result to int8", floats, every, "llvm", reference.norm, 3e-6))
    for name in ACTIVATIONS:
        for gated in ("", "_gated"):
            found.append(Kernel(f"{name}{gated}_round", "activation, result to int8", floats, every, "llvm", reference.activation, 3e-6))
    return found


def kernels() -> list[Kernel]:
    """Those of CPUs, by one list of args (`library.args_of`). Those of GPUs have launches of their own: `kernels.cuda`."""
    return [*_linear(), *_coded(), *_sparse(), *_rest()]
