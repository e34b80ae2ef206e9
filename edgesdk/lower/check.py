"""The numeric check: a built program against the reference, on this machine, before anything is shipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgesdk.errors import CheckFailed
from edgesdk.native.formats import like

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

LIMITS = {"fp32": 2e-3, "as-is": 2e-3, "fp16": 2e-2, "int8-weight-only": 0.3, "int8-dynamic": 0.3, "int8-static": 0.4, "int4-g32": 0.45}
"""Largest relative error ‖out - ref‖ / ‖ref‖ allowed for the lowest precision used. Honest quantization of small models stays well below;
the silent faults seen in released runtimes (dropped scales, zero outputs) are at 1.0 and above."""


def relative_error(out: Any, ref: Any) -> float:
    """‖out - ref‖ / ‖ref‖ over all elements; infinite for a wrong size or a value that is not finite."""
    import numpy as np

    a, b = np.asarray(out, np.float64).ravel(), np.asarray(ref, np.float64).ravel()
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))


def reference(spec: ModelSpec) -> Any:
    """`run(method, numpy inputs) -> numpy outputs` of the model as it came: eager PyTorch, or the flatbuffer itself."""
    if spec.flatbuffer is not None:
        from edgesdk.runner import open_program

        return open_program(str(spec.flatbuffer), "litert").run
    from edgesdk.plan.fake_quant import run

    return run(spec)


def golden_inputs(spec: ModelSpec, cases: int = 4) -> dict[str, list[list[Any]]]:
    """Per method, up to `cases` input lists: from the calibration data where there is any, else the examples, else seeded noise."""
    import numpy as np

    if spec.flatbuffer is not None:
        from edgesdk.runner import open_program

        runner, rng = open_program(str(spec.flatbuffer), "litert"), np.random.default_rng(0)
        return {
            m: [[rng.standard_normal(shape).astype(np.float32) for shape, _ in runner.inputs(m)] for _ in range(cases)]
            for m in runner.methods
        }
    answer = {}
    for name, method in spec.methods.items():
        samples = list(spec.calibration(name)) if spec.calibration else [method.example_inputs]
        spread = samples[:: max(1, len(samples) // cases)][:cases]
        answer[name] = [[t.detach().numpy() for t in sample] for sample in spread]
    return answer


def check_program(run: Any, expected: Any, inputs: dict[str, list[list[Any]]], precisions: set[str], what: str) -> dict[str, float]:
    """Worst relative error of each method. Raises `CheckFailed` when one is above the limit of the precisions used."""
    limit = max((LIMITS[like(p)] for p in precisions), default=LIMITS["fp32"])
    errors: dict[str, float] = {}
    for method, cases in inputs.items():
        for case in cases:
            outs, refs = run(method, case), expected(method, case)
            if len(outs) != len(refs):
                raise CheckFailed(f"{what}: '{method}' gives {len(outs)} outputs, the model {len(refs)}", "choose another --runtime")
            for out, ref in zip(outs, refs, strict=True):
                errors[method] = max(errors.get(method, 0.0), relative_error(out, ref))
        if not errors[method] <= limit:
            raise CheckFailed(
                f"{what}: '{method}' is wrong: relative error {errors[method]:.3g}, allowed {limit:g}",
                "the runtime computes something else than the model; choose another --runtime or a larger --quality-drop budget's precision",
                errors=errors,
            )
    return errors
