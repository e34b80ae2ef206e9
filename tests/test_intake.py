"""Every form that `--model` takes, and what it says to what it does not take."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_tflite

from edgesdk.errors import EdgeError, InputError, MissingTool, UnknownName
from edgesdk.graph import trace
from edgesdk.intake import load_model
from edgesdk.model import ModelSpec

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "models"

FACTORIES = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
from edgesdk.model import Method, ModelSpec
import beside

@dataclass
class Size:
    n: int = 4

class Net(nn.Module):
    example_inputs = (torch.zeros(1, 4),)
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(Size().n, beside.OUT)
    def forward(self, x):
        return self.fc(x)

def pair(): return Net(), (torch.zeros(1, 4),)
def single_tensor(): return Net(), torch.zeros(1, 4)
def with_attribute(): return Net()
def half(): return Net().to(torch.bfloat16).float(), (torch.zeros(1, 4),)
def spec(): return ModelSpec("mine", "", {"forward": Method(Net(), (torch.zeros(1, 4),))})
instance = Net()

def wrong_shape(): return Net(), (torch.zeros(1, 5),)
def wrong_type(): return {"model": 1}
def no_inputs(): return nn.Linear(2, 2)
def not_tensors(): return Net(), ("text",)
def float64(): return Net().double(), (torch.zeros(1, 4, dtype=torch.float64),)
def needs_argument(size): return Net()
def fails(): raise RuntimeError("no weights\\nsecond line")
def leaves(): raise SystemExit(3)
def empty_spec(): return ModelSpec("mine", "0")
def odd_method(): return ModelSpec("mine", "0", {"encode": Method(Net(), (torch.zeros(1, 4),))})
class Dict(Net):
    def forward(self, x): return {"y": self.fc(x)}
def dict_output(): return Dict(), (torch.zeros(1, 4),)
number = 3
"""


@pytest.fixture
def factories(tmp_path):
    (tmp_path / "beside.py").write_text("OUT = 3\n")
    path = tmp_path / "my_model.py"
    path.write_text(FACTORIES)
    yield path
    sys.modules.pop("beside", None)


def refused(ref: object, *texts: str, kind: type[EdgeError] = InputError) -> EdgeError:
    """The error that `ref` gives: two lines, exit code 2, with `texts` in it."""
    with pytest.raises(kind) as caught:
        load_model(str(ref))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and all(lines), lines
    assert caught.value.exit_code == 2
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ["pair", "single_tensor", "with_attribute", "half", "spec", "instance", "Net"])
def test_a_function_in_a_file(factories, name):
    spec = load_model(f"{factories}:{name}")
    assert isinstance(spec, ModelSpec) and len(spec.digest) == 64
    method = spec.methods["forward"]
    assert method.module(*method.example_inputs).shape == (1, 3)


def test_random_weights_and_digest_are_the_same_again_and_change_with_the_source(factories):
    first, again = (load_model(f"{factories}:pair") for _ in range(2))
    assert first.digest == again.digest
    factories.write_text(FACTORIES + "\nextra = 1\n")
    assert load_model(f"{factories}:pair").digest != first.digest


def test_digest_covers_the_input_shapes(factories):
    factories.write_text(FACTORIES + "\ndef two(): return Net(), (torch.zeros(2, 4),)\n")
    assert load_model(f"{factories}:pair").digest != load_model(f"{factories}:two").digest


def test_global_random_state_is_left_alone(factories):
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    load_model(f"{factories}:pair")
    assert torch.equal(torch.rand(3), wanted)


def test_a_function_in_a_module_of_the_working_folder(factories, monkeypatch):
    monkeypatch.chdir(factories.parent)
    assert load_model("my_model:pair").name == "pair"
    sys.modules.pop("my_model")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pear", "did you mean 'pair'"),
        ("wrong_shape", "example inputs of shape [1, 5]"),
        ("wrong_type", "returned dict"),
        ("no_inputs", "Linear without example_inputs"),
        ("not_tensors", "example input 0 is str"),
        ("float64", "example input 0 is torch.float64"),
        ("needs_argument", "missing a required argument: 'size'"),
        ("fails", "RuntimeError: no weights"),
        ("leaves", "SystemExit: 3"),
        ("empty_spec", "exactly one of them"),
        ("odd_method", "methods encode"),
        ("dict_output", "answers with dict"),
        ("number", "is int, not a function"),
    ],
)
def test_a_factory_that_is_wrong(factories, name, text):
    refused(f"{factories}:{name}", text, kind=UnknownName if name == "pear" else InputError)


def test_files_and_modules_that_are_wrong(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    refused(f"{broken}:f", "SyntaxError")
    needs = tmp_path / "needs.py"
    needs.write_text("import a_package_that_is_not_there\n")
    refused(f"{needs}:f", "a_package_that_is_not_there")
    refused(f"{tmp_path}/absent.py:f", "cannot be read")
    refused("no_such_package.models:f", "no such module")
    refused("edgesdk.model_help:load", kind=UnknownName)
    refused("..:f", "..")
    for suffix in (".py", ".pt", ".onnx", ".safetensors", ".gguf"):
        refused(f"net{suffix}", suffix)
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "not a form it takes")
    refused("nothing-of-this-name", "no such file, folder or model")
    refused("digit-cnn", "did you mean 'example:digits-cnn'")
    refused("example:digit-cnn", "did you mean 'digits-cnn'", kind=UnknownName)
    refused(tmp_path, "has no config.json")


def test_pt2(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    x = torch.randn(1, 4)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (x,)), path)
    spec = load_model(str(path))
    method = spec.methods["forward"]
    assert spec.name == "net"
    torch.testing.assert_close(method.module(x), net(x))
    assert [u.op for u in trace(spec).methods[0].units].count("linear") == 2


def test_pt2_that_is_wrong(tmp_path, capfd):
    refused(tmp_path / "absent.pt2", "No such file")
    path = tmp_path / "net.pt2"
    for content in (b"", b"not a zip", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        refused(path, "not a program that torch.export.save wrote")
    torch.save(torch.nn.Linear(2, 2), path)
    refused(path, "not a program that torch.export.save wrote")
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_tflite(tmp_path):
    path = tmp_path / "tiny.tflite"
    content = tiny_tflite(np.ones((3, 8), np.float32))
    path.write_bytes(content)
    spec = load_model(str(path))
    assert spec.flatbuffer == path.resolve() and not spec.methods and len(spec.digest) == 64
    for cut in (0, 3, 8, 40, len(content) // 2):
        path.write_bytes(content[:cut])
        refused(path)
    path.write_bytes(b"PK\x03\x04 a zip")
    refused(path, "no TFL3 mark")
    refused(tmp_path / "absent.tflite", "No such file")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}: the MLPerf Tiny reference models are not here")
def test_the_mlperf_tiny_models_load():
    models = sorted(DATA.glob("*.tflite"))
    assert len(models) >= 8
    assert len({load_model(str(m)).digest for m in models}) == len(models)


def test_without_transformers_the_command_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == "transformers" else real(n, *a))
    refused(tmp_path, "pip install 'edgesdk[hub]'", kind=MissingTool)


def tiny_hub_model(kind: str):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, max_position_embeddings=40, **small))
    if kind == "phi":
        return transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=50, **small))
    if kind == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **small))
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))}
    return transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(vocab_size=50, d_model=32, **sides))


@pytest.mark.parametrize(("kind", "shape"), [("bert", (1, 2)), ("phi", (1, 64, 50)), ("vit", (1, 2)), ("m2m100", (1, 64, 50))])
def test_hugging_face_folder(tmp_path, kind, shape, capfd):
    model = tiny_hub_model(kind)
    model.save_pretrained(tmp_path / kind)
    capfd.readouterr()
    spec = load_model(str(tmp_path / kind))
    said = capfd.readouterr()
    assert said.out + said.err == ""
    method = spec.methods["forward"]
    assert spec.name == kind and method.module(*method.example_inputs).shape == shape
    assert sum(u.weight_elements for u in trace(spec).methods[0].units) > 1000
    assert load_model(str(tmp_path / kind)).digest == spec.digest


def test_hugging_face_that_is_wrong(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    refused("some-owner/some-model-that-is-not-cached", "no network, or no such model")
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    refused(folder, "folder is not complete")
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    refused(folder, "folder is not complete")
    (folder / "config.json").write_text("{")
    refused(folder)
