"""The sequence runtime: prompts in, tokens and text out, over any `run(method, arrays) → arrays`.

The files beside it (`card`, `programs`, `caches`, `session`, `choose`, `drafts`, `prefixes`, `gear`, `beam`, `tokens`) stand alone with it: standard library and numpy, Python 3.9
and later. They go to a device as they are. What is wrong is a `SequenceError`, which says what to do.

    card = Card.read(…); tokenizer = tokenizer_of(card, read)
    for event in stream(run, card, ["ten to six pm"], Settings(temperature=0.8, seed=1), tokenizer): …
    (result,) = generate(run, card, ["ten to six pm"], tokenizer=tokenizer)

Events are plain dicts: {"event": "token", "prompt": 0, "token": 17, "text": "1", "s": seconds since its prompt was begun} and, once for each
prompt, {"event": "done", "prompt": 0, "text": what was held back, "result": a Result as a dict}. A beam search gives only the latter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .beam import Hypothesis, Search, search
from .card import Card, SequenceError
from .choose import Settings, choose
from .drafts import Counted, Speculation, drafter_of
from .prefixes import Prefixes
from .programs import Halt, Programs, Run
from .session import Input, Session, encode
from .tokens import Text, Tokenizer

Event = dict[str, Any]


@dataclass
class Result:
    """One prompt's answer. `tokens` and `text` are without the end token and without a stop string.

    `stopped`: eos, stop, max-tokens, max-time, cancelled or cache-full. `token_s`: when each token came, in seconds since the prompt was begun.
    `calls`: method → how often it ran for this prompt and those that ran beside it.
    """

    tokens: list[int]
    text: str
    stopped: str
    prompt_tokens: int
    token_s: list[float] = field(default_factory=list)
    first_token_s: float | None = None
    total_s: float = 0.0
    tokens_per_s: float | None = None  # after the first token
    score: float | None = None
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    call_s: dict[str, float] = field(default_factory=dict)
    drafts: dict[str, Any] = field(default_factory=dict)  # where tokens were guessed: how many, and how many were right

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Row:
    """An answer that is under way."""

    prompt: int
    text: Text
    rng: Any
    seen: list[int]  # what the decoder has read and written: for the repetition penalty
    tokens: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    first_s: float | None = None
    stopped: str = ""
    last: bool = False  # its cache is full: one more token

    def over(self) -> bool:
        return bool(self.stopped)

    def take(self, token: int, now: float, cap: int, card: Card, settings: Settings) -> Event | None:
        """The next token; an event if it is part of the answer."""
        self.first_s = now if self.first_s is None else self.first_s
        if token in card.eos or token in settings.stop_tokens:
            self.stopped = "eos" if token in card.eos else "stop"
            return None
        self.tokens.append(token)
        self.seen.append(token)
        self.token_s.append(now)
        piece = self.text.add(token)
        if self.text.stopped:
            self.stopped = "stop"
        elif len(self.tokens) >= cap:
            self.stopped = "max-tokens"
        elif self.last:
            self.stopped = "cache-full"
        return {"event": "token", "prompt": self.prompt, "token": token, "text": piece, "s": now}


class _Job:
    """One call of `stream`."""

    def __init__(
        self,
        run: Run,
        card: Card,
        settings: Settings,
        tokenizer: Tokenizer | None,
        cancelled: Callable[[], bool] | None,
        prefixes: Prefixes | None,
    ) -> None:
        self.prefixes = prefixes
        self.card, self.settings, self.tokenizer = card, settings, tokenizer or Tokenizer({})
        self.cap, self.counted = settings.check(card), Counted()
        # numpy.random is imported when first asked for, which takes long: here, before the clock runs
        self._draws: Any = np.random.default_rng if settings.temperature else lambda seed: None
        self.programs, self.begun = Programs(card, run), time.perf_counter()
        self.programs.watch = self._watch
        self._cancelled = cancelled
        self.start = self.begun

    def _watch(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Halt("cancelled")
        if self.settings.max_time_s is not None and time.perf_counter() - self.begun >= self.settings.max_time_s:
            raise Halt("max-time")

    def now(self) -> float:
        return time.perf_counter() - self.start

    def open_lot(self) -> None:
        self.start, self.programs.calls, self.programs.seconds = time.perf_counter(), {}, {}

    def row(self, prompt: int, given: Input) -> _Row:
        seen = [*(() if self.programs.role("encode") else given), *self.card.start]
        return _Row(prompt, Text(self.tokenizer, self.settings.stop), self._draws([self.settings.seed, prompt]), seen)

    def finish(self, row: _Row, given: Input, **more: Any) -> Event:
        rest, gaps = row.text.end(), len(row.token_s) - 1
        rate = gaps / (row.token_s[-1] - row.token_s[0]) if gaps > 0 and row.token_s[-1] > row.token_s[0] else None
        result = Result(
            row.tokens, row.text.whole, row.stopped, int(np.shape(given)[-1]), row.token_s, row.first_s, self.now(), rate,
            calls=dict(self.programs.calls), call_s=dict(self.programs.seconds), **more,
        )  # fmt: skip
        return {"event": "done", "prompt": row.prompt, "text": rest, "result": result.to_dict()}

    def plain(self, first: int, inputs: Sequence[Input]) -> Iterator[Event]:
        """Greedy or drawn, all rows side by side."""
        self.open_lot()
        rows = [self.row(first + b, x) for b, x in enumerate(inputs)]
        try:
            session = Session(self.programs, inputs, prefixes=self.prefixes)
            logits = session.logits
            while True:
                for b, row in enumerate(rows):
                    if row.over():
                        continue
                    token = choose(logits[b], self.settings, row.rng, row.seen)
                    event = row.take(token, self.now(), self.cap, self.card, self.settings)
                    if event:
                        yield event
                    if row.over():
                        yield self.finish(row, inputs[b])
                counts = np.asarray([not row.stopped for row in rows], np.int64)
                if not counts.any():
                    return
                fed = [[row.tokens[-1] if row.tokens else self.card.pad] for row in rows]
                logits = session.feed(np.asarray(fed, np.int64), counts)[:, 0]
                kept = counts * (session.room > 0)
                session.keep(kept)
                for b, row in enumerate(rows):
                    row.last = bool(counts[b] and not kept[b])
        except Halt as halt:
            for b, row in enumerate(rows):
                if not row.stopped:
                    row.stopped = halt.reason
                    yield self.finish(row, inputs[b])

    def guessed(self, first: int, inputs: Sequence[Input]) -> Iterator[Event]:
        """Greedy, one row after the other, by guesses that are checked several at once."""
        for b, x in enumerate(inputs):
            self.open_lot()
            row, told = self.row(first + b, x), {}
            try:
                session = Session(self.programs, [x], prefixes=self.prefixes)
                prompt = [] if np.ndim(x) == 2 else [int(t) for t in x]
                speculation = Speculation(session, drafter_of(self.settings.drafts(self.card), session, prompt, self.counted))
                told = speculation.told
                yield from self._follow(row, session, speculation)
            except Halt as halt:
                row.stopped = halt.reason
            yield self.finish(row, x, drafts=told)

    def _follow(self, row: _Row, session: Session, speculation: Speculation) -> Iterator[Event]:
        output: list[int] = []
        new = [int(np.argmax(session.logits[0]))]
        while True:
            for token in new:
                output.append(token)
                event = row.take(token, self.now(), self.cap, self.card, self.settings)
                if event:
                    yield event
                if row.stopped:
                    return
            row.last = not session.room[0]
            new = speculation.step(output, self.cap - len(row.tokens))

    def beams(self, first: int, inputs: Sequence[Input]) -> Iterator[Event]:
        self.open_lot()
        rows = [self.row(first + b, x) for b, x in enumerate(inputs)]
        searches = [Search([Hypothesis([], 0.0, 0)], row.seen) for row in rows]
        reason = ""
        try:
            search(Session(self.programs, inputs, self.settings.beams, self.prefixes), searches, self.settings, self.cap, self._ends)
        except Halt as halt:
            reason = halt.reason
        for row, s, x in zip(rows, searches, inputs):  # noqa: B905 (Python 3.9)
            s.close(reason, self.settings)
            best = s.ended[0]
            answers = [
                {"tokens": h.tokens, "text": self._text(h.tokens).whole, "score": h.score(self.settings.length_penalty)} for h in s.ended
            ]
            row.stopped, row.tokens = best.stopped, best.tokens
            row.text = self._text(best.tokens)
            yield self.finish(
                row, x, score=answers[0]["score"], alternatives=answers[: self.settings.best] if self.settings.best > 1 else []
            )

    def _text(self, tokens: Sequence[int]) -> Text:
        text = Text(self.tokenizer, self.settings.stop)
        for t in tokens:
            text.add(t)
        return text

    def _ends(self, tokens: list[int]) -> str:
        """Why a hypothesis with these tokens ends, or ""."""
        if tokens[-1] in self.card.eos:
            return "eos"
        if tokens[-1] in self.settings.stop_tokens:
            return "stop-token"
        return "stop" if self.settings.stop and self._text(tokens).stopped else ""

    def ctc(self, first: int, inputs: Sequence[Input]) -> Iterator[Event]:
        """Encoder-only: the likeliest token of each place, repeats as one, blanks (the padding token) left out."""
        self.open_lot()
        rows = [self.row(first + b, x) for b, x in enumerate(inputs)]
        try:
            (logits, *_), mask, _ = encode(self.programs, inputs)
            for b, row in enumerate(rows):
                best = np.argmax(logits[b], -1)[mask[b] == 0]
                new = np.concatenate([[True], best[1:] != best[:-1]]) & (best != self.card.pad)
                row.stopped = "eos"
                for token in best[new]:
                    event = row.take(int(token), self.now(), self.cap, self.card, self.settings)
                    if event:
                        yield event
                    if row.stopped != "eos" or not event:
                        break
        except Halt as halt:
            for row in rows:
                row.stopped = row.stopped or halt.reason
        for row, x in zip(rows, inputs):  # noqa: B905
            yield self.finish(row, x)


def stream(
    run: Run,
    card: Card,
    prompts: Sequence[Any],
    settings: Settings | None = None,
    tokenizer: Tokenizer | None = None,
    cancelled: Callable[[], bool] | None = None,
    prefixes: Prefixes | None = None,
) -> Iterator[Event]:
    """Answer `prompts`, each a text, token ids, or float32 [F, frames] of sound, and give events as they come.

    `cancelled()` is asked before each call of a program; once it is true, every answer ends with what there is. `prefixes`, kept
    by the caller from call to call, spares reading again what prompts have in common (one prompt at a time). Raises `SequenceError`.
    """
    job = _Job(run, card, settings or Settings(), tokenizer, cancelled, prefixes)
    inputs = [_input(p, card, job.tokenizer) for p in prompts]
    if len({np.ndim(x) for x in inputs}) > 1:
        raise SequenceError("prompts of tokens and of sound", "give one kind at a time")
    ctc = card.layout == "encoder-ctc"
    if ctc and job.settings.beams > 1:
        raise SequenceError(f"beams = {job.settings.beams} for the layout {card.layout}", "leave --beams out")
    batches = [m["batch"] for m in job.programs.need("encode" if ctc else "decode", 1 << 30).values()]
    lot = max(1, max(batches) // job.settings.beams)
    guesses = lot == 1 and not ctc and job.settings.drafts(card)
    answer = job.ctc if ctc else job.beams if job.settings.beams > 1 else job.guessed if guesses else job.plain
    for first in range(0, len(inputs), lot):
        yield from answer(first, inputs[first : first + lot])


def generate(
    run: Run,
    card: Card,
    prompts: Sequence[Any],
    settings: Settings | None = None,
    tokenizer: Tokenizer | None = None,
    cancelled: Callable[[], bool] | None = None,
    prefixes: Prefixes | None = None,
) -> list[Result]:
    """`stream` to its end: one `Result` for each prompt, in their order."""
    results: dict[int, Result] = {}
    for event in stream(run, card, prompts, settings, tokenizer, cancelled, prefixes):
        if event["event"] == "done":
            results[event["prompt"]] = Result(**event["result"])
    return [results[i] for i in range(len(prompts))]


def _input(prompt: Any, card: Card, tokenizer: Tokenizer) -> Input:
    """Token ids or sound, checked."""
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt)
    given = np.asarray(prompt)
    if given.ndim == 3 and len(given) == 1:
        given = given[0]
    if given.ndim == 2 and given.size:
        if not any(m["role"] == "encode" for m in card.methods.values()):
            raise SequenceError(f"a prompt of sound for the layout {card.layout}", "give a text or token ids: this model reads tokens")
        return given.astype(np.float32)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise SequenceError(
            f"a prompt of {given.dtype}{list(given.shape)}", "give a text, whole numbers in a row, or [bins, frames] of sound"
        )
    ids = [int(t) for t in given]
    if not ids:
        raise SequenceError("the prompt is empty", "give some text")
    bad = next((t for t in ids if not 0 <= t < card.vocab), None)
    if bad is not None:
        raise SequenceError(f"token {bad} of the prompt", f"the model's vocabulary has ids from 0 to {card.vocab - 1}")
    return ids
