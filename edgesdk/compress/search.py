"""The search of `auto`: exact on added losses, then evolution on the true one, within every budget, on every runtime allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgesdk.compress.evolve import evolve
from edgesdk.compress.forms import Problem, Way, halves, in_form, on_setting, running, stored_only, ways_of
from edgesdk.compress.knapsack import Choice, choose
from edgesdk.compress.types import Change, Runs, Step
from edgesdk.compress.weights import holders, set_weight
from edgesdk.errors import DoesNotFit, InputError
from edgesdk.packed import decode
from edgesdk.plan.fake_quant import observe, run
from edgesdk.plan.setting import power_of
from edgesdk.units import show_amount, show_bytes, show_joules, show_seconds

if TYPE_CHECKING:
    from edgesdk.compress.loss import Loss
    from edgesdk.compress.table import OptionRow, Options
    from edgesdk.packed import Code
    from edgesdk.plan.fake_quant import Ranges
    from edgesdk.plan.setting import Setting

MOST_EVALUATIONS = 10


@dataclass(frozen=True)
class Found:
    """A choice: an option for every weight of a problem, and how it was found."""

    problem: Problem
    picked: tuple[int, ...]
    told: str

    @property
    def ways(self) -> list[Way]:
        return [mine[p] for mine, p in zip(self.problem.ways, self.picked, strict=True)]

    def reached(self, metric: str) -> float:
        if metric == "storage":
            return float(sum(w.bytes for w in self.ways))
        taken = (uses[p][metric] for uses, p in zip(self.problem.uses, self.picked, strict=True))
        return self.problem.fixed.get(metric, 0.0) + sum(taken)


def named(metric: str) -> str:
    """A budget, for people."""
    what, _, method = metric.partition(":")
    return f"{what} of {method}" if method else what


class Search:
    """`settings`: the device's runtimes; none: only stored bytes count. `loss`, by how few of the cases it takes, is what evolution goes by."""

    def __init__(
        self, options: Options, settings: Sequence[Setting], loss: Callable[[int], Loss] | None, step: Step, generations: int, seed: int
    ) -> None:
        self.options, self.spec, self.step = options, options.spec, step
        self.loss, self.generations, self.seed = loss, generations, seed
        if not settings:
            self.problems = [stored_only(options)]
        else:
            ways = ways_of(options, step)
            self.problems = [p for p in (on_setting(options, ways, s) for s in settings) if p is not None]
        self.values: dict[tuple[str, str, int], torch.Tensor] = {}

    # ---- choosing

    def within(self, limits: Mapping[str, float]) -> Found:
        """The ways of least loss within the limits. Raises `DoesNotFit` naming the budget that is too small, and by how much."""
        found: list[tuple[Problem, Choice]] = []
        short: list[tuple[float, str]] = []
        for problem in (p.kept_for(list(limits)) for p in self.problems):
            try:
                found.append((problem, self._exact(problem, limits)))
            except DoesNotFit as error:
                short.append((error.fields.get("stretch", np.inf), error.what))
        if not found:
            raise DoesNotFit(min(short)[1], "allow more, or further methods")
        problem, choice = min(found, key=lambda f: f[1].loss)
        picked = tuple(int(p) for p in choice.picked)
        told = f"additive loss {choice.loss:.4g}, gap {choice.gap:.2%} by {choice.by} in {choice.seconds * 1e3:.0f} ms"
        return self._evolved(Found(problem, picked, told), limits)

    def _exact(self, problem: Problem, limits: Mapping[str, float]) -> Choice:
        loss, use = problem.arrays(list(limits))
        room = np.array([limit - problem.fixed.get(k, 0.0) for k, limit in limits.items()])
        least = np.where(np.isfinite(loss), use, np.inf).min(2).sum(1)
        for k, metric in enumerate(limits):
            if least[k] > room[k]:
                self._refuse(problem, metric, least[k] + problem.fixed.get(metric, 0.0), limits[metric], "")
        try:
            return choose(loss, use, np.maximum(room, 1e-30))
        except DoesNotFit:
            self._refuse_together(problem, limits, loss, use, room)
            raise

    def _refuse_together(self, problem: Problem, limits: Mapping[str, float], loss: Any, use: Any, room: Any) -> None:
        """Raises `DoesNotFit` naming the budget that is the nearest to enough while the others hold."""
        near: list[tuple[float, str, float]] = []
        for k, metric in enumerate(limits):
            others = [j for j in range(len(room)) if j != k]
            try:
                least = choose(np.where(np.isfinite(loss), use[k], np.inf), use[others], room[others]).loss + problem.fixed.get(metric, 0.0)
                near.append((least / limits[metric], metric, least))
            except DoesNotFit:
                continue
        if near:
            _, metric, least = min(near)
            rest = " and ".join(f"{named(m)} {show_amount(m, v)}" for m, v in limits.items() if m != metric)
            self._refuse(problem, metric, least, limits[metric], f" within {rest}")

    def _refuse(self, problem: Problem, metric: str, least: float, limit: float, within: str) -> None:
        best = "fastest" if metric.startswith("latency") else "thriftiest" if metric == "energy" else "smallest"
        over = f"{show_amount(metric, least)}, {show_amount(metric, limit)} are allowed: {show_amount(metric, least - limit)} ({least / limit - 1:.1%}) too little"
        raise DoesNotFit(f"{self.spec.name}{problem.where}: {named(metric)}{within}: its {best} options take {over}", stretch=least / limit)

    def _evolved(self, found: Found, limits: Mapping[str, float]) -> Found:
        if self.loss is None or not self.generations:
            return found
        loss, use = found.problem.arrays(list(limits))
        room = [limit - found.problem.fixed.get(k, 0.0) for k, limit in limits.items()]
        judges = [lambda c, every=every: self.true(found.problem, c, every) for every in (8, 2, 1)]
        grown = evolve(
            found.picked, loss, use, room, judges, generations=self.generations, seed=self.seed,
            step=lambda text, share: self.step(text, 0.9 + 0.1 * share),
        )  # fmt: skip
        told = f"{found.told}; evolution on the true loss: {grown.start:.4g} to {grown.loss:.4g} in {grown.evaluations} tries"
        return Found(found.problem, grown.picked, told)

    # ---- the model under a choice

    def _row(self, way: Way) -> OptionRow:
        return self.options.table.of(way.weight)[way.option]

    def _code(self, way: Way) -> Code | None:
        row = self._row(way)
        return self.options.code(row) if row.key else None

    def value(self, way: Way) -> torch.Tensor | None:
        """The weight [rows, cols] as it runs; None where it stays as it is."""
        row = self._row(way)
        if not row.key and way.form == "fp32":
            return None
        kept = (row.key or way.weight, way.form, way.rank)
        if kept not in self.values:
            plain = self.options.value(row) if row.key else self._now(way.weight)
            self.values[kept] = in_form(self._code(way) if way.rank else None, plain, way)
        return self.values[kept]

    def _now(self, weight: str) -> torch.Tensor:
        matrix: torch.Tensor = holders(self.spec)[weight][0][2].weight.detach()
        return matrix.reshape(len(matrix), -1).float().clone()

    @cached_property
    def ranges(self) -> Ranges:
        setting = self.problems[0].setting
        return observe(self.spec, setting.graph) if setting else {}

    def true(self, problem: Problem, picked: Sequence[int], every: int = 1) -> float:
        assert self.loss is not None
        with self.under(Found(problem, tuple(picked), "")):
            return self.loss(every)(self.spec)

    def under(self, found: Found) -> Any:
        """A context in which the model computes as it would under a choice."""
        values = {w.weight: v for w in found.ways if (v := self.value(w)) is not None}
        forms = {w.weight: str(w.form) for w in found.ways}
        return running(self.spec, values, forms, self.ranges if "int8-static" in forms.values() else {})

    # ---- quality as the limit

    def smallest(self, drop: float, limits: Mapping[str, float], metric: str) -> Found:
        """The least of a metric that keeps to a drop of quality, by bisection; quality is evaluated at most ten times.

        Raises `DoesNotFit` where nothing keeps to the drop, or the other limits cannot be held.
        """
        evaluate = self.spec.evaluate
        if evaluate is None:
            raise InputError(f"auto:drop={drop}: {self.spec.name} has no evaluate()", "give a size instead: auto:bits=4")
        if limits:
            self._feasible(limits)
        wanted = float(evaluate(run(self.spec))) - drop
        low, most, high = self._span(metric)
        if metric in limits:
            most, high = min(most, limits[metric]), min(high, limits[metric])
        best, tried = None, 0
        for limit in (most, high):
            if best is None:
                best, tried = self._keeps(limits, metric, limit, wanted), tried + 1
                low, high = (low, limit) if best else (limit, high)
        if best is None:
            told = " ".join(f"within {named(m)} {show_amount(m, v)}" for m, v in limits.items())
            raise DoesNotFit(
                f"{self.spec.name}: no choice of options{' ' if told else ''}{told} keeps to a drop of {drop:g}",
                "allow a larger drop, or further methods",
            )
        while tried < MOST_EVALUATIONS and high > 1.01 * low:
            limit = (low * high) ** 0.5
            got, tried = self._keeps(limits, metric, limit, wanted), tried + 1
            best, high, low = (got, limit, low) if got else (best, high, limit)
        what = "sizes" if metric == "storage" else "latencies"
        return Found(best.problem, best.picked, f"{best.told}; {tried} {what} evaluated to keep to a drop of {drop:g}")

    def _feasible(self, limits: Mapping[str, float]) -> None:
        """Raises `DoesNotFit` where no problem has a choice within the limits."""
        generations, self.generations = self.generations, 0
        try:
            self.within(limits)
        finally:
            self.generations = generations

    def _span(self, metric: str) -> tuple[float, float, float]:
        """A metric at the least there is, at the least whose errors are small, and where nothing is lost; over all problems."""
        spans = []
        for problem in (p.kept_for([metric]) for p in self.problems):
            fixed = problem.fixed.get(metric, 0.0)
            loss, use = problem.arrays([metric])
            known = np.isfinite(loss)
            error = np.full(loss.shape, np.inf)
            for i, mine in enumerate(problem.ways):
                error[i, : len(mine)] = [w.error for w in mine]
            exact = (np.arange(loss.shape[1])[None] == error.argmin(1)[:, None]) | (error < 1e-3)
            tops = use[0][np.arange(len(loss)), error.argmin(1)].sum()
            spans.append(
                [fixed + float(np.where(mask, use[0], np.inf).min(1).sum()) for mask in (known, exact & known)] + [fixed + float(tops)]
            )
        low, most, high = (min(s[i] for s in spans) for i in range(3))
        return low, most, max(high, most)

    def _keeps(self, limits: Mapping[str, float], metric: str, limit: float, wanted: float) -> Found | None:
        try:
            found = self.within({**limits, metric: limit})
        except DoesNotFit:
            return None
        self.step(f"evaluating {show_amount(metric, limit)}", 0.9)
        assert self.spec.evaluate is not None
        with self.under(found):
            return found if float(self.spec.evaluate(run(self.spec))) >= wanted - 1e-12 else None

    # ---- the answer

    def change(self, found: Found) -> Change:
        """Make the choice: codes and values are put into the model, layers that run as two are split."""
        from edgesdk.compress.surgery import apply_edits

        codes, made_by, edits = {}, {}, []
        forms: dict[str, str] = {}
        for way in found.ways:
            row, code = self._row(way), self._code(way)
            by = (row.method, row.settings, way.error)
            if code is None:
                forms[way.weight] = way.form
            elif not way.rank:
                codes[way.weight], made_by[way.weight], forms[way.weight] = code, by, way.form
            else:
                module = holders(self.spec)[way.weight][0][2]
                paths = [p for e in self.spec.methods.values() for p, m in e.module.named_modules(remove_duplicate=False) if m is module]
                edits += [{"do": "split", "path": p, "rank": way.rank} for p in dict.fromkeys(paths)]
                for i, half in enumerate(halves(code)):
                    name = f"{way.weight.removesuffix('.weight')}.{i}.weight"
                    codes[name], made_by[name], forms[name] = half, by, way.form
        apply_edits(self.spec, edits)
        for name, code in codes.items():
            set_weight(self.spec, name, torch.from_numpy(decode(code)))
        runs = self._runs(found, forms)
        notes = (f"auto: {found.told}", *((_predicted(runs),) if runs else ()))
        return Change(edits=tuple(edits), notes=notes, codes=codes, made_by=made_by, runs=runs)

    def _runs(self, found: Found, forms: dict[str, str]) -> Runs | None:
        s = found.problem.setting
        if s is None:
            return None
        latency = {k.partition(":")[2]: found.reached(k) for k in found.problem.fixed if k.startswith("latency")}
        power = power_of(s.device)
        return Runs(
            device=s.device.name, runtime=s.runtime, threads=s.threads, forms=forms, latency_s=latency,
            memory_bytes=round(found.reached("memory")), energy_j=found.reached("energy") if power else None,
        )  # fmt: skip


def _predicted(runs: Runs) -> str:
    kinds = {f: sum(form == f for form in runs.forms.values()) for f in runs.forms.values()}
    times = ", ".join(f"{m or 'a whole answer'} {show_seconds(t)}" for m, t in runs.latency_s.items())
    energy = f", at most {show_joules(runs.energy_j)} an answer" if runs.energy_j is not None else ""
    run_as = ", ".join(f"{n} {f}" for f, n in kinds.items())
    return (
        f"predicted on {runs.device} with {runs.runtime}: {times}, memory {show_bytes(runs.memory_bytes)}{energy}; weights run as {run_as}"
    )
