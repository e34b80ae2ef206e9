"""Compression of sequence models of the family: whole answers are what training sees, and what was trained is what runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgesdk.compress import compress
from edgesdk.compress.generated import Calls, Chain, chain_of, self_generated
from edgesdk.compress.saved import load
from edgesdk.errors import InputError
from edgesdk.plan.fake_quant import run
from edgesdk.sequence.card import Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.generate import generate
from edgesdk.sequence.model import SequenceModel

STACK = {"dim": 32, "heads": 4, "kv_heads": 2, "head": 8, "ffn": 64}


def spec_of(layout: str, layers: int = 2, **more):
    torch.manual_seed(0)
    encoder = Stack(layers=layers - 1, **STACK) if layout == "encoder-decoder" else None
    model = SequenceModel(SequenceConfig(layout=layout, vocab=30, encoder=encoder, decoder=Stack(layers=layers, **STACK)))
    prompts = [[int(t) for t in np.random.default_rng(i).integers(3, 30, 4 + i % 6)] for i in range(12)]
    return sequence_spec(
        model, name=f"small-{layout}", source_lengths=(12,), cache_lengths=(32,), start=(1,), eos=(2,), max_output=10, prompts=prompts, **more
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_the_chain_answers_as_the_runtime_does(layout):
    spec = spec_of(layout, several=(4,))
    chain = chain_of(spec)
    assert isinstance(chain, Chain)
    samples = list(spec.calibration(chain.first))
    with torch.no_grad():
        made = chain.answer(Calls(spec), [torch.stack(x) for x in zip(*samples, strict=True)])
    results = generate(run(spec), Card.read(spec.files["sequence.json"]), spec.prompts, Settings(draft="none"))
    for tokens, valid, result in zip(made.tokens, made.valid, results, strict=True):
        found = [int(t) for t, v in zip(tokens, valid, strict=True) if v and int(t) != 2]
        assert found == result.tokens


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_training_sees_whole_answers_and_helps(layout):
    spec = spec_of(layout)
    made = compress(spec, ["rtn:bits=3,group=0", "qat:steps=25"])
    gap = {name: whole_gap(spec, m) for name, m in (("rounded", compress(spec, ["rtn:bits=3,group=0"]).spec), ("trained", made.spec))}
    assert gap["trained"] < 0.8 * gap["rounded"]
    answers = generate(run(made.spec), Card.read(made.spec.files["sequence.json"]), spec.prompts[:2])
    assert all(0 < len(a.tokens) <= 10 for a in answers)


def whole_gap(teacher, student):
    """The squared error of the logits over whole answers that are the teacher's."""
    chain = chain_of(teacher)
    sources = [torch.stack(x) for x in zip(*teacher.calibration(chain.first), strict=True)]
    with torch.no_grad():
        right = chain.answer(Calls(teacher), sources)
        got = chain.answer(Calls(student), sources, forced=right)
    return float(((got.logits - right.logits) ** 2)[right.valid].mean())


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_a_model_makes_its_own_inputs(layout):
    spec = spec_of(layout)
    (method, rows), *_ = self_generated(spec, 5).items()
    wanted = spec.methods[method].example_inputs
    assert len(rows) == 5
    for row in rows:
        assert [x.shape for x in row] == [x.shape for x in wanted] and [x.dtype for x in row] == [x.dtype for x in wanted]
        with torch.no_grad():
            spec.methods[method].module(*row)


def test_windows_and_several_lengths_are_trained_method_by_method():
    spec = spec_of("decoder-only")
    assert chain_of(spec) is not None
    torch.manual_seed(0)
    windowed = SequenceModel(SequenceConfig(layout="decoder-only", vocab=30, decoder=Stack(layers=2, windows=(5, 0), **STACK)))
    assert chain_of(sequence_spec(windowed, name="w", source_lengths=(12,), cache_lengths=(32,), start=(1,))) is None


@pytest.mark.parametrize(("layout", "stack"), [("encoder-decoder", "encoder"), ("encoder-decoder", "decoder"), ("decoder-only", "decoder")])
def test_a_layer_leaves_with_its_caches_and_files_keep_it(layout, stack, tmp_path):
    spec = replace(spec_of(layout, layers=3), evaluate=lambda run: float(len(run("decode", spec.methods["decode"].example_inputs))))
    made = compress(spec, [f"depth:only=core.{stack},tune=3", "rtn:bits=8"])
    assert f"core.{stack}.layers" in made.report.notes[0]
    card, core = Card.read(made.spec.files["sequence.json"]), made.spec.methods["decode"].module.core
    left = 3 - (stack == "decoder")
    assert len(card.caches) == len(core.decoder.layers) == core.config.decoder.layers == left and len(card.cross) == (
        left if core.encoder else 0
    )
    assert layout == "decoder-only" or len(core.encoder.layers) == core.config.encoder.layers == 2 - (stack == "encoder")
    (answer,) = generate(run(made.spec), card, spec.prompts[:1])
    assert answer.tokens
    entry = made.spec.methods["decode"]
    assert len(entry.module.input_names) == len(entry.example_inputs) == len(made.spec.calibration("decode")[0])
    assert made.report.quality == made.report.quality_before == 7.0, "scored as the whole model is"
    again = load(made.save(tmp_path / "m.edgec"), base=spec).spec
    assert again.files == made.spec.files and generate(run(again), card, spec.prompts[:1])[0].tokens == answer.tokens
    assert len(Card.read(spec.files["sequence.json"]).caches) == 3


def test_what_training_and_leaving_refuse():
    torch.manual_seed(0)
    windowed = SequenceModel(SequenceConfig(layout="decoder-only", vocab=30, decoder=Stack(layers=3, windows=(5, 0, 0), **STACK)))
    spec = sequence_spec(windowed, name="w", source_lengths=(12,), cache_lengths=(32,), start=(1,), prompts=[[4, 5, 6], [7, 8]])
    with pytest.raises(InputError, match="not trained whole"):
        compress(spec, "depth:tune=3")
    assert len(Card.read(compress(spec, "depth").spec.files["sequence.json"]).caches) == 2
    rounded = spec_of("encoder-decoder", layers=3, cache_bits=8)
    assert chain_of(rounded) is None
    left = compress(rounded, "depth:only=core.decoder").spec
    assert sum(n.startswith("cross_") for n in left.methods["decode"].module.input_names) == 2 * 4
    assert generate(run(left), Card.read(left.files["sequence.json"]), rounded.prompts[:1])[0].tokens
    guessing = spec_of("decoder-only", layers=3, several=(4,), exit=1)
    with pytest.raises(InputError, match="no further one can be left out"):
        compress(guessing, "depth:only=core.decoder")
