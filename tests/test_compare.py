"""Compare: verdicts with intervals, what may not be compared, and how often a verdict is wrong on series whose effect is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from reports import report_of
from typer.testing import CliRunner

from edgesdk.compare import Verdicts, compare
from edgesdk.errors import EdgeError, InputError
from edgesdk.interval import Interval, correlation_time, drift_of, of_figures, of_runs, times_more
from edgesdk.report import Energy, Memory, Summary
from tests.bench.compare_rates import KINDS, intervals, rates


def _times(seed: int = 0, n: int = 60, scale: float = 1e-3, spread: float = 0.02) -> list[float]:
    return list(scale * np.exp(np.random.default_rng(seed).normal(0, spread, n)))


@pytest.mark.parametrize(
    ("factor", "tolerance", "verdict", "not_worse"),
    [
        (1.20, 0.03, "slower", False),
        (1.20, 0.50, "same", True),
        (0.80, 0.03, "faster", True),
        (1.00, 0.03, "same", True),
        (1.03, 0.03, "cannot tell", False),  # on the edge itself
        (0.97, 0.03, "cannot tell", True),  # not worse for sure
        (1.10, 0.00, "slower", False),
    ],
)
def test_verdicts(factor, tolerance, verdict, not_worse):
    answer = compare(report_of(_times()), report_of([t * factor for t in _times(1)]), tolerance=tolerance)
    (p50,) = (r for r in answer.rows if r.metric == "p50")
    assert (p50.verdict, p50.not_worse) == (verdict, not_worse)
    assert answer.verdict == verdict == answer.methods["forward"]
    assert bool(answer.regressions) == (verdict == "slower")
    assert p50.low < p50.ratio < p50.high
    assert any("one run a side" in w for w in answer.warnings)


def test_a_slower_tail_is_a_regression():
    slow = _times(1, 400)
    slow = [t * (1.5 if i % 6 == 0 else 1) for i, t in enumerate(slow)]
    answer = compare(report_of(_times(0, 400)), report_of(slow))
    assert {r.metric: r.verdict for r in answer.rows} == {"p50": "same", "p90": "slower"}
    assert answer.verdict == "slower" and answer.regressions == (
        next(f"forward p90 ×{r.ratio:.2f}" for r in answer.rows if r.metric == "p90"),
    )


def test_what_it_takes_to_tell():
    answer = compare(report_of(_times(0, 12, spread=0.1)), report_of(_times(2, 12, spread=0.1)))
    p50, p90 = answer.rows
    assert p50.verdict == p90.verdict == answer.verdict == "cannot tell"
    assert p50.times_more > 1
    assert p90.why == "12 samples, 40 are the least for a p90" and p90.low is None
    few = compare(report_of(_times(0, 5)), report_of([9.0] * 5))
    assert few.verdict == "cannot tell" and "10 are the least" in few.rows[0].why
    enough = Interval(1.0, 1 / 1.1, 1.1)
    more = times_more(enough, 0.03, (1, 1), 0.05)
    assert more == pytest.approx((math.log(1.1) / math.log(1.03)) ** 2)
    assert times_more(Interval(1.03, 1.0, 1.06), 0.03, (1, 1), 0.05) is None


def test_several_runs_hold_what_runs_differ_in():
    """Each run is quiet, but starts elsewhere: one run a side is sure of a difference that is none."""
    offsets = np.exp(np.random.default_rng(3).normal(0, 0.04, 8))
    runs = [report_of(_times(i, 50, 1e-3 * o, 0.01)) for i, o in enumerate(offsets)]
    assert compare(runs[1], runs[2]).verdict in ("slower", "faster")
    answer = compare(runs[:4], runs[4:])
    assert answer.runs == (4, 4) and answer.verdict == "cannot tell" and not answer.warnings
    clear = compare(runs[:4], [report_of([t * 1.3 for t in r.methods[0].samples_s]) for r in runs[4:]])
    assert clear.verdict == "slower"
    assert "taken from the other" in compare(runs[:3], runs[3]).warnings[0]
    with pytest.raises(InputError, match="without reports"):
        compare([], runs)


def test_intervals_are_wider_the_more_is_compared():
    a, b = _times(0), _times(1)
    one = compare(report_of(a), report_of(b)).rows[0]
    four = compare(report_of(dict.fromkeys("abcd", a)), report_of(dict.fromkeys("abcd", b))).rows[0]
    assert four.low < one.low < one.high < four.high


def test_energy_and_memory():
    energy = Energy(method="forward", gross_j=2.0, net_j=1.0, uncertainty_j=0.01, calls=50, seconds=1)
    more = energy.model_copy(update={"net_j": 1.2})
    a = report_of(_times(), report={"energy": (energy,), "peak_rss_bytes": 10**7})
    b = report_of(_times(1), report={"energy": (more,), "peak_rss_bytes": 2 * 10**7, "memory": Memory(peak_pss_bytes=5)})
    rows = {r.metric: r for r in compare(a, b).rows}
    assert rows["energy"].verdict == "more" and rows["energy"].ratio == pytest.approx(1.2) and rows["energy"].unit == "J"
    assert rows["memory peak"].verdict == "cannot tell" and "several runs" in rows["memory peak"].why
    assert "memory PSS" not in rows, "one side does not have it"
    assert compare(a, a).not_worse, "though memory is one reading"
    runs = (
        [a.model_copy(update={"peak_rss_bytes": 10**7 + i}) for i in range(3)],
        [a.model_copy(update={"peak_rss_bytes": 10**8 + i}) for i in range(3)],
    )
    answer = compare(*runs)
    assert next(r for r in answer.rows if r.metric == "memory peak").verdict == "more"
    assert answer.verdict == "more" and any("memory peak" in r for r in answer.regressions)


def test_a_tool_that_keeps_no_samples():
    def side(mean):
        method = report_of(_times()).methods[0]
        summary = Summary(tool="benchmark_model", calls=50, mean_s=mean)
        none = {"samples_s": (), "p50_s": None, "p90_s": None, "p99_s": None, "summary": summary}
        return report_of(_times(), report={"methods": (method.model_copy(update=none),)})

    assert "several runs" in compare(side(1e-3), side(2e-3)).rows[0].why
    answer = compare([side(1e-3), side(1.01e-3)], [side(2e-3), side(2.02e-3)])
    assert answer.rows[0].metric == "mean" and answer.verdict == "slower"


@pytest.mark.parametrize(
    "change",
    [{"device": "pi"}, {"emulated": True}, {"power_mode": "15W"}, {"clock_after_hz": 1e9}, {"throttled": True}, {"governor": "powersave"}],
)
def test_other_conditions_may_not_be_compared(change):
    base = report_of(_times())
    answer = compare(base, report_of([9.0] * 60, **change))
    assert answer.not_comparable and answer.verdict == "not comparable" and not answer.regressions
    assert {r.verdict for r in answer.rows} == {"not comparable"} and not answer.not_worse


def test_what_else_differs_is_said():
    base = report_of(_times())
    assert any("runtime" in d for d in compare(base, report_of(_times(1), runtime="executorch")).differs)
    assert any("noisy" in d for d in compare(base, report_of([1e-3] * 40 + [9e-3] * 20)).differs)
    mixed = [base, base.model_copy(update={"bundle_digest": "1" * 64})]
    assert any("different bundles" in s for s in compare(mixed, base).not_comparable)
    with pytest.raises(InputError, match="share no method"):
        compare(base, report_of({"decode": _times()}))
    with pytest.raises(InputError, match="a call of 0 s"):
        compare(base, report_of([0.0] * 20))
    with pytest.raises(InputError, match="tolerance"):
        compare(base, base, tolerance=1.5)


def test_neighbours_that_resemble_each_other():
    rng = np.random.default_rng(0)
    assert correlation_time(rng.normal(0, 1, 2000)) < 1.3
    assert 2.5 < correlation_time(np.log(KINDS["AR(1) 0.5"](rng, 5000) + 9)) < 5  # (1 + 0.5) / (1 - 0.5) = 3
    assert correlation_time(KINDS["AR(1) 0.9"](rng, 5000)) > 14  # 19, a little less on ranks
    assert correlation_time([1.0] * 50) == 1.0
    assert drift_of(np.linspace(0, 0.1, 60)) == pytest.approx(0.1, rel=0.1) and drift_of(rng.normal(0, 1, 60)) == 0


def test_a_coarse_clock_is_no_certainty():
    """All samples on one tick of 1% of their value, the other side one tick on: medians may be a hair apart."""
    found = of_runs([[100.0] * 30 + [101.0] * 10], [[101.0] * 30 + [100.0] * 10], 0.5, 0.05)
    assert found.low <= 1.0 < found.high
    same = of_runs([[5.0] * 30], [[5.0] * 30], 0.5, 0.05)
    assert (same.ratio, same.low, same.high) == (1, 1, 1)


def test_few_runs_follow_students_t():
    assert of_figures([0.0, 0.2], [1.0, 1.2], 0.05).high == pytest.approx(math.exp(1 + 4.3027 * math.sqrt(0.02)), rel=1e-4)


# Of 200 seeds, 5% are 10; 17 or more come of 5% in one case of 60.
@pytest.mark.parametrize(
    ("kind", "n", "runs", "most"),
    [
        *((kind, 50, 1, 0.085) for kind in KINDS if kind not in ("offset 2% a run", "modes that switch")),
        ("modes that switch", 200, 1, 0.085),
        ("offset 2% a run", 20, 3, 0.085),
    ],
)
def test_false_alarms(kind, n, runs, most):
    found = intervals(kind, n, runs, 0.5, 200)
    none = rates(found, 0.0, 0.0)
    assert none["slower"] + none["faster"] <= most
    beyond = rates(found, 0.03, 0.03)  # on the edge of the tolerance
    assert beyond["slower"] + beyond["same"] <= most
    assert rates(found, 0.10, 0.03)["same"] == 0


def test_misses_and_what_one_run_cannot_know():
    found = intervals("normal 5%", 200, 1, 0.5, 60)
    assert rates(found, 0.10, 0.03)["slower"] == 1 and rates(found, 0.05, 0.03)["slower"] > 0.5 and rates(found, 0, 0.03)["same"] > 0.8
    alike = intervals("drift, alike", 200, 1, 0.5, 60)
    assert rates(alike, 0.10, 0.03)["slower"] > 0.9
    alone = rates(intervals("offset 2% a run", 200, 1, 0.5, 60), 0.0, 0.0)
    assert alone["slower"] + alone["faster"] > 0.3, "what runs differ in is in no single run: compare warns"


def test_command_line(tmp_path):
    from edgesdk.cli import app

    def run(*args):
        done = CliRunner().invoke(app, ["compare", *map(str, args)])
        if done.exception and not isinstance(done.exception, SystemExit):
            assert isinstance(done.exception, EdgeError), done.exception
            return done.exception.exit_code, done.output, str(done.exception)
        return done.exit_code, done.output, ""

    base, slow, pi = (
        report_of(s, **c).save(tmp_path / name)
        for s, c, name in ((_times(), {}, "a.json"), ([9.0] * 50, {}, "s.json"), (_times(), {"device": "pi"}, "p.json"))
    )
    code, out, _ = run(base, base)
    assert code == 0 and "same" in out and "note: one run a side" in out
    assert json.loads(run(base, base, "--json")[1])["kind"] == "comparison"
    assert Verdicts.from_json(run(base, slow, "--json")[1]).verdict == "slower"
    code, out, error = run(base, slow, "--tolerance", "5%")
    assert code == 1 and "worse than allowed: forward p50" in error
    assert run(base, pi)[0] == 2
    noisy = report_of(_times(2, 12, spread=0.1)).save(tmp_path / "n.json")
    code, out, _ = run(base, noisy)
    assert code == 0 and "as many samples would" in out
    assert run(base, noisy, "--strict")[0] == 1 and run(base, base, "--strict")[0] == 0
    (tmp_path / "runs").mkdir()
    assert run(base, tmp_path / "runs")[0] == 2
    for i in range(3):
        report_of(_times(i)).save(tmp_path / "runs" / f"{i}.json")
    assert "3 and 3 runs" in run(tmp_path / "runs", tmp_path / "runs")[1]
