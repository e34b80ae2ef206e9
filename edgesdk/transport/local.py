"""This machine as the device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgesdk.errors import InputError
from edgesdk.transport.base import PipeTransport


class LocalTransport(PipeTransport):
    """Runs processes here; files are kept under `root` (`~/.edgesdk` if not given), programs are run by `python` (this one)."""

    def __init__(self, root: str | Path | None = None, python: str | None = None) -> None:
        self.link = "local" if root is None else f"local:{root}"
        self.root = os.path.abspath(os.path.expanduser(root if root is not None else "~/.edgesdk"))
        if os.path.exists(self.root) and not os.path.isdir(self.root):  # these, unlike pathlib's, take any name
            raise InputError(f"{self.root} is not a folder", "give a folder: local:/path")
        self.python = python or sys.executable
