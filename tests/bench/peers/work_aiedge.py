"""Compresses weights with ai-edge-quantizer: `python work_aiedge.py JOB`. See `job.py`.

Every weight is a fully connected layer of its own in one .tflite, which the tool quantizes; what the layers compute with afterwards is read off by
running them on unit vectors (which int8 activations hold exactly). Embeddings are calibrated with random inputs, as they have none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import qtyping, quantizer
from ai_edge_quantizer import recipe_manager as recipes
from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flat
from job import Job, Stored, bits_bytes, main

ROWS = 128
BITS = {9: 8, 17: 4, 19: 2}  # TensorType of the schema: INT8, INT4, INT2
_float: dict[str, bytes] = {}


class Stack(torch.nn.Module):
    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for matrix in weights.values():
            layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
            layer.weight = torch.nn.Parameter(torch.from_numpy(matrix))
            self.layers.append(layer)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def converted(job: Job) -> bytes:
    if "model" not in _float:
        import litert_torch

        inputs = tuple(torch.zeros(ROWS, m.shape[1]) for m in job.weights.values())
        path = job.folder / "float.tflite"
        litert_torch.convert(Stack(job.weights).eval(), inputs).export(str(path))
        _float["model"] = path.read_bytes()
    return _float["model"]


def calibration(job: Job) -> dict[str, list[dict[str, np.ndarray]]]:
    rng = np.random.default_rng(0)
    drawn = []
    for name, matrix in job.weights.items():
        x = job.positions(name)
        x = (
            rng.standard_normal((8 * ROWS, matrix.shape[1])).astype(np.float32)
            if x is None
            else x[np.resize(rng.permutation(len(x)), 8 * ROWS)]
        )
        drawn.append(x.reshape(8, ROWS, -1))
    return {"serving_default": [{f"args_{i}": d[s] for i, d in enumerate(drawn)} for s in range(8)]}


def quantized(job: Job, config: dict[str, Any]) -> bytes:
    """Layers whose rows the block does not divide get a scale a channel."""
    manager, group, bits = recipes.RecipeManager(), config["group"], config["bits"]
    for i, matrix in enumerate(job.weights.values()):
        blocks = group and matrix.shape[1] % group == 0
        named: dict[str, Any] = {"granularity": qtyping.QuantGranularity(f"BLOCKWISE_{group}")} if blocks else {}
        add = manager.add_dynamic_config if blocks or bits == 2 else manager.add_weight_only_config  # what its policy has
        operation = qtyping.TFLOperationName.FULLY_CONNECTED
        add(regex=f".*output_{i}_output.*", operation_name=operation, num_bits=bits, algorithm_key=config["method"], **named)
    worker = quantizer.Quantizer(bytearray(converted(job)), manager.get_quantization_recipe())
    result = worker.calibrate(calibration(job)) if worker.need_calibration else None
    return bytes(worker.quantize(result).quantized_model)


def compress(job: Job, config: dict[str, Any]) -> dict[str, Stored]:
    data = quantized(job, config)
    interpreter = Interpreter(model_content=data, num_threads=1)
    runner = interpreter.get_signature_runner()
    columns = {n: [] for n in job.weights}  # type: dict[str, list[np.ndarray]]
    for start in range(0, max(m.shape[1] for m in job.weights.values()), ROWS):
        feeds = {}
        for i, matrix in enumerate(job.weights.values()):
            unit = np.zeros((ROWS, matrix.shape[1]), np.float32)
            for r in range(min(ROWS, matrix.shape[1] - start)):
                unit[r, start + r] = 1
            feeds[f"args_{i}"] = unit
        out = runner(**feeds)
        for i, name in enumerate(job.weights):
            columns[name].append(out[f"output_{i}"])
    sizes = counted(data, job)
    done = {}
    for name, matrix in job.weights.items():
        decoded = np.concatenate(columns[name])[: matrix.shape[1]].T
        done[name] = Stored(np.ascontiguousarray(decoded), *sizes[name])
    return done


def counted(data: bytes, job: Job) -> dict[str, tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Bytes of the integers, scales (float32 a channel, float16 a block) and input scales of every fully connected layer, in the order of inputs."""
    model = flat.read_model(bytearray(data))
    graph, found = model.subgraphs[0], {}
    producers = {int(o): op for op in graph.operators for o in op.outputs}
    inputs = {int(t): i for s in model.signatureDefs for m in s.inputs for i, t in [(int(m.name.decode().split("_")[1]), m.tensorIndex)]}
    names = list(job.weights)
    for op in graph.operators:
        if flat.TFL_OP_CODE_TO_NAME.get(model.operatorCodes[op.opcodeIndex].builtinCode) != qtyping.TFLOperationName.FULLY_CONNECTED:
            continue
        source, floats, extra = int(op.inputs[0]), {}, 0
        while source not in inputs:
            before = producers[source]
            for t in list(before.inputs)[1:]:
                held = model.buffers[graph.tensors[int(t)].buffer].data
                if held is not None:
                    floats["inputs"] = np.frombuffer(bytes(held), np.float32).reshape(1, -1)
                    extra = 2 * floats["inputs"].size
            source = int(before.inputs[0])
        at = int(op.inputs[1])
        if at in producers:  # an explicit dequantize
            at = int(producers[at].inputs[0])
        tensor = graph.tensors[at]
        name = names[inputs[source]]
        found[name] = _tensor(model, graph, tensor, job.weights[name], floats, extra)
    return found


def _tensor(model: Any, graph: Any, tensor: Any, matrix: np.ndarray, floats: dict[str, np.ndarray], extra: int) -> Any:
    bits, raw = BITS.get(tensor.type, 32), np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.uint8)
    if bits == 32:
        return 2 * matrix.size, {}, {"values": matrix.astype(np.float16).astype(np.float32)}
    parts = 8 // bits
    q = ((raw[:, None] >> (np.arange(parts) * bits)) & (2**bits - 1)).ravel()[: matrix.size] ^ (
        1 << (bits - 1)
    )  # two's complement → from 0
    held = tensor.quantization
    if held.scale is not None and len(held.scale):
        scale, width = np.asarray(held.scale, np.float32).reshape(-1, 1), 4
    else:
        blocks = graph.tensors[held.details.scales]
        kind = np.float16 if blocks.type == 1 else np.float32
        scale, width = np.frombuffer(bytes(model.buffers[blocks.buffer].data), kind).astype(np.float32).reshape(len(matrix), -1), 2
    size = bits_bytes(matrix.size, bits) + width * scale.size + extra
    return size, {"q": q.reshape(matrix.shape).astype(np.int32)}, {"scale": scale, **floats}


if __name__ == "__main__":
    main(compress)
