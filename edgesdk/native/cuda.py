"""The runner of a native program for a GPU: each method a CUDA graph of launches over weights that were packed for it.

Weights lie in the GPU's memory from the first to the last call. Caches of the sequence runtime lie in the host's memory, mapped for the GPU (`Machine.zeros`):
a Jetson's CPU and GPU share one DRAM, so that the runtime writes a token's keys and values, reorders beams and goes back to a prefix as it always does, and the GPU
reads them where they are. Caches that lie elsewhere are copied before each call. All other inputs travel in one copy, and so do the outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgesdk.kernels.cuda import look as looks
from edgesdk.kernels.cuda import rows as of_rows
from edgesdk.kernels.cuda.linear import Linear
from edgesdk.kernels.cuda.machine import Machine as Device
from edgesdk.kernels.cuda.machine import Memory, Paper, Scratch
from edgesdk.kernels.cuda.tape import Halved, Rows, Tape
from edgesdk.kernels.cuda.tiles import LAYOUT, PARTS, Tiles

from . import machine
from .parts import Part, Reshaped, Weights
from .program import Program, ProgramError

GRAPHS = 8
"""Graphs that a method keeps: one for each set of caches that it is called with."""


class _Kernels:
    """What the parts of a model ask a library of kernels."""

    @staticmethod
    def shift_of(bits: int) -> int:
        return 0


class CudaMachine(machine.Machine):
    """`run(method, arrays)` as `Machine` has it. `device`: what runs it; the first GPU where it is None. `graphs`: a call is one CUDA graph.

    Raises `ProgramError` for a damaged file, and what `launch.Gpu` raises.
    """

    def __init__(self, path: str, threads: int = 1, device: Device | None = None, graphs: bool = True) -> None:
        self.program, self.threads, self.graphs = Program(path), threads, graphs
        header = self.program.header
        if not self.program.target.startswith("cuda-") or header.get("tiles") != LAYOUT:
            raise ProgramError(
                f"{path}: a program for {self.program.target}, weights laid out as {header.get('tiles')}; these kernels read {LAYOUT}: build it again"
            )
        self.on_paper = isinstance(device, Paper)
        missing = [key for key in ("kernels", "blocks", "code_at") if key not in header and not self.on_paper]
        if missing:
            raise ProgramError(f"{path}: its header has no {', '.join(missing)}: build it again")
        self.kernels = _Kernels()  # type: ignore[assignment]
        self.methods = tuple(sorted(self.program.methods))
        self._open: dict[str, machine.Method] = {}
        self._panels: dict[str, Any] = {}
        self._shared: dict[int, tuple[int, int]] = {}  # where memory that is mapped for the GPU begins → bytes, where the GPU has it
        self.device = device if device is not None else self._gpu()
        weights = self.program.first(header.get("code_at", header["bytes"]))
        self._weights, self._first = self.device.put(weights), int(weights.ctypes.data)
        self.scratch = Scratch(self.device)

    def _gpu(self) -> Device:
        from edgesdk.kernels.cuda.launch import Gpu

        codes: Mapping[str, Sequence[str]] = self.program.header["kernels"]

        def code(name: str) -> list[bytes]:
            if name not in codes:
                raise ProgramError(f"the program has no kernel {name}: build it again")
            return [self.program.array(part).tobytes() for part in codes[name]]

        return Gpu(code=code)

    def close(self) -> None:
        """Gives back the GPU's memory, graphs and stream. Nothing can be run after it."""
        self._open.clear()
        self._panels.clear()
        self.device.close()

    def tape(self, method: str) -> Tape:
        sizes = None if self.on_paper else tuple(self.program.header["blocks"][method])
        return Tape(self.device, self.scratch, self.resident, sizes)

    def run(self, method: str, arrays: Sequence[Any]) -> list[Any]:
        self.device.use()
        if method not in self._open:
            self._open[method] = CudaMethod(self, method)
        return self._open[method].run(arrays)

    def resident(self, array: Any) -> Memory | None:
        """Where an array of the program is in the device's memory."""
        at = int(array.ctypes.data) - self._first
        if not 0 <= at < self._weights.nbytes or not array.size:
            return None
        return Memory(self._weights.address + at, array.shape, array.dtype, self._weights)

    def panels(self, name: str) -> Any:
        if name not in self._panels:
            parts = {part: self.program.array(f"{name}.{part}") for part in PARTS}
            self._panels[name] = Linear(self.device, Tiles(**self.program.panels[name], **parts), place=self._place)
        return self._panels[name]

    def _place(self, array: Any) -> Memory:
        return self.resident(array) or self.device.put(array)

    # ---- memory that the host and the GPU have in common

    def zeros(self, shape: Sequence[int], dtype: Any) -> Any:
        """An array of the host that the GPU reads where it is."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        made = self.device.shared(max(size, 1))
        made.array[:] = 0
        start = int(made.array.ctypes.data)
        self._shared[start] = (size, made.memory.address)
        weakref.finalize(made.array, self._shared.pop, start, None)
        return made.array[:size].view(dtype).reshape(tuple(shape))

    def mapped(self, array: Any) -> int | None:
        """Where the GPU has an array that `zeros` made, or a part of one."""
        at = int(array.ctypes.data)
        for start, (size, there) in self._shared.items():
            if start <= at and at + array.nbytes <= start + size:
                return int(there + at - start)
        return None


class CudaMethod(machine.Method):
    """One program, written as launches when it is first run."""

    machine: CudaMachine
    tape: Any  # a kernels.cuda.tape.Tape

    def __init__(self, owner: CudaMachine, name: str) -> None:
        self.given: list[tuple[int, Any]] = []  # an input, and where it goes before each run
        self._inputs: dict[int, Memory] = {}
        self._graphs: dict[tuple[int, ...], Callable[[], None]] = {}
        self._copies: dict[int, Memory] = {}
        self._encodes = owner.program.methods[name]["role"] == "encode" and owner.program.config["decoder"] is not None
        super().__init__(owner, name)
        self._kept = sorted({number for _, _, number in self.tape.places})

    @property
    def nbytes(self) -> int:
        return int(self.tape.nbytes)

    # ---- running

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        given = [np.ascontiguousarray(a, d) for a, d in zip(arrays, self.dtypes)]  # noqa: B905 (Python 3.9)
        self._check_ids(given)
        for fill in self.before:
            fill(given)
        for number, view in self.given:
            np.copyto(view, given[number].reshape(view.shape))
        for array, view in self.tape.hosts:
            np.copyto(view, array)
        self._graph(tuple(self._address(n, given[n]) for n in self._kept))()
        self.machine.device.wait()
        return self._answer()

    def _address(self, number: int, array: Any) -> int:
        found = self.machine.mapped(array)
        if found is None:
            found = self._copies[number].address if number in self._copies else 0
            self._copies[number] = self.machine.device.put(array, self._copies.get(number))
            found = self._copies[number].address
        return found

    def _graph(self, addresses: tuple[int, ...]) -> Callable[[], None]:
        if addresses not in self._graphs:
            while len(self._graphs) >= GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            work = self.tape.work(dict(zip(self._kept, addresses)))  # noqa: B905 (Python 3.9)
            device = self.machine.device
            self._graphs[addresses] = device.graph(work) if self.machine.graphs else lambda: device.run(work)
        return self._graphs[addresses]

    def _answer(self) -> list[Any]:
        """The outputs; an encoder's lie where a decoder's call reads them."""
        block = self.tape.outputs
        assert block.host is not None
        held = self.machine.zeros((block.used,), np.uint8) if self._encodes else np.empty(block.used, np.uint8)
        held[:] = block.host.array[: block.used]
        return [self._output(o, held) for o in self.outputs]

    def _output(self, output: Any, held: Any) -> Any:
        rows: Any = output.rows if isinstance(output, Reshaped) else None
        memory: Memory = output if rows is None else rows.memory
        at = memory.address - self.tape.outputs.there.address
        array = held[at : at + memory.nbytes].view(memory.dtype).reshape(memory.shape)
        return array if rows is None else array[:, : rows.cols].reshape(output.shape)

    # ---- what a model is made of

    def patch(self, name: str, args: Any, arg: str, source: int | str) -> None:
        number = self.number[source] if isinstance(source, str) else source
        if self._stays(number):
            self.tape.at_input(args, arg, number)
            return
        self.tape.point(args, arg, self._input_memory(number))

    def _stays(self, number: int) -> bool:
        """Whether an input is a cache, read where the runtime keeps it."""
        name: str = self.sizes["inputs"][number][0]
        return name.startswith(("self_", "cross_"))

    def _input_memory(self, number: int) -> Memory:
        if number not in self._inputs:
            view, memory = self.tape.inputs.take(self.shapes[number], self.dtypes[number])
            self.given.append((number, view))
            self._inputs[number] = memory
        return self._inputs[number]

    def embed(self, path: str, ids: str, side: str, places: Any) -> Any:
        entry = self.program.linears[path]
        number, cols = self.number[ids], int(entry["cols"])
        out = self.tape.room(int(np.prod(self.shapes[number])), cols)
        given = self._input_memory(number)
        flat = Memory(given.address, (out.rows,), given.dtype, given)
        table, placed = self._places(side, cols), None
        if table is not None:
            offset = self.config["position_offset"] if self.config["positions"] == "learned" else 0
            placed = (self.tape.constant(table), self.tape.host(places), offset)
        if "panels" in entry:
            self.tape.step(of_rows.embed(self.machine.panels(entry["panels"]), flat, out.view, entry["factor"], placed))
        else:
            rows = self.tape.constant(self.program.array(f"{path}.table"))
            self.tape.step(of_rows.lookup(rows, cols, flat, out.view, entry["factor"], placed))
        if self.config["embed_norm"]:
            self.tape.norm(out, self.norm, self.norm_of(f"{side}.embed_norm"), out)
        return out

    def heads(self, x: Any, n: int, count: int, size: int, *, norm: str = "", turned: Any = None, scale: float = 1.0, key: str = "") -> Any:
        shape = (x.rows // n, count, n, size)
        out = self.tape.empty(shape, np.float32, ("heads", key)) if key else self.tape.outputs.take(shape, np.float32)[1]
        weight = self.tape.constant(self.program.array(f"{norm}.weight")) if norm else None
        turns = (self.tape.host(turned[0]), self.tape.host(turned[1])) if turned is not None else None
        self.tape.heads(looks.heads_of(x.view, out, weight=weight, eps=self.config["norm_eps"], turns=turns, scale=scale))
        return out

    def attend(self, q: Any, parts: Sequence[Part], mask: tuple[Any, int, int, int], stack: dict[str, Any]) -> Any:
        b, h, n, size = q.shape
        out = self.tape.room(b * n, h * size, "attended")
        half = self.tape.empty((b * n, -(-h * size // 8) * 8), np.float16, "seen")
        old, new = (parts[0], parts[1]) if len(parts) == 2 else (parts[0], None)
        later = {} if old.scales is None else dict(zip(("key_scales", "value_scales"), old.scales))  # noqa: B905 (Python 3.9)
        caches: dict[str, Any] = {}
        for name, what in (("keys", old.keys), ("values", old.values)):
            (later if isinstance(what, str) else caches)[name] = what
        given = self._input_memory(self.number[mask[0]]) if isinstance(mask[0], str) else self.tape.host(mask[0])
        strides = (mask[1] // 4, mask[2] // 4, mask[3] // 4)
        step = self.tape.step(
            looks.look(
                self.machine.device,
                q,
                caches,
                old.tokens,
                stack["kv_heads"],
                half,
                new=(new.keys, new.values) if new is not None else None,
                mask=given,
                mask_strides=strides,
                bits=self._cache_bits(old),
                scratch=self.machine.scratch,
            )
        )
        for name, what in later.items():
            self.patch("attend", step, name, what)
        self.tape.halved(out, Halved(half, None))
        return out

    def _cache_bits(self, part: Part) -> int:
        return {"": 32, "half": 16, "int8": 8, "int4": 4}[self._form(part)]

    def _logits(self, x: Any, norm: str, shape: tuple[int, ...]) -> None:
        w: Weights = self.machine.weights("head")
        vocab, scale = int(self.config["vocab"]), float(self.config["logit_scale"])
        width = -(-vocab // 8) * 8
        out: Any = Rows(self.tape.outputs.take((x.rows, width), np.float32)[1], vocab)
        head: Any = w.panels
        taken = self.taken(x, norm=norm)
        self.tape.linear(head if scale == 1 else head.scaled(scale), taken.rounded(0), out, bias=w.bias)
        self.apart("head", taken, out)
        self.outputs.append(Reshaped(out, shape))
