"""Kernels for arm64 under qemu-user: cases are written to a file, one static program runs them all, and their buffers come back."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgesdk.cache import cache_dir
from edgesdk.kernels.library import KEPT_ARGS, ROUND_ARGS
from edgesdk.kernels.neon import build
from edgesdk.kernels.panels import BLOCK, Panels, written
from edgesdk.kernels.tape import panel_sizes

HARNESS = Path(__file__).parent / "native" / "harness.c"
CPUS = {"arm-neon": ("cortex-a53", "cortex-a72"), "arm-dotprod": ("cortex-a76",), "arm-i8mm": ("max",)}
"""Target → emulated cores that have its instructions and, but for the last, not those of the next target."""


def emulator() -> str | None:
    return next((found for name in ("qemu-aarch64-static", "qemu-aarch64") if (found := shutil.which(name))), None)


@dataclass
class Case:
    """`buffers` arrays (given back after the run); `tables` of args: a number, or a pair (buffer, offset); `steps`: kernel, table, count, least.

    With `threads` 0 the count of a step is (first, last), else it goes through `edge_run`.
    """

    buffers: list[Any] = field(default_factory=list)
    tables: list[list[Any]] = field(default_factory=list)
    steps: list[tuple[str, int, Any, int]] = field(default_factory=list)
    threads: int = 0
    places: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, array: Any, shift: int = 0) -> None:
        """A buffer by name; `shift` bytes after it, so that it starts as many bytes before an aligned address."""
        self.places[name] = len(self.buffers)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.buffers.append(np.concatenate([flat, np.full(shift, 0xA5, np.uint8)]))

    def table(self, names: Sequence[str], numbers: dict[str, int]) -> int:
        self.tables.append([numbers[n] if n in numbers else (self.places[n], 0) if n in self.places else 0 for n in names])
        return len(self.tables) - 1

    def given(self, name: str, kind: Any, shape: tuple[int, ...]) -> Any:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return self.buffers[self.places[name]][:size].view(kind).reshape(shape)


def product(
    kernel: str, panels: Panels, q: tuple[Any, ...], more: dict[str, Any], part: tuple[int, int] | None = None, shift: int = 0
) -> Case:
    """A product of given bytes: q (uint8 [blocks, M, 32], sums, scale, zero); `more`: bias, residual, both padded; out starts as 777."""
    case = Case()
    rows = q[0].shape[1]
    for name, array in written(panels)[1].items():
        if array.size:
            case.add(name, array, shift)
    for name, array in zip(("q", "q_sums", "q_scale", "q_zero"), q, strict=True):
        case.add(name, array, shift)
    for name, array in more.items():
        case.add(name, array, shift)
    case.add("out", np.full((rows, panels.panels * panels.lanes), 777, np.float32), shift)
    count = panels.panels // (2 if "gemm" in kernel else 1)
    case.steps.append((kernel, case.table(KEPT_ARGS, numbers(panels, rows)), part or (0, count), 1))
    return case


def numbers(panels: Panels, rows: int) -> dict[str, int]:
    return {"m": rows, "blocks": panels.blocks, "stride": 4 * panels.panels * panels.lanes, **panel_sizes(panels)}


def rounded(kernel: str, x: Any, shift: int = 0) -> Case:
    """`round` of x float32 [M, 32 · blocks]."""
    case = Case()
    rows, width = x.shape
    case.add("x", x, shift)
    for name, size in (("q", rows * width), ("q_sums", 4 * rows * width // BLOCK), ("q_scale", 4 * rows), ("q_zero", 4 * rows)):
        case.add(name, np.full(size, 0x77, np.uint8), shift)
    case.steps.append(
        (kernel, case.table(ROUND_ARGS, {"blocks": width // BLOCK, "stride": 4 * width, "m": rows, "shift": 0}), (0, rows), 1)
    )
    return case


def program(
    names: Sequence[str], extra: Sequence[Path] = (), by: Any = None, sources: Sequence[Path] = (), flags: Sequence[str] = ()
) -> Path:
    """The static harness with these kernels, those of more object files and more sources."""
    text = "".join(f"NAME({n})\n" for n in names)
    listed = cache_dir("kernels") / f"names-{hashlib.sha256(text.encode()).hexdigest()[:16]}.h"
    listed.write_text(text)
    source = listed.with_suffix(".c")
    source.write_text(f'#define NAMES_FILE "{listed}"\n{HARNESS.read_text()}')
    return build.program([source, *sources], extra, by, flags)


def emitted(targets: Sequence[str], kernels: Sequence[str]) -> list[Path]:
    """Object files of the kernels in LLVM IR, called "llvm_" and then what those in C are called."""
    from edgesdk.kernels.numba.library import objects

    made = []
    for target in targets:
        for content in objects(target, kernels, lambda name, t=target: f"llvm_{build.symbol(t, name)}"):
            made.append(cache_dir("kernels") / f"{hashlib.sha256(content).hexdigest()[:32]}.o")
            made[-1].write_bytes(content)
    return made


def run(harness: Path, names: Sequence[str], cases: Sequence[Case], cpu: str, folder: Path, by: Sequence[str] = ()) -> None:
    """Runs the cases on an emulated core; their buffers then hold what the kernels left. Raises where a kernel trapped."""
    place = {n: i for i, n in enumerate(names)}
    parts = [_words([len(cases)])]
    for case in cases:
        parts.append(_words([len(case.buffers), len(case.tables), len(case.steps), case.threads]))
        for b in case.buffers:
            parts += [_words([b.size]), b.tobytes(), bytes(-b.size % 8)]
        for t in case.tables:
            parts.append(_words([len(t), *(v for e in t for v in (e if isinstance(e, tuple) else (-1, e)))]))
        for kernel, table, count, least in case.steps:
            parts.append(_words([place[kernel], table, (count[0] << 32 | count[1]) if isinstance(count, tuple) else count, least]))
    given, answers = folder / "cases", folder / "answers"
    given.write_bytes(b"".join(parts))
    qemu = by or (emulator() or "",)
    done = subprocess.run([*qemu, "-cpu", cpu, str(harness), str(given), str(answers)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{cpu}: {done.stderr or done.returncode}"
    content, at = np.fromfile(answers, np.uint8), 0
    for case in cases:
        for i, b in enumerate(case.buffers):
            case.buffers[i] = content[at : at + b.size].copy()
            at += b.size


def _words(values: Sequence[int]) -> bytes:
    return np.array(values, np.int64).tobytes()
