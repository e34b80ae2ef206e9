"""The verb `serve`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from edgesdk.cli.common import Json, emit_json, say


def serve(
    bundle: Annotated[str, typer.Argument(help="What `edgesdk build` wrote from an encoder-decoder, for this machine.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT. There is no password: go beyond this machine by ssh -L.")] = "127.0.0.1:7070",
    as_json: Json = False,
) -> None:
    """Run a model's encoder here for devices that decode: edgesdk run BUNDLE --prompt TEXT --encoder HOST:PORT there. Ends with Ctrl-C."""
    from edgesdk.errors import InputError
    from edgesdk.helper import serve as helper_of

    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InputError(f"--listen {listen}: not HOST:PORT", "write it like 127.0.0.1:7070")
    with helper_of(bundle, host, int(port)) as helper:
        where = f"{helper.address[0]}:{helper.address[1]}"
        if as_json:
            emit_json({"kind": "serving", "schema_version": 1, "address": where, "methods": list(helper.methods)})
        else:
            say(f"serving {', '.join(helper.methods)} at {where}; Ctrl-C ends it")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            say(f"answered {helper.answered} calls")


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)
