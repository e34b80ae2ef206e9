"""What a peer's worker gets and gives back. Runs in the peer's own environment: numpy only.

A job is a folder: `job.json` ({"configs": [...], "ops": {weight: operator}}), `weights.npz` (weight → float32 [rows, cols]), `inputs.npz`
(weight → float32 [groups, positions, cols], from the calibration data; embeddings have none). For configuration i the worker writes `i.npz`
("decoded|weight", "ints|weight|name", "floats|weight|name") and `i.json` ({"bytes": {weight: n}, "notes": [...]} or {"error": text}).
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Stored:
    """A compressed weight: what it decodes to, the bytes that the tool stores, and of what integers and floats they are made."""

    decoded: np.ndarray
    bytes: int
    ints: dict[str, np.ndarray] = field(default_factory=dict)
    floats: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Job:
    folder: Path
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    ops: dict[str, str]
    model: str = ""
    notes: list[str] = field(default_factory=list)

    def positions(self, name: str) -> np.ndarray | None:
        """[positions, cols] of all groups, or None."""
        x = self.inputs.get(name)
        return None if x is None else x.reshape(-1, x.shape[-1])


def bits_bytes(count: int, bits: float) -> int:
    return -(-int(count * bits) // 8)


def half(matrix: np.ndarray) -> Stored:
    """A weight that a tool leaves alone: counted as float16."""
    return Stored(matrix.astype(np.float16).astype(np.float32), 2 * matrix.size, {}, {"values": matrix})


def main(compress: Callable[[Job, dict[str, Any]], dict[str, Stored]]) -> None:
    folder = Path(sys.argv[1])
    told = json.loads((folder / "job.json").read_text())
    arrays = [dict(np.load(folder / f"{n}.npz")) for n in ("weights", "inputs")]
    for i, config in enumerate(told["configs"]):
        job = Job(folder, arrays[0], arrays[1], told["ops"], told.get("model", ""))
        start = time.monotonic()
        try:
            done = compress(job, config)
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:200]
            (folder / f"{i}.json").write_text(json.dumps({"error": f"{type(error).__name__}: {text}"}))
            continue
        out: dict[str, np.ndarray] = {}
        for name, s in done.items():
            out[f"decoded|{name}"] = np.asarray(s.decoded, np.float32).reshape(arrays[0][name].shape)
            out |= {f"ints|{name}|{k}": np.asarray(v) for k, v in s.ints.items()}
            out |= {f"floats|{name}|{k}": np.asarray(v, np.float32) for k, v in s.floats.items()}
        np.savez(folder / f"{i}.npz", **out)
        found = {"bytes": {n: int(s.bytes) for n, s in done.items()}, "notes": job.notes, "seconds": time.monotonic() - start}
        (folder / f"{i}.json").write_text(json.dumps(found))
