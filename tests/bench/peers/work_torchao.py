"""Compresses weights with torchao, in an environment that holds torchao: `python work_torchao.py JOB`. See `job.py`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from job import Job, Stored, bits_bytes, main
from torch import nn
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

SCALE = torch.bfloat16  # what torchao's packed formats keep scales in at best
WIDTHS = (128, 64, 32, 16, 8)


def fitting(cols: int, group: int) -> int:
    """The group torchao can use: `group`, or the next smaller one that divides the row; 0: a whole row."""
    return next((g for g in WIDTHS if g <= group and cols % g == 0 and cols > g), 0) if group else 0


def intx(w: torch.Tensor, config: dict[str, Any]) -> Stored:
    """`quantize_` with `IntxWeightOnlyConfig`: affine round to nearest, or HQQ's scales."""
    from torchao.quantization.quant_api import IntxChooseQParamsAlgorithm

    bits, group = config["bits"], fitting(w.shape[1], config["group"])
    hqq, asymmetric = config["method"] == "hqq", config.get("asymmetric", False)
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = nn.Parameter(w.clone())
    algorithm = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY if hqq else IntxChooseQParamsAlgorithm.AFFINE
    quantize_(
        linear,
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group) if group else PerAxis(0), scale_dtype=SCALE,
            mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC, intx_choose_qparams_algorithm=algorithm,
        ),
    )  # fmt: skip
    held: Any = linear.weight
    scale, zero = held.scale.to(SCALE).float(), held.zero_point
    size = bits_bytes(w.numel(), bits) + 2 * scale.numel() + (zero.numel() if asymmetric else 0)
    ints = {"q": (held.qdata.int() + 2 ** (bits - 1)).numpy()} | ({"zero": (zero.int() + 2 ** (bits - 1)).numpy()} if asymmetric else {})
    return Stored(held.dequantize().float().numpy(), size, ints, {"scale": scale.numpy()})


def _row_quantize_zp(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What torchao calls in the CUDA library `mslk`: asymmetric int4 of [rows, cols] with scales and zeros [groups, rows]."""
    parts = x.float().reshape(x.shape[0], -1, group_size)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-6).to(SCALE).float()
    zero = (low + scale * 8).to(SCALE).float()
    return x, scale.t().contiguous(), zero.t().contiguous()


def _gptq_on_cpu() -> Any:
    """torchao's own `gptq_quantize`, its check for a CUDA device taken out (nothing else in it needs one)."""
    from torchao.prototype.gptq import api

    source = inspect.getsource(api.gptq_quantize)
    for gone in ('assert device.type == "cuda", "GPTQ only supports CUDA currently"', "torch.cuda.synchronize()"):
        if gone not in source:
            raise RuntimeError("this version of torchao has another GPTQ than the one this was written for")
        source = source.replace(gone, "pass")
    source = source.replace("pack_int4(wq_t)", "wq_t")  # the integers as they are, for us to count
    api.int4_row_quantize_zp = _row_quantize_zp
    made: dict[str, Any] = dict(api.__dict__)
    made["Int4Tensor"] = lambda **held: held
    exec(compile(source, "gptq_on_cpu", "exec"), made)
    return made["gptq_quantize"]


def gptq(w: torch.Tensor, x: torch.Tensor | None, config: dict[str, Any]) -> Stored:
    from torchao.prototype.gptq.api import GPTQConfig
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerRow

    if x is None:
        return intx(w, {**config, "method": "rtn", "asymmetric": config["bits"] == 4})
    run = _gptq_on_cpu()
    x = x.double()
    gram = (2 * x.t() @ x / len(x)).float()
    if config["bits"] == 8:
        base: Any = Int8WeightOnlyConfig(granularity=PerRow())
        held = run(gram, w.clone(), GPTQConfig(step="convert", base_config=base))
        size = w.numel() + 2 * held.scale.numel()
        return Stored(
            held.dequantize().float().numpy(), size, {"q": (held.qdata.int() + 128).numpy()}, {"scale": held.scale.float().numpy()}
        )
    group = fitting(w.shape[1], config["group"]) or w.shape[1]
    settings = GPTQConfig(step="convert", base_config=Int8WeightOnlyConfig(granularity=PerRow()))
    settings.base_config = Int4WeightOnlyConfig(group_size=config["group"])
    settings.base_config.group_size = group
    settings.gptq_quantize_block_size = max(group, 256 // group * group)
    held = run(gram, w.clone(), settings)
    q, scale, zero = held["qdata"].int(), held["scale"].t(), held["zero_point"].t()
    wide = [v.repeat_interleave(group, 1)[:, : w.shape[1]] for v in (scale, zero)]
    size = bits_bytes(w.numel(), 4) + 4 * scale.numel()
    return Stored((q * wide[0] + wide[1]).numpy(), size, {"q": (q + 8).numpy()}, {"scale": scale.numpy(), "zero": zero.numpy()})


def awq(w: torch.Tensor, x: torch.Tensor | None, config: dict[str, Any]) -> Stored:
    """torchao's `AWQObserver` picks the input scales (its own search, over its own round to nearest)."""
    from torchao.prototype.awq.core import AWQObserver

    if x is None:
        return intx(w, {**config, "method": "rtn"})
    group = fitting(w.shape[1], config["group"])
    base = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{config['bits']}"), granularity=PerGroup(group) if group else PerAxis(0), scale_dtype=SCALE
    )
    observer = AWQObserver(w.clone(), None, base)
    observer(x, x)
    scale = observer.calculate_qparams().to(SCALE).float()
    inner = intx(w * scale, {**config, "method": "rtn"})
    return Stored(inner.decoded / scale.numpy(), inner.bytes + 2 * scale.numel(), inner.ints, {**inner.floats, "inputs": scale.numpy()})


def compress(job: Job, config: dict[str, Any]) -> dict[str, Stored]:
    done = {}
    for name, matrix in job.weights.items():
        w, x = torch.from_numpy(matrix), job.positions(name)
        inputs = None if x is None else torch.from_numpy(x)
        with torch.no_grad():
            if config["method"] in ("rtn", "hqq"):
                done[name] = intx(w, config)
            else:
                done[name] = (gptq if config["method"] == "gptq" else awq)(w, inputs, config)
    return done


if __name__ == "__main__":
    main(compress)
