"""Which token comes next: the likeliest, or one drawn by temperature, top-k and top-p with a seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .card import Card, SequenceError

KINDS = ("copy", "count", "exit")
"""Ways of guessing, see `drafts`."""
_WHOLE = (int, np.integer)
_NUMBER = (int, float, np.integer, np.floating)


@dataclass(frozen=True)
class Settings:
    """How to generate. A temperature of 0 takes the likeliest token; `top_k` 0 and `top_p` 1 leave every token in."""

    max_tokens: int | None = None  # None: what the card allows
    max_time_s: float | None = None  # for the whole call
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0  # above 1: tokens that were there lose
    beams: int = 1
    best: int = 1  # answers of a beam search that are given
    length_penalty: float = 1.0  # a beam's score is its log probability / tokens ** this
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = field(default=())
    draft: str = (
        "auto"  # guesses that are checked several at once: "copy", "count", "exit" (see `drafts`), "none", "auto": what the card says
    )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Settings:
        """What `to_dict` gave, also as it is behind JSON. Raises `SequenceError` for a field that is none."""
        known = cls().to_dict()
        for name in fields:
            if name not in known:
                raise SequenceError(f"no setting '{name}'", f"known: {', '.join(known)}")
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        return cls(**given)

    def check(self, card: Card) -> int:
        """The number of tokens to write at most: the one place where settings are judged. Raises `SequenceError` naming what is wrong."""
        for name, kind, low, high in (
            ("max_tokens", _WHOLE, 1, card.max_output),
            ("max_time_s", _NUMBER, 1e-9, 1e9),
            ("temperature", _NUMBER, 0, 1e3),
            ("top_k", _WHOLE, 0, card.vocab),
            ("top_p", _NUMBER, 1e-6, 1),
            ("seed", _WHOLE, 0, 2**63),
            ("repetition_penalty", _NUMBER, 1e-3, 1e3),
            ("beams", _WHOLE, 1, card.vocab),
            ("best", _WHOLE, 1, self.beams),
            ("length_penalty", _NUMBER, -100, 100),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "max_time_s"):
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                raise SequenceError(f"{name} = {value!r}", "give a whole number" if kind is _WHOLE else "give a number")
            if not low <= value <= high:
                raise SequenceError(f"{name} = {value}", f"from {low:g} to {high:g} for this bundle")
        for name, one, wanted in (("stop", str, "texts"), ("stop_tokens", _WHOLE, "token ids")):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(v, one) and v != "" for v in value):
                raise SequenceError(f"{name} = {value!r}", f"give a tuple of {wanted}")
        if self.beams > 1 and self.temperature:
            raise SequenceError("beams and a temperature", "a beam search takes the likeliest answers; leave one of the two out")
        if (self.top_k or self.top_p < 1) and not self.temperature:
            raise SequenceError("top_k and top_p say what is drawn from, but nothing is drawn", "give a temperature, such as 1")
        self._check_draft(card)
        return card.max_output if self.max_tokens is None else int(self.max_tokens)

    @property
    def greedy(self) -> bool:
        return not self.temperature and self.beams == 1 and self.repetition_penalty == 1.0

    def drafts(self, card: Card) -> str:
        """The kind of guesses to make, or ""."""
        return "" if self.draft == "none" or not self.greedy else card.draft if self.draft == "auto" else self.draft

    def _check_draft(self, card: Card) -> None:
        if self.draft in ("none", "auto"):
            return
        if self.draft not in KINDS:
            raise SequenceError(f"draft = {self.draft}", f"known: {', '.join(KINDS)}, none, auto")
        if not self.greedy:
            raise SequenceError(
                f"draft = {self.draft} with drawing, beams or a penalty", "guesses are checked against greedy decoding; leave one out"
            )
        if not any(m["role"] == "decode" and m["tokens"] > 1 for m in card.methods.values()):
            raise SequenceError("the bundle has no program that decodes several tokens at once", "build it with some, or leave --draft out")
        if self.draft == "exit" and not any(m["role"] == "draft" for m in card.methods.values()):
            raise SequenceError(
                "the bundle has no program with the role 'draft'", "build it from a model with an early exit, or use copy or count"
            )


def _number(best: Any) -> Any:
    if not np.isfinite(best).all():
        raise SequenceError(
            "the program's scores are not numbers", "it is damaged, or its precision is too low for this prompt: build it in another"
        )
    return best


def penalized(logits: Any, seen: Iterable[int], penalty: float) -> Any:
    """Logits [V] where tokens that were `seen` are made less likely (Keskar et al. 2019: positive ones divided, negative ones multiplied)."""
    at = np.asarray(sorted(set(seen)), np.int64)
    if penalty == 1.0 or not len(at):
        return logits
    logits = np.array(logits, np.float64)
    logits[at] = np.where(logits[at] > 0, logits[at] / penalty, logits[at] * penalty)
    return logits


def log_softmax(logits: Any) -> Any:
    """Over the last axis, in float64. Raises `SequenceError` where they are not numbers."""
    x = np.asarray(logits, np.float64)
    x = x - _number(x.max(-1, keepdims=True))
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def probabilities(logits: Any, settings: Settings) -> Any:
    """What is drawn from [V]: after temperature, the `top_k` likeliest, of those the fewest that hold `top_p`."""
    kept, share = _drawn_from(logits, settings)
    out = np.zeros(np.shape(logits))
    out[kept] = share / share.sum()
    return out


def _drawn_from(logits: Any, settings: Settings) -> tuple[Any, Any]:
    """The tokens that may be drawn, in order, and what each weighs. With `top_k` nothing is computed of the others."""
    x = np.asarray(logits)
    most = float(_number(x.max()))

    def weights(of: Any) -> Any:
        return np.exp((np.asarray(of, np.float64) - most) / settings.temperature)

    if settings.top_k:
        kept = _likeliest(x, settings.top_k)
        share = weights(x[kept])
        held = share.sum()
    else:
        every = weights(x)
        if settings.top_p == 1:
            return slice(None), every
        kept, held = _likeliest(x, 64), every.sum()
        while len(kept) < len(x) and every[kept].sum() < settings.top_p * held:
            kept = _likeliest(x, 8 * len(kept))
        share = every[kept]
    inside = np.cumsum(share) - share < settings.top_p * held  # the token that reaches top_p stays in
    order = np.argsort(kept[inside])
    return kept[inside][order], share[inside][order]


def _likeliest(x: Any, count: int) -> Any:
    """The places of the `count` largest, largest first."""
    some = np.argpartition(x, len(x) - count)[len(x) - count :] if count < len(x) else np.arange(len(x))
    return some[np.argsort(-x[some], kind="stable")]


def choose(logits: Any, settings: Settings, rng: Any, seen: Iterable[int] = ()) -> int:
    """The next token of one row."""
    if settings.repetition_penalty != 1.0:
        logits = penalized(logits, seen, settings.repetition_penalty)
    if not settings.temperature:
        best = int(np.argmax(logits))
        _number(logits[best])
        return best
    kept, share = _drawn_from(logits, settings)
    edges = np.cumsum(share)
    at = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return at if isinstance(kept, slice) else int(kept[at])
