"""Bytes: what is planned equals what the lowered program holds, to the byte where the runtime tells."""

from __future__ import annotations

import pytest

from edgesdk.bundles import read_manifest, read_member
from edgesdk.devices import load_device
from edgesdk.graph import trace
from edgesdk.graph.memory import memory_answer, weight_bytes, with_runtime_plan
from edgesdk.graph.types import Unit
from edgesdk.intake import load_model
from edgesdk.lower import lower
from edgesdk.lower.executorch import memory_plan

LINEAR = Unit(name="fc", op="linear", weight="fc.weight", weight_shape=(10, 64), rows=10, cols=64, bias_elements=10)


@pytest.mark.parametrize(
    ("precision", "runtime", "size"),
    [
        ("fp32", "executorch", 640 * 4 + 40),
        ("int8-dynamic", "executorch", 640 + 10 * 4 + 40),
        ("int8-static", "litert", 640 + 10 * 12 + 40),
        ("int4-g32", "executorch", 320 + 2 * 10 * 4 + 40),
    ],
)
def test_weight_bytes(precision, runtime, size):
    assert weight_bytes(LINEAR, precision, runtime) == size


@pytest.fixture(scope="module")
def digits():
    spec = load_model("example:digits-cnn")
    return spec, trace(spec)


@pytest.mark.parametrize(
    ("runtime", "precision"), [("executorch", "fp32"), ("executorch", "int8-static"), ("litert", "fp32"), ("litert", "int8-dynamic")]
)
def test_planned_weights_are_what_the_program_stores(digits, runtime, precision):
    """Within the program's own overhead: the graph, names and, in LiteRT, metadata; never less than planned by more than rounding."""
    spec, graph = digits
    choice = {("forward", u.name): precision for u in graph.methods[0].units if u.weight_elements}
    planned = memory_answer(graph, choice, runtime, load_device("host")).weights_bytes
    size = len(lower(spec, runtime, choice))
    assert planned <= size <= planned + 16_000


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
    if delegate == "xnnpack":
        assert buffers[0] <= io + 64, "XNNPACK keeps what is between inside itself"
    answer = with_runtime_plan(memory_answer(graph, {}, "executorch", load_device("host")), path, plan)
    assert answer.from_runtime
    assert answer.weights_bytes == path.stat().st_size
    assert answer.activations_bytes == sum(buffers)
    assert answer.peak_bytes == path.stat().st_size + sum(buffers) + (answer.runtime_bytes or 0)


def test_a_bundle_carries_the_runtimes_plan(tmp_path):
    from edgesdk.lower import build
    from edgesdk.plan import plan

    made = plan("example:digits-cnn", "host", runtime="executorch")
    bundle = build(made, load_model("example:digits-cnn"), tmp_path / "m.edge")
    manifest = read_manifest(bundle)
    assert manifest.memory == memory_plan(read_member(bundle, manifest.program))
