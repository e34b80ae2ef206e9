"""`adapt`: a decoder-only model as an encoder-decoder whose two stacks begin with its weights, and any model of the family as a smaller one.

Source: Encoder-Decoder Gemma (arXiv:2504.06225): both stacks are initialised from one decoder-only checkpoint (or each from its own, of different
sizes), the encoder's causal mask is dropped, cross-attention begins as the self-attention of the same layer, or new where the widths do not allow it.
What comes out is to be trained (`edgesdk.sequence.teach`, with the original as the teacher).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from edgesdk.errors import InputError
from edgesdk.noun import Noun, Part
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.inherit import Parent, Piece, arranged, inherited, spread
from edgesdk.sequence.model import SequenceModel


class Origin(Part):
    """Where a parameter's values come from. `part`: the first rows and columns only; `averaged`: heads of keys or values put together."""

    name: str
    source: str  # the parent's name; empty: new
    how: Literal["whole", "part", "averaged", "new"]
    weights: int


class Adaptation(Noun):
    """What was copied. `layers`: which of the parent's layers each stack has taken, in order."""

    KIND: ClassVar[str] = "adaptation"

    layout: str
    parameters: int  # all, norms and biases among them
    copied: int
    new: int
    layers: dict[str, tuple[int, ...]]
    origins: tuple[Origin, ...]


def adapt(
    model: SequenceModel, *, encoder_layers: int | Sequence[int] | None = None, decoder_layers: int | Sequence[int] | None = None,
    encoder: Stack | None = None, decoder: Stack | None = None, encoder_from: SequenceModel | None = None, cross: Literal["self", "new"] = "self",
    arrange: bool = True, seed: int = 0,
) -> tuple[SequenceModel, Adaptation]:  # fmt: skip
    """An encoder-decoder made of `model`'s weights, which are copied, and what was copied. Models with an encoder give a smaller one of their kind.

    `encoder_layers`, `decoder_layers`: how many layers each stack has (evenly spread over the parent's), or which of them; all, where None.
    `encoder`, `decoder`: other sizes of the stacks, none larger than the parent's; with `arrange` it is the largest heads and neurons that stay.
    `encoder_from`: another model of the same vocabulary, of any size, that the encoder is made of. `cross`: what cross-attention begins with where the
    parent has none. `seed`: of what is new. Raises `InputError`.
    """
    parents = {"decoder": _parent(model)}
    if encoder_from is not None:
        parents["encoder"] = _parent(encoder_from)
        if encoder_from.config.vocab != model.config.vocab:
            raise InputError(
                f"an encoder of {encoder_from.config.vocab} tokens with a decoder of {model.config.vocab}", "they must share one vocabulary"
            )
    stacks: dict[str, Stack] = {}
    layers: dict[str, tuple[int, ...]] = {}
    for name, asked, count in (("encoder", encoder, encoder_layers), ("decoder", decoder, decoder_layers)):
        stacks[name], layers[name] = _stack(name, parents.get(name) or parents["decoder"], asked, count)
    config = model.config.model_copy(update={**stacks, "layout": "encoder-decoder", "shared_from": None})
    config = SequenceConfig.check(config.model_dump(), "adapt")
    if arrange and any(
        stacks[n].ffn < _own(p, n).ffn or stacks[n].heads < _own(p, n).heads for n in stacks for p in [parents.get(n) or parents["decoder"]]
    ):
        parents = {name: Parent(p.config, arranged(p.config, p.weights)) for name, p in parents.items()}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        made = SequenceModel(config)
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    pieces = inherited(shapes, config, parents, layers, cross=cross == "self")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            value = pieces[name].value
            if value is not None:
                parameter.copy_(value)
    return made.eval(), _report(made, pieces, layers)


def _parent(model: SequenceModel) -> Parent:
    if model.config.decoder is None or model.config.shared_from is not None:
        raise InputError(
            f"a {model.config.layout} model cannot become an encoder-decoder", "give a decoder-only model, or an encoder-decoder"
        )
    return Parent(model.config, {name: p.detach() for name, p in model.named_parameters()})


def _own(parent: Parent, name: str) -> Stack:
    """The parent's stack that a stack comes from."""
    found: Stack = getattr(parent.config, parent.stack(name))
    return found


def _stack(name: str, parent: Parent, asked: Stack | None, which: int | Sequence[int] | None) -> tuple[Stack, tuple[int, ...]]:
    theirs = _own(parent, name)
    if which is None:
        which = asked.layers if asked else theirs.layers
    if isinstance(which, int):
        chosen = spread(which, theirs.layers)
    else:
        chosen = tuple(which)
        if not chosen or any(not 0 <= i < theirs.layers for i in chosen):
            raise InputError(f"{name}: layers {list(chosen)} of a model that has 0 to {theirs.layers - 1}", "name layers that there are")
    if asked:
        return asked.model_copy(update={"layers": len(chosen)}), chosen
    stack = theirs.only(chosen)
    return stack.model_copy(update={"windows": ()}) if name == "encoder" and not parent.config.encoder else stack, chosen


def _report(made: SequenceModel, pieces: dict[str, Piece], layers: dict[str, tuple[int, ...]]) -> Adaptation:
    origins = []
    for name, parameter in made.named_parameters():
        piece = pieces[name]
        origins.append(Origin(name=name, source=piece.source, how=piece.how, weights=parameter.numel()))
    new = sum(o.weights for o in origins if o.how == "new")
    total = sum(o.weights for o in origins)
    return Adaptation(
        layout=made.config.layout, parameters=total, copied=total - new, new=new, layers=layers, origins=tuple(origins)
    )  # fmt: skip
