"""The kernels of a target, each compiled when it is first asked for and kept in the cache."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from edgesdk.kernels.library import ROUNDINGS

from .attention import ATTENTION, attention_module
from .compiled import loaded, object_code
from .products import halves, product_module, wide
from .rounding import rounding_module
from .simd import ROWS
from .steps import run
from .tables import embed_module, tables_module


@lru_cache(maxsize=512)
def _functions(target: str, family: str, detail: str) -> dict[str, int]:
    """The addresses of a module's functions, by the names of `kernels.library`."""
    if family in ("gemv", "gemm", "embed") and detail:
        bits, scale, *zeros = detail.split("_")
        form = (int(bits), scale == "block", bool(zeros))
        module = embed_module(target, *form) if family == "embed" else product_module(target, *form)
        names = ["embed"] if family == "embed" else ["gemv", "gemm"]
        return {f"{n}_{detail}": a for n, a in loaded(object_code(module, target), names, target).items()}
    if family in ("heads", "attend"):
        found = loaded(object_code(attention_module(target, int(detail)), target), list(ATTENTION), target)
        return {f"{n}_{detail}": a for n, a in found.items()}
    if family in ("embed", "pick"):
        return loaded(object_code(tables_module(target), target), ["embed", "pick"], target)
    return loaded(object_code(rounding_module(target), target), list(ROUNDINGS), target)


class Compiled:
    """`library.Library` by LLVM."""

    def __init__(self, target: str) -> None:
        self.target, self.lanes, self.together, self.half = target, ROWS[target], wide(target), halves(target)

    def address(self, name: str) -> int:
        family, _, rest = name.partition("_")
        if family in ("heads", "attend"):
            return _functions(self.target, "attend", name.rpartition("_")[2])[name]
        if family in ("gemv", "gemm"):
            return _functions(self.target, "gemm", rest)[name]
        if family in ("embed", "pick"):
            return _functions(self.target, "embed", rest)[name]
        return _functions(self.target, "round", "")[name]

    def shift_of(self, bits: int) -> int:
        """On x86 inputs beside signed weights are unsigned."""
        return 128 if bits == 8 and self.target.startswith("x86") else 0

    def run(self, steps: Any, threads: int) -> None:
        run(steps, threads)
