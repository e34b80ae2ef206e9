"""Transports move bytes and run argument tuples on a device; `parse_link` picks one from a link's text."""

from __future__ import annotations

from edgesdk.errors import InputError, UnknownName
from edgesdk.transport.base import Blob, Result, Stream, Transport

__all__ = ["Blob", "Result", "Stream", "Transport", "parse_link"]

_KINDS = ("local", "local:/folder", "ssh://user@host:22", "fake")


def parse_link(link: str) -> Transport:
    """`local`, `local:/folder`, `ssh://user@host:port?identity=…` or `fake` → a transport. Raises `InputError`."""
    if link == "local" or link.startswith("local:"):
        from edgesdk.transport.local import LocalTransport

        folder = link.partition(":")[2]
        if link != "local" and not folder:
            raise InputError(f"'{link}': the folder is missing", "write it like local:/folder")
        return LocalTransport(folder or None)
    if link.startswith("ssh://"):
        from edgesdk.transport.ssh import SshTransport

        return SshTransport(link)
    if link == "fake":
        from edgesdk.transport.fake import FakeTransport

        return FakeTransport()
    for scheme in ("adb", "serial"):
        if link.startswith(f"{scheme}:"):
            hint = "use ssh://user@host where the device has it, or local on the device itself"
            raise InputError(f"'{link}': {scheme} links are not supported yet", hint)
    raise UnknownName("link", link, _KINDS)
