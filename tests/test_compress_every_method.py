"""What holds for every method of the registry: bytes, files, ties, odd shapes, and a clear answer to bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.cli import main
from edgesdk.compress import compress
from edgesdk.compress.registry import METHODS, configured, method
from edgesdk.compress.saved import load
from edgesdk.compress.weights import weights_of
from edgesdk.errors import DoesNotFit, EdgeError, InputError
from edgesdk.model import ModelSpec
from edgesdk.packed import decode, pack, unpack
from tests.small_models import seeded, spec_of

torch.set_num_threads(1)

RECIPES: dict[str, list[str]] = {
    "auto": ["auto:bits=5,generations=1"],
    "qat": ["rtn:bits=3", "qat:steps=4,batch=4"],
    "lora": ["rtn:bits=2,group=0", "lora:rank=2,steps=12,batch=8"],
    "ternary-qat": ["ternary-qat:steps=4,batch=4,least=4"],
    "distill": ["magnitude", "distill:steps=4,batch=4"],
    "eora": ["rtn:bits=2,group=0", "eora:rank=2"],
    "nm": ["nm:steps=4,batch=4,recipe=flow,every=1"],
    "magnitude": ["magnitude:steps=4,batch=4,ramp=0.5,every=1"],
    "structured": ["structured:tune=2"],
    "depth": ["depth:tune=2"],
    "synthetic": ["synthetic:steps=5", "rtn"],
    "lord": ["lord:energy=0.9"],
    "lqlora": ["lqlora:bits=4"],
    "smooth": ["smooth", "rtn:bits=8"],
    "flatten": ["flatten:steps=5", "rtn"],
}
WEIGHT_METHODS = [n for n in METHODS if method(n).level == "weight"]
NO_DATA = {"rtn", "synthetic", "udfc", "easyquant", "finequant", "ternary", "lossless"}  # which need none as they are


def recipe_of(name: str) -> list[str]:
    return RECIPES.get(name, [name])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(18), nn.Linear(18, 25), nn.Linear(25, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Kinds(nn.Module):
    """Every kind of weight: grouped and depthwise convolutions, one of a line, an embedding, one tied to a linear; odd widths, a row of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.grouped, self.deep = nn.Conv2d(12, 18, 3, groups=3, padding=1), nn.Conv2d(18, 18, 3, groups=18)
        self.line, self.places, self.embed = nn.Conv1d(18, 18, 3, padding=1), nn.Embedding(7, 18), nn.Embedding(11, 18)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(18, 11, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.blocks[0].up.weight[3] = 0
            self.blocks[1].down.weight[:, 4] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.deep(torch.relu(self.grouped(torch.relu(self.bn(self.stem(x))))))).flatten(2)
        x = self.line(x).mean(2)
        x = x + self.places(x.argmax(1) % 7)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def kinds(calibration: bool = True) -> ModelSpec:
    return replace(spec_of(seeded(Kinds), 2, 5, 5, count=12, calibration=calibration), name="kinds")


def answer(spec: ModelSpec) -> torch.Tensor:
    entry = spec.methods["forward"]
    with torch.no_grad():
        out: torch.Tensor = entry.module(*entry.example_inputs)
    return out


@pytest.mark.parametrize("name", METHODS)
def test_what_is_counted_is_written_is_computed_and_comes_back(name: str, tmp_path: Path) -> None:
    spec = kinds()
    done = compress(spec, recipe_of(name))
    held = weights_of(done.spec)
    for key, code in done.spec.codes.items():
        assert np.array_equal(decode(unpack(pack(code))), held[key].matrix.numpy()), key
    assert {w.weight: w.bytes for w in done.report.weights} == {n: len(pack(c)) for n, c in done.spec.codes.items()}
    whole = sum(4 * w.matrix.numel() for n, w in held.items() if n not in done.spec.codes)
    assert done.report.weight_bytes == whole + sum(len(pack(c)) for c in done.spec.codes.values())
    assert set(held) - set(done.spec.codes) >= set(done.report.kept)
    made = answer(done.spec)
    assert made.shape == answer(spec).shape and bool(torch.isfinite(made).all())
    module = done.spec.methods["forward"].module
    assert not hasattr(module.head, "weight") or module.head.weight is module.embed.weight  # still tied, where it is still one layer
    file = done.save(tmp_path / "kinds.edgec")
    assert file.stat().st_size >= sum(w.bytes for w in done.report.weights)
    assert torch.equal(answer(load(file, base=spec).spec), made)
    assert torch.equal(answer(kinds()), answer(spec))  # the given model stays as it was


@pytest.mark.parametrize("name", [n for n in WEIGHT_METHODS if n != "eora"])
def test_a_second_time_changes_next_to_nothing(name: str) -> None:
    once = compress(kinds(), name)
    again = compress(once.spec, name)
    assert compress(kinds(), name).report.compressed_digest == once.report.compressed_digest
    assert again.report.weight_bytes <= 1.02 * once.report.weight_bytes
    worst = max(w.error for w in once.report.weights)
    assert max(w.error for w in again.report.weights) <= 0.3 * worst


@pytest.mark.parametrize("recipe", [["lord:energy=0.9", "rtn:bits=8"], ["flatten:steps=5", "rtn"], ["structured", "hadamard"], ["vptq"]])
def test_the_program_computes_what_the_compressed_module_does(recipe: list[str]) -> None:
    from executorch.runtime import Runtime

    from edgesdk.lower import lower

    done = compress(kinds(), recipe)
    entry = done.spec.methods["forward"]
    program = Runtime.get().load_program(lower(done.spec, "executorch", {}))  # holds the bytes that its methods read: keep it
    method = program.load_method("forward")
    assert torch.allclose(method.execute(list(entry.example_inputs))[0], answer(done.spec), atol=1e-4)


# ---- bad input


def refused(model: ModelSpec, recipe: Any, kind: type[EdgeError] = InputError) -> str:
    """The two lines of the error."""
    with pytest.raises(kind) as error:
        compress(model, recipe)
    assert str(error.value).count("\n") == 1 and error.value.exit_code == (1 if kind is DoesNotFit else 2)
    return str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_bad_input_has_a_clear_answer(name: str) -> None:
    recipe = recipe_of(name)
    for value in (float("nan"), float("inf")):
        broken = kinds()
        with torch.no_grad():
            broken.methods["forward"].module.blocks[0].up.weight[2, 3] = value
        assert "blocks.0.up.weight holds NaN or infinite values" in refused(broken, recipe)
    assert "nothing to compress" in refused(spec_of(nn.Sequential(nn.LayerNorm(5), nn.ReLU()), 5), recipe)
    assert "is a .tflite" in refused(ModelSpec("flat", "0" * 64, {}), recipe)
    assert "nonsense" in refused(kinds(), f"{name}:nonsense=1")
    for setting in method(name).config.model_fields:
        with pytest.raises(InputError, match=setting) as error:
            configured(name, {setting: {"a": 1}})
        assert str(error.value).count("\n") == 1
    if name not in NO_DATA and name != "auto":
        assert "calibration data" in refused(kinds(calibration=False), recipe)
        assert "gives no inputs for forward" in refused(replace(kinds(), calibration=lambda m: []), recipe)
        poisoned = [(torch.full((1, 2, 5, 5), float("nan")),)] * 4
        assert "calibration input 0 of forward holds NaN" in refused(replace(kinds(), calibration=lambda m: poisoned), recipe)
    elif name in NO_DATA:
        assert compress(kinds(calibration=False), recipe).report.model == "kinds"


@pytest.mark.parametrize("recipe", ["auto:bits=0.05,generations=0", "lqlora:bits=1.1", "welore:size=0.001", "lord:size=0.001"])
def test_a_budget_under_the_floor_does_not_fit(recipe: str) -> None:
    assert "smallest" in refused(kinds(), recipe, DoesNotFit)


class Zeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 33), nn.Linear(33, 6)
        nn.init.zeros_(self.a.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("auto", "depth", "synthetic")])
def test_a_weight_of_zeros_is_sane(name: str) -> None:
    done = compress(spec_of(seeded(Zeros), 20), recipe_of(name))
    assert bool(torch.isfinite(answer(done.spec)).all()) and all(np.isfinite(w.error) for w in done.report.weights)


MODELS = """
import torch
from torch import nn
from edgesdk.model import Method, ModelSpec

def _spec(module, calibration=None):
    return ModelSpec("m", "0" * 64, {"forward": Method(module.eval(), (torch.zeros(1, 8),))}, calibration=calibration)

def blind():
    return _spec(nn.Linear(8, 8))

def broken():
    module = nn.Linear(8, 8)
    module.weight.data[0, 0] = float("nan")
    return _spec(module)

def empty():
    return _spec(nn.ReLU())
"""


@pytest.mark.parametrize(
    ("model", "recipe", "code", "text"),
    [
        ("blind", "gptq", 2, "no calibration data"),
        ("blind", "qat", 2, "stored as a code"),
        ("blind", "depth", 2, "no calibration data"),
        ("blind", 'auto:bits=0.01,methods=["rtn"],generations=0', 1, "smallest options"),
        ("blind", "rtn:bits=four", 2, "bits"),
        ("blind", "magnitude:inputs=3", 2, "inputs"),
        ("broken", "rtn", 2, "weight holds NaN"),
        ("empty", "rtn", 2, "nothing to compress"),
    ],
)
def test_the_verb_says_so_in_two_lines(
    model: str, recipe: str, code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    with pytest.raises(SystemExit) as stop:
        main(["--quiet", "compress", "--model", f"{tmp_path / 'models.py'}:{model}", "-r", recipe])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (code, "", 2)
    assert text in err
