"""Compare the layouts a sequence model comes in on one device: each is planned alone, under the same budget."""

from __future__ import annotations

from typing import ClassVar

from edgesdk.noun import Noun, Part
from edgesdk.plan.types import Budget, Estimate, Plan, Workload


class LayoutRow(Part):
    """Seconds and bytes, predicted."""

    layout: str
    model: str
    runtime: str
    fits: bool
    first_token: Estimate
    per_token: Estimate | None  # None: the model has no `decode`
    whole_answer: Estimate  # expected, over the workload's lengths
    whole_p50: float
    whole_p90: float
    memory_bytes: int
    storage_bytes: int
    quality: float | None  # measured on held-out data, of the float reference


class LayoutTable(Noun):
    KIND: ClassVar[str] = "layouts"

    device: str
    rows: tuple[LayoutRow, ...]


def _row(name: str, plan: Plan) -> LayoutRow:
    answers, mean = plan.answers, plan.latency
    return LayoutRow(
        layout=name, model=plan.model, runtime=plan.runtime, fits=plan.fits,
        first_token=answers.first_token.mean if answers else mean, per_token=answers.per_token if answers else None,
        whole_answer=mean, whole_p50=answers.whole.p50 if answers else mean.value, whole_p90=answers.whole.p90 if answers else mean.value,
        memory_bytes=plan.memory.peak_bytes, storage_bytes=plan.storage_bytes, quality=plan.quality,
    )  # fmt: skip


def layouts(model: str, device: str, *, budget: Budget | None = None, workload: Workload | None = None) -> LayoutTable:
    """Plan `model` and each of its alternatives on `device`; rows in order of the whole answer's predicted time.

    Raises whatever `plan` raises.
    """
    from edgesdk.plan import plan
    from edgesdk.plan.subject import Subject

    budget, workload = budget or Budget(), workload or Workload()
    asked = Subject(model, workload)
    wanted = {asked.facts.layout: model, **asked.facts.alternatives}
    found = []
    for name, ref in wanted.items():
        own = asked if ref == model else Subject(ref, workload)
        found.append((name, plan(ref, device, budget=budget, workload=workload, layout=own.facts.layout)))
    rows = sorted((_row(name, p) for name, p in found), key=lambda r: r.whole_answer.value)
    return LayoutTable(device=found[0][1].device, rows=tuple(rows))
