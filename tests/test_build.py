"""Building: each unit's precision is really applied, in both runtimes; what cannot be applied or is wrong is refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgesdk.errors import CheckFailed, InputError, MissingTool
from edgesdk.lower.check import check_program, golden_inputs, reference
from edgesdk.runner import RunnerError, open_program

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")
pytest.importorskip("ai_edge_quantizer")


class Net(torch.nn.Module):
    """A convolution, and three linear layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(1, 64, 8)
        self.a, self.b, self.c = (torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Head(torch.nn.Module):
    """Another method over the same layers `a` and `b`."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net.b(torch.tanh(self.net.a(x)))


def quality(run: Any) -> float:
    (out,) = run("forward", [np.ones((1, 1, 8, 8), np.float32)])
    return float(np.isfinite(out).all())


@pytest.fixture(scope="module")
def spec() -> Any:
    from edgesdk.model import Method, ModelSpec

    net = Net().eval()
    rng = np.random.default_rng(0)
    data = {
        "forward": [(torch.from_numpy(rng.standard_normal((1, 1, 8, 8)).astype(np.float32)),) for _ in range(8)],
        "head": [(torch.from_numpy(rng.standard_normal((1, 64)).astype(np.float32)),) for _ in range(8)],
    }
    methods = {"forward": Method(net, data["forward"][0]), "head": Method(Head(net).eval(), data["head"][0])}
    return ModelSpec(
        name="two", digest=hashlib.sha256(b"two").hexdigest(), methods=methods, calibration=lambda m: data[m], evaluate=quality,
        files={"labels.txt": b"a\nb\n"},
    )  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = os.environ.get("EDGESDK_CACHE")
    os.environ["EDGESDK_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("EDGESDK_CACHE") if before is None else os.environ.update(EDGESDK_CACHE=before)


def lowered(spec: Any, runtime: str, choice: dict[tuple[str, str], str], folder: Path) -> tuple[bytes, dict[str, float]]:
    """The program, and its errors against the reference."""
    from edgesdk.lower import lower

    content = lower(spec, runtime, choice)
    (folder / "program").write_bytes(content)
    run = open_program(str(folder / "program"), runtime).run
    return content, check_program(run, reference(spec), golden_inputs(spec), set(choice.values()) or {"fp32"}, runtime)


def both(**kinds: str) -> dict[tuple[str, str], str]:
    """Precisions by layer, in both methods where both have it."""
    return {("forward", n): p for n, p in kinds.items()} | {("head", f"net.{n}"): p for n, p in kinds.items() if n in "ab"}


def constants(content: bytes) -> int:
    from edgesdk.lower.executorch import memory_plan

    return memory_plan(content)["constants"]


def test_executorch_applies_each_unit(spec: Any, tmp_path: Path) -> None:
    """Weights: conv and three linears of 4096 each. Bytes in the program fall by what each choice saves, and no more."""
    plain, errors = lowered(spec, "executorch", {}, tmp_path)
    assert max(errors.values()) < 1e-4
    assert constants(plain) == pytest.approx(4 * 4096 * 4, rel=0.06)
    content, errors = lowered(spec, "executorch", both(a="int8-dynamic", c="int4-g32"), tmp_path)
    saved = 4096 * 3 - 256 + 4096 * 3.5 - 2 * 64 * 4
    assert constants(plain) - constants(content) == pytest.approx(saved, abs=600)
    assert errors["forward"] > 1e-4
    assert errors["head"] > 1e-4


def test_executorch_static_beside_float(spec: Any, tmp_path: Path) -> None:
    plain, _ = lowered(spec, "executorch", {}, tmp_path)
    content, errors = lowered(spec, "executorch", {("forward", "conv"): "int8-static"}, tmp_path)
    assert constants(plain) - constants(content) == pytest.approx(4096 * 3 - 256, abs=600)
    assert 1e-4 < errors["forward"] < 0.1
    assert errors["head"] < 1e-4  # the other method holds no such layer


def dtypes(content: bytes, method: str, folder: Path) -> list[str]:
    from edgesdk.graph.tflite_read import read_tflite

    (folder / "m.tflite").write_bytes(content)
    graph = next(m for m in read_tflite(folder / "m.tflite") if m.name == method)
    return [u.weight_dtype for u in graph.units if u.weight_elements]


def test_litert_applies_each_unit(spec: Any, tmp_path: Path) -> None:
    """Three layers of one shape with two precisions: the right one of them changes."""
    plain, errors = lowered(spec, "litert", {}, tmp_path)
    assert max(errors.values()) < 1e-5
    content, errors = lowered(spec, "litert", {("forward", "c"): "int8-weight-only"}, tmp_path)
    assert len(plain) - len(content) == pytest.approx(4096 * 3, abs=2500)
    assert 1e-4 < errors["forward"] < 0.05
    content, errors = lowered(spec, "litert", {("forward", "conv"): "int8-dynamic", ("forward", "b"): "int8-dynamic"}, tmp_path)
    assert dtypes(content, "forward", tmp_path) == ["int8", "float32", "int8", "float32"]
    assert dtypes(content, "head", tmp_path) == ["float32", "float32"]
    assert errors["forward"] > 1e-4
    assert errors["head"] < 1e-4


@pytest.mark.parametrize(
    "choice",
    [
        {("forward", "conv"): "int8-dynamic"},  # a convolution cannot be
        {("forward", "a"): "int8-weight-only"},  # silently wrong through XNNPACK
        {("forward", "a"): "int8-dynamic", ("head", "net.a"): "fp32"},  # one weight, two precisions
        {("forward", "nowhere"): "int8-dynamic"},
    ],
)
def test_what_cannot_be_applied_is_refused(spec: Any, choice: dict[tuple[str, str], str]) -> None:
    from edgesdk.lower import lower

    with pytest.raises(InputError) as error:
        lower(spec, "executorch", choice)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("runtime", ["executorch-qnn", "tensorrt", "executorch-nothing"])
def test_a_vendor_s_compiler_is_named(spec: Any, runtime: str) -> None:
    from edgesdk.lower import lower

    with pytest.raises(MissingTool) as error:
        lower(spec, runtime, {})
    assert error.value.hint


def test_lowered_programs_are_kept(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgesdk.lower as module

    first = module.lower(spec, "litert", {})
    monkeypatch.setattr(module, "_lower", lambda *a: pytest.fail("lowered again"))
    assert module.lower(spec, "litert", {}) == first


@pytest.mark.parametrize("runtime", ["executorch", "litert"])
def test_runner_refuses_what_it_cannot_run(spec: Any, runtime: str, tmp_path: Path) -> None:
    from edgesdk.lower import lower

    path = tmp_path / "program"
    path.write_bytes(lower(spec, runtime, {}))
    runner = open_program(str(path), runtime)
    assert runner.methods == ("forward", "head")
    with pytest.raises(RunnerError, match="takes 1 inputs"):
        runner.run("forward", [])
    with pytest.raises(RunnerError, match="wanted"):
        runner.run("forward", [np.zeros((1, 1, 9, 9), np.float32)])
    with pytest.raises(RunnerError, match="no method 'decode'"):
        runner.run("decode", [])
    path.write_bytes(b"no program at all, only some text of a few bytes")
    with pytest.raises(RunnerError, match="refuses"):
        open_program(str(path), runtime)


def test_thread_counts_beside_each_other(spec: Any, tmp_path: Path) -> None:
    """Two programs with other thread counts in one process: ExecuTorch has one pool, remade between them."""
    portable = pytest.importorskip("executorch.extension.pybindings.portable_lib")
    from edgesdk.lower import lower

    (tmp_path / "p").write_bytes(lower(spec, "executorch", {}))
    x = [np.ones((1, 64), np.float32)]
    one, two = (open_program(str(tmp_path / "p"), "executorch", n) for n in (1, 2))
    first = one.run("head", x)[0]
    for runner, count in ((two, 2), (one, 1), (two, 2)):
        assert np.allclose(runner.run("head", x)[0], first, atol=1e-5)
        assert portable._threadpool_get_thread_count() == count


@pytest.fixture(scope="module")
def plan() -> Any:
    from edgesdk.plan import plan as make

    return make("example:digits-cnn", "host", runtime="litert")


def test_build_packs_all_of_it(plan: Any, tmp_path: Path) -> None:
    from edgesdk.bundles import read_array, read_member, verify_bundle
    from edgesdk.intake import load_model
    from edgesdk.lower import build

    out = build(plan, load_model(plan.model), tmp_path / "d.edge")
    manifest = verify_bundle(out)
    assert manifest.plan_digest == plan.digest()
    assert manifest.quality is not None and manifest.quality > 0.9
    assert manifest.host_check["forward"] < 0.2
    (tmp_path / "p").write_bytes(read_member(out, manifest.program))
    runner = open_program(str(tmp_path / "p"), manifest.runtime)
    for case in manifest.golden:
        outs = runner.run(case.method, [read_array(read_member(out, n)) for n in case.inputs])
        for got, name in zip(outs, case.outputs, strict=True):
            assert np.allclose(got, read_array(read_member(out, name)))


def test_build_refuses_another_model(plan: Any, spec: Any, tmp_path: Path) -> None:
    from edgesdk.lower import build

    with pytest.raises(InputError, match="made for another"):
        build(plan, spec, tmp_path / "x.edge")


def test_a_wrong_program_is_not_packed(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgesdk.runner
    from edgesdk.intake import load_model
    from edgesdk.lower import build

    right = edgesdk.runner.LiteRtRunner.run
    monkeypatch.setattr(edgesdk.runner.LiteRtRunner, "run", lambda self, m, a: [2 * o for o in right(self, m, a)])
    with pytest.raises(CheckFailed):
        build(plan, load_model(plan.model), tmp_path / "x.edge")
    assert list(tmp_path.iterdir()) == []
