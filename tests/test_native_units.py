"""Single linear layers of ExecuTorch programs on our own kernels: the operator, its library, programs that mix it with XNNPACK, plans that choose it."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.bundles import read_manifest
from edgesdk.device import DeviceProfile
from edgesdk.devices import load_device
from edgesdk.efficiency import Efficiency, OpRate
from edgesdk.errors import CheckFailed, InputError, MissingTool
from edgesdk.flash import flash
from edgesdk.graph import trace
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.nearest import nearest
from edgesdk.kernels.numba.library import Compiled
from edgesdk.kernels.reference import linear as reference
from edgesdk.lower import build, lower
from edgesdk.lower.executorch import quantized_modules
from edgesdk.lower.held import refuse_difference
from edgesdk.lower.native_units import library_of
from edgesdk.model import Method, ModelSpec
from edgesdk.native import operator_build
from edgesdk.native.formats import bits_and_group, is_native, name_of, stored_bytes
from edgesdk.native.operator import head_of, linear, native_linear, packed
from edgesdk.packed import Code, decode
from edgesdk.plan import plan
from edgesdk.plan.cost import breaks
from edgesdk.profile import profile
from edgesdk.runner import OPERATORS, RunnerError, load_operators, open_program
from edgesdk.transport.local import LocalTransport

pytestmark = pytest.mark.skipif(bool(operator_build.missing(host_targets()[0])), reason=operator_build.missing(host_targets()[0]))
RNG = np.random.default_rng(5)


def code_of(rows: int, cols: int, bits: int, group: int, zeros: bool = False) -> Code:
    code = nearest(RNG.standard_normal((rows, cols)).astype(np.float32), bits, group, True)
    if not zeros:
        return code
    q, scale, _ = code.arrays
    return replace(code, arrays=(q, scale, RNG.integers(0, 1 << bits, scale.shape).astype(np.float32)))


def open_in(folder: Path, content: bytes) -> Any:
    """A program and its operators, opened as a device does."""
    folder.mkdir(exist_ok=True)
    (folder / "model.pte").write_bytes(content)
    (folder / OPERATORS).write_bytes(library_of(content, host_targets()[0]))
    return open_program(str(folder / "model.pte"), "executorch")


def spec_of(module: nn.Module, *x: torch.Tensor) -> ModelSpec:
    """A model whose digest is that of its weights."""
    words = hashlib.sha256(repr((module, [tuple(t.shape) for t in x])).encode())
    for value in module.state_dict().values():
        words.update(value.numpy().tobytes())
    methods = {"forward": Method(module.eval().requires_grad_(False), x)}
    return ModelSpec(name="small", digest=words.hexdigest(), methods=methods)


CASES = [
    (1, 1, 1, 8, 0, False, (1,)), (7, 33, 3, 8, 0, False, ()), (16, 32, 1, 4, 32, False, (2, 3)), (100, 96, 5, 4, 64, False, (3,)),
    (33, 160, 2, 3, 32, True, (1, 1)), (65, 31, 4, 3, 32, True, (4,)), (31, 256, 17, 2, 0, False, (1, 2, 1)),
]  # fmt: skip
"""Rows, columns, rows of inputs, bits, group, zeros, dimensions before the last two."""


def test_the_operator_against_the_reference(tmp_path: Path) -> None:
    """In PyTorch and in ExecuTorch, one program with a layer of each case."""
    kernels, layers, inputs, codes, biases = Compiled(host_targets()[0]), [], [], [], []
    for rows, cols, m, bits, group, zeros, before in CASES:
        code = code_of(rows, cols, bits, group, zeros)
        bias = RNG.standard_normal(rows).astype(np.float32) if m % 2 else None
        layers.append(native_linear(packed(code, kernels, bias), rows))
        codes.append(code)
        biases.append(bias)
        inputs.append(torch.from_numpy(RNG.standard_normal((*before, m, cols)).astype(np.float32) * 3))

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(layer(x) for layer, x in zip(self.layers, xs, strict=True))

    content = lower(spec_of(Many(), *inputs), "executorch", {})
    outputs = open_in(tmp_path, content).run("forward", [x.numpy() for x in inputs])
    for case, x, code, bias, layer, out in zip(CASES, inputs, codes, biases, layers, outputs, strict=True):
        wanted = reference(x.reshape(-1, x.shape[-1]).numpy(), code, bias).reshape(*x.shape[:-1], code.shape[0])
        limit = 2e-3 * np.abs(wanted).max()
        assert out.shape == wanted.shape, case
        np.testing.assert_allclose(layer(x).numpy(), wanted, rtol=0, atol=limit, err_msg=str(case))
        np.testing.assert_allclose(out, wanted, rtol=0, atol=limit, err_msg=str(case))
        np.testing.assert_allclose(out, layer(x).numpy(), rtol=1e-5, atol=1e-5, err_msg="eager, export and program agree")


def test_rows_that_vary(tmp_path: Path) -> None:
    """A program with a dynamic number of rows: one, none, and more than it saw."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    code = code_of(40, 64, 4, 32)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), native_linear(packed(code, Compiled(host_targets()[0])), 40), nn.ReLU()).eval()
    sizes = ({0: torch.export.Dim("n", min=1, max=9)},)
    with torch.no_grad():
        exported = torch.export.export(module, (torch.randn(4, 64),), dynamic_shapes=sizes, strict=False)
        lowered = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
        runner = open_in(tmp_path, bytes(lowered.to_executorch().buffer))
        for n in (4, 1, 9, 2):
            x = torch.randn(n, 64)
            got = runner._method("forward").execute([x])[0]
            assert got.shape == (n, 40)
            torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-4)


def test_weights_of_another_layout_and_inputs_of_another_width_are_refused() -> None:
    content = packed(code_of(8, 32, 8, 0), Compiled(host_targets()[0]))
    assert head_of(content)["form"] == b"8_row"
    with pytest.raises(ValueError, match="32 columns"):
        linear(np.zeros((2, 33), np.float32), content)
    old = content.copy()
    old[0] ^= 0x40
    for bad in (old, content[:40], np.zeros(0, np.uint8)):
        with pytest.raises(CheckFailed, match="layout"):
            linear(np.zeros((2, 32), np.float32), bad)


class Net(nn.Module):
    """A small convolutional network with a wide linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.wide(torch.relu(self.conv(x)).flatten(1))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = nn.LayerNorm(64), *(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        a = (self.q(y) @ self.k(y).transpose(-1, -2) / 8).softmax(-1) @ self.v(y)
        return x + self.o(a)


def test_mixed_programs_compute_what_their_modules_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cases: list[tuple[nn.Module, torch.Tensor, dict[str, str]]] = [
        (Net(), torch.randn(1, 1, 8, 8), {"wide": "native-int4-g32"}),
        (Attention(), torch.randn(1, 6, 64), {"q": "native-int8", "k": "native-int4-g32", "v": "int8-dynamic", "o": "native-int3-g32"}),
    ]
    for i, (module, x, units) in enumerate(cases):
        spec, choice = spec_of(module, x), {("forward", u): p for u, p in units.items()}
        content = lower(spec, "executorch", choice)
        assert refuse_difference(spec, "executorch", choice, content) >= len(units)
        with torch.no_grad():
            wanted = quantized_modules(spec, choice)["forward"](x)
            exact = module(x)
        got = torch.from_numpy(open_in(tmp_path / str(i), content).run("forward", [x.numpy()])[0])
        torch.testing.assert_close(got, wanted, rtol=5e-3, atol=5e-3)
        assert 1e-5 < float((got - exact).norm() / exact.norm()) < 0.2
        with pytest.raises(CheckFailed, match="planned"):
            refuse_difference(spec, "executorch", {**choice, ("forward", "wide" if i == 0 else "q"): "native-int2-g32"}, content)


def test_methods_share_their_weights_and_compressed_codes_run_as_they_are(tmp_path: Path) -> None:
    code = code_of(128, 256, 3, 64, zeros=True)
    layer = nn.Linear(256, 128)
    layer.weight.data.copy_(torch.from_numpy(decode(code)))
    module = nn.Sequential(layer).eval().requires_grad_(False)
    x = torch.randn(3, 256)
    methods = {"one": Method(module, (x[:1],)), "three": Method(module, (x,))}
    spec = ModelSpec(name="two", digest="shared" + "7" * 40, methods=methods, codes={"0.weight": code})
    assert name_of(code) == "native-int3-g32"
    choice = {(m, "0"): "native-int3-g32" for m in methods}
    content = lower(spec, "executorch", choice)
    held = stored_bytes(128, 256, "native-int3-g32") + 8 * 128 * 1  # zeros of int8 a block
    assert len(content) < held + 8000, "stored once"
    runner = open_in(tmp_path, content)
    got = runner.run("three", [x.numpy()])[0]
    np.testing.assert_allclose(got, reference(x.numpy(), code, layer.bias.detach().numpy()), rtol=0, atol=2e-3 * np.abs(got).max())
    np.testing.assert_allclose(runner.run("one", [x[:1].numpy()])[0], got[:1], rtol=1e-4, atol=1e-4)


def test_what_cannot_take_it_is_refused() -> None:
    net = Net()
    for unit, precision in (("conv", "native-int8"), ("head", "native-table4"), ("head", "native-int5")):
        with pytest.raises(InputError):
            lower(spec_of(net, torch.randn(1, 1, 8, 8)), "executorch", {("forward", unit): precision})
    assert bits_and_group("native-int4-g64") is None and not is_native("int4-g32")
    assert name_of(code_of(4, 32, 4, 0)) == "native-int4"


def test_libraries_for_other_machines_are_refused(tmp_path: Path) -> None:
    content = operator_build.operator_library(host_targets()[0], ["8_row"])
    path = tmp_path / OPERATORS
    version = operator_build.installed()["executorch"].partition("+")[0].encode()
    for bad, words in (
        (content.replace(b"EDGE-OPERATORS|" + version, b"EDGE-OPERATORS|9.9.9"), "made for ExecuTorch 9.9.9"),
        (content.replace(b"EDGE-OPERATORS|" + version + b"|" + host_targets()[0].encode() + b"|", b"EDGE-OPERATORS|" + version + b"|abacus|beads "), "no beads"),
        (b"EDGE", "no operators"),
        (b"EDGE-OPERATORS|" + version + b"|x||", "cannot be loaded"),
    ):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(RunnerError, match=words):
            load_operators(str(path))


def test_the_library_for_arm64() -> None:
    if why := operator_build.missing("arm-dotprod"):
        pytest.skip(why)
    content = operator_build.operator_library("arm-dotprod", ["4_block"])
    assert content[:4] == b"\x7fELF" and struct.unpack_from("<H", content, 18)[0] == 183
    assert b"|arm-dotprod|asimddp|" in content and b"edge_operators_register" in content
    assert b"libstdc++" not in content and b"libc++" not in content, "it runs beside whatever C++ library the wheel was built with"
    assert b"_ZN10executorch7runtime16register_kernels" in content


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_build, "compilers", lambda machine: ())
    assert "no C++ compiler" in operator_build.missing("arm-neon")
    with pytest.raises(MissingTool, match="no C\\+\\+ compiler"):
        operator_build.operator_library("arm-neon", ["8_row"])


def rates(native: float) -> Efficiency:
    """A calibration in which our kernels do `native` operations a second."""
    each = {"overhead_s": 1e-6, "log_sd": 0.1, "source": "made up"}
    linear = (("fp32", 1e11), ("int8-dynamic", 3e11), ("int4-g32", 2e11), ("native-int8", native), ("native-int4-g32", native))
    rows = [OpRate(op="linear", precision=p, ops_per_s=r, **each) for p, r in linear]
    rows += [OpRate(op="*", precision="*", ops_per_s=1e10, **each), OpRate(op="break", precision="native-int8", ops_per_s=1e12, **each)]
    return Efficiency(device="host", runtime="executorch", origin="calibrated", rows=tuple(rows))


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval().requires_grad_(False)
    torch.export.save(torch.export.export(net, (torch.randn(16, 256),)), tmp_path / "net.pt2")
    return str(tmp_path / "net.pt2")


def test_plans_choose_it_where_it_was_measured_to_be_faster(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[float, set[str]] = {}
    for native in (1e10, 1e13):
        monkeypatch.setattr("edgesdk.plan.setting.efficiency_for", lambda *a, native=native: rates(native))
        made = plan(model, "host", runtime="executorch")
        taken[native] = {u.precision for u in made.units if u.op == "linear"}
        assert all(u.runtime == ("native" if is_native(u.precision) else "executorch") for u in made.units)
    assert taken == {1e10: {"int8-dynamic"}, 1e13: {"native-int8"}}
    monkeypatch.setattr("edgesdk.native.operator_build.compilers", lambda machine: ())
    assert {u.precision for u in plan(model, "host", runtime="executorch").units if u.op == "linear"} == {"int8-dynamic"}, (
        "none to compile it with"
    )
    monkeypatch.undo()

    from edgesdk.intake import load_model

    bundle = build(made, load_model(model), tmp_path / "net.edge")
    manifest = read_manifest(bundle)
    assert OPERATORS in {m.name for m in manifest.members} and 0 < manifest.host_check["forward"] < 0.05


@pytest.mark.wide
def test_flash_and_profile(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent opens the library on the device."""
    from edgesdk.intake import load_model

    monkeypatch.setattr("edgesdk.plan.setting.efficiency_for", lambda *a: rates(1e13))
    bundle = build(plan(model, "host", runtime="executorch"), load_model(model), tmp_path / "net.edge")
    device = LocalTransport(tmp_path / "root")
    assert flash(bundle, device).golden[0].relative_error == pytest.approx(0, abs=1e-4)
    report = profile(bundle, device, runs=20)
    assert report.methods[0].samples_s


def test_a_program_for_another_cpu_is_checked_as_its_twin(model: str, tmp_path: Path) -> None:
    if why := operator_build.missing("arm-dotprod"):
        pytest.skip(why)
    from edgesdk.intake import load_model

    made = plan(model, "raspberry-pi-5", runtime="executorch")
    assert not any(is_native(u.precision) for u in made.units), "nothing was measured there"
    units = tuple(u.model_copy(update={"precision": "native-int4-g32"}) if u.op == "linear" else u for u in made.units)
    manifest = read_manifest(build(made.model_copy(update={"units": units}), load_model(model), tmp_path / "pi.edge"))
    assert OPERATORS in {m.name for m in manifest.members} and 0 < manifest.host_check["forward"] < 0.3


def test_delegates_that_break() -> None:
    torch.manual_seed(0)
    method = trace(spec_of(Attention(), torch.randn(1, 6, 64))).method("forward")
    assert breaks(method, ()) == 0
    assert breaks(method, {"q", "k", "v"}) == -1, "the delegate between the norm and the products falls away"
    assert breaks(method, {"o"}) == 1
    assert breaks(method, {"q", "o"}) == 1


def test_the_host_profile_knows_its_target() -> None:
    device: DeviceProfile = load_device("host")
    compute = device.unit(next(r.unit for r in device.runtimes if r.name == "executorch"))
    from edgesdk.kernels.cpu import target_of

    assert target_of(compute.isa) == host_targets()[0]
