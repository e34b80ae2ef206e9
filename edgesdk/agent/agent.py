"""The agent: what edgesdk runs on a device. It is sent there with runner.py and its like, as one archive.

This folder's `agent`, `wire`, `facts` and `installed` stand alone: standard library, Python 3.9 and later; numpy only where a program is run.
It answers requests, one framed line each (`LENGTH CRC32 JSON`), from stdin on stdout:

    facts                                             what this machine is, and how warm and fast right now
    look    root                                      everything it tells of itself, as texts
    check   folder [repeat]                           golden inputs through the program in `folder`, against golden outputs
    profile folder runs warmup [method]                 raw times and memory, in a process of its own
    run     folder method inputs                         one call, arrays as base64 .npy
    generate folder prompts settings encoder             answers, event by event, until a request `cancel` comes or the line ends
    health  folder                                    digest of the manifest and sha256 of every member
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from .facts import facts
from .installed import check, generate, health, profile, run
from .look import look
from .wire import Lines, Refused, decode, encode

VERSION = 1
Write = Callable[["dict[str, Any]"], None]
FRESH: dict[str, Callable[..., dict[str, Any]]] = {"check": check, "profile": profile}
VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "facts": facts,
    "look": look,
    "health": health,
    "run": run,
    "generate": generate,
    **FRESH,
}


def in_fresh_process(request: dict[str, Any], write: Write) -> None:
    """`check` and `profile` run in a process of their own: its memory is the program's, its crash is an answer."""
    argv = [sys.executable, "-B", os.path.abspath(sys.argv[0]), "--one"]
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    assert child.stdin and child.stdout
    child.stdin.write(encode(request))
    child.stdin.close()
    answered = False
    for line in child.stdout:
        message = decode(line)
        answered = answered or "progress" not in message
        write(message)
    code = child.wait()
    errors.seek(0)
    complaint = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    errors.close()
    if not answered:
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = "; ".join(complaint) or "the program may use instructions that this CPU does not have"
        write({"id": request["id"], "error": f"the runtime crashed on the device ({reason})", "hint": hint})


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
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints must not get between the frames

    def write(message: dict[str, Any]) -> None:
        out.write(encode(message))
        out.flush()

    fresh = "--one" in sys.argv
    if not fresh:
        write({"hello": "edgesdk-agent", "version": VERSION})
    lines = Lines(0)
    for line in iter(lines.next, b""):
        try:
            request = decode(line)
            if request.get("verb") == "cancel":
                continue  # what it ends has ended
        except (Refused, ValueError):
            write({"id": 0, "error": "the request was damaged on the way", "hint": "run the command again"})
            continue
        answer(request, write, fresh, lines)
