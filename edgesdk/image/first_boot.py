"""Runs on the device, once, at its first boot: `first_boot.py ROOT AGENT`. Standard library, Python 3.9 and later.

Checks the golden outputs of the bundle that came with the image, with the agent; makes it current if they are right; notes the result in
ROOT/first-boot.json, where `edgesdk flash --status` finds it. A bundle that fails is never current.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from typing import Any


def ask(agent: str, verb: str, folder: str) -> dict[str, Any]:
    """The agent's answer, as a dict with "ok" or with "error"."""
    wire = importlib.import_module("agent.wire")
    request = wire.encode({"verb": verb, "id": 1, "folder": folder})
    done = subprocess.run([sys.executable, "-B", agent], input=request, capture_output=True, check=False)
    for line in done.stdout.splitlines():
        try:
            message = wire.decode(line)
        except (wire.Refused, ValueError):
            continue
        if message.get("id") == 1 and ("ok" in message or "error" in message):
            found: dict[str, Any] = message
            return found
    tail = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    return {"error": "the agent ended without an answer", "hint": "; ".join(tail)}


def judge(agent: str, store: str, digest: str) -> tuple[str, str, list[Any]]:
    """What is wrong, what to do, and the golden cases."""
    health = ask(agent, "health", store)
    if "error" in health:
        return health["error"], health.get("hint", ""), []
    state = health["ok"]
    if state["digest"] != digest or state["bad"]:
        return "damaged on the disk: " + (", ".join(state["bad"]) or "manifest.json"), "write the image again", []
    answer = ask(agent, "check", store)
    if "error" in answer:
        return answer["error"], answer.get("hint", ""), []
    cases = answer["ok"]["cases"]
    wrong = ["{}[{}]".format(c["method"], c["case"]) for c in cases if not c["ok"]]
    hint = "the device's runtime computes something else: build for its runtime and version"
    return ("wrong outputs: " + ", ".join(wrong), hint, cases) if wrong else ("", "", cases)


def write(path: str, text: str) -> None:
    """Whole or not at all, also after a power cut."""
    with open(path + ".part", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


def link(path: str, target: str) -> None:
    if os.path.lexists(path + ".new"):
        os.unlink(path + ".new")
    os.symlink(target, path + ".new")
    os.replace(path + ".new", path)


def main(root: str, agent: str) -> int:
    sys.path.insert(0, agent)
    pending = os.path.join(root, "first-boot.pending")
    with open(pending) as file:
        digest = file.read().strip()
    store = os.path.join(root, "store", digest)
    what, hint, cases = judge(agent, store, digest)
    current = os.path.join(root, "current")
    if not what:
        write(os.path.join(store, ".good"), digest + "\n")
        if os.path.islink(current) and os.readlink(current) != "store/" + digest:
            link(os.path.join(root, "previous"), os.readlink(current))
        link(current, "store/" + digest)
    result = {"digest": digest, "good": not what, "what": what, "hint": hint, "cases": cases, "clock": time.time()}
    write(os.path.join(root, "first-boot.json"), json.dumps(result) + "\n")
    os.unlink(pending)
    os.sync()
    sys.stdout.write("edgesdk: the bundle {} is {}\n".format(digest[:12], "bad: " + what if what else "good and current"))
    return 1 if what else 0


if __name__ == "__main__":
    sys.exit(main(os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])))
