"""Times of single units. The runtimes' Python packages record none, so each unit is lowered and timed alone; or an ETDump is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError, MissingTool
from edgesdk.report import OperatorTime
from edgesdk.trust import percentile
from edgesdk.units import show_seconds

if TYPE_CHECKING:
    from edgesdk.bundle import Manifest
    from edgesdk.plan.types import Plan, UnitPlan

Tell = Callable[[str, float], None]
CALLS, WARMUP = 30, 5
WHOLES = ("Method::execute", "Method::init", "Program::load_method", "OPERATOR_CALL", "DELEGATE_CALL")
"""Events that hold others: counting them would count those twice."""


def time_units(manifest: Manifest, plan: Plan | None, *, tell: Tell | None = None) -> tuple[tuple[OperatorTime, ...], str]:
    """Median seconds of each unit of the plan that is a module, lowered alone at its precision and run on this host.

    Each time holds one call of the runtime, so the sum is above the whole program's time. Raises `InputError` if the model cannot be had.
    """
    if plan is None:
        raise InputError("the bundle holds no plan: its units are unknown", "build it with `edgesdk build`")
    import torch

    from edgesdk.intake import load_model

    spec = load_model(plan.model, plan.workload.sizes)
    if not spec.methods:
        raise InputError(f"{plan.model}: units of a .tflite cannot be lowered alone", "leave --operators out, or give the PyTorch model")
    seen = {name: _module_inputs(m.module, m.example_inputs) for name, m in spec.methods.items()}
    times: dict[tuple[Any, ...], float | None] = {}
    rows: list[tuple[UnitPlan, float]] = []
    for index, unit in enumerate(plan.units):
        if tell:
            tell(f"unit {unit.unit}", index / len(plan.units))
        found = seen.get(unit.method, {}).get(unit.unit)
        if found is None:
            continue
        module, inputs = found
        key = (str(module), tuple((tuple(i.shape), str(i.dtype)) for i in inputs), unit.precision)
        if key not in times:
            times[key] = _time_alone(module, inputs, unit.precision, manifest)
        seconds = times[key]
        if seconds is not None:
            rows.append((unit, seconds))
    total = sum(s for _, s in rows) or 1.0
    listed = tuple(OperatorTime(method=u.method, unit=u.unit, op=u.op, median_s=s, share=s / total) for u, s in rows)
    empty = _time_alone(torch.nn.ReLU(), (torch.zeros(1),), "fp32", manifest)
    call = f" (about {show_seconds(empty)}, timed with a program of one ReLU)" if empty else ""
    counted = f"{len(rows)} of {len(plan.units)} units"
    route = f"each unit lowered alone and timed on this host, {counted}; each time holds one call of the runtime{call}"
    return listed, route


def _module_inputs(module: Any, example: tuple[Any, ...]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """name → (leaf module, the tensors it is first called with)."""
    import torch

    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    hooks = []
    for name, child in module.named_modules():
        if name and not list(child.children()):

            def keep(m: Any, args: tuple[Any, ...], name: str = name) -> None:
                if args and all(isinstance(a, torch.Tensor) for a in args):
                    found.setdefault(name, (m, tuple(a.detach().clone() for a in args)))

            hooks.append(child.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            module(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _time_alone(module: Any, inputs: tuple[Any, ...], precision: str, manifest: Manifest) -> float | None:
    """Median seconds a call of `module` as a program of its own, or None if it cannot be lowered alone."""
    import hashlib
    import tempfile

    import torch

    from edgesdk.errors import EdgeError
    from edgesdk.lower import lower
    from edgesdk.model import Method, ModelSpec
    from edgesdk.runner import RunnerError, open_program

    class Alone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = module

        def forward(self, *args: torch.Tensor) -> Any:
            return self.unit(*args)

    digest = hashlib.sha256(repr((str(module), [tuple(i.shape) for i in inputs])).encode())
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    alone = Method(Alone().eval(), inputs)
    spec = ModelSpec(name="unit", digest=digest.hexdigest(), methods={"forward": alone}, calibration=lambda _: [inputs])
    try:
        program = lower(spec, manifest.runtime, {("forward", "unit"): precision})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, manifest.program)
            path.write_bytes(program)
            runner = open_program(str(path), manifest.runtime, manifest.threads)
            arrays = [i.numpy() for i in inputs]
            samples = []
            for _ in range(WARMUP + CALLS):
                start = time.perf_counter_ns()
                runner.run("forward", arrays)
                samples.append((time.perf_counter_ns() - start) / 1e9)
    except (EdgeError, RunnerError):
        return None
    return percentile(samples[WARMUP:], 0.5)


def read_etdump(etdump: Path, etrecord: Path | None = None) -> tuple[tuple[OperatorTime, ...], str]:
    """Operator times in an ETDump that a user's own ExecuTorch runner recorded. Raises `InputError`, `MissingTool`."""
    for path in filter(None, (etdump, etrecord)):
        if not path.is_file():
            raise InputError(f"{path}: no such file", "give what your runner wrote (built with EXECUTORCH_ENABLE_EVENT_TRACER)")
    if etdump.read_bytes()[8:12] != b"ED00":  # a flatbuffer behind its length in 4 bytes
        raise InputError(f"{etdump}: not an ETDump (its file identifier is not ED00)", "give what your runner wrote")
    try:
        from executorch.devtools import Inspector
        from executorch.devtools.inspector import TimeScale
    except ImportError as error:
        raise MissingTool(f"reading an ETDump needs ExecuTorch's devtools ({error})", "pip install 'edgesdk[executorch]'") from None
    try:
        inspector = Inspector(etdump_path=str(etdump), etrecord=str(etrecord) if etrecord else None, target_time_scale=TimeScale.S)
        blocks = inspector.event_blocks
    except Exception as error:  # the devtools raise whatever their parser meets
        raise InputError(f"{etdump}: not an ETDump ({type(error).__name__}: {str(error)[:80]})", "give what your runner wrote") from None
    rows: list[tuple[str, str, str, float]] = []
    for block in blocks:
        for event in block.events:
            if event.perf_data is None or event.name in WHOLES:
                continue
            raw = event.perf_data.raw
            if raw:
                rows.append((str(block.name), str(event.name), ", ".join(event.op_types or []) or "delegate", percentile(raw, 0.5)))
    if not rows:
        raise InputError(f"{etdump}: holds no operator times", "run the method at least once with the event tracer on")
    total = sum(r[3] for r in rows) or 1.0
    route = f"ETDump {etdump.name} of a runner of your own" + ("" if etrecord else ", no ETRecord: names are the runtime's")
    return tuple(OperatorTime(method=m, unit=u, op=o, median_s=s, share=s / total) for m, u, o, s in rows), route
