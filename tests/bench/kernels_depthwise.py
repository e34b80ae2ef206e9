"""Depthwise convolutions of int8 beside XNNPACK's, on layers like MobileNet's.

    python tests/bench/kernels_depthwise.py [--repeats 15] [--json FILE]

XNNPACK's runs in ExecuTorch programs of one and of nine equal layers, static int8, a scale a channel; an eighth of what the longer takes longer is a
layer. Ours and theirs in turn in one process, processor time of one thread, the median of differences and of single calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgesdk.graph import trace
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.depthwise import pack
from edgesdk.kernels.library import bits_of, library
from edgesdk.kernels.tape import Tape
from edgesdk.lower import lower
from edgesdk.model import Method, ModelSpec
from edgesdk.runner import open_program

SHAPES = ((112, 32, 3), (56, 144, 3), (28, 192, 3), (14, 384, 3), (14, 576, 3), (7, 960, 3), (28, 240, 5), (14, 480, 5), (7, 960, 5))
"""Height and width, channels, size of the kernel; stride 1."""


def theirs(folder: Path, side: int, channels: int, size: int, layers: int) -> Any:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels) for _ in range(layers))).eval()
    x = torch.randn(1, channels, side, side)
    spec = ModelSpec(
        name="depthwise", digest=f"{side}-{channels}-{size}-{layers}", methods={"forward": Method(module, (x,))}, calibration=lambda name: [(x,)]
    )  # fmt: skip
    choice = {("forward", u.name): "int8-static" for u in trace(spec).methods[0].units}
    path = folder / f"{side}-{channels}-{size}-{layers}.pte"
    path.write_bytes(lower(spec, "executorch", choice, lambda text: None))
    runner = open_program(str(path), "executorch")
    return lambda: runner.run("forward", [x.numpy()])


def ours(side: int, channels: int, size: int, stride: int = 1) -> Any:
    rng, kernels = np.random.default_rng(0), library(host_targets()[0])
    weights = rng.integers(-127, 128, (size, size, channels)).astype(np.int8)
    x = rng.integers(-128, 128, (1, side, side, channels)).astype(np.int8)
    p = pack(weights, np.full(channels, 1e-3, np.float32), None, 3, stride, kernels.lanes, kernels.shift_of(8))
    tape, rows = Tape(kernels), (side - 1) // stride + 1
    tape.add(
        f"depthwise_{size}_{stride}", rows, x=x, nothing=np.full(channels, 3, np.int8), weights=p.weights, bias=p.bias, scales=p.scales,
        out=np.zeros((1, rows, rows, channels), np.int8), height=side, width=side, channels=channels, rows=rows, columns=rows, top=size // 2, left=size // 2,
        zero=0, low=bits_of(-128.0), high=bits_of(127.0),
    )  # fmt: skip
    return tape.run


def seconds(call: Any, count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def measured(folder: Path, side: int, channels: int, size: int, repeats: int) -> dict[str, Any]:
    one, nine = (theirs(folder, side, channels, size, n) for n in (1, 9))
    mine, half = ours(side, channels, size), ours(side, channels, size, 2)
    count = max(1, int(3e6 / (side * side * channels)))
    found: dict[str, list[float]] = {"xnnpack": [], "edgesdk": [], "edgesdk stride 2": []}
    for turn in range(repeats + 1):
        before = seconds(one, count)
        after = seconds(nine, count)
        mine_s, half_s = seconds(mine, 4 * count), seconds(half, 4 * count)
        if turn:
            found["xnnpack"].append((after - before) / 8)
            found["edgesdk"].append(mine_s)
            found["edgesdk stride 2"].append(half_s)
    medians = {n: statistics.median(s) for n, s in found.items()}
    return {
        "side": side, "channels": channels, "size": size, "us": {n: round(1e6 * s, 1) for n, s in medians.items()},
        "ratio": round(medians["xnnpack"] / medians["edgesdk"], 2), "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side, channels, size in SHAPES:
            rows.append(measured(Path(folder), side, channels, size, given.repeats))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
