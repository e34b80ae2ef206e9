"""Transports move bytes and run argument tuples on a device; `parse_link` picks one from a link's text."""

from __future__ import annotations

from urllib.parse import parse_qsl

from edgesdk.errors import InputError, UnknownName
from edgesdk.transport.base import Blob, Result, Stream, Transport

__all__ = ["Blob", "Result", "Stream", "Transport", "parse_link"]


def parse_link(link: str) -> Transport:
    """A link's text (see `inventory.KINDS`), or the name of a device of the inventory → a transport. Raises `InputError`."""
    if "\0" in link:
        raise InputError(f"{link!r}: not a link", "leave the zero byte out")
    if link == "local" or link.startswith("local:"):
        from edgesdk.transport.local import LocalTransport

        folder, _, query = link.partition(":")[2].partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if link != "local" and not folder:
            raise InputError(f"'{link}': the folder is missing", "write it like local:/folder")
        for name in options:
            if name != "python":
                raise UnknownName("local option", name, ["python"])
        return LocalTransport(folder or None, options.get("python"))
    if link.startswith("ssh://"):
        from edgesdk.transport.ssh import SshTransport

        return SshTransport(link)
    if link == "fake":
        from edgesdk.transport.fake import FakeTransport

        return FakeTransport()
    if link.startswith("adb:"):
        from edgesdk.transport.adb import AdbTransport

        return AdbTransport(link)
    if link.startswith("serial:"):
        from edgesdk.transport.serial import SerialTransport

        return SerialTransport(link)
    from edgesdk.inventory import link_of

    return parse_link(link_of(link))
