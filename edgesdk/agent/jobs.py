"""Measurements that go on when the link is gone. Goes to the device as it is.

A job is a process of its own session in ROOT/jobs/ID: `request.json`, `state.json` (replaced in one move at each step), `result.json.gz` and `log`.
It holds the device's lease (a lock on ROOT/lease, see `edgesdk.lease`) by itself while it works. A process that is gone without having said so,
or a machine that was started anew, is told as such by whoever looks next.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from .fresh import in_fresh_process
from .measure import cold
from .moments import Tree
from .sensors import Sampler, find
from .wire import Refused

KEEP = 8
"""Jobs that have ended stay until so many newer ones have."""
IDLE_S = 3.0
"""Of a device at rest, before anything is started, where a power sensor works."""
LEASE_S = 15.0
"""The lease is waited for so long at least: whoever starts a job gives it back right after."""
BORN_S = 20.0
OVER = ("done", "failed", "cancelled", "lost")
JOB = "--job"


class Cancelled(BaseException):
    """SIGTERM came."""


def place_of(root: str, job: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{2,39}", job):
        raise Refused(f"'{job}' is no job's id", "`edgesdk profile --status` lists them", True)
    return os.path.join(root, "jobs", job)


def replace(path: str, content: bytes) -> None:
    """Whole and on the disk, or what was there before."""
    with open(path + ".part", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


def boot_id() -> str:
    return Tree().read("/proc/sys/kernel/random/boot_id")


def started_at(pid: int) -> str:
    """What tells a process from a later one of the same number; nothing where it is gone or a zombie."""
    fields = Tree().read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


# ---- asked by the agent


def start(root: str, job: str, request: dict[str, Any], who: str = "", wait_s: float = 0.0, lease: bool = True) -> dict[str, Any]:
    """Begin a job, unless it is there already (a start whose answer was lost is asked for again); its state."""
    root = os.path.abspath(root)
    request["folder"] = os.path.abspath(request["folder"])
    place = place_of(root, job)
    if not os.path.exists(os.path.join(place, "state.json")):
        os.makedirs(place, exist_ok=True)
        clean(root)
        said = {"job": job, "root": root, "request": request, "who": who, "wait_s": wait_s, "lease": lease}
        replace(os.path.join(place, "request.json"), json.dumps(said).encode())
        with open(os.path.join(place, "log"), "ab") as log:
            argv = [sys.executable, "-B", os.path.abspath(sys.argv[0]), JOB, place]
            born = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + BORN_S
        born.wait(BORN_S)
        while not os.path.exists(os.path.join(place, "state.json")):
            if time.monotonic() > until:
                raise Refused(f"the job did not start: {last_line(place)}", "look at the line above, then run the command again")
            time.sleep(0.02)
    return status(root, job)


def last_line(place: str) -> str:
    lines = Tree().read(os.path.join(place, "log")).splitlines()
    return lines[-1] if lines else "no word of it"


def status(root: str, job: str, seen: int = -1, wait_s: float = 0.0) -> dict[str, Any]:
    """A job's state; waits until it is another one than `seen`, or for so long."""
    place, until = place_of(root, job), time.monotonic() + wait_s
    if not os.path.isdir(place):
        raise Refused(f"no job '{job}' on this device", "`edgesdk profile --status` lists those that it has", True)
    while True:
        state = look(place, job)
        if state["state"] in OVER or state["step"] != seen or time.monotonic() >= until:
            return state
        time.sleep(0.05)


def look(place: str, job: str) -> dict[str, Any]:
    """What a job last said, and whether that can still be true."""
    try:
        with open(os.path.join(place, "state.json"), "rb") as file:
            state: dict[str, Any] = json.loads(file.read())
    except (OSError, ValueError):
        return {
            "job": job,
            "state": "lost",
            "step": 0,
            "error": f"the job {job} left no state",
            "hint": "the device may have lost power; measure again",
        }
    if state["state"] in OVER:
        return state
    if state["boot_id"] != boot_id():
        error, hint = f"the device was started anew while the job {job} ran: nothing was measured to its end", "measure again"
    elif started_at(state["pid"]) != state["started"]:
        error, hint = f"the job {job} ended without a word: {last_line(place)}", "killed, or out of memory? measure again"
    else:
        return state
    return {**state, "state": "lost", "error": error, "hint": hint}


def listed(root: str) -> dict[str, Any]:
    """All jobs there are, the newest first."""
    found = []
    place = os.path.join(root, "jobs")
    for job in os.listdir(place) if os.path.isdir(place) else []:
        with contextlib.suppress(Refused):
            found.append(look(place_of(root, job), job))
    return {"jobs": sorted(found, key=lambda s: str(s.get("since", "")), reverse=True)}


def cancel(root: str, job: str) -> dict[str, Any]:
    """End a job; its state behind that."""
    state = status(root, job)
    if state["state"] not in OVER:
        with contextlib.suppress(ProcessLookupError):
            os.kill(state["pid"], signal.SIGTERM)
        until = time.monotonic() + 10.0
        while state["state"] not in OVER and time.monotonic() < until:
            time.sleep(0.05)
            state = status(root, job)
    return state


def clean(root: str) -> None:
    """Remove what old jobs left; one without a state may be about to be born."""
    ended = [s for s in listed(root)["jobs"] if s["state"] in OVER]
    for place in [place_of(root, s["job"]) for s in ended[KEEP:]]:
        if os.path.exists(os.path.join(place, "state.json")) or abs(time.time() - os.stat(place).st_mtime) > 2 * BORN_S:
            shutil.rmtree(place, ignore_errors=True)


# ---- the job itself


class Job:
    """What the process of a job does and says."""

    def __init__(self, place: str) -> None:
        self.place = place
        with open(os.path.join(place, "request.json"), "rb") as file:
            said = json.loads(file.read())
        self.root, self.request, self.wait_s, self.lease = said["root"], said["request"], said["wait_s"], said["lease"]
        self.told = 0.0
        pid = os.getpid()
        self.state: dict[str, Any] = {
            "job": said["job"], "state": "waiting", "step": 0, "progress": ["waiting for the device", 0.0], "pid": pid, "started": started_at(pid),
            "boot_id": boot_id(), "who": said["who"], "since": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "request": said["request"],
        }  # fmt: skip

    def say(self, **news: Any) -> None:
        self.state = {**self.state, **news, "step": self.state["step"] + 1}
        replace(os.path.join(self.place, "state.json"), json.dumps(self.state).encode())

    def tell(self, text: str, share: float) -> None:
        if time.monotonic() - self.told > 0.5:
            self.told = time.monotonic()
            self.say(progress=[text, share])

    def run(self) -> None:
        """From the lease to the result; every end is said."""
        signal.signal(signal.SIGTERM, _cancelled)
        try:
            self.say()
            with self.leased():
                self.say(state="running", progress=["starting", 0.0])
                result = self.measured()
                packed = gzip.compress(json.dumps(result).encode(), 6)
                replace(os.path.join(self.place, "result.json.gz"), packed)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.say(state="done", progress=["done", 1.0], sha256=hashlib.sha256(packed).hexdigest(), size_bytes=len(packed))
        except Cancelled:
            self.say(state="cancelled", error="the job was cancelled", hint="")
        except Refused as error:
            self.say(state="failed", error=error.what, hint=error.hint, bad_input=error.bad_input)
        except Exception as error:
            self.say(state="failed", error=f"the measurement failed: {type(error).__name__}: {error}", hint="")

    @contextlib.contextmanager
    def leased(self) -> Iterator[None]:
        """Hold the device, unless whoever asks holds it. Raises `Refused` that names who does, if they still do after the wait."""
        if not self.lease:
            yield
            return
        os.makedirs(self.root, exist_ok=True)
        until = time.monotonic() + max(LEASE_S, self.wait_s)
        with open(os.path.join(self.root, "lease"), "a+") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > until:
                        file.seek(0)
                        holder = " ".join(file.read().split()) or "somebody"
                        raise Refused(f"in use by {holder}", "wait until they are done, or say how long: --wait 10min") from None
                    time.sleep(0.05)
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                os.ftruncate(file.fileno(), 0)
                os.pwrite(file.fileno(), f"{self.state['who']} (job {self.state['job']})".encode(), 0)
            yield

    def measured(self) -> dict[str, Any]:
        """What the processes that measure answered, with the power over the same time."""
        tree = Tree(self.request.get("root", "/"))
        epoch = time.monotonic_ns()
        sampler: Sampler | None = None
        reasons: list[str] = []
        idle: list[float] = []
        if self.request.get("energy", True):
            sensor, reasons = find(tree)
            if sensor is not None:
                sampler = Sampler(sensor, lambda: (time.monotonic_ns() - epoch) / 1e9)
                sampler.start()
                self.say(progress=["at rest, for the idle power", 0.0])
                begun = sampler.now()
                time.sleep(IDLE_S)
                idle = [begun, sampler.now()]
        try:
            request = {**self.request, "epoch_ns": epoch}
            if request.get("mode") == "cold":
                answer = cold(request, self.child, self.tell)
            else:
                answer = self.child({"verb": "profile", **{k: v for k, v in request.items() if k not in ("energy", "host")}})
        finally:
            power = sampler.end() if sampler else None
        if power and "reason" in power:
            reasons.append(power.pop("reason"))
            power = None
        return {**answer, "power": power and {**power, "idle": idle}, "power_reasons": reasons, "page_cache": answer.get("page_cache")}

    def child(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of a fresh process. Raises `Refused`."""
        last: list[dict[str, Any]] = []

        def heard(message: dict[str, Any]) -> None:
            if "progress" in message:
                self.tell(*message["progress"])
            else:
                last.append(message)

        in_fresh_process({"id": 1, **request}, heard)
        (message,) = last[-1:]
        if "error" in message:
            raise Refused(message["error"], message.get("hint", ""), message.get("bad_input", False))
        ok: dict[str, Any] = message["ok"]
        return ok


def _cancelled(*_: Any) -> None:
    raise Cancelled


def work(place: str) -> None:
    """The process of a job: whoever started it sees it end at once, and nothing that ends with the link reaches it."""
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Job(place).run()
