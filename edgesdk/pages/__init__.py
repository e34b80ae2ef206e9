"""Reports and plans as one HTML page that stands alone: no scripts, nothing fetched, drawings in SVG with a table behind each."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from edgesdk import __version__
from edgesdk.compare import SHOW, Verdicts, compare
from edgesdk.errors import EdgeError, InputError
from edgesdk.pages import planned, times
from edgesdk.pages.html import Figure, Table, text
from edgesdk.pages.rows import Ratio, operators, predicted, ratios
from edgesdk.pages.style import STYLE
from edgesdk.plan.types import Plan
from edgesdk.report import Report
from edgesdk.units import show_bytes, show_joules, show_seconds

_BADGES = {"good": "good", "noisy": "warn", "throttled": "bad", "emulated": "odd"}
_SAID = {"slower": "bad", "more": "bad", "faster": "good", "less": "good", "same": "good", "not comparable": "odd"}


def page(reports: Sequence[Report], plans: Sequence[Plan] = ()) -> str:
    """HTML of some reports side by side, of plans, or of both. Raises `InputError` where there is neither."""
    if not reports and not plans:
        raise InputError("a page of nothing", "give a report, a plan or a bundle")
    names = label(reports)
    title = _title(reports, plans)
    parts = [f"<h1>{text(title)}</h1>"]
    parts += [_head(r, n if len(reports) > 1 else "") for n, r in zip(names, reports, strict=True)]
    if len(reports) > 1:
        parts.append(_compared(reports, names))
    groups = [("Measured", _measured(reports, names, plans)), ("Planned", _planned(reports, plans))]
    for g, (heading, figures) in enumerate(groups):
        if figures:
            drawn = "".join(f.render(f"g{g}f{i}") for i, f in enumerate(figures))
            parts.append(f"<section><h2>{heading}</h2><div class=grid>{drawn}</div></section>")
    parts += [_plan_words(p) for p in plans]
    if reports:
        recorded = "".join(_recorded(r, n) for n, r in zip(names, reports, strict=True))
        parts.append(f"<section><h2>Everything that was recorded</h2><div class=card>{recorded}</div></section>")
    parts.append(f"<footer>edgesdk {text(__version__)}. Predicted figures are named so; all others were measured.</footer>")
    head = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    return f"<!doctype html><html lang=en><head>{head}<title>{text(title)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"


def label(reports: Sequence[Report]) -> list[str]:
    """A short name each, by what tells them apart; numbered where nothing does."""
    sides = [
        (
            r.model_name,
            r.conditions.device,
            r.conditions.runtime,
            f"{r.conditions.threads} threads",
            r.how.mode,
            r.conditions.power_mode or "",
            r.bundle_digest[:8],
        )
        for r in reports
    ]
    differing = [i for i in range(7) if len({s[i] for s in sides}) > 1]
    names = [", ".join(s[i] for i in (differing or [1]) if s[i]) for s in sides]
    if len(set(names)) == len(names):
        return names
    return [f"{i + 1}: {n}" for i, n in enumerate(names)]


def _title(reports: Sequence[Report], plans: Sequence[Plan]) -> str:
    whats = list(dict.fromkeys([r.model_name for r in reports] or [p.model_name for p in plans]))
    wheres = list(dict.fromkeys([r.conditions.device for r in reports] or [p.device for p in plans]))
    return f"{', '.join(whats)} on {', '.join(wheres)}"


# ---- top ----------------------------------------------------------------------------------------------------


def _head(r: Report, name: str) -> str:
    """Conditions in a line, the trust verdict with its reasons, the figures that people ask for."""
    c = r.conditions
    where = [
        c.runtime + (f" {c.runtime_version}" if c.runtime_version else ""),
        f"{c.threads} thread{'s' * (c.threads > 1)}",
        r.how.mode,
        c.machine,
        f"{c.when[:16].replace('T', ' ')} UTC",
    ]
    reasons = "".join(f"<li>{text(reason)}</li>" for reason in r.trust.reasons)
    warmth = [f"{v:.0f} °C" for v in (c.temperature_before_c, c.temperature_after_c) if v is not None]
    clock = [f"{v / 1e6:.0f} MHz" for v in (c.clock_before_hz, c.clock_after_hz) if v]
    state = (
        [" to ".join(dict.fromkeys(v)) for v in (clock, warmth) if v]
        + ([f"governor {c.governor}"] if c.governor else [])
        + ([c.power_mode] if c.power_mode else [])
    )
    heading = f"<h3>{text(name)}</h3>" if name else ""
    badge = f'<span class="badge {_BADGES[r.trust.verdict]}">{text(r.trust.verdict)}</span>'
    listed = f"<ul>{reasons}</ul>" if reasons else ""
    return (
        f"<section class=card>{heading}<p>{badge} <span class=soft>{text(' · '.join(w for w in where if w))}</span></p>"
        f"<p class=soft>{text(' · '.join(state))}</p>{listed}</section>{_tiles(r)}"
    )


def _tiles(r: Report) -> str:
    found: list[tuple[str, str]] = []
    for m in r.methods[:3]:
        found.append((show_seconds(m.p50_s), f"{m.method}, median; 90% below {show_seconds(m.p90_s)}"))
    found += [(show_seconds(r.load_cold_s), "cold load"), (show_bytes(r.peak_rss_bytes), "memory peak")]
    found += [
        (show_joules(e.net_j if e.net_j is not None else e.gross_j), f"{e.method}, a call{', less idle' if e.net_j is not None else ''}")
        for e in r.energy[:3]
    ]
    tiles = "".join(f"<div><b>{text(value)}</b><span>{text(name)}</span></div>" for value, name in found if value != "–")
    return f"<div class=tiles>{tiles}</div>"


# ---- figures ------------------------------------------------------------------------------------------------


def _measured(reports: Sequence[Report], names: Sequence[str], plans: Sequence[Plan]) -> list[Figure]:
    found: list[Figure] = []
    methods = list(dict.fromkeys(m.method for r in reports for m in r.methods if m.samples_s))
    spread: list[Figure] = []
    for method in methods:
        sides = [(n, r, m) for n, r in zip(names, reports, strict=True) for m in r.methods if m.method == method and m.samples_s]
        ends = times.span([m for _, _, m in sides])
        found += [times.over_time(r, m, f"{method}, {n}" if len(reports) > 1 else method, ends) for n, r, m in sides]
        (spread if len(reports) > 1 else found).append(times.distribution(method, [(n, m) for n, _, m in sides]))
    found += spread
    shown = names if len(reports) > 1 else [r.model_name for r in reports]
    found += [f for n, r in zip(shown, reports, strict=True) if (f := predicted(r, n))]
    memory = planned.memory(plans, list(zip(names, reports, strict=True))) if reports else None
    found += [memory] if memory else []
    found += [f for n, r in zip(shown, reports, strict=True) if (f := times.watts(r, n))]
    return found + [
        operators(r.operators, r.operators_route or "", f"Operators: {n}") for n, r in zip(shown, reports, strict=True) if r.operators
    ]


def _planned(reports: Sequence[Report], plans: Sequence[Plan]) -> list[Figure]:
    from edgesdk.devices import load_device

    found: list[Figure | None] = []
    for plan in plans:
        mine = next((r for r in reports if (r.model_name, r.conditions.device) == (plan.model_name, plan.device)), None)
        with contextlib.suppress(EdgeError):  # a profile of another machine's user: its peaks are not known here
            found.append(planned.roofline(plan, load_device(plan.device), mine))
        found += [planned.front(plan), planned.units(plan)]
        if not reports:
            found.append(planned.memory([plan], []))
    return [f for f in found if f]


def _compared(reports: Sequence[Report], names: Sequence[str]) -> str:
    """Every report against the first, as `edgesdk compare` says it."""
    parts, figures = [], []
    for name, other in zip(names[1:], reports[1:], strict=True):
        try:
            answer = compare(reports[0], other)
        except InputError as error:
            parts.append(f"<p>{text(name)}: {text(error.what)}</p>")
            continue
        badge = f'<span class="badge {_SAID.get(answer.verdict, "warn")}">{answer.verdict}</span>'
        notes = "".join(f"<li>{text(w)}</li>" for w in (*answer.not_comparable, *answer.differs, *answer.warnings))
        parts.append(
            f"<p>{badge} <b>{text(name)}</b> against <b>{text(names[0])}</b>, tolerance {answer.tolerance * 100:.3g}%</p><ul>{notes}</ul>"
        )
        figures.append(_verdicts(answer, f"{name} against {names[0]}"))
    drawn = "".join(f.render(f"c{i}") for i, f in enumerate(figures))
    return (
        f"<section><h2>Compared</h2><div class=card>{''.join(parts)}</div><div class=grid style='margin-top:16px'>{drawn}</div></section>"
    )


def _verdicts(answer: Verdicts, name: str) -> Figure:
    kinds = {"slower": "1", "more": "1", "faster": "2", "less": "2", "same": "0"}
    rows = [
        Ratio(
            r.name,
            r.ratio,
            r.low,
            r.high,
            f"×{r.ratio:.3f}" + ("" if answer.not_comparable else f" {r.verdict}"),
            kinds.get(r.verdict, "s"),
        )
        for r in answer.rows
    ]
    cells = [
        [
            r.name,
            SHOW[r.unit](r.first),
            SHOW[r.unit](r.second),
            f"×{r.ratio:.3f}",
            f"{r.low:.3f} to {r.high:.3f}" if r.low else "–",
            r.verdict,
        ]
        for r in answer.rows
    ]
    said = "; ".join(f"{r.name} ×{r.ratio:.3f} ({r.verdict})" for r in answer.rows)
    table = Table(["", "first", "second", "ratio", "interval", "verdict"], cells)
    legend = [(f"within {answer.tolerance:.0%}", "band")]
    return Figure(f"Ratios: {name}", said, ratios(rows, answer.tolerance, "ratio, above 1 is slower or more"), table, legend)


# ---- words --------------------------------------------------------------------------------------------------


def _plan_words(plan: Plan) -> str:
    """Budgets, reasons and warnings of a plan."""
    fits = '<span class="badge good">fits</span>' if plan.fits else '<span class="badge bad">nothing fits</span>'
    rows = [
        (
            f"{plan.model_name} ({plan.layout})",
            f"{plan.runtime} on {plan.unit} of {plan.device}, {plan.threads} thread{'s' * (plan.threads > 1)}",
        )
    ]
    rows += [
        (f"{m}, a call, predicted", f"{show_seconds(e.value)} ({show_seconds(e.low)} to {show_seconds(e.high)})")
        for m, e in plan.method_latency.items()
    ]
    rows += [("memory, stored", f"{show_bytes(plan.memory.peak_bytes)}, {show_bytes(plan.storage_bytes)}")]
    said = "".join(f"<li>{text(w)}</li>" for w in (*plan.warnings, *plan.reasons))
    return f"<section><h2>Plan</h2><div class=card><p>{fits}</p>{_pairs(rows)}<ul>{said}</ul></div></section>"


def _recorded(r: Report, name: str) -> str:
    """Everything that was recorded beside the samples."""
    rows = [(k.replace("_", " "), "unknown" if v is None else str(v)) for k, v in r.conditions.model_dump().items()]
    rows += [("bundle", r.bundle_digest), ("load, warm", show_seconds(r.load_warm_s)), ("runtime import", show_seconds(r.runtime_import_s))]
    rows += [(k.replace("_", " "), "unknown" if v is None else str(v)) for k, v in r.how.model_dump().items()]
    rows += [("power", reason) for reason in r.power_reasons]
    for m in r.methods:
        if m.summary:
            rows.append((m.method, ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in m.summary.model_dump().items() if v is not None)))
    rows += [(f"memory, {k}", v) for k, v in r.memory.reasons.items()]
    return (
        f"<details><summary>{text(name)}</summary>{Table(['what', 'as recorded'], [list(row) for row in rows]).render('whole')}</details>"
    )


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in rows) + "</dl>"
