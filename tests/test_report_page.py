"""Pages of reports and plans: what is on them, that they stand alone, and how a browser draws them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reports import full_report, report_of
from typer.testing import CliRunner

from edgesdk.cli import app
from edgesdk.errors import EdgeError, InputError
from edgesdk.pages import label, page
from edgesdk.pages.rows import pattern
from edgesdk.pages.svg import Plot, label_spots, linear, logarithmic, number, shorten
from edgesdk.plan.types import Budget, BudgetCheck, Candidate, Estimate, MemoryAnswer, Plan, SolverProof, UnitPlan, Workload
from edgesdk.report import Moment, Report, Summary
from tests.tiny import tiny_bundle

VOID = {"meta", "link", "br", "img"}


def _estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value / 1.5, high=value * 1.5)


def plan_of(units: int = 24, **fields) -> Plan:
    """A made-up plan with a front of five choices."""
    made = tuple(
        UnitPlan(
            unit=f"decoder.layers.{i}.feed_forward.up", method="prefill", op="linear" if i % 3 else "attention", precision="int8-dynamic",
            weight_bytes=65536 * (i + 1), latency=_estimate(2e-4 * (i + 1)), ops=2e5 * (i + 1) ** 2, moved_bytes=7e4 * (i + 1),
            bound=("memory", "compute", "overhead")[i % 3], why="",
        )
        for i in range(units)
    )  # fmt: skip
    front = tuple(
        Candidate(
            layout="decoder-only", runtime="executorch", precisions={"int8-dynamic": units}, memory_bytes=int(4e7 / (i + 1)), storage_bytes=10**6,
            latency=_estimate(0.012 * 1.4**i), quality_drop=0.002 * i,
        )
        for i in range(5)
    )  # fmt: skip
    plan = Plan(
        model="example:normalizer", model_name="normalizer", layout="decoder-only", device="raspberry-pi-5", runtime="executorch", unit="cpu",
        threads=4, power_mode=None, workload=Workload(), budget=Budget(latency_s=0.03), fits=True,
        checks=tuple(BudgetCheck(name=n, limit=v, reached=0.0, fits=True) for n, v in (("latency", 0.03), ("harm", 0.005))), units=made, latency=front[0].latency,
        method_latency={"prefill": _estimate(0.0118)}, storage_bytes=10**6, quality=0.99, quality_drop=0.0, front=front,
        memory=MemoryAnswer(
            weights_bytes=2 * 10**7, activations_bytes=10**6, cache_bytes=10**6, cross_cache_bytes=0, io_bytes=4096,
            runtime_bytes=18 * 10**6, peak_bytes=front[0].memory_bytes,
        ),
        proof=SolverProof(name="HiGHS", status="optimal", objective=0, bound=0, gap=0, seconds=0), reasons=("times: fitted",), digests={},
    )  # fmt: skip
    return plan.model_copy(update=fields)


class _Balanced(HTMLParser):
    """Every tag is closed, in order; collects attributes that could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.links += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data") or k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def _parsed(content: str) -> _Balanced:
    parser = _Balanced()
    parser.feed(content)
    parser.close()
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids))
    assert not parser.links and not {"script", "link", "img", "iframe"} & set(parser.seen)
    assert not re.search(r"url\(|@import|https?://", content)
    assert not re.search(r"\b(nan|inf)\b|None|Infinity", content), re.findall(r".{40}\b(?:nan|inf|None)\b.{20}", content)[:3]
    return parser


def test_a_page_holds_every_figure():
    content = page([full_report()], [plan_of()])
    parser = _parsed(content)
    for title in (
        "Latency over time: prefill", "Latency over time: decode", "Percentiles: prefill", "Operators: normalizer", "Power: normalizer",
        "Predicted against measured: normalizer", "Memory", "Roofline: normalizer on raspberry-pi-5", "Pareto front: normalizer on raspberry-pi-5",
        "Units: normalizer on raspberry-pi-5",
    ):  # fmt: skip
        assert f"<h3>{title}</h3>" in content, title
    assert parser.seen.count("figure") == 11 == parser.seen.count("table") - 1
    assert "the board says that it is throttled" in content and "temperature (cpu-thermal)" in content
    assert content.index("throttled") < content.index("<figure"), "trust comes first"
    assert len(content) < 300_000


def test_several_reports_side_by_side():
    a, b = full_report(), full_report(1, 1.2)
    steady = [r.model_copy(update={"trust": r.trust.model_copy(update={"verdict": "good"})}) for r in (a, b)]
    content = page(steady)
    _parsed(content)
    assert '<span class="badge bad">slower</span>' in content and "Ratios: 2: raspberry-pi-5 against 1: raspberry-pi-5" in content
    other = b.model_copy(update={"conditions": b.conditions.model_copy(update={"device": "raspberry-pi-4"})})
    content = page([a, other])
    assert "device: raspberry-pi-5 against raspberry-pi-4" in content and label([a, other]) == ["raspberry-pi-5", "raspberry-pi-4"]
    _parsed(page([a, report_of([1e-3] * 30)]))  # no method in common


def test_a_plan_alone():
    content = page([], [plan_of()])
    _parsed(content)
    assert "Roofline" in content and "planned: normalizer on raspberry-pi-5" in content and "measured:" not in content
    before = page([], [plan_of(units=0, front=())])
    _parsed(before)
    assert "Roofline" not in before and "Pareto" not in before
    assert "loses more than 0.50% of quality" in content
    off = plan_of(latency=_estimate(0.05))
    assert "off the front" in page([], [off])
    assert "Roofline" not in page([], [plan_of(device="a-board-of-mine")])
    with pytest.raises(InputError, match="nothing"):
        page([])


@pytest.mark.parametrize(
    "samples",
    [[1e-3], [0.0] * 12, [1e-3] * 2, [1e-3] * 40, [1e-9, 5.0], [i * 1e-6 + 1e-6 for i in range(3000)], [1e-3] * 29 + [10.0]],
    ids=["one", "zero", "two", "all alike", "far apart", "many", "an outlier"],
)
def test_odd_samples(samples):
    _parsed(page([report_of(samples)]))


def test_what_is_unknown_is_not_drawn():
    m = report_of([1e-3] * 20).methods[0]
    told = Summary(tool="benchmark_model", calls=50, mean_s=1e-3)
    bare = m.model_copy(update={"samples_s": (), "p50_s": None, "p90_s": None, "p99_s": None, "summary": told})
    content = page([report_of([1.0], report={"methods": (bare,), "power_reasons": ("no working sensor: no rails",)})])
    _parsed(content)
    assert "<figure" not in content and "benchmark_model" in content and "no working sensor: no rails" in content
    timed = m.model_copy(update={"starts_s": tuple(i * 0.01 for i in range(20))})
    odd = report_of([1.0], report={"methods": (timed,), "moments": (Moment(at_s=0.0), Moment(at_s=0.1, temperatures_c={"x": 40.0}))})
    _parsed(page([odd]))


def test_names_of_others_are_text():
    evil = "<script>alert(1)</script>\"'&"
    r = full_report()
    r = r.model_copy(update={"model_name": evil, "operators": (r.operators[0].model_copy(update={"unit": evil}),)})
    r = r.model_copy(
        update={"conditions": r.conditions.model_copy(update={"machine": evil}), "trust": r.trust.model_copy(update={"reasons": (evil,)})}
    )
    content = page([r], [plan_of(model_name=evil, reasons=(evil,))])
    _parsed(content)
    assert "&lt;script&gt;" in content


def test_scales():
    s = linear([0.13, 0.97])
    assert s.low <= 0.13 and s.high >= 0.97 and s.share(s.low) == 0 and s.share(s.high) == 1 and 3 <= len(s.ticks) <= 7
    assert linear([5.0, 5.0]).low < 5 < linear([5.0, 5.0]).high and linear([0.0, 0.0]).high > 0
    log = logarithmic([2e-7, 3e3])
    assert log.low < 2e-7 and log.high > 3e3 and 2 <= len(log.ticks) <= 6 and all(log.low <= t <= log.high for t in log.ticks)
    assert logarithmic([1.0, 1.1]).ticks
    assert [number(v) for v in (0, 0.00123, 1.234, 123.4, 2000.0)] == ["0", "0.00123", "1.23", "123", "2000"]
    assert shorten("encoder.layers.0.feed_forward", 100) == "encode…forward" and shorten("short", 100) == "short"
    assert pattern("decoder.layers.11.conv2d_3") == "decoder.layers.*.conv2d"


def test_labels_keep_out_of_each_others_way():
    plot = Plot(400, 300, linear([0, 10]), linear([0, 10]))
    points = [(5.0, 5.0, "alpha"), (5.0, 5.0, "beta"), (5.1, 5.0, "gamma"), (9.9, 9.9, "in the corner")]
    found = label_spots(plot, points)
    assert all(found) and len(set(found)) == 4
    assert any(s is None for s in label_spots(plot, [(5.0, 5.0, "crowded")] * 30))


def test_command_line(tmp_path):
    def run(*args, ok: bool = True):
        done = CliRunner().invoke(app, ["report", *map(str, args)])
        assert (done.exit_code == 0) == ok, done.output
        assert ok or isinstance(done.exception, (EdgeError, SystemExit)), done.exception
        return done.output if ok else str(done.exception)

    report, plan = full_report().save(tmp_path / "r.json"), plan_of().save(tmp_path / "p.json")
    tiny_bundle(tmp_path / "b.edge", plan=plan_of().to_json().encode())
    tiny_bundle(tmp_path / "none.edge")
    out = tmp_path / "page.html"
    shown = run(report, tmp_path / "b.edge", "-o", out)
    assert "trust" in shown and "Roofline" in out.read_text()
    run(plan, "-o", out)
    assert "Pareto front" in out.read_text()
    assert Report.from_json(run(report, "--json")) == full_report()
    several = json.loads(run(report, report, plan, "--json"))
    assert several["kind"] == "reports" and len(several["reports"]) == 2 and several["comparisons"][0]["kind"] == "comparison"
    assert "without a plan" in run(tmp_path / "none.edge", ok=False)
    assert "cannot be written" in run(report, "-o", tmp_path / "no" / "page.html", ok=False)
    assert "cannot be read" in run(tmp_path / "missing.json", ok=False)
    assert "one report, not 2" in run(report, report, "--plot", tmp_path / "x.png", ok=False)
    assert "wants reports" in run(ok=False)


# ---- as a browser draws them ---------------------------------------------------------------------------------

SCRIPT = (Path(__file__).parent / "lab" / "look.js").read_text()


@pytest.fixture(scope="module")
def browser():
    from tests.lab import browser as lab

    if problem := lab.missing():
        pytest.fail(problem, pytrace=False)
    with lab.Browser() as started:
        yield started


def _pages() -> dict[str, str]:
    good = [r.model_copy(update={"trust": r.trust.model_copy(update={"verdict": "good"})}) for r in (full_report(), full_report(1, 1.2))]
    odd = report_of([1e-3] * 29 + [10.0], emulated=True, report={"model_name": "a-name-" * 20})
    return {
        "full": page([full_report()], [plan_of()]),
        "two": page(good),
        "plan": page([], [plan_of()]),
        "odd": page([odd, report_of([1e-9, 5.0])]),
    }


@pytest.mark.board
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_seen(browser, tmp_path, width, dark):
    """No sideways scrolling, no small or pale text, nothing cut off or overlapping, nothing fetched or complained of."""
    for name, content in _pages().items():
        (tmp_path / f"{name}.html").write_text(content)
        browser.open(tmp_path / f"{name}.html", width, dark)
        assert browser.run(f"({SCRIPT})({width})") == [], name
        browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.run(f"({SCRIPT})({width})") == [], f"{name}, tables open"
        back = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == dark
        shown = browser.run(
            "[...document.querySelectorAll('svg[role=img]')].filter(e => e.getClientRects().length).map(e => e.getAttribute('class'))"
        )
        assert set(shown) == {"narrow" if width < 600 else "wide"}
        assert browser.requests() == [(tmp_path / f"{name}.html").as_uri()] and not browser.complaints()


@pytest.mark.board
def test_the_look_finds_what_is_wrong(browser, tmp_path):
    """The check itself: a page with every fault."""
    bad = (
        "<!doctype html><meta name=viewport content='width=device-width'><body style='background:#fff'><p style='color:#999'>pale</p><p style='font-size:9px'>tiny</p>"
        "<div style='width:900px'>wide</div><svg role=img viewBox='0 0 100 50'><text x=10 y=20>one</text><text x=12 y=20>two</text><circle cx=150 cy=9 r=5 /></svg>"
        "<figure>no table</figure><img src='http://127.0.0.1:1/x.png'><script>console.error('oh')</script>"
    )
    (tmp_path / "bad.html").write_text(bad)
    browser.open(tmp_path / "bad.html", 360, False)
    found = " ".join(browser.run(f"({SCRIPT})(360)"))
    for words in ("wide on a screen of 360", "contrast 2.85", "9.0 px", "overlaps", "outside of its drawing", "no title", "no table"):
        assert words in found, words
    assert len(browser.requests()) == 2 and browser.complaints()
