"""The verb `sign`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json


def sign(
    bundle: Annotated[str, typer.Argument(help="What `edgesdk build` wrote; it is signed in place, beside who signed it before.")],
    key: Annotated[str, typer.Option("--key", help="Your key (see `edgesdk keys`).")] = "default",
    as_json: Json = False,
) -> None:
    """Sign a bundle with a key of yours (`edgesdk build` does it, too)."""
    from edgesdk.signing import sign as verb

    made = verb(bundle, key)
    if as_json:
        emit_json({"kind": "sign", "schema_version": 1, "bundle": bundle, "key": made.model_dump(mode="json")})
    else:
        console().print(f"{bundle}: signed by {made.name} ({made.id})", markup=False)


def register(app: typer.Typer) -> None:
    app.command("sign")(sign)
