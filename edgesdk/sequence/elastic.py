"""Smaller models inside one checkpoint, trained together with it: the parts of every matrix are its first rows and columns, nothing is stored twice.

Sources: MatFormer (arXiv:2310.07707): nested feed-forwards, and Mix'n'Match, another width in every layer. SortedNet (arXiv:2309.00255): nested depth,
heads and width, a sub-model drawn in every step. Ours: a sub-model learns from the whole one in the same step, besides the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from edgesdk.errors import InputError
from edgesdk.noun import Part
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.inherit import Parent, Piece, arranged, inherited
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.pairs import Batch
from edgesdk.sequence.positions import HIDDEN
from edgesdk.sequence.teach import Student, forced


class Cut(Part):
    """A sub-model: what it is, and which of the whole's layers its stacks have."""

    name: str
    config: SequenceConfig
    layers: dict[str, tuple[int, ...]]


class Measured(Part):
    """`quality` is of the sub-model on held-out data; `parameters` those of its matrices."""

    name: str
    parameters: PositiveInt
    quality: float


def mixed(config: SequenceConfig, name: str, shares: Mapping[str, Sequence[float]]) -> Cut:
    """Mix'n'Match: every layer of the stacks named ("encoder", "decoder") keeps its share of the feed-forward's neurons."""
    update: dict[str, Stack] = {}
    for stack_name, wanted in shares.items():
        stack = _stack(config, stack_name)
        if len(wanted) != stack.layers or any(not 0 < s <= 1 for s in wanted):
            raise InputError(f"{stack_name}: shares {list(wanted)} for {stack.layers} layers", "give one above 0 and up to 1 for each")
        widths = tuple(max(1, round(s * stack.of(i).ffn)) for i, s in enumerate(wanted))
        alike = len(set(widths)) == 1
        update[stack_name] = stack.model_copy(update={"ffn": max(widths), "ffns": () if alike else widths})
    return _cut(config, name, update)


def nested(config: SequenceConfig, name: str, *, depth: float = 1.0, ffn: float = 1.0, heads: float = 1.0, dim: float = 1.0) -> Cut:
    """SortedNet: the first layers of every stack, and shares of their feed-forwards' neurons, groups of heads and channels; at least one of each."""
    if any(not 0 < s <= 1 for s in (depth, ffn, heads, dim)):
        raise InputError(f"{name}: depth {depth}, ffn {ffn}, heads {heads}, dim {dim}", "shares are above 0 and up to 1")
    update = {}
    for stack_name in ("encoder", "decoder"):
        stack = getattr(config, stack_name)
        if stack:
            kept = stack.only(range(max(1, round(depth * stack.layers))))
            groups = max(1, round(heads * stack.kv_heads))
            widths = {"ffns": tuple(max(1, round(ffn * w)) for w in kept.ffns)} if kept.ffns else {}
            update[stack_name] = kept.model_copy(
                update={
                    "ffn": max(1, round(ffn * stack.ffn)), "kv_heads": groups, "heads": groups * (stack.heads // stack.kv_heads),
                    "dim": max(1, round(dim * stack.dim)), **widths,
                }
            )  # fmt: skip
    return _cut(config, name, update)


def _stack(config: SequenceConfig, name: str) -> Stack:
    stack = getattr(config, name, None) if name in ("encoder", "decoder") else None
    if stack is None:
        raise InputError(f"a {config.layout} model has no {name}", "name its encoder or its decoder")
    found: Stack = stack
    return found


def _cut(config: SequenceConfig, name: str, update: Mapping[str, Stack]) -> Cut:
    if config.shared_from is not None:
        raise InputError(f"a {config.layout} model has no sub-models", "give a model of another layout")
    own = SequenceConfig.check(config.model_copy(update=dict(update)).model_dump(), name)
    stacks = {n: getattr(own, n) for n in ("encoder", "decoder")}
    return Cut(name=name, config=own, layers={n: tuple(range(s.layers)) for n, s in stacks.items() if s})


def sorted_model(model: SequenceModel) -> SequenceModel:
    """The same model with its largest neurons and heads first, so that sub-models of an ordinary checkpoint keep the best part."""
    made = SequenceModel(model.config)
    made.load_state_dict(arranged(model.config, dict(model.state_dict())))
    return made.train(model.training)


def _frame(cut: Cut) -> SequenceModel:
    with torch.device("meta"):
        return SequenceModel(cut.config).eval()


def _pieces(frame: SequenceModel, cut: Cut, config: SequenceConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shapes = {name: tuple(p.shape) for name, p in frame.named_parameters()}
    found: dict[str, Piece] = inherited(shapes, cut.config, {"decoder": Parent(config, weights)}, cut.layers)
    return {name: piece.value for name, piece in found.items() if piece.value is not None}


def sub_model(model: SequenceModel, cut: Cut) -> SequenceModel:
    """The sub-model as a model of its own over the same memory: a change of the one is a change of the other."""
    frame = _frame(cut)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    frame.load_state_dict(_pieces(frame, cut, model.config, weights), assign=True)
    return frame


def elastic_student(model: SequenceModel, cuts: Sequence[Cut], pad: int) -> Student:
    """For `teach`: the whole model and one of its sub-models in turn (all of them on held-out pairs), which learns from the whole one as well."""
    if not cuts:
        raise InputError("no sub-models to train", "name some: mixed(…), nested(…)")
    frames = [_frame(c) for c in cuts]

    def answer(i: int, batch: Batch) -> Tensor:
        own = _pieces(frames[i], cuts[i], model.config, dict(model.named_parameters()))
        mask = (batch.source == pad).to(torch.float32) * HIDDEN
        logits: Tensor = torch.func.functional_call(frames[i], own, (batch.source, mask, batch.given))
        return logits

    def student(step: int, batch: Batch) -> list[Tensor]:
        chosen = range(len(cuts)) if step < 0 else [step % len(cuts)]
        return [forced(model, batch, pad), *(answer(i, batch) for i in chosen)]

    return student


def measured(model: SequenceModel, cuts: Sequence[Cut], quality: Callable[[SequenceModel], float]) -> tuple[Measured, ...]:
    """Every sub-model's quality as `quality` finds it, best first."""
    rows = [Measured(name=c.name, parameters=c.config.parameters, quality=quality(sub_model(model, c))) for c in cuts]
    return tuple(sorted(rows, key=lambda r: (-r.quality, r.parameters)))


def front(rows: Sequence[Measured]) -> tuple[Measured, ...]:
    """Those that no other one beats in quality without being larger, best first."""
    kept: list[Measured] = []
    for row in sorted(rows, key=lambda r: (-r.quality, r.parameters)):
        if not kept or row.parameters < kept[-1].parameters:
            kept.append(row)
    return tuple(kept)


def choose(file: str, device: str, **asked: Any) -> tuple[str, Any]:
    """The sub-model of a saved family (`FILE.edgeseq`) of the best measured quality that fits, and its plan. `asked`: `budget` and what else `plan` takes.

    The whole model is tried first, then those on the front, in order of quality. Raises `DoesNotFit` with the last plan's reason where none fits.
    """
    from edgesdk.errors import DoesNotFit
    from edgesdk.plan import plan
    from edgesdk.sequence.saved import family_of

    rows = front(family_of(file))
    last = None
    for row in rows:
        last = plan(f"{file}:{row.name}", device, **asked)
        if last.fits:
            return row.name, last
    binding = next((c for c in last.checks if not c.fits), None) if last else None
    raise DoesNotFit(
        f"{file}: none of {len(rows)} sub-models fits {device}"
        + (f" ({binding.name} {binding.reached:g}, limit {binding.limit:g})" if binding else ""),
        "raise the budget, or train smaller sub-models",
    )
