"""Guessed tokens, measured: the same answers, how many guesses were right, how much sooner answers came, and what the planner foretold.

    python tests/bench/accelerators.py --out FOLDER [--prompts 1000] [--runtimes executorch,litert] [--tokens 4,8]

Two models of the family: the shipped date-and-number normalizer (`example:normalizer`'s weights), whose answers repeat little of their input, and one that is
trained here in a few minutes to correct typing errors, whose answers repeat most of it. The latter is taught with an exit behind its first decoder
layer, too. Each answer is written with and without guesses one after the other, in the same process, so that both see the same machine; raw times are
kept in FOLDER/accelerators.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from edgesdk.bundles import read_manifest, read_member
from edgesdk.examples import normalizer_data as data
from edgesdk.examples.normalizer import config, saved
from edgesdk.examples.normalizer import pairs as pairs_of
from edgesdk.lower import build
from edgesdk.model import ModelSpec
from edgesdk.plan.planner import make_plan
from edgesdk.plan.types import Budget, Workload
from edgesdk.runner import open_program
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.drafting import Counts, answers_of, exit_counts, replay, weigh
from edgesdk.sequence.exits import exits_student
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.generate import Result, generate
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.teach import TeachConfig, teach

WORDS = sorted({w for said, _ in data.cases(4000, 1, False) for w in said.split() if w.isalpha() and len(w) > 2})
LONGEST = 40
"""Tokens of a sentence, its end included."""


def normalizer() -> tuple[SequenceModel, list[list[int]]]:
    """The shipped encoder-decoder, and held-out prompts."""
    return saved("normalizer").checkpoint.model, [data.encode(said) for said, _ in data.cases(1400, 7, True)]


def _config() -> SequenceConfig:
    def stack(layers: int) -> Stack:
        return Stack(layers=layers, dim=96, heads=4, kv_heads=4, head=24, ffn=256)

    own = {"encoder": stack(2), "decoder": stack(3), "max_positions": LONGEST + 8}
    return config("normalizer").model_copy(update=own)


def _sentence(rng: random.Random) -> str:
    words = [rng.choice(WORDS)]
    while len(" ".join(words)) < LONGEST - 14:
        words.append(rng.choice(WORDS))
    return " ".join(words)


def _typed(text: str, rng: random.Random) -> str:
    """With one or two letters swapped, doubled, dropped or mistaken."""
    letters = list(text)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(1, len(letters) - 1)
        match rng.randrange(4):
            case 0:
                letters[at], letters[at - 1] = letters[at - 1], letters[at]
            case 1:
                letters.insert(at, letters[at])
            case 2:
                del letters[at]
            case _:
                letters[at] = rng.choice("abcdefghijklmnopqrstuvwxyz")
    return "".join(letters)


def typos(steps: int, count: int) -> tuple[SequenceModel, list[list[int]]]:
    """A model that corrects typing errors in sentences of the normalizer's words, with an exit behind its first decoder layer."""
    rng = random.Random(0)
    right = [_sentence(rng) for _ in range(steps * 32 + count)]
    wrong = [_typed(s, rng) for s in right]
    cut = len(right) - count
    pairs = pairs_of(list(zip(wrong[:cut], right[:cut], strict=True)))
    torch.manual_seed(0)
    model = SequenceModel(_config())
    teach(model, pairs, TeachConfig(steps=steps, batch=32), student=exits_student(model, [1], data.PAD), step=_progress())
    return model.eval(), [data.encode(s) for s in wrong[cut:]]


def _progress() -> object:
    last = [0.0]

    def step(text: str, share: float) -> None:
        if time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            sys.stderr.write(f"  {text} ({share:.0%})\n")

    return step


def spec_of(name: str, model: SequenceModel, prompts: list[list[int]], tokens: int, exit: int) -> ModelSpec:
    longest = max(map(len, prompts))
    return sequence_spec(
        model, name=name, source_lengths=(longest,), cache_lengths=(data.MAX_OUTPUT + 1 if name == "normalizer" else LONGEST,),
        several=(tokens,), exit=exit, start=(data.BOS,), eos=(data.EOS,), pad=data.PAD, typical_output=12 if name == "normalizer" else 30, prompts=prompts[-64:],
    )  # fmt: skip


def measured(spec: ModelSpec, runtime: str, prompts: list[list[int]], kinds: list[str], folder: Path) -> dict[str, object]:
    """Built for this host through the planner, then answers with each kind of guesses beside plain ones."""
    source = folder / f"{spec.name}.py"
    MADE[spec.name] = spec
    source.write_text(f"import sys\ndef model():\n    return sys.modules['__main__'].MADE[{spec.name!r}]\n", encoding="utf-8")
    plan = make_plan(f"{source}:model", "host", Budget(), Workload(), runtime, 1, None, lambda text, share: None)
    bundle = build(plan, spec, folder / f"{spec.name}-{runtime}.edge")
    card = Card.read(spec.files[NAME])
    manifest = read_manifest(bundle)
    program = folder / manifest.program
    program.write_bytes(read_member(bundle, manifest.program))
    run = open_program(str(program), runtime, 1).run
    predicted = {n: e.value for n, e in plan.method_latency.items()}
    held, times = prompts[:-64], {kind: [] for kind in ["none", *kinds]}
    same, told = dict.fromkeys(kinds, 0), {kind: {"checks": 0, "steps": 0, "drafted": 0, "accepted": 0} for kind in kinds}
    answers: list[list[int]] = []
    calls: dict[str, list[float]] = {}

    def count(result: Result) -> None:
        for name, n in result.calls.items():
            at = calls.setdefault(name, [0, 0.0])
            at[0], at[1] = at[0] + n, at[1] + result.call_s[name]

    for prompt in held:
        (plain,) = generate(run, card, [prompt], Settings(draft="none"))
        times["none"].append(plain.total_s)
        answers.append([*plain.tokens, *([data.EOS] if plain.stopped == "eos" else [])])
        count(plain)
        for kind in kinds:
            (guessed,) = generate(run, card, [prompt], Settings(draft=kind))
            times[kind].append(guessed.total_s)
            same[kind] += guessed.tokens == plain.tokens
            for key in told[kind]:
                told[kind][key] += guessed.drafts[key]
            count(guessed)
    per_call = {name: seconds / n for name, (n, seconds) in calls.items()}
    rows = {}
    exits = exit_counts(spec, card, answers_of(spec))
    for kind in kinds:
        rows[kind] = {
            "same": same[kind], "of": len(held), "rate": told[kind]["accepted"] / max(1, told[kind]["drafted"]), **told[kind],
            "speedup": sum(times["none"]) / sum(times[kind]),
            "speedup_median": statistics.median(a / b for a, b in zip(times["none"], times[kind], strict=True)),
            "predicted": _predicted(card, predicted, spec, kind, exits), "predicted_from_measured_calls": _predicted(card, per_call, spec, kind, exits),
        }  # fmt: skip
    counts = {k: vars(replay(k, held, answers, max(m["tokens"] for m in card.methods.values()) - 1)) for k in kinds if k != "exit"}
    return {
        "rows": rows,
        "call_s": per_call,
        "predicted_call_s": predicted,
        "times_s": times,
        "replayed": counts,
        "precisions": sorted({u.precision for u in plan.units}),
    }


MADE: dict[str, ModelSpec] = {}


def _predicted(card: Card, seconds: dict[str, float], spec: ModelSpec, kind: str, exits: dict[str, Counts]) -> float | None:
    """Speedup of answers that this kind alone would be predicted to bring."""
    known = {n: seconds.get(n, 0.0) for n in card.methods}
    found = weigh(card, known, spec.prompts, answers_of(spec), exits if kind == "exit" else None, () if kind == "exit" else (kind,))
    return found.speedup if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--runtimes", default="executorch,litert")
    parser.add_argument("--tokens", default="4,8")
    parser.add_argument("--models", default="normalizer,typos")
    parser.add_argument("--steps", type=int, default=1500, help="Training of the model that corrects typing errors.")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in asked.models.split(","):
        model, prompts = normalizer() if name == "normalizer" else typos(asked.steps, asked.prompts + 64)
        prompts = [*prompts[: asked.prompts], *prompts[-64:]]
        for tokens in map(int, asked.tokens.split(",")):
            spec = spec_of(name, model, prompts, tokens, 1)
            for runtime in asked.runtimes.split(","):
                with tempfile.TemporaryDirectory() as folder:
                    got = measured(spec, runtime, prompts, ["copy", "count", "exit"], Path(folder))
                found[f"{name} {runtime} x{tokens}"] = got
                for kind, row in got["rows"].items():  # type: ignore[attr-defined]
                    told = " ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                    sys.stdout.write(f"{name} {runtime} x{tokens} {kind}: {told}\n")
                    sys.stdout.flush()
                (asked.out / "accelerators.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
