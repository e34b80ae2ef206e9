"""A request answered by a process of its own: its memory is the program's, its crash is an answer. Goes to the device as it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from .wire import decode, encode

ONE = "--one"
"""The agent started so answers what comes on its input and has no processes of its own."""


def in_fresh_process(request: dict[str, Any], heard: Callable[[dict[str, Any]], None]) -> None:
    """`heard` gets every message about the request; a process that ends without an answer makes one that says so."""
    argv = [sys.executable, "-B", os.path.abspath(sys.argv[0]), ONE]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        assert child.stdin and child.stdout
        try:
            child.stdin.write(encode(request))
            child.stdin.close()
            answered = False
            for line in child.stdout:
                message = decode(line)
                answered = answered or "progress" not in message
                heard(message)
            code = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            child.stdout.close()
        errors.seek(0)
        complaint = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    if not answered:
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = "; ".join(complaint) or "the program may use instructions that this CPU does not have"
        heard({"id": request["id"], "error": f"the runtime crashed on the device ({reason})", "hint": hint})
