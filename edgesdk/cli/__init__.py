"""The command line. Importing it loads no torch, numba or numpy; each verb imports what it needs when it runs."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from typing import Annotated, NoReturn

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

VERBS = (
    "devices", "compress", "delta", "adapt", "teach", "plan", "build", "sign", "keys", "flash", "profile", "run", "serve", "calibrate", "compare", "report", "bench",
    "layouts", "kernels", "doctor", "inventory", "rollout", "fleet",
)  # fmt: skip
"""Each is `edgesdk/cli/<verb>.py` with a `register(app)`."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"edgesdk {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no messages; may stand after the verb, too.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show tracebacks of errors; may stand after the verb, too.")] = False,
    inventory: Annotated[
        str | None,
        typer.Option(
            "--inventory", help="Names and groups of devices; may stand after the verb, too.", show_default="edgesdk-inventory.toml"
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    set_verbosity(quiet, verbose)
    if inventory:
        os.environ["EDGESDK_INVENTORY"] = inventory


for _verb in VERBS:
    importlib.import_module(f"edgesdk.cli.{_verb}").register(app)


def _front(argv: list[str]) -> list[str]:
    """`--quiet`, `--verbose` and `--inventory FILE` belong to every verb: moved before it, wherever they stand."""
    end = argv.index("--") if "--" in argv else len(argv)
    flags: list[str] = []
    rest: list[str] = []
    words = iter(argv[:end])
    for word in words:
        if word == "--inventory":
            flags += [word, *itertools.islice(words, 1)]
        else:
            (flags if word in ("--quiet", "--verbose") or word.startswith("--inventory=") else rest).append(word)
    return flags + rest + argv[end:]


def _fail(what: str, hint: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {what}\n" + (f"  hint: {hint}\n" if hint else ""))
    sys.exit(code)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line; exits with 0 / 1 / 2 / 3 (done / the answer is no / bad input / device or link failed)."""
    try:
        code = app(args=_front(sys.argv[1:] if argv is None else argv), standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if is_verbose():
            raise
        if isinstance(error, EdgeError):
            _fail(error.what, error.hint, error.exit_code)
        if hasattr(error, "show"):  # a usage error of the command line
            error.show()
            sys.exit(2)
        _fail(f"unexpected: {type(error).__name__}: {error}", "this is a defect of edgesdk; --verbose shows where", 2)
    sys.exit(code if isinstance(code, int) else 0)
