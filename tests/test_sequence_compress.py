"""Compression of sequence models of the family: whole answers are what training sees, and what was trained is what runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgesdk.compress import compress
from edgesdk.compress.generated import Calls, Chain, chain_of, self_generated
from edgesdk.plan.fake_quant import run
from edgesdk.sequence.card import Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.generate import generate
from edgesdk.sequence.model import SequenceModel

STACK = {"dim": 32, "heads": 4, "kv_heads": 2, "head": 8, "ffn": 64}


def spec_of(layout: str, **more):
    torch.manual_seed(0)
    encoder = Stack(layers=1, **STACK) if layout == "encoder-decoder" else None
    model = SequenceModel(SequenceConfig(layout=layout, vocab=30, encoder=encoder, decoder=Stack(layers=2, **STACK)))
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
