"""Small random sequence models as `file.py:function` references, for the tests that build and run them."""

from __future__ import annotations

from pathlib import Path

import torch

from edgesdk.intake import load_model
from edgesdk.lower import build
from edgesdk.model import ModelSpec
from edgesdk.plan import plan
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.model import SequenceModel

ALPHABET = "abcdefghijklmnopqrstuvwxyz "
CHARACTERS = {"kind": "characters", "alphabet": ALPHABET, "first": 3, "after": [1]}
STACK = {"dim": 32, "heads": 4, "kv_heads": 2, "head": 8, "ffn": 64}


def small_model(config: SequenceConfig) -> SequenceModel:
    torch.manual_seed(3)
    model = SequenceModel(config).eval()
    for p in model.parameters():  # sharper than at initialisation, so that rounding changes no winner
        p.data *= 1.7
    return model


def caches_of_16() -> ModelSpec:
    """The encoder-decoder with caches in float16."""
    return encoder_decoder(cache_bits=16)


def caches_of_8() -> ModelSpec:
    """The same in int8."""
    return encoder_decoder(cache_bits=8)


def caches_of_4() -> ModelSpec:
    """The same in int4."""
    return encoder_decoder(cache_bits=4)


def encoder_decoder(cache_bits: int = 32) -> ModelSpec:
    """Sources up to 16, caches of 8 and 16 slots: `encode`, `decode_8`, `decode_16`."""
    config = SequenceConfig(
        layout="encoder-decoder", vocab=30, encoder=Stack(layers=1, **STACK), decoder=Stack(layers=1, **STACK), tied=False
    )
    return sequence_spec(
        small_model(config), name="small-encoder-decoder", source_lengths=(16,), cache_lengths=(8, 16), tokenizer=CHARACTERS, start=(2,), eos=(1,),
        cache_bits=cache_bits, max_output=14, prompts=[[5, 9, 12, 3, 1], [20, 21, 1]],
    )  # fmt: skip


def decoder_decoder() -> ModelSpec:
    """Prompts up to 8 (longer ones in chunks of 3), a window of 5 under one shared cache, two rows: `prefill`, `decode`, `decode_x3`."""
    config = SequenceConfig(layout="decoder-decoder", vocab=30, decoder=Stack(layers=2, windows=(5, 0), **STACK), shared_from=1, tied=False)
    return sequence_spec(
        small_model(config), name="small-decoder-decoder", source_lengths=(8,), cache_lengths=(24,), several=(3,), batch=2, tokenizer=CHARACTERS,
        start=(2,), eos=(1,), max_output=12, prompts=[[5, 9, 12, 3, 1], [20, 21, 1]],
    )  # fmt: skip


def built(name: str, device: str, runtime: str, out: Path) -> Path:
    """One of them as a bundle with all weights in float32, so that every runtime writes the same."""
    ref = f"{__file__}:{name}"
    made = plan(ref, device, runtime=runtime)
    floats = tuple(u if u.precision == "as-is" else u.model_copy(update={"precision": "fp32"}) for u in made.units)
    return build(made.model_copy(update={"units": floats}), load_model(ref), out)
