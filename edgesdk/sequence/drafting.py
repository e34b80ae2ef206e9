"""Whether guessed tokens pay: what a drafter would have got right in known answers, against what a check costs more than a plain step.

Nothing is run but the drafters: a greedy answer is what it is, however it was found, so a guess can be replayed against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from edgesdk.noun import Noun
from edgesdk.plan.types import Drafting
from edgesdk.sequence.drafts import Copied, Counted

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec
    from edgesdk.sequence.card import Card

PAYS = 1.05
"""Answers must be predicted to be so many times faster; less is within the error of a prediction."""
REPLAYED = ("copy", "count")


@dataclass
class Counts:
    """Of answers with guesses: calls that checked one, plain calls, tokens guessed and found right, and tokens written."""

    checks: int = 0
    plain: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    sketched: int = 0  # calls of a program that guesses


def replay(kind: str, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], most: int) -> Counts:
    """What the drafter `kind` ("copy" or "count") would have done while these greedy `answers` (token ids, the end token among them where it
    came) were written one at a time, with guesses of at most `most` tokens. The first token of an answer comes before any guess."""
    counts = Counts()
    for prompt, answer in zip(prompts, answers, strict=True):
        drafter = Copied(prompt) if kind == "copy" else Counted()
        done = 1
        while done < len(answer):
            guess = list(drafter.propose(answer[:done], most))
            right = 0
            while right < len(guess) and done + right < len(answer) and guess[right] == answer[done + right]:
                right += 1
            new = min(right + 1, len(answer) - done)
            counts.checks, counts.plain = counts.checks + bool(guess), counts.plain + (not guess)
            counts.drafted, counts.accepted, counts.tokens = counts.drafted + len(guess), counts.accepted + right, counts.tokens + new
            done += new
            drafter.learn(answer[:done], new)
    return counts


def weigh(
    card: Card,
    seconds: Mapping[str, float],
    prompts: Sequence[Any],
    answers: Sequence[Sequence[int]],
    exits: Mapping[str, Counts] | None = None,
    kinds: Sequence[str] = REPLAYED,
) -> Drafting | None:
    """The best way of guessing, whether it pays or not; None where the bundle has no program that decodes several tokens, or there is
    no text to replay.

    `seconds` of one call of each method, predicted or measured; programs of several lengths count alike.
    `exits`: decode of several tokens → what an early exit did (see `exit_counts`).
    `kinds`: what is replayed.
    """
    decodes = {n: m for n, m in card.methods.items() if m["role"] == "decode"}
    texts = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(a) > 1 and isinstance(p, Sequence)]
    found: list[Drafting] = []
    for tokens in sorted({m["tokens"] for m in decodes.values()} - {1} if texts else ()):
        wide = [n for n, m in decodes.items() if m["tokens"] == tokens]
        tried = {kind: replay(kind, [p for p, _ in texts], [a for _, a in texts], tokens - 1) for kind in kinds}
        if shallow := next((exits[n] for n in wide if exits and n in exits), None):
            tried["exit"] = shallow
        times = [t for n in wide if (t := _times(card, seconds, n, texts, tried))]
        for kind, counts in tried.items() if times else ():
            speedup = sum(before for before, _ in times) / sum(after[kind] for _, after in times)
            rate = counts.accepted / counts.drafted if counts.drafted else None
            found.append(Drafting(kind=kind, tokens=tokens, rate=rate, answers=len(texts), speedup=speedup, pays=speedup >= PAYS))
    return max(found, key=lambda d: d.speedup, default=None)


def _times(
    card: Card, seconds: Mapping[str, float], name: str, texts: Sequence[tuple[Any, Sequence[int]]], tried: Mapping[str, Counts]
) -> tuple[float, dict[str, float]] | None:
    """Seconds of all `texts` with the programs beside the decode `name`, plainly and with each way of guessing; None without a plain one."""
    wide = card.methods[name]
    beside = {n: m for n, m in card.methods.items() if _beside(m, wide)}
    plain = next((n for n, m in beside.items() if m["role"] == "decode" and m["tokens"] == 1), None)
    if plain is None:
        return None
    once = len(texts) * sum(_mean(card, seconds, role, wide["source"]) for role in ("encode", "prefill"))
    guess = next((seconds[n] for n, m in beside.items() if m["role"] == "draft"), 0.0)
    guessed = {k: c.checks * seconds[name] + c.plain * seconds[plain] + c.sketched * guess for k, c in tried.items()}
    return once + sum(len(a) - 1 for _, a in texts) * seconds[plain], {k: once + t for k, t in guessed.items()}


def _beside(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two programs serve the same batch, source and cache."""
    return all(one[k] == other[k] for k in ("batch", "source", "cache"))


def _mean(card: Card, seconds: Mapping[str, float], role: str, source: int) -> float:
    """Of one call of the programs that begin an answer; of several lengths, their mean."""
    found = [seconds[n] for n, m in card.methods.items() if m["role"] == role and m["source"] == source]
    return sum(found) / len(found) if found else 0.0


class Answers(Noun):
    KIND: ClassVar[str] = "greedy-answers"

    tokens: tuple[tuple[int, ...], ...]  # with the end token, where it came


def answers_of(spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """What the float model answers to its own prompts, greedily; kept in the cache by content."""
    from edgesdk import __version__
    from edgesdk.cache import cached

    return cached("answers", f"{spec.digest[:32]}-{__version__}", Answers, lambda: _answered(spec)).tokens


def _answered(spec: ModelSpec) -> Answers:
    from edgesdk.plan.fake_quant import run
    from edgesdk.sequence.card import NAME, Card
    from edgesdk.sequence.choose import Settings
    from edgesdk.sequence.generate import generate

    card = Card.read(spec.files[NAME])
    results = generate(run(spec), card, spec.prompts, Settings(draft="none"))
    return Answers(tokens=tuple((*r.tokens, *(card.eos[:1] if r.stopped == "eos" else ())) for r in results))


def exit_counts(spec: ModelSpec, card: Card, answers: Sequence[Sequence[int]]) -> dict[str, Counts]:
    """What the model's early exit guesses right in its own answers, by the float model: decode of several tokens → counts; empty without an exit."""
    from edgesdk.plan.fake_quant import run
    from edgesdk.sequence.drafts import Shallow, Speculation
    from edgesdk.sequence.programs import Programs
    from edgesdk.sequence.session import Session

    wide = [n for n, m in card.methods.items() if m["role"] == "decode" and m["tokens"] > 1]
    if not any(m["role"] == "draft" for m in card.methods.values()) or len(wide) != 1:
        return {}
    counts = Counts()
    for prompt, answer in zip(spec.prompts, answers, strict=True):
        programs = Programs(card, run(spec))
        session = Session(programs, [prompt])
        speculation = Speculation(session, Shallow(session), adaptive=False)
        output = list(answer[:1])
        while len(output) < len(answer):
            output += speculation.step(output, len(answer) - len(output) + 1)
        told = speculation.told
        counts.checks, counts.plain = counts.checks + told["checks"], counts.plain + told["steps"] - told["checks"]
        counts.drafted, counts.accepted = counts.drafted + told["drafted"], counts.accepted + told["accepted"]
        counts.tokens += len(answer) - 1
        counts.sketched += sum(n for name, n in programs.calls.items() if card.methods[name]["role"] == "draft")
    return {wide[0]: counts}
