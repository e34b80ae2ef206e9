"""Timed calls of the program in a folder: warm, in bursts, sustained, on a schedule, or each in a fresh process. Goes to the device as it is.

Calls come in chunks; between two of them the machine is looked at (`moments`). All times are on one clock, CLOCK_MONOTONIC from `epoch_ns` on, which
processes share. The run time of a call and its wait in the queue are never added up.
"""

from __future__ import annotations

import base64
import importlib
import math
import os
import tempfile
import time
from array import array
from collections.abc import Callable
from typing import Any

from .facts import own_bytes
from .installed import import_runtime, inputs_for, manifest_of, numpy_runner, open_runner, timed
from .moments import Tree, Watcher
from .wire import Refused

Tell = Callable[[str, float], None]
MOST_SAMPLES = 20_000
"""Of a method; of more calls one in so many is a sample."""
CHUNK_S = 1.0
CHUNKS = 60
"""Of a sustained run, at most, each a second long at least."""
BURST_CALLS, PAUSE_S = 10, 1.0
SPIN_NS = 500_000
"""So long before an arrival sleep ends: to wake up late is no wait in a queue."""
OPERATOR_RUNS = 30


class Arrivals:
    """Calls come at a steady rate, whether the device keeps up or not."""

    def __init__(self, rate_hz: float) -> None:
        self.period = 1e9 / rate_hz
        self.due = float(time.monotonic_ns())

    def wait(self) -> int:
        """Until the next one has come; when it did."""
        due, now = self.due, time.monotonic_ns()
        if due - now > SPIN_NS:
            time.sleep((due - now - SPIN_NS) / 1e9)
        while time.monotonic_ns() < due:
            pass
        self.due += self.period
        return int(due)


class Series:
    """The calls of one method, in order."""

    def __init__(self, method: str, call: Callable[[], Any], first_s: float) -> None:
        self.method, self.call, self.first_s, self.every, self.calls = method, call, first_s, 1, 0
        self.samples, self.starts, self.waits = array("q"), array("q"), array("q")  # nanoseconds
        self.chunks: list[tuple[int, int, int, int, int]] = []

    def warm(self, calls: int, expected_s: float | None, rate_hz: float | None) -> None:
        """Calls that do not count; from them it is known how many calls are to come in `expected_s`, where no rate says so."""
        took = []
        for _ in range(max(calls, 1 if expected_s else 0)):
            begun = time.monotonic_ns()
            self.call()
            took.append(time.monotonic_ns() - begun)
        if expected_s and took:
            rate = min(rate_hz or math.inf, 1e9 / max(1, min(took)))
            self.every = max(1, math.ceil(expected_s * rate / MOST_SAMPLES))

    def chunk(self, most: int, until_ns: float, arrivals: Arrivals | None = None) -> None:
        """Calls without a pause, `most` of them or until a time; at least one, but where none arrives before."""
        now, call, every, before, first = time.monotonic_ns, self.call, self.every, self.calls, len(self.samples)
        begun = now()
        while self.calls - before < most:
            if arrivals is not None:
                if arrivals.due >= until_ns:
                    time.sleep(max(0.0, until_ns - now()) / 1e9)
                    break
                due = arrivals.wait()
            start = now()
            call()
            end = now()
            if self.calls % every == 0:
                self.samples.append(end - start)
                self.starts.append(start)
                if arrivals is not None:
                    self.waits.append(start - due)
            self.calls += 1
            if end >= until_ns:
                break
        self.chunks.append((first, len(self.samples) - first, begun, now(), self.calls - before))

    def answer(self, epoch_ns: int) -> dict[str, Any]:
        return {
            "method": self.method, "first_s": self.first_s, "every": self.every, "samples_s": [s / 1e9 for s in self.samples],
            "starts_s": [(s - epoch_ns) / 1e9 for s in self.starts], "waits_s": [w / 1e9 for w in self.waits],
            "chunks": [(first, count, (start - epoch_ns) / 1e9, (end - epoch_ns) / 1e9, calls) for first, count, start, end, calls in self.chunks],
        }  # fmt: skip


class Session:
    """What the modes share: the clock, the moments, who is told."""

    def __init__(self, request: dict[str, Any], tell: Tell) -> None:
        self.mode, self.runs, self.warmup = request.get("mode", "warm"), int(request["runs"]), int(request["warmup"])
        self.duration_s, self.epoch_ns = request.get("duration_s"), int(request.get("epoch_ns") or time.monotonic_ns())
        rate = request.get("rate_hz")
        self.rate = float(rate) if rate else None
        self.arrivals: Arrivals | None = None
        self.tree, self.tell = Tree(request.get("root", "/")), tell
        self.watcher, self.moments = Watcher(self.tree), list[dict[str, Any]]()

    def moment(self) -> None:
        """The machine as it is now; the schedule of arrivals stands still meanwhile."""
        begun = time.monotonic_ns()
        self.moments.append({"at_s": (begun - self.epoch_ns) / 1e9, **self.watcher.moment()})
        if self.arrivals:
            self.arrivals.due += time.monotonic_ns() - begun

    def in_turn(self, series: list[Series]) -> None:
        """One method behind the other, in chunks of a second or in bursts."""
        for position, s in enumerate(series):
            length = self.duration_s / len(series) if self.duration_s else None
            s.warm(self.warmup, length, self.rate)
            self.moment()
            self.arrivals = Arrivals(self.rate) if self.rate else None
            begun = time.monotonic_ns()
            end = begun + length * 1e9 if length else math.inf
            while (time.monotonic_ns() < end) if length else (s.calls < self.runs):
                left = MOST_SAMPLES * s.every if length else self.runs - s.calls
                most = min(left, BURST_CALLS) if self.mode == "burst" else left
                s.chunk(most, min(end, time.monotonic_ns() + CHUNK_S * 1e9), self.arrivals)
                self.moment()
                done = (time.monotonic_ns() - begun) / (length * 1e9) if length else s.calls / self.runs
                self.tell(f"{s.method} {s.calls}" + ("" if length else f"/{self.runs}"), (position + min(1.0, done)) / len(series))
                if self.mode == "burst" and done < 1.0:
                    time.sleep(PAUSE_S)

    def sustained(self, series: list[Series]) -> None:
        """All methods in turn, chunk by chunk, so that each sees the whole time."""
        assert self.duration_s
        for s in series:
            s.warm(self.warmup, self.duration_s / len(series), self.rate)
        self.moment()
        self.arrivals = Arrivals(self.rate) if self.rate else None
        begun = time.monotonic_ns()
        end, length = begun + self.duration_s * 1e9, max(CHUNK_S, self.duration_s / CHUNKS) * 1e9
        while (now := time.monotonic_ns()) < end:
            for s in series:
                if (now := time.monotonic_ns()) < end:
                    s.chunk(1 << 60, min(end, now + length), self.arrivals)
                    self.moment()
            self.tell(f"{(now - begun) / 1e9:.0f} of {self.duration_s:.0f} s", min(1.0, (now - begun) / (end - begun)))


def wanted(manifest: dict[str, Any], method: str | None) -> list[str]:
    """The methods to measure. Raises `Refused` for one that the bundle has not."""
    if method and method not in manifest["methods"]:
        raise Refused(f"no method '{method}'; known: {', '.join(manifest['methods'])}", "give one of them with --method", True)
    return [method] if method else list(manifest["methods"])


def profile(
    folder: str, runs: int, warmup: int, method: str | None = None, tell: Tell = lambda text, share: None, **request: Any
) -> dict[str, Any]:
    """Raw seconds and memory of this process: it must be a fresh one. `request`: mode, duration_s, rate_hz, operators, epoch_ns, root."""
    session = Session({"runs": runs, "warmup": warmup, **request}, tell)
    manifest = manifest_of(folder)
    methods = wanted(manifest, method)
    loaded, runner, first = load(folder, manifest, methods)
    series = [Series(n, _call(runner, n, inputs_for(folder, manifest, runner, n)), first[n]) for n in methods]
    pss = [pss_bytes(session.tree)]
    (session.sustained if session.mode == "sustained" else session.in_turn)(series)
    results = [s.answer(session.epoch_ns) for s in series]
    if method is None and session.mode == "warm" and not session.duration_s and os.path.exists(os.path.join(folder, "sequence.json")):
        answers = importlib.import_module("sequence.measure")
        results += answers.measure(runner.run, folder, lambda name: inputs_for(folder, manifest, runner, name), runs, warmup, tell)
        session.moment()
    pss.append(pss_bytes(session.tree))
    memory, reasons = memory_of(session.tree, pss)
    found = operators(folder, manifest, runner, methods) if request.get("operators") else None
    return {**loaded, "methods": results, "moments": session.moments, "memory": memory, "memory_reasons": reasons, "operators": found}


def _call(runner: Any, method: str, inputs: list[Any]) -> Callable[[], Any]:
    return lambda: runner.run(method, inputs)


def load(folder: str, manifest: dict[str, Any], methods: list[str]) -> tuple[dict[str, Any], Any, dict[str, float]]:
    """(seconds and memory of importing and loading twice, the runner, the first call of each method)"""
    numpy_runner()
    rss_start = own_bytes("VmRSS")
    start = time.perf_counter_ns()
    import_runtime(manifest["runtime"])
    import_s = (time.perf_counter_ns() - start) / 1e9
    try:  # forget the peak that importing made
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    rss_before = own_bytes("VmRSS")
    load_s: list[float] = []
    runner: Any = None
    for _ in range(2):
        runner = None
        start = time.perf_counter_ns()
        runner = open_runner(folder, manifest)
        for name in methods:
            runner.inputs(name)
        load_s.append((time.perf_counter_ns() - start) / 1e9)
        if len(load_s) == 1:
            first = {name: timed(runner, name, inputs_for(folder, manifest, runner, name)) for name in methods}
            peak_cold = own_bytes("VmHWM")
    return {
        "import_s": import_s, "load_cold_s": load_s[0], "load_warm_s": load_s[1], "rss_start_bytes": rss_start, "rss_before_load_bytes": rss_before,
        "peak_rss_bytes": peak_cold, "runtime_version": runner.version,
    }, runner, first  # fmt: skip


# ---- memory


def pss_bytes(tree: Tree) -> int | None:
    for line in tree.read("/proc/self/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


def memory_of(tree: Tree, pss: list[int | None]) -> tuple[dict[str, int | None], dict[str, str]]:
    """({"pss", "gpu"} in bytes or None, why each None)"""
    seen = [p for p in pss if p is not None]
    gpu, why = gpu_bytes(tree)
    reasons = {} if seen else {"pss": "this kernel has no /proc/self/smaps_rollup"}
    return {"pss": max(seen) if seen else None, "gpu": gpu}, {**reasons, **({"gpu": why} if gpu is None else {})}


def gpu_bytes(tree: Tree) -> tuple[int | None, str]:
    """Memory that this process holds of a Jetson's GPU: nvmap's list of clients (`user  process  pid  sizeK`)."""
    path = "/sys/kernel/debug/nvmap/iovmm/clients"
    try:
        text = tree.must(path)
    except PermissionError:
        return None, f"{path} may be read by root only"
    except OSError:
        return None, "no GPU here lists its memory by process"
    pid = str(os.getpid())
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 4 and fields[2] == pid and fields[3].rstrip("K").isdigit():
            return int(fields[3].rstrip("K")) * 1024, ""
    return None, "the process holds nothing of the GPU"


# ---- operators


def operators(folder: str, manifest: dict[str, Any], runner: Any, methods: list[str]) -> dict[str, Any]:
    """{"rows": [[method, unit, operation, seconds …]], "route"}, or {"etdump", "runs"}, or {"reason"}: what the runtime tells of its own steps."""
    if hasattr(runner, "steps"):
        rows = []
        for name in methods:
            found = runner.steps(name, inputs_for(folder, manifest, runner, name), OPERATOR_RUNS)
            rows += [[name, *row] for row in found or []]
        if rows:
            return {
                "rows": rows,
                "route": f"each step of the program timed on the device, median of {OPERATOR_RUNS} runs; a time holds one call from Python",
            }
    if manifest["runtime"] == "executorch":
        return _etdump(folder, manifest, methods)
    return {"reason": f"the Python package of '{manifest['runtime']}' tells no times of single operators"}


def _etdump(folder: str, manifest: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """What ExecuTorch's own tracer wrote, where this build has one."""
    runner = importlib.import_module("runner")
    with tempfile.TemporaryDirectory() as place:
        path = os.path.join(place, "etdump")
        error = runner.trace(os.path.join(folder, manifest["program"]), {n: inputs_for(folder, manifest, runner, n) for n in methods}, path)
        if error:
            return {"reason": error}
        with open(path, "rb") as file:
            return {"etdump": base64.b64encode(file.read()).decode()}


# ---- cold


def drop_cache(tree: Tree, folder: str) -> str:
    """Let the next run read from the disk; in words, what was done."""
    os.sync()
    try:
        with open(tree.root + "/proc/sys/vm/drop_caches", "w") as file:
            file.write("1")
        return "dropped"
    except OSError:
        pass
    try:
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "the bundle's files dropped, not the interpreter's and the runtime's: that needs root"
    except (OSError, AttributeError) as error:
        return f"not dropped: {error}"


def cold_once(folder: str, spawned_ns: int, method: str | None = None) -> dict[str, Any]:
    """One fresh process from its start to its first answer."""
    begun = time.monotonic_ns()
    manifest = manifest_of(folder)
    name = wanted(manifest, method)[0]
    numpy_runner()
    import_runtime(manifest["runtime"])
    imported = time.monotonic_ns()
    runner = open_runner(folder, manifest)
    inputs = inputs_for(folder, manifest, runner, name)
    loaded = time.monotonic_ns()
    runner.run(name, inputs)
    done = time.monotonic_ns()
    marks = [spawned_ns, begun, imported, loaded, done]
    parts = [(marks[i + 1] - marks[i]) / 1e9 for i in range(4)]
    return {"parts": parts, "version": runner.version, "peak_rss_bytes": own_bytes("VmHWM")}


COLD_PARTS = ("start of the process", "import", "load", "first call", "start to first answer")


def cold(request: dict[str, Any], child: Callable[[dict[str, Any]], dict[str, Any]], tell: Tell) -> dict[str, Any]:
    """`runs` fresh processes, started by `child`, none while another runs."""
    session = Session(request, tell)
    rows: list[list[float]] = []
    starts: list[float] = []
    chunks = []
    answer: dict[str, Any] = {}
    peaks = []
    for i in range(session.runs):
        dropped = drop_cache(session.tree, request["folder"])
        session.moment()
        spawned = time.monotonic_ns()
        answer = child({"verb": "cold", "folder": request["folder"], "method": request.get("method"), "spawned_ns": spawned})
        parts = answer["parts"]
        rows.append([*parts, sum(parts)])
        starts.append((spawned - session.epoch_ns) / 1e9)
        chunks.append((i, 1, starts[-1], (time.monotonic_ns() - session.epoch_ns) / 1e9, 1))
        peaks.append(answer["peak_rss_bytes"])
        tell(f"fresh process {i + 1}/{session.runs}", (i + 1) / session.runs)
    session.moment()
    method = request.get("method") or manifest_of(request["folder"])["methods"][0]
    methods = []
    for k, part in enumerate(COLD_PARTS):
        name = f"{part}: {method}" if k >= 3 else part
        times = [row[k] for row in rows]
        whole = part == COLD_PARTS[-1]  # chunks are of whole runs, and so is their energy
        methods.append(
            {"method": name, "first_s": None, "samples_s": times, "starts_s": starts if whole else [], "chunks": chunks if whole else []}
        )
    columns = list(zip(*rows))  # noqa: B905
    middle = [sorted(c)[len(c) // 2] for c in columns]
    return {
        "methods": methods, "moments": session.moments, "page_cache": dropped, "import_s": middle[1], "load_cold_s": middle[2], "load_warm_s": None,
        "rss_start_bytes": None, "rss_before_load_bytes": None, "peak_rss_bytes": max((p for p in peaks if p), default=None), "runtime_version": answer["version"],
        "memory": {}, "memory_reasons": {"pss": "not read in cold runs", "gpu": "not read in cold runs"}, "operators": None,
    }  # fmt: skip
