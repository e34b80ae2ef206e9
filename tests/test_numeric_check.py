"""The numeric check refuses programs that compute something else, and passes honest quantization.

Two silent faults of released runtimes are made here for real: ExecuTorch's XNNPACK delegate with weight-only quantization (a dropped
scale), and tflite-runtime 2.14 with dynamic int8 (needs numpy < 2, so it runs in an environment of its own, made once and cached).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgesdk.runner
from edgesdk.errors import CheckFailed
from edgesdk.lower.check import LIMITS, check_program, relative_error

torch = pytest.importorskip("torch")

X = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
INPUTS = {"forward": [[X]]}


def linear_spec(module: Any) -> Any:
    from edgesdk.model import Method, ModelSpec

    return ModelSpec(name="two-layers", digest="0" * 64, methods={"forward": Method(module, (torch.from_numpy(X),))})


@pytest.fixture(scope="module")
def module() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).eval()


def reference(module: Any) -> Any:
    from edgesdk.lower.check import reference as of

    return of(linear_spec(module))


def run_pte(module: Any, choice: dict[tuple[str, str], str], folder: Path) -> Any:
    from edgesdk.lower.executorch import lower_executorch

    (folder / "m.pte").write_bytes(lower_executorch(linear_spec(module), choice, lambda text: None))
    return edgesdk.runner.open_program(str(folder / "m.pte"), "executorch").run


def test_relative_error() -> None:
    one = np.ones(4)
    assert relative_error(one, one) == 0
    assert relative_error(2 * one, one) == pytest.approx(1)
    assert relative_error(0 * one, one) == pytest.approx(1)
    assert relative_error(one[:3], one) == float("inf")
    assert relative_error(np.array([1, 1, 1, np.nan]), one) == float("inf")
    assert relative_error(np.array([1, 1, 1, np.inf]), one) == float("inf")


@pytest.mark.parametrize(
    "wrong", [lambda y: 2 * y, lambda y: 0 * y, lambda y: -y, lambda y: y[::-1], lambda y: y * np.nan, lambda y: y[:-1]]
)
@pytest.mark.parametrize("precision", sorted(LIMITS))
def test_gross_faults_are_refused_at_every_precision(wrong: Any, precision: str) -> None:
    y = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32)
    with pytest.raises(CheckFailed, match="'forward' is wrong") as error:
        check_program(lambda m, a: [wrong(y)], lambda m, a: [y], INPUTS, {precision}, "it")
    assert len(str(error.value).splitlines()) == 2


def test_a_missing_output_is_refused() -> None:
    with pytest.raises(CheckFailed, match="outputs"):
        check_program(lambda m, a: [X], lambda m, a: [X, X], INPUTS, {"fp32"}, "it")


def test_one_wrong_case_of_many_is_refused() -> None:
    cases = {"forward": [[X], [X + 1], [X + 2]]}
    with pytest.raises(CheckFailed):
        check_program(lambda m, a: [a[0] if a[0][0, 0] < X[0, 0] + 1.5 else 2 * a[0]], lambda m, a: list(a), cases, {"int8-static"}, "it")


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic", "int4-g32"])
def test_honest_programs_pass(module: Any, precision: str, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    run = run_pte(module, {("forward", "0"): precision, ("forward", "2"): precision}, tmp_path)
    errors = check_program(run, reference(module), INPUTS, {precision}, precision)
    assert errors["forward"] < LIMITS[precision] / 2


@pytest.mark.parametrize("config", ["IntxWeightOnlyConfig", "Int8WeightOnlyConfig"])
def test_weight_only_through_xnnpack_is_refused(module: Any, config: str, tmp_path: Path) -> None:
    """Eager is right, the `.pte` lowers and runs without a word, and its outputs are hundreds to a million times too large."""
    pytest.importorskip("executorch")
    import torchao.quantization as ao

    given = {"weight_dtype": torch.int8} if config == "IntxWeightOnlyConfig" else {}
    quantized = copy.deepcopy(module)
    ao.quantize_(quantized, getattr(ao, config)(**given))
    check_program(reference(quantized), reference(module), INPUTS, {"int8-weight-only"}, "eager")
    with pytest.raises(CheckFailed, match=r"allowed 0\.3") as error:
        check_program(run_pte(quantized, {}, tmp_path), reference(module), INPUTS, {"int8-weight-only"}, config)
    assert error.value.fields["errors"]["forward"] > 10


@pytest.fixture(scope="module")
def old_python() -> Path:
    """A Python with tflite-runtime 2.14, made once in the cache folder (110 MB)."""
    home = Path(os.environ.get("EDGESDK_TEST_ENVS", Path.home() / ".cache" / "edgesdk-tests")) / "tflite-runtime-2.14"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        commands = (
            (sys.executable, "-m", "venv", "--clear", str(home)),
            (str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "tflite-runtime==2.14.0", "numpy<2"),
        )
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"tflite-runtime 2.14 cannot be installed here: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
        (home / "ready").touch()
    return python


RUN = """
import importlib.util, json, sys
import numpy as np
spec = importlib.util.spec_from_file_location("runner", sys.argv[1])
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
opened = runner.open_program(sys.argv[2], "tflite-runtime")
np.save(sys.argv[4], opened.run("forward", [np.load(sys.argv[3])])[0])
print(json.dumps({"numpy": np.__version__, "runtime": opened.version}))
"""


def run_old(python: Path, program: bytes, folder: Path) -> Any:
    """`run` through the single file edgesdk/runner.py in the other environment."""
    (folder / "m.tflite").write_bytes(program)
    np.save(folder / "in.npy", X)

    def run(method: str, arrays: Any) -> list[Any]:
        args = (str(python), "-c", RUN, edgesdk.runner.__file__, str(folder / "m.tflite"), str(folder / "in.npy"), str(folder / "out.npy"))
        done = subprocess.run(args, capture_output=True, text=True, check=True)
        facts = json.loads(done.stdout)
        assert facts["numpy"].startswith("1.")
        assert facts["runtime"].startswith("2.14")
        return [np.load(folder / "out.npy")]

    return run


@pytest.mark.env
def test_dynamic_int8_on_tflite_runtime_is_refused(module: Any, old_python: Path, tmp_path: Path) -> None:
    """The same bytes: right on LiteRT, silently wrong on tflite-runtime 2.14. The float program is right on both."""
    pytest.importorskip("ai_edge_quantizer")
    from edgesdk.lower.litert import lower_litert

    spec, expected = linear_spec(module), reference(module)
    plain = lower_litert(spec, {}, lambda text: None)
    check_program(run_old(old_python, plain, tmp_path), expected, INPUTS, {"fp32"}, "float")
    from edgesdk.graph import trace

    choice = {("forward", u.name): "int8-dynamic" for u in trace(spec).methods[0].units if u.weight_elements}
    dynamic = lower_litert(spec, choice, lambda text: None)
    assert len(dynamic) < len(plain) * 0.6
    (tmp_path / "d.tflite").write_bytes(dynamic)
    litert = edgesdk.runner.open_program(str(tmp_path / "d.tflite"), "litert").run
    assert check_program(litert, expected, INPUTS, {"int8-dynamic"}, "LiteRT")["forward"] < 0.05
    with pytest.raises(CheckFailed, match="'forward' is wrong") as error:
        check_program(run_old(old_python, dynamic, tmp_path), expected, INPUTS, {"int8-dynamic"}, "tflite-runtime")
    assert error.value.fields["errors"]["forward"] > 0.9
