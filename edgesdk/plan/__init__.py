"""The planner: which precision, layout and runtime fit a device and a budget, with proof. Imports no runtime."""

from __future__ import annotations

from collections.abc import Callable

from edgesdk.plan.types import Budget, Plan, Workload

__all__ = ["DEFAULT_MODEL", "Budget", "Plan", "Workload", "plan"]

DEFAULT_MODEL = "example:digits-cnn"


def plan(
    model: str = DEFAULT_MODEL,
    device: str = "host",
    *,
    budget: Budget | None = None,
    workload: Workload | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    layout: str | None = None,
    verify: bool = False,
    step: Callable[[str, float], None] | None = None,
) -> Plan:
    """The plan for `model` (see `MODEL_HELP`) on `device` within `budget`; `plan.fits` says whether it does, `plan.checks[0]` what binds.

    Without `runtime` and `layout` all of them are weighed. With `verify` every candidate of `plan.front` is built, checked and evaluated on this
    host (`front[i].built`). Raises `InputError` or `UnknownName` for what it cannot read.
    """
    from edgesdk.plan.cache_bits import refuse_unread, weighed
    from edgesdk.plan.planner import make_plan

    step = step or (lambda text, share: None)
    refuse_unread(workload or Workload(), device, runtime)

    def make(asked: Workload) -> Plan:
        return make_plan(model, device, budget or Budget(), asked, runtime, threads, layout, step)

    answer = weighed(make(workload or Workload()), make)
    if verify:
        from edgesdk.plan.subject import Subject
        from edgesdk.plan.verify import verify as build_all

        facts = Subject(model, workload).facts
        answer = build_all(answer, {facts.layout: model, **facts.alternatives}, step)
    return answer
