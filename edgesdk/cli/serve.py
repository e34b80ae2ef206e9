"""The verb `serve`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from edgesdk.cli.common import Json, emit_json, read_address, say


def serve(
    bundle: Annotated[str, typer.Argument(help="What `edgesdk build` wrote from an encoder-decoder, for this machine.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT. There is no password: go beyond this machine by ssh -L.")] = "127.0.0.1:7070",
    as_json: Json = False,
) -> None:
    """Run a model's encoder here for devices that decode: edgesdk run BUNDLE --prompt TEXT --encoder HOST:PORT there. Ends with Ctrl-C."""
    from edgesdk.helper import serve as helper_of

    with helper_of(bundle, *read_address(listen, "--listen", "127.0.0.1:7070", least=0)) as helper:
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
