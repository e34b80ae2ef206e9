"""LiteRT's arena, replayed from a `.tflite`: the bytes it sets aside for the tensors of each signature, as `AllocateTensors` lays them out.

What LiteRT does (its ArenaPlanner, and the placement seen through the addresses of an interpreter's tensors): inputs that live for the whole
call come first, then tensors by falling size, each at the lowest 64-byte step that no tensor alive at the same time occupies; a reshape that
the runtime runs itself shares its input's place. Operators that XNNPACK takes become one step, and what lies between them is XNNPACK's.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgesdk.errors import InputError
from edgesdk.graph.tflite_read import Table, read_tflite, size_bytes, tensors_of
from edgesdk.graph.types import Unit

ALIGNMENT = 64
_ANY = {
    "add", "concatenation", "conv_2d", "depthwise_conv_2d", "depth_to_space", "dequantize", "fully_connected", "leaky_relu", "logistic",
    "max_pool_2d", "mean", "mul", "pad", "quantize", "relu", "relu6", "reshape", "resize_bilinear", "slice", "split", "strided_slice", "sub", "tanh",
    "transpose", "transpose_conv", "elu", "expand_dims", "space_to_depth",
}  # fmt: skip
_FLOAT = _ANY | {
    "abs", "average_pool_2d", "batch_matmul", "ceil", "cos", "div", "exp", "floor", "gelu", "hard_swish", "log", "maximum", "minimum",
    "neg", "prelu", "rsqrt", "sin", "softmax", "sqrt", "square", "squared_difference", "sum",
}  # fmt: skip
"""Operators that XNNPACK takes from LiteRT 2.3, in any type and in float."""


@dataclass(frozen=True)
class Held:
    """A tensor in the arena: bytes, and the first and last step that need it."""

    size: int
    first: int
    last: int


def greedy_by_size(tensors: Sequence[Held], alignment: int = ALIGNMENT) -> tuple[int, list[int]]:
    """Bytes of the arena and each tensor's offset: those of the whole call first, then by falling size, each at the lowest free place."""
    end = max((t.last for t in tensors), default=0)
    order = sorted(range(len(tensors)), key=lambda i: _rank(tensors[i], end))
    placed: list[tuple[int, Held]] = []
    offsets = [0] * len(tensors)
    for i in order:
        new, at, best = tensors[i], 0, None
        for start, old in sorted(placed, key=lambda p: p[0]):
            if old.last < new.first or new.last < old.first:
                continue
            if start - at >= new.size and (best is None or start - at < best[0]):
                best = start - at, at
            at = max(at, -(-(start + old.size) // alignment) * alignment)
        offsets[i] = best[1] if best else at
        placed.append((offsets[i], new))
    return max((o + t.size for o, t in placed), default=0), offsets


def _rank(held: Held, end: int) -> tuple[int, int, int]:
    return (0, 0, 0) if held.first == 0 and held.last == end else (1, -held.size, held.first)


def arena(path: Path, delegate: bool = True) -> dict[str, int]:
    """Method → bytes of its arena. `delegate`: with XNNPACK, as LiteRT runs by default; without it the kernels' own scratch is left out.

    Raises `InputError` for a damaged file.
    """
    methods = read_tflite(path)
    data = path.read_bytes()
    try:
        model = Table(data, struct.unpack_from("<I", data, 0)[0])
        graphs, buffers = model.tables(2), [max(b.length(0), b.number(2, "<Q")) for b in model.tables(4)]
        indices = [s.number(4, "<I") for s in model.tables(7)] or [0]
        answer = {}
        for method, index in zip(methods, indices, strict=True):
            answer[method.name] = _arena(graphs[index], buffers, method.units, delegate)
        return answer
    except (IndexError, struct.error):
        raise InputError(f"{path}: the flatbuffer is damaged or cut off ({len(data)} bytes)", "copy or convert the file again") from None


def memory_plan(content: bytes, delegate: bool = True) -> dict[str, int]:
    """A flatbuffer's own numbers, in bytes: `planned:<method>:0` (the arena), `program`. `delegate`: with XNNPACK."""
    with tempfile.NamedTemporaryFile(suffix=".tflite") as file:
        file.write(content)
        file.flush()
        sizes = arena(Path(file.name), delegate)
    return {"program": len(content)} | {f"planned:{method}:0": size for method, size in sizes.items()}


def _takes(unit: Unit) -> bool:
    """Whether XNNPACK takes an operator: by its type, and no depthwise convolution of floats with int8 weights."""
    name, float_out = unit.name.split("_", 1)[1], unit.act_bytes == 4
    if unit.op == "depthwise_conv2d" and float_out and unit.weight_dtype != "float32":
        return False
    return name in (_FLOAT if float_out else _ANY)


def _arena(graph: Table, buffers: list[int], units: Sequence[Unit], delegate: bool) -> int:
    infos = tensors_of(graph)
    constant = [buffers[t.number(2, "<I")] > 0 for t in graph.tables(0)]
    ops = [([i for i in op.numbers(1) if i >= 0 and not constant[i]], op.numbers(2)) for op in graph.tables(3)]
    inputs, outputs = graph.numbers(1), graph.numbers(2)
    taken = [delegate and _takes(u) for u in units]
    step, steps = -1, []
    for i, mine in enumerate(taken):  # neighbours that XNNPACK takes are one step
        step += not (mine and i > 0 and taken[i - 1])
        steps.append(step)
    same: dict[int, int] = {}
    for unit, mine, (ins, outs) in zip(units, taken, ops, strict=True):
        if unit.name.endswith("_reshape") and not mine and ins and outs[0] not in outputs:
            same[outs[0]] = same.get(ins[0], ins[0])
    born = {t: steps[i] for i, (_, outs) in enumerate(ops) for t in outs}
    dies: dict[int, int] = {}
    for i, (ins, _) in enumerate(ops):
        for t in ins:
            dies[same.get(t, t)] = max(steps[i], dies.get(same.get(t, t), 0))
    inside = {t for i, (_, outs) in enumerate(ops) if taken[i] for t in outs if dies.get(t, -1) == steps[i] and t not in outputs}
    born = {t: at for t, at in born.items() if t not in inside and t not in same}
    held = [Held(size_bytes(infos[t]), 0, step + 1) for t in inputs if not constant[t]]
    held += [Held(size_bytes(infos[t]), at, step + 1 if t in outputs else dies.get(t, at)) for t, at in sorted(born.items())]
    return greedy_by_size(held)[0]
