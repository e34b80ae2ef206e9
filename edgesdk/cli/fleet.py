"""The verb `fleet`: the device's side of rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgesdk.cli.common import say

app = typer.Typer(help="The agent that takes part in rollouts on a device.", no_args_is_help=True)


@app.command("agent", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def agent(context: typer.Context) -> None:
    """Take part in rollouts, as the device that this runs on: --broker mqtts://host:8883 --name pi5-01 (--help tells all)."""
    import os
    import sys

    from edgesdk.agent.client import ARCHIVE, send_agent
    from edgesdk.fleet.agent import options
    from edgesdk.transport.local import LocalTransport

    asked = options().parse_args(context.args)
    folder = send_agent(LocalTransport(asked.root))  # the very program that a device has which has no edgesdk
    os.execv(sys.executable, [sys.executable, "-u", "-B", f"{folder}/{ARCHIVE}", "fleet", *context.args])


@app.command("pack")
def pack(out: Annotated[Path, typer.Option("--out", "-o", help="Where it is written.")] = Path("agent.zip")) -> None:
    """Write the agent as one file for devices without edgesdk: python3 agent.zip fleet --broker … (needs paho-mqtt there)."""
    from edgesdk.agent.client import ARCHIVE, agent_files
    from edgesdk.errors import EdgeError

    try:
        out.write_bytes(agent_files()[ARCHIVE])
    except OSError as error:
        raise EdgeError(f"{out}: cannot be written ({error.strerror})", "choose another --out") from None
    say(f"wrote {out}; on the device: python3 {out.name} fleet --broker mqtts://… --name …")


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="fleet")
