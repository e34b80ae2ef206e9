"""A `.tflite` flatbuffer → MethodGraphs, read by hand with every offset checked, so a damaged file is an error and never a crash.

Field numbers are those of TensorFlow's public schema (schema.fbs, version 3).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from edgesdk.errors import InputError
from edgesdk.graph.types import MethodGraph, Op, TensorInfo, Unit
from edgesdk.runner import method_of

_DTYPES = {
    0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8", 10: "float64", 15: "uint32", 16: "uint16",
    17: "int4", 18: "bfloat16",
}  # fmt: skip
_BITS = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "int64": 64,
    "float64": 64,
    "int16": 16,
    "uint16": 16,
    "int4": 4,
    "int8": 8,
    "uint8": 8,
    "bool": 8,
}
_OPS: dict[int, tuple[str, Op]] = {
    0: ("add", "elementwise"), 1: ("average_pool_2d", "pool"), 2: ("concatenation", "elementwise"), 3: ("conv_2d", "conv2d"),
    4: ("depthwise_conv_2d", "depthwise_conv2d"), 5: ("depth_to_space", "elementwise"), 6: ("dequantize", "quantize"), 7: ("embedding_lookup", "embedding"),
    8: ("floor", "elementwise"), 9: ("fully_connected", "linear"), 11: ("l2_normalization", "norm"), 14: ("logistic", "activation"), 17: ("max_pool_2d", "pool"),
    18: ("mul", "elementwise"), 19: ("relu", "activation"), 21: ("relu6", "activation"), 22: ("reshape", "reshape"), 23: ("resize_bilinear", "elementwise"),
    25: ("softmax", "softmax"), 26: ("space_to_depth", "elementwise"), 28: ("tanh", "activation"), 34: ("pad", "elementwise"), 36: ("gather", "embedding"),
    37: ("batch_to_space_nd", "elementwise"), 38: ("space_to_batch_nd", "elementwise"), 39: ("transpose", "elementwise"), 40: ("mean", "pool"),
    41: ("sub", "elementwise"), 42: ("div", "elementwise"), 43: ("squeeze", "reshape"), 44: ("unidirectional_sequence_lstm", "recurrent"),
    45: ("strided_slice", "elementwise"), 47: ("exp", "elementwise"), 48: ("topk_v2", "other"), 49: ("split", "elementwise"), 50: ("log_softmax", "softmax"),
    53: ("cast", "elementwise"), 54: ("prelu", "activation"), 55: ("maximum", "elementwise"), 56: ("arg_max", "pool"), 57: ("minimum", "elementwise"),
    58: ("less", "elementwise"), 59: ("neg", "elementwise"), 60: ("padv2", "elementwise"), 61: ("greater", "elementwise"), 62: ("greater_equal", "elementwise"),
    63: ("less_equal", "elementwise"), 64: ("select", "elementwise"), 65: ("slice", "elementwise"), 66: ("sin", "elementwise"), 67: ("transpose_conv", "conv2d"),
    69: ("tile", "elementwise"), 70: ("expand_dims", "reshape"), 71: ("equal", "elementwise"), 72: ("not_equal", "elementwise"), 73: ("log", "elementwise"),
    74: ("sum", "pool"), 75: ("sqrt", "elementwise"), 76: ("rsqrt", "elementwise"), 77: ("shape", "reshape"), 78: ("pow", "elementwise"),
    82: ("reduce_max", "pool"), 83: ("pack", "elementwise"), 84: ("logical_or", "elementwise"), 85: ("one_hot", "elementwise"), 86: ("logical_and", "elementwise"),
    87: ("logical_not", "elementwise"), 88: ("unpack", "elementwise"), 92: ("square", "elementwise"), 94: ("fill", "elementwise"), 96: ("range", "elementwise"),
    97: ("resize_nearest_neighbor", "elementwise"), 98: ("leaky_relu", "activation"), 99: ("squared_difference", "elementwise"), 101: ("abs", "elementwise"),
    102: ("split_v", "elementwise"), 107: ("gather_nd", "elementwise"), 108: ("cos", "elementwise"), 111: ("elu", "activation"), 114: ("quantize", "quantize"),
    117: ("hard_swish", "activation"), 123: ("select_v2", "elementwise"), 126: ("batch_matmul", "matmul"), 128: ("cumsum", "elementwise"),
    90: ("floor_div", "elementwise"), 91: ("reduce_any", "pool"), 93: ("zeros_like", "elementwise"), 95: ("floor_mod", "elementwise"), 104: ("ceil", "elementwise"),
    116: ("round", "elementwise"), 122: ("scatter_nd", "elementwise"), 140: ("reduce_all", "pool"),
    130: ("broadcast_to", "elementwise"), 150: ("gelu", "activation"), 151: ("dynamic_update_slice", "elementwise"), 152: ("relu_0_to_1", "activation"),
}  # fmt: skip


class Table:
    """A flatbuffer table at `at`: fields by number. Out-of-range reads raise `IndexError`."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.vtable = at - self._read("<i", at)
        self.end = self._read("<H", self.vtable)

    def _read(self, form: str, at: int) -> int:
        if at < 0 or at + struct.calcsize(form) > len(self.data):
            raise IndexError(at)
        return int(struct.unpack_from(form, self.data, at)[0])

    def _field(self, number: int) -> int:
        slot = 4 + 2 * number
        offset = self._read("<H", self.vtable + slot) if slot < self.end else 0
        return self.at + offset if offset else 0

    def number(self, field: int, form: str = "<i", default: int = 0) -> int:
        at = self._field(field)
        return self._read(form, at) if at else default

    def _vector(self, field: int) -> tuple[int, int]:
        at = self._field(field)
        if not at:
            return 0, 0
        start = at + self._read("<I", at)
        count = self._read("<I", start)
        if count > len(self.data):
            raise IndexError(start)
        return start + 4, count

    def numbers(self, field: int) -> list[int]:
        start, count = self._vector(field)
        return [self._read("<i", start + 4 * i) for i in range(count)]

    def tables(self, field: int) -> list[Table]:
        start, count = self._vector(field)
        return [Table(self.data, start + 4 * i + self._read("<I", start + 4 * i)) for i in range(count)]

    def table(self, field: int) -> Table:
        """The table that a field points to. Raises `IndexError` where the field is absent."""
        at = self._field(field)
        if not at:
            raise IndexError(self.at)
        return Table(self.data, at + self._read("<I", at))

    def text(self, field: int) -> str:
        start, count = self._vector(field)
        return self.data[start : start + count].decode("utf-8", "replace")

    def length(self, field: int) -> int:
        return self._vector(field)[1]


def read_tflite(path: Path) -> tuple[MethodGraph, ...]:
    """One MethodGraph a signature, or `forward` for a file without any. Raises `InputError` for a damaged file or an unknown operator."""
    data = path.read_bytes()
    try:
        model = Table(data, struct.unpack_from("<I", data, 0)[0])
        graphs = model.tables(2)
        codes = [(max(c.number(3), c.number(0, "<b")), c.text(1)) for c in model.tables(1)]
        buffers = [max(b.length(0), b.number(2, "<Q")) for b in model.tables(4)]
        signatures = [(s.text(2) or "forward", s.number(4, "<I")) for s in model.tables(7)] or [("forward", 0)]
        signatures = [(method_of(name, len(signatures)), i) for name, i in signatures]
        return tuple(_method(name, graphs[i], codes, buffers, path) for name, i in signatures)
    except (IndexError, struct.error):
        raise InputError(f"{path}: the flatbuffer is damaged or cut off ({len(data)} bytes)", "copy or convert the file again") from None


def tensors_of(graph: Table) -> list[TensorInfo]:
    """The tensors of a subgraph."""
    return [
        TensorInfo(name=t.text(3), shape=tuple(t.numbers(0)), dtype=_DTYPES.get(t.number(1, "<b"), f"type {t.number(1, '<b')}"))
        for t in graph.tables(0)
    ]


def _method(name: str, graph: Table, codes: list[tuple[int, str]], buffers: list[int], path: Path) -> MethodGraph:
    tensors = tensors_of(graph)
    constant = [buffers[t.number(2, "<I")] > 0 for t in graph.tables(0)]
    units, spans = [], []
    for index, op in enumerate(graph.tables(3)):
        code, custom = codes[op.number(0, "<I")]
        if code not in _OPS:
            called = f"custom operator '{custom}'" if code == 32 else f"operator code {code}"
            raise InputError(
                f"{path}: unsupported {called} at index {index} of '{name}'",
                "convert the model without it, or run it through its own runtime",
            )
        ins, outs = [i for i in op.numbers(1) if i >= 0], op.numbers(2)
        units.append(_unit(index, _OPS[code], [tensors[i] for i in ins], [constant[i] for i in ins], [tensors[i] for i in outs]))
        spans.append((ins, outs))
    ends = graph.numbers(1), graph.numbers(2)
    return MethodGraph(
        name=name, units=tuple(units), inputs=tuple(tensors[i] for i in ends[0]), outputs=tuple(tensors[i] for i in ends[1]),
        peak_activation_bytes=_peak(tensors, spans, ends),
    )  # fmt: skip


def size_bytes(tensor: TensorInfo) -> int:
    """Bytes of a tensor, packed."""
    return -(-tensor.elements * _BITS.get(tensor.dtype, 32) // 8)


def _unit(index: int, kind: tuple[str, Op], ins: list[TensorInfo], constant: list[bool], outs: list[TensorInfo]) -> Unit:
    called, op = kind
    held = [t for t, c in zip(ins, constant, strict=True) if c]
    live = [t for t, c in zip(ins, constant, strict=True) if not c]
    fields: dict[str, Any] = {"in_elements": sum(t.elements for t in live), "out_elements": sum(t.elements for t in outs)}
    if op in ("linear", "conv2d", "depthwise_conv2d", "embedding") and held:
        weight = max(held, key=lambda t: t.elements)
        rows = weight.shape[-1] if op == "depthwise_conv2d" else weight.shape[0]
        cols = weight.elements // max(rows, 1)
        fields |= {"weight": weight.name, "weight_shape": weight.shape, "weight_dtype": weight.dtype, "rows": rows, "cols": cols}
        fields["bias_elements"] = sum(t.elements for t in held if t is not weight and op != "embedding" and called != "transpose_conv")
        if called == "transpose_conv":
            fields["macs"] = fields["in_elements"] * weight.elements // max(weight.shape[-1], 1)
        else:
            fields["macs"] = 0 if op == "embedding" else outs[0].elements * cols
        if op != "linear":
            fields["detail"] = {"kernel": weight.shape[1] if len(weight.shape) > 1 else 1}
    elif op in ("linear", "matmul") and ins and ins[0].shape:
        op = "matmul"
        fields["macs"] = outs[0].elements * ins[0].shape[-1]
    if op == "reshape":
        fields["in_elements"] = fields["out_elements"] = 0
    act = _BITS.get(outs[0].dtype if outs else "float32", 32) // 8
    return Unit(name=f"op{index}_{called}", op=op, act_bytes=max(act, 1), **fields)


def _peak(tensors: list[TensorInfo], spans: list[tuple[list[int], list[int]]], ends: tuple[list[int], list[int]]) -> int:
    """Largest sum of live intermediate bytes over the operators in file order."""
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    for i, (ins, outs) in enumerate(spans):
        born.update({t: i for t in outs if t not in ends[1]})
        dies.update(dict.fromkeys(ins, i))
    steps = range(len(spans))
    return max((sum(size_bytes(tensors[t]) for t in born if born[t] <= i <= dies.get(t, born[t])) for i in steps), default=0)


def stored_bytes(path: Path) -> int:
    """Bytes of all constant buffers of the file."""
    data = path.read_bytes()
    model = Table(data, struct.unpack_from("<I", data, 0)[0])
    return sum(max(b.length(0), b.number(2, "<Q")) for b in model.tables(4))
