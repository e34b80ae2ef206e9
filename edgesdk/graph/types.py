"""ModelGraph: units with weights, MACs and bytes, per method. Plain data; no framework is imported here."""

from __future__ import annotations

from typing import ClassVar, Literal

from edgesdk.noun import Noun, Part

Op = Literal[
    "linear", "conv2d", "depthwise_conv2d", "conv1d", "embedding", "matmul", "attention", "norm", "softmax", "activation",
    "elementwise", "pool", "reshape", "recurrent", "quantize", "other",
]  # fmt: skip


class TensorInfo(Part):
    name: str
    shape: tuple[int, ...]
    dtype: str  # numpy's name: "float32", "int64", "int8"

    @property
    def elements(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


class Unit(Part):
    """One operator with its weights, as one method calls it.

    `name` is the module's qualified name (or the tflite operator's `op3_conv2d`); `weight` names the parameter, so that units of several
    methods that share it are stored once. MACs are per call. `rows` × `cols` is the weight as a matrix:
    output channels × reduction length (what per-channel and group scales count).
    """

    name: str
    op: Op
    weight: str | None = None
    weight_shape: tuple[int, ...] = ()
    weight_dtype: str = "float32"  # as it comes: "int8" in a quantized flatbuffer
    rows: int = 0
    cols: int = 0
    bias_elements: int = 0
    macs: int = 0
    in_elements: int = 0  # activations read
    out_elements: int = 0  # activations written
    act_bytes: int = 4  # bytes an activation element as it comes
    detail: dict[str, int | float | str] = {}  # kernel size, stride, groups, heads …

    @property
    def weight_elements(self) -> int:
        return self.rows * self.cols


class MethodGraph(Part):
    name: str
    units: tuple[Unit, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    peak_activation_bytes: int  # liveness over intermediate tensors, as they come, inputs and outputs not counted
    cache_inputs: tuple[str, ...] = ()  # inputs that are KV caches
    cross_cache_inputs: tuple[str, ...] = ()  # inputs that are cross-attention KV
    unroll: float = 1  # calls in one answer, on average

    @property
    def macs(self) -> int:
        return sum(u.macs for u in self.units)


class ModelGraph(Noun):
    KIND: ClassVar[str] = "model-graph"

    name: str
    source: Literal["torch", "tflite"]
    model_digest: str
    layout: str
    methods: tuple[MethodGraph, ...]
    not_counted: tuple[str, ...] = ()  # what the numbers leave out, in words

    @property
    def cache_bits(self) -> int:
        """What the caches among the inputs are held in."""
        held = {t.dtype for m in self.methods for t in m.inputs if t.name in (*m.cache_inputs, *m.cross_cache_inputs)}
        return 4 if "uint8" in held else 8 if "int8" in held else 16 if "float16" in held else 32

    def method(self, name: str) -> MethodGraph:
        return next(m for m in self.methods if m.name == name)

    def weights(self) -> dict[str, Unit]:
        """Each stored weight once: parameter name → a unit that uses it."""
        return {u.weight: u for m in self.methods for u in m.units if u.weight}
