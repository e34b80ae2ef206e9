"""The built-in examples: their quality, their methods, their data, and generation over any `run`."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pytest
import torch

from edgesdk.errors import InputError
from edgesdk.examples import EXAMPLES, digits, load_weights, normalizer
from edgesdk.examples import normalizer_data as data
from edgesdk.examples.generate import TOKENIZER, encode_text, generate, tokenizer_of
from edgesdk.intake import load_model
from edgesdk.model import ModelSpec

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


def eager(spec: ModelSpec):
    """`run` over the spec's own modules."""

    def run(method, inputs):
        with torch.no_grad():
            out = spec.methods[method].module(*(torch.from_numpy(np.asarray(i)) for i in inputs))
        return [o.numpy() for o in (out if isinstance(out, tuple) else (out,))]

    return run


def parameters(spec: ModelSpec) -> int:
    return sum(p.numel() for p in {id(p): p for m in spec.methods.values() for p in m.module.parameters()}.values())


def test_digits_reaches_its_accuracy_without_scikit_learn():
    spec = spec_of("digits-cnn")
    assert spec.evaluate(eager(spec)) > 0.97
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
    assert spec.evaluate(eager(spec)) >= 0.95
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
    assert generate(eager(spec_of(name)), spec_of(name), said) == written


@pytest.mark.parametrize("name", NORMALIZERS)
def test_methods_agree_with_teacher_forcing(name):
    """Step by step over explicit caches gives the logits of the whole sequence at once."""
    spec, layers = spec_of(name), normalizer.LAYOUTS[name]
    core = load_weights(normalizer.Normalizer(*layers), normalizer._weights(name))
    said, written = "nine minutes to ten pm", "21:51"
    src, out = data.encode(said, normalizer.S), [*data.encode(written, len(written) + 1)]
    with torch.no_grad():
        whole = core(torch.tensor([src]), torch.tensor([out])).numpy()[0]
    run, encoder = eager(spec), layers[0] > 0
    rest = run("encode", [np.array([src])]) if encoder else []
    logits, k, v, *mask = run("prefill", rest if encoder else [np.array([src])])
    rest = rest or mask
    for t, wanted in enumerate(whole):
        np.testing.assert_allclose(logits[0], wanted, atol=2e-3)
        position = np.array([t + 1 if encoder else normalizer.S + t + 1])
        logits, k, v = run("decode", [np.array([out[t]]), position, k, v, *rest])


@pytest.mark.parametrize("name", NORMALIZERS)
def test_methods_chain_in_static_shapes_and_export(name):
    spec = spec_of(name)
    assert list(spec.methods) == (["prefill", "decode"] if name.endswith("decoder-only") else ["encode", "prefill", "decode"])
    shapes = {}
    for method, entry in spec.methods.items():
        program = torch.export.export(entry.module, entry.example_inputs)
        assert not program.range_constraints
        shapes[method] = [tuple(o.shape) for o in program.module(check_guards=False)(*entry.example_inputs)]
        assert all(i.dtype in (torch.float32, torch.int64) for i in entry.example_inputs)
    assert shapes["decode"] == shapes["prefill"][:3]
    if "encode" in shapes:
        assert shapes["encode"] == [tuple(i.shape) for i in spec.methods["prefill"].example_inputs]


@pytest.mark.parametrize("name", NORMALIZERS)
def test_calibration_covers_every_method(name):
    spec = spec_of(name)
    for method, entry in spec.methods.items():
        samples = list(spec.calibration(method))
        assert len(samples) >= 16
        assert [t.shape for t in samples[0]] == [t.shape for t in entry.example_inputs]


def test_padding_changes_nothing():
    """The encoder's answer at real positions does not depend on what stands under the mask."""
    spec = spec_of("normalizer")
    module = spec.methods["encode"].module
    ids = torch.tensor([data.encode("half past two am", normalizer.S)])
    with torch.no_grad():
        k, _, mask = module(ids)
    real = (ids[0] != data.PAD).nonzero()[:, 0]
    assert torch.all(mask[real] == 0) and torch.all(mask[len(real) :] < -1000)
    assert torch.isfinite(k).all()


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


def test_tokenizer_in_a_bundle_is_enough_to_generate():
    spec = spec_of("normalizer")
    content = spec.files[TOKENIZER]
    assert generate(eager(spec), content, "ten to six pm") == generate(eager(spec), json.loads(content), "ten to six pm") == "17:50"


@pytest.mark.parametrize(("text", "said"), [("", "empty"), ("   ", "empty"), ("naïve", "'ï'"), ("one " * 20, "79 characters")])
def test_text_that_the_model_does_not_take(text, said):
    with pytest.raises(InputError, match=said):
        encode_text(tokenizer_of(spec_of("normalizer")), text)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"kind": "words"}', b'{"kind": "characters"}'])
def test_tokenizer_that_is_wrong(content):
    with pytest.raises(InputError):
        tokenizer_of(content)


def test_a_model_without_a_tokenizer_takes_no_text():
    with pytest.raises(InputError, match="takes no text"):
        generate(eager(spec_of("digits-cnn")), spec_of("digits-cnn"), "five")


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="not there"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "none.npz")


def test_shipped_files_are_small():
    total = sum(p.stat().st_size for p in normalizer.HERE.glob("*.npz"))
    assert total < 8e6
    assert all(p.stat().st_size < 4e6 for p in normalizer.HERE.glob("*.npz"))
