"""Native programs for GPUs: every layout against PyTorch with the very same rounded weights, each kernel run on a CPU thread by thread, and on a GPU where there is one."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_kernels_cuda_machines import FakeDriver
from test_native import FORMS, KINDS, choice_of, inputs_of, spec_of

from edgesdk import runner
from edgesdk.agent.client import agent_files
from edgesdk.bundles import read_manifest
from edgesdk.errors import DeviceError, InputError, UnknownName
from edgesdk.kernels.cuda import launch as launching
from edgesdk.kernels.cuda.compile import Kernel
from edgesdk.kernels.cuda.launch import Gpu
from edgesdk.kernels.cuda.machine import Machine as Device
from edgesdk.kernels.nearest import nearest
from edgesdk.lower import build
from edgesdk.model import ModelSpec
from edgesdk.native.cuda import CudaMachine
from edgesdk.native.cuda_lower import arch_of, asked, gpu_target, lower_cuda
from edgesdk.native.lower import lower_native
from edgesdk.native.machine import Machine
from edgesdk.native.program import ProgramError
from edgesdk.packed import Code, decode
from edgesdk.plan import plan
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.config import SequenceConfig
from edgesdk.sequence.generate import Settings, generate
from tests.cuda_kernels import gpu, have_compiler, needs_nvrtc

TOLERANCE = 5e-3
"""Of the outputs' size, behind all layers: inputs of products are float16, and so are the scales of groups."""
QUICK = [("llama", "int4-g32"), ("encoder-decoder-caches-8", "int4-g32"), ("ctc", "int8-dynamic"), ("bart", "int8-dynamic")]
ALL = [(kind, precision) for kind in KINDS for precision in FORMS]


def program(spec: ModelSpec, precision: str) -> bytes:
    return lower_cuda(spec, "cuda-sm87", choice_of(spec, precision), compiling=False)


@lru_cache(maxsize=1)
def quick_kernels() -> tuple[Kernel, ...]:
    """Those of all quick programs, which are compiled together, once."""
    found: dict[str, Kernel] = {}
    for content in (*(program(spec_of(kind), precision) for kind, precision in QUICK), program(with_parts_apart()[0], "int8-dynamic")):
        found |= {k.name: k for k in asked(content)[0]}
    return tuple(found.values())


def device_of(which: int | str, content: bytes) -> Device:
    """An emulated GPU with a seed, or the GPU."""
    if which == "gpu":
        return gpu()
    if not have_compiler():
        pytest.skip("no C++ compiler to emulate with: install g++ or ziglang")
    from edgesdk.kernels.cuda.emulated import Emulated

    quick = quick_kernels()
    names = {k.name for k in quick}
    needed = asked(content)[0]
    return Emulated(quick if names >= {k.name for k in needed} else needed, int(which))


def opened(content: bytes, tmp_path: Path, which: int | str = 0) -> CudaMachine:
    path = tmp_path / "model.native"
    path.write_bytes(content)
    return CudaMachine(str(path), device=device_of(which, content))


def eager_of(spec: ModelSpec, precision: str) -> Any:
    """`run(method, arrays)` of the methods' modules with weights rounded as programs round them."""
    made = {}
    for name, method in spec.methods.items():
        made[name] = module = copy.deepcopy(method.module)
        for path, part in module.named_modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.data = torch.from_numpy(decode(nearest(part.weight.detach().numpy(), *FORMS[precision], True)).copy())
            elif isinstance(part, torch.nn.Embedding) and path.endswith("embed"):
                part.weight.data = torch.from_numpy(decode(nearest(part.weight.detach().numpy(), 8, 0, True)).copy())

    def run(name: str, arrays: Any) -> list[Any]:
        with torch.no_grad():
            outputs = made[name](*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
        return [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


def off(got: Any, wanted: Any) -> float:
    return float(np.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean()))


def every_method_is_right(kind: str, precision: str, tmp_path: Path, which: int | str) -> None:
    spec = spec_of(kind)
    machine, eager = opened(program(spec, precision), tmp_path, which), eager_of(spec, precision)
    seen = slice(0, 3) if kind == "ctc" else slice(None)
    for name, method in spec.methods.items():
        arrays = inputs_of(method, machine.program.methods[name]["role"])
        wanted = eager(name, arrays)
        for _ in range(2):  # a second run finds what the first one left
            got = machine.run(name, arrays)
            assert [g.shape for g in got] == [w.shape for w in wanted]
            assert max(off(g[:, seen], w[:, seen]) for g, w in zip(got, wanted, strict=True)) < TOLERANCE


@pytest.mark.parametrize(("kind", "precision"), QUICK)
def test_every_method_is_that_of_eager(kind: str, precision: str, tmp_path: Path) -> None:
    every_method_is_right(kind, precision, tmp_path, which=2)


@pytest.mark.wide
@pytest.mark.parametrize(("kind", "precision"), ALL)
def test_every_layout_is_that_of_eager(kind: str, precision: str, tmp_path: Path) -> None:
    every_method_is_right(kind, precision, tmp_path, which=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "precision"), ALL)
def test_every_layout_on_a_gpu(kind: str, precision: str, tmp_path: Path) -> None:
    every_method_is_right(kind, precision, tmp_path, which="gpu")


class Beside:
    """A program whose every call is held against eager's with the same inputs."""

    def __init__(self, machine: CudaMachine, eager: Any) -> None:
        self.machine, self.eager, self.calls, self.worst, self.mapped = machine, eager, 0, 0.0, True

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return self.machine.zeros(shape, dtype)

    def run(self, name: str, arrays: Any) -> list[Any]:
        got = self.machine.run(name, arrays)
        inputs = self.machine.program.methods[name]["inputs"]
        caches = [a for (n, _, _), a in zip(inputs, arrays, strict=True) if n.startswith(("self_", "cross_"))]
        self.mapped = self.mapped and all(self.machine.mapped(a) is not None for a in caches)
        self.worst = max(self.worst, *(off(g, w) for g, w in zip(got, self.eager(name, arrays), strict=True)))
        self.calls += 1
        return got


@pytest.mark.parametrize(
    ("kind", "which"), [("llama", 0), ("encoder-decoder-caches-8", 3), pytest.param("llama", "gpu", marks=pytest.mark.gpu)]
)
def test_a_whole_answer_is_that_of_eager_step_by_step(kind: str, which: int | str, tmp_path: Path) -> None:
    spec = spec_of(kind)
    both = Beside(opened(program(spec, "int4-g32"), tmp_path, which), eager_of(spec, "int4-g32"))
    generate(both.run, Card.read(spec.files[NAME]), [[5, 9, 3, 4]], Settings(max_tokens=5))
    assert both.calls > 1 and both.worst < TOLERANCE
    assert both.mapped  # no cache is copied from call to call


def test_caches_that_lie_elsewhere_are_copied_and_graphs_are_kept(tmp_path: Path) -> None:
    spec = spec_of("llama")
    machine = opened(program(spec, "int4-g32"), tmp_path)
    arrays = inputs_of(spec.methods["decode"], "decode")
    plain = machine.run("decode", arrays)
    own = [machine.zeros(a.shape, a.dtype) if a.ndim == 4 else a for a in arrays]
    for there, a in zip(own, arrays, strict=True):
        there[...] = a
    assert machine.mapped(own[-1]) is not None and machine.mapped(own[-1][:, 1:]) == machine.mapped(own[-1]) + own[-1][0, 0].nbytes
    assert machine.mapped(arrays[-1]) is None
    assert all(np.array_equal(a, b) for a, b in zip(machine.run("decode", own), plain, strict=True))
    own[-1][...] *= 2  # written where the GPU reads
    assert not np.array_equal(machine.run("decode", own)[0], plain[0])
    method: Any = machine._open["decode"]
    assert len(method._graphs) == 2
    del own, there
    assert not machine._shared


def test_a_driver_is_given_graphs_and_gets_all_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`Gpu` over a driver whose launches run on the emulated one: what is recorded once serves every call."""
    spec = spec_of("ctc")
    content = program(spec, "int8-dynamic")
    device_of(0, content)
    driver = FakeDriver(list(quick_kernels()))
    monkeypatch.setattr(launching, "_driver", lambda: driver)
    path = tmp_path / "model.native"
    path.write_bytes(content)
    machine = CudaMachine(str(path), device=Gpu(code=lambda name: [b"refused", b"PTX"]))
    arrays, eager = inputs_of(spec.methods["encode"], "encode"), eager_of(spec, "int8-dynamic")
    for _ in range(2):
        arrays[0] = (arrays[0] + 1) % 61
        assert off(machine.run("encode", arrays)[0][:, :3], eager("encode", arrays)[0][:, :3]) < TOLERANCE
    assert driver.launched == 0 and set(driver.loaded) == {b"PTX"}
    machine.close()
    assert machine.device.stream is None  # type: ignore[attr-defined]
    machine.close()


def with_parts_apart() -> tuple[ModelSpec, dict[str, Code]]:
    """A model whose weights are grids of 2 and 3 bits and a table, thin products and single weights beside them."""
    from edgesdk.compress.weights import holders

    spec, rng, codes = spec_of("llama"), np.random.default_rng(0), {}
    for name, uses in holders(spec).items():
        path = uses[0][1].removeprefix("core.")
        weight = spec.methods["decode"].module.get_submodule(uses[0][1]).weight.detach().numpy()
        if path.endswith(("self_attn.q", "ffn.up")):
            codes[name] = nearest(weight, 3 if path.endswith("q") else 2, 32, True)
        elif path.endswith("ffn.gate"):
            table = np.sort(rng.standard_normal((1, 16)).astype(np.float32)) * np.abs(weight).max()
            index = np.abs(weight[..., None] - table[0]).argmin(-1).astype(np.uint8)
            codes[name] = Code("table", weight.shape, (4, 0), (index, table, np.zeros(0, np.float32)))
        elif path.endswith(("self_attn.o", "ffn.down")):
            left, right = (rng.standard_normal(s).astype(np.float32) * 0.1 for s in ((weight.shape[0], 5), (5, weight.shape[1])))
            thin = Code("lowrank", weight.shape, (), (), tuple(Code("dense", a.shape, (), (a,)) for a in (left, right)))
            mask = (rng.random(weight.shape) < 0.02).astype(np.uint8)
            few = rng.standard_normal(int(mask.sum())).astype(np.float32)
            sparse = Code("sparse", weight.shape, (), (mask,), (Code("dense", few.shape, (), (few,)),))
            codes[name] = Code("sum", weight.shape, (), (), (nearest(weight, 4, 32, True), thin, sparse))
        else:
            continue
        for method in spec.methods.values():
            method.module.get_submodule(uses[0][1]).weight.data = torch.from_numpy(decode(codes[name]).copy())
    return replace(spec, codes=codes), codes


def test_compressed_weights_run_as_they_are_stored(tmp_path: Path) -> None:
    spec, codes = with_parts_apart()
    assert len(codes) == 10
    machine = opened(program(spec, "int8-dynamic"), tmp_path)
    assert {p["bits"] for p in machine.program.panels.values()} == {2, 3, 4, 8}
    for name, method in spec.methods.items():
        arrays = inputs_of(method, machine.program.methods[name]["role"])
        with torch.no_grad():
            wanted = method.module(*(torch.from_numpy(a) for a in arrays))[0].numpy()
        assert off(machine.run(name, arrays)[0], wanted) < 0.02  # other matrices and thin products are rounded to 8 bits


@needs_nvrtc
def test_a_program_carries_machine_code_and_ptx_of_every_kernel(tmp_path: Path) -> None:
    spec = spec_of("ctc")
    content = lower_cuda(spec, "cuda-sm87", choice_of(spec, "int8-dynamic"))
    machine = opened(content, tmp_path)
    names = {k.name for k in asked(program(spec, "int8-dynamic"))[0]}
    assert set(machine.program.header["kernels"]) == names
    for parts in machine.program.header["kernels"].values():
        cubin, ptx = (machine.program.array(part).tobytes() for part in parts)
        assert cubin[:4] == b"\x7fELF" and b".target sm_80" in ptx
    assert machine._weights.nbytes < len(content) / 2  # code stays behind


def test_other_architectures_heads_and_damaged_programs_are_refused(tmp_path: Path) -> None:
    assert arch_of("cuda-sm110") == "sm_110"
    with pytest.raises(UnknownName, match="cuda-sm75"):
        arch_of("cuda-sm75")
    from edgesdk.sequence.config import Stack
    from edgesdk.sequence.export import sequence_spec
    from edgesdk.sequence.model import SequenceModel

    odd = Stack(layers=1, dim=40, heads=2, kv_heads=2, head=20, ffn=64)
    spec = sequence_spec(SequenceModel(SequenceConfig(layout="decoder-only", vocab=9, decoder=odd)).eval(), name="odd")
    with pytest.raises(InputError, match="heads of 20"):
        lower_cuda(spec, "cuda-sm87", {}, compiling=False)
    content = program(spec_of("ctc"), "int8-dynamic")
    for damaged, words in (
        (content[:-64], "bytes"),
        (content.replace(b'"tiles": 1', b'"tiles": 0'), "build it again"),
        (content.replace(b'"blocks"', b'"blockz"'), "no blocks"),
        (content.replace(b'"target": "cuda-sm87"', b'"target": "arm-neon2"'), "build it again"),
    ):
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        with pytest.raises(ProgramError, match=words):
            CudaMachine(str(path), device=device_of(0, content))
    at = content.index(b'"blocks": {"encode": [') + len(b'"blocks": {"encode": [')
    size = content[at : content.index(b",", at)]
    path.write_bytes(content.replace(b'"blocks": {"encode": [' + size, b'"blocks": {"encode": [' + b"64".rjust(len(size))))
    short = CudaMachine(str(path), device=device_of(0, content))
    with pytest.raises(ValueError, match="inputs or outputs take more"):
        short.run("encode", inputs_of(spec_of("ctc").methods["encode"], "encode"))


def test_what_a_device_is_sent_opens_programs_without_a_compiler(tmp_path: Path) -> None:
    """Of what an agent carries, with nothing but numpy: a program is opened, and the missing GPU told in two lines."""
    for name, content in agent_files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "model.native").write_bytes(program(spec_of("ctc"), "int8-dynamic"))
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path / "agent.zip")!r})
sys.modules.update(dict.fromkeys(("numba", "torch", "cuda", "edgesdk_editable")))
import runner
try:
    runner.open_program({str(tmp_path / "model.native")!r}, "native-cuda")
except runner.RunnerError as error:
    assert "agent.zip" in sys.modules["edgesdk.native.cuda"].__file__
    print(f"{{error}}|{{error.hint}}")
"""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env=clean)
    assert not done.returncode, done.stderr
    what, hint = done.stdout.strip().split("|")
    assert "native-cuda refuses" in what and hint


def test_a_gpu_that_fails_in_the_middle_is_told_in_two_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edgesdk.agent import installed
    from edgesdk.agent.wire import Refused

    def run(method: str, arrays: Any) -> Any:
        raise DeviceError("Fake: 8 MB more do not fit; 3 of 9 MB are free", "close other programs")

    monkeypatch.setitem(sys.modules, "runner", runner)
    monkeypatch.setitem(sys.modules, "sequence.serve", SimpleNamespace(serve=lambda *given: run("", given), SequenceError=ValueError))
    monkeypatch.setitem(installed.OPEN, os.path.realpath(tmp_path), SimpleNamespace(run=run))
    for call in (
        lambda: installed.run(str(tmp_path), "decode", []),
        lambda: installed.generate(str(tmp_path), [], {}, print, lambda: False),
    ):
        with pytest.raises(Refused, match="8 MB more") as caught:
            call()
        assert "close other programs" in str(vars(caught.value))


def test_the_benchmark_of_a_whole_program_runs(tmp_path: Path) -> None:
    from tests.bench.native_cuda import program_loop, table

    config = SequenceConfig(**{**KINDS["llama"][0], "vocab": 61})
    found = program_loop(device_of(0, program(spec_of("llama"), "int4-g32")), config, "int4-g32", source=8, tokens=2, repeats=1)
    assert found["launched"] == 25 and "| tiny | 0M | 25 |" in table({"tiny": found})


def test_a_twin_on_the_cpu_has_the_gpus_weights(tmp_path: Path) -> None:
    spec = spec_of("llama")
    (tmp_path / "twin").write_bytes(lower_native(spec, "native", choice_of(spec, "int4-g32"), rounded_for="cuda-sm87"))
    twin, machine = Machine(str(tmp_path / "twin")), opened(program(spec, "int4-g32"), tmp_path)
    arrays = inputs_of(spec.methods["decode"], "decode")
    for one, other in zip(twin.run("decode", arrays), machine.run("decode", arrays), strict=True):
        assert off(one, other) < 0.05  # the twin's inputs have 8 bits


@needs_nvrtc
def test_a_jetsons_gpu_is_planned_where_it_is_asked_for_and_built_with_a_twin_as_its_check(tmp_path: Path) -> None:
    from sequence_small import encoder_decoder

    ref = f"{Path(__file__).parent / 'sequence_small.py'}:encoder_decoder"
    assert plan(ref, "jetson-orin-nano").runtime != "native-cuda"
    made = plan(ref, "jetson-orin-nano", runtime="native-cuda")
    assert made.unit == "gpu"
    assert {u.precision for u in made.units if u.op == "linear"} <= {"int8-dynamic", "int4-g32"}
    assert any("nothing was measured" in w for w in made.warnings)
    bundle = build(made, encoder_decoder(), tmp_path / "small.edge")
    manifest = read_manifest(bundle)
    assert "constants" in manifest.memory and {f"planned:{name}:0" for name in manifest.methods} <= set(manifest.memory)
    assert manifest.runtime == "native-cuda" and manifest.golden and manifest.host_check
    with pytest.raises(UnknownName, match="native-cuda"):
        plan(ref, "raspberry-pi-5", runtime="native-cuda")


def test_gpus_without_kernels_have_no_target() -> None:
    assert gpu_target("jetson-agx-thor", ("sm_110",)) == "cuda-sm110"
    with pytest.raises(InputError, match="names no GPU"):
        gpu_target("jetson-nano", ())
