"""What a compressed model is trained on: inputs, and how far its answers are from those of the uncompressed model. No labels are used.

A model of one call is compared output by output. A sequence model is run as it is used: `encode` or `prefill`, and a `decode` a token on the teacher's
greedy answer, every cache the student's own, so that all its errors count as they add up; only its logits are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from edgesdk.compress.generated import Answers, Calls, Chain, Values, chain_of, more_rows, more_texts, self_generated, stacked
from edgesdk.errors import InputError

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

Data = Literal["auto", "calibration", "self"]
Loss = Literal["auto", "logits", "values"]
MIXED = 0.9  # share of the samples that become mixtures
HELD = 8  # one in so many samples is only for measuring


@dataclass
class Set:
    """Samples of one method, or (with a chain) sources with the teacher's answers; the last of them are held out."""

    method: str
    inputs: list[torch.Tensor]  # [count, *shape] each
    own: list[torch.Tensor]  # as the student takes them, which may be of another layout
    chain: Chain | None = None
    answers: Answers | None = None

    @property
    def count(self) -> int:
        return len(self.inputs[0])

    @property
    def held(self) -> int:
        return min(64, self.count // HELD)


class Course(Protocol):
    """What a training follows: the loss of step n, and that on what is held out; `digest` says what it is made of."""

    @property
    def digest(self) -> str: ...
    def loss(self, step: int, values: Values | None = None) -> torch.Tensor: ...
    def held_out(self, values: Values | None = None) -> float: ...


class Lessons:
    """Batches of samples and the student's loss on them; what step `n` sees depends on `seed` and n alone."""

    def __init__(
        self, student: ModelSpec, teacher: ModelSpec, *, data: Data = "auto", pool: int = 512, batch: int = 16, loss: Loss = "auto", mix: bool = True,
        cache_bits: int = 16, whole: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.student, self.teacher = Calls(student), Calls(teacher)
        self.batch, self.mix, self.seed, self.cache_bits = batch, mix, seed, cache_bits
        chain = chain_of(teacher) if whole else None
        self.chain = chain_of(student) if chain else None
        if chain is not None and self.chain is None:
            raise InputError(f"{student.name} answers no sequences as {teacher.name} does", "give another layout of the same model")
        sequence = teacher.layout != "plain"
        self.soft = loss == "logits" or (loss == "auto" and (sequence or teacher.quality_name == "accuracy"))
        rows = self._rows(teacher, chain, data, pool)
        self.sets = [Set(m, inputs, inputs, chain) for m, found in rows.items() for inputs in stacked(found)]
        order = torch.Generator().manual_seed(seed)
        for s in self.sets:
            if s.count < 2 and len(self.sets) == 1:
                raise InputError(f"{teacher.name} has one calibration input for {s.method}", "training needs at least 2, better 64")
            shuffled = torch.randperm(s.count, generator=order)
            s.inputs = s.own = [x[shuffled] for x in s.inputs]
            if chain is not None and self.chain is not None:
                s.answers = _answers(self.teacher, chain, s.inputs)
                if self.chain.reads != chain.reads:
                    s.own = stacked(self.chain.inputs(chain.texts(list(zip(*s.inputs, strict=True)))))[0]

    def _rows(self, teacher: ModelSpec, chain: Chain | None, data: Data, pool: int) -> dict[str, list[tuple[Any, ...]]]:
        if data == "self":
            return self_generated(teacher, pool, seed=self.seed)
        if teacher.calibration is None:
            raise InputError(
                f"{teacher.name} has no calibration data", 'give the model a calibration function, or (language models) data="self"'
            )
        answer: dict[str, list[tuple[Any, ...]]] = {}
        for method in [chain.first] if chain else list(teacher.methods):
            found = chain.samples(teacher) if chain else list(teacher.calibration(method))
            found = found[:: max(1, len(found) // pool)][:pool]
            if data == "auto" and 1 < len(found) < pool:
                if chain and not found[0][0].is_floating_point():
                    found += chain.inputs(more_texts(chain.texts(found), pool - len(found), seed=self.seed))
                elif _is_tokens(found):
                    rows = torch.cat([f[0].reshape(1, -1) for f in found])
                    found += [(r.reshape(found[0][0].shape),) for r in more_rows(rows, pool - len(found), seed=self.seed)]
            answer[method] = found
        return answer

    @property
    def digest(self) -> str:
        return self.teacher.spec.digest

    def drawn(self, step: int) -> tuple[Set, torch.Tensor, torch.Generator]:
        """The set and the indices of a step's samples."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        shares = torch.tensor([float(s.count - s.held) for s in self.sets])
        chosen = self.sets[int(torch.multinomial(shares, 1, generator=generator))]
        free = chosen.count - chosen.held
        return chosen, torch.randperm(free, generator=generator)[: self.batch], generator

    def loss(self, step: int, values: Values | None = None) -> torch.Tensor:
        chosen, index, generator = self.drawn(step)
        inputs = [x[index] for x in chosen.own]
        if self.mix and chosen.chain is None and all(x.is_floating_point() for x in inputs) and len(index) > 1:
            share = torch.rand(len(index), generator=generator)
            share = torch.where(torch.rand(len(index), generator=generator) < MIXED, share, 1.0)
            other = torch.randperm(len(index), generator=generator)
            inputs = [_mixed(x, x[other], share) for x in inputs]
        return self._gap(chosen, inputs, index, values)

    def held_out(self, values: Values | None = None) -> float:
        """The mean loss on the samples that are never trained on (on all, where there are too few). Earlier stages may have been fitted to every
        calibration input: of float inputs, mixtures of two are taken, which are new to all."""
        losses, total = 0.0, 0
        with torch.no_grad():
            for s in self.sets:
                index, inputs = self._held(s)
                for part in chunks(0, len(index), self.batch):
                    losses += len(part) * float(self._gap(s, [x[part] for x in inputs], index[part], values))
                    total += len(part)
        return losses / max(1, total)

    def _held(self, s: Set) -> tuple[torch.Tensor, list[torch.Tensor]]:
        index = torch.arange(s.count - s.held if s.held > 1 else 0, s.count)
        inputs = [x[index] for x in s.own]
        if s.chain is not None or not all(x.is_floating_point() for x in inputs) or len(index) < 2:
            return index, inputs
        shifts = range(1, min(len(index), 1 + max(1, 64 // len(index))))
        share = torch.linspace(0.5, 0.9, len(index))
        mixed = [torch.cat([_mixed(x, x.roll(k, 0), share.roll(k, 0)) for k in shifts]) for x in inputs]
        return index.repeat(len(shifts)), mixed

    def _gap(self, chosen: Set, inputs: Sequence[torch.Tensor], index: torch.Tensor, values: Values | None) -> torch.Tensor:
        if self.chain is not None and chosen.answers is not None:
            a = chosen.answers
            steps = int(a.valid[index].sum(1).max())
            wanted = Answers(a.tokens[index, :steps], a.logits[index, :steps], a.valid[index, :steps])
            got = self.chain.answer(self.student, inputs, values, wanted, _keeper(self.cache_bits))
            return gap(got.logits[wanted.valid], wanted.logits[wanted.valid], self.soft)
        with torch.no_grad():
            right = [o for o in self.teacher(chosen.method, inputs) if o.is_floating_point()]
        out = [o for o in self.student(chosen.method, inputs, values) if o.is_floating_point()]
        soft = self.soft and chosen.method != "encode"
        return torch.stack([gap(o, r, soft and i == 0) for i, (o, r) in enumerate(zip(out, right, strict=True))]).sum()


def chunks(start: int, end: int, size: int) -> list[torch.Tensor]:
    """The numbers from start to end - 1, at most `size` together."""
    return [torch.arange(i, min(end, i + size)) for i in range(start, end, size)]


def gap(got: torch.Tensor, wanted: torch.Tensor, soft: bool) -> torch.Tensor:
    """The squared error over the variance; for logits also the divergence of the distributions over the last dimension."""
    if wanted.shape[-1:] and soft and wanted.shape[-1] > 1:
        # what all logits have in common says nothing
        got, wanted = got - got.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True)
    error = ((got - wanted) ** 2).mean() / (wanted.var(unbiased=False) + 1e-6)
    if not soft or wanted.shape[-1] < 2:
        return error
    right = torch.log_softmax(wanted, -1)
    return error + (right.exp() * (right - torch.log_softmax(got, -1))).sum(-1).mean()


def _mixed(x: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    s = share.reshape(-1, *[1] * (x.dim() - 1))
    return s * x + (1 - s) * other


def _is_tokens(rows: Sequence[tuple[Any, ...]]) -> bool:
    first = rows[0]
    return len(first) == 1 and not first[0].is_floating_point() and first[0].dim() == 2 and first[0].shape[0] == 1 and first[0].shape[1] > 4


def _keeper(bits: int) -> Any:
    if bits >= 16:
        return None
    return lambda cache: cache + (stored_cache(cache.detach(), bits) - cache.detach())


def stored_cache(cache: torch.Tensor, bits: int) -> torch.Tensor:
    """A cache as it comes back from `bits` a value: symmetric, one float16 scale for each head and position (the last dimension)."""
    top = 2 ** (bits - 1) - 1
    scale = (cache.abs().amax(-1, keepdim=True) / top).clamp(6e-8, 65504).to(torch.float16).float()
    rounded: torch.Tensor = torch.clamp(torch.round(cache / scale), -top, top) * scale
    return rounded


def _answers(calls: Calls, chain: Chain, inputs: Sequence[torch.Tensor]) -> Answers:
    """The teacher's answers to all sources, padded to one length."""
    with torch.no_grad():
        parts = [chain.answer(calls, [x[i] for x in inputs]) for i in chunks(0, len(inputs[0]), 64)]
    longest = max(p.tokens.shape[1] for p in parts)

    def padded(x: torch.Tensor) -> torch.Tensor:
        extra = longest - x.shape[1]
        return torch.cat([x, x.new_zeros(len(x), extra, *x.shape[2:])], 1)

    return Answers(*(torch.cat([padded(getattr(p, k)) for p in parts]) for k in ("tokens", "logits", "valid")))
