"""Fitting the cost law's parameters to published rows, and checking them on rows left out.

`python -m edgesdk.predict.fit --rows FILE [--rows FILE …]` fits again and writes `fitted.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from edgesdk.predict.physics import EFFECT_SPREAD, Case, Table, prior
from edgesdk.predict.rows import Row, case_of, read_rows

NOISE = 0.15  # log spread of one published number about the law, where the fit has converged
COVER = 0.8  # what an interval claims
ASKED = 0.86  # the quantile asked for: errors of one left-out device or model come together, so fewer count than there are rows


@dataclass(frozen=True)
class Point:
    """A case and what was measured (log seconds)."""

    case: Case
    measured: float
    source: str


def points(rows: Iterable[Row]) -> list[Point]:
    """The rows that are known, as points."""
    out = []
    for row in rows:
        case = case_of(row)
        if isinstance(case, Case):
            out.append(Point(case, log(row.seconds), row.source))
    return out


def fit_engine(engine: str, known: Sequence[Point], start: dict[str, float] | None = None) -> dict[str, float]:
    """Log parameters of one engine: robust least squares with priors."""
    import numpy as np
    from scipy.optimize import least_squares

    priors = prior(engine)
    for p in known:
        for key in p.case.keys:
            kind = key.split(":")[0]
            wide = 2.0 if engine == "npu" and kind in ("device", "silicon") else 1.0  # an NPU's data sheet says less
            priors.setdefault(key, (0.0, wide * EFFECT_SPREAD[kind]))
    keys = list(priors)
    mean = np.array([priors[k][0] for k in keys])
    sd = np.array([priors[k][1] for k in keys])
    x0 = np.array([(start or {}).get(k, priors[k][0]) for k in keys])
    if not known:
        return dict(zip(keys, mean.tolist(), strict=True))
    table = Table([p.case for p in known])
    goal = np.array([p.measured for p in known])

    def residuals(x: Any) -> Any:
        r = (table.log_seconds(dict(zip(keys, x.tolist(), strict=True))) - goal) / NOISE
        robust = np.sign(r) * np.sqrt(2 * (np.sqrt(1 + r**2) - 1))  # soft absolute value beyond one NOISE
        return np.concatenate([robust, (x - mean) / sd])

    best = least_squares(residuals, x0, method="trf", x_scale=sd, max_nfev=40 if start is None else 10, ftol=1e-4, xtol=1e-4)
    return dict(zip(keys, best.x.tolist(), strict=True))


def fit(known: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Log parameters by engine."""
    engines = sorted({p.case.engine for p in known})
    return {e: fit_engine(e, [p for p in known if p.case.engine == e]) for e in engines}


def log_predictions(params: dict[str, dict[str, float]], cases: Sequence[Case]) -> list[float]:
    """Log seconds of each case; an engine that no row fitted runs on its priors."""
    out = [0.0] * len(cases)
    for engine in {c.engine for c in cases}:
        where = [i for i, c in enumerate(cases) if c.engine == engine]
        p = params.get(engine) or {k: v[0] for k, v in prior(engine).items()}
        for i, value in zip(where, Table([cases[i] for i in where]).log_seconds(p).tolist(), strict=True):
            out[i] = value
    return out


def left_out(known: Sequence[Point], by: str, params: dict[str, dict[str, float]]) -> list[tuple[Point, float]]:
    """Each point with its log error when every point of its `by` ("device" or "model") was left out of the fit."""
    out: list[tuple[Point, float]] = []
    for engine in sorted({p.case.engine for p in known}):
        mine = [p for p in known if p.case.engine == engine]
        for name in sorted({getattr(p.case, by) for p in mine}):
            test = [p for p in mine if getattr(p.case, by) == name]
            train = [p for p in mine if getattr(p.case, by) != name]
            p = fit_engine(engine, train, params.get(engine))
            for point, value in zip(test, Table([t.case for t in test]).log_seconds(p).tolist(), strict=True):
                out.append((point, value - point.measured))
    return out


def quantile(errors: Sequence[float], share: float = ASKED) -> float:
    """The conformal quantile of |error|: the ceil((n + 1) · share)-th smallest, or the largest with room when n is small."""
    from math import ceil

    ordered = sorted(abs(e) for e in errors)
    rank = ceil((len(ordered) + 1) * share)
    return ordered[rank - 1] if rank <= len(ordered) else (ordered[-1] * 1.3 if ordered else 0.8)


def half_widths(
    device_errors: Sequence[tuple[Point, float]], model_errors: Sequence[tuple[Point, float]], fit_errors: Sequence[tuple[Point, float]]
) -> dict[str, dict[str, float]]:
    """Half widths of log intervals by engine and by what is new: `device`, `model`, `both`, or nothing
    (`known`: the residuals of the fit itself, widened by a quarter because the fit has seen them)."""
    out: dict[str, dict[str, float]] = {}
    for engine in sorted({p.case.engine for p, _ in device_errors}):
        d = quantile([e for p, e in device_errors if p.case.engine == engine])
        m = quantile([e for p, e in model_errors if p.case.engine == engine])
        k = quantile([e for p, e in fit_errors if p.case.engine == engine])
        out[engine] = {
            "known": min(1.25 * k, m),
            "device": max(d, m),
            "model": m,
            "both": (d * d + m * m) ** 0.5,
            "variant": max(d, m, 0.6),
        }
    return out


def shipped_rows() -> list[Row]:
    """The published rows that come with the package."""
    path = Path(__file__).parent / "published.csv"
    return read_rows(path) if path.exists() else []


def check_left_out(rows: Sequence[Row]) -> dict[str, Any]:
    """Errors on `rows` with whole devices and whole models left out; fitted on the rest and on the shipped rows.

    Keys `devices` and `models`, and each again by engine, with the fields of a summary group.
    """
    mine = points(rows)
    keys = {(p.case, p.measured) for p in mine}
    known = [*mine, *(p for p in points(shipped_rows()) if (p.case, p.measured) not in keys)]
    params = fit(known)
    out: dict[str, Any] = {}
    for by, title in (("device", "whole devices left out"), ("model", "whole models left out")):
        errors = left_out(known, by, params)
        judged = [(p, e, _honest_half(p, errors, by)) for p, e in errors if (p.case, p.measured) in keys]
        out[title] = _score(judged, len(rows) - len(mine))
        for engine in sorted({p.case.engine for p, _, _ in judged}):
            out[f"{title}: {engine}"] = _score([j for j in judged if j[0].case.engine == engine], 0)
    return out


def _honest_half(point: Point, errors: Sequence[tuple[Point, float]], by: str) -> float:
    """The half width a point would have been given: from the residuals of the other folds of its engine."""
    fold = getattr(point.case, by)
    others = [e for p, e in errors if p.case.engine == point.case.engine and getattr(p.case, by) != fold]
    return quantile(others)


def _score(judged: Sequence[tuple[Point, float, float]], unknown: int) -> dict[str, Any]:
    from math import exp
    from statistics import median

    relative = [abs(exp(e) - 1) for _, e, _ in judged]
    n = len(relative)
    return {
        "rows": n + unknown,
        "unknown": unknown,
        "median_error": median(relative) if n else None,
        "within_10_percent": sum(x <= 0.10 for x in relative) / n if n else None,
        "within_25_percent": sum(x <= 0.25 for x in relative) / n if n else None,
        "inside_interval": sum(abs(e) <= half for _, e, half in judged) / n if n else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Fit to the shipped rows and the files given, and write the parameters."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Fit the prediction parameters again.")
    parser.add_argument("--rows", action="append", default=[], help="a CSV of published rows; may be given again")
    parser.add_argument("--out", default=str(here / "fitted.json"))
    args = parser.parse_args(argv)
    rows = [*shipped_rows(), *(row for path in args.rows for row in read_rows(path))]
    known = list({(p.case, p.measured): p for p in points(rows)}.values())
    params = fit(known)
    by_device, by_model = left_out(known, "device", params), left_out(known, "model", params)
    seen = [value - p.measured for value, p in zip(log_predictions(params, [p.case for p in known]), known, strict=True)]
    answer = {
        "kind": "prediction-parameters",
        "schema_version": 1,
        "made_by": "python -m edgesdk.predict.fit: "
        "robust least squares with priors; intervals from leaving whole devices and whole models out",
        "points": len(known),
        "covers": COVER,
        "parameters": params,
        "half_widths": half_widths(by_device, by_model, list(zip(known, seen, strict=True))),
        "seen": {e: sorted({p.case.model for p in known if p.case.engine == e}) for e in params},
    }
    Path(args.out).write_text(json.dumps(answer, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
