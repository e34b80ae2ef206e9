"""Layers leave a sequence model, in place: its programs, its card, its calibration inputs and what scores it do without their keys and values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError
from edgesdk.sequence.card import NAME, Card

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

STACKS = {"core.encoder", "core.decoder"}


@dataclass(frozen=True)
class Lost:
    """Which inputs and outputs a method had for caches of layers that left, by their places."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def given(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The inputs without them."""
        return tuple(x for at, x in enumerate(inputs) if at not in self.inputs)

    def made(self, outputs: Sequence[Any]) -> list[Any]:
        """The outputs without them."""
        return [x for at, x in enumerate(outputs) if at not in self.outputs]

    def whole(self, outputs: Sequence[Any]) -> list[Any]:
        """The outputs with zeros in their places."""
        found = list(outputs)
        for at in self.outputs:
            found.insert(at, 0 * found[-1])
        return found


def lost_of(spec: ModelSpec, path: str, gone: Sequence[int]) -> dict[str, Lost]:
    """Method → what it loses with layers of a stack; nothing with an encoder's."""
    card = Card.read(spec.files[NAME])
    if path != "core.decoder":
        return {name: Lost() for name in spec.methods}
    found = {}
    for name, entry in spec.methods.items():
        names: Any = entry.module.input_names
        inputs = [at for at, n in enumerate(names) if (m := re.fullmatch(r"(?:self|cross)_\w+_(\d+)", n)) and int(m[1]) in gone]
        first = 0 if card.methods[name]["role"] == "encode" else 1  # behind the logits
        found[name] = Lost(tuple(inputs), tuple(sorted(first + 2 * i + x for i in gone for x in (0, 1))))
    return found


def leave(spec: ModelSpec, path: str, gone: Sequence[int]) -> None:
    """The layers `gone` of the stack `path` leave `spec`, the caller's own copy. Raises `InputError` where that cannot be."""
    card = Card.read(spec.files[NAME])
    programs: dict[str, Any] = {name: entry.module for name, entry in spec.methods.items()}
    cores = list({id(p.core): p.core for p in programs.values()}.values())
    side = path.rpartition(".")[2]
    if len(cores) != 1 or card.layout == "decoder-decoder":
        raise InputError(
            f"{spec.name}: layers of {path} cannot leave", "models with one cache for several layers, or with exits, keep theirs"
        )
    lost = lost_of(spec, path, gone)
    (core,) = cores
    stack = getattr(core, side)
    kept = [i for i in range(len(stack.layers)) if i not in gone]
    for i in sorted(gone, reverse=True):
        del stack.layers[i]
    stack.stack = stack.stack.only(kept)
    core.config = core.config.model_copy(update={side: stack.stack})
    for name, program in programs.items():
        if side == "decoder":
            names = lost[name].given(program.input_names)
            program.input_names = tuple(re.sub(r"\d+$", lambda m: str(kept.index(int(m[0]))), n) for n in names)
        spec.methods[name] = replace(spec.methods[name], example_inputs=lost[name].given(spec.methods[name].example_inputs))
    if side == "decoder":
        card.caches, card.cross = (tuple(c for i, c in enumerate(held) if i not in gone) for held in (card.caches, card.cross))
        object.__setattr__(spec, "files", {**spec.files, NAME: card.to_bytes()})
        _follow(spec, lost)


def _follow(spec: ModelSpec, lost: dict[str, Lost]) -> None:
    """Calibration inputs and the evaluation are those of the whole model: what it has more is left out, or zeros."""
    calibration, evaluate = spec.calibration, spec.evaluate
    if calibration is not None:

        def fewer(method: str) -> list[tuple[Any, ...]]:
            return [lost[method].given(x) for x in calibration(method)]

        object.__setattr__(spec, "calibration", fewer)
    if evaluate is not None:

        def score(run: Callable[[str, Sequence[Any]], list[Any]]) -> float:
            return evaluate(lambda method, inputs: lost[method].whole(run(method, lost[method].given(inputs))))

        object.__setattr__(spec, "evaluate", score)
