"""Greedy answers of a PyTorch model of the family, many at once: to score it, and as targets of a student. Devices use `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgesdk.compress.types import Step
from edgesdk.sequence.layers import Pair
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.pairs import Tokens, begun, padded
from edgesdk.sequence.positions import HIDDEN


def answers(
    model: SequenceModel,
    sources: Sequence[Tokens],
    *,
    start: int | None,
    end: int,
    pad: int = 0,
    longest: int,
    batch: int = 256,
    step: Step | None = None,
) -> list[list[int]]:
    """The tokens that follow `start`, `end` among them where it was met within `longest` tokens; CTC models answer without one."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found: dict[int, list[int]] = {}
    with torch.no_grad():
        for at in range(0, len(order), batch):
            if step:
                step("answering", at / len(order))
            rows = order[at : at + batch]
            device = next(model.parameters()).device
            before, starts = begun([sources[i] for i in rows], start, pad)
            given, tokens = padded(before, pad).to(device), torch.tensor(starts, device=device)[:, None]
            mask = (given == pad).to(torch.float32) * HIDDEN
            made = _ctc(model, given, mask, pad, end) if model.decoder is None else _greedy(model, given, mask, tokens, end, longest)
            found |= zip(rows, made, strict=True)
    return [found[i] for i in range(len(sources))]


def _ctc(model: SequenceModel, source: Tensor, mask: Tensor, pad: int, end: int) -> list[list[int]]:
    best = model(source, mask).argmax(-1).masked_fill(mask < 0, pad).tolist()
    return [[*(t for i, t in enumerate(row) if t != pad and (i == 0 or row[i - 1] != t)), end] for row in best]


def _greedy(model: SequenceModel, source: Tensor, source_mask: Tensor, tokens: Tensor, end: int, longest: int) -> list[list[int]]:
    count = len(source)
    cross: list[Pair] = []
    places = torch.zeros_like(tokens)
    mask: Tensor = source_mask.new_zeros(count, 1)
    if model.encoder is not None:
        cross = model.cross(model.encode(source, source_mask))
    else:
        before = torch.arange(source.shape[1], device=source.device).expand(count, -1)
        places = torch.cat([before, (source_mask == 0).sum(1, keepdim=True)], 1)
        tokens, mask = torch.cat([source, tokens], 1), torch.cat([source_mask, mask], 1)
    behind = source_mask if cross else None
    last = torch.full((count,), tokens.shape[1] - 1, device=source.device)
    logits, caches = model.prefill(tokens, places, last, mask, cross, behind)
    at, made, done = places[:, -1:], [], torch.zeros(count, dtype=torch.bool, device=source.device)
    for n in range(longest):
        made.append(logits.argmax(-1))
        done = done | (made[-1] == end)
        if bool(done.all()) or n + 1 == longest:
            break
        at, mask = at + 1, torch.cat([mask, mask.new_zeros(count, 1)], 1)
        places = torch.cat([places, at], 1)
        every, new = model.decode(made[-1][:, None], at, mask[:, None], caches, _window(model, mask, at - places), cross, behind)
        caches = [(torch.cat([k, a], 2), torch.cat([v, b], 2)) for (k, v), (a, b) in zip(caches, new, strict=True)]
        logits = every[:, 0]
    rows = torch.stack(made, 1).tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def _window(model: SequenceModel, mask: Tensor, back: Tensor) -> Tensor | None:
    """Layers with a window see so many of the last tokens (`back`: how far back each is); here their caches hold all."""
    assert model.config.decoder is not None
    window = max(model.config.decoder.windows, default=0)
    if not window:
        return None
    return (mask + (back >= window).to(torch.float32) * HIDDEN)[:, None]
