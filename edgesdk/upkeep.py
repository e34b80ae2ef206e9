"""What is put in order on a device before and behind an install, as steps: switches that were cut off, and what is no more needed."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from edgesdk.agent.client import agent_files, agent_folder
from edgesdk.errors import DeviceError, LinkError
from edgesdk.history import Recorder, unfinished
from edgesdk.survey import Survey
from edgesdk.transport.base import Blob
from edgesdk.transport.scripts import REMOVE, UNLINK, script
from edgesdk.transport.steps import Ask, Link, Put, Run, Step

Steps = Generator[Step, Any, None]
OLD_AGENTS = 1
"""Kept beside one's own: another machine's edgesdk may be of another version."""


def send_agent(before: Survey, root: str) -> Steps:
    """What the device lacks of the agent."""
    for name, data in agent_files().items():
        blob = Blob.of(data)
        if before.agent.get(name) != blob.sha256:
            yield Put(f"{agent_folder(root)}/{name}", blob, blob.sha256, blob.size_bytes)


def recover(before: Survey, root: str, python: str) -> Steps:
    """Finish a switch that was cut off if what it led to is there and whole; else undo it. What is current was whole at every moment."""
    cut = unfinished(before.history)
    if cut is None:
        return
    new, old, older = cut
    recorder = Recorder(root, before.history)
    old = old if old in before.good else None
    if before.current == new:
        yield from send_agent(before, root)
        try:
            state = yield Ask("health", (("folder", f"{root}/store/{new}"),), "a switch was cut off: is it whole?")
        except LinkError:
            raise
        except DeviceError:  # it is not what this device runs
            state = {"digest": "", "bad": []}
        if state["digest"] == new and not state["bad"]:
            yield from _point(root, "previous", old, before.previous, python)
            yield recorder.step("finished", new, "a switch that was cut off")
            return
        yield from _point(root, "current", old, before.current, python)
    yield from _point(root, "previous", older if older in before.good else None, before.previous, python)
    yield recorder.step("undone", new, "a switch that was cut off")


def _point(root: str, link: str, wanted: str | None, has: str | None, python: str) -> Steps:
    if wanted == has:
        return
    if wanted:
        yield Link(f"{root}/{link}", f"store/{wanted}", python)
    else:
        yield Run(script("unlink", UNLINK, f"{root}/{link}"), "there was nothing before")


def last_good(state: Survey) -> str | None:
    """The bundle that was last found good here and is still there."""
    told = [e.digest for e in sorted(state.history, key=lambda e: -e.number) if e.action in ("installed", "finished", "rolled-back")]
    known = [d for d in (*told, *state.good) if d and state.good.get(d)]
    return known[0] if known else None


def spare(state: Survey, root: str, *, keep: int, resumed: str | None) -> list[str]:
    """Folders that may go: bundles beyond the `keep` newest, never the current, the previous or the last good one; cut transfers but
    the one of the bundle `resumed`; what was half removed; agents of other versions."""
    must = {d for d in (state.current, state.previous, last_good(state)) if d}
    others = [d for d in state.good if d not in must]
    own = agent_folder(root)
    strange = [f"{root}/{a}" for a in state.agents if f"{root}/{a}" != own]
    return [
        *(f"{root}/store/{d}" for d in others[max(0, keep - len(must)) :]),
        *(f"{root}/store/{p}" for p in state.parts if p != f"{resumed}.part"),
        *(f"{root}/{g}" for g in state.gone),
        *strange[OLD_AGENTS:],
    ]


def remove(folders: list[str], why: str) -> Steps:
    """A step that removes `folders`, or none."""
    if folders:
        yield Run(script("remove", REMOVE, *folders), why)
