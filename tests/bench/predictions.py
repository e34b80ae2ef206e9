"""Prints how far predictions are off on rows left out of the fit.

    python tests/bench/predictions.py [FILE.csv]

FILE defaults to `../shared/data/published_latency.csv` beside the checkout. About two minutes on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgesdk import predict

DEFAULT = Path(__file__).parents[2].parent / "shared" / "data" / "published_latency.csv"


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
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
