"""Compresses weights with Olive: `python work_olive.py JOB`. See `job.py`.

Olive's passes take Hugging Face models from disk; what they do to a linear layer (`WeightQuantizer`, the GPTQ pass's `accumulate_hessian` and
`process_module`) is called directly here, on every weight. 2, 4 and 8 bits are what it has.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from job import Job, Stored, bits_bytes, main
from olive.common.quant.utils import WeightQuantizer
from olive.passes.pytorch.gptq import Gptq

WIDTHS = (128, 64, 32, 16)


def one(w: torch.Tensor, x: torch.Tensor | None, config: dict[str, Any]) -> Stored:
    rows, cols = w.shape
    group = next((g for g in WIDTHS if g <= config["group"] and cols % g == 0 and cols > g), -1) if config["group"] else -1
    bits, symmetric = config["bits"], config.get("symmetric", False)
    quantizer = WeightQuantizer(bits=bits, symmetric=symmetric, group_size=group)
    if config["method"] == "gptq" and x is not None:
        linear: Any = torch.nn.Linear(cols, rows, bias=False)
        linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
        linear.quant_info = SimpleNamespace(quantizer=quantizer, data=None, scales=None, zero_points=None)
        Gptq.accumulate_hessian(linear, (x[None],), None)
        Gptq.process_module(linear, actorder=None)
        scale, zero, decoded = linear.quant_info.scales, linear.quant_info.zero_points, linear.weight.data
    else:
        scale, zero = (t.reshape(rows, -1) for t in quantizer.find_qparams(w))
        q = quantizer.quantize(w, scale, zero)
        decoded = quantizer.dequantize(q, scale, zero)
    wide = [t.repeat_interleave(cols // t.shape[1], 1) for t in (scale, zero)]
    q = torch.round(decoded / wide[0] + wide[1]).clamp(0, 2**bits - 1).int()
    scale = scale.half().float()  # float16 scales, zero points of the weights' bits, as its QuantLinear keeps them
    decoded = (q - wide[1]) * scale.repeat_interleave(cols // scale.shape[1], 1)
    size = bits_bytes(w.numel(), bits) + 2 * scale.numel() + (0 if symmetric else bits_bytes(zero.numel(), bits))
    ints = {"q": q.numpy()} | ({} if symmetric else {"zero": zero.int().numpy()})
    return Stored(decoded.numpy(), size, ints, {"scale": scale.numpy()})


@torch.no_grad()
def compress(job: Job, config: dict[str, Any]) -> dict[str, Stored]:
    done = {}
    for name, matrix in job.weights.items():
        x = job.positions(name)
        done[name] = one(torch.from_numpy(matrix), None if x is None else torch.from_numpy(x), config)
    return done


if __name__ == "__main__":
    main(compress)
