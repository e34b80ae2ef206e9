"""A `.tflite` that TensorFlow Lite Micro can run: one method, its own operators, weights inside the flatbuffer.

Its operators: tensorflow/tflite-micro, tensorflow/lite/micro/micro_mutable_op_resolver.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgesdk.errors import InputError
from edgesdk.lower.executorch import Choice
from edgesdk.lower.litert import lower_litert

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

OPERATORS = frozenset({
    "ABS", "ADD", "ADD_N", "ARG_MAX", "ARG_MIN", "ASSIGN_VARIABLE", "AVERAGE_POOL_2D", "BATCH_MATMUL", "BATCH_TO_SPACE_ND", "BROADCAST_ARGS",
    "BROADCAST_TO", "CALL_ONCE", "CAST", "CEIL", "CONCATENATION", "CONV_2D", "COS", "CUMSUM", "DEPTHWISE_CONV_2D", "DEPTH_TO_SPACE",
    "DEQUANTIZE", "DIV", "ELU", "EMBEDDING_LOOKUP", "EQUAL", "EXP", "EXPAND_DIMS", "FILL", "FLOOR", "FLOOR_DIV", "FLOOR_MOD", "FULLY_CONNECTED",
    "GATHER", "GATHER_ND", "GREATER", "GREATER_EQUAL", "HARD_SWISH", "IF", "L2_NORMALIZATION", "L2_POOL_2D", "LEAKY_RELU", "LESS", "LESS_EQUAL",
    "LOG", "LOGICAL_AND", "LOGICAL_NOT", "LOGICAL_OR", "LOGISTIC", "LOG_SOFTMAX", "MAXIMUM", "MAX_POOL_2D", "MEAN", "MINIMUM", "MIRROR_PAD",
    "MUL", "NEG", "NOT_EQUAL", "PACK", "PAD", "PADV2", "PRELU", "QUANTIZE", "READ_VARIABLE", "REDUCE_MAX", "REDUCE_MIN", "RELU", "RELU6",
    "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "ROUND", "RSQRT", "SELECT_V2", "SHAPE", "SIN", "SLICE", "SOFTMAX",
    "SPACE_TO_BATCH_ND", "SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "SQRT", "SQUARE", "SQUARED_DIFFERENCE", "SQUEEZE", "STRIDED_SLICE", "SUB", "SUM",
    "SVDF", "TANH", "TRANSPOSE", "TRANSPOSE_CONV", "UNIDIRECTIONAL_SEQUENCE_LSTM", "UNPACK", "VAR_HANDLE", "WHILE", "ZEROS_LIKE",
})  # fmt: skip


def lower_micro(spec: ModelSpec, choice: Choice, say: Callable[[str], None]) -> bytes:
    """The `.tflite` bytes. Raises `InputError` naming what the runtime lacks, and what `lower_litert` raises."""
    if len(spec.methods) > 1:
        raise InputError(f"{spec.name}: {len(spec.methods)} methods, TensorFlow Lite Micro runs one", "give a model of one method")
    content = lower_litert(spec, choice, say)
    refuse(content, spec.name)
    return content


def refuse(content: bytes, name: str) -> None:
    """Raises `InputError` for a program that TensorFlow Lite Micro cannot run."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(content)
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    used = {names.get(max(c.BuiltinCode(), c.DeprecatedBuiltinCode()), "unknown") for c in codes}
    if missing := sorted(used - OPERATORS):
        what = f"{name}: TensorFlow Lite Micro has no {', '.join(missing)}"
        raise InputError(
            what, "use an activation or operator it has (RELU, HARD_SWISH, TANH …): docs/microcontrollers.md has the list's source"
        )
    outside = sum(1 for i in range(model.BuffersLength()) if model.Buffers(i).Offset() > 1)
    if outside:
        raise InputError(
            f"{name}: {outside} constants lie behind the flatbuffer, where TensorFlow Lite Micro does not look", "build a smaller model"
        )
