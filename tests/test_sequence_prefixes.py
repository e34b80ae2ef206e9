"""Prompts that begin alike: read once, answered the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sequence_toy import Toy

from edgesdk.sequence.card import SequenceError
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.generate import generate
from edgesdk.sequence.prefixes import Prefixes

SYSTEM = [5, 10, 4, 3, 8, 8, 7, 6, 4, 9, 3]
PROMPTS = [[*SYSTEM, 3, 4], [*SYSTEM, 7], SYSTEM, [*SYSTEM, 7, 7, 3, 9], [3], [*SYSTEM, 7]]
LAYOUTS: dict[str, dict[str, Any]] = {"full": {}, "windowed": {"window": 5}, "shared cache": {"window": 5, "shared": True}}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_the_same_and_tokens_are_spared(layout: str, beams: int) -> None:
    for seed in range(3):
        toy = Toy(seed=seed, batches=(1, 2) if beams > 1 else (1,), **LAYOUTS[layout])
        settings, prefixes = Settings(max_tokens=9, beams=beams), Prefixes(1 << 20)
        for prompt in PROMPTS:
            (plain,), (kept,) = (
                generate(toy.run, toy.card, [prompt], settings),
                generate(toy.run, toy.card, [prompt], settings, prefixes=prefixes),
            )
            assert kept.tokens == plain.tokens
        assert prefixes.hits >= (4 if layout == "full" else 2), "a ring serves only whole prompts"
        assert prefixes.saved >= prefixes.hits * len(SYSTEM) - 2


def test_the_same_source_is_encoded_once() -> None:
    toy, prefixes = Toy(encoder=True), Prefixes(1 << 20)
    for again in (1, 0):
        (result,) = generate(toy.run, toy.card, [[3, 4, 5]], prefixes=prefixes)
        assert sum(n for name, n in result.calls.items() if name.startswith("encode")) == again
        assert result.tokens == toy.greedy([3, 4, 5], 24)
    generate(toy.run, toy.card, [[3, 4]], prefixes=prefixes)
    assert prefixes.hits == 1


def test_room_is_kept_and_the_oldest_goes() -> None:
    toy = Toy()
    whole = Prefixes(1 << 20)
    generate(toy.run, toy.card, [[3] * 10], Settings(max_tokens=1), prefixes=whole)
    small = Prefixes(2 * whole.nbytes + 8)
    for first in range(3, 9):
        generate(toy.run, toy.card, [[first] * 10], Settings(max_tokens=1), prefixes=small)
        assert small.nbytes <= small.limit_bytes
    generate(toy.run, toy.card, [[3] * 10], Settings(max_tokens=1), prefixes=small)
    assert small.hits == 0, "the first was put out long ago"
    none = Prefixes(8)
    generate(toy.run, toy.card, [[3] * 10], prefixes=none)
    assert none.nbytes == 0


class Wide(Toy):
    SIZE = 32


def test_few_bits_take_less_room_and_answer_nearly_the_same() -> None:
    toy = Wide(max_output=4, caches=(128,), prefills=(64,), chunks=(1, 16))
    rng, took = np.random.default_rng(0), {}
    system = [int(t) for t in rng.integers(3, 11, 50)]
    for bits in (32, 8, 4):
        prefixes, same = Prefixes(1 << 20, bits), 0
        for tail in range(3, 11):
            prompt = [*system, tail]
            (plain,), (kept,) = generate(toy.run, toy.card, [prompt]), generate(toy.run, toy.card, [prompt], prefixes=prefixes)
            same += kept.tokens == plain.tokens
        took[bits] = prefixes.nbytes
        assert prefixes.hits == 7 and same >= (8 if bits == 32 else 6)
    assert took[4] < took[8] < took[32] / 1.5


def test_other_numbers_of_bits() -> None:
    with pytest.raises(SequenceError, match="5 bits"):
        Prefixes(100, 5)
