"""The kernels of a target, each compiled when it is first asked for and kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from llvmlite import ir

from edgesdk.kernels.library import FLOATS, KINDS, ROUNDINGS
from edgesdk.kernels.patterns import BLOCKS, PATTERNS

from .apart import apart_module
from .attention import attention_module
from .compiled import loaded, object_code
from .depthwise import depthwise_module
from .floats import floats_module
from .folded import product_module
from .heads import HEADS, heads_module
from .products import halves, wide
from .rounding import rounding_module
from .simd import ROWS, VNNI
from .sparse import sparse_module
from .steps import run
from .tables import embed_module, tables_module
from .ternary import ternary_module
from .top import top_module


def _module(name: str) -> tuple[str, str]:
    """The module that holds a kernel: its kind, and what it is made for."""
    family, _, rest = name.partition("_")
    if family in ("heads", "attend"):
        return family, name.rpartition("_")[2] if family == "heads" else rest
    if family in ("gemv", "gemm", "embed") and rest in FLOATS:
        return "floats", rest
    if family == "depthwise":
        return family, rest.removesuffix("_float")
    if family == "top":
        return family, ""
    if family in ("gemv", "gemm"):
        return "product", rest
    if name in ("turn", "sparse_turned"):
        return "apart", ""
    if family in ("embed", "pick", "sparse"):
        return ("embed", rest) if rest else ("tables", "")
    return "round", ""


def _emitted(target: str, kind: str, detail: str) -> tuple[ir.Module, dict[str, str]]:
    """A module, and its functions by the names of `kernels.library`."""
    if kind == "floats":
        return floats_module(target, int(detail)), {f"{n}_{detail}": n for n in ("gemv", "gemm", "embed")}
    if kind == "product" and detail.rpartition("_")[2] in (*PATTERNS, BLOCKS):
        bits, scale, *more = detail.split("_")
        module = sparse_module(target, int(bits), scale == "block", more[0] == "zeros", more[-1])
        return module, {f"{n}_{detail}": n for n in ("gemv", "gemm")}
    if kind in ("product", "embed"):
        bits, scale, *more = detail.split("_")
        form = (int(bits), scale == "block", "zeros" in more, more[-1] if more and more[-1] in KINDS else "")
        if kind == "product" and form[3] == "trits":
            return ternary_module(target, form[1]), {f"{n}_{detail}": n for n in ("gemv", "gemm")}
        if kind == "embed":
            return embed_module(target, *form), {f"embed_{detail}": "embed"}
        return product_module(target, *form), {f"{n}_{detail}": n for n in ("gemv", "gemm")}
    if kind == "heads":
        return heads_module(target, int(detail)), {f"{n}_{detail}": n for n in HEADS}
    if kind == "attend":
        what, _, size = detail.rpartition("_")
        return attention_module(target, int(size), what), {f"attend_{detail}": "attend"}
    if kind == "depthwise":
        return depthwise_module(target, *map(int, detail.split("_"))), {f"depthwise_{detail}{e}": f"depthwise{e}" for e in ("", "_float")}
    if kind == "top":
        return top_module(target), {"top": "top"}
    if kind == "apart":
        return apart_module(target), {n: n for n in ("turn", "sparse_turned")}
    if kind == "tables":
        return tables_module(target), {n: n for n in ("embed", "pick", "sparse")}
    return rounding_module(target), {n: n for n in ROUNDINGS}


@lru_cache(maxsize=512)
def _functions(target: str, kind: str, detail: str) -> dict[str, int]:
    """The addresses of a module's functions, by the names of `kernels.library`."""
    module, names = _emitted(target, kind, detail)
    found = loaded(object_code(module, target), list(names.values()), target)
    return {public: found[inner] for public, inner in names.items()}


def objects(target: str, kernels: Iterable[str], symbol: Callable[[str], str]) -> list[bytes]:
    """Object files with these kernels, compiled for a target that need not be this machine's; `symbol` says what each is called in them."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for name in sorted(set(kernels)):
        wanted.setdefault(_module(name), []).append(name)
    found = []
    for (kind, detail), names in wanted.items():
        module, inner = _emitted(target, kind, detail)
        found.append(object_code(module, target, names={inner[n]: symbol(n) for n in names}))
    return found


class Compiled:
    """`library.Library` by LLVM."""

    def __init__(self, target: str) -> None:
        self.target, self.lanes, self.together, self.half = target, ROWS[target], wide(target), halves(target)

    def address(self, name: str) -> int:
        return _functions(self.target, *_module(name))[name]

    def shift_of(self, bits: int) -> int:
        """On x86 inputs beside signed weights are unsigned: `products.Product.signed`."""
        return 128 if self.target in VNNI or (bits == 8 and self.target.startswith("x86")) else 0

    def run(self, steps: Any, threads: int) -> None:
        run(steps, threads)
