"""A method of a native program being written as launches: what `edgesdk.kernels.tape` is for CPUs, over a machine's memory.

Values between layers are float32. What a product takes is float16, as it comes out of attention, and out of norms and activations with a power
of two a row, so that nothing is too large for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import look as looks
from . import rows as of_rows
from .compile import offset_of
from .linear import Linear
from .machine import Copy, Launch, Machine, Memory, Scratch, Shared, Work

ALIGNED = 256


@dataclass(frozen=True)
class Rows:
    """float32 [M, width], of which `cols` columns from `first` on count."""

    memory: Memory
    cols: int
    first: int = 0

    @property
    def rows(self) -> int:
        return self.memory.shape[0]

    @property
    def stride(self) -> int:
        """Bytes of a row."""
        return 4 * self.memory.shape[1]

    @property
    def view(self) -> Memory:
        return self.memory.columns(self.first) if self.first else self.memory

    def part(self, first: int, cols: int) -> Rows:
        return Rows(self.memory, cols, self.first + first)


@dataclass(frozen=True)
class Halved:
    """What a product takes: float16 [M, stride] and float32 [M], or None for ones."""

    memory: Memory
    scale: Memory | None


class Block:
    """Arrays side by side, on the host and in the machine's memory: one copy carries all of them. `nbytes` None: on paper, to learn how many there are."""

    def __init__(self, machine: Machine, nbytes: int | None) -> None:
        self.used, self.nbytes = 0, nbytes
        self.host: Shared | None = machine.shared(nbytes) if nbytes else None
        self.there = machine.empty((nbytes or 0,), np.uint8)

    def take(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Memory]:
        """An array as the host sees it, and where it is. Raises `ValueError` where the block is full."""
        at, dtype = self.used, np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.used += -(-size // ALIGNED) * ALIGNED
        memory = Memory(self.there.address + at, shape, dtype, self.there)
        if self.nbytes is None:
            return np.zeros(shape, dtype), memory
        if self.used > self.nbytes or self.host is None:
            raise ValueError(f"inputs or outputs take more than the {self.nbytes} bytes that the program says")
        return self.host.array[at : at + size].view(dtype).reshape(shape), memory

    def copy(self, out: bool) -> list[Work]:
        if self.host is None:
            return []
        return [Copy(self.host.memory, self.there) if out else Copy(self.there, self.host.memory)]


class Tape:
    """`resident(array)`: where an array of the program is, or None for others. `sizes`: bytes of the inputs and of the outputs, or None on paper."""

    def __init__(self, machine: Machine, scratch: Scratch, resident: Callable[[Any], Memory | None], sizes: tuple[int, int] | None) -> None:
        self.machine, self.scratch, self.resident = machine, scratch, resident
        self.inputs, self.outputs = (Block(machine, sizes[i] if sizes else None) for i in (0, 1))
        self.launches: list[Launch] = []
        self.hosts: list[tuple[Any, Any]] = []  # an array of the host, filled before each run, and what of the inputs it goes to
        self.places: list[
            tuple[int, int, int]
        ] = []  # a launch, a byte of its struct, and the number of the input whose address belongs there
        self._there: dict[int, Memory] = {}
        self._constants: dict[int, tuple[Any, Memory]] = {}
        self._rooms: dict[Any, Any] = {}
        self._halved: dict[int, Halved] = {}
        self._heads: list[dict[str, Any]] = []
        self._own: list[Memory] = []

    # ---- memory

    def empty(self, shape: tuple[int, ...], dtype: Any, key: Any = None) -> Memory:
        """Room; with a `key` the next of that key and shape is the same."""
        if key is not None and (key, shape) in self._rooms:
            found: Memory = self._rooms[key, shape]
            return found
        made = self.machine.empty(shape, dtype)
        self._own.append(made)
        if key is not None:
            self._rooms[key, shape] = made
        return made

    def room(self, rows: int, cols: int, key: str = "") -> Rows:
        width = -(-cols // 8) * 8
        return Rows(self.empty((rows, width), np.float32, key or None), cols)

    def constant(self, array: Any) -> Memory:
        """An array that stays as it is."""
        found = self.resident(array)
        if found is None:
            if id(array) not in self._constants:
                self._constants[id(array)] = (array, self.machine.put(array))
            found = self._constants[id(array)][1]
        return found

    def host(self, array: Any) -> Memory:
        """An array of the host that is filled before each run."""
        if id(array) not in self._there:
            view, memory = self.inputs.take(array.shape, array.dtype)
            self.hosts.append((array, view))
            self._there[id(array)] = memory
        return self._there[id(array)]

    @property
    def nbytes(self) -> int:
        return self.inputs.used + self.outputs.used + sum(m.nbytes for m in self._own)

    # ---- steps

    def step(self, item: Launch) -> int:
        """The number of the launch."""
        self._flush()
        self.launches.append(item)
        return len(self.launches) - 1

    def point(self, step: int, field: str, memory: Memory) -> None:
        """A field of a launch is this address."""
        item = self.launches[step]
        self.launches[step] = item.patched({offset_of(item.kernel.args, field): memory.address})

    def at_input(self, step: int, field: str, number: int) -> None:
        """A field of a launch is the address of an input, which each run says."""
        self.places.append((step, offset_of(self.launches[step].kernel.args, field), number))

    def work(self, addresses: Mapping[int, int]) -> list[Work]:
        """Everything in order. `addresses`: of the inputs that launches read where they are."""
        places: dict[int, dict[int, int]] = {}
        for step, at, number in self.places:
            places.setdefault(step, {})[at] = addresses[number]
        launches = [item.patched(places[i]) if i in places else item for i, item in enumerate(self.finished())]
        return [*self.inputs.copy(out=False), *launches, *self.outputs.copy(out=True)]

    def finished(self) -> list[Launch]:
        """All launches in order, without the addresses of inputs."""
        self._flush()
        return self.launches

    def heads(self, part: dict[str, Any]) -> None:
        """Heads of one product; those of up to three that follow one another are one launch."""
        others = self._heads and self._heads[0]["x"].shape[0] != part["x"].shape[0]
        if others or len(self._heads) == looks.TOGETHER:
            self._flush()
        self._heads.append(part)

    def _flush(self) -> None:
        if self._heads:
            parts, self._heads = self._heads, []
            self.launches.append(looks.heads(parts, parts[0]["x"].shape[0]))

    def round(
        self,
        x: Rows,
        shift: int,
        *,
        before: str = "",
        other: Rows | None = None,
        norm: tuple[Any, Any, float] | None = None,
        out: Rows | None = None,
        key: str = "",
    ) -> Halved:
        """x in float16, behind a norm or an activation (times `other`). `out`, of which products of single weights take theirs, is not written."""
        if not before and x.view.address in self._halved:
            return self._halved[x.view.address]
        width = -(-x.cols // 8) * 8
        half, scale = self.empty((x.rows, width), np.float16, ("half", key)), self.empty((x.rows,), np.float32, ("scale", key, width))
        if norm is not None:
            made = Halved(half, None)
            weight, bias, eps = norm
            self.step(of_rows.norm(x.view, self.constant(weight), half, None if bias is None else self.constant(bias), eps, cols=x.cols))
        else:
            made = Halved(half, scale)
            self.step(of_rows.halve(x.view, half, scale, x.cols, before or "none", other.view if other is not None else None))
        self._halved[(out or x).view.address] = made
        return made

    def halved(self, x: Rows, made: Halved) -> None:
        """x is there in float16 already."""
        self._halved[x.view.address] = made

    def norm(self, x: Rows, kind: str, norm: tuple[Any, Any, float], out: Rows) -> None:
        weight, bias, eps = norm
        self._halved.pop(out.view.address, None)
        self.step(of_rows.norm(x.view, self.constant(weight), out.view, None if bias is None else self.constant(bias), eps, cols=x.cols))

    def linear(self, weights: Linear, x: Halved, out: Rows, *, bias: Any = None, residual: Rows | None = None) -> int:
        self._halved.pop(out.view.address, None)
        there = None if bias is None else self.constant(bias)
        rest = residual.view if residual is not None else None
        return self.step(weights.launch(x.memory, out.view, residual=rest, x_scale=x.scale, bias=there, scratch=self.scratch))

    def add(self, name: str, parts: int, least: int = 1, **values: Any) -> int:
        """`pick` and `sparse`, as tapes for CPUs have them. Raises `KeyError` for another name."""
        x, out = values["x"], values["out"]
        if name == "pick":
            last = Memory(0, (out.rows,), np.dtype(np.int64))
            return self.step(of_rows.pick(x.view, last, out.view, values["n"], x.cols))
        if name != "sparse":
            raise KeyError(name)
        half = self._halved[x.view.address]
        starts, columns, weights = (self.constant(values[n]) for n in ("starts", "columns", "values"))
        return self.step(of_rows.sparse(half.memory, half.scale, starts, columns, weights, out.view))
