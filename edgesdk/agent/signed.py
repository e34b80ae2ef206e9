"""Whom this device trusts: with keys of its own (`ROOT/trusted`, put there by `edgesdk keys trust --on`) it runs only what one of them signed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys

from .ed25519 import holds
from .wire import Refused

ABOUT = b"edgesdk bundle manifest\n"
WORD = "edgesdk-ed25519"


def trusted_file() -> str:
    """Beside `agent/DIGEST/agent.zip`, where this runs."""
    root = os.path.abspath(sys.argv[0])
    for _ in range(3):
        root = os.path.dirname(root)
    return os.path.join(root, "trusted")


def keys(path: str) -> dict[str, bytes] | None:
    """id → key; None: the device has no list of its own. A list that cannot be read trusts nobody."""
    try:
        with open(path, "rb") as file:
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})", "the device trusts nobody until it can") from None
    found = {}
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == WORD:
            try:
                key = base64.b64decode(words[1], validate=True)
            except ValueError:
                continue
            found[hashlib.sha256(key).hexdigest()[:16]] = key
    return found


def require_signature(folder: str, manifest: bytes) -> None:
    """Raises `Refused` where the device has keys and none of them signed the bundle in `folder`."""
    known = keys(trusted_file())
    if known is None:
        return
    by = []
    try:
        with open(os.path.join(folder, "signature.json"), "rb") as file:
            signatures = json.loads(file.read(1 << 20))["signatures"]
        for one in signatures:
            by.append(str(one["key"]))
            if by[-1] in known and holds(known[by[-1]], ABOUT + manifest, base64.b64decode(one["signature"])):
                return
    except (OSError, ValueError, KeyError, TypeError):
        by = by or ["nobody"]
    ids = ", ".join(by) or "nobody"
    if any(b in known for b in by):
        raise Refused("the bundle was changed since it was signed", "get it again from where it was built")
    raise Refused(f"signed by {ids}: this device trusts none of them", "edgesdk keys trust FILE, then edgesdk keys trust --on LINK")
