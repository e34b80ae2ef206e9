"""A sequence model and the precision of each weight → a native program: weights packed once, for one set of instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesdk.errors import InputError
from edgesdk.kernels.cpu import TARGETS, host_targets
from edgesdk.kernels.library import Library
from edgesdk.kernels.pack import is_super, refuse_unfit
from edgesdk.kernels.panels import BLOCK, LAYOUT, UnfitWeights, written
from edgesdk.kernels.sparse import as_grid, packed, pattern_of
from edgesdk.native.program import write
from edgesdk.packed import Code, decode

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec
    from edgesdk.sequence.config import SequenceConfig
    from edgesdk.sequence.model import SequenceModel

PREFIX = "native-"
"""Of a runtime's name; behind it stands the kernels' target."""
BITS = {"int8-dynamic": (8, 0), "int8-weight-only": (8, 0), "int4-g32": (4, 32)}
"""Precision → bits, columns of a group."""
FLOATS = {"fp32": 32, "fp16": 16}
"""Precision → bits of weights that stay floats: their inputs do, too, and a token reads 4 or 2 bytes of each."""
_TABLES = ("embed", "source_embed")
_TOGETHER = (("q", "k", "v"), ("gate", "up"))


def target_of(runtime: str) -> str:
    """The kernels' target that a runtime's name ends in; of plain "native" this machine's best."""
    return host_targets()[0] if runtime == "native" else runtime.removeprefix(PREFIX)


def sequence_of(spec: ModelSpec) -> SequenceModel:
    """The model behind a spec's methods. Raises `InputError` where it is none that runs natively."""
    from edgesdk.sequence.export import Program

    modules = [m.module for m in spec.methods.values()]
    if not modules or not all(isinstance(m, Program) for m in modules):
        raise InputError(
            f"{spec.name} is no sequence model of edgesdk's family: the native target runs those alone",
            "choose --runtime executorch or litert",
        )
    found: Any = max((m.core for m in modules), key=lambda core: len(core.decoder.layers) if core.decoder else 0)  # type: ignore[union-attr,arg-type]
    if found.sound is not None:
        raise InputError(f"{spec.name} hears sound: the native target has no convolutions", "choose --runtime executorch or litert")
    return found  # type: ignore[no-any-return]


def rounded_to(weight: Any, bits: int, group: int, kernels: Library, target: str = "") -> Code:
    """A float32 matrix on the grid of least error that the kernels read. int4 in groups has an offset a block, for an eighth less error at 1% more
    bytes, but not for kernels in C and CUDA, which have no such form, nor where many weights are zero, which would be zero no longer."""
    from edgesdk.kernels.nearest import nearest  # and Numba with it: whether a model runs natively is asked without
    from edgesdk.kernels.superblocks import super_blocks

    offsets = (bits, group) == (4, 32) and (target or kernels.target).startswith("x86") and np.count_nonzero(weight) > 0.99 * weight.size
    return super_blocks(weight, kernels.half) if offsets else nearest(weight, bits, group, kernels.half)


class Lowering:
    floats = FLOATS

    def __init__(self, spec: ModelSpec, choice: Mapping[tuple[str, str], str], kernels: Library, rounded_for: str = "") -> None:
        """`rounded_for`: the target whose weights these are, of a twin; "" for that of `kernels`."""
        self.model, self.kernels = sequence_of(spec), kernels
        self.rounded_for = rounded_for or getattr(kernels, "target", "")
        self.config: SequenceConfig = self.model.config
        self.state = {k: v.detach().cpu().float().numpy() for k, v in self.model.state_dict().items()}
        self.arrays: dict[str, Any] = {}
        self.panels: dict[str, Any] = {}
        self.linears: dict[str, Any] = {}
        self.choice = {self._path(unit): precision for (_, unit), precision in choice.items()}
        self.codes = {path: as_grid(code) for path, code in _codes(spec).items()}

    @staticmethod
    def _path(unit: str) -> str:
        return unit.split("#")[0].removeprefix("core.")

    def _precision(self, path: str) -> str:
        return self.choice.get(path, "int8-dynamic")

    def readable(self, code: Code) -> bool:
        """Whether the kernels read a matrix as it is stored."""
        try:
            refuse_unfit(code)
        except UnfitWeights:
            return False
        return True

    def _whole(self, code: Code) -> bool:
        """Whether a matrix runs as it is stored: a grid or a table, alone or with what it keeps apart."""
        if code.kind == "sum":
            return self.readable(code.parts[0]) and all(p.kind in ("lowrank", "sparse") for p in code.parts[1:])
        return self.readable(code)

    def own(self, path: str) -> Code | None:
        """What a compressed weight is stored as, where it runs so. A head whose result is scaled keeps nothing apart."""
        code = self.codes.get(path)
        scaled = path == "head" and self.config.logit_scale != 1 and code is not None and code.kind == "sum"
        return code if code is not None and self._whole(code) and not scaled else None

    def code(self, path: str) -> Code:
        """How a matrix is stored: the compressed weight's own grid or table where the kernels read it, else rounded as the plan says."""
        own = self.own(path)
        if own is not None:
            return own.parts[0] if own.kind == "sum" else own
        precision, weight = self._precision(path), self.state[f"{path}.weight"]
        if precision in self.floats:
            return Code("dense", weight.shape, (self.floats[precision],), (weight,))
        if precision not in BITS:
            known = ", ".join(sorted({*BITS, *self.floats}))
            raise InputError(f"{path} is planned in {precision}, which the native target has not", f"known: {known}")
        return rounded_to(weight, *BITS[precision], self.kernels, self.rounded_for)

    def add_apart(self, path: str) -> list[str]:
        """What a compressed weight keeps beside its grid: kinds, in order."""
        own = self.own(path)
        if own is None or own.kind != "sum":
            return []
        for i, part in enumerate(own.parts[1:]):
            name = f"{path}.plus{i}"
            if part.kind == "lowrank":
                for which, thin in (("up", part.parts[0]), ("down", part.parts[1])):
                    self.add_panels(f"{name}.{which}", rounded_to(decode(thin), 8, 0, self.kernels, self.rounded_for))
                continue
            values = decode(part)
            rows, columns = np.nonzero(values)
            starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(values)))])
            self.arrays |= {f"{name}.starts": starts.astype(np.int32), f"{name}.columns": columns.astype(np.int32)}
            self.arrays[f"{name}.values"] = values[rows, columns].astype(np.float32)
        return [part.kind for part in own.parts[1:]]

    def pattern(self, path: str, code: Code) -> str:
        """Which zeros of a matrix are left out (`kernels.sparse`): none of one in whose panels a table's rows are looked up."""
        looked_up = path == "head" and code.numbers[0] == 8 and any(self.shares_head(table) for table in _TABLES)
        return "" if looked_up else pattern_of(code, self.kernels.lanes)

    def shares_head(self, table: str) -> bool:
        """Whether a table is the head's matrix."""
        weight, head = (self.state.get(f"{name}.weight") for name in (table, "head"))
        return weight is not None and head is not None and np.array_equal(weight, 2 * head)

    def add_panels(self, name: str, code: Code, pattern: str = "") -> None:
        made = packed(code, pattern, self.kernels.lanes, self.kernels.together, self.kernels.half)
        self.panels[name], arrays = written(made)
        self.arrays |= {f"{name}.{part}": array for part, array in arrays.items()}

    def add_linears(self, paths: list[str]) -> None:
        """Matrices that take the same inputs: one set of panels for those of one form, one after the other."""
        groups: dict[Any, list[tuple[str, Code]]] = {}
        patterns: dict[str, str] = {}
        for path in paths:
            code = self.code(path)
            whole_rows = code.shape[0] % BLOCK == 0  # what comes next begins at a block
            shared = code.kind == "table" and len(code.arrays[1]) == 1  # one table for all its rows
            pattern = self.pattern(path, code)
            zeros = code.kind == "grid" and bool(code.arrays[2].size)
            key = (code.kind, code.numbers, zeros, pattern) if whole_rows and not shared else path
            groups.setdefault(key, []).append((path, code))
            patterns[path] = pattern
        for members in groups.values():
            name, first = members[0][0], 0
            biases = [self.state.get(f"{p}.bias") for p, _ in members]
            for path, code in members:
                self.linears[path] = {"panels": name, "first": first, "rows": code.shape[0], "bias": any(b is not None for b in biases)}
                if apart := self.add_apart(path):
                    self.linears[path]["plus"] = apart
                first += code.shape[0]
            self.add_panels(name, _joined([c for _, c in members]), patterns[name])
            if any(b is not None for b in biases):
                bias = np.zeros(len(self.arrays[f"{name}.row_scale"]), np.float32)
                parts = [np.zeros(c.shape[0], np.float32) if b is None else b for b, (_, c) in zip(biases, members, strict=True)]
                bias[:first] = np.concatenate(parts)
                self.arrays[f"{name}.bias"] = bias

    def add_rest(self) -> None:
        """Norms, padded to whole blocks; places, tables of float32."""
        for name, value in self.state.items():
            path, _, kind = name.rpartition(".")
            if path in self.linears or kind == "averager" or value.ndim > 2:
                continue
            if value.ndim == 1:
                self.arrays[name] = _padded(value)
            elif not path.endswith("embed"):
                self.arrays[name] = _padded(value) if path.endswith("position") else value
        for path in _TABLES:
            if f"{path}.weight" in self.state:
                self._embedding(path)

    def _embedding(self, path: str) -> None:
        """A table in int8, the head's own panels where it is the head's matrix, or in float32. `factor`: what its rows are multiplied with."""
        weight, factor = self.state[f"{path}.weight"], float(self.config.embed_scale)
        entry: dict[str, Any] = {"cols": weight.shape[1], "factor": factor}
        floats = self._precision(path) == "fp32" and bool(self.choice)
        if self.shares_head(path) and self.panels["head"]["bits"] == (32 if floats else 8):
            entry |= {"panels": "head", "factor": 2 * factor}
        elif floats:
            self.arrays[f"{path}.table"] = _padded(weight)
        else:
            own = self.codes.get(path)
            exact = own is not None and own.kind == "grid" and not is_super(own)
            stored = own is not None and (exact or weight.shape[1] % BLOCK == 0)  # of others columns beyond the last are not 0
            self.add_panels(path, self.code(path) if stored else rounded_to(weight, 8, 0, self.kernels, self.rounded_for))
            entry["panels"] = path
        self.linears[path] = entry

    def add_matrices(self) -> None:
        parents = sorted({p.rpartition(".")[0] for p in self._matrices()})
        for parent in parents:
            there = [p for p in self._matrices() if p.rpartition(".")[0] == parent]
            done: set[str] = set()
            apart = {"q"} if parent.endswith("cross_attn") else set()  # queries are made of another input than keys and values
            for names in _TOGETHER:
                together = [f"{parent}.{n}" for n in names if n not in apart and f"{parent}.{n}" in there]
                if together:
                    self.add_linears(together)
                done.update(together)
            for path in there:
                if path not in done:
                    self.add_linears([path])

    def _matrices(self) -> list[str]:
        found = [n.removesuffix(".weight") for n, v in self.state.items() if n.endswith(".weight") and v.ndim == 2]
        return [p for p in found if p not in _TABLES and not p.endswith((".position", ".relative"))]


def _codes(spec: ModelSpec) -> dict[str, Code]:
    """Module path → the code its compressed weight is stored as."""
    if not spec.codes:
        return {}
    from edgesdk.lower.inject import codes_by_module

    return {path.removeprefix("core."): code for (_, path), code in codes_by_module(spec).items()}


def _joined(codes: list[Code]) -> Code:
    """Codes of one form, one below the other."""
    if len(codes) == 1:
        return codes[0]
    rows = sum(c.shape[0] for c in codes)

    def of_rows(array: Any, count: int) -> Any:
        """What all rows share, for each of them."""
        return np.repeat(array, count, 0) if array.size and len(array) == 1 else array

    given = ([of_rows(a, c.shape[0]) for a in c.arrays] for c in codes)
    arrays = tuple(np.concatenate(parts) for parts in zip(*given, strict=True))
    return Code(codes[0].kind, (rows, codes[0].shape[1]), codes[0].numbers, arrays)


def _padded(values: Any) -> Any:
    """The last dimension filled with zeros to whole blocks."""
    return np.ascontiguousarray(np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % BLOCK)]), np.float32)


def lower_native(
    spec: ModelSpec, runtime: str, choice: Mapping[tuple[str, str], str], say: Callable[[str], None] = lambda text: None,
    rounded_for: str = "",
) -> bytes:  # fmt: skip
    """The program. `runtime`: "native-" and a target of `kernels.cpu`, or of a GPU ("cuda-sm87"); `rounded_for`: the target whose weights it has, "" for
    its own. Raises `InputError`."""
    target = target_of(runtime)
    if target.startswith("cuda"):
        from edgesdk.native.cuda_lower import lower_cuda

        return lower_cuda(spec, target, choice, say)
    if target not in TARGETS:
        raise InputError(f"there are no kernels for '{target}'", f"known: {', '.join(TARGETS)}")
    from edgesdk.kernels.numba.library import Compiled

    say("packing weights")
    work = Lowering(spec, choice, Compiled(target), rounded_for)
    work.add_matrices()
    work.add_rest()
    return write(header_of(spec, work, target), work.arrays)


def header_of(spec: ModelSpec, work: Lowering, target: str) -> dict[str, Any]:
    """What a program says of itself beside its arrays."""
    from edgesdk import __version__
    from edgesdk.sequence.card import NAME, Card
    from edgesdk.sequence.positions import buckets

    card = Card.read(spec.files[NAME])
    methods = {}
    for name, method in spec.methods.items():
        names: Any = method.module.input_names
        inputs = [[n, list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in zip(names, method.example_inputs, strict=True)]
        methods[name] = {**card.methods[name], "inputs": inputs}
    config = work.config.model_dump(mode="json")
    turns = {side: frequencies for side in ("encoder", "decoder") if (frequencies := _turns(work.config, side))}
    header = {
        "version": __version__,
        "layout": LAYOUT,
        "target": target,
        "config": config,
        "methods": methods,
        "linears": work.linears,
        "panels": work.panels,
        "turns": turns,
    }
    if work.config.positions == "relative":
        header["buckets"] = {side: buckets(work.config, side == "encoder") for side in ("encoder", "decoder")}
    return header


def _turns(config: SequenceConfig, side: str) -> list[float]:
    """Radians a position turns each pair of channels by, of one stack."""
    from edgesdk.sequence.positions import frequencies

    stack = getattr(config, side)
    return frequencies(config, stack.head) if stack is not None and config.positions == "rope" else []
