"""Measurements on a device as jobs: begun there, followed over links that break, fetched by their id."""

from __future__ import annotations

import gzip
import hashlib
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from edgesdk.agent.client import Agent, Tell
from edgesdk.errors import CheckFailed, DeviceError, EdgeError, InputError, LinkError
from edgesdk.lease import holder
from edgesdk.transport import Transport, parse_link

PATIENCE_S = 60.0
"""So long a broken link is tried again before the job is left alone."""
POLL_S, AGAIN_S = 10.0, 2.0
OVER = ("done", "failed", "cancelled", "lost")


def new_id() -> str:
    return f"p-{secrets.token_hex(4)}"


def begin(agent: Agent, transport: Transport, job: str, request: dict[str, Any], wait_s: float, lease: bool = True) -> None:
    """Start `request` as the job `job`; the same again is no second job. `lease` False: whoever asks holds the device. Raises `DeviceError`."""
    agent.ask("job_start", root=transport.root, job=job, request=request, who=holder("profile"), wait_s=wait_s, lease=lease)


class Line:
    """A link that is opened anew when it broke."""

    def __init__(self, on: str | Transport) -> None:
        self.on, self.transport = on, parse_link(on) if isinstance(on, str) else on
        self.heard = time.monotonic()  # when the device last answered

    def again(self) -> None:
        if isinstance(self.on, str):
            self.transport.close()
            self.transport = parse_link(self.on)

    def close(self) -> None:
        if isinstance(self.on, str):
            self.transport.close()

    @property
    def name(self) -> str:
        return self.on if isinstance(self.on, str) else self.transport.link


def keep_trying(line: Line, act: Callable[[], dict[str, Any]], job: str, patience_s: float, tell: Tell | None) -> dict[str, Any]:
    """`act`, again and again while only the link fails, until nothing was heard for `patience_s`. Raises `LinkError` that names the job."""
    line.heard = time.monotonic()
    while True:
        try:
            return act()
        except DeviceError as error:
            if error.fields.get("answered") or "job" in error.fields:
                raise
            if time.monotonic() - line.heard >= patience_s:
                what = f"{line.transport.link}: the link is gone ({error.what}); the job {job} goes on there"
                raise LinkError(what, f"edgesdk profile --attach {job} --on '{line.name}'", job=job) from None
            if tell:
                tell(f"the link broke, trying again ({error.what})", 0.0)
            time.sleep(min(AGAIN_S, patience_s))
            line.again()


def follow(line: Line, job: str, *, python: str | None = None, tell: Tell | None = None, patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """The job's result, once it has one. Raises what it ended with, and `LinkError` where the link stays broken."""
    state = keep_trying(line, lambda: _to_its_end(line, job, python, tell), job, patience_s, tell)
    if state["state"] != "done":
        raise ended(line.transport.link, state)

    def fetched() -> dict[str, Any]:
        content = line.transport.get(f"{line.transport.root}/jobs/{job}/result.json.gz")
        if hashlib.sha256(content).hexdigest() != state["sha256"]:
            raise CheckFailed(f"{line.transport.link}: the result of the job {job} is damaged", "a bad memory or disk? measure again")
        answer: dict[str, Any] = json.loads(gzip.decompress(content))
        return answer

    return keep_trying(line, fetched, job, patience_s, tell)


def _to_its_end(line: Line, job: str, python: str | None, tell: Tell | None) -> dict[str, Any]:
    seen = -1
    with Agent(line.transport, python) as agent:
        while True:
            state = agent.ask("job", timeout_s=POLL_S + 50.0, root=line.transport.root, job=job, seen=seen, wait_s=POLL_S)
            seen, line.heard = state["step"], time.monotonic()
            if state["state"] in OVER:
                return state
            if tell:
                tell(*state["progress"])


def ended(link: str, state: dict[str, Any]) -> EdgeError:
    """How a job that has no result ended."""
    kind = InputError if state.get("bad_input") else DeviceError
    return kind(f"{link}: {state['error']}", str(state.get("hint", "")), job=state["job"])


def state_of(line: Line, job: str, python: str | None = None) -> dict[str, Any]:
    """What a job last said. Raises `InputError` where the device has none of that id."""
    with Agent(line.transport, python) as agent:
        return agent.ask("job", root=line.transport.root, job=job)


def jobs(on: str | Transport, python: str | None = None) -> list[dict[str, Any]]:
    """The measurements on a device that run or have ended of late, the newest first: job, state, since, who, progress, …"""
    line = Line(on)
    try:
        with Agent(line.transport, python) as agent:
            found: list[dict[str, Any]] = agent.ask("jobs", root=line.transport.root)["jobs"]
            return found
    finally:
        line.close()


def cancel(job: str, on: str | Transport, python: str | None = None) -> dict[str, Any]:
    """End a job and give the device back; its state behind that. Raises `InputError` where the device has none of that id."""
    line = Line(on)
    try:
        with Agent(line.transport, python) as agent:
            return agent.ask("job_cancel", root=line.transport.root, job=job)
    finally:
        line.close()
