"""The sequence runtime over a small numpy model: what it writes is what the model says, however caches, buckets and batches lie."""

from __future__ import annotations

import itertools
import json
import time

import numpy as np
import pytest
from sequence_toy import Toy

from edgesdk.sequence.card import SequenceError
from edgesdk.sequence.choose import Settings, choose, log_softmax, probabilities
from edgesdk.sequence.generate import generate, stream
from edgesdk.sequence.programs import Programs
from edgesdk.sequence.session import Session

LAYOUTS = {
    "decoder-only": {},
    "encoder-decoder": {"encoder": True},
    "windowed": {"window": 5},
    "shared cache": {"window": 5, "shared": True},
    "windowed encoder-decoder": {"encoder": True, "window": 3},
    "one bucket, no prefill": {"prefills": (), "caches": (32,), "chunks": (1,)},
    "no prefill, in chunks": {"prefills": (), "window": 3},
}
PROMPTS = ([3, 4, 5], [6], [7, 3, 9, 9, 4, 8], [5, 10, 4, 3, 8, 8, 7, 6, 4, 9, 3])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_is_argmax_without_caches(layout, batch):
    """Short and long prompts, over every border of the buckets, alone and padded side by side."""
    longest = 0
    for seed in range(4):
        toy = Toy(seed=seed, batches=(batch,), **LAYOUTS[layout])
        results = generate(toy.run, toy.card, PROMPTS, Settings(max_tokens=20))
        wanted = [toy.greedy(p, 20) for p in PROMPTS]
        assert [r.tokens for r in results] == wanted
        assert all(r.stopped == ("max-tokens" if len(r.tokens) == 20 else "eos") for r in results)
        assert all(len(r.token_s) == len(r.tokens) and r.token_s == sorted(r.token_s) for r in results)
        longest = max(longest, *map(len, wanted))
    assert longest == 20, "the test must cross the borders"


def test_every_step_has_the_models_logits():
    """Not only the winner: each row's logits, in a batch of different lengths, to float32's precision."""
    for name, more in LAYOUTS.items():
        toy = Toy(seed=1, batches=(2,), **more)
        session = Session(Programs(toy.card, toy.run), PROMPTS)
        written: list[list[int]] = [[] for _ in PROMPTS]
        logits = session.logits
        for step in range(12):
            for row, prompt in enumerate(PROMPTS):
                np.testing.assert_allclose(logits[row], toy.logits(prompt, written[row]), atol=2e-4, err_msg=f"{name}, step {step}")
                written[row].append((3 + 5 * row + 7 * step) % toy.vocab)
            logits = session.feed(np.asarray([[w[-1]] for w in written]))[:, 0]
            session.keep(np.ones(len(PROMPTS), np.int64))


def test_several_tokens_are_fed_and_only_some_kept():
    """What a draft needs: logits behind each fed token, and as if the refused ones had never been; over a ring as well."""
    for more in ({}, {"window": 5}, {"encoder": True, "window": 3}):
        toy = Toy(seed=2, batches=(2,), **more)
        session = Session(Programs(toy.card, toy.run), PROMPTS[:2])
        written: list[list[int]] = [[], []]
        for step in range(5):
            fed = np.asarray([[3, 7, 4], [9, 9, 5]]) + step % 2
            logits = session.feed(fed)
            for row, j in itertools.product(range(2), range(3)):
                want = toy.logits(PROMPTS[row], [*written[row], *fed[row, : j + 1]])
                np.testing.assert_allclose(logits[row, j], want, atol=2e-4)
            kept = np.asarray([step % 3, 2])
            session.keep(kept)
            for row in range(2):
                written[row] += fed[row, : kept[row]].tolist()


def test_the_smallest_buckets_are_used_and_left_when_full():
    toy = Toy(eos=())
    (result,) = generate(toy.run, toy.card, [[3, 4]], Settings(max_tokens=20))
    assert result.calls == {"prefill_0_4_b1": 1, "decode_0_8_x1_b1": 7, "decode_0_16_x1_b1": 8, "decode_0_32_x1_b1": 4}
    wide = Toy(eos=(), caches=(32,))
    assert generate(wide.run, wide.card, [[3, 4]], Settings(max_tokens=20))[0].tokens == result.tokens
    both = Toy(encoder=True, eos=())
    (result,) = generate(both.run, both.card, [[3] * 7], Settings(max_tokens=2))
    assert result.calls == {"encode_12_b1": 1, "decode_12_8_x1_b1": 2}, "the encoder runs once, its keys and values are made once"
    (result,) = generate(toy.run, toy.card, [[3] * 14], Settings(max_tokens=1))
    assert result.calls == {"prefill_0_8_b1": 1, "decode_0_16_x4_b1": 2}, "a long prompt goes through in chunks"


def test_a_batch_is_its_prompts_one_by_one():
    prompts = [*PROMPTS, [4, 4], [8, 3, 3]]
    settings = Settings(max_tokens=12, temperature=0.9, seed=5)
    for more in LAYOUTS.values():
        single, batch = Toy(seed=3, **more), Toy(seed=3, batches=(4,), **more)
        assert [r.tokens for r in generate(batch.run, batch.card, prompts)] == [
            r.tokens for r in generate(single.run, single.card, prompts)
        ]
        ours = [r.tokens for r in generate(batch.run, batch.card, prompts, settings)]
        assert ours == [r.tokens for r in generate(single.run, single.card, prompts, settings)]


def exhaustive(toy, prompt, cap, penalty):
    """(score, tokens) of every answer of at most `cap` tokens, best first."""
    found = []

    def walk(tokens, log_p):
        scores = log_softmax(toy.logits(prompt, tokens))
        for t in range(toy.vocab):
            total, length = log_p + scores[t], len(tokens) + 1
            if t in toy.card.eos:
                found.append((total / length**penalty, tokens))
            elif length == cap:
                found.append((total / length**penalty, [*tokens, t]))
            else:
                walk([*tokens, t], total)

    walk([], 0.0)
    return sorted(found, key=lambda f: -f[0])


@pytest.mark.parametrize("more", [{}, {"encoder": True}, {"encoder": True, "batches": (2,)}, {"window": 3, "batches": (4,)}])
def test_a_wide_beam_finds_what_an_exhaustive_search_finds(more):
    toy = Toy(vocab=4, sharp=1.0, seed=4, start=(2,), **more)
    for prompt in ([3], [2, 3, 3]):
        for penalty in (0.0, 0.5):
            want = exhaustive(toy, prompt, 4, penalty)
            toy.card.vocab = 60  # a beam wider than the vocabulary
            settings = Settings(beams=54, best=3, max_tokens=4, length_penalty=penalty)
            (result,) = generate(toy.run, toy.card, [prompt], settings)
            toy.card.vocab = 4
            assert result.tokens == want[0][1] and result.score == pytest.approx(want[0][0], abs=1e-4)
            if penalty == 0:
                assert [a["tokens"] for a in result.alternatives] == [tokens for _, tokens in want[:3]]


def test_beams_of_a_batch_and_of_one_row_agree_and_one_beam_is_greedy():
    settings = Settings(beams=3, max_tokens=14, repetition_penalty=1.2)
    for more in LAYOUTS.values():
        single, batch = Toy(seed=6, **more), Toy(seed=6, batches=(7,), **more)
        a, b = (generate(t.run, t.card, PROMPTS, settings) for t in (single, batch))
        assert [r.tokens for r in a] == [r.tokens for r in b]
        assert all(x.score == pytest.approx(y.score, abs=1e-3) for x, y in zip(a, b, strict=True))
        greedy = generate(single.run, single.card, PROMPTS, Settings(max_tokens=14))
        likely = generate(single.run, single.card, PROMPTS, Settings(max_tokens=14, beams=4, length_penalty=0.0))
        for prompt, g, r in zip(PROMPTS, greedy, likely, strict=True):
            reached = sum(log_softmax(single.logits(prompt, g.tokens[:i]))[t] for i, t in enumerate([*g.tokens, 1][:14]))
            assert r.score >= reached - 1e-3, "four beams find no less than the greedy answer"


def test_drawing_follows_the_distribution_and_the_seed():
    toy = Toy(sharp=0.5)
    draws = [generate(toy.run, toy.card, [[3, 4]], Settings(max_tokens=8, temperature=1.0, seed=s))[0].tokens for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    logits = np.asarray([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    for settings, kept in (
        (Settings(temperature=0.7), 6),
        (Settings(temperature=1.5, top_k=3), 3),
        (Settings(temperature=1.0, top_p=0.8), 3),
        (Settings(temperature=1.0, top_k=4, top_p=0.5), 1),
    ):
        p = probabilities(logits, settings)
        assert np.count_nonzero(p) == kept and p.sum() == pytest.approx(1)
        rng = np.random.default_rng(7)
        counts = np.bincount([choose(logits, settings, rng) for _ in range(6000)], minlength=6)
        assert not counts[p == 0].any()
        chi2 = float((((counts - 6000 * p) ** 2)[p > 0] / (6000 * p[p > 0])).sum())
        assert chi2 < 20.5, "99.9% of chi-square with 5 degrees of freedom"
    np.testing.assert_allclose(probabilities(logits, Settings(temperature=0.7)), np.exp(log_softmax(logits / 0.7)))


def test_a_repetition_penalty_makes_what_was_there_less_likely():
    assert choose([2.0, 1.5, -1.0], Settings(repetition_penalty=2.0), None, [0]) == 1
    assert choose([-1.0, -1.5], Settings(repetition_penalty=2.0), None, [0]) == 1
    toy = Toy(eos=(), seed=8)
    plain, varied = (generate(toy.run, toy.card, [[3]], Settings(max_tokens=20, repetition_penalty=p))[0].tokens for p in (1.0, 5.0))
    assert len(set(varied)) > len(set(plain))


def test_ctc_collapses_repeats_and_blanks():
    toy = Toy(ctc=True, batches=(1, 2))
    logits = np.full((2, 6, 11), -5.0, np.float32)
    for b, path in enumerate(([3, 3, 0, 3, 5, 5], [0, 4, 4, 7, 9, 9])):
        logits[b, np.arange(6), path] = 5.0
    results = generate(lambda m, a: [logits[: a[0].shape[0]]], toy.card, [[1] * 6, [1] * 4])
    assert [r.tokens for r in results] == [[3, 3, 5], [4, 7]], "and what lies behind the source is no output"
    (cut,) = generate(lambda m, a: [logits[:1]], toy.card, [[1] * 6], Settings(max_tokens=2))
    assert (cut.tokens, cut.stopped) == ([3, 3], "max-tokens")
    (real,) = generate(toy.run, toy.card, [[4, 5, 6]])
    assert real.calls == {"encode_6_b1": 1} and real.stopped == "eos"


def test_cancelling_and_caps_give_what_there_is():
    toy = Toy(eos=())
    seen = []
    for event in stream(toy.run, toy.card, [[3, 4]], cancelled=lambda: len(seen) >= 3):
        seen.append(event)
    done = seen.pop()["result"]
    assert done["stopped"] == "cancelled" and len(done["tokens"]) == 3 == len(seen)
    assert done["tokens"] == generate(toy.run, toy.card, [[3, 4]])[0].tokens[:3]
    two = generate(toy.run, toy.card, PROMPTS[:2], cancelled=lambda: True)
    assert [(r.tokens, r.text, r.stopped, r.first_token_s) for r in two] == [([], "", "cancelled", None)] * 2
    left = iter(range(100))
    (beam,) = generate(toy.run, toy.card, [[3, 4]], Settings(beams=2), cancelled=lambda: next(left) >= 9)
    assert beam.stopped == "cancelled" and len(beam.tokens) >= 3

    def slow(method, arrays):
        time.sleep(0.02)
        return toy.run(method, arrays)

    (late,) = generate(slow, toy.card, [[3, 4]], Settings(max_time_s=0.1))
    assert late.stopped == "max-time" and 3 <= len(late.tokens) <= 6
    small = Toy(eos=(), caches=(8,), max_output=100)
    for settings in (Settings(), Settings(beams=2)):
        (full,) = generate(small.run, small.card, [[3, 4, 5]], settings)
        assert full.stopped == "cache-full" and len(full.tokens) == 7, "8 slots: 3 + 5 kept, one more fed, and what follows from it"
    assert full.tokens and generate(small.run, small.card, [[3, 4, 5]])[0].tokens == small.greedy([3, 4, 5], 7)
    ring = Toy(eos=(), window=4, max_output=100)
    ring.card.caches = tuple({**c, "window": 4} for c in ring.card.caches)
    ring.windows = [4, 4]
    (long,) = generate(ring.run, ring.card, [[3, 4, 5]], Settings(max_tokens=90))
    assert long.stopped == "max-tokens" and long.tokens == ring.greedy([3, 4, 5], 90), "a ring has no end"


def test_times_and_counts_are_told():
    toy = Toy(eos=())
    (result,) = generate(toy.run, toy.card, [[3, 4]], Settings(max_tokens=9))
    assert result.first_token_s == result.token_s[0] > 0 and result.total_s >= result.token_s[-1]
    assert result.tokens_per_s == pytest.approx(8 / (result.token_s[-1] - result.token_s[0]))
    assert sum(result.calls.values()) == 9 and result.prompt_tokens == 2 and set(result.call_s) == set(result.calls)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"max_tokens": 25}, "max_tokens = 25"),
        ({"beams": 0}, "beams = 0"),
        ({"beams": 2, "best": 3}, "best = 3"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p = 0"),
        ({"top_k": 3}, "nothing is drawn"),
        ({"beams": 2, "temperature": 1.0}, "beams and a temperature"),
        ({"max_time_s": 0}, "max_time_s = 0"),
        ({"max_tokens": 2.5}, "max_tokens = 2.5"),
        ({"temperature": "warm"}, "temperature = 'warm'"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"seed": None}, "seed = None"),
        ({"stop": "abc"}, "stop = 'abc'"),
        ({"stop": ("",)}, "stop = "),
        ({"stop_tokens": ("a",)}, "stop_tokens = "),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    toy = Toy()
    with pytest.raises(SequenceError, match=words) as error:
        generate(toy.run, toy.card, [[3]], Settings(**settings))
    assert error.value.hint


def test_settings_go_through_json():
    for settings in (Settings(), Settings(3, 0.5, temperature=0.7, top_k=2, stop=("a", "b"), stop_tokens=(4,))):
        assert Settings.of(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(SequenceError, match="no setting 'warmth'"):
        Settings.of({"warmth": 1})


@pytest.mark.parametrize("settings", [Settings(), Settings(temperature=1.0), Settings(beams=2)])
def test_scores_that_are_no_numbers_are_an_error(settings):
    toy = Toy()

    def spoiled(method, arrays):
        logits, *rest = toy.run(method, arrays)
        logits[..., 5] = np.nan
        return [logits, *rest]

    with pytest.raises(SequenceError, match="not numbers"):
        generate(spoiled, toy.card, [[3, 4]], settings)


def test_wrong_prompts_and_bundles_are_refused():
    for toy, prompt, words in (
        (Toy(), [3] * 33, "the prompt has 33 tokens"),
        (Toy(encoder=True), [3] * 13, "the prompt has 13 tokens"),
        (Toy(), [], "the prompt is empty"),
        (Toy(), [3, 11], "token 11 of the prompt"),
        (Toy(), "hello", "no tokenizer"),
        (Toy(), [0.5, 1.5], r"a prompt of float64\[2\]"),
        (Toy(), np.zeros((2, 3)), "sound for the layout decoder-only"),
        (Toy(), np.zeros((2, 3, 4)), r"a prompt of float64\[2, 3, 4\]"),
        (Toy(encoder=True, sources=()), [3], "no program with the role 'decode'"),
        (Toy(ctc=True, sources=()), [3], "no program with the role 'encode'"),
    ):
        with pytest.raises(SequenceError, match=words) as error:
            generate(toy.run, toy.card, [prompt])
        assert error.value.hint
    with pytest.raises(SequenceError, match="tokens and of sound"):
        generate(Toy(encoder=True).run, Toy(encoder=True).card, [[3], np.zeros((2, 4))])
    with pytest.raises(SequenceError, match="beams = 2 for the layout encoder-ctc"):
        generate(Toy(ctc=True).run, Toy(ctc=True).card, [[3]], Settings(beams=2))
    odd = Toy(window=3)
    odd.card.caches = ({**odd.card.caches[0], "window": 4}, odd.card.caches[1])
    with pytest.raises(SequenceError, match="layers with windows"):
        generate(odd.run, odd.card, [[3]])
