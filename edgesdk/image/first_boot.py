"""Runs on the device, once, at its first boot: `first_boot.py ROOT AGENT`. Standard library, Python 3.9 and later.

Checks the golden outputs of the bundle that came with the image, with the agent; makes it current if they are right; writes the result into the
device's history (see `edgesdk.history`), where `edgesdk flash --status` finds it. A bundle that fails is never current.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
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


def measured(cases: list[Any]) -> str:
    """How far the worst golden case is off, of those that are right."""
    worst = max(cases, key=lambda c: c["error"] / (c["allowed"] or 1.0))
    return "ok, {} golden cases, the worst off by {:.2g}, allowed {:.2g}".format(len(cases), worst["error"], worst["allowed"])


def give(path: str) -> None:
    """To whoever the folder belongs to, so that they may install later."""
    folder = os.stat(os.path.dirname(path))
    if os.geteuid() == 0:
        os.lchown(path, folder.st_uid, folder.st_gid)


def write(path: str, text: str) -> None:
    """Whole or not at all, also after a power cut."""
    with open(path + ".part", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    give(path + ".part")
    os.replace(path + ".part", path)


def link(path: str, target: str) -> None:
    if os.path.lexists(path + ".new"):
        os.unlink(path + ".new")
    os.symlink(target, path + ".new")
    give(path + ".new")
    os.replace(path + ".new", path)


def switch(root: str, target: str) -> None:
    """What was current becomes previous."""
    current = os.path.join(root, "current")
    if os.path.islink(current) and os.readlink(current) != target:
        link(os.path.join(root, "previous"), os.readlink(current))
    link(current, target)


def record(root: str, digest: str, signer: str, result: str) -> None:
    """One line more of the history."""
    importlib.import_module("edgesdk.fleet.store").Store(root, None).record("first-boot", digest, signer, result)
    give(os.path.join(root, "history"))


@contextlib.contextmanager
def alone(root: str) -> Iterator[None]:
    """Hold what installers hold (see `edgesdk.lease`)."""
    path = os.path.join(root, "lease")
    with open(path, "a+") as file:
        give(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write("the first boot, to check the bundle that came with the image")
        file.flush()
        yield


def main(root: str, agent: str) -> int:
    sys.path.insert(0, agent)
    pending = os.path.join(root, "first-boot.pending")
    with alone(root):
        with open(pending) as file:
            digest, signer = file.read().split()
        store = os.path.join(root, "store", digest)
        what, hint, cases = judge(agent, store, digest)
        if not what:
            write(os.path.join(store, ".good"), digest + "\n")
            switch(root, "store/" + digest)
        record(root, digest, signer, f"{what}; {hint}" if what else measured(cases))
        os.unlink(pending)
        os.sync()
    sys.stdout.write("edgesdk: the bundle {} is {}\n".format(digest[:12], "bad: " + what if what else "good and current"))
    return 1 if what else 0


if __name__ == "__main__":
    sys.exit(main(os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])))
