"""Fewer layers for some tokens, fixed before anything runs: every schedule is made of ordinary programs of static shapes.

unified      so many layers for every token, the first and the last among them and the rest evenly spread (Unified Layer Skipping, arXiv:2404.06954)
skip_decode  the later a token, the fewer layers: the first few and the last (SkipDecode, arXiv:2307.02628). What a token skips is skipped by all
             behind it, so that no layer ever reads a key that was not made; whole batches take the same layers
void         layers that change little, for prompts and for answers each (Void in Language Models, arXiv:2505.14467), measured on pairs.
             Ours: the size of the change of a token's vector, not the change of its size, and the same layers for all tokens of a kind

A schedule's stages end at lengths of the cache: `scheduled_spec` makes a `decode` for each, and the runtime, which takes the smallest cache that
holds what is there, changes the number of layers on its way. A model is trained for its schedule, or for all of its exits, by `teach(…, student=…)`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from edgesdk.errors import InputError
from edgesdk.model import Method, ModelSpec
from edgesdk.noun import Noun, Part
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.inherit import Parent, inherited, spread
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.pairs import Batch, Pairs
from edgesdk.sequence.teach import Student, forced


class Stage(Part):
    """Tokens in front of which at most `until` slots of the cache are filled go through `layers` of the decoder."""

    until: PositiveInt
    layers: tuple[NonNegativeInt, ...]


class Schedule(Noun):
    """`prefill`: the decoder's layers for a prompt (of an encoder-decoder, all that are used); `encoder`: the encoder's, empty: all."""

    KIND: ClassVar[str] = "layer-schedule"

    name: str
    prefill: tuple[NonNegativeInt, ...]
    stages: tuple[Stage, ...]
    encoder: tuple[NonNegativeInt, ...] = ()

    @model_validator(mode="after")
    def _falling(self) -> Schedule:
        before, until = self.prefill, 0
        for stage in self.stages:
            if not stage.layers or list(stage.layers) != sorted(set(stage.layers)) or not set(stage.layers) <= set(before):
                raise ValueError(f"layers {stage.layers} after {before}: each stage keeps some of those before, in order")
            if stage.until <= until:
                raise ValueError(f"a stage until {stage.until} after one until {until}")
            before, until = stage.layers, stage.until
        if not self.stages:
            raise ValueError("no stages")
        return self

    def layers(self, filled: int) -> tuple[int, ...]:
        """The decoder's layers for a token in front of which so many slots are filled."""
        return next((s.layers for s in self.stages if filled <= s.until), self.stages[-1].layers)

    def share(self, lengths: Sequence[int]) -> float:
        """The mean share of the largest stage's layers over tokens at these places."""
        return sum(len(self.layers(n)) for n in lengths) / (len(self.prefill) * len(lengths))


def unified(layers: int, speedup: float, length: int) -> Schedule:
    """All tokens skip the same layers: `layers / speedup` of them stay. `length`: slots of the cache."""
    kept = max(1, round(layers / speedup)) if speedup >= 1 else 0
    if not kept:
        raise InputError(f"speedup = {speedup}", "give 1 or more")
    chosen = spread(kept, layers)
    return Schedule(name=f"unified {kept} of {layers}", prefill=chosen, stages=(Stage(until=length, layers=chosen),))


def skip_decode(layers: int, most: int, least: int, length: int, *, stages: int = 4, first: int = 1) -> Schedule:
    """From `most` layers at the start of a cache of `length` slots to `least` at its end, in `stages` equal parts; `first` layers are never skipped."""
    if not 1 <= first <= least <= most <= layers or not 1 <= stages <= length:
        raise InputError(
            f"{most} to {least} of {layers} layers in {stages} stages, {first} always", "give first <= least <= most <= layers"
        )

    def chosen(count: int) -> tuple[int, ...]:
        return (*range(first), *range(layers - (count - first), layers))

    counts = [round(most - i * (most - least) / max(1, stages - 1)) for i in range(stages)]
    made = tuple(Stage(until=length * (i + 1) // stages, layers=chosen(n)) for i, n in enumerate(counts))
    return Schedule(name=f"SkipDecode {most} to {least} of {layers}", prefill=chosen(most), stages=made)


class Changes(Part):
    """How much each layer changes what passes it: the mean of |out - in| / |in| over tokens."""

    encoder: tuple[float, ...]
    prompt: tuple[float, ...]  # of the decoder's layers; empty behind an encoder
    answer: tuple[float, ...]


def changes(model: SequenceModel, pairs: Pairs, *, most: int = 256) -> Changes:
    """Measured on the first `most` pairs, teacher-forced."""
    assert model.decoder is not None
    found: dict[str, list[Tensor]] = {}
    batch = pairs.batch(range(min(most, len(pairs)))).to(next(model.parameters()).device)
    seen, given = batch.source != pairs.pad, batch.wanted >= 0

    def note(key: str, tokens: Tensor) -> Any:
        def hook(_: Any, inputs: Any, out: Any) -> None:
            share = (out[0] - inputs[0]).norm(dim=-1) / inputs[0].norm(dim=-1).clamp_min(1e-9)
            where = share[:, -tokens.shape[1] :] if key.startswith("answer") else share[:, : tokens.shape[1]]
            found.setdefault(key, []).append(where[tokens].mean())

        return hook

    with ExitStack() as undo, torch.no_grad():
        kinds = [("encoder", model.encoder, seen)] if model.encoder is not None else [("prompt", model.decoder, seen)]
        for key, stack, tokens in (*kinds, ("answer", model.decoder, given)):
            for i, layer in enumerate(stack.layers):
                undo.callback(layer.register_forward_hook(note(f"{key} {i}", tokens)).remove)
        forced(model, batch, pairs.pad)
    values = {key: float(v[0]) for key, v in found.items()}
    parts = {k: tuple(v for n, v in values.items() if n.startswith(k + " ")) for k in ("encoder", "prompt", "answer")}
    return Changes(**parts)


def void(measured: Changes, length: int, *, prompt: float = 0.1, answer: float = 0.1) -> Schedule:
    """Layers that change less than a share of what the one that changes most does are skipped: `prompt` for prompts (and encoders), `answer` for answers.

    What a prompt skips its answer skips, too, behind the same stack: there are no keys to read.
    """

    def kept(values: Sequence[float], share: float) -> tuple[int, ...]:
        return tuple(i for i, v in enumerate(values) if v > share * max(values))

    prefill = kept(measured.prompt, prompt) if measured.prompt else kept(measured.answer, answer)
    late = tuple(i for i in kept(measured.answer, answer) if i in prefill) or prefill
    encoder = kept(measured.encoder, prompt) if measured.encoder else ()
    return Schedule(name=f"void {prompt:g} {answer:g}", prefill=prefill, stages=(Stage(until=length, layers=late),), encoder=encoder)


def skipped(model: SequenceModel, layers: Sequence[int], encoder: Sequence[int] = ()) -> SequenceModel:
    """`model` without the decoder's other layers (and the encoder's, where some are named); the weights are shared, not copied."""
    config = model.config
    if config.decoder is None or config.shared_from is not None:
        raise InputError(f"layers of a {config.layout} model are not skipped", "give a decoder-only model, or an encoder-decoder")
    kept = {"decoder": tuple(layers), "encoder": tuple(encoder) or tuple(range(config.encoder.layers if config.encoder else 0))}
    update: dict[str, Any] = {}
    for name, chosen in kept.items():
        stack = getattr(config, name)
        if stack:
            if not chosen or any(not 0 <= i < stack.layers for i in chosen):
                raise InputError(f"{name}: layers {list(chosen)} of {stack.layers}", "name layers that there are")
            update[name] = stack.only(chosen)
    with torch.device("meta"):
        made = SequenceModel(config.model_copy(update=update))
    weights = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    pieces = inherited(shapes, made.config, {"decoder": Parent(config, weights)}, kept)
    own = {name: weights[piece.source] for name, piece in pieces.items()}
    made.load_state_dict(own, assign=True)
    return made.eval()


# ---- training


@contextlib.contextmanager
def following(model: SequenceModel, schedule: Schedule, batch: Batch, pad: int) -> Iterator[None]:
    """Within it, teacher forcing of `batch` sends every token through the layers that the schedule has for it."""
    assert model.decoder is not None
    count, times = batch.given.shape
    place = torch.arange(times, device=batch.given.device).expand(count, -1)
    prompt = batch.source.shape[1] if model.encoder is None else 0
    if prompt:
        place = place + (batch.source != pad).sum(1, keepdim=True)
    table = torch.tensor([[i in schedule.layers(n) for i in range(len(model.decoder.layers))] for n in range(int(place.max()) + 1)])
    active = table.to(place.device)[place]  # [B, T, layers]
    if prompt:
        first = torch.tensor([i in schedule.prefill for i in range(len(model.decoder.layers))], device=place.device)
        active = torch.cat([first.expand(count, prompt + 1, -1), active[:, 1:]], 1)  # the start token goes with the prompt

    def hook(layer: int) -> Any:
        def choose(_: Any, inputs: Any, out: Any) -> Any:
            return torch.where(active[:, :, layer, None], out[0], inputs[0]), out[1]

        return choose

    with ExitStack() as undo:
        for i, layer in enumerate(model.decoder.layers):
            undo.callback(layer.register_forward_hook(hook(i)).remove)
        yield


def student_of(model: SequenceModel, schedules: Sequence[Schedule], pad: int) -> Student:
    """For `teach`: the whole model, and in every step one of the schedules in turn."""

    def student(step: int, batch: Batch) -> list[Tensor]:
        whole = forced(model, batch, pad)
        with following(model, schedules[step % len(schedules)], batch, pad):
            return [whole, forced(model, batch, pad)]

    return student


def exits_student(model: SequenceModel, exits: Sequence[int], pad: int) -> Student:
    """For `teach`: the whole model and its exits behind so many layers, all through the one head; `skipped(model, range(exit))` is such an exit alone."""
    assert model.decoder is not None
    decoder = model.decoder
    if any(not 0 < e < len(decoder.layers) for e in exits):
        raise InputError(f"exits {list(exits)} of {len(decoder.layers)} layers", "an exit is behind the first layer and before the last")

    def student(step: int, batch: Batch) -> list[Tensor]:
        seen: dict[int, Tensor] = {}
        with ExitStack() as undo:
            for e in exits:

                def note(_: Any, inputs: Any, out: Any, e: int = e) -> None:
                    seen[e] = out[0][:, -batch.given.shape[1] :]

                undo.callback(decoder.layers[e - 1].register_forward_hook(note).remove)
            whole = forced(model, batch, pad)
        return [whole, *(model.logits(decoder.leave(seen[e])) for e in exits)]

    return student


# ---- programs


class _Fewer(nn.Module):
    """A program of fewer layers in place of one of all: it is given every layer's cache, reads its own, and gives zeros for the others."""

    def __init__(self, inner: Any, names: Sequence[str], kept: Sequence[int], layers: int) -> None:
        super().__init__()
        self.inner, self.input_names, self.kept, self.layers = inner, tuple(names), tuple(kept), layers

    def forward(self, *inputs: Tensor) -> Any:
        given = dict(zip(self.input_names, inputs, strict=True))
        own = []
        for name in self.inner.input_names:
            start, _, layer = name.rpartition("_")
            own.append(given[f"{start}_{self.kept[int(layer)]}" if start.startswith(("self_", "cross_")) else name])
        logits, *new = self.inner(*own)
        pairs = [new[0] * 0.0] * (2 * self.layers)
        for i, layer in enumerate(self.kept):
            pairs[2 * layer : 2 * layer + 2] = new[2 * i : 2 * i + 2]
        return logits, *pairs


def scheduled_spec(model: SequenceModel, schedule: Schedule, **settings: Any) -> ModelSpec:
    """Programs of `model` under a schedule: a `decode` for each stage, of caches of `until` slots. `settings`: those of `sequence_spec`.

    They are called as those of the model are. Raises `InputError`.
    """
    if "cache_lengths" in settings:
        raise InputError("cache_lengths: a schedule's stages say how long its caches are", "leave them out")
    base = skipped(model, schedule.prefill, schedule.encoder)
    lengths = tuple(s.until for s in schedule.stages)
    spec = sequence_spec(base, cache_lengths=lengths, **settings)
    told = Card.read(spec.files[NAME]).methods
    methods = dict(spec.methods)
    for stage in schedule.stages:
        kept = [schedule.prefill.index(i) for i in stage.layers]
        if len(kept) == len(schedule.prefill):
            continue
        few = sequence_spec(skipped(base, kept), cache_lengths=lengths, **{k: v for k, v in settings.items() if k != "prompts"})
        for name, method in spec.methods.items():
            if told[name]["role"] == "decode" and told[name]["cache"] == stage.until:
                names: Sequence[str] = method.module.input_names  # type: ignore[assignment]
                inner = _Fewer(few.methods[name].module, names, kept, len(schedule.prefill))
                methods[name] = Method(inner, method.example_inputs, method.unroll)
    digest = hashlib.sha256(spec.digest.encode() + schedule.to_json().encode()).hexdigest()
    return replace(spec, methods=methods, digest=digest)
