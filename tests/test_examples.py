"""The built-in examples: their quality, their programs, their data, and their answers over any `run`."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
import torch

from edgesdk.errors import InputError, UnknownName
from edgesdk.examples import EXAMPLES, digits, load_weights, normalizer
from edgesdk.examples import normalizer_data as data
from edgesdk.intake import load_model
from edgesdk.model import ModelSpec
from edgesdk.plan.fake_quant import run
from edgesdk.sequence.card import NAME, Card, SequenceError
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.generate import generate
from edgesdk.sequence.saved import checkpoint_of
from edgesdk.sequence.sizes import Sizes
from edgesdk.sequence.tokens import tokenizer_of

NORMALIZERS = [name for name in EXAMPLES if name.startswith("normalizer")]
_specs: dict[str, ModelSpec] = {}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are quickest on one thread, and many times slower on two where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spec_of(name: str) -> ModelSpec:
    if name not in _specs:
        _specs[name] = load_model(f"example:{name}")
    return _specs[name]


def answer(spec: ModelSpec, text: str, settings: Settings | None = None) -> str:
    """What its programs answer."""
    card = Card.read(spec.files[NAME])
    (result,) = generate(run(spec), card, [text], settings, tokenizer_of(card, spec.files.__getitem__))
    return result.text


def parameters(spec: ModelSpec) -> int:
    return sum(p.numel() for p in {id(p): p for m in spec.methods.values() for p in m.module.parameters()}.values())


def test_digits_reaches_its_accuracy_without_scikit_learn():
    spec = spec_of("digits-cnn")
    assert spec.evaluate(run(spec)) > 0.97
    assert 100_000 < parameters(spec) < 400_000
    assert spec.methods["forward"].example_inputs[0].shape == (1, 1, 8, 8)
    assert len(list(spec.calibration("forward"))) >= 32
    assert spec.files["labels.txt"].decode().split() == list("0123456789")


def test_digits_evaluation_data_is_that_of_scikit_learn_and_apart_from_calibration():
    sklearn = pytest.importorskip("sklearn.datasets")
    whole = sklearn.load_digits()
    known = {(image.astype(np.uint8).tobytes(), int(label)) for image, label in zip(whole.images, whole.target, strict=True)}
    shipped = np.load(digits.DATA)
    test = list(zip(shipped["test_images"], shipped["test_labels"], strict=True))
    assert len(test) == 360
    assert all((image.tobytes(), int(label)) in known for image, label in test)
    assert not {i.tobytes() for i in shipped["calibration_images"]} & {i.tobytes() for i, _ in test}


def test_digits_accuracy_falls_for_a_wrong_model():
    assert digits.accuracy(lambda method, inputs: [np.eye(10)[[0]]]) < 0.2


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizer_reaches_its_exact_match(name):
    spec = spec_of(name)
    assert spec.quality_name == "exact match"
    assert spec.evaluate(run(spec)) >= 0.95
    assert 400_000 < parameters(spec) < 1_500_000


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("the third of march twenty twenty one", "2021-03-03"),
        ("March 3rd, 2021", "2021-03-03"),
        ("two hundred and five", "205"),
        ("quarter past four pm", "16:15"),
        ("twelve dollars and fifty cents", "$12.50"),
    ],
)
def test_what_the_readme_says(name, said, written):
    assert answer(spec_of(name), said) == written


@pytest.mark.parametrize("name", NORMALIZERS)
def test_programs_are_as_long_as_the_data_and_export(name):
    spec = spec_of(name)
    card = Card.read(spec.files[NAME])
    first = card.methods["prefill" if name.endswith("decoder-only") else "encode"]
    assert (first["source"] or first["tokens"] - len(card.start)) == data.MAX_INPUT and card.max_output == data.MAX_OUTPUT
    assert set(spec.methods) == set(card.methods) and len(card.methods) == 2
    assert {m: e.unroll for m, e in spec.methods.items()} == {first["role"]: 1, "decode": 8 if first["source"] else 7}
    for entry in spec.methods.values():
        assert not torch.export.export(entry.module, entry.example_inputs).range_constraints


@pytest.mark.parametrize("name", NORMALIZERS)
def test_other_lengths_and_guessed_tokens(name):
    spec = load_model(f"example:{name}", Sizes((48,), (11,), draft=4))
    card = Card.read(spec.files[NAME])
    assert card.max_output == 11 and set(card.methods) - set(spec_of(name).methods) == {"decode_x4"}
    assert answer(spec, "nine minutes to ten pm", Settings(draft="copy")) == answer(spec, "nine minutes to ten pm") == "21:51"
    with pytest.raises(InputError, match="want more positions"):
        load_model(f"example:{name}", Sizes((78,)))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_calibration_covers_every_method(name):
    spec = spec_of(name)
    for method, entry in spec.methods.items():
        samples = list(spec.calibration(method))
        assert len(samples) >= 16
        assert [t.shape for t in samples[0]] == [t.shape for t in entry.example_inputs]


def test_the_twins_have_about_the_same_size_and_the_normalizer_names_them():
    sizes = {name: parameters(spec_of(name)) for name in NORMALIZERS}
    assert max(sizes.values()) < 1.25 * min(sizes.values())
    named = set(spec_of("normalizer").alternatives.values())
    assert named == {f"example:{n}" for n in NORMALIZERS if n != "normalizer"}


def test_digests_differ():
    assert len({spec_of(name).digest for name in EXAMPLES}) == len(EXAMPLES)


def test_training_and_evaluation_never_share_a_target():
    train = {written for _, written in data.cases(20000, 1, False)}
    held = data.cases(500, 7, True)
    assert not train & {written for _, written in held}
    assert len({said for said, _ in held}) == len(held)
    assert data.cases(50, 7, True) == held[:50]


def test_generated_cases_are_true():
    """The normal form of what can be read back by the standard library is right; the rest is within what the model takes."""
    for said, written in data.cases(3000, 5, False):
        assert 0 < len(said) < data.MAX_INPUT and len(written) < data.MAX_OUTPUT
        assert set(said + written) <= set(data.ALPHABET)
        if written.count("-") == 2:
            day = datetime.date.fromisoformat(written)
            assert data.MONTHS[day.month - 1][:3] in said
        elif ":" in written:
            time = datetime.time.fromisoformat(written)
            assert said.endswith("pm") == (time.hour >= 12)


def test_words():
    assert [data.words(n) for n in (0, 13, 40, 205)] == ["zero", "thirteen", "forty", "two hundred and five"]
    assert data.words(999999) == "nine hundred and ninety nine thousand nine hundred and ninety nine"


def test_ordinals():
    assert [data.ordinal(n) for n in (1, 2, 11, 12, 20, 21, 30, 31)] == [
        "first", "second", "eleventh", "twelfth", "twentieth", "twenty first", "thirtieth", "thirty first",
    ]  # fmt: skip
    assert [data._suffixed(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd", "31st",
    ]  # fmt: skip


def test_what_takes_sequence_models_takes_these_alone():
    made = checkpoint_of("example:Normalizer")
    assert made.held is not None and len(made.held) == 200 and made.checkpoint.config.encoder is not None
    with pytest.raises(UnknownName, match="sequence model among the examples 'digits-cnn'"):
        checkpoint_of("example:digits-cnn")
    with pytest.raises(InputError, match="has its programs already"):
        load_model("example:digits-cnn", Sizes(draft=4))


@pytest.mark.parametrize(("text", "said"), [("", "empty"), ("   ", "empty"), ("naïve", "'ï'"), ("one " * 20, "80 tokens")])
def test_text_that_the_model_does_not_take(text, said):
    with pytest.raises(SequenceError, match=said):
        answer(spec_of("normalizer"), text)


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="not there"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "none.npz")


def test_shipped_files_are_small():
    total = sum(p.stat().st_size for p in normalizer.HERE.glob("*.npz"))
    assert total < 8e6
    assert all(p.stat().st_size < 4e6 for p in normalizer.HERE.glob("*.npz"))
