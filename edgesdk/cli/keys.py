"""The verb `keys`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgesdk.cli.common import Json, console, emit_json, say

if TYPE_CHECKING:
    from edgesdk.signing import PublicKey

app = typer.Typer(help="Keys that sign bundles, and those whose bundles are installed from here.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A name of your choice.")]


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """Your own keys and all that are trusted, or were."""
    from rich.table import Table

    from edgesdk.signing import keys_dir, own_key, own_keys, trusted

    own = {own_key(n).id: n for n in own_keys()}
    known = trusted()
    if as_json:
        keys = [k.model_dump(mode="json") | {"own": k.id in own} for k in known.values()]
        emit_json({"kind": "keys", "schema_version": 1, "folder": str(keys_dir()), "keys": keys})
        return
    table = Table(box=None, header_style="dim")
    for column in ("name", "id", "", "since", "revoked"):
        table.add_column(column)
    for key in known.values():
        table.add_row(key.name, key.id, "yours" if key.id in own else "", key.since, key.revoked or "")
    console().print(table)
    if not known:
        say(f"none in {keys_dir()}; `edgesdk build` makes one, called default")


@app.command("new")
def new(name: Name, as_json: Json = False) -> None:
    """Make a key of yours."""
    from edgesdk.signing import new_key

    _show(new_key(name), as_json, "made")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="A key of yours.")] = "default", as_json: Json = False) -> None:
    """Print the public line of a key of yours: what others give to `edgesdk keys trust`."""
    from edgesdk.signing import own_key

    key = own_key(name)
    if as_json:
        _show(key, True, "")
    else:
        console().print(key.line, markup=False, soft_wrap=True)


@app.command("trust")
def trust(
    line: Annotated[str | None, typer.Argument(metavar="[FILE|LINE]", help="A public line, or the file it stands in.")] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="A device that is to run only what the keys trusted here signed: ssh://…, see flash.")
    ] = None,
    anyone: Annotated[bool, typer.Option("--anyone", help="With --on: the device runs whatever is installed again.")] = False,
    regardless: Annotated[
        bool, typer.Option("--regardless", help="With --on: even if what is current there runs no more because of it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Install bundles that this key signed; with --on, give a device all keys that are trusted here (do it again after a revocation)."""
    from edgesdk.errors import InputError
    from edgesdk.signing import trust as verb

    if (line is None and on is None) or (anyone and (on is None or line is not None)):
        raise InputError(
            "keys trust wants a key, --on, or both; --anyone wants --on alone", "edgesdk keys trust me.pub --on ssh://pi@board"
        )
    if line is not None:
        key = verb(line)
        if on is None:
            _show(key, as_json, "trusted")
            return
    _on_device(str(on), anyone, regardless, as_json)


def _on_device(on: str, anyone: bool, regardless: bool, as_json: bool) -> None:
    from edgesdk.device_keys import give_keys, take_keys

    if anyone:
        take_keys(on)
    keys = () if anyone else give_keys(on, regardless=regardless)
    if as_json:
        emit_json({"kind": "keys", "schema_version": 1, "on": on, "anyone": anyone, "keys": [k.model_dump(mode="json") for k in keys]})
        return
    ran = "runs whatever is installed" if anyone else "runs only what one of these signed"
    console().print(f"{on.split('?')[0]}: {ran}", markup=False)
    for key in keys:
        console().print(f"  {key.name} ({key.id})", markup=False)


@app.command("revoke")
def revoke(key: Annotated[str, typer.Argument(help="Its id or name.")], as_json: Json = False) -> None:
    """Trust a key no more: nothing it signed is installed from here."""
    from edgesdk.signing import revoke as verb

    _show(verb(key), as_json, "revoked")


@app.command("rotate")
def rotate(
    name: Annotated[str, typer.Argument(help="A key of yours.")] = "default",
    out: Annotated[str, typer.Option("--out", help="Where the statement goes that the old key signs.")] = "rotation.json",
    as_json: Json = False,
) -> None:
    """Replace a key of yours by a new one; give the statement to all who trust the old one."""
    from edgesdk.signing import rotate as verb

    statement = verb(name, out)
    _show(statement.new, as_json, f"replaces {statement.old}")
    if not as_json:
        say(f"{out}: give it to those who trust {statement.old}; they run `edgesdk keys accept {out}`")


@app.command("accept")
def accept(statement: Annotated[str, typer.Argument(help="What `edgesdk keys rotate` wrote.")], as_json: Json = False) -> None:
    """Trust the new key of a statement that a trusted key signed, and that key no more."""
    from edgesdk.signing import Rotation
    from edgesdk.signing import accept as verb

    _show(verb(Rotation.load(statement)), as_json, "trusted")


def _show(key: PublicKey, as_json: bool, what: str) -> None:
    if as_json:
        emit_json({"kind": "key", "schema_version": 1, "key": key.model_dump(mode="json")})
    else:
        console().print(f"{key.name} ({key.id}): {what}", markup=False)


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="keys")
