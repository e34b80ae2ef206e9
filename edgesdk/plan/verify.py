"""`plan --verify`: every candidate on the front is really built, checked and evaluated on this host."""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgesdk.errors import EdgeError
from edgesdk.plan.harm import Step
from edgesdk.plan.types import Built, Candidate, Plan


def verify(plan: Plan, refs: dict[str, str], step: Step) -> Plan:
    """The plan with `built` filled in for every candidate of its front. `refs`: layout → model reference.

    What cannot be built here, or fails its numeric check, says so in `built.refused`; nothing raises for it.
    """
    front = []
    for i, candidate in enumerate(plan.front):
        step(f"building candidate {i + 1} of {len(plan.front)}: {candidate.layout} on {candidate.runtime}", i / len(plan.front))
        front.append(candidate.model_copy(update={"built": _built(plan, candidate, refs[candidate.layout], step)}))
    return plan.model_copy(update={"front": tuple(front)})


def _built(plan: Plan, candidate: Candidate, ref: str, step: Step) -> Built:
    from edgesdk.bundles import read_manifest
    from edgesdk.graph import trace
    from edgesdk.intake import load_model
    from edgesdk.lower import build

    spec = load_model(ref, plan.workload.sizes)
    units = []
    for method in trace(spec).methods:
        for unit in method.units:
            precision = candidate.choice.get(f"{method.name}/{unit.name}", "fp32")
            blank = plan.units[0].model_copy(update={"unit": unit.name, "method": method.name, "op": unit.op, "precision": precision})
            units.append(blank)
    twin = plan.model_copy(
        update={
            "model": ref, "model_name": spec.name, "layout": candidate.layout, "runtime": candidate.runtime, "units": tuple(units),
            "method_latency": dict.fromkeys(spec.methods, plan.latency), "digests": {**plan.digests, "model": spec.digest},
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            manifest = read_manifest(build(twin, spec, Path(folder, "candidate.edge"), step=lambda text, share: None))
        except EdgeError as error:
            return Built(refused=str(error).splitlines()[0])
    size = next(m.size_bytes for m in manifest.members if m.name == manifest.program)
    return Built(program_bytes=size, quality=manifest.quality)
