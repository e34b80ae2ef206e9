"""Latency predicted without touching the device: well-known models on known devices, from a cost law fitted to published numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from math import exp, log
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgesdk.device import DeviceProfile
    from edgesdk.efficiency import Efficiency
    from edgesdk.predict.physics import Case
    from edgesdk.predict.rows import Row

__all__ = ["Prediction", "efficiency_for", "predict_rows", "summarise", "validate"]


@dataclass(frozen=True)
class Prediction:
    """One row: what was published beside what was predicted, in the row's own unit.

    `low` and `high` bound the interval that claims `covers`; `error` is |predicted − published| / published.
    `why` tells why an unknown row has no prediction; its numbers are None.
    """

    line: int
    device: str
    model: str
    precision: str
    runtime: str
    threads: int | None
    unit: str
    source: str
    published: float
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    inside: bool | None = None
    why: str | None = None

    @property
    def known(self) -> bool:
        return self.predicted is not None


@cache
def fitted() -> dict[str, Any]:
    """The shipped parameters: how they were made, log parameters by engine, half widths of log intervals."""
    data: dict[str, Any] = json.loads(files("edgesdk.predict").joinpath("fitted.json").read_text(encoding="utf-8"))
    return data


def half_width(case: Case, spread: float) -> float:
    """Half of the log interval of a case from its log spread: wider when its device, its model or its runtime was in no fitted row."""
    shipped = fitted()
    seen = shipped["parameters"].get(case.engine)
    if seen is None:
        return log(3.0)
    new_model = case.model not in shipped["seen"].get(case.engine, ())
    reach = max(shipped["conformal"][by].get(case.engine, shipped["conformal"][by]["*"]) for by in _new(case, seen, new_model))
    return float(reach * spread)


def _new(case: Case, seen: dict[str, float], new_model: bool) -> tuple[str, ...]:
    """What the fit has not seen of a case; a case that it has seen whole is treated as a known model on a known device can err."""
    new_device = f"device:{case.device}" not in seen
    if f"variant:{case.variant}" not in seen or new_device == new_model:
        return ("device", "model")
    return ("device",) if new_device else ("model",)


def _in_unit(row: Row, seconds: float) -> float:
    return 1 / seconds if row.rate else seconds * row.value / row.seconds


def _answer(row: Row, case: Case, log_seconds: float, spread: float) -> Prediction:
    half = half_width(case, spread)
    ends = sorted((_in_unit(row, exp(log_seconds - half)), _in_unit(row, exp(log_seconds + half))))
    value = _in_unit(row, exp(log_seconds))
    error = abs(value - row.value) / row.value
    return Prediction(**_head(row), predicted=value, low=ends[0], high=ends[1], error=error, inside=ends[0] <= row.value <= ends[1])


def _head(row: Row) -> dict[str, Any]:
    return {
        "line": row.line, "device": row.device, "model": row.model, "precision": row.precision, "runtime": row.runtime,
        "threads": row.threads, "unit": row.unit, "source": row.source, "published": row.value,
    }  # fmt: skip


def predict_rows(path: str | os.PathLike[str]) -> list[Prediction]:
    """A prediction for every row of a CSV of published measurements, unknown rows included.

    Raises `InputError` naming the file, the line and the cell of bad input.
    """
    from edgesdk.predict.fit import log_predictions
    from edgesdk.predict.rows import case_of, read_rows

    rows = read_rows(path)
    cases = [case_of(row) for row in rows]
    known = [c for c in cases if not isinstance(c, str)]
    values = iter(log_predictions(fitted()["parameters"], fitted()["left"], known))
    return [Prediction(**_head(r), why=c) if isinstance(c, str) else _answer(r, c, *next(values)) for r, c in zip(rows, cases, strict=True)]


def _group(items: Sequence[Prediction]) -> dict[str, Any]:
    errors = [p.error for p in items if p.error is not None]
    n = len(errors)
    return {
        "rows": len(items),
        "unknown": len(items) - n,
        "median_error": median(errors) if n else None,
        "within_10_percent": sum(e <= 0.10 for e in errors) / n if n else None,
        "within_25_percent": sum(e <= 0.25 for e in errors) / n if n else None,
        "inside_interval": sum(bool(p.inside) for p in items) / n if n else None,
    }


def summarise(items: Sequence[Prediction]) -> dict[str, Any]:
    """Errors over everything, and by device, runtime and source."""

    def by(key: Callable[[Prediction], str]) -> dict[str, Any]:
        return {name: _group([p for p in items if key(p) == name]) for name in sorted({key(p) for p in items})}

    return {"all": _group(items), "device": by(lambda p: p.device), "runtime": by(lambda p: p.runtime), "source": by(lambda p: p.source)}


def validate(path: str | os.PathLike[str], anchors: int = 0) -> dict[str, Any]:
    """Errors on the rows of `path` when whole devices, and whole models, were left out of the fit.

    With `anchors`, also when all but 0, 1, 3, … `anchors` rows of a device were. Every fold is fitted on the rest of these rows and
    on the shipped rows. An interval of a fold comes from the residuals of the other folds, so its coverage is honest.
    Raises `InputError` as `predict_rows` does.
    """
    from edgesdk.predict.check import check_left_out
    from edgesdk.predict.rows import read_rows

    return check_left_out(read_rows(path), anchors)


def efficiency_for(device: DeviceProfile, runtime: str) -> Efficiency:
    """The fitted efficiencies of a runtime on a device, as the planner's noun."""
    from edgesdk.predict.planner import efficiency

    return efficiency(device, runtime)


def to_json(items: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Rows as JSON objects."""
    return [asdict(p) for p in items]
