"""Exported programs (.pt2): their layers are found again, so that every method takes them as it takes modules."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgesdk.compress import compress
from edgesdk.compress.dependency import trace
from edgesdk.compress.shrink import cuttable
from edgesdk.compress.weights import holders, weights_of
from edgesdk.errors import InputError
from edgesdk.intake import load_model
from edgesdk.packed import decode


class Net(nn.Module):
    """A convolution, a norm, a layer that is called twice, a weight of its own, and an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding="same", groups=2)
        self.norm = nn.BatchNorm1d(16)
        self.twice = nn.Linear(16, 16)
        self.mix = nn.Parameter(torch.randn(12, 16))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        x = self.twice(torch.relu(self.twice(x)))
        return x @ self.embed.weight.T, nn.functional.linear(x, self.mix)


def exported(folder: Path, net: nn.Module, *inputs: torch.Tensor) -> Path:
    path = folder / "net.pt2"
    torch.export.save(torch.export.export(net.eval(), inputs), path)
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: Any) -> tuple[Net, Path, torch.Tensor]:
    torch.manual_seed(0)
    net, tokens = Net(), torch.randint(0, 40, (2, 6))
    return net, exported(tmp_path_factory.mktemp("pt2"), net, tokens), tokens


def test_layers_come_back_with_their_names(stored: tuple[Net, Path, torch.Tensor]) -> None:
    net, path, tokens = stored
    spec = load_model(str(path))
    module = spec.methods["forward"].module
    kinds = {name: type(uses[0][2]).__name__ for name, uses in holders(spec).items()}
    assert kinds == {"embed.weight": "Embedding", "conv.weight": "Conv1d", "twice.weight": "Linear", "mix_linear.weight": "Linear"}
    for copied in (module, copy.deepcopy(module).eval()):
        torch.testing.assert_close(copied(tokens), net(tokens))
    with torch.no_grad():
        copy.deepcopy(module).twice.weight.zero_()
    torch.testing.assert_close(module(tokens), net(tokens))  # a copy has weights of its own


def test_a_program_is_compressed_and_loaded_again(stored: tuple[Net, Path, torch.Tensor], tmp_path: Path) -> None:
    _, path, tokens = stored
    made = compress(str(path), "auto:bits=6")
    assert made.report.bits <= 6 and {w.weight for w in made.report.weights} == set(weights_of(made.spec))
    again = load_model(str(made.save(tmp_path / "net.edgec")))
    torch.testing.assert_close(again.methods["forward"].module(tokens), made.spec.methods["forward"].module(tokens))
    for name, code in again.codes.items():
        torch.testing.assert_close(torch.from_numpy(decode(code)), weights_of(again)[name].matrix)


def test_methods_that_need_data_say_so_or_take_it(stored: tuple[Net, Path, torch.Tensor]) -> None:
    _, path, _ = stored
    with pytest.raises(InputError, match="no calibration data"):
        compress(str(path), "gptq:bits=4")
    spec = replace(load_model(str(path)), calibration=lambda method: [(torch.randint(0, 40, (2, 6)),) for _ in range(4)])
    report = compress(spec, "gptq:bits=4").report
    assert len(report.weights) == 4 and all(0 < w.error < 0.1 for w in report.weights)


def test_channels_of_a_program_are_cut(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    spec = load_model(str(exported(tmp_path, net, torch.randn(1, 1, 6, 6))))
    assert [(f.name, len(f.units)) for f in cuttable(spec, trace(spec).families)] == [("0", 8), ("4", 16)]


def test_a_decomposed_program_has_nothing_to_compress(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(8, 8).eval(), (torch.randn(1, 8),)).run_decompositions()
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(InputError, match="nothing to compress"):
        compress(str(tmp_path / "net.pt2"), "rtn:bits=4")
