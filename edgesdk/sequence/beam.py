"""Beam search over a session: for each prompt the `beams` likeliest beginnings are carried on side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .choose import Settings, log_softmax, penalized
from .programs import Halt
from .session import Session


@dataclass
class Hypothesis:
    """`log_p`: of all tokens, the one that ended it among them; `length` counts that one, too. `tokens` does not hold it."""

    tokens: list[int]
    log_p: float
    length: int
    stopped: str = ""

    def score(self, penalty: float) -> float:
        return float(self.log_p / max(self.length, 1) ** penalty)


@dataclass
class Search:
    """One prompt's search."""

    live: list[Hypothesis]
    seen: Sequence[int]  # the prompt's tokens, where the decoder read them
    ended: list[Hypothesis] = field(default_factory=list)
    done: bool = False

    def step(self, logits: Any, settings: Settings, ends: Callable[[list[int]], str]) -> list[int]:
        """Take the best continuations by `logits` [live, V]; the new live hypotheses' places among the old ones."""
        width, penalty = settings.beams, settings.length_penalty
        scores = log_softmax(logits)
        if settings.repetition_penalty != 1.0:
            scores = np.stack([penalized(s, [*self.seen, *h.tokens], settings.repetition_penalty) for s, h in zip(scores, self.live)])  # noqa: B905
        total = (scores + np.asarray([h.log_p for h in self.live])[:, None]).ravel()
        count = min(2 * width, total.size)
        best = np.argpartition(-total, count - 1)[:count]
        best = best[np.argsort(-total[best], kind="stable")]
        live: list[Hypothesis] = []
        parents: list[int] = []
        for rank, at in enumerate(best):
            parent, token = divmod(int(at), scores.shape[1])
            old = self.live[parent]
            tokens = [*old.tokens, token]
            if reason := ends(tokens):
                if rank < width:
                    kept = old.tokens if reason in ("eos", "stop-token") else tokens
                    self.ended.append(Hypothesis(kept, float(total[at]), len(tokens), reason.replace("-token", "")))
            elif len(live) < width:
                live.append(Hypothesis(tokens, float(total[at]), len(tokens)))
                parents.append(parent)
        self.ended = sorted(self.ended, key=lambda h: -h.score(penalty))[:width]
        self.live = live
        hopeless = len(self.ended) == width and (not live or live[0].score(penalty) <= self.ended[-1].score(penalty))
        self.done = hopeless or not live
        return parents

    def over(self) -> bool:
        return self.done

    def close(self, reason: str, settings: Settings) -> None:
        """No further token: those that are live end as they are."""
        if not self.done:
            for h in self.live:
                h.stopped = reason
            self.ended += self.live
        self.ended = sorted(self.ended, key=lambda h: -h.score(settings.length_penalty))[: settings.beams]
        self.done = True


def search(session: Session, searches: Sequence[Search], settings: Settings, cap: int, ends: Callable[[list[int]], str]) -> None:
    """Run `searches`, one for each prompt of the session, to their end (or to a `Halt`, after which each holds what there is)."""
    width = settings.beams
    logits, last = session.logits, np.zeros(len(searches), bool)
    try:
        for length in range(1, cap + 1):
            order, tokens = np.arange(session.rows), np.zeros((session.rows, 1), np.int64)
            counts = np.zeros(session.rows, np.int64)
            for p, s in enumerate(searches):
                if s.done:
                    continue
                first = p * width
                parents = s.step(logits[first : first + len(s.live)], settings, ends)
                if length == cap or last[p]:
                    s.close("max-tokens" if length == cap else "cache-full", settings)
                if not parents or s.over():
                    continue
                rows = slice(first, first + len(parents))
                order[rows] = first + np.asarray(parents)
                tokens[rows, 0] = [h.tokens[-1] for h in s.live]
                counts[rows] = 1
            if not counts.any():
                return
            session.reorder(order)
            logits = session.feed(tokens, counts)[:, 0]
            kept = counts * (session.room > 0)
            session.keep(kept)
            for p in range(len(searches)):
                last[p] = counts[p * width] and not kept[p * width]
    except Halt as halt:
        for s in searches:
            s.close(halt.reason, settings)
        raise
