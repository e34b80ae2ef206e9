"""This machine as the device."""

from __future__ import annotations

import sys
from pathlib import Path

from edgesdk.errors import InputError
from edgesdk.transport.base import PipeTransport


class LocalTransport(PipeTransport):
    """Runs processes here; files are kept under `root` (`~/.edgesdk` if not given)."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.link = "local" if root is None else f"local:{root}"
        folder = Path(root).expanduser().absolute() if root is not None else Path.home() / ".edgesdk"
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is not a folder", "give a folder: local:/path")
        self.root = str(folder)
        self.python = sys.executable
