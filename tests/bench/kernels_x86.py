"""Our linear layers against the peers' on this computer: time, error, share of what it can read and of what it can multiply, all in one run.

    python -m tests.bench.kernels_x86 [--quick] [--json FILE] [--threads 1,2] [--rows 1,128] [--sizes 2048x2048,…] [--only WORDS] [--clock cpu]
    python -m tests.bench.kernels_x86 --install      # first: ONNX Runtime and ggml into the cache; ExecuTorch and torch are the environment's

Weights and inputs are normal random numbers. A call goes through at least 256 MB of different matrices where there is one row of inputs, and
three where there are many. Ours are timed as they run in a program: a list of steps (inputs rounded anew for each layer, then the product)
without the copies of the Python wrapper around it. In each of five repeats everybody runs once, in turn forwards and backwards, for a stretch of
its own; a repeat's value is the stretch's median. A peer that is not there is skipped with a line. The error is relative, root mean square,
against the float64 product of the unrounded weights and inputs. `--clock cpu`: the thread's processor time, for a busy machine; one thread only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIZES = ("5632x2048", "2048x2048", "11008x4096")
STREAM = 256_000_000
REPEATS = 5
OURS = {
    "edgesdk int8 a row": (8, 0, ""), "edgesdk int4 g32": (4, 32, ""), "edgesdk int4 g32, zeros": (4, 32, "zeros"),
    "edgesdk 3 bits g32": (3, 32, ""), "edgesdk 2 bits g32": (2, 32, ""),
    "edgesdk int8 a row, 2 of 4": (8, 0, "2of4"), "edgesdk int8 a row, 1 of 4": (8, 0, "1of4"), "edgesdk int8 a row, 4 of 16": (8, 0, "4of16"),
    "edgesdk int4 g32, 2 of 4": (4, 32, "2of4"), "edgesdk int4 g32, 1 of 4": (4, 32, "1of4"),
    "edgesdk int8 a row, half the blocks": (8, 0, "blocks"), "edgesdk int4 g32, half the blocks": (4, 32, "blocks"),
    "edgesdk float32": (32, 0, ""), "edgesdk float16": (16, 0, ""),
    "edgesdk super-blocks": (4, 32, "super"), "edgesdk any4, a table a row": (4, 0, "any4"), "edgesdk ternary a row": (2, 0, "ternary"),
    "edgesdk 2 bits a row": (2, 0, ""),
}  # fmt: skip
"""Name → bits, columns of a group (0: the row), and "zeros" of groups' own, a form of `forms`, or which weights are left out (`kernels.patterns`)."""


# ---- what the computer can do


def machine_module(target: str) -> Any:
    """`read`: KiB first … last - 1 of memory into registers. `dot`: 64 dot-product instructions a part, nothing else."""
    from llvmlite import ir

    from edgesdk.kernels.numba.emitter import Emitter

    module = ir.Module(f"machine-{target}")
    e = Emitter(module, "read", target, ("at", "out"))
    b, s = e.b, e.s
    size = 4 * s.rows
    totals = [e.variable(s.ints) for _ in range(8)]
    for v in totals:
        b.store(s.zero(s.ints), v)
    with e.loop(e.first, e.last) as i:
        here = e.add(e.a["at"], e.times(i, 1024))
        for line in range(0, 1024, 64):
            s.prefetch(here, 4096 + line)
        for k in range(1024 // size):
            b.store(b.add(b.load(totals[k % 8]), s.load(here, k * size, s.ints)), totals[k % 8])
    _finish(e, [b.load(v) for v in totals])
    e = Emitter(module, "dot", target, ("at", "out"))
    b, s = e.b, e.s
    weights = s.load(e.a["at"], 0, s.bytes)
    quad = b.bitcast(weights, s.ints)
    sums = [e.variable(s.ints) for _ in range(16)]
    for v in sums:
        b.store(s.zero(s.ints), v)
    with e.loop(e.first, e.last):
        for _ in range(4):
            for v in sums:
                b.store(s.dot(b.load(v), weights, quad), v)
    _finish(e, [b.load(v) for v in sums])
    return module


def _finish(e: Any, values: Sequence[Any]) -> None:
    """Leave the sum where it can be seen, so that LLVM keeps the work."""
    total = values[0]
    for v in values[1:]:
        total = e.b.add(total, v)
    e.s.store(total, e.add(e.a["out"], e.times(e.b.srem(e.first, e.number(64)), 64)), 0)
    e.b.ret_void()


class Computer:
    """Bytes a second read from memory, and multiply-adds of bytes a second, each by `threads` threads."""

    def __init__(self, target: str, threads: int, stream: int) -> None:
        import numpy as np

        from edgesdk.kernels.numba.compiled import loaded, object_code
        from edgesdk.kernels.numba.steps import run, step

        found = loaded(object_code(machine_module(target), target), ["read", "dot"], target)
        self.memory, self.out = np.ones(stream, np.uint8), np.zeros(8192, np.uint8)
        self.args = np.array([self.memory.ctypes.data, self.out.ctypes.data])
        self.rounds, lanes = 400_000, 64 if "avx512" in target else 32
        read, dot = step(found["read"], self.args, stream // 1024), step(found["dot"], self.args, self.rounds)
        self.read = Stretches("read", lambda: run(read, threads), stream // 1024 * 1024)
        self.dot = Stretches("dot", lambda: run(dot, threads), self.rounds * 64 * lanes)


# ---- ours


def with_zeros(weights: Any, bits: int, group: int) -> Any:
    """Codes of a grid with zeros: of several ranges a group, each a share of the whole one, that with the least square error."""
    import numpy as np

    from edgesdk.packed import Code

    rows, cols = weights.shape
    parts = weights.reshape(rows, -1, group)
    top = (1 << bits) - 1
    low, high = parts.min(2, keepdims=True), parts.max(2, keepdims=True)
    best = np.full(low.shape, np.inf, np.float32)
    found = [np.zeros(parts.shape, np.uint8), np.zeros(low.shape, np.float32), np.zeros(low.shape, np.float32)]
    for share in np.linspace(1.0, 0.6, 9, dtype=np.float32):
        scale = (high - low) * share / np.float32(top)
        zero = np.clip(np.rint(-low * share / scale), 0, top).astype(np.float32)
        q = np.clip(np.rint(parts / scale + zero), 0, top)
        error = np.square((q - zero) * scale - parts).sum(2, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        for kept, new in zip(found, (q, scale, zero), strict=True):
            np.copyto(kept, new.astype(kept.dtype), where=better)
    q, scale, zero = found
    return Code(
        "grid", (rows, cols), (bits, group), (q.reshape(rows, cols), scale[..., 0].astype(np.float32), zero[..., 0].astype(np.uint8))
    )


def pruned(weights: Any, pattern: str, lanes: int) -> Any:
    """The weights without the smallest: n of every m stay, or half of the blocks of `lanes` rows and 32 columns."""
    import numpy as np

    from edgesdk.kernels.patterns import BLOCKS, PATTERNS

    if pattern == BLOCKS:
        parts = weights.reshape(-1, lanes, weights.shape[1] // 32, 32)
        sizes = np.square(parts).sum((1, 3), keepdims=True)
        return np.where(sizes >= np.median(sizes), parts, 0).reshape(weights.shape)
    n, m = PATTERNS[pattern]
    parts = weights.reshape(len(weights), -1, m)
    ranks = np.argsort(np.argsort(-np.abs(parts), 2), 2)
    return np.where(ranks < n, parts, 0).reshape(weights.shape)


def ours(task: Any, name: str) -> Any:
    """A tape of all layers: rounding and product, one after the other. The error is against the weights that stay."""
    from edgesdk.kernels.cpu import host_targets
    from edgesdk.kernels.library import library
    from edgesdk.kernels.nearest import nearest
    from edgesdk.kernels.panels import FloatPanels
    from edgesdk.kernels.sparse import packed
    from edgesdk.kernels.tape import Tape
    from edgesdk.packed import Code
    from tests.bench.forms import FORMS
    from tests.bench.kernels_x86_peers import Contestant

    lib = library(host_targets()[0])
    bits, group, what = OURS[name]
    pattern = "" if what == "zeros" or what in FORMS else what
    weights = pruned(task.weights, pattern, lib.lanes) if pattern else task.weights
    if bits in (16, 32):
        code = Code("dense", weights.shape, (bits,), (weights,))
    elif what in FORMS:
        code = FORMS[what](weights)
    else:
        code = with_zeros(weights, bits, group) if what == "zeros" else nearest(weights, bits, group, lib.half)
    panels = packed(code, pattern, lib.lanes, lib.together, lib.half)
    tape, layers = Tape(lib, task.threads), task.layers(panels.nbytes)
    x = tape.room(len(task.x), weights.shape[1])
    x.array[:] = task.x
    outs = [tape.room(len(task.x), len(weights)) for _ in range(2)]
    room = Room(layers * (panels.nbytes + 1024))
    for i in range(layers):
        layer = elsewhere(panels, i, room)
        if isinstance(layer, FloatPanels):
            tape.floats(layer, x, outs[min(i, 1)])
        else:
            tape.linear(layer, tape.round(x, lib.shift_of(layer.value_bits)), outs[min(i, 1)])
    return Contestant(name, panels.nbytes, layers, tape.run, lambda: outs[0].array.copy(), weights)


class Room:
    """Memory for all matrices side by side, as a program's file has them: so much at once has large pages."""

    def __init__(self, nbytes: int) -> None:
        import numpy as np

        self._all = np.empty(nbytes + 64, np.uint8)
        self._free = -self._all.ctypes.data % 64

    def take(self, array: Any) -> Any:
        """A copy of an array."""
        import numpy as np

        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        place = self._all[self._free : self._free + flat.size]
        place[:] = flat
        self._free += -(-flat.size // 64) * 64
        return place.view(array.dtype).reshape(array.shape)


def elsewhere(panels: Any, i: int, room: Room) -> Any:
    """The same matrix in `room`, of the i-th its panels in another order where all are of one size."""
    import numpy as np

    from edgesdk.kernels.panels import written

    def moved(array: Any) -> Any:
        parts = np.ascontiguousarray(array)
        if "starts" not in arrays and array.size >= panels.panels and (array is not panels.tables or len(array) > 1):
            parts = np.roll(parts.reshape(panels.panels, -1), i, 0)
        return room.take(parts.reshape(array.shape))

    arrays = written(panels)[1]
    return dataclasses.replace(panels, **{name: moved(array) for name, array in arrays.items() if array.size})


# ---- measuring


class Stretches:
    """Calls, timed in stretches."""

    def __init__(self, name: str, call: Callable[[], Any], work: float) -> None:
        self.name, self.call, self.work = name, call, work
        self.wall: list[list[float]] = []
        self.cpu: list[list[float]] = []

    def run(self, seconds: float) -> None:
        time.sleep(0.02)  # threads of the one before go to sleep
        self.call()
        wall: list[float] = []
        cpu: list[float] = []
        end = time.perf_counter() + seconds
        while len(wall) < 3 or time.perf_counter() < end:
            start, own = time.perf_counter(), time.thread_time()
            self.call()
            cpu.append(time.thread_time() - own)
            wall.append(time.perf_counter() - start)
        self.wall.append(wall)
        self.cpu.append(cpu)

    def seconds(self, clock: str) -> list[float]:
        """Of a call, a repeat each."""
        return [statistics.median(times) for times in (self.wall if clock == "wall" else self.cpu)]

    def rate(self, clock: str) -> float:
        """Work a second: the best of the repeats, which is what a limit is."""
        return self.work / min(self.seconds(clock))


def measured(size: str, m: int, threads: int, given: argparse.Namespace) -> dict[str, Any]:
    """Everybody at one size and number of rows."""
    import numpy as np

    from edgesdk.kernels.cpu import host_targets
    from tests.bench.kernels_x86_peers import Task, peers

    rows, cols = (int(n) for n in size.split("x"))
    rng = np.random.default_rng(rows + m)
    weights = rng.standard_normal((rows, cols), np.float32) / np.float32(cols**0.5)
    x = rng.standard_normal((m, cols), np.float32)
    task = Task(weights, x, threads, given.stream)
    wanted = x[:16].astype(np.float64) @ weights.T.astype(np.float64)
    makers = {name: (lambda name=name: ours(task, name)) for name in OURS} | peers(task)
    made, skipped, errors = [], {}, {}
    for name, make in makers.items():
        if given.only and not any(w in name for w in given.only.split(",")):
            continue
        try:
            found = make()
            found.call()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            sys.stderr.write(f"skipped: {name} ({skipped[name]})\n")
            continue
        exact = (
            wanted if found.weights is None or found.weights is weights else x[:16].astype(np.float64) @ found.weights.T.astype(np.float64)
        )
        apart = np.asarray(found.first(), np.float64)[: len(exact), :rows] - exact
        errors[name] = float(np.sqrt(np.square(apart).mean() / np.square(exact).mean()))
        made.append((found, Stretches(name, found.call, found.layers)))
    computer = Computer(host_targets()[0], threads, given.stream)
    both = [computer.read, computer.dot, *(s for _, s in made)]
    loads = []
    for repeat in range(given.repeats):
        loads.append(os.getloadavg()[0])
        for one in both if repeat % 2 == 0 else both[::-1]:
            one.run(given.seconds)
    limits = {"read_bytes_s": computer.read.rate(given.clock), "dot_mac_s": computer.dot.rate(given.clock)}
    found = [row(c, s, given.clock, rows * cols * m) | {"error": errors[c.name]} for c, s in made]
    machine = [{"name": s.name, "wall_s": s.wall, "cpu_s": s.cpu} for s in both[:2]]
    return {"size": size, "m": m, "threads": threads, **limits, "loads": loads, "skipped": skipped, "rows": found, "machine": machine}


def row(c: Any, s: Stretches, clock: str, macs: int) -> dict[str, Any]:
    each = [t / c.layers for t in s.seconds(clock)]
    middle = statistics.median(each)
    return {
        "name": c.name, "layers": c.layers, "weight_bytes": c.weight_bytes, "median_s": middle, "least_s": min(each), "most_s": max(each),
        "bytes_s": c.weight_bytes / middle, "mac_s": macs / middle, "wall_s": s.wall, "cpu_s": s.cpu,
    }  # fmt: skip


# ---- a run


def table(found: dict[str, Any]) -> str:
    read, dot = found["read_bytes_s"], found["dot_mac_s"]
    lines = [
        f"\n### {found['size']}, M = {found['m']}, {found['threads']} core{'s' * (found['threads'] > 1)}: reads {read / 1e9:.1f} GB/s, "
        f"multiplies {dot / 1e12:.3f} TMAC/s (load {min(found['loads']):.1f} to {max(found['loads']):.1f})\n",
        "| kernel | µs | from … to | GB/s of weights | of read bandwidth | TMAC/s | of int8 peak | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(found["rows"], key=lambda r: r["median_s"]):
        lines.append(
            f"| {r['name']} | {r['median_s'] * 1e6:.0f} | {r['least_s'] * 1e6:.0f} … {r['most_s'] * 1e6:.0f} | {r['bytes_s'] / 1e9:.1f} | "
            f"{r['bytes_s'] / read:.0%} | {r['mac_s'] / 1e12:.3f} | {r['mac_s'] / dot:.0%} | {r['error']:.4f} |"
        )
    return "\n".join([*lines, *(f"- {name}: skipped, {why}" for name, why in found["skipped"].items())]) + "\n"


def alone(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All of one number of threads, in this process, on as many cores."""
    threads = int(given.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    os.environ["NUMBA_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
    warnings.simplefilter("ignore")  # torch's, of what peers call
    import torch

    torch.set_num_threads(threads)
    out = []
    for size in given.sizes.split(","):
        for m in given.rows.split(","):
            out.append(measured(size, int(m), threads, given))
            sys.stdout.write(table(out[-1]))
            sys.stdout.flush()
            gc.collect()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="fetch and build the peers that are not in this environment")
    parser.add_argument("--quick", action="store_true", help="one size, three repeats, 64 MB of weights a call")
    parser.add_argument("--json", type=Path, help="write every raw sample here")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rows", default="1,128", help="rows of inputs (M)")
    parser.add_argument("--sizes", help=f"rows x columns of the weights (default: {', '.join(SIZES)})")
    parser.add_argument("--only", default="", help="words of which a name must hold one, parted by commas")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a stretch")
    parser.add_argument("--stream", type=int, help="bytes of weights a call of one row goes through")
    given = parser.parse_args()
    given.sizes = given.sizes or (SIZES[0] if given.quick else ",".join(SIZES))
    given.repeats = given.repeats or (3 if given.quick else REPEATS)
    given.stream = given.stream or (64_000_000 if given.quick else STREAM)
    if given.install:
        from tests.bench.kernels_x86_peers import install

        return install()
    if "," not in given.threads:
        found = alone(given)
    else:
        found = [r for t in given.threads.split(",") for r in apart(t, given)]
    if given.json:
        given.json.write_text(json.dumps({"kind": "kernels-x86", "schema_version": 1, "clock": given.clock, "runs": found}))
    return None


def apart(threads: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """`alone` in a process of its own: thread pools are made once."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "runs.json"
        more = [f"--{n}={getattr(given, n)}" for n in ("rows", "sizes", "only", "clock", "repeats", "seconds", "stream")]
        subprocess.run([sys.executable, "-m", "tests.bench.kernels_x86", f"--threads={threads}", f"--json={out}", *more], check=True)
        runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"]
        return runs


if __name__ == "__main__":
    main()
