"""Kernels one after the other without a line of Python between them, each over as many threads as its work divides into.

A kernel is `void kernel(const int64_t *args, int64_t first, int64_t last)`. A step is a row of four int64: the kernel's address, the address
of its args, how many parts there are, and how many parts at least a thread is worth.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, prange, types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def call(typing: Any, kernel: Any, args: Any, first: Any, last: Any) -> Any:
    """Call the kernel at an address."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word.as_pointer(), word, word])
        kernel, args, first, last = values
        builder.call(builder.inttoptr(kernel, kind.as_pointer()), [builder.inttoptr(args, word.as_pointer()), first, last])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def run_alone(steps: Any) -> None:
    for i in range(len(steps)):
        call(steps[i, 0], steps[i, 1], 0, steps[i, 2])


@njit(nogil=True, parallel=True, cache=True)  # type: ignore[untyped-decorator]
def _shared(kernel: int, args: int, count: int, threads: int) -> None:
    for t in prange(threads):
        call(kernel, args, count * t // threads, count * (t + 1) // threads)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def run_shared(steps: Any, threads: int) -> None:
    for i in range(len(steps)):
        count = steps[i, 2]
        use = min(threads, count // max(1, steps[i, 3]))
        if use > 1:
            _shared(steps[i, 0], steps[i, 1], count, use)
        else:
            call(steps[i, 0], steps[i, 1], 0, count)


def run(steps: Any, threads: int = 1) -> None:
    """Run steps int64 [n, 4] in order. The caller keeps alive everything they point to."""
    if threads > 1:
        run_shared(steps, min(threads, get_num_threads()))
    else:
        run_alone(steps)


def step(kernel: int, args: Any, count: int, least: int = 1) -> Any:
    """One row of steps; `args` is an int64 array that must outlive it."""
    return np.array([[kernel, args.ctypes.data, count, least]], np.int64)
