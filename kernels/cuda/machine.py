"""What runs kernels: memory, launches, lists of launches. `launch.Gpu` is a GPU; `emulated.Emulated` runs the same sources on a CPU, slowly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .compile import Kernel, packed_args


@dataclass(frozen=True)
class Memory:
    """An array in the machine's memory, for as long as this value lives."""

    address: int
    shape: tuple[int, ...]
    dtype: Any
    owner: Any = field(repr=False, compare=False)  # frees it

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * int(np.dtype(self.dtype).itemsize)

    def columns(self, first: int) -> Memory:
        """The same rows from column `first` on; they keep their stride."""
        return Memory(self.address + first * int(np.dtype(self.dtype).itemsize), self.shape, self.dtype, self)


@dataclass(frozen=True)
class Launch:
    """A kernel on a grid of blocks. `args`: its struct; `keeps`: memory that it points to."""

    kernel: Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    args: bytes
    keeps: tuple[Memory, ...] = ()


class Machine(Protocol):
    """Work is done in the order in which it is given. `put` and `get` wait for it, `run` and what `graph` gives do not."""

    name: str
    units: int
    """Multiprocessors, for how far work is divided."""

    def empty(self, shape: Sequence[int], dtype: Any) -> Memory: ...
    def put(self, array: Any, into: Memory | None = None) -> Memory: ...
    def get(self, memory: Memory) -> Any: ...
    def run(self, launches: Sequence[Launch]) -> None: ...
    def graph(self, launches: Sequence[Launch]) -> Callable[[], None]: ...


def launch(kernel: Kernel, grid: Sequence[int], values: Mapping[str, Any], shared_bytes: int = 0) -> Launch:
    """A launch whose struct has these values; a `Memory` stands for its address, None for 0. Raises `InputError` for a name that is no field."""
    plain = {n: v.address if isinstance(v, Memory) else 0 if v is None else v for n, v in values.items()}
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(kernel, (x, y, z), shared_bytes, packed_args(kernel, plain), tuple(v for v in values.values() if isinstance(v, Memory)))
