"""Prints how far predictions are off on rows left out of the fit.

    python tests/bench/predictions.py [FILE.csv]

FILE defaults to `../shared/data/published_latency.csv` beside the checkout. About two minutes on one core.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from statistics import median as middle

from edgesdk import predict
from edgesdk.predict.fit import shipped_rows
from edgesdk.predict.physics import Case
from edgesdk.predict.rows import Row, case_of, read_rows

DEFAULT = Path(__file__).parents[2].parent / "shared" / "data" / "published_latency.csv"


def noise_floor(rows: list[Row]) -> dict[str, list[float]]:
    """Ratios between two published numbers for the same model, data type, program, threads and chip, by where the two stand."""
    groups: dict[tuple[object, ...], set[tuple[float, str, str]]] = {}
    for row in rows:
        case = case_of(row)
        if isinstance(case, Case):
            key = (case.engine, case.precision, case.device, case.model, case.spread, case.per, case.weight_bytes, row.runtime.lower())
            groups.setdefault(key, set()).add((row.seconds, row.source, row.device))
    out: dict[str, list[float]] = {}
    for found in groups.values():
        for a, b in combinations(sorted(found), 2):
            kind = ("one table" if a[1] == b[1] else "two tables") + (", one board" if a[2] == b[2] else ", two boards with the same chip")
            out.setdefault(kind, []).append(b[0] / a[0])
    return out


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not path.exists():
        sys.stdout.write(f"{path} is not there: give a CSV of published rows\n")
        return 2
    shipped = predict.summarise(predict.predict_rows(path))["all"]
    for name, group in {"all rows, shipped parameters": shipped, **predict.validate(path, 5)}.items():
        median, near, inside = group["median_error"], group["within_25_percent"], group["inside_interval"]
        if median is not None:
            head = f"{name:42s} rows {group['rows']:4d}  median error {median:6.1%}"
            sys.stdout.write(
                f"{head}  within 25% {near:5.0%}  inside the interval " + ("    –" if inside is None else f"{inside:5.0%}") + "\n"
            )
    for kind, ratios in noise_floor([*read_rows(path), *shipped_rows()]).items():
        head = f"noise floor: {kind:42s} pairs {len(ratios):3d}  median ratio {middle(ratios):.3f}"
        sys.stdout.write(f"{head}  within 25% {sum(r <= 1.25 for r in ratios) / len(ratios):4.0%}  largest {max(ratios):.2f}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
