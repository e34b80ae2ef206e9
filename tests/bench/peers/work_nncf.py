"""Compresses weights with NNCF on OpenVINO: `python work_nncf.py JOB`. See `job.py`.

Every weight is a MatMul of its own (embeddings: a Gather) in one OpenVINO model. A Clamp that changes nothing stands before each MatMul: NNCF's AWQ
looks for an activation there. What the compressed weights compute with is read off by running the model on unit vectors.
"""

from __future__ import annotations

from typing import Any

import nncf
import numpy as np
import openvino as ov
from job import Job, Stored, main
from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode
from openvino import opset13 as op

BITS = {
    "i8": 8,
    "u8": 8,
    "i4": 4,
    "u4": 4,
    "i2": 2,
    "u2": 2,
    "u3": 3,
    "u1": 1,
    "nf4": 4,
    "f8e4m3": 8,
    "f4e2m1": 4,
    "f8e8m0": 8,
    "f16": 16,
    "f32": 16,
}
SAMPLES, ROWS = 32, 64


def built(job: Job) -> tuple[ov.Model, list[str]]:
    names, parameters, results = list(job.weights), [], []
    for i, name in enumerate(names):
        matrix = job.weights[name]
        if name in job.inputs:
            x = op.parameter([-1, matrix.shape[1]], np.float32, name=f"x{i}")
            y = op.matmul(op.clamp(x, -3e38, 3e38), op.constant(matrix, name=f"w{i}"), False, True, name=f"m{i}")
        else:
            x = op.parameter([-1], np.int32, name=f"x{i}")
            y = op.gather(op.constant(matrix, name=f"w{i}"), x, op.constant(0, dtype=np.int32), name=f"m{i}")
        x.get_output_tensor(0).set_names({f"x{i}"})
        parameters.append(x)
        results.append(op.result(y, name=f"r{i}"))
    return ov.Model(results, parameters), names


def dataset(job: Job, names: list[str]) -> nncf.Dataset:
    rng = np.random.default_rng(0)
    drawn = {}
    for i, name in enumerate(names):
        x = job.positions(name)
        if x is None:
            drawn[f"x{i}"] = rng.integers(0, len(job.weights[name]), (SAMPLES, ROWS)).astype(np.int32)
        else:
            order = rng.permutation(len(x))
            drawn[f"x{i}"] = x[np.resize(order, SAMPLES * ROWS)].reshape(SAMPLES, ROWS, -1)
    return nncf.Dataset([{k: v[s] for k, v in drawn.items()} for s in range(SAMPLES)])


def below(node: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Every constant that a node is computed from, up to the parameters."""
    for i in range(node.get_input_size()):
        source = node.input_value(i).get_node()
        if source.get_type_name() == "Constant":
            found[source.get_friendly_name()] = source
        elif source.get_type_name() != "Parameter":
            below(source, found)
    return found


def stored(result: Any) -> tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Bytes, integers and floats of the constants under a result; single numbers (shapes, axes, limits, middles) are left out."""
    size, ints, floats = 0, {}, {}
    for j, node in enumerate(below(result, {}).values()):
        kind, shape = node.get_element_type().get_type_name(), list(node.get_output_shape(0))
        count = int(np.prod(shape))
        if kind in ("i32", "i64") or count <= 1:
            continue
        size += -(-count * BITS[kind] // 8)
        if kind in ("f16", "f32"):
            floats[f"f{j}"] = np.asarray(node.get_data(), np.float32).reshape(shape[0], -1)
        else:
            ints[f"i{j}"] = integers(node, kind, count).reshape(shape[0], -1)
    return size, ints, floats


def integers(node: Any, kind: str, count: int) -> np.ndarray:
    """The integers (or the indices of a 4-bit table) of a constant, from 0."""
    if kind in ("nf4", "f4e2m1"):
        raw = np.frombuffer(np.ascontiguousarray(node.data).tobytes(), np.uint8)
        return np.stack([raw & 15, raw >> 4], -1).ravel()[:count]
    if kind in ("f8e4m3", "f8e8m0"):
        return np.frombuffer(np.ascontiguousarray(node.data).tobytes(), np.uint8)[:count]
    if kind in ("i8", "u8"):
        values = np.asarray(node.get_data()).astype(np.int32)
    else:
        model = ov.Model([op.result(op.convert(node.output(0), np.int32))], [])
        values = np.asarray(next(iter(ov.compile_model(model, "CPU")([]).values())))
    return values + (2 ** (BITS[kind] - 1) if kind[0] == "i" else 0)


def compress(job: Job, config: dict[str, Any]) -> dict[str, Stored]:
    model, names = built(job)
    mode = getattr(nncf.CompressWeightsMode, config["mode"])
    named: dict[str, Any] = {k: config[k] for k in ("ratio", "group_size", "awq", "scale_estimation", "gptq") if k in config}
    if not config["mode"].startswith("INT8"):
        named |= {"all_layers": True, "ratio": config.get("ratio", 1.0)}
        named["advanced_parameters"] = AdvancedCompressionParameters(
            group_size_fallback_mode=GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=16
        )
        if config.get("data"):
            named |= {"dataset": dataset(job, names), "subset_size": SAMPLES}
    made = nncf.compress_weights(model, mode=mode, **named)
    results = {r.get_friendly_name(): r for r in made.get_results()}
    compiled = ov.compile_model(
        made, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": "1"}
    )
    feeds = {
        f"x{i}": np.eye(job.weights[n].shape[1], dtype=np.float32) if n in job.inputs else np.arange(len(job.weights[n]), dtype=np.int32)
        for i, n in enumerate(names)
    }
    out = list(compiled(feeds).values())
    done = {}
    for i, name in enumerate(names):
        size, ints, floats = stored(results[f"r{i}"])
        done[name] = Stored(out[i].T if name in job.inputs else out[i], size, ints, floats)
    return done


if __name__ == "__main__":
    main(compress)
