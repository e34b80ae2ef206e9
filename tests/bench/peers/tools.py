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
EFFECTIVE = (7.5, 5.7, 5.0, 4.3, 3.8, 3.3, 2.8, 2.4, 2.2)
NNCF_WAYS: tuple[dict[str, bool], ...] = ({}, {"data": True, "awq": True, "scale_estimation": True}, {"data": True, "gptq": True})

PEERS = (
    Peer(
        "torchao-rtn", "work_torchao.py", (),
        (
            *({"method": "rtn", "bits": b, "group": g, "quick": g in (0, 32)} for b in (8, 6, 5, 4, 3, 2) for g in (0, 128, 64, 32) if b < 8 or not g),
            *({"method": "rtn", "bits": b, "group": g, "asymmetric": True, "quick": False} for b in (5, 4, 3, 2) for g in (0, 64, 32)),
            *({"method": "hqq", "bits": b, "group": g, "quick": g == 64} for b in (4, 3, 2) for g in (0, 64, 32)),
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
        tuple({"method": "awq", "bits": b, "group": g, "quick": g == 32} for b in (8, 4, 3, 2) for g in (0, 64, 32) if b < 8 or not g),
        "its AWQ observer over IntxWeightOnlyConfig; input scales counted as bfloat16",
    ),
    Peer(
        "nncf", "work_nncf.py", (TORCH, "nncf==3.4.0", "openvino==2026.4.1"),
        (
            {"mode": "INT8_SYM"}, {"mode": "INT8_ASYM", "quick": False},
            *({"mode": f"INT{b}_SYM", "group_size": g, **way, "quick": "gptq" in way} for b in (4, 3, 2) for g in (-1, 64, 32) for way in NNCF_WAYS),
            *({"mode": "INT4_ASYM", "group_size": g, **way, "quick": False} for g in (64, 32) for way in NNCF_WAYS),
            *({"mode": "INT4_SYM", "group_size": 64, "ratio": r, **NNCF_WAYS[2], "quick": False} for r in (0.1, 0.4, 0.6, 0.8, 0.9)),
            *({"mode": f"INT{b}_SYM", "group_size": 64, "ratio": r, **NNCF_WAYS[2], "quick": False} for b in (3, 2) for r in (0.6, 0.75, 0.85, 0.95)),
            *({"mode": m, "group_size": 64, "data": m != "NF4", "quick": False} for m in ("NF4", "CB4", "ADAPTIVE_CODEBOOK")),
        ),
        "OpenVINO backend: int8, int4/3/2 with a ratio of int8 (mixed), AWQ with scale estimation, GPTQ, codebooks",
    ),
    Peer(
        "ai-edge-quantizer", "work_aiedge.py", (),
        (
            {"method": "min_max_uniform_quantize", "bits": 8, "group": 0}, {"method": "GPTQ", "bits": 8, "group": 0, "quick": False},
            *({"method": m, "bits": b, "group": 0, "quick": m in ("GPTQ", "OSCAR")} for m in ("GPTQ", "OSCAR", "OCTAV") for b in (4, 2)),
            {"method": "MSE", "bits": 4, "group": 0, "quick": False},
            *({"method": m, "bits": 4, "group": g, "quick": False} for m in ("min_max_uniform_quantize", "GPTQ", "OSCAR", "OCTAV") for g in (32, 64)),
        ),
        "2, 4 and 8 bits; scales as .tflite stores them",
    ),
    Peer(
        "modelopt", "work_modelopt.py", MODELOPT,
        (
            {"method": "plain", "bits": 8, "group": 0, "algorithm": "max"},
            *({"method": "plain", "bits": b, "group": 0, "algorithm": a, "quick": a == "gptq"} for b in (6, 5, 4, 3, 2) for a in ("gptq", "mse", "awq_full")),
            *({"method": "plain", "bits": b, "group": 32, "algorithm": a, "quick": False} for b in (4, 3, 2) for a in ("gptq", "awq_full")),
        ),
        "weight-only, 2 to 8 bits",
    ),
    Peer(
        "modelopt-auto", "work_modelopt.py", MODELOPT,
        (
            *({"method": "auto", "group": 0, "algorithm": "max", "formats": [8, 6, 4, 3, 2], "effective_bits": b, "quick": b in (4.3, 3.3, 2.8)} for b in EFFECTIVE),
            *({"method": "auto", "group": 32, "algorithm": "awq_lite", "formats": [8, 4, 3, 2], "effective_bits": b, "quick": False} for b in EFFECTIVE[1:]),
        ),
        "auto_quantize: gradients choose the bits of every layer; effective bits leave scales out, so several are tried",
    ),
    Peer(
        "olive", "work_olive.py", (TORCH, "olive-ai==0.13.0", "onnxruntime==1.31.1", "onnx==1.23.2", "requests"),
        tuple(
            {"method": m, "bits": b, "group": g, "symmetric": s, "quick": m == "gptq" and not s}
            for m in ("rtn", "gptq") for b in (8, 4, 2) for g in (0, 128, 64, 32) for s in (False, True) if b < 8 or not g
        ),
        "its WeightQuantizer and its GPTQ pass, layer by layer: 2, 4 and 8 bits",
    ),
)  # fmt: skip
