"""Bytes: what is planned equals what the lowered program holds, to the byte where the runtime tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgesdk.bundles import read_manifest, read_member
from edgesdk.devices import load_device
from edgesdk.errors import InputError
from edgesdk.graph import trace
from edgesdk.graph.arena import Held, arena, greedy_by_size
from edgesdk.graph.arena import memory_plan as arena_plan
from edgesdk.graph.memory import memory_answer, planned_bytes, stored_weights, weight_bytes, with_runtime_plan
from edgesdk.graph.memory_plan import RuntimePlan, dry_plan, known, per_method, remember
from edgesdk.graph.types import Unit
from edgesdk.intake import load_model
from edgesdk.lower import lower
from edgesdk.lower.executorch import memory_plan
from edgesdk.model import Method, ModelSpec
from edgesdk.plan.options import options

MODELS = Path(__file__).parents[1].parent / "shared" / "data" / "models"
LINEAR = Unit(name="fc", op="linear", weight="fc.weight", weight_shape=(10, 64), rows=10, cols=64, bias_elements=10)


@pytest.mark.parametrize(
    ("precision", "runtime", "size"),
    [
        ("fp32", "executorch", 640 * 4 + 40),
        ("int8-dynamic", "executorch", 640 + 10 * 4 + 40),
        ("int8-static", "executorch", 640 + 10 * 4 + 40 + 10 * 4),
        ("int8-static", "litert", 640 + 10 * 12 + 40),
        ("int4-g32", "executorch", 320 + 2 * 10 * 2 + 40),
    ],
)
def test_weight_bytes(precision, runtime, size):
    assert weight_bytes(LINEAR, precision, runtime) == size


@pytest.fixture(scope="module")
def digits():
    spec = load_model("example:digits-cnn")
    return spec, trace(spec)


def choice_of(spec, graph, runtime, precision):
    """Every weight that can take it at `precision`."""
    host = load_device("host")
    units = [(m.name, u) for m in graph.methods for u in m.units if u.weight_elements]
    return {(m, u.name): precision for m, u in units if precision != "fp32" and precision in options(u, m, runtime, host)}


@pytest.mark.parametrize(("runtime", "precision"), [("litert", "fp32"), ("litert", "int8-dynamic")])
def test_planned_weights_are_what_the_program_stores(digits, runtime, precision):
    """Within the program's own overhead: the graph, names and, in LiteRT, metadata; never less than planned by more than rounding."""
    spec, graph = digits
    choice = choice_of(spec, graph, runtime, precision)
    planned = memory_answer(graph, choice, runtime, load_device("host")).weights_bytes
    size = len(lower(spec, runtime, choice))
    assert planned <= size <= planned + 16_000


@pytest.mark.parametrize("precision", ["fp32", "int8-static"])
def test_before_lowering_the_answer_is_executorchs_plan_to_the_byte(digits, precision):
    """A network that is one delegate as a whole: buffers and stored constants are told from the graph alone."""
    spec, graph = digits
    choice = choice_of(spec, graph, "executorch", precision)
    told = memory_plan(lower(spec, "executorch", choice))
    answer = memory_answer(graph, choice, "executorch", load_device("host"))
    assert answer.weights_bytes == told["constants"]
    assert answer.io_bytes + answer.activations_bytes == sum(per_method(told).values())
    assert not any("estimate" in n for n in answer.not_counted)


class Gated(nn.Module):
    """Operators that XNNPACK takes, between those that it leaves: a norm, a lookup, a number that the exporter makes a tensor of."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 32), nn.LayerNorm(32)
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        y = self.norm(x + self.table(at)) * 0.37
        return x + self.b(torch.sigmoid(self.a(y)))


@pytest.fixture(scope="module")
def gated():
    torch.manual_seed(0)
    inputs = (torch.randn(1, 7, 32), torch.arange(7)[None])
    method = Method(Gated().eval().requires_grad_(False), inputs)
    return ModelSpec(name="gated", digest="test-memory-gated-1", methods={"forward": method}, calibration=lambda _: [inputs])


def test_a_dry_lowering_tells_what_the_real_one_plans(gated, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESDK_CACHE", str(tmp_path))
    graph, host = trace(gated), load_device("host")
    guess, sure = planned_bytes(graph.methods[0], "executorch", frozenset())
    assert not sure
    assert known(gated.digest, "executorch") is None
    assert any("estimate" in n for n in memory_answer(graph, {}, "executorch", host).not_counted)
    ahead = dry_plan(gated)
    assert known(gated.digest, "executorch") == ahead
    assert ahead.planned["forward"] <= guess + 16 * len(graph.methods[0].units)
    for precision in ("fp32", "int4-g32"):
        choice = choice_of(gated, graph, "executorch", precision)
        told = memory_plan(lower(gated, "executorch", choice))
        answer = memory_answer(graph, choice, "executorch", host, ahead)
        assert ahead.planned == per_method(told)
        assert answer.weights_bytes == told["constants"]
        assert answer.activations_bytes + answer.io_bytes == told["planned:forward:0"]
        assert answer.from_runtime
    assert known(gated.digest, "executorch") == ahead, "a build keeps the same plan"


def test_plans_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESDK_CACHE", str(tmp_path))
    floats, static = (RuntimePlan(runtime="executorch", planned={"forward": n}) for n in (64, 128))
    assert known("x", "executorch", ["int8-static"]) is None
    remember(floats, "x", ["fp32", "int8-dynamic"])
    assert known("x", "executorch", ["int8-static"]) == floats
    remember(static, "x", ["int8-static"])
    assert known("x", "executorch", ["int8-static"]) == static
    assert known("x", "executorch", ["int4-g32"]) == floats
    assert known("x", "litert") is None
    next((tmp_path / "memory").glob("*.json")).write_text("{}")
    assert (
        None in (known("x", "executorch"), known("x", "executorch", ["int8-static"])) or known("x", "executorch", ["int8-static"]) == floats
    )


@pytest.mark.parametrize("delegate", ["xnnpack", "portable"])
def test_the_answer_after_lowering_is_the_runtimes_own_plan(digits, tmp_path, delegate):
    spec, graph = digits
    program = lower(spec, "executorch" if delegate == "xnnpack" else "executorch-portable", {})
    path = tmp_path / "m.pte"
    path.write_bytes(program)
    plan = memory_plan(program)
    buffers = [v for k, v in plan.items() if k.startswith("planned:forward:")]
    assert len(buffers) == 1 and buffers[0] % 16 == 0
    io = 8 * 8 * 4 + 48  # the image and ten logits, aligned to 16
    assert buffers[0] >= io
    before = memory_answer(graph, {}, "executorch", load_device("host"))
    answer = with_runtime_plan(before, path, plan, graph)
    assert answer.from_runtime
    assert answer.weights_bytes == path.stat().st_size
    assert answer.activations_bytes + answer.io_bytes == sum(buffers)
    inside = answer.delegate_bytes or 0
    assert answer.peak_bytes == path.stat().st_size + sum(buffers) + inside + (answer.runtime_bytes or 0)
    if delegate == "xnnpack":
        assert (answer.io_bytes, answer.activations_bytes) == (before.io_bytes, before.activations_bytes) == (io, 64)


def test_a_bundle_carries_the_runtimes_plan(tmp_path):
    from edgesdk.lower import build
    from edgesdk.plan import plan

    made = plan("example:digits-cnn", "host", runtime="executorch")
    bundle = build(made, load_model("example:digits-cnn"), tmp_path / "m.edge")
    manifest = read_manifest(bundle)
    assert manifest.memory == memory_plan(read_member(bundle, manifest.program))
    planned = made.memory.io_bytes + made.memory.activations_bytes
    assert planned == sum(per_method(manifest.memory).values()), "the plan knew it before anything was built"


def placed(path: Path, delegate: bool) -> int:
    """Bytes between the first and the last address of the arena's tensors, as LiteRT itself placed them."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_path=str(path), num_threads=1, experimental_op_resolver_type=kind)
    interpreter.allocate_tensors()
    made = {int(t) for op in interpreter._get_ops_details() for t in op["outputs"]}
    made |= {int(d["index"]) for d in interpreter.get_input_details()}
    ends = []
    for index in made:
        try:
            array = interpreter.tensor(index)()
        except ValueError:
            continue  # inside a delegate
        start = array.__array_interface__["data"][0]
        ends.append((start, start + array.nbytes))
    return max(end for _, end in ends) - min(start for start, _ in ends)


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic", "int8-static"])
def test_the_replayed_arena_is_litert_own(digits, tmp_path, precision):
    spec, graph = digits
    choice = choice_of(spec, graph, "litert", precision)
    program = lower(spec, "litert", choice)
    path = tmp_path / "m.tflite"
    path.write_bytes(program)
    told = placed(path, delegate=True)
    assert arena_plan(program) == {"program": len(program), "planned:forward:0": told}
    before = memory_answer(graph, choice, "litert", load_device("host"))
    if precision != "int8-dynamic":  # then XNNPACK takes it as a whole, which is known without the flatbuffer
        assert before.io_bytes + before.activations_bytes == told
    answer = with_runtime_plan(before, path, arena_plan(program), graph)
    assert answer.io_bytes + answer.activations_bytes == told
    assert answer.peak_bytes == len(program) + told + (answer.delegate_bytes or 0) + (answer.runtime_bytes or 0)


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the MLPerf Tiny models in ../shared/data/models")
@pytest.mark.parametrize("name", [f"{m}_{k}" for m in ("ad", "kws", "resnet8", "vww") for k in ("float", "int8")])
def test_the_arena_of_the_mlperf_models(name):
    path = MODELS / f"mlperf_tiny_{name}.tflite"
    assert arena(path) == {"forward": placed(path, delegate=True)}
    if name in ("ad_float", "ad_int8", "kws_int8"):  # others have kernels with scratch of their own
        assert arena(path, delegate=False) == {"forward": placed(path, delegate=False)}


def test_greedy_by_size():
    """The largest first, each at the lowest free place of 64 bytes; what is not alive at the same time shares its place."""
    size, at = greedy_by_size([Held(100, 0, 3), Held(50, 0, 1), Held(500, 1, 2), Held(40, 2, 3), Held(500, 3, 3)])
    assert at == [0, 640, 128, 640, 128]
    assert size == 690
    assert greedy_by_size([]) == (0, [])


def test_a_damaged_flatbuffer_is_refused(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"\x10\x00\x00\x00TFL3" + b"\x00" * 30)
    with pytest.raises(InputError, match="damaged"):
        arena(path)


def test_stored_weights_count_a_shared_weight_once(digits):
    _, graph = digits
    twice = graph.model_copy(update={"methods": (graph.methods[0], graph.methods[0].model_copy(update={"name": "again"}))})
    assert stored_weights(twice, {}, "executorch") == stored_weights(graph, {}, "executorch")
