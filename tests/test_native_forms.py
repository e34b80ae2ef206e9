"""Native programs with weights that are no plain grids: they run as they are stored."""

from __future__ import annotations

import copy
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_native import choice_of, inputs_of, spec_of

from edgesdk.cli import main
from edgesdk.compress.any4 import METHOD as ANY4
from edgesdk.compress.any4 import Any4Config
from edgesdk.compress.ternary import METHOD as TERNARY
from edgesdk.compress.ternary import TernaryConfig
from edgesdk.compress.weights import holders, weights_of
from edgesdk.intake import load_model
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.pack import as_kept
from edgesdk.kernels.reference import round_inputs
from edgesdk.kernels.superblocks import super_blocks
from edgesdk.lower import build
from edgesdk.model import ModelSpec
from edgesdk.native.lower import lower_native
from edgesdk.native.machine import Machine
from edgesdk.native.program import MAGIC, Program
from edgesdk.packed import Code, decode
from edgesdk.plan import plan

CODES = {
    "any4-own": lambda w: ANY4.apply(w, None, Any4Config(table="row", feedback=False)),
    "any4-one": lambda w: ANY4.apply(w, None, Any4Config(table="weight", group=32, feedback=False)),
    "super": lambda w: super_blocks(w.matrix.numpy()),
    "ternary": lambda w: TERNARY.apply(w, None, TernaryConfig()),
    "any3": lambda w: ANY4.apply(w, None, Any4Config(bits=3, feedback=False)),
}


def test_a_compressed_model_is_planned_built_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ref = f"{Path(__file__).parent / 'sequence_small.py'}:encoder_decoder::any4:table=row"
    made = plan(ref, "host", runtime="native")
    assert {u.precision for u in made.units if u.op == "linear"} == {"native-table4"}  # counted as it is stored
    bundle = build(made, load_model(ref), tmp_path / "small.edge")
    with zipfile.ZipFile(bundle) as file:
        programs = [content for name in file.namelist() if (content := file.read(name)).startswith(MAGIC)]
    assert len(programs) == 1
    (tmp_path / "model.native").write_bytes(programs[0])
    assert {p["kind"] for p in Program(str(tmp_path / "model.native")).panels.values()} == {"tables"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(bundle), "--prompt", "abc", "--json"])
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["answers"]


def rounded_inputs(_: Any, inputs: tuple[Any, ...]) -> Any:
    x = inputs[0]
    q, scale, zero = round_inputs(x.reshape(-1, x.shape[-1]).numpy())
    return (torch.from_numpy((scale[:, None] * (q - zero[:, None])).astype(np.float32)).reshape(x.shape),)


def with_codes(spec: ModelSpec, make: Any) -> tuple[ModelSpec, dict[str, Any]]:
    """The model with every matrix in codes, its embeddings too, and its methods' modules with what panels keep of them."""
    codes: dict[str, Code] = {name: make(weight) for name, weight in weights_of(spec).items()}
    modules = {name: copy.deepcopy(m.module) for name, m in spec.methods.items()}
    for name, uses in holders(spec).items():
        for method, path, _ in uses if name in codes else ():
            part = modules[method].get_submodule(path)
            part.weight.data = torch.from_numpy(decode(as_kept(codes[name])).copy())
            if isinstance(part, torch.nn.Linear):
                part.register_forward_pre_hook(rounded_inputs)
    return replace(spec, codes=codes), modules


@pytest.mark.parametrize("form", CODES)
def test_weights_run_as_they_are_stored(form: str, tmp_path: Path) -> None:
    spec, modules = with_codes(spec_of("llama"), CODES[form])
    path = tmp_path / "model.native"
    path.write_bytes(lower_native(spec, f"native-{host_targets()[0]}", choice_of(spec, "int8-dynamic")))
    machine = Machine(str(path))
    forms = {p["kind"] for name, p in machine.program.panels.items() if name != "embed"}
    assert forms == {machine.program.panels["decoder.layers.0.ffn.down"]["kind"]} != {""}
    errors = []
    for name, method in spec.methods.items():
        arrays = inputs_of(method, machine.program.methods[name]["role"])
        with torch.no_grad():
            outputs = modules[name](*(torch.from_numpy(a) for a in arrays))
        wanted = [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
        for g, w in zip(machine.run(name, arrays), wanted, strict=True):
            errors.append(np.sqrt(((g - w) ** 2).mean() / (w**2).mean()))
    assert np.median(errors) < 1e-3 and max(errors) < 0.03, errors  # a value between two codes may go either way
