"""Compresses weights with NVIDIA Model Optimizer: `python work_modelopt.py JOB`. See `job.py`.

The real model is quantized here (`auto_quantize` takes gradients of a loss), weight-only.
Embeddings, which Model Optimizer leaves alone, are rounded by its own quantizer in the format chosen most.
"""

# ruff: noqa: E402 (the checkout goes into the path before its own modules are imported)
from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import Job, Stored, bits_bytes, main

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]

import edgesdk

edgesdk.__path__.append(str(ROOT))  # the folder of edgesdk.examples

import modelopt.torch.quantization as mtq
from modelopt.torch.quantization.nn import TensorQuantizer

from edgesdk.compress.weights import holders
from peers.subjects import SUBJECTS, Subject


def form(bits: int, group: int, algorithm: str) -> dict[str, Any]:
    held: dict[str, Any] = {"num_bits": bits, **({"block_sizes": {-1: group}} if group else {"axis": 0})}
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": held, "enable": True},
        {"quantizer_name": "*input_quantizer", "enable": False},
    ]
    return {"quant_cfg": rules, "algorithm": algorithm}


class Whole(torch.nn.Module):
    """All methods of a subject; called, it gives the outputs over the calibration cases."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList(m.module for m in subject.spec.methods.values())
        self.subject = [subject]

    def forward(self, _: Any) -> Any:
        return self.subject[0].logits(self.subject[0].spec, "calibration")


def loss_of(subject: Subject) -> Any:
    """A random projection of the outputs: its squared gradients are, in expectation, those that tell how far the outputs move. (The cross entropy
    against the float model's own, sure answers has next to none: its search then takes every layer for free.)"""
    wanted = subject.reference("calibration")
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    return lambda out, _: (out * direction).sum()


def read(module: Any) -> Stored:
    """What a converted module computes with, and what of it is stored: integers, float16 scales of channels or blocks, input scales."""
    weight, quantizer = module._parameters["weight"].detach(), module.weight_quantizer
    with torch.no_grad():
        w = quantizer(weight) if quantizer.is_enabled else weight.half().float()
    matrix = w.reshape(w.shape[0], -1)
    if not quantizer.is_enabled:
        return Stored(matrix.numpy(), 2 * w.numel(), {}, {"values": matrix.numpy()})
    scale = quantizer.amax.float().reshape(-1) / (2 ** (quantizer.num_bits - 1) - 1)
    size = bits_bytes(w.numel(), quantizer.num_bits) + 2 * scale.numel()
    width = -(-w.numel() // scale.numel())
    flat = torch.round(matrix.reshape(-1) / scale.repeat_interleave(width)[: w.numel()].clamp_min(1e-12))
    floats = {"scale": scale.reshape(w.shape[0] if scale.numel() % w.shape[0] == 0 else 1, -1).numpy()}
    ints = {"q": (flat.reshape(matrix.shape).int() + 2 ** (quantizer.num_bits - 1)).clamp(0, 2**quantizer.num_bits - 1).numpy()}
    inputs = getattr(module.input_quantizer, "pre_quant_scale", None)
    if inputs is not None:
        matrix = matrix * inputs.float().reshape(1, -1)
        size += 2 * inputs.numel()
        floats["inputs"] = inputs.float().reshape(1, -1).numpy()
    return Stored(matrix.numpy(), size, ints, floats)


def embedded(matrix: np.ndarray, bits: int, group: int) -> Stored:
    """A table rounded by Model Optimizer's own quantizer, symmetric, in blocks or rows."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig

    group = group if group and matrix.shape[1] % group == 0 else 0
    held: dict[str, Any] = {"block_sizes": {-1: group}} if group else {"axis": 0}
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=bits, **held))
    decoded = quantizer(torch.from_numpy(matrix)).numpy()
    scale = np.abs(decoded).reshape(-1, group or matrix.shape[1]).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    q = np.round(decoded.reshape(-1, group or matrix.shape[1]) / np.maximum(scale, 1e-12)).reshape(matrix.shape) + 2 ** (bits - 1)
    return Stored(decoded, bits_bytes(matrix.size, bits) + 2 * scale.size, {"q": q.astype(np.int32)}, {"scale": scale})


def compress(job: Job, config: dict[str, Any]) -> dict[str, Stored]:
    torch.manual_seed(0)
    subject = SUBJECTS[job.model]()
    modules = {name: uses[0][2] for name, uses in holders(subject.spec).items()}
    loss, whole, group = loss_of(subject), Whole(subject), config["group"]

    def forward(model: Any, batch: Any) -> Any:
        return model(batch)

    if config["method"] == "auto":
        formats = [form(b, group, config["algorithm"]) for b in config["formats"]]
        kept = {"effective_bits": config["effective_bits"]}
        mtq.auto_quantize(
            whole, constraints=kept, quantization_formats=formats, data_loader=[torch.zeros(1)], forward_step=forward, loss_func=loss,
            num_calib_steps=1, num_score_steps=1, verbose=False,
        )  # fmt: skip
    else:
        mtq.quantize(whole, form(config["bits"], group, config["algorithm"]), lambda model: model(None))
    done = {n: read(m) for n, m in modules.items() if hasattr(m, "weight_quantizer")}
    used = Counter(
        m.weight_quantizer.num_bits for m in modules.values() if hasattr(m, "weight_quantizer") and m.weight_quantizer.is_enabled
    )
    bits = used.most_common(1)[0][0] if used else 8
    return {n: done[n] if n in done else embedded(job.weights[n], bits, group) for n in job.weights}


if __name__ == "__main__":
    main(compress)
