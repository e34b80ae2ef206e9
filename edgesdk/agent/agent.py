"""The agent: what edgesdk runs on a device. It is sent there with runner.py and its like, as one archive.

This folder's files but `client` and `frames` stand alone: standard library, Python 3.9 and later; numpy only where a program is run.
It answers requests, one framed line each (`LENGTH CRC32 JSON`), from stdin on stdout:

    facts                                             what this machine is
    look    root                                      everything it tells of itself, as texts
    speed   root last_cache_bytes                     how fast its memory, arithmetic and disk are
    rates   sizes                                     how fast one thread reads, by level of its caches
    time    folder runtime threads method inputs      seconds a call of one method of a calibration program
    check   folder [repeat]                           golden inputs through the program in `folder`, against golden outputs
    profile folder runs warmup [method …]               raw times and memory, in a process of its own
    cold    folder spawned_ns [method]                  one fresh process from its start to its first answer
    job_start root job request who wait_s             begin a measurement that goes on without the link; its state
    job     root job [seen wait_s]                    its state, once it is another than `seen`
    jobs    root                                      those that are there
    job_cancel root job                               end one
    run     folder method inputs                         one call, arrays as base64 .npy
    generate folder prompts settings encoder             answers, event by event, until a request `cancel` comes or the line ends
    health  folder                                    digest of the manifest and sha256 of every member
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from .facts import facts
from .fresh import ONE, in_fresh_process
from .installed import check, generate, health, run
from .jobs import JOB, cancel, listed, start, status, work
from .look import look
from .measure import cold_once, profile
from .speed import speed
from .timing import rates, time_method
from .wire import VERSION, Lines, Refused, decode, encode

Write = Callable[["dict[str, Any]"], None]
FRESH: dict[str, Callable[..., dict[str, Any]]] = {"check": check, "profile": profile, "cold": cold_once, "speed": speed}
VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "facts": facts,
    "look": look,
    "rates": rates,
    "time": time_method,
    "health": health,
    "run": run,
    "generate": generate,
    "job_start": start,
    "job": status,
    "jobs": listed,
    "job_cancel": cancel,
    **FRESH,
}


def answer(request: dict[str, Any], write: Write, fresh: bool, lines: Lines) -> None:
    verb = request.pop("verb", "")
    number = request.pop("id", 0)
    try:
        if verb not in VERBS:
            raise Refused(f"the agent has no verb '{verb}'", "known: " + ", ".join(sorted(VERBS)))
        if verb == "profile":
            request["tell"] = lambda text, share: write({"id": number, "progress": [text, share]})
        if verb == "generate":
            request.update(tell=lambda event: write({"id": number, "event": event}), cancelled=lines.cancelled)
        if verb in FRESH and not fresh:
            request.pop("tell", None)
            in_fresh_process({"verb": verb, "id": number, **request}, write)
            return
        write({"id": number, "ok": VERBS[verb](**request)})
    except Refused as error:
        write({"id": number, "error": error.what, "hint": error.hint, "bad_input": error.bad_input})
    except Exception as error:
        write({"id": number, "error": f"{verb} failed: {type(error).__name__}: {error}", "hint": ""})


def main() -> None:
    if JOB in sys.argv:
        work(sys.argv[-1])
        return
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints must not get between the frames

    def write(message: dict[str, Any]) -> None:
        out.write(encode(message))
        out.flush()

    fresh = ONE in sys.argv
    if not fresh:
        write({"hello": "edgesdk-agent", "version": VERSION})
    lines = Lines(0)
    for line in iter(lines.next, b""):
        try:
            request = decode(line)
            if request.get("verb") == "cancel":
                continue  # what it ends has ended
        except Refused:
            write({"id": 0, "error": "the request was damaged on the way", "hint": "run the command again"})
            continue
        answer(request, write, fresh, lines)
