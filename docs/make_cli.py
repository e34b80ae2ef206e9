"""Write docs/cli.md from `--help` of every verb: run `make docs`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from edgesdk.cli import VERBS

SUBVERBS = {"devices": ("list", "show", "check"), "bench": ("predictions",)}


def _help(*words: str) -> str:
    env = {**os.environ, "COLUMNS": "110", "TERM": "dumb"}
    done = subprocess.run([sys.executable, "-m", "edgesdk", *words, "--help"], capture_output=True, text=True, env=env, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.replace("python -m edgesdk", "edgesdk").splitlines()).strip()


def render() -> str:
    """The whole page."""
    parts = ["# Command line reference", "", "Written by `make docs` from `--help`; do not edit.", "", "```", _help(), "```", ""]
    for verb in VERBS:
        for words in [(verb,), *((verb, sub) for sub in SUBVERBS.get(verb, ()))]:
            parts += [f"## edgesdk {' '.join(words)}", "", "```", _help(*words), "```", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(render(), encoding="utf-8")
