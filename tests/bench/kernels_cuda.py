"""CUDA kernels on the GPU found: bytes a second as a share of a measured copy, against cuBLAS and torch's int4, and a decode loop with and without graphs.

    python -m tests.bench.kernels_cuda --out FOLDER [--repeats 5] [--no-torch]

Every layer is checked against float64 before it is timed. Weights are copied until they are several times what the GPU's caches hold, and each copy
is used once in turn, as in a model. Times are the GPU's own, of a graph of all copies, several repeats; raw ones are kept in FOLDER/kernels_cuda.json.
torch is compared where it is installed and sees the GPU: F.linear in float16, and _weight_int4pack_mm in bfloat16 (groups of 128).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesdk.errors import CheckFailed, EdgeError
from edgesdk.kernels.cuda.attention import new_cache
from edgesdk.kernels.cuda.compile import version
from edgesdk.kernels.cuda.decode import Layer, decode_step
from edgesdk.kernels.cuda.launch import Gpu
from edgesdk.kernels.cuda.linear import Linear
from edgesdk.packed import Code, decode
from tests.bench.native_330m import configs
from tests.bench.native_cuda import program_loop
from tests.bench.native_cuda import table as programs_table

TOKENS = (1, 8, 64, 512)
SHAPES = ((4096, 4096), (12288, 4096), (4096, 12288))
"""Rows (outputs) and columns (inputs)."""
FORMS = {"int4 g32": (4, 32), "int4 g128": (4, 128), "int8": (8, 0), "3 bits g64": (3, 64), "2 bits g64": (2, 64), "codebook g64": (0, 64)}
COPIED = 1 << 29
"""Bytes of weights that are in turn; no GPU so far caches a quarter of it."""


@dataclass(frozen=True)
class Sizes:
    """A decoder-only model of 320M weights."""

    layers: int = 24
    dim: int = 1024
    heads: int = 16
    kv_heads: int = 4
    head: int = 64
    feed: int = 3072
    words: int = 32000
    positions: int = 1024


def weights(seed: int, rows: int, cols: int, bits: int, group: int) -> Code:
    """Random codes; `bits` 0 is a codebook of 16 values."""
    rng = np.random.default_rng(seed)
    scale = (rng.random((rows, 1 if group == 0 else -(-cols // group))) + 0.5).astype(np.float32) / np.float32(cols**0.5 * 2 ** (bits or 1))
    q = rng.integers(0, 1 << (bits or 4), (rows, cols)).astype(np.uint8)
    if bits == 0:
        return Code("table", (rows, cols), (4, group), (q, rng.standard_normal((1, 16)).astype(np.float32), scale))
    return Code("grid", (rows, cols), (bits, group), (q, scale, np.zeros(0, np.uint8)))


def timed(gpu: Gpu, work: Callable[[], None], repeats: int) -> list[float]:
    work()
    gpu.wait()
    return [gpu.seconds(work) for _ in range(repeats)]


def copy_rate(gpu: Gpu, repeats: int, size: int = COPIED) -> dict[str, Any]:
    """Bytes read and written a second by the driver's own copy."""
    source, to = gpu.put(np.ones(size // 4, np.float32)), gpu.empty((size // 4,), np.float32)
    seconds = timed(gpu, lambda: gpu.copy(to, source), repeats)
    return {"bytes": 2 * size, "seconds": seconds, "bytes_per_s": 2 * size / statistics.median(seconds)}


def cloned(gpu: Gpu, layer: Linear) -> Linear:
    """The same weights at another address."""
    other = copy.copy(layer)
    other.memory = {}
    for name, memory in layer.memory.items():
        other.memory[name] = None
        if memory is not None:
            other.memory[name] = gpu.empty(memory.shape, memory.dtype)
            gpu.copy(other.memory[name], memory)
    return other


def checked(layer: Linear, gpu: Gpu, code: Code, tokens: int) -> float:
    """The largest error of a product, of its largest output. Raises `CheckFailed`."""
    x = np.random.default_rng(tokens).standard_normal((tokens, code.shape[1])).astype(np.float16)
    out = gpu.put(np.full((tokens, code.shape[0]), np.nan, np.float16))
    gpu.run([layer.launch(gpu.put(x), out)])
    wanted = x.astype(np.float64) @ decode(code).astype(np.float64).T
    far = float(np.abs(gpu.get(out) - wanted).max() / np.abs(wanted).max())
    if not far < 4e-3:
        raise CheckFailed(
            f"{code.shape} at {tokens} tokens is off by {far:.2g} of its largest output", "run  pytest -m gpu tests/test_kernels_cuda*.py"
        )
    return far


def product(gpu: Gpu, code: Code, tokens: Sequence[int], repeats: int, copied: int = COPIED) -> list[dict[str, Any]]:
    """Seconds of one product at each number of tokens."""
    layer = Linear(gpu, code)
    found = []
    layers = [layer, *(cloned(gpu, layer) for _ in range(copied // layer.weights.nbytes))]
    for m in tokens:
        far = checked(layer, gpu, code, m)
        x, out = gpu.put(np.ones((m, code.shape[1]), np.float16)), gpu.empty((m, code.shape[0]), np.float16)
        work = gpu.graph([one.launch(x, out) for one in layers])
        seconds = [s / len(layers) for s in timed(gpu, work, repeats)]
        read = layer.weights.nbytes + x.nbytes + out.nbytes
        found.append({"tokens": m, "error": far, "seconds": seconds, "bytes_per_s": read / statistics.median(seconds)})
    return found


def torch_times(shape: tuple[int, int], tokens: Sequence[int], repeats: int) -> dict[str, Any]:
    """Seconds of float16 and of torch's int4, or why there are none."""
    try:
        import torch

        if not torch.cuda.is_available():
            return {"missing": "torch sees no GPU"}
    except ImportError:
        return {"missing": "no torch"}
    found: dict[str, Any] = {"torch": torch.__version__}
    for name, make in (("float16", _torch_half), ("int4 g128", _torch_int4)):
        try:
            found[name] = {m: _torch_seconds(torch, make(torch, shape), m, shape, repeats) for m in tokens}
        except RuntimeError as error:
            found[name] = {"missing": str(error).splitlines()[0]}
    return found


def _torch_half(torch: Any, shape: tuple[int, int]) -> tuple[Any, int, Callable[[Any, Any], Any]]:
    return (lambda: torch.randn(shape, device="cuda", dtype=torch.float16)), shape[0] * shape[1] * 2, torch.nn.functional.linear


def _torch_int4(torch: Any, shape: tuple[int, int]) -> tuple[Any, int, Callable[[Any, Any], Any]]:
    scales = torch.ones(shape[1] // 128, shape[0], 2, device="cuda", dtype=torch.bfloat16)
    raw = torch.randint(0, 255, (shape[0], shape[1] // 2), device="cuda", dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack(raw, 8)
    return packed.clone, shape[0] * shape[1] // 2, lambda x, w: torch._weight_int4pack_mm(x.bfloat16(), w, 128, scales)


def _torch_seconds(torch: Any, made: Any, tokens: int, shape: tuple[int, int], repeats: int) -> list[float]:
    make, size, call = made
    copies = [make() for _ in range(1 + COPIED // size)]
    x = torch.ones(tokens, shape[1], device="cuda", dtype=torch.bfloat16 if size < shape[0] * shape[1] else torch.float16)
    call(x, copies[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w in copies:
            call(x, w)
    out = []
    for _ in range(repeats + 1):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        out.append(first.elapsed_time(last) / 1000 / len(copies))
    return out[1:]


def decode_loop(gpu: Gpu, bits: int, group: int, cache_bits: int, sizes: Sizes, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of a token with one graph a token, and with one launch after the other."""
    s, ones = sizes, gpu.put(np.ones(sizes.dim, np.float32))
    shapes = {
        "qkv": ((s.heads + 2 * s.kv_heads) * s.head, s.dim),
        "out": (s.dim, s.heads * s.head),
        "gate": (s.feed, s.dim),
        "up": (s.feed, s.dim),
    }
    shapes["down"] = (s.dim, s.feed)
    first = {
        n: Linear(gpu, weights(i, *shape, bits, group), activation="silu" if n == "gate" else "none")
        for i, (n, shape) in enumerate(shapes.items())
    }
    layers = [
        Layer(
            **{n: cloned(gpu, layer) for n, layer in first.items()}, attention_norm=ones, feed_norm=ones,
            cache=new_cache(gpu, 1, s.kv_heads, s.positions, s.head, cache_bits),
        )
        for _ in range(s.layers)
    ]  # fmt: skip
    head = Linear(gpu, weights(9, s.words, s.dim, bits, group))
    angles = np.arange(s.positions)[:, None] * 10.0 ** -np.linspace(0, 4, s.head // 2)
    turns = gpu.put(np.cos(angles).astype(np.float32)), gpu.put(np.sin(angles).astype(np.float32))
    launches, state = decode_step(gpu, layers, head, ones, 1, turns, s.positions)
    graph = gpu.graph(launches)
    found: dict[str, Any] = {
        "launches": len(launches),
        "weight_bytes": head.weights.nbytes + s.layers * sum(f.weights.nbytes for f in first.values()),
    }
    histories = {}
    for name, step in (("graph", graph), ("launches", lambda: gpu.run(launches))):

        def loop(step: Callable[[], None] = step) -> None:
            gpu.put(np.zeros(1, np.int32), state.position)
            gpu.put(np.zeros(1, np.int32), state.token)
            for _ in range(steps):
                step()

        found[name] = [seconds / steps for seconds in timed(gpu, loop, repeats)]
        histories[name] = gpu.get(state.history)[0, :steps].tolist()
    if histories["graph"] != histories["launches"]:
        raise CheckFailed("a graph and its launches write different tokens", "run  pytest -m gpu tests/test_kernels_cuda*.py")
    return found


def table(found: dict[str, Any]) -> str:
    copied = found["copy"]["bytes_per_s"]
    lines = [f"{found['gpu']}, NVRTC {found['nvrtc']}; a copy reads and writes {copied / 1e9:.0f} GB/s", ""]
    lines += [
        "| layer | weights | tokens | µs | GB/s | of the copy | float16 / ours | torch int4 / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["products"]:
        for one in row["times"]:
            ours = statistics.median(one["seconds"])
            peers = [found["torch"].get(row["shape"], {}).get(name, {}).get(one["tokens"]) for name in ("float16", "int4 g128")]
            ratios = [f"{statistics.median(p) / ours:.2f}" if p else "-" for p in peers]
            rate = one["bytes_per_s"]
            cells = (row["shape"], row["form"], one["tokens"], f"{ours * 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / copied:.0%}", *ratios)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| decode loop | tokens/s, graph | tokens/s, launches | GB/s of weights, graph |", "|---|---|---|---|"]
    for name, one in found["decode"].items():
        fast, plain = (statistics.median(one[n]) for n in ("graph", "launches"))
        lines.append(f"| {name} | {1 / fast:.0f} | {1 / plain:.0f} | {one['weight_bytes'] / fast / 1e9:.0f} |")
    return "\n".join([*lines, "", programs_table(found["programs"])])


def measure(gpu: Gpu, repeats: int, torch: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gpu": gpu.name,
        "arch": gpu.arch,
        "nvrtc": version(),
        "copy": copy_rate(gpu, repeats),
        "products": [],
        "torch": {},
        "decode": {},
        "programs": {},
    }
    for shape in SHAPES:
        label = f"{shape[0]} x {shape[1]}"
        for form, (bits, group) in FORMS.items():
            found["products"].append(
                {"shape": label, "form": form, "times": product(gpu, weights(0, *shape, bits, group), TOKENS, repeats)}
            )
            sys.stderr.write(f"{label}, {form}\n")
        if torch:
            found["torch"][label] = torch_times(shape, TOKENS, repeats)
    for name, (bits, group, cache_bits) in {"int4 g32, int8 cache": (4, 32, 8), "int8, float16 cache": (8, 0, 16)}.items():
        found["decode"][name] = decode_loop(gpu, bits, group, cache_bits, Sizes(), 256, repeats)
    for weights_of, precision in (("int4 g32", "int4-g32"), ("int8", "int8-dynamic")):
        found["programs"][f"decoder-only, {weights_of}"] = program_loop(gpu, configs()["decoder-only"], precision, 512, 64, repeats)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-torch", action="store_true")
    given = parser.parse_args()
    try:
        found = measure(Gpu(), given.repeats, not given.no_torch)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "kernels_cuda.json").write_text(json.dumps(found, indent=1))
    sys.stdout.write(f"{table(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
