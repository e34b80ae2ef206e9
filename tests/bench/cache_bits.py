"""Caches of few bits beside float32, inside the programs: the time of a decode, the memory of it, and what answers lose.

    python tests/bench/cache_bits.py --out FOLDER [--slots 512,2048] [--runtimes executorch,litert,native] [--repeats 60]
    python tests/bench/cache_bits.py --out FOLDER --answers 1000 [--g2p FOLDER]

The first builds a decoder-only model with random int8 weights and calls `decode` over full caches, every form that the runtime has in turn in one
process, so that all see the same machine; a call counts the writing of the new token into the caches. Memory is what one process more takes for a
program and its caches after its first calls. The second has the shipped normalizers, and models for pronunciation that `layouts_quality.py` trained into
FOLDER, answer held-out cases with each form of cache. Raw times are kept in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgesdk.graph import trace
from edgesdk.lower import lower
from edgesdk.plan.fake_quant import run as modules
from edgesdk.runner import open_program
from edgesdk.sequence.caches import Caches
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.generate import generate
from edgesdk.sequence.model import SequenceModel

BITS = {"executorch": (32, 8), "litert": (32, 8), "native": (32, 16, 8, 4)}
ENDINGS = {"executorch": "pte", "litert": "tflite", "native": "native"}


def spec_of(slots: int, bits: int, layers: int) -> Any:
    stack = Stack(layers=layers, dim=512, heads=8, kv_heads=4, head=64, ffn=1024)
    torch.manual_seed(0)
    model = SequenceModel(SequenceConfig(layout="decoder-only", vocab=1000, decoder=stack)).eval()
    spec = sequence_spec(model, name="cached", source_lengths=(16,), cache_lengths=(slots,), start=(1,), eos=(2,), cache_bits=bits)
    return type(spec)(spec.name, spec.digest, {"decode": spec.methods["decode"]}, files=spec.files)


def built(folder: Path, slots: int, runtime: str, bits: int, layers: int) -> Path:
    path = folder / f"cached-{layers}x{slots}-{bits}.{ENDINGS[runtime]}"
    if not path.exists():
        spec = spec_of(slots, bits, layers)
        linear = [u for u in trace(spec).methods[0].units if u.op == "linear"]
        choice = {("decode", u.name): "int8-dynamic" for u in linear}
        path.write_bytes(lower(spec, runtime, choice, lambda text: None))
    path.with_suffix(".json").write_bytes(spec_of(slots, bits, layers).files[NAME])
    return path


class Calls:
    """A program and full caches, called as the runtime calls it: the new token is written over the last slot."""

    def __init__(self, path: Path) -> None:
        self.runner = open_program(str(path), next(r for r, e in ENDINGS.items() if path.suffix == f".{e}"))
        card = Card.read(path.with_suffix(".json").read_bytes())
        slots = card.methods["decode"]["cache"]
        self.caches, rng = Caches(card, 1, slots), np.random.default_rng(0)
        shape = (1, card.caches[0]["heads"], slots, card.caches[0]["head"])
        self.caches.write([rng.standard_normal(shape, np.float32) for _ in range(2 * len(card.caches))], np.asarray([slots]))

    def __call__(self) -> Any:
        at = self.caches.slots - 1
        self.caches.lengths[:] = at
        inputs = [np.asarray([[5]]), np.asarray([[at]]), self.caches.mask(1), *self.caches.arrays]
        logits, *new = self.runner.run("decode", inputs)
        self.caches.write(new, np.asarray([1]))
        return logits


def resident() -> int:
    """Bytes of this process in memory, the shared ones of libraries left out."""
    told = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(n) for n in re.findall(r"Private_\w+:\s+(\d+)", told))


def memory(path: Path) -> int:
    """Bytes that a process takes for the program and its caches, by one of its own."""
    told = subprocess.run([sys.executable, __file__, "--alone", str(path)], capture_output=True, text=True, check=True)
    return int(told.stdout.split()[-1])


def alone(path: Path) -> None:
    small = next(p for p in sorted(path.parent.glob(f"warm*{path.suffix}")))
    Calls(small)()  # the runtime and its libraries are there before it is counted
    before = resident()
    calls = Calls(path)
    for _ in range(3):
        calls()
    sys.stdout.write(f"{resident() - before}\n")


def speeds(folder: Path, slots: int, runtime: str, layers: int, repeats: int) -> dict[str, Any]:
    paths = [built(folder, slots, runtime, bits, layers) for bits in BITS[runtime]]
    calls = [Calls(p) for p in paths]
    logits = [call() for call in calls]
    apart = [float(np.linalg.norm(x - logits[0]) / np.linalg.norm(logits[0])) for x in logits]
    seconds: list[list[float]] = [[] for _ in paths]
    for _ in range(repeats):
        for call, times in zip(calls, seconds, strict=True):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    warm = built(folder, 16, runtime, 32, 1)
    warm.rename(warm.with_name(f"warm{warm.suffix}")), warm.with_suffix(".json").rename(folder / "warm.json")
    best = [sorted(t)[len(t) // 4] for t in seconds]
    return {
        "runtime": runtime, "layers": layers, "slots": slots, "bits": BITS[runtime], "ms": [round(1e3 * b, 3) for b in best], "ratio": [b / best[0] for b in best],
        "median_ms": [round(1e3 * statistics.median(t), 3) for t in seconds], "cache_bytes": [c.caches.nbytes for c in calls],
        "resident_bytes": [memory(p) for p in paths], "logits_apart": apart, "load": os.getloadavg()[0], "raw_s": seconds,
    }  # fmt: skip


def answered(name: str, spec_of: Any, sources: list[Any], targets: list[list[list[int]]]) -> dict[str, Any]:
    """Exact answers with each form of cache, and how many are those with float caches, by torch."""
    found = []
    for bits in BITS["native"]:
        spec = spec_of(bits)
        card, run = Card.read(spec.files[NAME]), modules(spec)
        found.append([r.tokens for i in range(0, len(sources), 20) for r in generate(run, card, sources[i : i + 20])])
    right = [sum(t in w for t, w in zip(f, targets, strict=True)) for f in found]
    same = [sum(a == b for a, b in zip(f, found[0], strict=True)) for f in found]
    return {"model": name, "cases": len(sources), "bits": BITS["native"], "right": right, "same": same}


def answers(count: int, g2p: Path | None) -> list[dict[str, Any]]:
    """Exact matches of the shipped normalizers, and of what is in the folder `g2p`, on held-out cases."""
    from edgesdk.examples import normalizer_data as data
    from edgesdk.examples.normalizer import LAYOUTS, saved

    torch.set_num_threads(1)
    cases, rows = data.cases(count, 11, True), []
    for name in LAYOUTS:
        made = saved(name).checkpoint
        longest = data.MAX_INPUT + (0 if made.config.encoder else 1)
        caches = data.MAX_OUTPUT if made.config.encoder else longest + data.MAX_OUTPUT
        make = partial(
            sequence_spec, made.model, name=name, source_lengths=(longest,), cache_lengths=(caches,), batch=20, start=made.specials.start,
            eos=made.specials.eos, pad=made.specials.pad,
        )  # fmt: skip
        targets = [[[x for x in data.encode(b) if x != data.EOS]] for _, b in cases]
        rows.append(answered(name, lambda bits, make=make: make(cache_bits=bits), [data.encode(a) for a, _ in cases], targets))
    return rows if g2p is None else rows + pronounced(count, g2p)


def pronounced(count: int, folder: Path) -> list[dict[str, Any]]:
    from layouts_quality import END, PAD, SHAPES, START, Runs, config_of
    from layouts_quality import g2p as made_of

    task, rows = made_of(tests=count), []
    for layout, shape in SHAPES.items():
        model = Runs(folder).model(f"g2p-{layout}-labels-0", config_of(task, shape))
        if model is None:
            continue
        sources = [s for s, _ in task.test]
        longest = max(map(len, sources)) + (0 if model.config.encoder else 1)
        caches = task.longest if model.config.encoder else longest + task.longest
        make = partial(
            sequence_spec, model, name="g2p", source_lengths=(longest,), cache_lengths=(caches,), batch=20, start=(START,), eos=(END,), pad=PAD,
        )  # fmt: skip
        targets = [[[x for x in w if x != END] for w in ways] for _, ways in task.test]
        rows.append(answered(f"g2p-{layout}", lambda bits, make=make: make(cache_bits=bits), sources, targets))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--slots", default="512,2048")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runtimes", default="executorch,litert,native")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--answers", type=int)
    parser.add_argument("--g2p", type=Path)
    parser.add_argument("--alone", type=Path)
    given = parser.parse_args()
    if given.alone:
        return alone(given.alone)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.answers:
        rows = answers(given.answers, given.g2p)
    else:
        rows = [
            speeds(given.out, int(n), runtime, given.layers, given.repeats)
            for runtime in given.runtimes.split(",")
            for n in given.slots.split(",")
        ]
    for row in rows:
        sys.stdout.write(json.dumps({k: v for k, v in row.items() if k != "raw_s"}) + "\n")
    (given.out / f"cache-bits-{'answers' if given.answers else 'speed'}.json").write_text(json.dumps(rows, indent=1))
    return None


if __name__ == "__main__":
    main()
