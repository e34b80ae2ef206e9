"""Fitting the cost law and its effects to published rows.

The law is linear in its effects and nearly linear in its log parameters, and every one of them has a normal prior. So the fit
is a Gaussian process whose kernel is the prior carried to the rows: linearise, solve, repeat. Rows far off count less (their
noise is raised), so a mistaken row moves little. `python -m edgesdk.predict.fit --rows FILE [--rows FILE …]` fits again and
writes `fitted.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.predict.effects import effects, spread, total
from edgesdk.predict.physics import Case, Table, prior
from edgesdk.predict.rows import Row, case_of, read_rows

if TYPE_CHECKING:
    from edgesdk.predict.physics import Array

NOISE = 0.12  # log spread of one published number about the law and its effects
STEPS = 12  # at most, of linearising and solving
Params = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Point:
    """A case and what was measured (log seconds)."""

    case: Case
    measured: float
    source: str


def points(rows: Iterable[Row]) -> list[Point]:
    """The rows that are known, as points; a row given twice is one point."""
    out: dict[tuple[Any, ...], Point] = {}
    for row in rows:
        case = case_of(row)
        if isinstance(case, Case):
            out.setdefault((case, row.seconds), Point(case, log(row.seconds), row.source))
    return list(out.values())


class Fit:
    """One engine's law fitted to its points. `kernel` is the prior covariance of the points' log times."""

    def __init__(self, engine: str, known: Sequence[Point]) -> None:
        import numpy as np

        self.engine, self.known = engine, list(known)
        self.table = Table([p.case for p in known])
        self.goal = np.array([p.measured for p in known])
        priors = prior(engine)
        self.names = list(priors)
        self.center = np.array([priors[n][0] for n in self.names])
        self.width = np.array([priors[n][1] for n in self.names])
        self.at = self.center.copy()
        for _ in range(STEPS):
            self._linearise()
            found = self.coefficients(self.weigh(np.arange(len(known)))[0])[: len(self.names)]
            step = found - self.at
            self.at = self.at + step * min(1.0, 0.7 / max(float(np.abs(step).max()), 1e-9))
            if np.abs(step).max() < 0.02:
                break
        self._linearise()
        self.alpha, self.noise = self.weigh(np.arange(len(known)))

    def _law(self, values: Array) -> tuple[Array, Array]:
        return self.table.parts(dict(zip(self.names, values.tolist(), strict=True)))

    def _linearise(self) -> None:
        import numpy as np

        here, shares = self._law(self.at)
        slope = np.empty((len(here), len(self.names)))
        for j in range(len(self.names)):
            moved = self.at.copy()
            moved[j] += 1e-3
            slope[:, j] = (self._law(moved)[0] - here) / 1e-3
        found = [effects(p.case, s) for p, s in zip(self.known, shares, strict=True)]
        self.effect_names = sorted({name for f in found for name in f})
        column = {name: i for i, name in enumerate(self.effect_names)}
        values = np.zeros((len(here), len(column)))
        for i, f in enumerate(found):
            for name, value in f.items():
                values[i, column[name]] = value
        self.design = np.hstack([slope, values])
        self.spread = np.concatenate([self.width, [spread(n, self.engine) for n in self.effect_names]])
        self.base = here + slope @ (self.center - self.at)  # log time at the priors' means, by the tangent
        self.kernel = (self.design * self.spread**2) @ self.design.T

    def weigh(self, train: Any) -> tuple[Array, Array]:
        """Weights of the points `train` (indices), which are their covariance's inverse times their distance from the prior; their noise."""
        import numpy as np
        from scipy.linalg import cho_factor, cho_solve

        inner = self.kernel[np.ix_(train, train)]
        off = self.goal[train] - self.base[train]
        noise = np.full(len(train), NOISE**2)
        weights = np.zeros(len(train))
        for _ in range(6):
            weights = cho_solve(cho_factor(inner + np.diag(noise)), off)
            residual = off - inner @ weights
            noise = NOISE**2 * np.sqrt(1 + (residual / NOISE) ** 2)
        return np.asarray(weights), noise

    def coefficients(self, weights: Array) -> Array:
        """Log parameters, then effects, from the weights of all points."""
        import numpy as np

        mean = np.concatenate([self.center, np.zeros(len(self.effect_names))])
        return np.asarray(mean + self.spread**2 * (self.design.T @ weights))

    def fold(self, test: Any, train: Any) -> tuple[Array, Array]:
        """(log times of the points `test`, their covariance) as fitted to the points `train` alone."""
        import numpy as np
        from scipy.linalg import cho_factor, cho_solve

        if not len(train):
            return self.base[test], self.kernel[np.ix_(test, test)]
        weights, noise = self.weigh(train)
        cross = self.kernel[np.ix_(test, train)]
        known = cho_factor(self.kernel[np.ix_(train, train)] + np.diag(noise))
        return self.base[test] + cross @ weights, self.kernel[np.ix_(test, test)] - cross @ cho_solve(known, cross.T)

    def parameters(self) -> tuple[dict[str, float], dict[str, float]]:
        """(log parameters and effects by name, what spread is left of each effect)."""
        import numpy as np
        from scipy.linalg import solve_triangular

        names = [*self.names, *self.effect_names]
        found = self.coefficients(self.alpha)
        lower = np.linalg.cholesky(self.kernel + np.diag(self.noise))
        gone = solve_triangular(lower, self.design * self.spread**2, lower=True)
        left = np.sqrt(np.maximum(self.spread**2 - (gone**2).sum(axis=0), 1e-8))
        sds = {n: float(x) for n, x in zip(names, left, strict=True) if ":" in n and not n.startswith(("eff:", "int8:"))}
        return dict(zip(names, found.tolist(), strict=True)), sds


def by_engine(known: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each engine."""
    return {e: [p for p in known if p.case.engine == e] for e in sorted({p.case.engine for p in known})}


def row_spread(found: dict[str, float], left: dict[str, float], engine: str) -> float:
    """Log spread of a prediction: the noise, what is left of every effect the fit has seen, the prior of every one it has not."""
    variance = NOISE**2
    for name, value in found.items():
        sd = left.get(name)
        variance += (value * (spread(name, engine) if sd is None else sd)) ** 2
    return float(variance**0.5)


def log_predictions(params: Params, lefts: Params, cases: Sequence[Case]) -> list[tuple[float, float]]:
    """(log seconds, log spread) of each case; an engine that no row fitted runs on its priors."""
    out = [(0.0, 0.0)] * len(cases)
    for engine in {c.engine for c in cases}:
        where = [i for i, c in enumerate(cases) if c.engine == engine]
        p = params.get(engine) or {k: v[0] for k, v in prior(engine).items()}
        law, shares = Table([cases[i] for i in where]).parts(p)
        for i, value, share in zip(where, law.tolist(), shares, strict=True):
            found = effects(cases[i], share)
            out[i] = (value + total(found, p), row_spread(found, lefts.get(engine, {}), engine))
    return out


def shipped_rows() -> list[Row]:
    """The published rows that come with the package."""
    path = Path(__file__).parent / "published.csv"
    return read_rows(path) if path.exists() else []


def _rounded(table: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in table.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Fit to the shipped rows and the files given, and write the parameters."""
    from edgesdk.predict.check import COVER, conformal, half_widths, left_out

    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Fit the prediction parameters again.")
    parser.add_argument("--rows", action="append", default=[], help="a CSV of published rows; may be given again")
    parser.add_argument("--out", default=str(here / "fitted.json"))
    args = parser.parse_args(argv)
    known = points([*shipped_rows(), *(row for path in args.rows for row in read_rows(path))])
    fits = {e: Fit(e, mine) for e, mine in by_engine(known).items()}
    fitted = {e: f.parameters() for e, f in fits.items()}
    judged = {by: [j for f in fits.values() for j in left_out(f, by)] for by in ("device", "model")}
    answer = {
        "kind": "prediction-parameters",
        "schema_version": 2,
        "made_by": "python -m edgesdk.predict.fit: Gaussian process about a cost law; intervals from leaving whole devices and models out",
        "points": len(known),
        "covers": COVER,
        "parameters": {e: _rounded(p) for e, (p, _) in fitted.items()},
        "left": {e: _rounded(left) for e, (_, left) in fitted.items()},
        "conformal": conformal(judged),
        "device_half_widths": half_widths(judged["device"]),
        "seen": {e: sorted({p.case.model for p in f.known}) for e, f in fits.items()},
    }
    Path(args.out).write_text(json.dumps(answer, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
