"""Generation over programs that were planned and built: ExecuTorch and LiteRT write what the torch modules write."""

from __future__ import annotations

from pathlib import Path

import pytest
from sequence_small import built

from edgesdk.bundles import read_member
from edgesdk.errors import DeviceError, InputError
from edgesdk.helper import serve
from edgesdk.intake import load_model
from edgesdk.plan.fake_quant import run as modules
from edgesdk.run import Encoder, run
from edgesdk.runner import method_of, open_program
from edgesdk.sequence.card import Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.generate import generate
from edgesdk.sequence.tokens import tokenizer_of
from edgesdk.transport.local import LocalTransport

torch = pytest.importorskip("torch")
MODELS = Path(__file__).with_name("sequence_small.py")
PROMPTS = ["hello you", "a", "longer prompt"]


@pytest.mark.parametrize(
    ("name", "runtime"), [("encoder_decoder", "litert"), pytest.param("decoder_decoder", "executorch", marks=pytest.mark.wide)]
)
def test_built_programs_write_what_the_modules_write(name, runtime, tmp_path):
    pytest.importorskip("executorch" if runtime == "executorch" else "ai_edge_litert")
    spec = load_model(f"{MODELS}:{name}")
    bundle = built(name, "host", runtime, tmp_path / "model.edge")
    card = Card.read(read_member(bundle, "sequence.json"))
    tokenizer = tokenizer_of(card, lambda n: read_member(bundle, n))
    program = tmp_path / ("model.pte" if runtime == "executorch" else "model.tflite")
    program.write_bytes(read_member(bundle, program.name))
    runner = open_program(str(program), runtime)
    for settings in (Settings(), Settings(beams=2, max_tokens=6), Settings(temperature=0.5, seed=4, max_tokens=6)):
        wanted = generate(modules(spec), card, PROMPTS, settings, tokenizer)
        got = generate(runner.run, card, PROMPTS, settings, tokenizer)
        assert [(r.tokens, r.text, r.stopped) for r in got] == [(r.tokens, r.text, r.stopped) for r in wanted]
        assert [r.calls for r in got] == [r.calls for r in wanted]
    assert max(len(r.tokens) for r in generate(runner.run, card, PROMPTS, tokenizer=tokenizer)) > 8, "beyond the first cache"
    answer = run(bundle, LocalTransport(tmp_path / "root"), prompt=PROMPTS)
    assert [r.tokens for r in answer.results] == [r.tokens for r in generate(runner.run, card, PROMPTS, tokenizer=tokenizer)]
    if name == "encoder_decoder":
        _with_the_encoder_elsewhere(bundle, tmp_path, [r.tokens for r in answer.results])


def _with_the_encoder_elsewhere(bundle: Path, folder: Path, tokens: list[list[int]]) -> None:
    """The encoder in this process, the decoder in the agent's: over TCP, floats as they are and in 8 bits."""
    device = LocalTransport(folder / "root")
    with serve(bundle, port=0) as helper:
        host, port = helper.address
        whole = run(bundle, device, prompt=PROMPTS, encoder=Encoder(host, port, 32))
        coarse = run(bundle, device, prompt=PROMPTS, encoder=Encoder(host, port, 8))
    assert [r.tokens for r in whole.results] == tokens and helper.answered == 2 * len(PROMPTS)
    assert whole.link["received_bytes"] > coarse.link["received_bytes"] > 0 and whole.link["wait_s"] >= whole.link["run_s"] > 0
    assert [r.tokens[:1] for r in coarse.results] == [t[:1] for t in tokens]
    with pytest.raises(DeviceError, match="cannot be reached"):
        run(bundle, device, prompt="a", encoder=Encoder(host, port))


def test_a_bundle_without_an_encoder_is_not_served(tmp_path):
    with pytest.raises(InputError, match="no such file"), serve(tmp_path / "none.edge"):
        pass


def test_a_file_with_one_signature_is_forward_but_for_a_sequence_models():
    """An encoder-only model has the one method `encode`; whatever a converter calls a plain model's signature, it is `forward`."""
    assert method_of("encode", 1) == "encode" and method_of("encode_64", 1) == "encode_64"
    assert method_of("serving_default", 1) == "forward" and method_of("forward", 1) == "forward"
    assert method_of("classify", 2) == "classify"
