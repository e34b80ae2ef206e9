"""Measurements as jobs on a device: modes, what is kept of them, and links, processes and machines that end in the middle."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from lab.board import Link
from loopback import serve
from tiny import tiny_bundle

from edgesdk import jobs
from edgesdk.agent.client import Agent
from edgesdk.cli import main
from edgesdk.errors import DeviceError, InputError, LinkError
from edgesdk.flash import flash
from edgesdk.jobs import Line, follow
from edgesdk.lease import lease
from edgesdk.measured import make_report
from edgesdk.profile import attach, profile
from edgesdk.report import Chunk, Conditions, Measurement, Moment, Report
from edgesdk.transport.local import LocalTransport
from edgesdk.trust import change, judge, method_samples, percentile, steady


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(bundle, a local device on which it is installed)"""
    folder = tmp_path_factory.mktemp("jobs")
    tiny_bundle(folder / "a.edge")
    transport = LocalTransport(folder / "root")
    flash(folder / "a.edge", transport)
    return folder / "a.edge", transport


@pytest.fixture(scope="module")
def agent(place):
    with Agent(place[1]) as running:
        yield running


def _begin(agent, place, job, **request):
    """A job that goes on for a minute, unless told otherwise."""
    transport = place[1]
    folder = os.path.realpath(f"{transport.root}/current")
    asked = {"folder": folder, "runs": 1, "warmup": 1, "duration_s": 60.0, "mode": "sustained", "energy": False, "rate_hz": 20.0,
             "host": {"device": None, "digest": os.path.basename(folder)}, **request}  # fmt: skip
    return agent.ask("job_start", root=transport.root, job=job, request=asked, who="me@here, to test")


def _until(agent, place, job, *states):
    state = {"state": "", "step": -1}
    for _ in range(200):
        state = agent.ask("job", root=place[1].root, job=job, seen=state["step"], wait_s=0.5)
        if state["state"] in states:
            return state
    raise AssertionError(state)


# ---- modes


@pytest.fixture(scope="module")
def sustained(place):
    """(a report, its job's id)"""
    heard = []
    return profile(*place, mode="sustained", duration_s=3.2, rate_hz=40.0, started=heard.append), heard[0]


def test_sustained_keeps_every_sample_in_order_with_its_start_and_the_device_around_every_chunk(place, sustained):
    report, job = sustained
    (m,) = report.methods
    assert report.how == Measurement(mode="sustained", job=job, duration_s=3.2, rate_hz=40.0)
    assert len(m.samples_s) == len(m.starts_s) and list(m.starts_s) == sorted(m.starts_s)
    assert m.chunks[0].first == 0 and sum(c.count for c in m.chunks) == len(m.samples_s)
    assert sum(c.calls for c in m.chunks) >= len(m.samples_s) * m.every - len(m.chunks) * m.every
    assert len(report.moments) == len(m.chunks) + 1 >= 4
    for c, (before, after) in zip(m.chunks, itertools.pairwise(report.moments), strict=True):
        assert before.at_s <= c.start_s <= m.starts_s[c.first] < c.end_s <= after.at_s
    assert m.steady.burst_p50_s == percentile(m.samples_s[: m.chunks[0].count], 0.5)
    assert m.steady.ratio == pytest.approx(m.steady.sustained_p50_s / m.steady.burst_p50_s)
    assert report.power is None and report.energy == () and report.power_reasons[0].startswith("no working sensor")
    assert any("no working sensor" in r for r in report.trust.reasons)
    assert report.memory.peak_pss_bytes > 1_000_000 and report.memory.gpu_bytes is None and "gpu" in report.memory.reasons
    assert Report.from_json(report.to_json()) == report
    again = attach(job, place[1])
    assert again.methods == report.methods and again.how == report.how


def test_arrivals_are_on_a_schedule_and_waiting_is_no_run_time(place):
    report = profile(*place, rate_hz=200.0, runs=60)
    (m,) = report.methods
    assert len(m.waits_s) == len(m.samples_s) == 60 and min(m.waits_s) >= 0
    arrivals = [s - w for s, w in zip(m.starts_s, m.waits_s, strict=True)]
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    assert sum(abs(g - 0.005) < 1e-6 for g in gaps) >= 57, "but where the device was looked at between two chunks"
    assert m.wait_p50_s == percentile(m.waits_s, 0.5) and m.wait_p99_s >= m.wait_p50_s


def test_bursts_are_ten_calls_and_a_pause(place):
    report = profile(*place, mode="burst", runs=20)
    (m,) = report.methods
    assert [c.count for c in m.chunks] == [10, 10]
    assert m.chunks[1].start_s - m.chunks[0].end_s >= 1.0
    assert report.how.mode == "burst"


def test_cold_calls_are_each_in_a_fresh_process_and_tell_of_the_cache(agent, place, tmp_path):
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/drop_caches").write_text("")
    _begin(agent, place, "p-cold", mode="cold", runs=2, duration_s=None, root=str(tmp_path))
    raw = follow(Line(place[1]), "p-cold")
    assert (tmp_path / "proc/sys/vm/drop_caches").read_text() == "1" and raw["page_cache"] == "dropped"
    rows = {m["method"]: m["samples_s"] for m in raw["methods"]}
    assert set(rows) == {"start of the process", "import", "load", "first call: forward", "start to first answer: forward"}
    assert [m["method"] for m in raw["methods"] if m["chunks"]] == ["start to first answer: forward"], "energy is of whole runs"
    for i in range(2):
        parts = [times[i] for name, times in rows.items() if not name.startswith("start to")]
        assert rows["start to first answer: forward"][i] == pytest.approx(sum(parts)) and min(parts) > 0
    (tmp_path / "proc/sys/vm/drop_caches").unlink()
    (tmp_path / "proc/sys/vm").rmdir()
    _begin(agent, place, "p-cold2", mode="cold", runs=1, duration_s=None, root=str(tmp_path))
    assert "needs root" in follow(Line(place[1]), "p-cold2")["page_cache"]


@pytest.mark.parametrize(
    "options",
    [{"mode": "hot"}, {"mode": "cold", "duration_s": 1.0}, {"mode": "burst", "rate_hz": 5.0}, {"rate_hz": 0.0}, {"duration_s": 0.0}, {"runs": 0}],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_is_done(place, options):
    with pytest.raises(InputError):
        profile(*place, **options)


def test_energy_out_of_a_sensor_whose_watts_move(agent, place, tmp_path):
    rail = tmp_path / "sys/class/hwmon/hwmon0"
    rail.mkdir(parents=True)
    for name, text in (("name", "ina226"), ("power1_input", "2000000")):
        (rail / name).write_text(text)
    stop = threading.Event()

    def meter():
        """2 W at rest, 6 W from when the job measures."""
        shaking = 0
        while not stop.wait(0.01):
            shaking = 1 - shaking
            busy = agent_progress[0]
            part = rail / "part"
            part.write_text(str((6_000_000 if busy else 2_000_000) + shaking))
            part.replace(rail / "power1_input")

    agent_progress = [False]
    thread = threading.Thread(target=meter)
    thread.start()
    try:
        state = _begin(agent, place, "p-energy", duration_s=2.0, energy=True, root=str(tmp_path))
        while state["state"] not in ("done", "failed"):
            state = agent.ask("job", root=place[1].root, job="p-energy", seen=state["step"], wait_s=0.5)
            agent_progress[0] = agent_progress[0] or " of " in state["progress"][0]
        raw = follow(Line(place[1]), "p-energy")
    finally:
        stop.set()
        thread.join()
    from edgesdk.installed import stored

    digest = os.path.basename(os.path.realpath(f"{place[1].root}/current"))
    report = make_report(stored(place[1], digest), "local", agent.ask("facts"), raw, None, Measurement(mode="sustained"))
    (e,), p = report.energy, report.power
    assert p.sensor == "ina226" or (p.sensor.startswith("ina226") and 0.04 < p.interval_s < 0.2)
    assert p.idle_w == pytest.approx(2.0, rel=0.01) and p.idle_s == pytest.approx(3.0, abs=0.5) and p.sampler_share < 0.2
    assert 2.0 * e.seconds / e.calls <= e.gross_j * 1.01 <= 6.0 * e.seconds / e.calls * 1.02
    assert e.net_j == pytest.approx(e.gross_j - p.idle_w * e.seconds / e.calls) and e.uncertainty_j > 0


# ---- what ends in the middle


def test_a_job_is_begun_once_however_often_it_is_asked_for(agent, place):
    first = _begin(agent, place, "p-once")
    again = _begin(agent, place, "p-once")
    assert first["pid"] == again["pid"]
    _until(agent, place, "p-once", "running")
    listed = {s["job"]: s["state"] for s in jobs.jobs(place[1])}
    assert listed["p-once"] == "running"
    with pytest.raises(DeviceError, match=r"in use by me@here, to test \(job p-once\)"), lease(place[1], "flash"):
        pass
    assert jobs.cancel("p-once", place[1])["state"] == "cancelled"
    with lease(place[1], "flash"):
        pass  # it gave the device back
    with pytest.raises(DeviceError, match="was cancelled"):
        attach("p-once", place[1])


def test_a_job_waits_for_whoever_holds_the_device_and_names_them(agent, place, monkeypatch):
    with lease(place[1], "flash"):
        assert _begin(agent, place, "p-wait", runs=1)["state"] == "waiting"
        time.sleep(0.3)
        assert agent.ask("job", root=place[1].root, job="p-wait")["state"] == "waiting"
    assert _until(agent, place, "p-wait", "running")["progress"]
    jobs.cancel("p-wait", place[1])


def test_a_killed_job_is_seen_and_its_measuring_process_ends(agent, place):
    _begin(agent, place, "p-kill")
    state = _until(agent, place, "p-kill", "running")
    while not state["progress"][0].endswith(" s"):
        state = agent.ask("job", root=place[1].root, job="p-kill", seen=state["step"], wait_s=1.0)
    children = _children(state["pid"])
    assert children
    os.kill(state["pid"], signal.SIGKILL)
    with pytest.raises(DeviceError, match="ended without a word"):
        follow(Line(place[1]), "p-kill")
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{c}") for c in children):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("it still measures")


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(c) for c in file.read().split()]


def test_a_crash_of_the_program_is_an_answer(agent, place):
    _begin(agent, place, "p-crash")
    state = _until(agent, place, "p-crash", "running")
    for _ in range(100):
        if _children(state["pid"]):
            break
        time.sleep(0.05)
    os.kill(_children(state["pid"])[0], signal.SIGSEGV)
    with pytest.raises(DeviceError, match=r"crashed on the device \(signal 11\)"):
        follow(Line(place[1]), "p-crash")


def test_a_machine_that_was_started_anew_is_told_as_such(agent, place):
    _begin(agent, place, "p-boot")
    _until(agent, place, "p-boot", "running")
    jobs.cancel("p-boot", place[1])
    path = f"{place[1].root}/jobs/p-boot/state.json"
    with open(path) as file:
        state = json.load(file)
    state.update(state="running", boot_id="another")
    with open(path, "w") as file:
        json.dump(state, file)
    with pytest.raises(DeviceError, match="started anew while the job p-boot ran"):
        attach("p-boot", place[1])
    with open(path, "w") as file:
        file.write('{"job": "p-b')
    with pytest.raises(DeviceError, match="left no state"):
        attach("p-boot", place[1])


def test_ids_that_are_none(agent, place):
    with pytest.raises(InputError, match="no job 'p-ffffffff'"):
        attach("p-ffffffff", place[1])
    for job in ("../../etc", "P", "a" * 50, ""):
        with pytest.raises(InputError, match="no job's id"):
            agent.ask("job", root=place[1].root, job=job)


def test_old_jobs_are_removed_and_those_that_run_stay(agent, place):
    for i in range(20):
        old = Path(place[1].root, "jobs", f"p-old-{i:02d}")
        old.mkdir(parents=True)
        state = {"job": old.name, "state": "done", "step": 9, "since": f"2020-01-01T00:00:{i:02d}+00:00", "progress": ["done", 1.0]}
        (old / "state.json").write_text(json.dumps(state))
    _begin(agent, place, "p-new", method="nonsense")
    assert "no method 'nonsense'" in _until(agent, place, "p-new", "failed")["error"]
    left = [s["job"] for s in jobs.jobs(place[1])]
    assert left[0] == "p-new" and len(left) <= 9 and "p-old-00" not in left


def test_ctrl_c_ends_the_job(place):
    seen = []

    def tell(text, share):
        seen.append(text)
        if " of " in text:
            raise KeyboardInterrupt

    job = []
    with pytest.raises(KeyboardInterrupt):
        profile(*place, mode="sustained", duration_s=60.0, rate_hz=20.0, tell=tell, started=job.append)
    assert next(s for s in jobs.jobs(place[1]) if s["job"] == job[0])["state"] == "cancelled"


class Cuttable(LocalTransport):
    """A local link that is down while `down`, streams and all."""

    down = False

    def _argv(self, argv):
        if self.down:
            raise LinkError("the link is down", "wait")
        return argv

    def open(self, argv):
        stream = super().open(argv)
        readline = stream.readline

        def read(timeout_s):
            line = readline(timeout_s)
            if self.down:
                raise LinkError("the link is down", "wait")
            return line

        stream.readline = read
        return stream


def test_a_cut_link_is_opened_again_or_the_job_is_left_to_be_attached_to(place, monkeypatch):
    monkeypatch.setattr(jobs, "AGAIN_S", 0.1)
    link = Cuttable(place[1].root)
    heard = []

    def tell(text, share):
        if not any(" of " in t for t in heard) and " of " in text:
            link.down = True
            threading.Timer(1.6, setattr, (link, "down", False)).start()
        heard.append(text)

    report = profile(None, link, mode="sustained", duration_s=3.0, rate_hz=20.0, tell=tell, energy=False)
    assert any("the link broke" in text for text in heard)
    assert len(report.methods[0].samples_s) == pytest.approx(60, abs=3), "the device measured on"
    job = []

    def forever(text, share):
        link.down = link.down or " of " in text

    with pytest.raises(LinkError, match="goes on there") as lost:
        profile(None, link, mode="sustained", duration_s=3.0, rate_hz=20.0, tell=forever, patience_s=0.3, started=job.append, energy=False)
    assert lost.value.exit_code == 3 and lost.value.hint == f"edgesdk profile --attach {job[0]} --on '{link.link}'"
    with pytest.raises(LinkError, match="goes on there"):
        attach(job[0], link, patience_s=0.2)
    link.down = False
    assert attach(job[0], link).how.job == job[0]


@pytest.mark.wide
def test_the_same_over_ssh(tmp_path, place):
    """Through a relay that is cut while the device measures."""
    with serve(tmp_path) as server, contextlib.closing(Link(server.port)) as relay:
        link = server.link(tmp_path / "root", port=relay.port)
        heard = []

        def tell(text, share):
            if not any(" of " in t for t in heard) and " of " in text:
                relay.cut_after(0)
                threading.Timer(1.0, relay.restore).start()
            heard.append(text)

        report = profile(place[0], link, mode="sustained", duration_s=4.0, rate_hz=20.0, tell=tell, energy=False)
        assert any("the link broke" in text for text in heard)
        assert len(report.methods[0].samples_s) == pytest.approx(80, abs=3)


# ---- verdicts


CONDITIONS = Conditions(
    when="2026-01-01T00:00:00+00:00", device="d", link="l", emulated=False, machine="m", system="s", runtime="r", runtime_version="1", threads=1,
    clock_before_hz=2e9, clock_after_hz=2e9,
)  # fmt: skip


def _sustained(medians: list[float]) -> object:
    """Ten calls a chunk of a second."""
    samples = [m * (1 + 0.001 * (i % 3)) for m in medians for i in range(10)]
    chunks = tuple(Chunk(first=10 * i, count=10, start_s=float(i), end_s=i + 0.9, calls=10) for i in range(len(medians)))
    made = method_samples("forward", None, samples, chunks=chunks)
    return made.model_copy(update={"steady": steady(made)})


def test_throttling_is_seen_in_the_series():
    slow = _sustained([1.0] * 10 + [1.5] * 20)
    assert slow.steady.ratio == pytest.approx(1.5, rel=0.01) and slow.steady.changed_at_s == 10.0
    assert slow.steady.burst_p50_s == pytest.approx(1.0, rel=0.01)
    trust = judge(CONDITIONS, [slow])
    assert trust.verdict == "throttled" and "1.50 times the first ones, from 10 s on" in trust.reasons[0]
    crowded = judge(CONDITIONS, [slow], moments=[Moment(at_s=0.0, others=0.5)])
    assert crowded.verdict == "noisy", "who is slowed by others is not throttled"
    even = _sustained([1.0] * 30)
    assert even.steady.changed_at_s is None and judge(CONDITIONS, [even]).verdict == "good"
    assert change([1.0, 1.0]) is None and change([1.0, 1.001, 1.0, 1.002, 1.0, 1.001]) is None
    assert steady(method_samples("m", None, [1.0])) is None


def test_flags_governor_company_and_heat_are_reasons():
    def moments(**more):
        return [Moment(at_s=float(i), **more) for i in range(4)]

    calm = method_samples("forward", None, [1.0] * 30)
    for found, verdict, words in (
        (moments(throttle=("clock capped",)), "throttled", "clock capped at 4 of 4 moments"),
        (moments(throttle=()), "good", ""),
        (moments(others=0.4), "noisy", "other processes took 40% of all cores"),
        (moments(steal=0.1), "noisy", "the hypervisor took 10%"),
        (moments(temperatures_c={"cpu": 91.0}), "throttled", "91 °C at its hottest"),
    ):
        trust = judge(CONDITIONS, [calm], moments=found)
        assert trust.verdict == verdict and words in "; ".join(trust.reasons)
    saving = judge(CONDITIONS.model_copy(update={"governor": "powersave"}), [calm])
    assert saving.verdict == "good" and "powersave, not performance" in saving.reasons[0]
    assert not judge(CONDITIONS.model_copy(update={"governor": "performance"}), [calm]).reasons


def test_a_queue_that_grows_is_told():
    from edgesdk.measured import _queue

    growing = method_samples("forward", None, [0.02] * 60, [0.01 * i for i in range(60)])
    assert "faster" not in str(_queue(growing, 100.0)) and "more than it serves" in str(_queue(growing, 100.0))
    assert _queue(method_samples("forward", None, [0.02] * 60, [1e-5] * 60), 10.0) is None
    assert _queue(growing, 5.0) is None, "it has the time"


def test_an_old_report_is_still_read(sustained):
    report = sustained[0]
    old = json.loads(report.to_json())
    for field in ("how", "moments", "power", "power_reasons", "energy", "memory"):
        del old[field]
    for field in ("starts_s", "waits_s", "wait_p50_s", "wait_p99_s", "every", "chunks", "steady", "summary"):
        del old["methods"][0][field]
    read = Report.from_json(json.dumps(old))
    assert read.how.mode == "warm" and read.moments == () and read.methods[0].samples_s == report.methods[0].samples_s


def test_command_lines(place, capsys):
    def code(*args):
        with pytest.raises(SystemExit) as stop:
            main(["profile", *args, "--on", place[1].link])
        return stop.value.code

    assert code("--status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "profile-jobs"
    assert code("--attach", "p-ffffffff") == 2
    assert "edgesdk profile --status" in capsys.readouterr().err
    assert code("--attach", "p-ffffffff", "--status") == 2
    assert code("--cancel", "../x") == 2
