"""A report as a page that stands alone, or as a picture."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from edgesdk.errors import InputError, MissingTool
from edgesdk.report import MethodSamples, Report
from edgesdk.units import show_bytes, show_seconds

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #8884}svg{width:100%;height:140px;background:#8881}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
)


def page(report: Report) -> str:
    """HTML with the tables and the samples in order of time; no scripts, nothing fetched."""
    c = report.conditions
    parts = [f"<h1>{html.escape(report.model_name)} on {html.escape(c.device)}</h1>"]
    reasons = "; ".join(report.trust.reasons)
    parts.append(f"<p><b>{report.trust.verdict}</b>{': ' + html.escape(reasons) if reasons else ''}</p>")
    for m in report.methods:
        rows = [("first call", m.cold_s), ("p50", m.p50_s), ("p90", m.p90_s), ("p99", m.p99_s)]
        parts.append(f"<h2>{html.escape(m.method)}</h2>" + _table([(name, show_seconds(t)) for name, t in rows]) + _line(m))
    compared = [(r.name, *(_value(v, r.unit) for v in (r.predicted, r.measured))) for r in report.comparisons]
    if compared:
        parts.append("<h2>Predicted and measured</h2>" + _table([("", "predicted", "measured"), *compared]))
    if report.operators:
        rows_o = [(o.method, o.unit, o.op, show_seconds(o.median_s), f"{o.share:.1%}") for o in report.operators]
        parts.append(f"<h2>Operators</h2><p>{html.escape(report.operators_route or '')}</p>" + _table(rows_o))
    memory = [("load, cold", show_seconds(report.load_cold_s)), ("load, warm", show_seconds(report.load_warm_s))]
    memory.append(("memory peak", show_bytes(report.peak_rss_bytes)))
    parts.append("<h2>Load and memory</h2>" + _table(memory))
    parts.append("<h2>Conditions</h2>" + _table([(k, "unknown" if v is None else str(v)) for k, v in c.model_dump().items()]))
    return f"<!doctype html><meta charset=utf-8><title>{html.escape(report.model_name)}</title><style>{_STYLE}</style>" + "\n".join(parts)


def _value(value: float | None, unit: str) -> str:
    return show_seconds(value) if unit == "s" else show_bytes(value)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "<table>" + "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows) + "</table>"


def _line(m: MethodSamples) -> str:
    top = max(m.samples_s)
    points = " ".join(f"{i * 1000 / max(1, len(m.samples_s) - 1):.1f},{100 - 95 * s / top:.1f}" for i, s in enumerate(m.samples_s))
    line = f'<polyline fill="none" stroke="#48c" stroke-width="2" points="{points}"/>'
    return f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none">{line}</svg>'


def draw(report: Report, path: Path) -> None:
    """Samples in order and as a histogram, one row a method. Raises `MissingTool` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise MissingTool("a picture needs matplotlib", "pip install 'edgesdk[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(report.methods), 2, figsize=(10, 3 * len(report.methods)), squeeze=False)
    for (left, right), m in zip(axes, report.methods, strict=True):
        milliseconds = [s * 1e3 for s in m.samples_s]
        left.plot(milliseconds, ".-", linewidth=0.7)
        if m.p50_s is not None:
            left.axhline(m.p50_s * 1e3, color="grey", linewidth=0.7)
        left.set(xlabel="call", ylabel="ms", title=f"{m.method}: p50 {show_seconds(m.p50_s)}, p90 {show_seconds(m.p90_s)}")
        right.hist(milliseconds, bins=min(40, max(5, len(milliseconds) // 3)))
        right.set(xlabel="ms", ylabel="calls")
    figure.suptitle(f"{report.model_name} on {report.conditions.device} ({report.trust.verdict})")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error})", "give a name that ends in .png, .svg or .pdf") from None
    finally:
        pyplot.close(figure)
