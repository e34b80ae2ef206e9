"""Kernels one after the other without a line of Python between them, each over as many threads as its work divides into.

A kernel is `void kernel(const int64_t *args, int64_t first, int64_t last)`. A step is a row of four int64: the kernel's address, the address
of its args, how many parts there are, and how many parts at least a thread is worth.

Threads are kept. A step of two threads' work and more is cut into chunks; each thread begins with its own, so that it meets the weights it met
the last time, and then takes those that others have not begun: nobody waits for a thread that lost its core, unless within a chunk. Between
steps threads look for the next one for some tens of microseconds, then they sleep. `neon/src/run.c` is the same in C.
"""

from __future__ import annotations

import atexit
import os
import platform
import sys
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from edgesdk.kernels.panels import aligned

MOST = 64
"""Threads."""
SPINS = 4000
"""Looks at the next step before a thread sleeps; a pause each, 50 to 100 µs in all."""
CHUNKS = 8
"""Of a step, for each thread."""
LINE = 64
ROUND, LEFT, SLEEPERS, KERNEL, ARGS, COUNT, EACH, USE = (LINE * i for i in range(8))
"""Where a pool has what, in bytes: steps begun; chunks not done; threads asleep; the step's kernel, args and parts, chunks of a thread, threads."""
TICKETS = 8 * LINE
"""Behind them a ticket a thread: the low half of the round, then how many of its chunks nobody has taken (32 bits each)."""
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
"""The number of Linux's system call; without it steps run on one thread."""

I32, I64, VOID = ir.IntType(32), ir.IntType(64), ir.VoidType()


@intrinsic  # type: ignore[untyped-decorator]
def call(typing: Any, kernel: Any, args: Any, first: Any, last: Any) -> Any:
    """Call the kernel at an address."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(VOID, [I64.as_pointer(), I64, I64])
        kernel, args, first, last = values
        builder.call(builder.inttoptr(kernel, kind.as_pointer()), [builder.inttoptr(args, I64.as_pointer()), first, last])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, address: Any) -> Any:
    """The int64 at an address; what was stored before it is seen, too."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(values[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, address: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store_atomic(values[1], builder.inttoptr(values[0], I64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address; what it was before."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(values[0], I64.as_pointer()), values[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def swap(typing: Any, address: Any, old: Any, new: Any) -> Any:
    """Store `new` where `old` is; whether it was."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], I64.as_pointer())
        return builder.extract_value(builder.cmpxchg(place, values[1], values[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def pause(typing: Any) -> Any:
    """What a loop that waits says to the CPU."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if platform.machine() == "x86_64":
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(VOID, []), "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic  # type: ignore[untyped-decorator]
def system(typing: Any, number: Any, a: Any, b: Any, c: Any) -> Any:
    """The C library's `syscall`."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(I64, [I64], var_arg=True)
        nothing = ir.Constant(I64, 0)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "syscall"), [*values, nothing, nothing, nothing])

    return types.int64(*[types.int64] * 4), emit


@intrinsic  # type: ignore[untyped-decorator]
def give_way(typing: Any) -> Any:
    """To other threads of this core."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), emit


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def take(pool: int, me: int) -> None:
    """Chunks of the step that runs now, of thread `me` and then of those behind it, until none is left."""
    use = load(pool + USE)
    if me >= use:
        return
    for k in range(use):
        owner = (me + k) % use
        place = pool + TICKETS + LINE * owner
        while True:
            ticket = load(place)
            rest = ticket & 0xFFFFFFFF
            if rest == 0:
                break
            if swap(place, ticket, ticket - 1):  # from here until it is done the step stays
                each, count, threads = load(pool + EACH), load(pool + COUNT), load(pool + USE)
                chunk, chunks = (owner + 1) * each - rest, threads * each
                call(load(pool + KERNEL), load(pool + ARGS), count * chunk // chunks, count * (chunk + 1) // chunks)
                add(pool + LEFT, -1)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def work(pool: int, me: int) -> None:
    """What thread `me` does until the pool is closed."""
    seen = 0
    while True:
        spins = 0
        while load(pool + ROUND) == seen:
            spins += 1
            if spins < SPINS:
                pause()
                continue
            add(pool + SLEEPERS, 1)
            system(FUTEX, pool + ROUND, 128, seen & 0xFFFFFFFF)  # FUTEX_WAIT_PRIVATE
            add(pool + SLEEPERS, -1)
        seen = load(pool + ROUND)
        if load(pool + USE) < 0:
            return
        take(pool, me)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def begin(pool: int) -> None:
    """A new round, for which those asleep wake up."""
    add(pool + ROUND, 1)
    if load(pool + SLEEPERS) > 0:
        system(FUTEX, pool + ROUND, 129, MOST)  # FUTEX_WAKE_PRIVATE


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def run_shared(steps: Any, pool: int, threads: int) -> None:
    begin(pool)
    for i in range(len(steps)):
        count, least = steps[i, 2], max(1, steps[i, 3])
        use = min(threads, count // least)
        if use < 2:
            call(steps[i, 0], steps[i, 1], 0, count)
            continue
        each = max(1, min(CHUNKS, count // (max(1, least // 4) * use)))
        store(pool + KERNEL, steps[i, 0])
        store(pool + ARGS, steps[i, 1])
        store(pool + COUNT, count)
        store(pool + EACH, each)
        store(pool + USE, use)
        store(pool + LEFT, each * use)
        mark = (load(pool + ROUND) + 1) << 32
        for t in range(use):
            store(pool + TICKETS + LINE * t, mark | each)
        begin(pool)
        take(pool, 0)
        spins = 0
        while load(pool + LEFT) > 0:
            spins += 1
            if spins < SPINS:
                pause()
            else:
                give_way()


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def dismiss(pool: int) -> None:
    store(pool + USE, -1)
    begin(pool)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def run_alone(steps: Any) -> None:
    for i in range(len(steps)):
        call(steps[i, 0], steps[i, 1], 0, steps[i, 2])


class Pool:
    """Threads that wait for steps. One caller at a time has them; another runs alone meanwhile."""

    def __init__(self) -> None:
        self._memory = aligned(np.zeros(TICKETS + LINE * MOST, np.uint8), LINE)
        self._address = int(self._memory.ctypes.data)
        self._workers: list[threading.Thread] = []
        self._owned = threading.Lock()

    def run(self, steps: Any, threads: int) -> None:
        threads = min(threads, MOST)
        if not FUTEX or threads < 2 or not self._owned.acquire(blocking=False):
            run_alone(steps)
            return
        try:
            self._grow(threads - 1)
            run_shared(steps, self._address, threads)
        finally:
            self._owned.release()

    def _grow(self, wanted: int) -> None:
        """As many workers, where the system grants them; chunks of those that are missing are done by the others."""
        while len(self._workers) < wanted:
            work.compile((types.int64, types.int64))
            worker = threading.Thread(target=work, args=(self._address, len(self._workers) + 1), name="edgesdk-kernels", daemon=True)
            try:
                worker.start()
            except RuntimeError:
                return
            self._workers.append(worker)

    def close(self) -> None:
        """Ends the threads; whoever runs steps from then on runs alone."""
        if self._workers and self._owned.acquire(timeout=1):
            dismiss(self._address)
            for worker in self._workers:
                worker.join()


_pool = Pool()


def _forked() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = Pool()


os.register_at_fork(after_in_child=_forked)
atexit.register(lambda: _pool.close())


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(steps: Any, threads: int = 1) -> None:
    """Run steps int64 [n, 4] in order. The caller keeps alive everything they point to."""
    _pool.run(steps, min(threads, cores()))


def step(kernel: int, args: Any, count: int, least: int = 1) -> Any:
    """One row of steps; `args` is an int64 array that must outlive it."""
    return np.array([[kernel, args.ctypes.data, count, least]], np.int64)
