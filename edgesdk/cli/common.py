"""What every verb shares: output, verbosity, progress. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from edgesdk.noun import Noun

Json = Annotated[bool, typer.Option("--json", help="Print versioned JSON on stdout and nothing else.")]

_state = {"quiet": False, "verbose": False}


def set_verbosity(quiet: bool, verbose: bool) -> None:
    _state.update(quiet=quiet, verbose=verbose)


def is_verbose() -> bool:
    return _state["verbose"]


def console(stderr: bool = False) -> Console:
    """A Rich console; messages that are not the answer go to stderr."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, quiet=stderr and _state["quiet"], highlight=False, width=None if terminal else 160)


def say(text: str) -> None:
    """A message for people, on stderr, silent with --quiet."""
    if not _state["quiet"]:
        console(stderr=True).print(text)


def emit_json(answer: Noun | dict[str, Any]) -> None:
    """The answer as JSON on stdout; a dict must carry `kind` and `schema_version`."""
    text = json.dumps(answer, indent=1, ensure_ascii=False) if isinstance(answer, dict) else answer.to_json()
    sys.stdout.write(text + "\n")


Step = Callable[[str, float], None]
"""`step("lowering encode", 0.4)`: what is being done now and the share done, 0..1."""


@contextlib.contextmanager
def progress(title: str) -> Iterator[Step]:
    """A progress bar with an ETA on a terminal, plain lines elsewhere; nothing with --quiet."""
    if _state["quiet"]:
        yield lambda text, share: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    err = console(stderr=True)
    if not err.is_terminal:
        last = [""]

        def line(text: str, share: float) -> None:
            if text != last[0]:
                err.print(f"{title}: {text} ({share:.0%})")
                last[0] = text

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda text, share: bar.update(task, description=f"{title}: {text}", completed=share)


def read_address(text: str, option: str, example: str, least: int = 1) -> tuple[str, int]:
    """`HOST:PORT` as people type it, a port from `least` on. Raises `InputError` naming `option`."""
    from edgesdk.errors import InputError

    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not least <= int(port) <= 65535:
        raise InputError(f"{option} {text}: not HOST:PORT", f"write it like {example}")
    return host, int(port)


def show_steps(steps: Sequence[str], where: str = "", *, done: str = "changed") -> None:
    """What a dry run would do."""
    for line in steps:
        console().print(line, markup=False)
    say(f"{len(steps)} steps{where}; nothing was {done}")
