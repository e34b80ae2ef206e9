"""The time of whole answers on a device, by the loop that writes them. Stands alone with `generate`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .card import NAME, Card
from .choose import Settings
from .generate import Result, generate
from .programs import Run

TOKENS = 16
"""Tokens of a measured answer, end tokens passed over; fewer where the model writes fewer."""


def measure(
    run: Run, folder: str, inputs: Callable[[str], list[Any]], runs: int, warmup: int, tell: Callable[[str, float], None]
) -> list[dict[str, Any]]:
    """Raw seconds of `runs` answers by the bundle in `folder`, after `warmup`: to the first token, and a later token on the mean of its answer.

    `calls` of a row: how often each program ran for one sample. `inputs(method)` gives inputs of a method, from which a prompt is taken.
    Nothing where the model does not write token by token.
    """
    with open(os.path.join(folder, NAME), "rb") as file:
        card = Card.read(file.read())
    if not any(m["role"] == "decode" for m in card.methods.values()):
        return []
    card.eos = ()
    prompt = example(card, inputs)
    settings = Settings(max_tokens=min(TOKENS, card.max_output))
    before = generate(run, card, [prompt], Settings(max_tokens=1))[0].calls
    first, later, told = [], [], time.monotonic()
    for i in range(-warmup, runs):
        (result,) = generate(run, card, [prompt], settings)
        if i >= 0:
            first.append(result.first_token_s)
            later += [_later(result)] if len(result.tokens) > 1 else []
            if time.monotonic() - told > 0.5:
                told = time.monotonic()
                tell(f"answer {i + 1}/{runs}", (i + 1) / runs)
    count = len(result.tokens)
    rows: list[dict[str, Any]] = [{"method": f"first of {count} tokens", "first_s": None, "samples_s": first, "calls": before}]
    if later:
        after = {n: (c - before.get(n, 0)) / (count - 1) for n, c in result.calls.items() if c > before.get(n, 0)}
        rows.append({"method": "each later token", "first_s": None, "samples_s": later, "calls": after})
    return rows


def _later(result: Result) -> float:
    return (result.token_s[-1] - result.token_s[0]) / (len(result.token_s) - 1)


def example(card: Card, inputs: Callable[[str], list[Any]]) -> Any:
    """A prompt: what the inputs of the smallest program that reads one hold where they are not padded, without the tokens that answers begin with."""
    readers = {n: m for n, m in card.methods.items() if m["role"] == ("encode" if card.cross else "prefill")}
    if not readers:
        return [int(t) for t in np.arange(8) % card.vocab]
    name = min(readers, key=lambda n: readers[n]["source"] or readers[n]["tokens"])
    arrays = inputs(name)
    if card.cross:
        source, mask = arrays[0][0], arrays[1][0]
        return np.asarray(source, np.float32) if np.ndim(source) == 2 else [int(t) for t in source[mask == 0]] or [card.pad]
    tokens = [int(t) for t in arrays[0][0][arrays[3][0] == 0]]
    return tokens[: len(tokens) - len(card.start)] or [card.pad]
