"""Native programs with weights that are no plain grids: they run as they are stored."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_native import choice_of, inputs_of, spec_of

from edgesdk.compress.any4 import METHOD as ANY4
from edgesdk.compress.any4 import Any4Config
from edgesdk.compress.ternary import METHOD as TERNARY
from edgesdk.compress.ternary import TernaryConfig
from edgesdk.compress.weights import holders, weights_of
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.pack import as_kept
from edgesdk.kernels.reference import round_inputs
from edgesdk.kernels.superblocks import super_blocks
from edgesdk.model import ModelSpec
from edgesdk.native.lower import lower_native
from edgesdk.native.machine import Machine
from edgesdk.packed import Code, decode

CODES = {
    "any4-own": lambda w: ANY4.apply(w, None, Any4Config(table="row", feedback=False)),
    "any4-one": lambda w: ANY4.apply(w, None, Any4Config(table="weight", group=32, feedback=False)),
    "super": lambda w: super_blocks(w.matrix.numpy()),
    "ternary": lambda w: TERNARY.apply(w, None, TernaryConfig()),
    "any3": lambda w: ANY4.apply(w, None, Any4Config(bits=3, feedback=False)),
}


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


@pytest.mark.parametrize(("kind", "form"), [("encoder-decoder", "any4-own"), *(("llama", form) for form in CODES)])
def test_weights_run_as_they_are_stored(kind: str, form: str, tmp_path: Path) -> None:
    spec, modules = with_codes(spec_of(kind), CODES[form])
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
