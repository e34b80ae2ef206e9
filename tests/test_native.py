"""Sequence models on our own kernels: every layout and way of placing tokens, against PyTorch with the very same rounded weights and inputs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgesdk.cli import main
from edgesdk.errors import InputError
from edgesdk.intake import load_model
from edgesdk.kernels.cpu import host_targets, target_of
from edgesdk.kernels.nearest import nearest
from edgesdk.kernels.panels import LAYOUT
from edgesdk.kernels.reference import round_inputs
from edgesdk.kernels.superblocks import super_blocks
from edgesdk.lower import build
from edgesdk.model import Method, ModelSpec
from edgesdk.native.lower import lower_native
from edgesdk.native.machine import Machine
from edgesdk.native.memory import memory_plan
from edgesdk.native.program import Program, ProgramError
from edgesdk.packed import Code, decode
from edgesdk.plan import plan
from edgesdk.runner import RunnerError, open_program
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.model import SequenceModel

STACK = {"dim": 96, "heads": 4, "kv_heads": 2, "head": 24, "ffn": 128}
TWO = Stack(layers=2, **STACK)
ENCODER_DECODER: dict[str, Any] = {"layout": "encoder-decoder", "vocab": 61, "encoder": TWO, "decoder": TWO}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "encoder-decoder": (ENCODER_DECODER, {"batch": 3, "several": (2,)}),
    "widths-differ": ({**ENCODER_DECODER, "encoder": Stack(layers=2, **{**STACK, "dim": 64})}, {}),
    "t5": ({**ENCODER_DECODER, "positions": "relative", "logit_scale": 0.1, "attention_scale": 1.0, "activation": "gelu_tanh"}, {"batch": 2}),
    "bart": (
        {
            **ENCODER_DECODER, "positions": "learned", "position_offset": 2, "norm": "layer", "norm_place": "post", "final_norm": False, "embed_norm": True,
            "qkv_bias": True, "out_bias": True, "ffn_bias": True, "gated": False, "activation": "gelu", "head_bias": True, "embed_scale": 3.0,
        },
        {},
    ),
    "marian": (
        {**ENCODER_DECODER, "positions": "sinusoidal", "norm": "layer", "norm_place": "post", "final_norm": False, "gated": False, "activation": "relu"}, {},
    ),
    "llama": ({"layout": "decoder-only", "vocab": 61, "decoder": TWO}, {"several": (3,)}),
    "qwen": (
        {"layout": "decoder-only", "vocab": 61, "decoder": Stack(layers=2, windows=(5, 0), **STACK), "qk_norm": True, "tied": False},
        {"several": (3,), "batch": 2},
    ),
    "cache-once": (
        {"layout": "decoder-decoder", "vocab": 61, "decoder": Stack(layers=3, windows=(5, 0, 0), **STACK), "shared_from": 1, "tied": False}, {"batch": 2},
    ),
    "ctc": ({"layout": "encoder-ctc", "vocab": 61, "encoder": Stack(layers=2, windows=(3, 0), **STACK)}, {}),
}  # fmt: skip
FORMS = {"int8-dynamic": (8, 0), "int4-g32": (4, 32)}


def spec_of(kind: str, seed: int = 1) -> ModelSpec:
    config, sizes = KINDS[kind]
    torch.manual_seed(seed)
    model = SequenceModel(SequenceConfig(**config)).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    start = (2,) if "decoder" in config else ()
    return sequence_spec(model, name=kind, source_lengths=(8,), cache_lengths=(24,), start=start, eos=(1,), **sizes)


def choice_of(spec: ModelSpec, precision: str) -> dict[tuple[str, str], str]:
    """Every matrix in `precision`, tables in int8."""
    found = {}
    for method, m in spec.methods.items():
        for path, module in m.module.named_modules():
            if isinstance(module, torch.nn.Linear):
                found[method, path] = precision
    return found


def as_planned(weight: Any, precision: str) -> Code:
    """A weight as native programs for this machine round it."""
    if precision == "int4-g32" and host_targets()[0].startswith("x86"):
        return super_blocks(weight)
    return nearest(weight, *FORMS[precision], True)


def same_rounding(spec: ModelSpec, precision: str) -> dict[str, Any]:
    """The methods' modules with weights and inputs of matrices rounded as native programs round them."""

    def before(_: Any, inputs: tuple[Any, ...]) -> Any:
        x = inputs[0]
        q, scale, zero = round_inputs(x.reshape(-1, x.shape[-1]).numpy())
        return (torch.from_numpy((scale[:, None] * (q - zero[:, None])).astype(np.float32)).reshape(x.shape),)

    made = {}
    for name, method in spec.methods.items():
        module = copy.deepcopy(method.module)
        for path, part in module.named_modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.data = torch.from_numpy(decode(as_planned(part.weight.detach().numpy(), precision)).copy())
                part.register_forward_pre_hook(before)
            elif isinstance(part, torch.nn.Embedding) and path.endswith("embed"):
                part.weight.data = torch.from_numpy(decode(nearest(part.weight.detach().numpy(), 8, 0, True)).copy())
        made[name] = module
    return made


def inputs_of(method: Method, role: str) -> list[np.ndarray]:
    """Examples with padding, empty slots of the caches, and positions in the middle."""
    arrays = [t.numpy().copy() for t in method.example_inputs]
    for name, a in zip(method.module.input_names, arrays, strict=True):  # type: ignore[arg-type]
        if name == "source_mask":
            a[:, -3:] = -1e4
        elif name == "mask" and role == "decode":
            a[:, :, 15:24] = -1e4
        elif name == "mask":
            a[:, 6:] = -1e4
        elif name == "positions" and role == "decode":
            a -= 9
        elif name == "last":
            a[:] = 5
    return arrays


KINDS |= {
    f"{kind}-caches-{bits}": (KINDS[kind][0], {**KINDS[kind][1], "cache_bits": bits})
    for kind in ("encoder-decoder", "qwen", "cache-once")
    for bits in (16, 8, 4)
}


def errors_of(spec: ModelSpec, precision: str, folder: Path, seen: slice) -> list[float]:
    """The relative error of each output of each method, each called twice."""
    path = folder / "model.native"
    path.write_bytes(lower_native(spec, f"native-{host_targets()[0]}", choice_of(spec, precision)))
    machine, eager = Machine(str(path)), same_rounding(spec, precision)
    assert machine.methods == tuple(sorted(spec.methods))
    errors = []
    for name, method in spec.methods.items():
        role = machine.program.methods[name]["role"]
        arrays = inputs_of(method, role)
        with torch.no_grad():
            outputs = eager[name](*(torch.from_numpy(a) for a in arrays))
        wanted = [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
        for _ in range(2):  # a second run finds what the first one left
            got = machine.run(name, arrays)
            assert [g.shape for g in got] == [w.shape for w in wanted]
            for g, w in zip(got, wanted, strict=True):
                errors.append(np.sqrt(((g - w)[:, seen] ** 2).mean() / (w[:, seen] ** 2).mean()))
    return errors


@pytest.mark.parametrize("precision", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_is_that_of_eager_with_the_same_rounding(kind: str, precision: str, tmp_path: Path) -> None:
    errors: list[float] = []
    for seed in (1, 2):  # a value between two codes may go either way, and what follows with it: hardly with two models
        errors = errors_of(spec_of(kind, seed), precision, tmp_path, slice(0, 3) if kind == "ctc" else slice(None))
        assert max(errors) < 0.03, errors
        if np.median(errors) < 1e-4:
            return
    raise AssertionError(errors)


@pytest.mark.parametrize("target", [t for t in host_targets()[1:] if t != "plain"])
def test_other_instructions_give_the_same_answers(target: str, tmp_path: Path) -> None:
    spec = spec_of("encoder-decoder")
    found = []
    for name in (host_targets()[0], target):
        path = tmp_path / name
        path.write_bytes(lower_native(spec, f"native-{name}", choice_of(spec, "int4-g32")))
        found.append(Machine(str(path)).run("decode", inputs_of(spec.methods["decode"], "decode"))[0])
    assert np.abs(found[0] - found[1]).max() < 0.02 * np.abs(found[0]).max()


def test_threads_change_no_answer(tmp_path: Path) -> None:
    spec = spec_of("llama")
    path = tmp_path / "model.native"
    path.write_bytes(lower_native(spec, f"native-{host_targets()[0]}", {}))
    arrays = inputs_of(spec.methods["prefill"], "prefill")
    one, two = (Machine(str(path), threads).run("prefill", arrays) for threads in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_tied_table_is_stored_once_and_memory_is_told(tmp_path: Path) -> None:
    content = lower_native(spec_of("llama"), f"native-{host_targets()[0]}", {})
    path = tmp_path / "model.native"
    path.write_bytes(content)
    program = Program(str(path))
    assert program.linears["embed"]["panels"] == "head"
    sizes = memory_plan(content)
    assert sizes["program"] == len(content) and sizes["constants"] < len(content)
    assert {"planned:prefill:0", "planned:decode:0"} <= set(sizes)


def test_damaged_and_foreign_programs_are_refused(tmp_path: Path) -> None:
    content = lower_native(spec_of("ctc"), f"native-{host_targets()[0]}", {})
    path = tmp_path / "model.native"
    for damaged in (b"", b"EDGENATV", content[:100], content[:-64], b"x" * 200, content[:16] + b"[" + content[17:]):
        path.write_bytes(damaged)
        with pytest.raises(ProgramError):
            Program(str(path))
        with pytest.raises(RunnerError):
            open_program(str(path), "native")


def test_a_program_with_weights_in_another_layout_is_refused(tmp_path: Path) -> None:
    content = lower_native(spec_of("ctc"), f"native-{host_targets()[0]}", {})
    path = tmp_path / "model.native"
    path.write_bytes(content.replace(f'"layout": {LAYOUT}'.encode(), b'"layout": 1'))
    with pytest.raises(ProgramError, match="build it again"):
        Program(str(path))


def test_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    spec = spec_of("llama")
    path = tmp_path / "model.native"
    path.write_bytes(lower_native(spec, f"native-{host_targets()[0]}", {}))
    runner = open_program(str(path), "native")
    arrays = inputs_of(spec.methods["decode"], "decode")
    with pytest.raises(RunnerError):
        runner.run("decode", arrays[:-1])
    with pytest.raises(RunnerError):
        runner.run("nothing", arrays)
    for token in (-1, 61):
        with pytest.raises((RunnerError, ValueError), match="vocabulary"):
            runner.run("decode", [np.full_like(arrays[0], token), *arrays[1:]])


def test_a_model_outside_the_family_is_refused() -> None:
    spec = ModelSpec(name="plain", digest="0", methods={"forward": Method(torch.nn.Linear(4, 4), (torch.zeros(1, 4),))})
    with pytest.raises(InputError, match="no sequence model"):
        lower_native(spec, "native-plain", {})
    with pytest.raises(InputError, match="no kernels for"):
        lower_native(spec_of("ctc"), "native-abacus", {})


def test_profiles_instructions_name_a_target() -> None:
    assert target_of(("neon", "fp16", "dotprod")) == "arm-dotprod"
    assert target_of(("neon",)) == "arm-neon"
    assert target_of(("avx2", "avx512", "avx512_vnni", "avx_vnni")) == "x86-avx512vnni"
    assert target_of(("avx2",)) == "x86-avx2"
    assert target_of(()) == "plain"


def test_plan_build_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sequence_small import encoder_decoder

    ref = f"{Path(__file__).parent / 'sequence_small.py'}:encoder_decoder"
    made = plan(ref, "host", runtime="native")
    assert {u.precision for u in made.units if u.op == "linear"} <= {"int8-dynamic", "int4-g32"}
    bundle = build(made, encoder_decoder(), tmp_path / "small.edge")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(bundle), "--prompt", "abc", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["answers"]


def test_weights_kept_apart_are_added(tmp_path: Path) -> None:
    """A grid, a product of two thin matrices, and single weights: what eora, squeezellm and others store."""
    from edgesdk.compress.weights import holders

    spec, rng, codes = spec_of("llama"), np.random.default_rng(0), {}
    for name, uses in holders(spec).items():
        path = uses[0][1].removeprefix("core.")
        if path.endswith(("self_attn.q", "self_attn.o", "ffn.down", "ffn.up")):
            weight = spec.methods["decode"].module.get_submodule(uses[0][1]).weight.detach().numpy()
            grid = nearest(weight, 4, 32, True)
            left, right = (rng.standard_normal(s).astype(np.float32) * 0.1 for s in ((weight.shape[0], 5), (5, weight.shape[1])))
            thin = Code("lowrank", weight.shape, (), (), tuple(Code("dense", a.shape, (), (a,)) for a in (left, right)))
            mask = (rng.random(weight.shape) < 0.02).astype(np.uint8)
            few = rng.standard_normal(int(mask.sum())).astype(np.float32)
            sparse = Code("sparse", weight.shape, (), (mask,), (Code("dense", few.shape, (), (few,)),))
            codes[name] = Code("sum", weight.shape, (), (), (grid, thin, sparse))
            for method in spec.methods.values():
                method.module.get_submodule(uses[0][1]).weight.data = torch.from_numpy(decode(codes[name]).copy())
    assert len(codes) == 8
    path = tmp_path / "model.native"
    path.write_bytes(lower_native(replace(spec, codes=codes), f"native-{host_targets()[0]}", {}))
    machine = Machine(str(path))
    for name, method in spec.methods.items():
        arrays = inputs_of(method, machine.program.methods[name]["role"])
        with torch.no_grad():
            wanted = method.module(*(torch.from_numpy(a) for a in arrays))[0].numpy()
        got = machine.run(name, arrays)[0]
        assert np.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean()) < 0.08  # inputs and thin products in 8 bits


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_plan_with_narrow_caches_runs_natively(bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgesdk.bundles import read_member
    from edgesdk.sequence.card import NAME, Card

    ref = f"{Path(__file__).parent / 'sequence_small.py'}:caches_of_{bits}"
    made = plan(ref, "host", runtime=None if bits != 8 else "native")
    assert made.runtime == "native"
    bundle = build(made, load_model(ref), tmp_path / "small.edge")
    assert Card.read(read_member(bundle, NAME)).cache_bits == bits
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(bundle), "--prompt", "abc", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["answers"]


def test_every_step_tells_its_time_and_what_it_is_of(tmp_path: Path) -> None:
    spec = spec_of("encoder-decoder")
    path = tmp_path / "model.native"
    path.write_bytes(lower_native(spec, f"native-{host_targets()[0]}", choice_of(spec, "int8-dynamic")))
    runner, arrays = open_program(str(path), "native"), inputs_of(spec.methods["decode"], "decode")
    before = runner.run("decode", arrays)
    steps = runner.steps("decode", arrays, 3)
    assert all(len(seconds) == 3 and min(seconds) > 0 for _, _, seconds in steps)
    places = {place for place, _, _ in steps}
    assert {"embed", "head", "decoder.layers.1.ffn.down", "decoder.layers.0.self_attn", "decoder.layers.1.cross_attn.q"} <= places
    assert "" not in places and any(kernel.startswith("attend") for _, kernel, _ in steps)
    assert all(np.array_equal(a, b) for a, b in zip(before, runner.run("decode", arrays), strict=True)), "timing changes no answer"
