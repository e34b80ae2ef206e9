"""A tiny real program for the tests: one fully connected layer as a `.tflite`, and a bundle around it, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgesdk.bundle import GoldenCase, Manifest
from edgesdk.bundles import array_bytes, write_bundle


def tiny_tflite(weights: np.ndarray) -> bytes:
    """y = x · weightsᵀ; weights float32 [out, in]."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as s

    def tensor(name: str, shape: tuple[int, ...], buffer: int) -> s.TensorT:
        t = s.TensorT()
        t.name, t.shape, t.buffer, t.type = name.encode(), list(shape), buffer, s.TensorType.FLOAT32
        return t

    rows, cols = weights.shape
    data = s.BufferT()
    data.data = np.frombuffer(weights.astype("<f4").tobytes(), np.uint8)
    code = s.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = s.BuiltinOperator.FULLY_CONNECTED
    code.version = 1
    op = s.OperatorT()
    op.opcodeIndex, op.inputs, op.outputs = 0, [0, 1, -1], [2]
    op.builtinOptionsType, op.builtinOptions = s.BuiltinOptions.FullyConnectedOptions, s.FullyConnectedOptionsT()
    graph = s.SubGraphT()
    graph.tensors = [tensor("x", (1, cols), 0), tensor("w", (rows, cols), 1), tensor("y", (1, rows), 0)]
    graph.inputs, graph.outputs, graph.operators = [0], [2], [op]
    model = s.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [s.BufferT(), data]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def tiny_bundle(
    path: Path,
    *,
    seed: int = 0,
    wrong: bool = False,
    rows: int = 4,
    cols: int = 256,
    plan: bytes | None = None,
    library: bytes | None = None,
    runtime: str = "litert",
) -> Manifest:
    """A bundle of `tiny_tflite` with one golden case; `wrong` spoils the golden output. `cols` of 40000 makes it 640 kB.

    `plan` and `library` are members beside it.
    """
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    x = rng.standard_normal((1, cols)).astype(np.float32)
    y = x @ weights.T
    members = {
        "model.tflite": tiny_tflite(weights),
        "golden/forward/0/in0.npy": array_bytes(x),
        "golden/forward/0/out0.npy": array_bytes(y * 1.5 if wrong else y),
    }
    if plan is not None:
        members["plan.json"] = plan
    if library is not None:
        members["libedgekernels.so"] = library
    case = GoldenCase(
        method="forward", inputs=("golden/forward/0/in0.npy",), outputs=("golden/forward/0/out0.npy",), max_relative_error=1e-3
    )
    return write_bundle(
        path, members, model_name="tiny", device="host", runtime=runtime, runtime_version="2", program="model.tflite",
        methods=("forward",), threads=1,
        plan_digest="0" * 64, host_check={"forward": 0.0}, golden=(case,), memory={}, edgesdk_version="0.1.0",
    )  # fmt: skip
