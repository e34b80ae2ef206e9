"""ModelSpec + precisions → a LiteRT `.tflite`: one signature a method, then ai-edge-quantizer operator by operator."""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError, MissingTool
from edgesdk.graph.tflite_read import Table as _Table
from edgesdk.lower.executorch import Choice
from edgesdk.lower.quiet import silent
from edgesdk.plan.fake_quant import samples as spread
from edgesdk.runner import method_of

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

_NAMES = {"linear": "FULLY_CONNECTED", "conv2d": "CONV_2D", "depthwise_conv2d": "DEPTHWISE_CONV_2D", "embedding": "EMBEDDING_LOOKUP"}


@dataclass(frozen=True)
class _Operator:
    """A weighted operator of a float `.tflite`: where it is, its weight as a matrix, the scope the quantizer knows it by."""

    method: str
    unit: str
    kind: str
    rows: int
    cols: int
    scope: str


def convert_float(spec: ModelSpec) -> bytes:
    """The float `.tflite` of a PyTorch model. Raises `MissingTool` or `InputError`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with silent():
            import litert_torch
    except ImportError:
        raise MissingTool("litert-torch is not installed", "pip install -c constraints.txt 'edgesdk[litert]'") from None
    import torch

    with torch.no_grad(), silent(), tempfile.TemporaryDirectory() as folder:
        chain: Any = litert_torch
        for name, method in spec.methods.items():
            chain = chain.signature(name, method.module, method.example_inputs)
        try:
            chain.convert().export(f"{folder}/m.tflite")
        except Exception as error:
            text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise InputError(f"{spec.name} cannot be converted to .tflite: {text}", "try --runtime executorch") from None
        return Path(folder, "m.tflite").read_bytes()


def operators(content: bytes) -> list[_Operator]:
    """The weighted operators of a `.tflite`, in file order."""
    from edgesdk.graph.tflite_read import read_tflite

    model = _Table(content, struct.unpack_from("<I", content, 0)[0])
    signatures = [(s.text(2), s.number(4, "<I")) for s in model.tables(7)] or [("forward", 0)]
    with tempfile.NamedTemporaryFile(suffix=".tflite") as file:
        file.write(content)
        file.flush()
        graphs = {m.name: m for m in read_tflite(Path(file.name))}
    found = []
    for name, index in signatures:
        method = method_of(name, len(signatures))
        graph = model.tables(2)[index]
        tensors = graph.tables(0)
        for op, unit in zip(graph.tables(3), graphs[method].units, strict=True):
            if unit.weight_elements:
                scope = "".join(tensors[i].text(3) + ";" for i in op.numbers(2))
                found.append(_Operator(method, unit.name, unit.op, unit.rows, unit.cols, scope))
    return found


def assign(spec: ModelSpec, content: bytes, choice: Choice) -> dict[_Operator, str]:
    """Which operator of the float file takes which precision. PyTorch units and operators are paired by method, kind and shape, in order."""
    ops = operators(content)
    if spec.flatbuffer is not None:
        return {op: choice[(op.method, op.unit)] for op in ops if (op.method, op.unit) in choice}
    from edgesdk.graph import trace

    pairs: dict[_Operator, str] = {}
    for method in trace(spec).methods:
        left = [op for op in ops if op.method == method.name]
        for unit in method.units:
            if unit.weight_elements:  # one that stays float takes its operator too, or the next of its shape would get it
                twin = next(
                    (
                        op
                        for op in left
                        if {op.rows, op.cols} == {unit.rows, unit.cols} and (op.kind == "embedding") == (unit.op == "embedding")
                    ),
                    None,
                )
                if twin is not None:
                    left.remove(twin)
                    if (method.name, unit.name) in choice:
                        pairs[twin] = choice[(method.name, unit.name)]
    return pairs


def lower_litert(spec: ModelSpec, choice: Choice, say: Callable[[str], None]) -> bytes:
    """The `.tflite` bytes with every unit's precision applied. Raises `MissingTool`, `InputError`."""
    if spec.flatbuffer is not None:
        content = spec.flatbuffer.read_bytes()
    else:
        say("converting to .tflite")
        content = convert_float(spec)
    pairs = {op: p for op, p in assign(spec, content, choice).items() if p not in ("fp32", "as-is")}
    if pairs:
        say("quantizing")
        with silent():
            content = _quantize(spec, content, pairs)
    coded = any(str(t.dtype) == "torch.int8" for m in spec.methods.values() for t in m.example_inputs)
    return _with_dequantized_caches(content) if coded else content


def _quantize(spec: ModelSpec, content: bytes, pairs: dict[_Operator, str]) -> bytes:
    try:
        from ai_edge_quantizer import qtyping, quantizer
    except ImportError:
        raise MissingTool("ai-edge-quantizer is not installed", "pip install -c constraints.txt 'edgesdk[litert]'") from None
    name = qtyping.TFLOperationName
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "float.tflite")
        source.write_bytes(_signed(content))
        tool = quantizer.Quantizer(str(source))
        static = [op for op, p in pairs.items() if p == "int8-static"]
        if static and len(static) == len(operators(content)):
            tool.add_static_config(regex=".*", operation_name=name.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
        for op, precision in pairs.items():
            regex, kind = "^" + re.escape(op.scope) + "$", getattr(name, _NAMES[op.kind])
            if precision == "int8-dynamic":
                tool.add_dynamic_config(regex=regex, operation_name=kind, num_bits=8)
            elif precision == "int8-weight-only":
                tool.add_weight_only_config(regex=regex, operation_name=kind, num_bits=8)
            elif precision == "int8-static":
                tool.add_static_config(regex=regex, operation_name=kind, activation_num_bits=8, weight_num_bits=8)
        return bytes(tool.quantize(_ranges(spec, tool, source) if static else None).quantized_model)


def _with_dequantized_caches(content: bytes) -> bytes:
    """The same flatbuffer with int8 inputs dequantized at a scale of 1 where they are cast to float32: LiteRT's XNNPACK delegate takes that in,
    a cast stays outside, where all caches would be float at once."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    code.version = 2
    casts = {i for i, c in enumerate(model.operatorCodes) if max(c.builtinCode, c.deprecatedBuiltinCode) == schema.BuiltinOperator.CAST}
    model.operatorCodes.append(code)
    for graph in model.subgraphs:
        given = {int(i) for i in graph.inputs if graph.tensors[i].type == schema.TensorType.INT8}
        for op in graph.operators:
            if op.opcodeIndex in casts and int(op.inputs[0]) in given:
                op.opcodeIndex = len(model.operatorCodes) - 1
                op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.DequantizeOptions, schema.DequantizeOptionsT()
                one = schema.QuantizationParametersT()
                one.scale, one.zeroPoint = [1.0], [0]
                graph.tensors[op.inputs[0]].quantization = one
    return _repacked(model, content)


def _repacked(model: Any, content: bytes) -> bytes:
    """A changed model, read from `content`, as a file: its constants stand behind the flatbuffer, at multiples of 16 bytes."""
    import flatbuffers

    def written() -> bytes:
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    apart: list[tuple[Any, bytes]] = []
    for buffer in model.buffers:
        inside = b"" if buffer.data is None else bytes(bytearray(buffer.data))
        data = content[buffer.offset : buffer.offset + buffer.size] if buffer.offset > 1 else inside
        if len(data) >= 64 or buffer.offset > 1:
            buffer.data, buffer.offset, buffer.size = None, 2, len(data)  # numbers of a fixed width: the length stays
            apart.append((buffer, data))
    at = -(-len(written()) // 16) * 16
    parts: list[bytes] = []
    for buffer, data in apart:
        parts.append(data + bytes(-len(data) % 16))
        buffer.offset, at = at, at + len(parts[-1])
    head = written()
    return b"".join((head, bytes(-len(head) % 16), *parts))


def _ranges(spec: ModelSpec, tool: Any, source: Path) -> Any:
    """Activation ranges: the least and the largest value met (the tool's own default, a moving average, cuts off rare ones)."""
    from ai_edge_quantizer import calibrator
    from ai_edge_quantizer.utils import qsv_utils

    observer = calibrator.Calibrator(str(source), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    observer.calibrate(_calibration(spec, str(source)), tool._recipe_manager)
    return observer.get_model_qsvs()


def _signed(content: bytes) -> bytes:
    """The same flatbuffer with a signature and with operator codes in the newer field: older files have neither. The quantizer's
    calibration asks for the one, and without the other it takes every operator for an addition and quantizes none, without a word."""
    from ai_edge_litert import schema_py_generated as schema

    root = _Table(content, struct.unpack_from("<I", content, 0)[0])
    if root.length(7) and all(c.number(3) >= c.number(0, "<b") for c in root.tables(1)):
        return content
    import flatbuffers

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    for code in model.operatorCodes:
        code.builtinCode = max(code.builtinCode, code.deprecatedBuiltinCode)
    if root.length(7):
        builder = flatbuffers.Builder(len(content))
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())
    graph = model.subgraphs[0]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0

    def entries(prefix: str, indices: Any) -> list[Any]:
        maps = []
        for i, index in enumerate(indices):
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = f"{prefix}_{i}", int(index)
            maps.append(entry)
        return maps

    signature.inputs, signature.outputs = entries("args", graph.inputs), entries("output", graph.outputs)
    model.signatureDefs = [signature]
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _calibration(spec: ModelSpec, path: str) -> dict[str, list[dict[str, Any]]]:
    """Calibration inputs by signature and input name; the model's own, else seeded noise (said in the plan)."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    from edgesdk.runner import name_order, open_program

    interpreter = Interpreter(model_path=path)
    answer: dict[str, list[dict[str, Any]]] = {}
    keys = list(interpreter.get_signature_list()) or ["serving_default"]
    runner = open_program(path, "litert")
    for key in keys:
        method = method_of(key, len(keys))
        if interpreter.get_signature_list():
            details = interpreter.get_signature_runner(key).get_input_details()
            names = sorted(details, key=name_order)
        else:
            details = {d["name"]: d for d in interpreter.get_input_details()}
            names = list(details)
        if spec.calibration is not None:
            samples = [[np.asarray(t) for t in s] for s in spread(spec, method, 64)]
        else:
            rng = np.random.default_rng(0)
            samples = [[rng.standard_normal(shape).astype(dtype) for shape, dtype in runner.inputs(method)] for _ in range(16)]
        answer[key] = [{n: a.astype(details[n]["dtype"]) for n, a in zip(names, s, strict=True)} for s in samples]
    return answer
