"""The trained float models of MLPerf Tiny, read from their .tflite and rebuilt in PyTorch.

Their data sets are not here: inputs are smooth random fields (power falling with frequency, as in pictures and spectrograms) over the range that
the int8 twin's input scale tells. The figure is how often the float model's answer is kept, not an accuracy.
"""

from __future__ import annotations

import hashlib
import math
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgesdk.graph.tflite_read import Table
from edgesdk.model import Method, ModelSpec
from peers.subjects import Subject, apart

FOLDER = Path(__file__).parents[3].parent / "shared" / "data" / "models"
NAMES = ("resnet8", "vww", "kws", "ad")
ADD, POOL, CONV, DEPTHWISE, LINEAR, RESHAPE, SOFTMAX = 0, 1, 3, 4, 9, 22, 25


class File:
    """Tensors and operators of the only graph of a .tflite."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        model = Table(self.data, struct.unpack_from("<I", self.data, 0)[0])
        self.graph, self.buffers = model.tables(2)[0], model.tables(4)
        self.codes = [max(c.number(3), c.number(0, "<b")) for c in model.tables(1)]
        self.tensors = self.graph.tables(0)
        self.operators = self.graph.tables(3)
        self.input, self.output = (self.graph.numbers(f)[0] for f in (1, 2))

    def shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(self.tensors[tensor].numbers(0))

    def array(self, tensor: int) -> torch.Tensor:
        """float32; int8 weights (the keyword model's "float" file holds such) as what they stand for."""
        buffer = self.buffers[self.tensors[tensor].number(2, "<I")]
        start, count = buffer._vector(0)
        if self.tensors[tensor].number(1, "<b") == 9:
            held = self.tensors[tensor].table(4)
            scale = torch.from_numpy(np.frombuffer(self.data, "<f4", held._vector(2)[1], held._vector(2)[0]).copy())
            axes = [1] * len(self.shape(tensor))
            axes[held.number(6)] = -1
            return torch.from_numpy(np.frombuffer(self.data, "<i1", count, start).astype(np.float32)).reshape(
                self.shape(tensor)
            ) * scale.reshape(axes)
        return torch.from_numpy(np.frombuffer(self.data, "<f4", count // 4, start).copy()).reshape(self.shape(tensor))

    def input_range(self) -> tuple[float, float]:
        """Of an int8 file: the values that -128 and 127 stand for."""
        held = self.tensors[self.input].table(4)
        scale = struct.unpack_from("<f", self.data, held._vector(2)[0])[0]
        zero = struct.unpack_from("<q", self.data, held._vector(3)[0])[0]
        return (-128 - zero) * scale, (127 - zero) * scale


def padding(size: int, kernel: int, stride: int, same: bool) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) if same else 0
    return total // 2, total - total // 2


class Tiny(nn.Module):
    """float32 [batch, height, width, channels] or [batch, features] → logits (what goes into the softmax) or features."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        file = File(path)
        self.steps: list[Any] = []
        self.layers = nn.ModuleList()
        self.input, self.output = file.input, file.output
        for op in file.operators:
            code, inputs, out = file.codes[op.number(0, "<I")], op.numbers(1), op.numbers(2)[0]
            if code == SOFTMAX:
                self.output = inputs[0]
            elif code in (CONV, DEPTHWISE):
                self._conv(file, op, code, inputs, out)
            elif code == LINEAR:
                weight = file.array(inputs[1])
                layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
                self._add(layer, weight, file.array(inputs[2]), "linear", inputs[0], out, _option(op, 0, "<b"), ())
            elif code == ADD:
                self.steps.append(("add", None, tuple(inputs), out, _option(op, 0, "<b"), ()))
            elif code in (POOL, RESHAPE):
                self.steps.append(("pool" if code == POOL else "flat", None, (inputs[0],), out, 0, ()))
            else:
                raise ValueError(f"{path}: operator {code} is not one of MLPerf Tiny's")

    def _conv(self, file: File, op: Table, code: int, inputs: list[int], out: int) -> None:
        weight, (_, height, width, channels) = file.array(inputs[1]), file.shape(inputs[0])
        weight = weight.permute(0, 3, 1, 2) if code == CONV else weight.permute(3, 0, 1, 2)
        same, stride = _option(op, 0, "<b") == 0, (_option(op, 2), _option(op, 1))
        layer = nn.Conv2d(channels, weight.shape[0], tuple(weight.shape[2:]), stride, groups=channels if code == DEPTHWISE else 1)
        (top, bottom), (left, right) = (padding(n, k, s, same) for n, k, s in zip((height, width), weight.shape[2:], stride, strict=True))
        fused = _option(op, 3 if code == CONV else 4, "<b")
        self._add(layer, weight, file.array(inputs[2]), "conv", inputs[0], out, fused, (left, right, top, bottom))

    def _add(self, layer: nn.Module, weight: Any, bias: Any, kind: str, source: int, out: int, fused: int, pad: tuple[int, ...]) -> None:
        layer.weight, layer.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)
        self.steps.append((kind, len(self.layers), (source,), out, fused, pad))
        self.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = {self.input: x.permute(0, 3, 1, 2) if x.dim() == 4 else x}
        for kind, layer, sources, out, fused, pad in self.steps:
            values = [held[s] for s in sources]
            if kind == "conv":
                y = self.layers[layer](nn.functional.pad(values[0], pad))
            elif kind == "linear":
                y = self.layers[layer](values[0])
            elif kind == "add":
                y = values[0] + values[1]
            else:
                y = values[0].mean((2, 3), keepdim=True) if kind == "pool" else values[0].flatten(1)
            held[out] = torch.relu(y) if fused == 1 else y.clamp(0, 6) if fused == 3 else y
        return held[self.output]


def _option(op: Table, field: int, form: str = "<i") -> int:
    return op.table(4).number(field, form)


def fields(shape: tuple[int, ...], count: int, low: float, high: float, seed: int) -> torch.Tensor:
    """Random fields whose amplitude falls with frequency, each with its own contrast and brightness, within low…high."""
    rng = np.random.default_rng(seed)
    flat = shape if len(shape) == 3 else (1, shape[0], 1)
    fy, fx = (np.fft.fftfreq(n) for n in flat[:2])
    fall = 1 / np.maximum(np.hypot(fy[:, None], fx[None]), 1 / max(flat[:2]))
    spectrum = np.fft.fft2(rng.standard_normal((count, *flat)), axes=(1, 2)) * fall[None, :, :, None]
    x = np.fft.ifft2(spectrum, axes=(1, 2)).real
    x /= x.std((1, 2, 3), keepdims=True)
    x = 0.5 + rng.uniform(-0.15, 0.15, (count, 1, 1, flat[2])) + x * rng.uniform(0.08, 0.25, (count, 1, 1, 1))
    return torch.from_numpy((low + np.clip(x, 0, 1) * (high - low)).astype(np.float32).reshape(count, *shape))


def subject(name: str, cases: int = 500) -> Subject:
    path = FOLDER / f"mlperf_tiny_{name}_float.tflite"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    model, whole = Tiny(path).eval(), File(path)
    low, high = File(path.with_name(path.name.replace("float", "int8"))).input_range()
    make = partial(fields, whole.shape(whole.input)[1:], low=low, high=high)
    sets = {"calibration": make(count=64, seed=1), "held-out": make(count=cases, seed=2)}
    spec = ModelSpec(
        name=f"mlperf-{name}", digest=hashlib.sha256(whole.data).hexdigest(), methods={"forward": Method(model, (sets["calibration"][:1],))},
        calibration=lambda _: [(x[None],) for x in sets["calibration"]],
    )  # fmt: skip
    classes = name != "ad"

    def logits(spec: ModelSpec, which: str) -> Any:
        return torch.cat([spec.methods["forward"].module(x) for x in sets[which].split(100)])

    def score(now: Any, wanted: Any) -> np.ndarray:
        if classes:
            return np.asarray((now.argmax(-1) == wanted.argmax(-1)).double())
        return np.asarray(nn.functional.cosine_similarity(now - wanted.mean(0), wanted - wanted.mean(0)).double())

    metric = "agreement" if classes else "cosine"
    text = f"{cases} synthetic inputs (its data set is not here): the float model's answer kept"
    return Subject(f"mlperf-{name}", spec, metric, text, logits, score, lambda now, wanted, _: apart(now, wanted))
