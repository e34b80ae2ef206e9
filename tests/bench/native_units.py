"""Linear layers of ExecuTorch programs, on XNNPACK and on our kernels: predicted beside measured, by turns in one process.

    python -m tests.bench.native_units [rounds]

Times of the processor, one thread; a prediction needs `edgesdk calibrate --runtime executorch` before. Programs are lowered once and kept.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgesdk.devices import load_device
from edgesdk.graph import trace
from edgesdk.kernels.cpu import host_targets
from edgesdk.lower import lower
from edgesdk.lower.native_units import any_native, library_of
from edgesdk.model import Method, ModelSpec
from edgesdk.plan.cost import method_seconds
from edgesdk.plan.rates import efficiency_for
from edgesdk.runner import OPERATORS, open_program

PRECISIONS = ("fp32", "int8-dynamic", "native-int8", "int4-g32", "native-int4-g32", "native-int2-g32")


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, wide: int) -> None:
        super().__init__()
        self.n1, self.n2, self.heads = nn.LayerNorm(dim), nn.LayerNorm(dim), heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, wide), nn.Linear(wide, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        y = self.n1(x)
        q, k, v = (m(y).view(b, n, self.heads, d // self.heads).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = (q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5).softmax(-1) @ v
        x = x + self.o(a.transpose(1, 2).reshape(b, n, d))
        return x + self.down(nn.functional.gelu(self.up(self.n2(x))))


def models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.GELU(), nn.Linear(1024, 1000))
    small = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64))
    transformer = nn.Sequential(*[Block(512, 8, 2048) for _ in range(2)], nn.LayerNorm(512), nn.Linear(512, 256))
    return {
        "MLP 1024-4096-1024-1000, 1 row": (mlp, torch.randn(1, 1024)), "MLP 256-512-256-64 with ReLU, 1 row": (small, torch.randn(1, 256)),
        "transformer 512, 2 layers, 32 tokens": (transformer, torch.randn(1, 32, 512)),
        "transformer 512, 2 layers, 1 token": (transformer, torch.randn(1, 1, 512)),
    }  # fmt: skip


def spec_of(name: str, module: nn.Module, x: torch.Tensor) -> ModelSpec:
    return ModelSpec(
        name=name,
        digest=hashlib.sha256(f"bench-units-{name}".encode()).hexdigest(),
        methods={"forward": Method(module.eval().requires_grad_(False), (x,))},
    )


def main(rounds: int = 5) -> None:
    device = load_device("host")
    compute = device.unit(next(r.unit for r in device.runtimes if r.name == "executorch"))
    efficiency = efficiency_for(device, compute, "executorch", 1)
    torch.set_num_threads(1)
    say(f"load {os.getloadavg()[0]:.1f}; {efficiency.origin}; {host_targets()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (module, x) in models().items():
            spec = spec_of(name, module, x)
            method = trace(spec).method("forward")
            opened: dict[str, tuple[Any, float]] = {}
            for precision in PRECISIONS:
                choice = {("forward", u.name): precision for u in method.units if u.op == "linear" and precision != "fp32"}
                path = Path(folder, f"{len(opened)}-{abs(hash(name))}", "model.pte")
                path.parent.mkdir()
                path.write_bytes(content := lower(spec, "executorch", choice))
                if any_native(choice.values()):
                    path.with_name(OPERATORS).write_bytes(library_of(content, host_targets()[0]))
                predicted = method_seconds(method, lambda u, c=choice: c.get(("forward", u.name), "fp32"), device, "executorch", efficiency)  # type: ignore[misc]
                opened[precision] = open_program(str(path), "executorch", 1), predicted
            show(name, opened, [x.numpy()], rounds)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def show(name: str, opened: dict[str, tuple[Any, float]], inputs: list[Any], rounds: int) -> None:
    """Medians of rounds by turns; the spread is that of the rounds."""
    times: dict[str, list[float]] = {p: [] for p in opened}
    for _ in range(rounds):
        for precision, (runner, _) in opened.items():
            calls, end = [], time.perf_counter() + 0.15
            for _ in range(3):
                runner.run("forward", inputs)
            while len(calls) < 25 or time.perf_counter() < end:
                start = time.process_time()
                runner.run("forward", inputs)
                calls.append(time.process_time() - start)
            times[precision].append(sorted(calls)[len(calls) // 2])
    say(f"\n{name}\n| every linear layer | measured | spread | predicted |\n|---|---|---|---|")
    for precision, (_, predicted) in opened.items():
        found = sorted(times[precision])
        spread = (found[-1] - found[0]) / found[len(found) // 2]
        say(f"| {precision} | {found[len(found) // 2] * 1e6:.0f} µs | {spread:.0%} | {predicted * 1e6:.0f} µs |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
