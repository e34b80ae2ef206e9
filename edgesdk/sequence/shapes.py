"""Every layout in one size: how many layers, how wide, so that each has the same number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgesdk.errors import InputError
from edgesdk.sequence.config import SequenceConfig, Stack

DEFAULT_PARAMETERS = 330_000_000
"""Those of the published comparison."""
WINDOW = 128
"""Tokens that a windowed layer sees."""
_STEP = 32
"""Feed-forward widths are multiples of it: groups of int4 weights are of 32."""


def base_config(parameters: int, dim: int | None = None, vocab: int = 32128) -> SequenceConfig:
    """An encoder-decoder in the proportions of the published 330M one: a layer for each 34 of width, two thirds of them the encoder's,
    6 heads and 3 of keys and values at a width of 1024, a feed-forward of four times the width without a gate.

    Raises `InputError` where `parameters` do not hold the vocabulary and a layer.
    """

    def made(width: int) -> SequenceConfig:
        kv = max(1, round(width * 3 / 1024))
        layers = max(3, round(30 * width / 1024))
        stack = Stack(layers=max(2, round(layers * 2 / 3)), dim=width, heads=2 * kv, kv_heads=kv, head=64, ffn=4 * width)
        decoder = stack.model_copy(update={"layers": max(1, layers - stack.layers)})
        return SequenceConfig(layout="encoder-decoder", vocab=vocab, encoder=stack, decoder=decoder, gated=False, activation="relu")

    if dim is not None:
        config = made(dim)
    else:
        widths = range(64, 8193, 64)
        config = min((made(w) for w in widths), key=lambda c: abs(c.parameters - parameters))
    return sized("encoder-decoder 2/3", config, parameters)


def base_of(ref: str) -> SequenceConfig:
    """The configuration in a JSON file, or that of a model: a `.edgeseq` file, a Hugging Face folder or id. Raises what loading it raises."""
    if Path(ref).suffix == ".json":
        return SequenceConfig.load(ref)
    from edgesdk.sequence.saved import checkpoint_of

    return checkpoint_of(ref).checkpoint.config


def _stack(base: SequenceConfig) -> Stack:
    """The layers that all layouts are made of: equal ones, which see all."""
    stack = base.encoder or base.decoder
    assert stack is not None
    return stack.model_copy(update={"windows": (), "ffns": ()})


def _narrow(stack: Stack) -> Stack:
    """Half the width, with half of the heads."""
    kv = max(1, stack.kv_heads // 2)
    return stack.model_copy(
        update={"dim": stack.dim // 2, "kv_heads": kv, "heads": kv * (stack.heads // stack.kv_heads), "ffn": stack.ffn // 2}
    )


Make = Callable[[SequenceConfig, int, int], SequenceConfig]
"""(base, layers in all, feed-forward width) → the layout."""


def _split(share: float | None, narrow: bool = False) -> Make:
    """An encoder with `share` of the layers (all but one where None)."""

    def make(base: SequenceConfig, layers: int, ffn: int) -> SequenceConfig:
        whole = _stack(base).model_copy(update={"ffn": ffn})
        front = layers - 1 if share is None else min(layers - 1, max(1, round(layers * share)))
        back = _narrow(whole) if narrow else whole
        encoder, decoder = whole.model_copy(update={"layers": front}), back.model_copy(update={"layers": layers - front})
        return _as(base, layout="encoder-decoder", encoder=encoder, decoder=decoder)

    return make


def _as(base: SequenceConfig, **fields: object) -> SequenceConfig:
    kept = base.model_dump() | {"encoder": None, "decoder": None, "shared_from": None, "sound": None}
    return SequenceConfig.model_validate(kept | fields)


def _decoder_only(base: SequenceConfig, layers: int, ffn: int) -> SequenceConfig:
    return _as(base, layout="decoder-only", decoder=_stack(base).model_copy(update={"layers": layers, "ffn": ffn}))


def _windowed(base: SequenceConfig, layers: int, ffn: int) -> SequenceConfig:
    """Every fourth layer sees all, the last one among them."""
    windows = tuple(0 if (layers - 1 - i) % 4 == 0 else WINDOW for i in range(layers))
    return _as(base, layout="decoder-only", decoder=_stack(base).model_copy(update={"layers": layers, "ffn": ffn, "windows": windows}))


def _ctc(base: SequenceConfig, layers: int, ffn: int) -> SequenceConfig:
    return _as(base, layout="encoder-ctc", encoder=_stack(base).model_copy(update={"layers": layers, "ffn": ffn}))


def _cache_once(base: SequenceConfig, layers: int, ffn: int) -> SequenceConfig:
    """The first half sees a window, the second half one shared cache of all."""
    half = max(1, layers // 2)
    windows = tuple(WINDOW if i < half else 0 for i in range(layers))
    stack = _stack(base).model_copy(update={"layers": max(2, layers), "ffn": ffn, "windows": windows if layers > 1 else (WINDOW, 0)})
    return _as(base, layout="decoder-decoder", decoder=stack, shared_from=half)


LAYOUTS: dict[str, Make] = {
    "decoder-only": _decoder_only,
    "decoder-only, windowed": _windowed,
    "decoder-decoder": _cache_once,
    "encoder-decoder 1/3": _split(1 / 3),
    "encoder-decoder 1/2": _split(1 / 2),
    "encoder-decoder 2/3": _split(2 / 3),
    "encoder-decoder 5/6": _split(5 / 6),
    "encoder-decoder, one-layer decoder": _split(None),
    "encoder-decoder 2/3, narrow decoder": _split(2 / 3, narrow=True),
    "encoder-ctc": _ctc,
}


def sized(name: str, base: SequenceConfig, parameters: int) -> SequenceConfig:
    """The layout with about `parameters`: by layers, then by the feed-forward's width."""
    make, wide = LAYOUTS[name], _stack(base).ffn
    low = 2 if name != "decoder-only" and name != "encoder-ctc" else 1
    least = make(base, low, _STEP)
    if least.parameters > parameters * 1.02:
        raise InputError(
            f"--parameters {parameters}: {name} of width {_stack(base).dim} has {least.parameters} at least",
            "ask for more parameters, a smaller --dim or a smaller --vocab",
        )
    layers = low
    while make(base, layers + 1, wide).parameters <= parameters:
        layers += 1
    options = [_filled(make, base, n, wide, parameters) for n in (layers, layers + 1)]
    return min(options, key=lambda c: (round(abs(c.parameters / parameters - 1), 3), abs(_stack(c).ffn - wide)))


def _filled(make: Make, base: SequenceConfig, layers: int, wide: int, parameters: int) -> SequenceConfig:
    """`layers` with the feed-forward width that comes nearest."""
    one, two = make(base, layers, wide).parameters, make(base, layers, wide + _STEP).parameters
    ffn = max(_STEP, wide + round((parameters - one) / (two - one)) * _STEP)
    return make(base, layers, ffn)
