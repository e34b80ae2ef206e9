"""Keys that a device has of its own: its agent then runs only what one of them signed, whoever installs it."""

from __future__ import annotations

from edgesdk.deployment import Entry
from edgesdk.errors import CheckFailed, InputError
from edgesdk.history import Recorder
from edgesdk.lease import lease
from edgesdk.signing import PublicKey, is_signed_by, trusted
from edgesdk.survey import survey
from edgesdk.transport import Transport, parse_link
from edgesdk.transport.scripts import UNLINK, script

NAME = "trusted"


def give_keys(on: str | Transport, *, regardless: bool = False, python: str | None = None, wait_s: float = 0.0) -> tuple[PublicKey, ...]:
    """Put all keys that are trusted here on the device, in place of those it had; the revoked ones are not among them.

    Raises `InputError` where none is trusted here, `CheckFailed` where none of them signed what is current there (unless `regardless`: it then
    runs no more), `DeviceError`.
    """
    keys = tuple(k for k in trusted().values() if k.revoked is None)
    if not keys:
        raise InputError("no key is trusted here", "edgesdk keys trust FILE, or edgesdk keys new NAME for one of your own")
    transport = parse_link(on) if isinstance(on, str) else on
    try:
        with lease(transport, "change its keys", python=python, wait_s=wait_s):
            state = survey(transport)
            if state.current and not regardless and not _signed(transport, state.current, keys):
                what = f"{transport.link}: the current bundle {state.current[:12]} was signed by none of them"
                raise CheckFailed(what, "nothing was changed; --regardless: it runs no more until you flash one that they signed")
            transport.put("".join(f"{k.line}\n" for k in keys).encode(), f"{transport.root}/{NAME}")
            _record(transport, state.history, " ".join(k.id for k in keys))
    finally:
        if isinstance(on, str):
            transport.close()
    return keys


def take_keys(on: str | Transport, *, python: str | None = None, wait_s: float = 0.0) -> None:
    """The device has no keys of its own any more, and runs whatever is installed. Raises `DeviceError`."""
    transport = parse_link(on) if isinstance(on, str) else on
    try:
        with lease(transport, "change its keys", python=python, wait_s=wait_s):
            state = survey(transport)
            transport.must(script("unlink", UNLINK, f"{transport.root}/{NAME}"), "removing its keys")
            _record(transport, state.history, "anyone")
    finally:
        if isinstance(on, str):
            transport.close()


def _record(transport: Transport, history: tuple[Entry, ...], result: str) -> None:
    """Which puts all of it on the disk, too."""
    transport.must(Recorder(transport.root, history).step("trusted", None, result).argv, "writing the history")


def _signed(transport: Transport, digest: str, keys: tuple[PublicKey, ...]) -> bool:
    folder = f"{transport.root}/store/{digest}"
    manifest, found = (transport.run(("cat", f"{folder}/{name}")) for name in ("manifest.json", "signature.json"))
    return manifest.code == 0 and found.code == 0 and is_signed_by(manifest.out, found.out, keys)
