"""Guessed tokens: whatever the guesses, the answer is the greedy one; and good guesses save calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sequence_toy import Toy

from edgesdk.sequence.card import Card, SequenceError
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.drafting import replay, weigh
from edgesdk.sequence.drafts import Copied, Counted, Speculation
from edgesdk.sequence.generate import generate, stream
from edgesdk.sequence.programs import Programs
from edgesdk.sequence.session import Session

LAYOUTS: dict[str, dict[str, Any]] = {
    "decoder-only": {},
    "encoder-decoder": {"encoder": True},
    "windowed": {"window": 5},
    "shared cache": {"window": 5, "shared": True},
}
PROMPTS = ([3, 4, 5], [6], [7, 3, 9, 9, 4, 8], [5, 10, 4, 3, 8, 8, 7, 6, 4, 9, 3])


class Early(Toy):
    """The toy with a program of its first layer alone."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        methods = {
            n.replace("decode", "draft"): {**m, "role": "draft", "layers": 1}
            for n, m in self.card.methods.items()
            if m["role"] == "decode" and m["tokens"] == 1
        }
        known = {f: getattr(self.card, f) for f in Card.FIELDS}
        self.card = Card({**known, "methods": {**self.card.methods, **methods}})

    def run(self, method: str, arrays: Any) -> list[Any]:
        if self.card.methods[method]["role"] != "draft":
            return super().run(method, arrays)
        whole, self.LAYERS = self.LAYERS, 1
        self.card.methods[method]["role"] = "decode"
        try:
            return super().run(method, arrays)
        finally:
            self.LAYERS, self.card.methods[method]["role"] = whole, "draft"


@pytest.mark.parametrize("kind", ["copy", "count", "exit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_answer_is_the_greedy_one(layout: str, kind: str) -> None:
    drafted = 0
    for seed in range(4):
        toy = Early(seed=seed, **LAYOUTS[layout])
        plain = generate(toy.run, toy.card, PROMPTS, Settings(draft="none"))
        guessed = generate(toy.run, toy.card, PROMPTS, Settings(draft=kind))
        assert [r.tokens for r in guessed] == [r.tokens for r in plain]
        assert [r.stopped for r in guessed] == [r.stopped for r in plain]
        drafted += sum(r.drafts["drafted"] for r in guessed)
        for r in guessed:
            assert 0 <= r.drafts["accepted"] <= r.drafts["drafted"] and r.drafts["steps"] >= r.drafts["checks"]
    assert drafted or (kind == "exit" and "window" in LAYOUTS[layout])


class Oracle:
    """Guesses right for `good` tokens of four, then wrong."""

    def __init__(self, toy: Toy, prompt: list[int], good: int) -> None:
        self.toy, self.answer, self.good = toy, toy.greedy(prompt, 24), good

    def propose(self, output: list[int], most: int) -> list[int]:
        right = self.answer[len(output) : len(output) + self.good]
        return [*right, *[self.toy.vocab - 1] * 4][:most]

    def learn(self, output: list[int], new: int) -> None:
        pass


@pytest.mark.parametrize("good", [0, 1, 3])
def test_good_guesses_save_calls(good: int) -> None:
    toy = Toy(eos=(), seed=5)
    session = Session(Programs(toy.card, toy.run), [[3, 4, 5]])
    speculation = Speculation(session, Oracle(toy, [3, 4, 5], good), adaptive=False)
    output = [int(np.argmax(session.logits[0]))]
    while len(output) < 20:
        output += speculation.step(output, 20 - len(output))
    assert output == toy.greedy([3, 4, 5], 20)
    assert speculation.told["steps"] <= -(-19 // (1 + good)) + 2


def test_bad_guesses_are_given_up() -> None:
    toy = Toy(eos=(), seed=5, max_output=200, caches=(256,), prefills=(4,))
    session = Session(Programs(toy.card, toy.run), [[3, 4, 5]])
    speculation = Speculation(session, Oracle(toy, [3, 4, 5], 0), adaptive=True)
    speculation._count(0, 0, 1e-6)  # a plain step is cheap here, a check dear
    output = [3]
    for _ in range(60):
        output += speculation.step(output, 99)
        speculation._plain = 1e-9
    assert speculation.told["checks"] < 20


def test_copying_follows_the_source_and_finds_it_again() -> None:
    copy = Copied([10, 11, 12, 13, 14, 15, 11, 20])
    assert copy.propose([], 3) == [10, 11, 12]
    assert copy.propose([10], 3) == [11, 12, 13]
    assert copy.propose([10, 99], 3) == [], "the last token is nowhere in the source"
    assert copy.propose([99, 13], 9) == [14, 15, 11, 20]
    assert copy.propose([14, 15, 11], 2) == [20], "the longer common end wins"


def test_counts_learn_within_their_capacity() -> None:
    counted = Counted(capacity=50)
    text = [1, 2, 3, 4, 5] * 4
    for n in range(1, len(text) + 1):
        counted.learn(text[:n], 1)
    assert counted.propose([4, 5], 5) == [1, 2, 3, 4, 5]
    rng = np.random.default_rng(0)
    noise = [int(t) for t in rng.integers(0, 100, 2000)]
    counted.learn(noise, len(noise))
    assert len(counted.table) == 50


def test_what_is_drawn_or_searched_is_not_guessed() -> None:
    toy = Toy()
    for settings in (Settings(draft="copy", temperature=1.0), Settings(draft="copy", beams=2), Settings(draft="guess")):
        with pytest.raises(SequenceError, match="draft"):
            generate(toy.run, toy.card, [[3]], settings)
    single = Toy(chunks=(1,))
    with pytest.raises(SequenceError, match="several tokens"):
        generate(single.run, single.card, [[3]], Settings(draft="copy"))
    with pytest.raises(SequenceError, match="role 'draft'"):
        generate(toy.run, toy.card, [[3]], Settings(draft="exit"))
    assert not generate(toy.run, toy.card, [[3]], Settings())[0].drafts, "the card does not ask for it"
    known = {f: getattr(toy.card, f) for f in Card.FIELDS}
    asking = Card.read(Card({**known, "draft": "copy"}).to_bytes())
    assert asking.draft == "copy" and generate(toy.run, asking, [[3]], Settings())[0].drafts


def test_cancelling_and_streaming() -> None:
    toy = Toy(eos=(), seed=2)
    events = list(stream(toy.run, toy.card, [[3, 4]], Settings(draft="copy", max_tokens=9)))
    assert [e["token"] for e in events if e["event"] == "token"] == toy.greedy([3, 4], 9)
    calls = iter([False] * 3 + [True] * 9)
    (result,) = generate(toy.run, toy.card, [[3, 4]], Settings(draft="copy"), cancelled=lambda: next(calls))
    assert result.stopped == "cancelled" and result.tokens == toy.greedy([3, 4], len(result.tokens))


@pytest.mark.parametrize("kind", ["copy", "count"])
def test_a_replay_counts_what_the_runtime_does(kind: str) -> None:
    for seed in range(4):
        toy = Toy(seed=seed, encoder=bool(seed % 2), caches=(64,))
        results = generate(toy.run, toy.card, PROMPTS, Settings(draft="none"))
        answers = [[*r.tokens, *([1] if r.stopped == "eos" else [])] for r in results]
        counts = replay(kind, PROMPTS, answers, 3)
        assert counts.tokens == sum(len(a) - 1 for a in answers)
        checks = drafted = accepted = steps = 0
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            session = Session(Programs(toy.card, toy.run), [prompt])
            speculation = Speculation(session, Copied(prompt) if kind == "copy" else Counted(), adaptive=False)
            output = answer[:1]
            while len(output) < len(answer):
                output += speculation.step(output, 99)[: len(answer) - len(output)]
            assert output[: len(answer)] == answer
            told = speculation.told
            checks, drafted, accepted, steps = (
                checks + told["checks"],
                drafted + told["drafted"],
                accepted + told["accepted"],
                steps + told["steps"],
            )
        assert (counts.checks, counts.drafted, counts.plain) == (checks, drafted, steps - checks)
        assert counts.accepted <= accepted <= counts.accepted + 3 * len(PROMPTS), "the runtime guesses on behind an answer's end"


def test_guessing_pays_only_where_checks_are_cheap_and_guesses_right() -> None:
    toy = Toy(encoder=True, caches=(32,), sources=(12,))
    echo = [[3, 4, 5, 6, 7, 8, 9, 10, 3, 5]] * 3
    other = [[10, 10, 10, 10, 9, 9, 9]] * 3

    def seconds(check: float) -> dict[str, float]:
        return {n: check if m["tokens"] == 4 else 1.0 for n, m in toy.card.methods.items()}

    good = weigh(toy.card, seconds(1.2), echo, echo)
    assert good and good.pays and good.kind == "copy" and good.rate == 1.0 and good.tokens == 4 and good.speedup > 1.5
    dear = weigh(toy.card, seconds(5.0), echo, echo)
    assert dear and not dear.pays and dear.speedup <= 1
    wrong = weigh(toy.card, seconds(1.2), [[3, 4, 5]], [[10, 9, 5, 8, 6]])
    assert wrong is not None and not wrong.rate and not wrong.pays
    assert weigh(toy.card, seconds(1.2), [], []) is None
    both = Toy(encoder=True, caches=(32,), sources=(12, 24))
    mixed = {n: (9.0 if m["source"] == 24 else 1.2) if m["tokens"] == 4 else 1.0 for n, m in both.card.methods.items()}
    average = weigh(both.card, mixed, echo, echo)
    assert average and not average.pays, "what pays for short sources alone does not pay"
    assert weigh(Toy(chunks=(1,)).card, {}, echo, other) is None


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_a_models_own_first_layers_guess(layout: str) -> None:
    """Programs of a real model, as they are exported: the same answers, and the exit's keys and values are the model's."""
    torch = pytest.importorskip("torch")
    from edgesdk.plan.fake_quant import run
    from edgesdk.sequence.config import SequenceConfig, Stack
    from edgesdk.sequence.drafting import answers_of, exit_counts
    from edgesdk.sequence.export import sequence_spec
    from edgesdk.sequence.model import SequenceModel

    torch.manual_seed(0)
    stack = Stack(layers=3, dim=32, heads=4, kv_heads=2, head=8, ffn=64)
    encoder = Stack(layers=1, dim=32, heads=4, kv_heads=2, head=8, ffn=64) if layout == "encoder-decoder" else None
    model = SequenceModel(SequenceConfig(layout=layout, vocab=30, encoder=encoder, decoder=stack))
    prompts = [[int(t) for t in np.random.default_rng(i).integers(3, 30, 8)] for i in range(4)]
    spec = sequence_spec(
        model, name="small", source_lengths=(16,), cache_lengths=(64,), several=(4,), exit=2, start=(1,), eos=(2,), max_output=20, prompts=prompts
    )  # fmt: skip
    card = Card.read(spec.files["sequence.json"])
    assert card.methods["draft"]["layers"] == 2 and spec.methods["draft"].unroll == 0
    names = {n for n, _ in spec.methods["draft"].module.named_parameters()}
    assert names < {n for n, _ in spec.methods["decode"].module.named_parameters()}, "its weights are the model's"
    plain = generate(run(spec), card, prompts, Settings(draft="none"))
    for kind in ("copy", "count", "exit"):
        assert [r.tokens for r in generate(run(spec), card, prompts, Settings(draft=kind))] == [r.tokens for r in plain]
    answers = answers_of(spec)
    assert [list(a[: len(r.tokens)]) for a, r in zip(answers, plain, strict=True)] == [r.tokens for r in plain]
    counts = exit_counts(spec, card, answers)["decode_x4"]
    assert counts.sketched >= counts.drafted >= counts.accepted
