"""What a lowered program really holds: the precision of every weighted operator, read from its own bytes and compared with the plan.

A quantizer or a partitioner that leaves an operator out does so without a word, and the float program passes every numeric check.
Field numbers are those of TensorFlow's schema.fbs (version 3) and of ExecuTorch's backends/xnnpack/serialization/schema.fbs (1.4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgesdk.errors import CheckFailed
from edgesdk.graph.tflite_read import Table
from edgesdk.native.formats import is_native
from edgesdk.runner import method_of

if TYPE_CHECKING:
    from edgesdk.graph.types import Unit
    from edgesdk.model import ModelSpec


@dataclass(frozen=True)
class Held:
    """A weighted operator of a program: its weight as a matrix, and the precision it computes in."""

    method: str
    embedding: bool
    rows: int
    cols: int
    precision: str


def refuse_difference(spec: ModelSpec, runtime: str, choice: Mapping[tuple[str, str], str], content: bytes) -> int:
    """How many weighted units were compared; 0 where the program's delegate keeps its operators in a form that is not read here.

    Raises `CheckFailed` naming the first unit whose planned precision is not what the program holds.
    """
    from edgesdk.graph import trace

    graph = trace(spec)
    pte = runtime.startswith("executorch")
    found = pte_operators(content) if pte else tflite_operators(content)
    if found is None:
        return 0
    compared = 0
    for method in graph.methods:
        left = [h for h in found if h.method == method.name]
        for unit in (u for u in method.units if u.weight_elements):
            planned = choice.get((method.name, unit.name), "fp32")
            if planned == "as-is":
                continue
            twin = _twin(unit, left, planned)
            if twin is not None:
                left.remove(twin)
            held = twin.precision if twin else "fp32"
            if held != planned:
                raise CheckFailed(
                    f"{spec.name}: {method.name}/{unit.name} is planned {planned}, but the {runtime} program holds it as {held}",
                    "the converter left the plan aside for this unit; choose another --runtime, or a budget that needs no such precision",
                    method=method.name, unit=unit.name, planned=planned, held=held,
                )  # fmt: skip
            compared += 1
    return compared


def _twin(unit: Unit, left: list[Held], planned: str) -> Held | None:
    """The first operator left with the unit's weight shape, on our kernels or not as planned: both lists are in the order in which they compute,
    but for our kernels' operators, which are listed after the delegates'."""
    shape, embedding, native = {unit.rows, unit.cols}, unit.op == "embedding", is_native(planned)
    alike = [h for h in left if {h.rows, h.cols} == shape and h.embedding == embedding]
    return next((h for h in alike if is_native(h.precision) == native), alike[0] if alike else None)


_WEIGHT_AT = {3: 1, 4: 1, 7: 1, 9: 1, 36: 0, 67: 1}
"""Operator code → which input is the weight: conv_2d, depthwise_conv_2d, embedding_lookup, fully_connected, gather, transpose_conv."""
_TFLITE_WEIGHTS = {0: "fp32", 1: "fp16", 9: "int8", 3: "int8", 17: "int4"}
_DEQUANTIZE = 6


def tflite_operators(content: bytes) -> list[Held]:
    """The weighted operators of a `.tflite`, in file order. Raises `IndexError` or `struct.error` for a damaged file."""
    model = Table(content, struct.unpack_from("<I", content, 0)[0])
    codes = [max(c.number(3), c.number(0, "<b")) for c in model.tables(1)]
    sizes = [max(b.length(0), b.number(2, "<Q")) for b in model.tables(4)]
    signatures = [(s.text(2), s.number(4, "<I")) for s in model.tables(7)] or [("forward", 0)]
    graphs = model.tables(2)
    found = []
    for name, index in signatures:
        tensors, made = graphs[index].tables(0), {}
        for op in graphs[index].tables(3):
            code, ins = codes[op.number(0, "<I")], op.numbers(1)
            if code == _DEQUANTIZE:
                made[op.numbers(2)[0]] = ins[0]
            if code not in _WEIGHT_AT or len(ins) <= _WEIGHT_AT[code]:
                continue
            seen = ins[_WEIGHT_AT[code]]
            weight = made.get(seen, seen)
            if not sizes[tensors[weight].number(2, "<I")]:
                continue
            shape = tensors[weight].numbers(0)
            rows = shape[-1] if code == 4 else shape[0]
            kind = _TFLITE_WEIGHTS.get(tensors[weight].number(1, "<b"), "fp32")
            float_in = tensors[ins[0]].number(1, "<b") in (0, 1)
            embedding = code in (7, 36)
            precision = _tflite_precision(kind, embedding or weight != seen, float_in)
            found.append(Held(method_of(name, len(signatures)), embedding, rows, _cols(shape, rows), precision))
    return found


def _tflite_precision(kind: str, weight_only: bool, float_in: bool) -> str:
    if kind in ("fp32", "fp16"):
        return kind
    return f"{kind}-weight-only" if weight_only else f"{kind}-dynamic" if float_in else f"{kind}-static"


def _cols(shape: list[int], rows: int) -> int:
    elements = 1
    for d in shape:
        elements *= d
    return elements // max(rows, 1)


_XNN_NODES = {2: (0, 1), 7: (15, 16), 13: (15, 16), 39: (15, 16)}
"""Node kind → fields of its input and its filter: XNNFullyConnected, XNNConv2d, XNNDepthwiseConv2d, XNNConvTranspose2d."""
_XNN_KINDS = {1: "fp32", 2: "fp16", 3: "int8", 4: "int8", 6: "int8", 8: "int4", 10: "int4-g32", 13: "fp32"}
_CHAR = 1
"""ExecuTorch's ScalarType of int8 (exir/scalar_type.py)."""
_XNN_STATIC, _XNN_DYNAMIC = (3, 4), (9, 11)


def pte_operators(content: bytes) -> list[Held] | None:
    """The weighted operators that XNNPACK computes in a `.pte`; None where another delegate holds some of them, in its own form."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    from edgesdk.lower.native_units import calls
    from edgesdk.lower.quiet import quiet

    with quiet():
        parsed = deserialize_pte_binary(content)
    program = getattr(parsed, "program", parsed)
    found = []
    for plan in program.execution_plan:
        for delegate in plan.delegates:
            if delegate.id != "XnnpackBackend":
                return None
            found += list(_xnnpack(plan.name, bytes(program.backend_delegate_data[delegate.processed.index].data)))
        found += [Held(plan.name, False, int(h["rows"]), int(h["cols"]), h["precision"].decode()) for h in calls(program, plan)]
        found += list(_tables(plan))
    return found


def _tables(plan: Any) -> Iterator[Held]:
    """The embeddings of a method: they are not delegated. A table of one column holds the scales of another."""
    for chain in plan.chains:
        for call in (i.instr_args for i in chain.instructions if hasattr(i.instr_args, "op_index")):
            if plan.operators[call.op_index].name == "aten::embedding":
                table = plan.values[call.args[0]].val
                if table.sizes[1] > 1:
                    rows, cols = table.sizes
                    yield Held(plan.name, True, rows, cols, "int8-weight-only" if int(table.scalar_type) == _CHAR else "fp32")


def _xnnpack(method: str, payload: bytes) -> Iterator[Held]:
    if payload[4:8] == b"XH00":
        start, size = struct.unpack_from("<II", payload, 10)
        payload = payload[start : start + size]
    root = Table(payload, struct.unpack_from("<I", payload, 0)[0])
    values: dict[int, tuple[int, list[int]]] = {}
    for value in root.tables(2):
        tensor: Any = value.table(1)
        if value.number(0, "<B") == 2:  # a quantized tensor wraps a plain one
            tensor = tensor.table(0)
        values[tensor.number(6, "<I")] = tensor.number(0, "<h"), tensor.numbers(2)
    for node in root.tables(1):
        kind = node.number(0, "<B")
        if kind not in _XNN_NODES:
            continue
        body, (input_at, filter_at) = node.table(1), _XNN_NODES[kind]
        dtype, shape = values[body.number(filter_at, "<I")]
        rows = shape[-1] if kind == 13 else shape[0]
        yield Held(method, False, rows, _cols(shape, rows), _xnn_precision(dtype, values[body.number(input_at, "<I")][0]))


def _xnn_precision(weight: int, activation: int) -> str:
    kind = _XNN_KINDS.get(weight, "fp32")
    if kind in ("fp32", "fp16", "int4-g32"):
        return kind
    return f"{kind}-static" if activation in _XNN_STATIC else f"{kind}-dynamic" if activation in _XNN_DYNAMIC else f"{kind}-weight-only"
