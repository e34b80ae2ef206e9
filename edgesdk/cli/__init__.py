"""The command line. Importing it loads no torch, numba or numpy; each verb imports what it needs when it runs."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from edgesdk import __version__
from edgesdk.cli.common import is_verbose, set_verbosity
from edgesdk.errors import EdgeError

app = typer.Typer(
    name="edgesdk",
    help="Plan, build, flash and profile models on edge devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

VERBS = ("devices", "plan", "build", "flash", "profile", "run", "calibrate", "compare", "report", "bench", "layouts", "doctor")
"""Each is `edgesdk/cli/<verb>.py` with a `register(app)`."""


@app.callback()
def _root(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no messages.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more; show tracebacks of errors.")] = False,
) -> None:
    set_verbosity(quiet, verbose)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"edgesdk {__version__}")
        raise typer.Exit


for _verb in VERBS:
    importlib.import_module(f"edgesdk.cli.{_verb}").register(app)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns nothing, exits with 0 / 1 / 2 / 3 (done / the answer is no / bad input / device or link)."""
    try:
        code = app(args=argv, standalone_mode=False)
    except EdgeError as error:
        if is_verbose() or os.environ.get("EDGESDK_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {error.what}\n" + (f"  hint: {error.hint}\n" if error.hint else ""))
        sys.exit(error.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.stderr.write("stopped\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            sys.exit(2)
        raise
    sys.exit(code if isinstance(code, int) else 0)
