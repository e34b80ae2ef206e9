"""Attention of one token over full caches, a form of cache after the other in turn, beside torch's and ExecuTorch's.

    python tests/bench/kernels_attention.py [--slots 512,2048] [--heads 16x4,8x8] [--size 64] [--repeats 20] [--json FILE] 2>/dev/null

Every call meets the caches of another layer, so that they come from as far away as in a model. Processor time of one thread, all in turn in one
process, the median; beside it the bytes of caches a call reads over that time. `--tokens` above 1 is a causal prompt of so many tokens instead.
ExecuTorch's operator writes a line to stderr at every call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgesdk.kernels.attention import FORMS, kernel, room
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.library import library
from edgesdk.kernels.tape import Tape
from edgesdk.sequence.caches import held

BYTES = 192 << 20
"""Float caches of all layers together, at least."""


class Ours:
    """Steps over the caches of each layer."""

    def __init__(self, form: str, q: Any, pairs: list[Any], mask: Any) -> None:
        b, heads, n, size = q.shape
        self.tapes, self.out = [], np.zeros((b * n, heads * size), np.float32)
        for pair in pairs:
            arrays = held(list(pair), FORMS[form])
            self.nbytes = sum(a.nbytes for a in arrays)
            tape, slots = Tape(library(host_targets()[0])), arrays[0].shape[2]
            tape.add(
                kernel(form, size), b * heads, q=q, keys=arrays[0], values=arrays[1], slots=slots, tokens=0, mask=mask, mask_batch=mask.strides[0],
                mask_row=mask.strides[2], n=n, heads=heads, shared=heads // arrays[0].shape[1], out=self.out, stride=self.out.strides[0],
                scores=room(form, size, b * heads, slots), **dict(zip(("key_scales", "value_scales"), arrays[2:], strict=False)),
            )  # fmt: skip
            self.tapes.append(tape)

    def __call__(self, layer: int) -> Any:
        self.tapes[layer].run()
        return self.out


def torch_calls(q: Any, pairs: list[Any], mask: Any) -> dict[str, tuple[Callable[[int], Any], int]]:
    import torch

    torch.set_num_threads(1)
    found: dict[str, tuple[Callable[[int], Any], int]] = {}
    for name, kind in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16), ("torch float16", torch.float16)):
        given = [[torch.from_numpy(a).to(kind) for a in pair] for pair in pairs]
        query, added = torch.from_numpy(q).to(kind), torch.from_numpy(mask).to(kind)

        def call(layer: int, given: Any = given, query: Any = query, added: Any = added) -> Any:
            k, v = given[layer]
            out = torch.nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=added, scale=1.0, enable_gqa=True)
            return out.transpose(1, 2).reshape(q.shape[0] * q.shape[2], -1)

        found[name] = call, sum(a.nbytes for a in given[0])
    try:
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

        op = torch.ops.llama.custom_sdpa
    except (ImportError, AttributeError, OSError) as error:
        sys.stderr.write(f"ExecuTorch's operator is not here: {error}\n")
        return found
    given = [[torch.from_numpy(np.ascontiguousarray(a.transpose(0, 2, 1, 3))) for a in pair] for pair in pairs]
    query = torch.from_numpy(np.ascontiguousarray(q.transpose(0, 2, 1, 3)))
    slots, n = given[0][0].shape[1], query.shape[1]

    def custom(layer: int) -> Any:
        k, v = given[layer]
        return op(query, k, v, slots - n, None, 0.0, True, 1.0).reshape(q.shape[0] * n, -1)

    found["ExecuTorch custom_sdpa float32"] = custom, sum(a.nbytes for a in given[0])
    return found


def measured(slots: int, heads: int, kv: int, size: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    seen = max(slots, tokens)
    layers = max(2, -(-BYTES // (8 * kv * seen * size)) if tokens == 1 else 2)
    pairs = [tuple(rng.standard_normal((1, kv, seen, size), np.float32) for _ in "kv") for _ in range(layers)]
    q = rng.standard_normal((1, heads, tokens, size), np.float32) * np.float32(size**-0.5)
    mask = np.triu(np.full((tokens, seen), -1e4, np.float32), 1 + seen - tokens)[None, None]
    calls: dict[str, tuple[Callable[[int], Any], int]] = {}
    for form, bits in FORMS.items():
        ours = Ours(form, q, pairs, mask)
        calls[f"edgesdk {'float' if bits > 8 else 'int'}{bits}"] = ours, ours.nbytes
    calls |= torch_calls(q, pairs, mask)
    wanted = None
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    errors = {}
    for name, (call, _) in calls.items():
        got = np.asarray(call(0), np.float32) if not hasattr(call(0), "float") else call(0).float().numpy()
        wanted = got.copy() if wanted is None else wanted
        errors[name] = float(np.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean()))
    for turn in range(repeats):
        for name, (call, _) in calls.items():
            start = time.process_time()
            for layer in range(layers):
                call(layer)
            if turn:
                seconds[name].append((time.process_time() - start) / layers)
    rows = []
    for name, (_, nbytes) in calls.items():
        t = statistics.median(seconds[name])
        rows.append({
            "name": name, "heads": heads, "kv": kv, "size": size, "slots": seen, "tokens": tokens, "us": round(1e6 * t, 2),
            "low_us": round(1e6 * min(seconds[name]), 2), "high_us": round(1e6 * max(seconds[name]), 2), "gb_s": round(nbytes / t / 1e9, 1),
            "bytes": nbytes, "error": errors[name], "load": os.getloadavg()[0],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="512,2048")
    parser.add_argument("--heads", default="16x4,8x8")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for slots in given.slots.split(","):
        for heads in given.heads.split(","):
            h, kv = heads.split("x")
            found = measured(int(slots), int(h), int(kv), given.size, given.tokens, given.repeats)
            rows += found
            for r in found:
                sys.stdout.write(
                    f"{r['slots']:6} {heads:>6} {r['name']:32} {r['us']:9.1f} us ({r['low_us']:.1f} to {r['high_us']:.1f}) {r['gb_s']:6.1f} GB/s  error {r['error']:.4f}\n"
                )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
