"""`teach`: training of a model of the family on pairs of source and target, from labels, from a teacher, or from both.

A teacher may be of another layout (a decoder-only teacher, an encoder-decoder student), of other widths and depths: the two are compared where both
give the next token of the target, wherever that stands in their sequences. Sources: Hinton et al. (arXiv:1503.02531) for logits, FitNets
(arXiv:1412.6550) for hidden states, Kim and Rush (arXiv:1606.07947) for a teacher's own answers as targets (`answered`).
The loop, its schedule and its resuming are those of `edgesdk.compress.training`: step n depends on the seed and on n alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from edgesdk.compress.features import Comparison
from edgesdk.compress.training import Outcome, Pace, Training
from edgesdk.compress.types import Step
from edgesdk.errors import InputError
from edgesdk.model import Method, ModelSpec
from edgesdk.sequence.answers import answers
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.pairs import IGNORED, Batch, Batches, Pairs, padded
from edgesdk.sequence.positions import HIDDEN

KEPT_BYTES = 512 * 2**20  # of a teacher's values that are made once, before the first step; more are made anew in every step
Student = Callable[[int, Batch], Sequence[Tensor]]
"""Step and batch → logits [B, T, V], one or several, all of which are taught."""


class TeachConfig(Pace):
    """`rate` is a step as a share of a weight's typical size; a model that starts from nothing wants about 0.03, one that is adapted about 0.01."""

    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    rate: Annotated[float, Field(gt=0, le=1)] = 0.03
    batch: Annotated[int, Field(ge=1, le=65536)] = 64
    held: Annotated[int, Field(ge=1, le=4096)] = 64  # pairs (the last ones) that are only measured
    labels: Annotated[float, Field(ge=0)] = 1.0  # weight of the cross-entropy with the targets
    logits: Annotated[float, Field(ge=0)] = 1.0  # weight of the divergence from the teacher's distributions
    temperature: Annotated[float, Field(gt=0)] = 1.0
    features: Literal["none", "mse", "cka"] = "none"  # what compares hidden states of the decoders, halfway and at the end
    hidden: Annotated[float, Field(ge=0)] = 1.0  # weight of that
    device: str = "cpu"  # as PyTorch names it: "cuda", "cuda:1"


def forced(model: SequenceModel, batch: Batch, pad: int) -> Tensor:
    """Logits [B, T, V] for `batch.wanted`; of an encoder-only model, [B, S, V]."""
    mask = (batch.source == pad).to(torch.float32) * HIDDEN
    logits: Tensor = model(batch.source, mask, batch.given)
    return logits


def answered(
    teacher: SequenceModel, pairs: Pairs, *, bare: bool = False, longest: int = 0, batch: int = 256, step: Step | None = None
) -> Pairs:
    """The same sources with what `teacher` answers to them as targets; answers of more than `longest` tokens (0: the longest target's) are cut."""
    longest = longest or max(len(t) for t in pairs.targets)
    start = None if bare else pairs.start
    found = answers(teacher, pairs.sources, start=start, end=pairs.end, pad=pairs.pad, longest=longest, batch=batch, step=step)
    return replace(pairs, targets=[[*a[: longest - 1], pairs.end] if pairs.end not in a else a for a in found])


def teach(
    model: SequenceModel, pairs: Pairs, config: TeachConfig | None = None, *, teacher: SequenceModel | None = None, bare: bool = False,
    student: Student | None = None, step: Step | None = None,
) -> Outcome:  # fmt: skip
    """Train `model` in place; what was there before is put back where that is better on the pairs held out.

    A run that was cut off goes on where it was, with the same result: state is kept in the cache, by content. `bare`: the teacher wants
    no start token between source and target (a pretrained decoder-only model). `student`: what is taught instead of the model's own logits
    (exits, sub-models); without a teacher the later ones learn from the first, too. Raises `InputError`.
    """
    config = config or TeachConfig()
    device = _device(config.device)
    homes = [(m, next(m.parameters()).device) for m in (model, teacher) if m is not None]
    for m, _ in homes:
        m.to(device).eval()  # no layer of the family behaves otherwise in training
    course = PairsCourse(model, pairs, config, teacher, bare, student)
    name = f"teach ({model.config.layout})"
    spec = ModelSpec(name=name, digest="", methods={"forward": Method(model, ())})
    try:
        more = course.comparison.parameters if course.comparison else []
        return Training(spec, course, {}, list(model.parameters()), config, more=more, name=name).run(step or (lambda text, share: None))
    finally:
        for m, home in homes:
            m.to(home)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device = '{name}': {str(error).splitlines()[0]}", "give one that this PyTorch can use: cpu, or cuda where there is a GPU"
        ) from None
    return device


@dataclass(frozen=True)
class _Values:
    """What one side gives for a batch: logits [B, T, V], hidden states [B, T, dim] each."""

    logits: Tensor
    hidden: list[Tensor]


class PairsCourse:
    """The course that `Training` follows here."""

    def __init__(
        self, model: SequenceModel, pairs: Pairs, config: TeachConfig, teacher: SequenceModel | None = None, bare: bool = False,
        student: Student | None = None,
    ) -> None:  # fmt: skip
        if config.held >= len(pairs):
            raise InputError(f"held = {config.held} of {len(pairs)} pairs leaves none to learn from", "give more pairs, or hold fewer out")
        self.model, self.config, self.teacher, self.own = model, config, teacher, student
        self.pad, self.ctc = pairs.pad, model.config.layout == "encoder-ctc"
        self.device = next(model.parameters()).device
        self.train, self.held = pairs.split(config.held)
        self.theirs = [replace(p, start=None) if bare else p for p in (self.train, self.held)]  # as the teacher reads them
        self.batches = Batches(self.train.lengths(), config.batch, config.seed)
        self.comparison: Comparison | None = None
        self.taps: tuple[list[int], list[int]] = ([], [])
        self.kept: list[_Values] | None = None
        self.digest = _digest(pairs, teacher) + str(bare)
        if teacher is not None:
            self._meet(teacher)

    def _meet(self, teacher: SequenceModel) -> None:
        own, theirs = self.model.config, teacher.config
        if own.vocab != theirs.vocab:
            raise InputError(f"a teacher of {theirs.vocab} tokens for a student of {own.vocab}", "they must share one vocabulary")
        if self.ctc or theirs.layout == "encoder-ctc":
            raise InputError(
                f"{theirs.layout} cannot teach {own.layout} by logits: a CTC model's do not stand at tokens of the target",
                "train on what it answers: `answered`",
            )
        if self.config.features != "none" and self.own is None:
            assert own.decoder and theirs.decoder
            halves = [2, 1] if min(own.decoder.layers, theirs.decoder.layers) > 1 else [1]
            self.taps = tuple([-(-s.layers // h) - 1 for h in halves] for s in (own.decoder, theirs.decoder))  # type: ignore[assignment]
            batch = self.train.batch([0]).to(self.device)
            with torch.no_grad():
                mine = self._values(self.model, batch, self.taps[0])
                right = self._values(teacher, self.theirs[0].batch([0]).to(self.device), self.taps[1])
            flat, other = ([h.flatten(0, 1) for h in v.hidden] for v in (mine, right))
            self.comparison = Comparison(self.config.features, flat, other, own.vocab, self.config.seed)
            self.comparison.maps = [m.detach().to(self.device).requires_grad_(m.requires_grad) for m in self.comparison.maps]
        widths = theirs.vocab + sum([theirs.decoder.dim for _ in self.taps[1]] if theirs.decoder else [])
        if 4 * widths * sum(len(t) for t in self.train.targets) <= KEPT_BYTES:
            self.kept = self._all(teacher)

    def _all(self, teacher: SequenceModel) -> list[_Values]:
        """The teacher's values for every pair it trains on, [1, T, …] each without padding; in batches that depend on the lengths alone."""
        order = sorted(range(len(self.train)), key=self.train.lengths().__getitem__)
        kept: dict[int, _Values] = {}
        for i in range(0, len(order), 256):
            batch = self.theirs[0].batch(order[i : i + 256]).to(self.device)
            with torch.no_grad():
                made = self._values(teacher, batch, self.taps[1])
            for at, row in enumerate(batch.rows):
                n = len(self.train.targets[row])
                kept[row] = _Values(made.logits[at, :n].clone(), [h[at, :n].clone() for h in made.hidden])
        return [kept[i] for i in range(len(self.train))]

    def _values(self, model: SequenceModel, batch: Batch, taps: Sequence[int]) -> _Values:
        seen: dict[int, Tensor] = {}
        with ExitStack() as undo:
            for tap in set(taps):
                assert model.decoder is not None

                def note(_: Any, inputs: Any, out: Any, tap: int = tap) -> None:
                    seen[tap] = out[0][:, -batch.given.shape[1] :]

                undo.callback(model.decoder.layers[tap].register_forward_hook(note).remove)
            logits = forced(model, batch, self.pad)
        return _Values(logits, [seen[t] for t in taps])

    def _right(self, batch: Batch, held: bool) -> _Values | None:
        """What the teacher gives for a batch."""
        if self.teacher is None:
            return None
        if self.kept is None or held:
            with torch.no_grad():
                return self._values(self.teacher, self.theirs[held].batch(batch.rows).to(self.device), self.taps[1])
        rows = [self.kept[i] for i in batch.rows]
        return _Values(_stacked([r.logits for r in rows]), [_stacked([r.hidden[i] for r in rows]) for i in range(len(self.taps[1]))])

    def loss(self, step: int, values: Any = None) -> Tensor:
        return self._loss(step, self.train.batch(self.batches[step]).to(self.device), False)

    def held_out(self, values: Any = None) -> float:
        """The mean over the pairs held out."""
        total = 0.0
        with torch.no_grad():
            for at in range(0, len(self.held), self.config.batch):
                rows = list(range(len(self.held)))[at : at + self.config.batch]
                total += len(rows) * float(self._loss(-1, self.held.batch(rows).to(self.device), True))
        return total / len(self.held)

    def _loss(self, n: int, batch: Batch, held: bool) -> Tensor:
        right = self._right(batch, held)
        hidden: list[Tensor] = []
        if self.own is not None:
            found = list(self.own(n, batch))
        else:
            mine = self._values(self.model, batch, self.taps[0])
            found, hidden = [mine.logits], mine.hidden
        asked = batch.wanted != IGNORED
        losses = []
        for i, logits in enumerate(found):
            loss = self.config.labels * self._labels(logits, batch) if self.config.labels else logits.new_zeros(())
            teaching = right.logits if right else (found[0].detach() if i else None)
            if teaching is not None and self.config.logits:
                loss = loss + self.config.logits * divergence(logits[asked], teaching[asked], self.config.temperature)
            losses.append(loss)
        total = torch.stack(losses).mean()
        if self.comparison is not None and right is not None:
            own, theirs = ([h[asked] for h in side] for side in (hidden, right.hidden))
            total = total + self.config.hidden * self.comparison(own, theirs, right.logits[asked])
        return total

    def _labels(self, logits: Tensor, batch: Batch) -> Tensor:
        if not self.ctc:
            return F.cross_entropy(logits.flatten(0, 1), batch.wanted.flatten(), ignore_index=IGNORED)
        times, lengths = (batch.source != self.pad).sum(1), (batch.wanted != IGNORED).sum(1) - 1  # an end says nothing here
        wanted = batch.wanted.clamp_min(0)
        return F.ctc_loss(torch.log_softmax(logits, -1).transpose(0, 1), wanted, times, lengths, blank=self.pad, zero_infinity=True)


def divergence(got: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence in nats of [rows, V] from what is wanted, at a temperature whose gradients are scaled back."""
    right = torch.log_softmax(wanted / temperature, -1)
    return temperature**2 * (right.exp() * (right - torch.log_softmax(got / temperature, -1))).sum(-1).mean()


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """[T, …] each → [rows, longest T, …], zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _digest(pairs: Pairs, teacher: SequenceModel | None) -> str:
    total = hashlib.sha256()
    for rows in (pairs.sources, pairs.targets):
        total.update(padded(rows, -1).numpy().tobytes())
    for name, value in teacher.state_dict().items() if teacher is not None else ():
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
