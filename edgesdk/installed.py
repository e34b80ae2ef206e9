"""A bundle that is on a device, ready to be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgesdk.bundle import Manifest
from edgesdk.errors import DeviceError
from edgesdk.transport import Transport


@dataclass(frozen=True)
class Here:
    """A bundle that is installed on a device."""

    folder: str  # on the device
    digest: str
    manifest: Manifest
    read: Callable[[str], bytes]  # a member's bytes


def installed(transport: Transport, bundle: str | Path | None, python: str | None = None) -> Here:
    """`bundle` on the device, installed first if it is not there or was not found good; the current one if None."""
    from edgesdk.bundles import read_member
    from edgesdk.flash import flash
    from edgesdk.install import read_source, survey

    state = survey(transport)
    if bundle is None:
        if state.current is None:
            raise DeviceError(f"{transport.link}: nothing is installed", "give a bundle, or install one: edgesdk flash BUNDLE --on …")
        return stored(transport, state.current)
    source = read_source(bundle)
    if not state.good.get(source.digest):
        flash(bundle, transport, python=python)
    return Here(f"{transport.root}/store/{source.digest}", source.digest, source.manifest, lambda name: read_member(bundle, name))


def stored(transport: Transport, digest: str) -> Here:
    """A bundle in the device's store, read from there."""
    folder = f"{transport.root}/store/{digest}"
    manifest = Manifest.from_json(transport.get(f"{folder}/manifest.json"), f"{transport.link}: manifest.json")
    return Here(folder, digest, manifest, lambda name: transport.get(f"{folder}/{name}"))
