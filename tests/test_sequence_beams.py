"""Beam search against that of transformers, on tiny random models of theirs."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_sequence_hub import load_checkpoint, run_of, spec_of, tiny  # noqa: E402

from edgesdk.sequence.card import Card  # noqa: E402
from edgesdk.sequence.choose import Settings  # noqa: E402
from edgesdk.sequence.generate import generate  # noqa: E402
from edgesdk.sequence.sizes import Sizes  # noqa: E402

END, STEPS = 7, 8
CASES = ((1.0, 1.0, 3), (0.0, 1.0, 4), (2.0, 1.3, 2), (-0.5, 1.0, 3))
"""Length penalty, repetition penalty, beams."""


@pytest.mark.parametrize(("family", "prompts"), [("t5", 3), ("llama", 2)])
def test_beams_are_those_of_transformers(family, prompts, tmp_path):
    theirs = tiny(family)
    theirs.save_pretrained(tmp_path)
    spec = spec_of(family, load_checkpoint(str(tmp_path)), Sizes((16,), (32,)), batch=1)
    card = Card.read(spec.files["sequence.json"])
    card.eos = (END,)
    draw = np.random.default_rng(0)
    for _ in range(prompts):
        prompt = draw.integers(8, 60, int(draw.integers(3, 12))).tolist()
        for length, repetition, beams in CASES:
            with torch.no_grad():
                found = theirs.generate(
                    torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=beams, num_return_sequences=beams, do_sample=False,
                    max_new_tokens=STEPS, length_penalty=length, repetition_penalty=repetition, early_stopping=False, eos_token_id=END,
                    forced_eos_token_id=None, return_dict_in_generate=True, output_scores=True,
                )  # fmt: skip
            settings = Settings(beams=beams, best=beams, max_tokens=STEPS, length_penalty=length, repetition_penalty=repetition)
            (result,) = generate(run_of(spec), card, [prompt], settings)
            behind = found.sequences[:, 1 if family == "t5" else len(prompt) :]
            for ours, tokens, score in zip(result.alternatives, behind.tolist(), found.sequences_scores.tolist(), strict=True):
                assert ours["score"] == pytest.approx(score, abs=1e-3)
                assert ours["tokens"] == (tokens[: tokens.index(END)] if END in tokens else tokens)
