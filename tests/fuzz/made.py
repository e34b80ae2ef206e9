"""Inputs whose checksums are right, so that what lies behind them is reached: bundles and frames made of a fuzzer's bytes."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any


def seed_bundle(folder: Path) -> bytes:
    """A good bundle."""
    from tests.tiny import tiny_bundle

    tiny_bundle(folder / "seed.edge", rows=2, cols=3)
    return (folder / "seed.edge").read_bytes()


def bundle(data: bytes, good: bytes) -> bytes:
    """A zip whose manifest lists its members with their right digests. Of `data`, cut at 0xff: a JSON object that goes over the manifest,
    the signatures, then names and contents of members in turn; the first bit of a content's first byte makes it a link."""
    patch, signatures, *rest = [*data.split(b"\xff"), b""][: 2 + 16]
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        manifest: dict[str, Any] = json.loads(archive.read("manifest.json"))
        members = {n: archive.read(n) for n in archive.namelist() if n not in ("manifest.json", "signature.json")}
        own = archive.read("signature.json")
    links = set()
    for name, content in zip(rest[::2], rest[1::2], strict=False):
        text = name.decode("utf-8", "replace")
        members[text] = content
        if content[:1] >= b"\x80":
            links.add(text)
    manifest["members"] = [{"name": n, "size_bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in members.items()]
    try:
        changed = json.loads(patch)
    except (ValueError, RecursionError):
        changed = None
    if isinstance(changed, dict):
        manifest |= changed
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        archive.writestr("signature.json", signatures or own)
        for name, content in members.items():
            info = zipfile.ZipInfo(name or "x")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16 if name in links else 0
            archive.writestr(info, content)
    return out.getvalue()


def framed(body: bytes) -> bytes:
    """A line of the agent's wire around any body."""
    return b"%d %08x %s" % (len(body), zlib.crc32(body), body)
