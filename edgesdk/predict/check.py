"""How far off predictions are on what the fit has not seen: whole devices, whole models, and devices with a few known rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import ceil, exp
from statistics import median
from typing import TYPE_CHECKING, Any

from edgesdk.predict.effects import effects
from edgesdk.predict.fit import NOISE, Fit, Point, by_engine, points, row_spread, shipped_rows
from edgesdk.predict.rows import Row, case_of

if TYPE_CHECKING:
    from edgesdk.predict.physics import Array

COVER = 0.8  # what an interval claims
ASKED = 0.84  # the quantile asked for: errors of one left-out device or model come together, so fewer count than there are rows
ENOUGH = 60  # rows below which an engine's quantile is taken over all engines
ANCHORS = (0, 1, 3, 5)
DRAWS = 5  # choices of anchors a device is tried with


@dataclass(frozen=True)
class Judged:
    """A point, its log error when its fold was left out of the fit, and the log spread it was given."""

    point: Point
    fold: str
    error: float
    spread: float

    @property
    def score(self) -> float:
        return abs(self.error) / self.spread


def _folds(fit: Fit, by: str) -> list[tuple[str, Any, Any]]:
    import numpy as np

    of = np.array([getattr(p.case, by) for p in fit.known])
    return [(str(name), np.flatnonzero(of == name), np.flatnonzero(of != name)) for name in sorted(set(of.tolist()))]


def left_out(fit: Fit, by: str) -> list[Judged]:
    """Every point with its error when all points of its `by` ("device" or "model") were left out."""
    import numpy as np

    shares = fit._law(fit.at)[1]
    _, left = fit.parameters()
    found = [effects(p.case, s) for p, s in zip(fit.known, shares, strict=True)]
    out = []
    for name, test, train in _folds(fit, by):
        values, _ = fit.fold(np.asarray(test), np.asarray(train))
        seen = {n for i in train for n in found[i]}
        still = {n: sd for n, sd in left.items() if n in seen}
        for i, value in zip(test.tolist(), values.tolist(), strict=True):
            out.append(Judged(fit.known[i], name, value - fit.known[i].measured, row_spread(found[i], still, fit.engine)))
    return out


def quantile(scores: Sequence[float], share: float = ASKED) -> float:
    """The conformal quantile: the ceil((n + 1) · share)-th smallest, or the largest with room when n is small."""
    ordered = sorted(scores)
    rank = ceil((len(ordered) + 1) * share)
    return ordered[rank - 1] if rank <= len(ordered) else (ordered[-1] * 1.3 if ordered else 2.0)


def conformal(judged: Mapping[str, Sequence[Judged]]) -> dict[str, dict[str, float]]:
    """How many spreads an interval reaches to each side, by what was left out and by engine (`*`: all engines)."""
    out: dict[str, dict[str, float]] = {}
    for by, mine in judged.items():
        out[by] = {"*": quantile([j.score for j in mine])}
        for engine in sorted({j.point.case.engine for j in mine}):
            scores = [j.score for j in mine if j.point.case.engine == engine]
            if len(scores) >= ENOUGH:
                out[by][engine] = quantile(scores)
    return out


def half_widths(judged: Sequence[Judged]) -> dict[str, float]:
    """Half widths of log intervals that cover `COVER` of the errors themselves, by engine (`*`: all engines)."""
    engines = {j.point.case.engine for j in judged}
    by = {e: [abs(j.error) for j in judged if j.point.case.engine == e] for e in sorted(engines)}
    return {"*": quantile([abs(j.error) for j in judged]), **{e: quantile(x) for e, x in by.items() if len(x) >= ENOUGH}}


def _honest_half(one: Judged, mine: Sequence[Judged]) -> float:
    """The half width a point would have been given: from the scores of the other folds."""
    others = [j for j in mine if j.fold != one.fold]
    same = [j.score for j in others if j.point.case.engine == one.point.case.engine]
    return one.spread * quantile(same if len(same) >= ENOUGH else [j.score for j in others])


def anchored(fit: Fit, judge: set[int], counts: Sequence[int] = ANCHORS) -> dict[int, list[float]]:
    """Log errors on devices left out of the fit but for K of their rows, by K.

    Only devices with more rows than the largest K are tried, so that every K is judged on the same devices; a device is tried with
    `DRAWS` choices of anchors. `judge`: identities of the points that count; anchors themselves never count.
    """
    import numpy as np

    out: dict[int, list[float]] = {k: [] for k in counts}
    for name, test, train in _folds(fit, "device"):
        if len(test) <= max(counts) or not any(id(fit.known[i]) in judge for i in test):
            continue
        values, cover = fit.fold(np.asarray(test), np.asarray(train))
        goal = fit.goal[test]
        for draw in range(DRAWS):
            order = sorted(range(len(test)), key=lambda i: sha256(f"{name}:{draw}:{i}".encode()).hexdigest())
            for k in counts:
                moved = values + _pull(cover, order[:k], goal - values)
                rest = [i for i in order[max(counts) :] if id(fit.known[test[i]]) in judge]
                out[k] += (moved[rest] - goal[rest]).tolist()
    return out


def _pull(cover: Array, anchors: list[int], off: Array) -> Array:
    """How far the known errors of the anchors move every prediction of the device; an odd anchor counts less."""
    import numpy as np

    if not anchors:
        return np.zeros(len(off))
    inner = cover[np.ix_(anchors, anchors)]
    noise: Array = np.full(len(anchors), NOISE**2)
    weights: Array = np.zeros(len(anchors))
    for _ in range(4):
        weights = np.asarray(np.linalg.solve(inner + np.diag(noise), off[anchors]), dtype=np.float64)
        noise = NOISE**2 * np.sqrt(1 + ((off[anchors] - inner @ weights) / NOISE) ** 2)
    return np.asarray(cover[:, anchors] @ weights)


def check_left_out(rows: Sequence[Row], anchors: int = 0) -> dict[str, Any]:
    """Errors on `rows` with whole devices and whole models left out; fitted on the rest and on the shipped rows.

    Keys say what was left out, each again by engine, with the fields of a summary group; with `anchors` also errors on left-out devices
    of which 0, 1, 3, … `anchors` rows are known.
    """
    mine = points(rows)
    known = points([*rows, *shipped_rows()])
    judge = {id(p) for p in known[: len(mine)]}
    unknown = sum(isinstance(case_of(row), str) for row in rows)  # a row given twice counts once, and is not unknown
    engines = {p.case.engine for p in mine}
    fits = [Fit(engine, some) for engine, some in by_engine(known).items() if engine in engines]
    out: dict[str, Any] = {}
    for by, title in (("device", "whole devices left out"), ("model", "whole models left out")):
        everyone = [j for fit in fits for j in left_out(fit, by)]
        judged = [(j.error, abs(j.error) <= _honest_half(j, everyone), j.point.case.engine) for j in everyone if id(j.point) in judge]
        out[title] = score(judged, unknown)
        for engine in sorted({e for _, _, e in judged}):
            out[f"{title}: {engine}"] = score([j for j in judged if j[2] == engine], 0)
    if anchors:
        counts = sorted({k for k in ANCHORS if k < anchors} | {anchors})
        tried = [anchored(fit, judge, counts) for fit in fits]
        for k in counts:
            errors = [e for t in tried for e in t[k]]
            out[f"devices left out but for {k} rows"] = score([(e, False, "") for e in errors], 0) | {"inside_interval": None}
    return out


def score(judged: Sequence[tuple[float, bool, str]], unknown: int) -> dict[str, Any]:
    """A summary group of (log error, inside the interval, engine)."""
    relative = [abs(exp(e) - 1) for e, _, _ in judged]
    n = len(relative)
    return {
        "rows": n + unknown,
        "unknown": unknown,
        "median_error": median(relative) if n else None,
        "within_10_percent": sum(x <= 0.10 for x in relative) / n if n else None,
        "within_25_percent": sum(x <= 0.25 for x in relative) / n if n else None,
        "inside_interval": sum(inside for _, inside, _ in judged) / n if n else None,
    }
