"""Of a `.tflite`: the inputs and outputs of a method in the graph's own order, which is what `benchmark_model` reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgesdk.errors import DeviceError, MissingTool
from edgesdk.runner import method_of, name_order

DTYPES = {
    "FLOAT32": "<f4", "FLOAT16": "<f2", "FLOAT64": "<f8", "INT8": "<i1", "UINT8": "<u1", "INT16": "<i2", "UINT16": "<u2", "INT32": "<i4",
    "UINT32": "<u4", "INT64": "<i8", "UINT64": "<u8", "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """One method: `inputs` and `outputs` as `runner.LiteRtRunner` has them, `feed` and `give` say where each is in the graph's order."""

    name: str  # the signature's; "" where the program has none
    methods: int
    inputs: tuple[dict[str, Any], ...]  # "dtype", "shape", "quantization", by the caller's order
    outputs: tuple[dict[str, Any], ...]
    feed: tuple[int, ...]  # graph's position → caller's
    give: tuple[int, ...]

    def raw_inputs(self, arrays: Sequence[Any]) -> list[tuple[bytes, tuple[int, ...]]]:
        """The bytes and the shape of each of the graph's inputs."""
        from edgesdk.runner import quantize

        return [(quantize(arrays[i], self.inputs[i]).tobytes(), tuple(self.inputs[i]["shape"])) for i in self.feed]

    def arrays(self, content: bytes) -> list[Any]:
        """The outputs, in the caller's order, out of the graph's, one behind the other. Raises `DeviceError` if there are more or fewer bytes."""
        import numpy as np

        from edgesdk.runner import dequantize

        found: dict[int, Any] = {}
        at = 0
        for position in self.give:
            detail = self.outputs[position]
            count = int(np.prod(detail["shape"], dtype=np.int64))
            end = at + count * np.dtype(detail["dtype"]).itemsize
            if end > len(content):
                break
            found[position] = dequantize(np.frombuffer(content[at:end], detail["dtype"]).reshape(detail["shape"]), detail)
            at = end
        if len(found) < len(self.give) or at != len(content):
            raise DeviceError(
                f"the runner wrote {len(content)} bytes of outputs, not what the program's outputs take", "its outputs cannot be checked"
            )
        return [found[i] for i in range(len(found))]


def signature(content: bytes, method: str) -> Signature:
    """`method` of the program `content`. Raises `DeviceError` if it has none of that name, `MissingTool` without LiteRT's package here."""
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError:
        raise MissingTool(
            "LiteRT is not installed here: it tells the order of the program's inputs", "pip install ai-edge-litert"
        ) from None
    model = schema.Model.GetRootAs(content)
    count = model.SignatureDefsLength()
    if not count:
        graph = model.Subgraphs(0)
        inputs, outputs = _indices(graph, "Inputs"), _indices(graph, "Outputs")
        return _made("", 0, schema, graph, inputs, outputs, inputs, outputs)
    for i in range(count):
        found = model.SignatureDefs(i)
        name = found.SignatureKey().decode()
        if method_of(name, count) == method:
            graph = model.Subgraphs(found.SubgraphIndex())
            ins = _named(found.Inputs, found.InputsLength())
            outs = _named(found.Outputs, found.OutputsLength())
            return _made(name, count, schema, graph, ins, outs, _indices(graph, "Inputs"), _indices(graph, "Outputs"))
    raise DeviceError(f"the program has no method '{method}'", "build the bundle again")


def _indices(graph: Any, what: str) -> list[int]:
    return [getattr(graph, what)(i) for i in range(getattr(graph, f"{what}Length")())]


def _named(get: Any, count: int) -> list[int]:
    """Tensor indices in the order of their names, as the runner has them."""
    pairs = [(get(i).Name().decode(), get(i).TensorIndex()) for i in range(count)]
    return [index for _, index in sorted(pairs, key=lambda p: name_order(p[0]))]


def _made(name: str, methods: int, schema: Any, graph: Any, ins: list[int], outs: list[int], fed: list[int], given: list[int]) -> Signature:
    return Signature(
        name,
        methods,
        tuple(_detail(schema, graph.Tensors(i)) for i in ins),
        tuple(_detail(schema, graph.Tensors(i)) for i in outs),
        tuple(ins.index(i) for i in fed),
        tuple(outs.index(i) for i in given),
    )


def _detail(schema: Any, tensor: Any) -> dict[str, Any]:
    names = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    dtype = DTYPES.get(names.get(tensor.Type(), ""))
    if dtype is None:
        raise DeviceError(
            f"tensor {tensor.Name().decode()} holds {names.get(tensor.Type(), 'unknown')} values", "such outputs cannot be checked"
        )
    scales = tensor.Quantization()
    single = scales is not None and scales.ScaleLength() == 1
    quantization = (float(scales.Scale(0)), int(scales.ZeroPoint(0))) if single else (0.0, 0)
    return {"dtype": dtype, "shape": tuple(tensor.Shape(i) for i in range(tensor.ShapeLength())), "quantization": quantization}
