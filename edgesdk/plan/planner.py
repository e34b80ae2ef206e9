"""Model and device to Plan: candidates over layouts and runtimes, each solved; the best that fits, with its reasons."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import median

from edgesdk import __version__
from edgesdk.devices import load_device
from edgesdk.errors import EdgeError, InputError, UnknownName
from edgesdk.graph.memory import in_flash, weight_bytes
from edgesdk.graph.memory_plan import dry_plan
from edgesdk.graph.types import ModelGraph
from edgesdk.model import SEPARATOR
from edgesdk.native.formats import is_native
from edgesdk.plan.answering import answering, answers_of
from edgesdk.plan.cost import Z80, UnitCost, breaking, breaks, call_seconds, fused, operations, total, traffic, working_set
from edgesdk.plan.harm import Step, harm_of, quality_of
from edgesdk.plan.setting import (
    Setting,
    cost_of,
    fewer_bits,
    group_of,
    harm_at,
    memory_of,
    native_in,
    need_power,
    offered_by,
    runtimes_of,
    setting_of,
    table_of,
)
from edgesdk.plan.solve import Solution, solve
from edgesdk.plan.subject import Subject
from edgesdk.plan.types import Budget, BudgetCheck, Candidate, Estimate, Plan, UnitPlan, Workload
from edgesdk.plan.words import against, reasons, warnings, why
from edgesdk.units import show_seconds

DEFAULT_DROP = 0.01
"""Quality a plan may lose when the user names no limit and quality can be measured."""


def make_plan(
    model: str, device: str, budget: Budget, workload: Workload, runtime: str | None, threads: int | None, layout: str | None, step: Step
) -> Plan:
    """See `edgesdk.plan.plan`."""
    profile = load_device(device)
    asked = Subject(model, workload)
    refs = {asked.facts.layout: model, **asked.facts.alternatives}
    if layout is not None and layout not in refs:
        raise UnknownName("layout", layout, refs)
    made: list[tuple[Setting, Plan]] = []
    for ref in [refs[layout]] if layout else list(refs.values()):
        subject = asked if ref == model else Subject(ref, workload)
        graph, harm = answering(subject.graph, workload), harm_of(subject, step)
        for name in runtimes_of(profile, runtime, graph, subject.facts.native):
            setting = setting_of(subject, graph, harm, profile, name, threads, workload)
            made.append((setting, _candidate(setting, budget)))
    at, best = _chosen(made, budget, step)
    if any(c.name == "storage" and not c.fits for c in best.checks):
        smaller, why_not = _compressed([s for s, _ in made if s.subject is made[at][0].subject], budget, step)
        if smaller:
            made += smaller
            at, best = _chosen(made, budget, step)
        if why_not:
            best = best.model_copy(update={"reasons": (*best.reasons, why_not)})
    if workload.draft:
        best = _drafting(made[at][0], best)
    best = _answered(made[at][0], best)
    plans = [p for _, p in made]
    front = _pareto([c for p in plans for c in p.front])
    return best.model_copy(update={"front": front, "reasons": (*best.reasons, *against(best, plans))})


def _answered(s: Setting, plan: Plan) -> Plan:
    """The plan with what answers take over the workload's lengths. A budget is kept on average: what many texts take beyond it is warned of."""
    answers, limit = answers_of(s.graph, s.workload, plan.method_latency), plan.budget.latency_s
    warnings = plan.warnings
    if answers and limit and answers.whole.mean.value <= limit < answers.whole.p90:
        told = f"the latency budget of {show_seconds(limit)} holds on average: more than one text in ten takes longer"
        warnings = (*warnings, f"{told} (nine of ten stay within {show_seconds(answers.whole.p90)})")
    return plan.model_copy(update={"answers": answers, "warnings": warnings})


def _drafting(s: Setting, plan: Plan) -> Plan:
    """The plan with the way of guessing that suits it best, and whether it pays."""
    from edgesdk.sequence.card import NAME, Card
    from edgesdk.sequence.drafting import answers_of, exit_counts, weigh

    spec = s.subject.spec
    if not spec.prompts:
        return plan.model_copy(
            update={"reasons": (*plan.reasons, "guessed tokens were not weighed: the model brings no prompts to try them on")}
        )
    seconds = {name: e.value for name, e in plan.method_latency.items()}
    card, answers = Card.read(spec.files[NAME]), answers_of(spec)
    found = weigh(card, seconds, spec.prompts, answers, exit_counts(spec, card, answers))
    if found is None:
        return plan
    rate = "none made" if found.rate is None else f"{found.rate:.0%} right"
    told = f"guessed tokens ({found.kind}, {found.tokens} a call, {rate} on {found.answers} answers): answers {found.speedup:.2f}x as fast"
    return plan.model_copy(update={"drafting": found, "reasons": (*plan.reasons, told + ("" if found.pays else ", so they stay off"))})


def _chosen(made: list[tuple[Setting, Plan]], budget: Budget, step: Step) -> tuple[int, Plan]:
    """Where the best plan is, and it as it was evaluated; one that loses more quality than it was thought to is made again, more careful."""
    best_quality = max((p.quality for _, p in made if p.quality is not None), default=None)
    for attempt in range(4):
        at = _best([p for _, p in made], best_quality, budget)
        if _told(*made[at], step):
            made[at] = made[at][0], _candidate(made[at][0], budget)
            at = _best([p for _, p in made], best_quality, budget)
        setting, best = made[at][0], _evaluated(*made[at], step)
        if best.fits or not made[at][1].fits or attempt == 3:
            break
        made[at] = setting, _candidate(setting, budget, strict=0.25 ** (attempt + 1))  # harms added up to more than their sum: be careful
    return at, best


def _compressed(settings: list[Setting], budget: Budget, step: Step) -> tuple[list[tuple[Setting, Plan]], str]:
    """Plans of one model, compressed to the storage allowed (within the other budgets, where that can be), on every runtime; or why there are none."""
    from edgesdk.compress.saved import compressed_model

    assert budget.storage_bytes is not None
    first, why_not = settings[0], ""
    if first.graph.source != "torch" or first.subject.facts.coded:
        return [], ""
    weights = first.graph.weights().values()
    fixed = max(memory_of(s, {}).weights_bytes - sum(weight_bytes(u, "fp32", s.runtime) for u in weights) for s in settings)
    room = int(budget.storage_bytes - fixed - sum(4 * u.rows for u in weights))
    for recipe in dict.fromkeys((f"auto:bytes={room}{_handed_on(settings, budget)}", f"auto:bytes={room}")):
        try:
            compressed_model(first.subject.ref, recipe, step, first.workload.sizes)
            break
        except EdgeError as error:
            why_not = why_not or f"compressing the weights to {budget.storage_bytes} bytes does not help: {error.what}"
    else:
        return [], why_not
    subject = Subject(f"{first.subject.ref}{SEPARATOR}{recipe}", first.workload)
    graph, harm = answering(subject.graph, first.workload), harm_of(subject, step)
    before = first.harm.quality
    lost = max(0.0, before - harm.quality) if before is not None and harm.quality is not None else 0.0
    made = [replace(s, subject=subject, graph=graph, harm=harm, lost=lost) for s in settings]
    return [(s, _candidate(s, budget)) for s in made], ""


def _handed_on(settings: list[Setting], budget: Budget) -> str:
    """Budgets of memory, latency and energy as further settings of `auto`; nothing where it could not see them as they are meant here."""
    from edgesdk.compress.auto import as_settings

    s, rest = settings[0], as_settings(budget.model_copy(update={"storage_bytes": None, "quality_drop": None}))
    try:
        same = load_device(s.device.name) == s.device
    except EdgeError:  # a profile of its own, in a file
        same = False
    if not rest or not same or s.workload.batch > 1 or s.workload.sustained or s.workload.output_length is not None:
        return ""
    runtimes = {other.runtime for other in settings}
    place = {"device": s.device.name, "threads": s.threads, **({"runtime": s.runtime} if len(runtimes) == 1 else {})}
    return "".join(f",{k}={v}" for k, v in (place | rest).items())


def _told(s: Setting, plan: Plan, step: Step) -> bool:
    """Ask ExecuTorch for its own memory plan, by a dry lowering, where the answer to a memory budget hangs on what is only estimated."""
    memory, limit = plan.memory, plan.budget.memory_bytes
    if s.runtime != "executorch" or memory.from_runtime or limit is None:
        return False
    if not any("until the program is built" in n for n in memory.not_counted) or abs(limit - memory.peak_bytes) > memory.activations_bytes:
        return False
    step("asking ExecuTorch for its memory plan", 0.5)
    dry_plan(s.subject.spec)
    return True


def _evaluated(s: Setting, plan: Plan, step: Step) -> Plan:
    """The plan with the quality of the rounded model as it is evaluated, instead of the sum of its units' harms."""
    held = s.graph.weights()
    taken = {(u.method, u.unit): u.precision for u in plan.units}
    choice = {u.weight: taken[m.name, u.name] for m in s.graph.methods for u in m.units if u.weight in held and u.weight_elements}
    value = quality_of(s.subject, {w: p for w, p in choice.items() if w}, step)
    if value is None or s.harm.quality is None:
        return plan
    drop = s.lost + s.harm.quality - value
    allowed = plan.budget.quality_drop if plan.budget.quality_drop is not None else DEFAULT_DROP
    checks = tuple(
        BudgetCheck(name="harm", limit=allowed, reached=drop, fits=drop <= allowed + 1e-9) if c.name == "harm" else c for c in plan.checks
    )
    checks = tuple(sorted(checks, key=lambda c: (c.fits, -c.reached / max(c.limit, 1e-12))))
    reason = (
        f"quality: {s.subject.facts.quality_name} {value:.2%} evaluated with weights and activations rounded as the runtime rounds them"
    )
    fields = {"quality_drop": drop, "checks": checks, "fits": all(c.fits for c in checks), "reasons": (*plan.reasons, reason)}
    return plan.model_copy(update=fields)


SAME_TIME = 1.02
"""Times this close are the same, as far as any prediction can tell: the one that needs less memory is taken."""


def _best(plans: list[Plan], best_quality: float | None, budget: Budget) -> int:
    ranks = [_rank(p, best_quality, budget) for p in plans]
    first = min(ranks)
    close = [i for i, r in enumerate(ranks) if r[:3] == first[:3] and r[3] <= first[3] * SAME_TIME]
    return min(close, key=lambda i: plans[i].memory.peak_bytes) if plans[ranks.index(first)].fits else ranks.index(first)


def _rank(plan: Plan, best_quality: float | None, budget: Budget) -> tuple[bool, bool, float, float]:
    """Fits first; then a layout whose own quality is within the allowed drop of the best layout's; then the least stretch; then time."""
    allowed = budget.quality_drop if budget.quality_drop is not None else DEFAULT_DROP
    worse = plan.quality is not None and best_quality is not None and best_quality - plan.quality > allowed
    over = max((c.reached / c.limit for c in plan.checks), default=0.0)
    return not plan.fits, worse, 0.0 if plan.fits else over, plan.latency.value


def _limits(s: Setting, budget: Budget) -> dict[str, float]:
    limits: dict[str, float] = {"memory": float(budget.memory_bytes or s.device.usable_bytes)}
    if budget.latency_s:
        limits["latency"] = budget.latency_s
    for method, seconds in budget.method_latency_s.items():
        if method not in [m.name for m in s.graph.methods]:
            raise UnknownName(f"method of {s.subject.facts.name}", method, [m.name for m in s.graph.methods])
        limits[f"latency:{method}"] = seconds
    if stored := budget.storage_bytes or (s.device.storage.size_bytes if in_flash(s.runtime) else None):
        limits["storage"] = float(stored)
    if budget.energy_j:
        need_power(s.device)
        limits["energy"] = budget.energy_j
    if s.harm.quality is not None:
        limits["harm"] = max((budget.quality_drop if budget.quality_drop is not None else DEFAULT_DROP) - s.lost, 1e-9)
    elif budget.quality_drop is not None:
        raise InputError(
            f"--quality-drop: {s.subject.facts.name} has no evaluate()",
            "give a model with evaluate (see docs/concepts.md), or leave the limit out",
        )
    return limits


def _candidate(s: Setting, budget: Budget, strict: float = 1.0) -> Plan:
    """The best plan of a setting: each weight for itself, or the whole model in static int8 where everything can take it.

    `strict` below 1 leaves that share of the quality budget to the sum of harms.
    """
    plans = [_solved(s, budget, strict)]
    weighted = [(m.name, u) for m in s.graph.methods for u in m.units if u.weight_elements]
    whole = replace(s, whole=True)
    if weighted and all(offered_by(whole, u, m) == ["int8-static"] for m, u in weighted):
        plans.append(_solved(whole, budget, strict))
    best = min(plans, key=lambda p: (not p.fits, p.latency.value if p.fits else p.checks[0].reached / p.checks[0].limit))
    front = tuple(c for p in plans for c in p.front)
    return best.model_copy(update={"front": front})


def _solved(s: Setting, budget: Budget, strict: float) -> Plan:
    limits = _limits(s, budget)
    if "harm" in limits:
        limits["harm"] *= strict
    fast, fixed, refused = table_of(s, slower=s.whole)
    solution = solve(fast, fixed, limits)
    forced = False
    if solution.stretch > 1 and refused:
        every, fixed, _ = table_of(s, slower=True)
        wider = solve(every, fixed, limits)
        forced = wider.stretch < solution.stretch
        solution = wider if forced else solution
    if s.harm.quality is None and solution.stretch <= 1 and not s.whole:
        every = [o for o in fast if o.precision not in ("int4-g32", "int8-static", *fewer_bits(s, o.group))]
        careful = solve(every, fixed, limits)
        solution = careful if careful.stretch <= 1 else solution
    return _plan(s, budget, limits, fixed, solution, refused, forced)


def _reached(solution: Solution, fixed: dict[str, float], metric: str) -> float:
    return fixed.get(metric, 0.0) + sum(o.use.get(metric, 0.0) for o in solution.chosen.values())


def _plan(
    s: Setting, budget: Budget, limits: dict[str, float], fixed: dict[str, float], solution: Solution, refused: int, forced: bool
) -> Plan:
    units, per_method, seen = [], {}, set()
    for method in s.graph.methods:
        native = native_in(method, solution)
        own, touched, quiet = [], working_set(method, {}), fused(method, native)
        for unit in method.units:
            group = group_of(method.name, unit)
            offered = offered_by(s, unit, method.name)
            precision = solution.chosen[group].precision if group in solution.chosen else offered[0]
            cost = cost_of(s, unit, precision, touched) if unit.name not in quiet else UnitCost(0.0, 0.0, 0.0, "overhead", 0.0)
            own.append(cost)
            estimate = Estimate(value=cost.seconds, low=cost.low, high=cost.high)
            size = 0 if group in seen else weight_bytes(unit, precision, s.runtime)
            seen.add(group)
            harm = harm_at(s, unit, precision) if unit.weight_elements else 0.0
            units.append(
                UnitPlan.model_validate({
                    "unit": unit.name, "method": method.name, "op": unit.op, "precision": precision,
                    "runtime": "native" if is_native(precision) else s.runtime, "weight_bytes": size, "latency": estimate,
                    "ops": s.workload.batch * operations(unit), "moved_bytes": s.workload.batch * traffic(unit, precision),
                    "bound": cost.bound, "harm": harm, "why": why(s, unit, precision, offered, touched),
                })
            )  # fmt: skip
        weighted = {u.precision for u in units if u.method == method.name and u.weight_bytes}
        int8 = weighted == {"int8-static"} or any(t.dtype in ("int8", "uint8") for t in method.inputs)
        call = call_seconds(method, "int8-static" if int8 else "fp32", s.efficiency) * s.workload.batch
        call += breaks(method, native) * breaking(s.efficiency) * s.workload.batch if native else 0.0
        per_method[method.name] = total(own, s.efficiency, call)
    latency = _whole(s.graph, per_method)
    memory = memory_of(s, {(u.method, u.unit): u.precision for u in units})
    checks = tuple(
        sorted(
            (
                BudgetCheck(name=k, limit=v, reached=(r := _reached(solution, fixed, k)), fits=r <= v * (1 + 1e-6))
                for k, v in limits.items()
            ),
            key=lambda c: -c.reached / c.limit,
        )
    )
    drop = s.lost + _reached(solution, fixed, "harm") if s.harm.quality is not None else None
    stored = round(_reached(solution, fixed, "storage"))
    candidate = Candidate(
        layout=s.subject.facts.layout, runtime=s.runtime, precisions=dict(Counter(u.precision for u in units if u.weight_bytes)), memory_bytes=memory.peak_bytes,
        storage_bytes=stored, latency=latency, quality_drop=drop, choice={f"{u.method}/{u.unit}": u.precision for u in units if u.precision != "fp32"},
    )  # fmt: skip
    return Plan(
        model=s.subject.ref, model_name=s.subject.facts.name, layout=s.subject.facts.layout, device=s.device.name, runtime=s.runtime, unit=s.compute.name, threads=s.threads,
        power_mode=s.device.default_power_mode, workload=s.workload, budget=budget, fits=all(c.fits for c in checks), checks=checks, units=tuple(units),
        latency=latency, method_latency=per_method, memory=memory, storage_bytes=stored, quality=None if s.harm.quality is None else s.harm.quality + s.lost, quality_drop=drop,
        proof=solution.proof, front=(candidate, *_front(s, limits)), reasons=reasons(s, refused, units), warnings=warnings(s, forced),
        digests={"model": s.subject.facts.model_digest, "graph": s.graph.digest(), "device": s.device.digest(), "efficiency": s.efficiency.digest(), "edgesdk": __version__},
    )  # fmt: skip


def _whole(graph: ModelGraph, per_method: dict[str, Estimate]) -> Estimate:
    """One answer: every method as often as it is called. Methods of one runtime err together, so their bounds add up."""
    sums = {k: sum(getattr(per_method[m.name], k) * m.unroll for m in graph.methods) for k in ("value", "low", "high")}
    return Estimate(**sums)


STEPS_OF_FRONT = 3
"""Memory limits tried between the smallest and the fastest choice."""


def _front(s: Setting, limits: dict[str, float]) -> list[Candidate]:
    """All-float, the smallest and the fastest choice within the quality budget, and the fastest at memory limits between these two."""
    table, fixed, _ = table_of(s, slower=True)
    kept = {k: v for k, v in limits.items() if k == "harm"}
    plain = [o for o in table if o.precision in ("fp32", "as-is")]
    floats = [solve(plain, fixed, {})] if {o.group for o in plain} == {o.group for o in table} else []  # not every device has floats
    ends = [solve(table, fixed, kept, objective) for objective in ("latency", "memory")]
    fast, small = (_reached(e, fixed, "memory") for e in ends)
    between = [small + (fast - small) * i / (STEPS_OF_FRONT + 1) for i in range(1, STEPS_OF_FRONT + 1)] if fast > small * 1.01 else []
    solutions = [*floats, *ends, *(solve(table, fixed, {**kept, "memory": limit}) for limit in between)]
    return [_point(s, fixed, solution) for solution in solutions]


def _point(s: Setting, fixed: dict[str, float], solution: Solution) -> Candidate:
    value = _reached(solution, fixed, "latency")
    spread = Z80 * max(s.efficiency.call_log_sd, median([r.log_sd for r in s.efficiency.rows] or [0.6]))
    taken = {g: o.precision for g, o in solution.chosen.items() if o.precision != "fp32"}
    return Candidate(
        layout=s.subject.facts.layout, runtime=s.runtime, precisions=dict(Counter(o.precision for o in solution.chosen.values())),
        memory_bytes=round(_reached(solution, fixed, "memory")), storage_bytes=round(_reached(solution, fixed, "storage")),
        latency=Estimate(value=value, low=value / 2.72**spread, high=value * 2.72**spread),
        quality_drop=s.lost + _reached(solution, fixed, "harm") if s.harm.quality is not None else None,
        choice={f"{m.name}/{u.name}": taken[g] for m in s.graph.methods for u in m.units if (g := group_of(m.name, u)) in taken},
    )  # fmt: skip


def _pareto(points: list[Candidate]) -> tuple[Candidate, ...]:
    kept: list[Candidate] = []
    for p in sorted(points, key=lambda c: (round(c.latency.value, 9), c.memory_bytes)):
        if not kept or p.memory_bytes < kept[-1].memory_bytes:
            kept.append(p)
    return tuple(kept)
