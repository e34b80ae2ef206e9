"""What fewer layers, and smaller sub-models of one checkpoint, cost and save: phoneme error on held-out words, and the time of a token.

    python tests/bench/layers_quality.py [--out FOLDER] [--steps 300] [--words 300]

The model is the decoder-only one of `layouts_quality.py` (seed 0, labels), which is trained if it is not there yet. Each row is measured before any
further training (only layers or rows and columns taken away) and after `--steps` steps together with the whole model. Times are of one `decode` in
PyTorch on one thread at the cache length of the row, the least of 50 calls: they compare rows, they are no device's.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layouts_quality import END, PAD, RATE, SHAPES, START, TASKS, Runs, Task, config_of, distance

from edgesdk.cache import cache_dir
from edgesdk.plan.fake_quant import run
from edgesdk.sequence import exits
from edgesdk.sequence.answers import answers
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.elastic import Cut, elastic_student, mixed, nested, sorted_model, sub_model
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.generate import generate
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.teach import TeachConfig, teach

SLOTS = 40


def error(found: list[list[int]], task: Task) -> float:
    edits = total = 0
    for (_, wanted), answer in zip(task.test, found, strict=True):
        got = [t for t in answer if t != END]
        best = min((distance(got, w[:-1]), len(w) - 1) for w in wanted)
        edits, total = edits + best[0], total + best[1]
    return edits / total


def plain(model: SequenceModel, task: Task) -> float:
    return error(answers(model, [s for s, _ in task.test], start=START, end=END, pad=PAD, longest=task.longest), task)


def programs(model: SequenceModel, schedule: exits.Schedule, task: Task) -> tuple[float, float]:
    """Phoneme error of the schedule's own programs, and the mean time of a `decode` call in seconds, by cache length as they were called."""
    spec = exits.scheduled_spec(
        model, schedule, name="g2p", source_lengths=(24,), start=(START,), eos=(END,), pad=PAD, max_output=task.longest - 1
    )
    results = generate(run(spec), Card.read(spec.files[NAME]), [s for s, _ in task.test], Settings(draft="none"))
    calls: Counter[str] = sum((Counter(r.calls) for r in results), Counter())
    found = [list(r.tokens) for r in results]
    counted = {n: c for n, c in calls.items() if n.startswith("decode")}
    spent = {n: seconds(spec.methods[n].module, spec.methods[n].example_inputs) for n in counted}
    return error(found, task), sum(spent[n] * c for n, c in counted.items()) / sum(counted.values())


def seconds(module: torch.nn.Module, inputs: tuple[Any, ...]) -> float:
    times = []
    with torch.no_grad():
        for _ in range(50):
            start = time.perf_counter()
            module(*inputs)
            times.append(time.perf_counter() - start)
    return min(times)


def decode_s(model: SequenceModel) -> float:
    method = sequence_spec(model, name="g2p", source_lengths=(24,), cache_lengths=(SLOTS,), start=(START,)).methods["decode"]
    return seconds(method.module, method.example_inputs)


def schedules(model: SequenceModel, task: Task) -> list[exits.Schedule]:
    layers = model.config.decoder.layers  # type: ignore[union-attr]
    made = [exits.unified(layers, layers / kept, SLOTS) for kept in (6, 5, 4)]
    early = tuple(range(5))
    made.append(exits.Schedule(name="the first 5, an exit", prefill=early, stages=(exits.Stage(until=SLOTS, layers=early),)))
    made += [exits.skip_decode(layers, layers, least, SLOTS, stages=4) for least in (5, 3)]
    found = exits.changes(model, task.train)
    cut = sorted(found.answer)[1] / max(found.answer)
    return [*made, exits.void(found, SLOTS, prompt=0.0, answer=cut)]


def cuts(model: SequenceModel) -> list[Cut]:
    config = model.config
    steps = [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]
    return [
        nested(config, "feed-forward 1/2", ffn=0.5),
        nested(config, "feed-forward 1/4", ffn=0.25),
        nested(config, "heads 3/4, feed-forward 1/2", ffn=0.5, heads=0.75),
        nested(config, "layers 5/7, feed-forward 1/2", depth=5 / 7, ffn=0.5),
        nested(config, "channels 3/4", dim=0.75),
        mixed(config, "Mix'n'Match, falling", {"decoder": steps}),
        mixed(config, "Mix'n'Match, rising", {"decoder": steps[::-1]}),
    ]


def trained(model: SequenceModel, task: Task, steps: int, student: Callable[[SequenceModel], Any]) -> SequenceModel:
    made = copy.deepcopy(model).requires_grad_(True)
    teach(made, task.train, TeachConfig(steps=steps, batch=task.batch, rate=RATE / 2), student=student(made))
    return made.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache_dir("layouts-quality"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--words", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, task = Runs(options.out), TASKS["g2p"]()
    runs.run("g2p", "decoder-only", "labels", 0)
    model = runs.model("g2p-decoder-only-labels-0", config_of(task, SHAPES["decoder-only"]))
    assert model is not None
    task = dataclasses.replace(task, test=task.test[: options.words])
    rows: list[dict[str, Any]] = [
        {"name": "whole", "parameters": model.config.parameters, "before": plain(model, task), "decode_s": decode_s(model)}
    ]

    def add(**row: Any) -> None:
        rows.append(row)
        sys.stderr.write(json.dumps(row) + "\n")

    planned = schedules(model, task)
    after = trained(model, task, options.steps, lambda m: exits.student_of(m, planned, PAD))
    rows[0]["after schedules"] = plain(after, task)
    for schedule in planned:
        was, spent = programs(model, schedule, task)
        add(
            name=schedule.name,
            layers=[len(s.layers) for s in schedule.stages],
            before=was,
            after=programs(after, schedule, task)[0],
            decode_s=spent,
        )
    ordered, parts = sorted_model(model).eval(), cuts(model)
    after = trained(ordered, task, options.steps, lambda m: elastic_student(m, parts, PAD))
    rows[0]["after sub-models"] = plain(after, task)
    for part in parts:
        was, now = (plain(sub_model(m, part), task) for m in (ordered, after))
        unsorted = plain(sub_model(model, part), task)
        spent = decode_s(sub_model(after, part))
        add(name=part.name, parameters=part.config.parameters, unsorted=unsorted, before=was, after=now, decode_s=spent)
    (options.out / "layers.json").write_text(json.dumps({"kind": "layers-quality", "schema_version": 1, "rows": rows}, indent=1))
    sys.stdout.write("\n".join(json.dumps(r) for r in rows) + "\n")


if __name__ == "__main__":
    main()
