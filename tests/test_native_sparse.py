"""Native programs of models with weights that are zero, and with matrices in floats: the answers of PyTorch with the same weights."""

from __future__ import annotations

import copy
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgesdk.compress import compress
from edgesdk.compress.weights import holders
from edgesdk.errors import InputError
from edgesdk.intake import load_model
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.nearest import nearest
from edgesdk.kernels.panels import BLOCK
from edgesdk.kernels.reference import round_inputs
from edgesdk.lower import build
from edgesdk.model import ModelSpec
from edgesdk.native.lower import lower_native
from edgesdk.native.machine import Machine
from edgesdk.native.shared import kernels_of
from edgesdk.packed import Code, decode
from edgesdk.plan import plan
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.model import SequenceModel

RUNTIME = f"native-{host_targets()[0]}"
NM = "nm:n={},m={},inputs=false,fit=false"


def wider(tied: bool = True) -> ModelSpec:
    """Matrices of several blocks."""
    torch.manual_seed(0)
    stack = Stack(layers=2, dim=64, heads=4, kv_heads=2, head=16, ffn=192)
    model = SequenceModel(SequenceConfig(layout="decoder-only", vocab=60, decoder=stack, tied=tied)).eval()
    return sequence_spec(model, name="wider", source_lengths=(8,), cache_lengths=(16,), start=(2,), eos=(1,))


def programmed(spec: ModelSpec, choice: dict[tuple[str, str], str], folder: Path) -> Machine:
    path = folder / "model.native"
    path.write_bytes(lower_native(spec, RUNTIME, choice))
    return Machine(str(path))


def forms(machine: Machine) -> set[str]:
    return {machine.panels(name).form for name in machine.program.panels}


def chosen(spec: ModelSpec, precision: str) -> dict[tuple[str, str], str]:
    """Every matrix and table in `precision`."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return {
        (m, path): precision for m, found in spec.methods.items() for path, part in found.module.named_modules() if isinstance(part, kinds)
    }


def apart(machine: Machine, spec: ModelSpec, inputs: bool) -> list[float]:
    """Relative errors of every method's first output against eager; `inputs`: whether those of matrices are rounded to 8 bits."""

    def before(_: Any, given: tuple[Any, ...]) -> Any:
        q, scale, zero = round_inputs(given[0].reshape(-1, given[0].shape[-1]).numpy())
        return (torch.from_numpy((scale[:, None] * (q - zero[:, None])).astype(np.float32)).reshape(given[0].shape),)

    errors = []
    for name, method in spec.methods.items():
        module = copy.deepcopy(method.module)
        for part in module.modules() if inputs else ():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_pre_hook(before)
        with torch.no_grad():
            found = module(*method.example_inputs)
        wanted = (found[0] if isinstance(found, tuple) else found).numpy()
        for _ in range(2):  # a second run finds what the first one left
            got = machine.run(name, [t.numpy() for t in method.example_inputs])[0]
            errors.append(float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean())))
    return errors


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ([NM.format(2, 4), "rtn:bits=8,group=0"], "8_row_2of4"),
        ([NM.format(2, 4), "rtn:bits=4"], "4_block_2of4"),
        ([NM.format(1, 4), "rtn:bits=8,group=0"], "8_row_1of4"),
        ([NM.format(4, 16), "rtn:bits=4"], "4_block_4of16"),
    ],
)
def test_a_pruned_model_runs_without_its_zeros(recipe: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = compress(wider(), recipe, evaluate=False).spec
    machine = programmed(spec, {}, tmp_path)
    assert wanted in forms(machine) <= {wanted, "8_row", "4_block"}  # the others: tables
    errors = apart(machine, spec, inputs=True)
    assert max(errors) < 0.05, errors  # scales in float16: a value between two codes goes either way, and what follows with it
    whole = whole_of(spec, tmp_path, monkeypatch)
    for name, method in spec.methods.items():
        arrays = [t.numpy() for t in method.example_inputs]
        for got, same in zip(machine.run(name, arrays), whole.run(name, arrays), strict=True):
            np.testing.assert_allclose(got, same, rtol=1e-4, atol=1e-5 * np.abs(same).max())


def whole_of(spec: ModelSpec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The same program with every zero in it."""
    (folder / "whole").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("edgesdk.native.lower.pattern_of", lambda code, lanes: "")
        made = programmed(spec, {}, folder / "whole")
    assert all("of" not in form and "blocks" not in form for form in forms(made))
    return made


def with_codes(spec: ModelSpec, change: Any) -> ModelSpec:
    """Every matrix stored as `change` makes it, the modules holding what that decodes to."""
    codes = {}
    for name, uses in holders(spec).items():
        module = spec.methods[uses[0][0]].module.get_submodule(uses[0][1])
        if isinstance(module, torch.nn.Linear) and not uses[0][1].endswith("head"):
            codes[name] = change(module.weight.detach().numpy())
            for method, path, _ in uses:
                spec.methods[method].module.get_submodule(path).weight.data = torch.from_numpy(decode(codes[name]).copy())
    return replace(spec, codes=codes)


def blocky(weight: Any) -> Code:
    """int4 in groups of 32, of which blocks of 16 rows are zero here and there."""
    code = nearest(weight, 4, BLOCK, True)
    rng = np.random.default_rng(weight.size)
    kept = np.repeat(np.repeat(rng.random((-(-weight.shape[0] // 16), -(-weight.shape[1] // BLOCK))) < 0.5, 16, 0), BLOCK, 1)
    code.arrays[0][~kept[: weight.shape[0], : weight.shape[1]]] = 8
    return code


def masked(weight: Any) -> Code:
    """int8 of which a mask leaves one of four."""
    kept = np.random.default_rng(weight.size).random((weight.shape[0], -(-weight.shape[1] // 4), 4)).argsort(2).argsort(2) < 1
    return Code("masked", weight.shape, (), (kept.reshape(len(weight), -1).astype(np.uint8),), (nearest(weight, 8, 0, True),))


@pytest.mark.parametrize(("change", "wanted"), [(blocky, "4_block_blocks"), (masked, "8_row_1of4")])
def test_codes_with_zeros_run_without_them(change: Any, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = with_codes(wider(), change)
    machine = programmed(spec, {}, tmp_path)
    assert wanted in forms(machine)
    errors = apart(machine, spec, inputs=True)
    assert max(errors) < 0.05, errors
    whole = whole_of(spec, tmp_path, monkeypatch)
    size, all_of_it = (sum(p.nbytes for p in m._panels.values()) for m in (machine, whole))
    assert size < all_of_it


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_floats_is_that_of_eager(precision: str, tied: bool, tmp_path: Path) -> None:
    spec = wider(tied)
    choice = {place: precision if "embed" not in place[1] else "fp32" for place in chosen(spec, precision)}
    machine = programmed(spec, choice, tmp_path)
    assert forms(machine) == {precision.removeprefix("fp")}
    assert ("panels" in machine.program.linears["embed"]) == (tied and precision == "fp32")  # looked up in the head's panels
    errors = apart(machine, spec, inputs=False)
    assert max(errors) < (2e-5 if precision == "fp32" else 2e-3), errors


def test_a_float_head_on_rounded_layers(tmp_path: Path) -> None:
    spec = wider(tied=False)
    choice = {place: "fp32" if place[1].endswith("head") else "int8-dynamic" for place in chosen(spec, "") if "embed" not in place[1]}
    machine = programmed(spec, choice, tmp_path)
    assert machine.panels("head").form == "32" and forms(machine) == {"32", "8_row"}
    errors = apart(machine, spec, inputs=False)
    assert max(errors) < 0.05, errors


def test_a_program_for_arm_names_its_kernels() -> None:
    spec = compress(wider(), [NM.format(2, 4), "rtn:bits=4"], evaluate=False).spec
    target, names = kernels_of(lower_native(spec, "native-arm-dotprod", {}))
    assert target == "arm-dotprod" and {"gemv_4_block_2of4", "gemm_4_block_2of4"} <= set(names)


def test_a_precision_that_is_not_there_is_refused(tmp_path: Path) -> None:
    spec = wider()
    with pytest.raises(InputError, match="int8-static") as caught:
        lower_native(spec, RUNTIME, chosen(spec, "int8-static"))
    assert "fp32" in caught.value.hint


def test_a_plan_in_floats_is_built_and_checked(tmp_path: Path) -> None:
    from sequence_small import built

    bundle = built("encoder_decoder", "host", "native", tmp_path / "floats.edge")
    with zipfile.ZipFile(bundle) as file:
        assert any(name.endswith("model.native") for name in file.namelist())


def test_floats_are_an_option_of_native_plans() -> None:
    from edgesdk.plan.options import table

    assert "fp32" in table("native")["linear"]


def test_a_pruned_model_is_planned_and_built_without_its_zeros(tmp_path: Path) -> None:
    ref = f"{Path(__file__).parent / 'sequence_small.py'}:encoder_decoder"
    saved = compress(ref, [NM.format(2, 4), "rtn:bits=8,group=0"], evaluate=False).save(tmp_path / "small.edgec")
    bundle = build(plan(str(saved), "host", runtime="native"), load_model(str(saved)), tmp_path / "small.edge")
    with zipfile.ZipFile(bundle) as file:
        (tmp_path / "model.native").write_bytes(file.read(next(n for n in file.namelist() if n.endswith("model.native"))))
    assert forms(Machine(str(tmp_path / "model.native"))) <= {"8_row_2of4", "8_row"}
    assert Machine(str(tmp_path / "model.native")).panels("head").form == "8_row_2of4"
