"""The peers and the settings of theirs that are tried. Each is given every setting that may be its best at some budget."""

from __future__ import annotations

from peers.points import Peer

TORCH = "torch==2.13.0"  # the CPU build: see constraints.txt
MODELOPT = (
    TORCH,
    "nvidia-modelopt==0.47.0",
    "requests",
    "huggingface_hub",
    "transformers==5.23.0",
    "pydantic==2.11.10",
    "scipy",
    "psutil",
    "flatbuffers",
)
EFFECTIVE = (7.0, 4.3, 3.7, 3.3, 2.8, 2.4)
AWQ: dict[str, bool] = {"data": True, "awq": True, "scale_estimation": True}
GPTQ: dict[str, bool] = {"data": True, "gptq": True}

PEERS = (
    Peer(
        "torchao-rtn", "work_torchao.py", (),
        (
            *({"method": "rtn", "bits": b, "group": g, "quick": g in (0, 32)} for b in (8, 6, 5, 4, 3, 2) for g in (0, 64, 32) if b < 6 or not g),
            *({"method": "rtn", "bits": b, "group": 32, "asymmetric": True, "quick": False} for b in (4, 3, 2)),
            *({"method": "hqq", "bits": b, "group": g, "quick": g == 64} for b in (4, 3, 2) for g in (64, 32)),
        ),
        "IntxWeightOnlyConfig, affine and HQQ scales, 2 to 8 bits",
    ),
    Peer(
        "torchao-gptq", "work_torchao.py", (),
        ({"method": "gptq", "bits": 8, "group": 0}, *({"method": "gptq", "bits": 4, "group": g} for g in (128, 64, 32))),
        "its GPTQ asks for CUDA; that check is taken out here and the int4 ranges computed as its CUDA library does. 4 and 8 bits only",
    ),
    Peer(
        "torchao-awq", "work_torchao.py", (),
        tuple({"method": "awq", "bits": b, "group": g, "quick": g == 32} for b in (8, 4, 3, 2) for g in (0, 32) if b < 8 or not g),
        "its AWQ observer over IntxWeightOnlyConfig; input scales counted as bfloat16",
    ),
    Peer(
        "nncf", "work_nncf.py", (TORCH, "nncf==3.4.0", "openvino==2026.4.1"),
        (
            {"mode": "INT8_SYM"},
            *({"mode": f"INT{b}_SYM", "group_size": g, **GPTQ} for b in (4, 3, 2) for g in (-1, 64, 32)),
            *({"mode": f"INT{b}_SYM", "group_size": 64, **way, "quick": False} for b in (4, 3, 2) for way in ({}, AWQ)),
            *({"mode": "INT4_SYM", "group_size": 64, "ratio": r, **GPTQ, "quick": False} for r in (0.4, 0.7, 0.9)),
            *({"mode": f"INT{b}_SYM", "group_size": 64, "ratio": r, **GPTQ, "quick": False} for b in (3, 2) for r in (0.7, 0.85, 0.95)),
            {"mode": "NF4", "group_size": 64, "quick": False},
        ),
        "OpenVINO backend: int8, int4/3/2 with a ratio of int8 (mixed), AWQ with scale estimation, GPTQ, NF4",
    ),
    Peer(
        "ai-edge-quantizer", "work_aiedge.py", (),
        (
            {"method": "min_max_uniform_quantize", "bits": 8, "group": 0},
            *({"method": m, "bits": b, "group": 0, "quick": m != "OCTAV"} for m in ("GPTQ", "OSCAR", "OCTAV") for b in (4, 2)),
            *({"method": m, "bits": 4, "group": g, "quick": False} for m in ("GPTQ", "OSCAR") for g in (32, 64)),
        ),
        "2, 4 and 8 bits; scales as .tflite stores them",
    ),
    Peer(
        "modelopt", "work_modelopt.py", MODELOPT,
        (
            {"method": "plain", "bits": 8, "group": 0, "algorithm": "max"},
            *({"method": "plain", "bits": b, "group": 0, "algorithm": a, "quick": a == "gptq" and b < 5}
              for b in (6, 5, 4, 3, 2) for a in ("gptq", "mse", "awq_full") if a == "gptq" or 5 > b > 2),
            *({"method": "plain", "bits": b, "group": 32, "algorithm": "gptq", "quick": False} for b in (4, 3, 2)),
        ),
        "weight-only, 2 to 8 bits",
    ),
    Peer(
        "modelopt-auto", "work_modelopt.py", MODELOPT,
        (
            *({"method": "auto", "group": 0, "algorithm": "max", "formats": [8, 6, 4, 3, 2], "effective_bits": b, "quick": b in (4.3, 3.3, 2.8)} for b in EFFECTIVE),
            *({"method": "auto", "group": 32, "algorithm": "awq_lite", "formats": [8, 4, 3, 2], "effective_bits": b, "quick": False} for b in (4.0, 2.8)),
        ),
        "auto_quantize: gradients choose the bits of every layer; effective bits leave scales out, so several are tried",
    ),
    Peer(
        "olive", "work_olive.py", (TORCH, "olive-ai==0.13.0", "onnxruntime==1.31.1", "onnx==1.23.2", "requests"),
        (
            {"method": "gptq", "bits": 8, "group": 0, "symmetric": True},
            *({"method": "gptq", "bits": b, "group": g, "symmetric": s, "quick": not s} for b in (4, 2) for g in (0, 64, 32) for s in (False, True)),
            *({"method": "rtn", "bits": b, "group": 32, "symmetric": False, "quick": False} for b in (4, 2)),
        ),
        "its WeightQuantizer and its GPTQ pass, layer by layer: 2, 4 and 8 bits",
    ),
)  # fmt: skip
