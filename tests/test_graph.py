"""Graphs: MACs against PyTorch's own counter and against published figures, exact weights, liveness, damaged flatbuffers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgesdk.errors import InputError
from edgesdk.graph import trace
from edgesdk.graph.tflite_read import read_tflite
from edgesdk.graph.torch_trace import trace_method
from edgesdk.intake import load_model
from edgesdk.model import Method
from tests.tiny import tiny_tflite

MODELS = Path(__file__).parents[1].parent / "shared" / "data" / "models"


class Twice(nn.Module):
    """One layer used twice, and a view: two units, one weight, no traffic for the view."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x).reshape(1, 16)).relu()


NETS = {
    "mlp": (nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)), torch.zeros(3, 20)),
    "conv": (nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1)), torch.zeros(1, 3, 17, 19)),
    "conv1d": (nn.Conv1d(4, 6, 5, padding=2), torch.zeros(1, 4, 33)),
    "grouped": (nn.Conv2d(8, 16, 3, groups=4), torch.zeros(1, 8, 9, 9)),
    "attention": (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.zeros(1, 7, 32)),
    "twice": (Twice(), torch.zeros(1, 16)),
}


@pytest.mark.parametrize("name", NETS)
def test_macs_are_those_of_pytorchs_counter(name):
    module, x = NETS[name]
    module.train(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        module(x)
        torch.backends.mha.set_fastpath_enabled(True)
    units = trace_method(Method(module, (x,)), "forward").units
    assert sum(u.macs for u in units if u.op != "attention") == counter.get_total_flops() // 2  # the counter leaves fused attention out
    attention = [u.macs for u in units if u.op == "attention"]
    assert attention == ([2 * 7 * 7 * 32] if name == "attention" else [])


def test_a_layer_used_twice_is_stored_once():
    graph = trace_method(Method(Twice().eval(), (torch.zeros(1, 16),)), "forward")
    linear = [u for u in graph.units if u.op == "linear"]
    assert [u.name for u in linear] == ["layer", "layer#2"] and len({u.weight for u in linear}) == 1
    assert all(u.in_elements == u.out_elements == 0 for u in graph.units if u.op == "reshape")


def test_liveness_counts_intermediates_alone():
    wide = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 4))
    graph = trace_method(Method(wide.eval(), (torch.zeros(1, 4),)), "forward")
    assert graph.peak_activation_bytes == 2 * 1000 * 4  # the relu's input and output


def test_what_cannot_be_exported_is_told():
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(InputError, match="method 'forward' cannot be exported"):
        trace_method(Method(Branches(), (torch.zeros(2),)), "forward")


def test_sequence_methods_share_weights_and_name_their_caches():
    graph = trace(load_model("example:normalizer"))
    assert {m.name for m in graph.methods} == {"encode", "decode"}
    decode = graph.method("decode")
    assert decode.cache_inputs == ("self_k_0", "self_v_0", "self_k_1", "self_v_1")
    assert decode.cross_cache_inputs == ("cross_k_0", "cross_v_0", "cross_k_1", "cross_v_1")
    encode = {u.weight for u in graph.method("encode").units if u.weight_elements}
    assert encode & {u.weight for u in decode.units} == {"core.embed.weight"}


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs ../shared/data/models (MLPerf Tiny)")
@pytest.mark.parametrize(
    ("name", "macs", "weights"),
    [("resnet8", 12_501_632, 77_360), ("vww", 7_489_664, 208_112), ("kws", 2_656_768, 22_016), ("ad", 264_192, 264_192)],
)
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_mlperf_tiny(name, macs, weights, kind):
    graph = trace(load_model(str(MODELS / f"mlperf_tiny_{name}_{kind}.tflite")))
    assert graph.methods[0].macs == macs
    assert sum(u.weight_elements for u in graph.weights().values()) == weights


def test_a_flatbuffer_cut_anywhere_is_an_error_and_never_a_crash(tmp_path):
    import numpy as np

    whole = tiny_tflite(np.ones((3, 8), np.float32))
    path = tmp_path / "m.tflite"
    path.write_bytes(whole)
    assert read_tflite(path)[0].macs == 24
    for size in range(8, len(whole), 7):
        path.write_bytes(whole[:size])
        try:
            read_tflite(path)
        except InputError as error:
            assert "damaged or cut off" in error.what or "unsupported" in error.what


def test_an_unsupported_operator_is_named(tmp_path):
    import numpy as np
    from ai_edge_litert import schema_py_generated as s

    content = bytearray(tiny_tflite(np.ones((3, 8), np.float32)))
    code = s.Model.GetRootAsModel(content, 0).OperatorCodes(0)
    table = code._tab
    field = table.Pos + table.Offset(10)  # builtin_code
    struct.pack_into("<i", content, field, 190)
    path = tmp_path / "odd.tflite"
    path.write_bytes(content)
    with pytest.raises(InputError, match="unsupported operator code 190 at index 0"):
        read_tflite(path)
