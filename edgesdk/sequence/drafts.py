"""Guesses of the next tokens, which the model checks several at once: the output stays what greedy decoding gives, it only comes sooner.

Nothing here is trained. `Copied`: input-guided aggressive decoding (arXiv 2205.10350), for answers that repeat the input. `Counted`: an
adaptive draft from counts of the last two tokens (ADED, arXiv 2407.12021). `Shallow`: the model's own first layers (Kangaroo,
arXiv 2404.18911) or a smaller one, where the bundle has a program with the role "draft". Standard library and numpy; Python 3.9 and later.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .programs import largest
from .session import Session

Drafter = Any
"""`propose(output, most)` and `learn(output, new)`."""


def drafter_of(kind: str, session: Session, prompt: Sequence[int], counted: Counted) -> Drafter:
    """A drafter for one answer; `counted` is shared by all of them."""
    return Copied(prompt) if kind == "copy" else Shallow(session) if kind == "exit" else counted


class Copied:
    """Goes on in the input from where the end of the output stands in it; at the start, from the input's start.

    Of several places the one behind the longest common end, then the one nearest to where the last guess came from.
    """

    LONGEST = 8

    def __init__(self, source: Sequence[int]) -> None:
        self.source = list(source)
        self.at = 0  # in the source: where the output is thought to be

    def propose(self, output: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `output`."""
        if output:
            best = None
            for i in (i for i, token in enumerate(self.source) if token == output[-1]):
                same = 1
                while same < min(self.LONGEST, i + 1, len(output)) and self.source[i - same] == output[-1 - same]:
                    same += 1
                score = (same, -abs(i + 1 - self.at))
                best = max(best, (score, i + 1)) if best else (score, i + 1)
            if best is None:
                return []
            self.at = best[1]
        return self.source[self.at : self.at + most]

    def learn(self, output: Sequence[int], new: int) -> None:
        """The last `new` tokens of `output` were found right."""
        self.at += new


class Counted:
    """Counts which token followed which two, over this and earlier outputs, and follows what is likely.

    A token's worth is its share of the times plus `explore`·√(ln n / times), as in upper confidence bounds, so that an answer seen once is tried
    again. At most `capacity` pairs are kept; the least lately used goes.
    """

    def __init__(self, capacity: int = 20000, explore: float = 0.1) -> None:
        self.capacity, self.explore = capacity, explore
        self.table: OrderedDict[tuple[int, int], dict[int, int]] = OrderedDict()

    def propose(self, output: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `output`."""
        a, b = ([-1, -1, *output])[-2:]
        drafted: list[int] = []
        while len(drafted) < most and (counts := self.table.get((a, b))):
            n = sum(counts.values())
            best = max(counts, key=lambda c: counts[c] / n + self.explore * math.sqrt(math.log(n) / counts[c]))
            drafted.append(best)
            a, b = b, best
        return drafted

    def learn(self, output: Sequence[int], new: int) -> None:
        """The last `new` tokens of `output` were found right."""
        padded = [-1, -1, *output]
        for i in range(len(padded) - new, len(padded)):
            key = (padded[i - 2], padded[i - 1])
            counts = self.table.setdefault(key, {})
            counts[padded[i]] = counts.get(padded[i], 0) + 1
            self.table.move_to_end(key)
        while len(self.table) > self.capacity:
            self.table.popitem(last=False)


class Shallow:
    """Runs the bundle's program with the role "draft": the first layers with a head of their own, over the session's own caches.

    Its keys and values are those of the model's first layers, so a guess costs no memory; the check writes them again. It stops where
    the draft's own probability falls below `sure`.
    """

    def __init__(self, session: Session, sure: float = 0.6) -> None:
        self.session, self.sure = session, sure

    def propose(self, output: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `output`, whose last token is not in the caches yet."""
        return self.session.sketch(int(output[-1]), most, self.sure) if output else []

    def learn(self, output: Sequence[int], new: int) -> None:
        """Nothing is learned."""


class Speculation:
    """Greedy decoding of one row in which a drafter guesses and one call of several tokens checks.

    `pays` holds guesses back while the tokens a check brings, on a running average, are worth less than what it costs more than a plain
    step (both measured on the way); after a pause it tries again.
    """

    REST = 16

    def __init__(self, session: Session, drafter: Drafter, adaptive: bool = True) -> None:
        self.session, self.drafter, self.adaptive = session, drafter, adaptive
        self.most = largest(session.decodes, "tokens") - 1
        self.told = dict.fromkeys(("steps", "checks", "drafted", "accepted"), 0)  # `checks`: steps with a guess
        self._plain, self._check, self._gain, self._resting = 0.0, 0.0, float(self.most), 0

    @property
    def pays(self) -> bool:
        if not self.adaptive or not self._plain or not self._check:
            return True
        if self._resting:
            self._resting -= 1
            return self._resting == 0
        if 1 + self._gain < self._check / self._plain:
            self._resting, self._gain = self.REST, self._gain + 0.5
            return False
        return True

    def step(self, output: Sequence[int], wanted: int) -> list[int]:
        """The next tokens after `output` (at least one, at most `wanted`), each what greedy decoding gives. `output` ends with the token
        that was decided last and is not in the caches yet."""
        room = int(self.session.room[0])
        most = min(self.most, wanted - 1, room - 1)
        began = time.perf_counter()
        guess = list(self.drafter.propose(output, most)) if most > 0 and self.pays else []
        fed = np.asarray([[output[-1], *guess]], np.int64)
        logits = self.session.feed(fed)
        best = [int(t) for t in np.argmax(logits[0], -1)]
        right = 0
        while right < len(guess) and best[right] == guess[right]:
            right += 1
        self.session.keep(np.asarray([min(1 + right, room)]))
        self._count(len(guess), right, time.perf_counter() - began)
        new = best[: right + 1]
        self.drafter.learn([*output, *new], len(new))
        return new

    def _count(self, guessed: int, right: int, seconds: float) -> None:
        told = self.told
        told["steps"] += 1
        if guessed:
            told["checks"], told["drafted"], told["accepted"] = told["checks"] + 1, told["drafted"] + guessed, told["accepted"] + right
            self._check = seconds if not self._check else 0.8 * self._check + 0.2 * seconds
            self._gain = 0.8 * self._gain + 0.2 * right
        else:
            self._plain = seconds if not self._plain else 0.8 * self._plain + 0.2 * seconds
