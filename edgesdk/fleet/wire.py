"""What a controller and its devices say to each other over a broker. Goes to the device as it is: standard library, Python 3.9.

Topics, all under `edgesdk/1/FLEET/`; all messages are retained and of QoS 1, so that who comes later hears the last word:

    desired/NAME      controller → device   an order: what it is to have. Signed; the device refuses what nobody it trusts has signed
    report/NAME       device → controller   how far it is with its last order
    presence/NAME     device, or its last will
    blob/SHA256/I     controller → devices  bytes of a file of a bundle, by content: chunk I of `CHUNK_BYTES`
    offer/DIGEST      controller            that all chunks of a bundle are there

An order is known by (rollout, device, counter). Counters of a device only grow, so that an old order that is sent again is refused, and one that
comes twice is done once.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

VERSION = 1
CHUNK_BYTES = 1 << 16
MOST_ORDER_BYTES = 1 << 16
ABOUT_ORDER = b"edgesdk fleet order\n"
ABOUT_BUNDLE = b"edgesdk bundle manifest\n"
STEPS = ("install", "rollback", "hold")
WORKING = ("fetching", "checking", "installing", "going-back")
SETTLED = ("good", "failed", "rolled-back", "held", "superseded")
"""States after which nothing comes of an order any more."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")
Verify = Callable[[bytes, bytes, bytes], bool]
"""`verify(public key, text, signature)` of Ed25519."""


class Refused(Exception):
    """A message that is not followed: `str` of it says why."""


class Topics:
    """The topics of one fleet."""

    def __init__(self, fleet: str) -> None:
        if not NAME.fullmatch(fleet):
            raise Refused(f"'{fleet}' cannot be a fleet's name: letters, digits, and . _ - inside")
        self.fleet, self.base = fleet, f"edgesdk/{VERSION}/{fleet}"

    def desired(self, name: str) -> str:
        return f"{self.base}/desired/{name}"

    def report(self, name: str) -> str:
        return f"{self.base}/report/{name}"

    def presence(self, name: str) -> str:
        return f"{self.base}/presence/{name}"

    def chunk(self, sha256: str, index: int) -> str:
        return f"{self.base}/blob/{sha256}/{index}"

    def offer(self, digest: str) -> str:
        return f"{self.base}/offer/{digest}"

    def split(self, topic: str) -> tuple[str, ...]:
        """`("report", "pi5-01")`; nothing for a topic of others."""
        return tuple(topic[len(self.base) + 1 :].split("/")) if topic.startswith(self.base + "/") else ()


def pack(message: Mapping[str, Any]) -> bytes:
    return json.dumps({"v": VERSION, **message}, separators=(",", ":"), sort_keys=True).encode()


def unpack(payload: bytes) -> dict[str, Any]:
    """A message. Raises `Refused` for what is no JSON object of this version."""
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        raise Refused("not JSON") from None
    if not isinstance(message, dict) or message.get("v") != VERSION:
        version = message.get("v") if isinstance(message, dict) else None
        raise Refused(f"version {version!r}, wanted {VERSION}")
    return message


def envelope(order: Mapping[str, Any], sign: Callable[[bytes], tuple[str, bytes]]) -> bytes:
    """A signed order; `sign(text)` → (key id, signature)."""
    text = pack(order)
    key, signature = sign(ABOUT_ORDER + text)
    return pack({"order": text.decode(), "key": key, "signature": base64.b64encode(signature).decode()})


def opened(payload: bytes, fleet: str, device: str, trusted: Mapping[str, bytes], verify: Verify) -> dict[str, Any]:
    """The order in an envelope that a trusted key has signed for this device. Raises `Refused`; its `counter` attribute is what the order claims."""
    if len(payload) > MOST_ORDER_BYTES:
        raise Refused(f"an order of {len(payload)} bytes")
    outer = unpack(payload)
    text = outer.get("order")
    if not isinstance(text, str):
        raise Refused("no order in it")
    order = unpack(text.encode())
    try:
        _check_signature(outer, ABOUT_ORDER + text.encode(), trusted, verify)
        _check_order(order, fleet, device)
    except Refused as error:
        counter = order.get("counter")
        error.counter = counter if isinstance(counter, int) else None  # type: ignore[attr-defined]
        raise
    return order


def _check_signature(signed: Mapping[str, Any], text: bytes, trusted: Mapping[str, bytes], verify: Verify) -> None:
    key = signed.get("key")
    if not isinstance(key, str) or not signed.get("signature"):
        raise Refused("not signed")
    if key not in trusted:
        raise Refused(f"signed by {key[:16]}, which is not trusted on this device")
    try:
        signature = base64.b64decode(signed["signature"], validate=True)
    except (binascii.Error, ValueError, TypeError):
        signature = b""
    if not verify(trusted[key], text, signature):
        raise Refused(f"changed since {key[:16]} signed it")


def _check_order(order: Mapping[str, Any], fleet: str, device: str) -> None:
    if (order.get("fleet"), order.get("device")) != (fleet, device):
        raise Refused("for another device")
    counter, bundle = order.get("counter"), order.get("bundle")
    if not isinstance(counter, int) or isinstance(counter, bool) or counter < 1:
        raise Refused("no counter")
    if order.get("step") not in STEPS or not isinstance(order.get("rollout"), str):
        raise Refused(f"an unknown step {order.get('step')!r}")
    if not isinstance(bundle, str) or not DIGEST.fullmatch(bundle):
        raise Refused("no bundle")
    if order["step"] == "install":
        for part in ("manifest", "signature"):
            there = order.get(part)
            if not isinstance(there, dict) or not DIGEST.fullmatch(str(there.get("sha256"))) or not isinstance(there.get("size"), int):
                raise Refused(f"no {part}")


def bundle_signer(manifest: bytes, signatures: bytes, trusted: Mapping[str, bytes], verify: Verify) -> str:
    """The trusted key that signed a bundle's manifest. Raises `Refused`."""
    try:
        found = json.loads(signatures)["signatures"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused("the bundle's signature cannot be read") from None
    why = "the bundle is not signed"
    for signed in found if isinstance(found, list) else ():
        if isinstance(signed, dict):
            try:
                _check_signature(signed, ABOUT_BUNDLE + manifest, trusted, verify)
                return str(signed["key"])
            except Refused as error:
                why = f"the bundle is {error}"
    raise Refused(why)
