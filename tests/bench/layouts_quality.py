"""Decoder-only against encoder-decoder against deep encoder at equal parameters and equal training, with and without a teacher.

    python tests/bench/layouts_quality.py [--out FOLDER] [--seeds 3] [--tasks g2p normalizer] [--table]

Two tasks: the built-in normalizer's (generated cases; held out are normal forms that hash into one bucket of ten) and grapheme to phoneme on the CMU
Pronouncing Dictionary (`../shared/data/g2p` beside the checkout; one word of twenty, by the hash of its letters, is held out; stress is left out).
Every run is one JSON file in FOLDER, so that a second call goes on where the first one was stopped; `--table` only prints what is there.
One thread; about a minute of it a run on a core of 47 GFLOP/s.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peers.text import edits as distance

from edgesdk.cache import cache_dir
from edgesdk.examples import normalizer_data as data
from edgesdk.examples.normalizer import pairs
from edgesdk.sequence.adapt import adapt
from edgesdk.sequence.answers import answers
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.pairs import Pairs
from edgesdk.sequence.teach import TeachConfig, answered, teach

CMUDICT = Path(__file__).parents[2].parent / "shared" / "data" / "g2p" / "cmudict.dict.gz"
PAD, START, END = 0, 1, 2
SHAPES = {"decoder-only": (0, 7, 122), "encoder-decoder": (4, 2, 128), "deep-encoder": (5, 1, 142)}
"""Layout → encoder layers, decoder layers, width of the feed-forwards: equal parameters."""
TEACHER = (0, 7, 192)  # at one and a half times the width, trained for half as many steps again
RATE = 0.04  # of steps, between the best for decoder-only (0.06) and the best for encoder-decoder (0.03) in a quarter of the steps
WAYS = ("labels", "distilled", "answers", "adapted", "adapted, distilled")
"""Labels alone; also a teacher's logits; that teacher's answers in place of the labels; from the decoder-only model of the same seed (labels)."""


@dataclass(frozen=True)
class Task:
    vocab: int
    train: Pairs
    test: list[tuple[list[int], list[list[int]]]]  # source, every right target
    steps: int
    batch: int
    longest: int


@cache
def normalizer(count: int = 16_000, tests: int = 500) -> Task:
    tested = pairs(data.cases(tests, 7, True))
    test = [(source, [target]) for source, target in zip(tested.sources, tested.targets, strict=True)]
    return Task(data.VOCABULARY, pairs(data.cases(count, 1, False)), test, 800, 20, 14)


@cache
def g2p(count: int = 16_000, tests: int = 800) -> Task:
    said: dict[str, list[tuple[str, ...]]] = {}
    for line in gzip.decompress(CMUDICT.read_bytes()).decode().splitlines():
        word, *phonemes = line.partition("#")[0].split()
        word = word.partition("(")[0]
        if word.isalpha() and word.isascii():
            said.setdefault(word, []).append(tuple(p.rstrip("012") for p in phonemes))
    letters = "abcdefghijklmnopqrstuvwxyz"
    phonemes = sorted({p for ways in said.values() for way in ways for p in way})
    by_hash = {w: hashlib.sha256(w.encode()).digest() for w in said}
    words = sorted(said, key=by_hash.__getitem__)
    held = [w for w in words if by_hash[w][-1] % 20 == 0]
    used = [w for w in words if by_hash[w][-1] % 20][:count]

    def source(word: str) -> list[int]:
        return [*[letters.index(c) + 3 for c in word], END]

    def target(way: Sequence[str]) -> list[int]:
        return [*[phonemes.index(p) + 3 + len(letters) for p in way], END]

    pairs = Pairs([source(w) for w in used], [target(said[w][0]) for w in used], START, END, PAD)
    test = [(source(w), [target(way) for way in said[w]]) for w in held[:tests]]
    return Task(3 + len(letters) + len(phonemes), pairs, test, 600, 32, 24)


TASKS: dict[str, Callable[[], Task]] = {"g2p": g2p, "normalizer": normalizer}


def config_of(task: Task, shape: tuple[int, int, int], dim: int = 64) -> SequenceConfig:
    encoder, decoder, ffn = shape

    def stack(layers: int) -> Stack:
        return Stack(layers=layers, dim=dim, heads=4, kv_heads=4, head=dim // 4, ffn=ffn)

    kind = "encoder-decoder" if encoder else "decoder-only"
    return SequenceConfig(layout=kind, vocab=task.vocab, encoder=stack(encoder) if encoder else None, decoder=stack(decoder))


def score(model: SequenceModel, task: Task) -> dict[str, float]:
    """`exact`: the share of answers that are right; `error`: edits to the nearest right answer over its length."""
    found = answers(model, [s for s, _ in task.test], start=START, end=END, pad=PAD, longest=task.longest)
    edits = total = right = 0
    for (_, wanted), answer in zip(task.test, found, strict=True):
        got = [t for t in answer if t != END]
        best = min((distance(got, w[:-1]), len(w) - 1) for w in wanted)
        edits, total, right = edits + best[0], total + best[1], right + (best[0] == 0)
    return {"exact": right / len(task.test), "error": edits / total}


class Runs:
    """Every run is made once; `path` holds their results and weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def teacher(self, name: str) -> SequenceModel:
        task = TASKS[name]()
        made = self.model(f"{name}-teacher-0", config_of(task, TEACHER, 96))
        if made is None:
            made = self._start(config_of(task, TEACHER, 96), 0)
            self._train(f"{name}-teacher-0", made, task, TeachConfig(steps=3 * task.steps // 2, batch=task.batch, rate=RATE), None)
        return made

    def run(self, name: str, layout: str, way: str, seed: int) -> None:
        task, key = TASKS[name](), f"{name}-{layout}-{way.replace(', ', '-')}-{seed}"
        if (self.path / f"{key}.json").exists():
            return
        config = config_of(task, SHAPES[layout])
        model = self._start(config, seed)
        if way.startswith("adapted"):
            from_ = self.model(f"{name}-decoder-only-labels-{seed}", config_of(task, SHAPES["decoder-only"]))
            assert from_ is not None and config.encoder and config.decoder
            model, _ = adapt(from_, encoder_layers=config.encoder.layers, decoder_layers=config.decoder.layers, seed=seed)
        pairs, teacher = task.train, self.teacher(name) if way not in ("labels", "adapted") else None
        if way == "answers" and teacher is not None:
            pairs, teacher = answered(teacher, pairs), None
        self._train(key, model, task, TeachConfig(steps=task.steps, batch=task.batch, rate=RATE, seed=seed), teacher, pairs)

    def model(self, key: str, config: SequenceConfig) -> SequenceModel | None:
        path = self.path / f"{key}.pt"
        if not path.exists():
            return None
        model = SequenceModel(config).eval()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def _start(self, config: SequenceConfig, seed: int) -> SequenceModel:
        torch.manual_seed(seed)
        return SequenceModel(config)

    def _train(
        self, key: str, model: SequenceModel, task: Task, config: TeachConfig, teacher: SequenceModel | None, pairs: Pairs | None = None
    ) -> None:
        start, clock = time.process_time(), time.monotonic()
        outcome = teach(model, pairs or task.train, config, teacher=teacher)
        spent = {"cpu_s": time.process_time() - start, "wall_s": time.monotonic() - clock}
        row = {
            "kind": "layouts-quality", "schema_version": 1, "run": key, **score(model, task), **spent, "held_out_loss": outcome.after,
            "parameters": model.config.parameters, "steps": config.steps, "batch": config.batch, "rate": config.rate, "seed": config.seed,
        }  # fmt: skip
        torch.save(model.state_dict(), self.path / f"{key}.pt")
        (self.path / f"{key}.json").write_text(json.dumps(row, indent=1))
        sys.stderr.write(f"{key}: error {row['error']:.1%}, exact {row['exact']:.1%}, {spent['cpu_s']:.0f} s of CPU\n")

    def rows(self, name: str, layout: str, way: str) -> list[dict[str, Any]]:
        key = f"{name}-{layout}-{way.replace(', ', '-')}"
        return [json.loads(p.read_text()) for p in sorted(self.path.glob(f"{key}-[0-9].json"))]


def table(runs: Runs) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    lines = []
    for name in TASKS:
        lines += ["", f"| {name} | way | parameters | seeds | error | exact | CPU s |", "|---|---|---|---|---|---|---|"]
        for layout in SHAPES:
            for way in WAYS:
                rows = runs.rows(name, layout, way)
                if rows:
                    shown = [_spread([r[k] for r in rows]) for k in ("error", "exact")]
                    spent = statistics.mean(r["cpu_s"] for r in rows)
                    lines.append(f"| {layout} | {way} | {rows[0]['parameters']:,} | {len(rows)} | {shown[0]} | {shown[1]} | {spent:.0f} |")
        for r in _teachers(runs, name):
            lines.append(f"| teacher | labels | {r['parameters']:,} | 1 | {r['error']:.1%} | {r['exact']:.1%} | {r['cpu_s']:.0f} |")
    return "\n".join(lines)


def _teachers(runs: Runs, name: str) -> list[dict[str, Any]]:
    path = runs.path / f"{name}-teacher-0.json"
    return [json.loads(path.read_text())] if path.exists() else []


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache_dir("layouts-quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["labels", "distilled"])
    parser.add_argument("--layouts", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(options.out)
    if not options.table:
        for seed in range(options.seeds):
            for name in options.tasks:
                for way in options.ways:
                    for layout in options.layouts:
                        if way.startswith("adapted") and layout == "decoder-only":
                            continue
                        runs.run(name, layout, way, seed)
    sys.stdout.write(table(runs) + "\n")


if __name__ == "__main__":
    main()
