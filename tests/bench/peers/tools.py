"""The peers and the settings of theirs that are tried. Each is given every setting that may be its best at some budget."""

from __future__ import annotations

from peers.points import Peer

TORCH = "torch==2.13.0"

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
)  # fmt: skip
