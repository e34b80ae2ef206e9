"""`example:normalizer`: a model of the family (see `edgesdk.sequence`) that writes dates, times, numbers and money in normal form, in three layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgesdk.examples import load_weights
from edgesdk.examples import normalizer_data as data
from edgesdk.model import ModelSpec
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.hub import Checkpoint, Specials
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.pairs import Pairs
from edgesdk.sequence.saved import SCORED, Saved, programs_of
from edgesdk.sequence.sizes import Sizes

HERE = Path(__file__).parent
LAYOUTS = {"normalizer": (4, 2), "normalizer-deep-encoder": (5, 1), "normalizer-decoder-only": (0, 7)}
"""Name → (encoder layers, decoder layers); the three have about the same number of parameters."""
NAMES = {"encoder-decoder": "normalizer", "deep-encoder": "normalizer-deep-encoder", "decoder-only": "normalizer-decoder-only"}
TOKENIZER = {"kind": "characters", "alphabet": data.ALPHABET, "first": data.FIRST, "after": [data.EOS], "lower": True}
POSITIONS = 80  # of the decoder-only layout, which reads and writes one text: 56 + 1 + 12, and room for guesses behind it
CALIBRATION_CASES = 64


def config(name: str) -> SequenceConfig:
    encoder, decoder = (Stack(layers=layers, dim=96, heads=4, kv_heads=4, head=24, ffn=256) if layers else None for layers in LAYOUTS[name])
    return SequenceConfig(
        layout="encoder-decoder" if encoder else "decoder-only", vocab=data.VOCABULARY, encoder=encoder, decoder=decoder, positions="learned",
        max_positions=data.MAX_INPUT if encoder else POSITIONS, activation="relu", gated=False, ffn_bias=True, tied=False, head_bias=True,
    )  # fmt: skip


def weights(name: str) -> Path:
    return HERE / f"{name.replace('-', '_')}.npz"


def pairs(cases: Sequence[tuple[str, str]]) -> Pairs:
    """What `normalizer_data.cases` gives, as token ids."""
    return Pairs([data.encode(a) for a, _ in cases], [data.encode(b) for _, b in cases], data.BOS, data.EOS, data.PAD)


def saved(name: str) -> Saved:
    """The trained model, and cases that it is scored on."""
    model = load_weights(SequenceModel(config(name)), weights(name))
    specials = Specials((data.BOS,), (data.EOS,), data.PAD)
    return Saved(Checkpoint(model, model.config, specials, TOKENIZER), pairs(data.cases(SCORED, 7, True)))


def _spec(layout: str, sizes: Sizes | None = None) -> ModelSpec:
    """For inputs and answers as long as the data's, if `sizes` says nothing else."""
    name = NAMES[layout]
    longest = data.MAX_INPUT + (layout == "decoder-only")  # which has the start token behind its prompt
    asked = sizes or Sizes()
    given = replace(asked, inputs=asked.inputs or (longest,), outputs=asked.outputs or (data.MAX_OUTPUT,))
    more: dict[str, Any] = {} if asked.outputs else {"typical_output": 8}
    if name == "normalizer":
        more["alternatives"] = {k: f"example:{v}" for k, v in NAMES.items() if v != name}
    return programs_of(name, saved(name), given, prompts=pairs(data.cases(CALIBRATION_CASES, 3, False)).sources, layout=layout, **more)


encoder_decoder = partial(_spec, "encoder-decoder")
deep_encoder = partial(_spec, "deep-encoder")
decoder_only = partial(_spec, "decoder-only")
