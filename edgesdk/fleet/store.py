"""The store of bundles on a device as the device itself works on it: the folders, links and history that `edgesdk flash` makes from afar.

Goes to the device as it is: standard library, Python 3.9. Layout: see `edgesdk.install`; a line of the history: see `edgesdk.history`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from edgesdk.agent.look import sha256

from .wire import DIGEST, Refused

MOST_BYTES = 1 << 40
MOST_MEMBERS = 10_000
HISTORY_LINES = 400
BESIDE = ("manifest.json", "signature.json")
Check = Callable[[str, int], "dict[str, Any]"]
"""`check(folder, calls)`: golden outputs of the bundle in `folder`, as the agent's verb answers."""


class Full(OSError):
    """The disk is full, or cannot be written."""


class Busy(Exception):
    """Somebody else uses the device; the text says who."""


def members_of(manifest: bytes) -> list[tuple[str, str, int]]:
    """(name, sha256, bytes) of a bundle's members. Raises `Refused` for what no bundle has: names outside it, doubles, members without end."""
    try:
        listed = json.loads(manifest)
        if listed["kind"] != "bundle" or not listed["golden"]:
            raise Refused("it has no golden outputs: it cannot be checked here")
        found = [(m["name"], m["sha256"], m["size_bytes"]) for m in listed["members"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused("its manifest cannot be read") from None
    names = [name for name, _, _ in found]
    if len(found) > MOST_MEMBERS or len(set(map(str, names))) < len(names):
        raise Refused("its manifest lists a member twice, or too many")
    for name, digest, size in found:
        plain = isinstance(name, str) and name and not name.startswith(("/", "-", ".")) and "\\" not in name and name.isprintable()
        if not plain or any(part in ("", ".", "..") for part in name.split("/")) or name in BESIDE:
            raise Refused(f"its member {name!r} is not a plain relative name")
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest) or not isinstance(size, int) or not 0 <= size < MOST_BYTES:
            raise Refused(f"its member {name!r} has no digest or size")
    return found


class Store:
    """The bundles under `root`. `sync` False leaves out what makes it safe against a power cut (for simulations)."""

    def __init__(self, root: str, check: Check, sync: bool = True) -> None:
        self.root, self.check, self.sync = root, check, sync

    def path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    # ---- what is there

    def slot(self, name: str) -> str | None:
        """The digest that `current` or `previous` leads to."""
        try:
            digest = os.path.basename(os.readlink(self.path(name)))
        except OSError:
            return None
        return digest if os.path.exists(self.path("store", digest, "manifest.json")) else None

    def good(self, digest: str) -> bool:
        try:
            with open(self.path("store", digest, ".good"), encoding="utf-8") as file:
                return file.read().strip() == digest
        except (OSError, UnicodeDecodeError):
            return False

    def bundles(self) -> list[str]:
        """Installed digests, the newest first."""
        try:
            names = [n for n in os.listdir(self.path("store")) if DIGEST.fullmatch(n)]
        except OSError:
            return []
        return sorted(names, key=lambda n: -os.stat(self.path("store", n)).st_mtime)

    def contents(self, but: str) -> dict[str, str]:
        """sha256 → path of the members of other bundles than `but`."""
        found: dict[str, str] = {}
        for digest in self.bundles():
            if digest != but:
                with contextlib.suppress(Refused, OSError):
                    folder = self.path("store", digest)
                    with open(os.path.join(folder, "manifest.json"), "rb") as file:
                        found.update((sha, os.path.join(folder, name)) for name, sha, _ in members_of(file.read()))
        return found

    def whole(self, digest: str) -> bool:
        """Whether every file of an installed bundle is what its manifest says."""
        folder = self.path("store", digest)
        try:
            with open(os.path.join(folder, "manifest.json"), "rb") as file:
                manifest = file.read()
            listed = members_of(manifest)
        except (OSError, Refused):
            return False
        return hashlib.sha256(manifest).hexdigest() == digest and all(sha256(os.path.join(folder, n)) == sha for n, sha, _ in listed)

    # ---- what arrives

    def arriving(self, digest: str, name: str) -> str:
        return self.path("store", digest + ".part", name)

    def arrived(self, digest: str, name: str) -> int:
        """Bytes that are there of a file that is not whole yet."""
        try:
            return os.path.getsize(self.arriving(digest, name) + ".part")
        except OSError:
            return 0

    def append(self, digest: str, name: str, data: bytes, at: int) -> None:
        """Bytes at place `at`; what was behind it is gone. Raises `Full`."""
        path = self.arriving(digest, name) + ".part"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "r+b" if os.path.exists(path) else "w+b") as file:
                file.truncate(at)
                file.seek(at)
                file.write(data)
        except OSError as error:
            raise Full(error.errno, error.strerror) from None

    def complete(self, digest: str, name: str, wanted: str) -> bool:
        """Name a file that has arrived, if it is what it has to be; else it is removed."""
        path = self.arriving(digest, name)
        if sha256(path + ".part") != wanted:
            with contextlib.suppress(OSError):
                os.unlink(path + ".part")
            return False
        self._flush(path + ".part")
        os.replace(path + ".part", path)
        return True

    def share(self, digest: str, name: str, source: str, wanted: str) -> bool:
        """Take a file that another bundle has; False where that one is not what its manifest says."""
        path = self.arriving(digest, name)
        if sha256(source) != wanted:
            return False
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(OSError):
            os.unlink(path)
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)
        return True

    # ---- installing

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Hold the device as `edgesdk flash` does from afar (`edgesdk.lease`). Raises `Busy`."""
        os.makedirs(self.root, exist_ok=True)
        with open(self.path("lease"), "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise Busy(" ".join(file.read().split())) from None
            file.seek(0)
            file.truncate()
            file.write(f"the fleet agent, to {what}, since {_now()}")
            file.flush()
            yield

    def activate(self, digest: str) -> None:
        """A bundle that is whole gets its name."""
        part, folder = self.path("store", digest + ".part"), self.path("store", digest)
        if os.path.isdir(part):
            self.remove(folder)
            self._flush_tree(part)
            os.replace(part, folder)
            self._flush(self.path("store"))

    def accept(self, digest: str, gate_s: float | None, calls: int) -> str:
        """Run the golden inputs: "" if all is right and no method slower than the gate, else what is wrong. Good is then written down."""
        answer = self.check(self.path("store", digest), calls if gate_s is not None else 0)
        wrong = [f"{c['method']}[{c['case']}] is off by {c['error']}, allowed {c['allowed']}" for c in answer["cases"] if not c["ok"]]
        slow = [f"{m} takes {s:.3g} s" for m, s in answer["seconds"].items() if gate_s is not None and s > gate_s]
        if wrong or slow:
            return f"wrong outputs: {'; '.join(wrong[:3])}" if wrong else f"too slow: {'; '.join(slow)}, the gate was {gate_s:.3g} s"
        path = self.path("store", digest, ".good")
        with open(path + ".new", "w", encoding="utf-8") as file:
            file.write(digest + "\n")
        self._flush(path + ".new")
        os.replace(path + ".new", path)
        return ""

    def switch(self, digest: str, signer: str, action: str) -> bool:
        """Make a good bundle current, what was current previous; undone, and False, where it is not whole afterwards."""
        current, previous = self.slot("current"), self.slot("previous")
        if current != digest:
            self.record("switching", digest, signer, f"from {current or '-'}, previous {previous or '-'}")
            self.point("previous", current if current else previous)
            self.point("current", digest)
        if self.whole(digest):
            self.record(action, digest, signer, "ok")
            return True
        self.point("current", current if current != digest else None)
        self.record("undone", digest, signer, "damaged on the disk")
        return False

    def point(self, link: str, digest: str | None) -> None:
        """`current` or `previous` in one move; None takes it away."""
        path = self.path(link)
        with contextlib.suppress(OSError):
            os.unlink(path + ".new" if digest else path)
        if digest:
            os.symlink(f"store/{digest}", path + ".new")
            os.replace(path + ".new", path)
        self._flush(self.root)

    def tidy(self, keep: int) -> None:
        """Bundles beyond the `keep` newest go, and what was half sent or half removed; never the current and the previous one."""
        stay = {self.slot("current"), self.slot("previous")}
        spare = [d for d in self.bundles() if d not in stay]
        for digest in spare[max(0, keep - len(stay)) :]:
            self.remove(self.path("store", digest))
        for name in os.listdir(self.path("store")):
            if name.endswith((".part", ".gone")):
                self.remove(self.path("store", name))

    def remove(self, path: str) -> None:
        """A folder goes under another name first: what a power cut leaves of it is no bundle."""
        if os.path.lexists(path):
            gone = path if path.endswith(".gone") else path + ".gone"
            if gone != path:
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(path, gone)
            shutil.rmtree(gone, ignore_errors=True)

    # ---- on the disk

    def record(self, action: str, digest: str, signer: str, result: str) -> None:
        """One line more of the history."""
        path = self.path("history")
        try:
            with open(path, "rb") as file:
                lines = file.read().split(b"\n")
        except OSError:
            lines = []
        numbers = [int(w[1]) for w in (line.split(b" ", 2) for line in lines) if len(w) == 3 and w[1].isdigit()]
        rest = f"{max(numbers, default=0) + 1} {_now()} {action} {digest} {signer or '-'} {' '.join(result.split()) or '-'}"
        line = f"{hashlib.sha256(rest.encode()).hexdigest()[:16]} {rest}\n".encode()
        if len(lines) > HISTORY_LINES:
            self.write("history", b"\n".join(lines[-HISTORY_LINES // 2 :]))
        with open(path, "ab") as file:
            file.write((b"\n" if lines and lines[-1] else b"") + line)
        self._flush(path)

    def write(self, name: str, content: bytes) -> None:
        """The whole file under root, or what was there before."""
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".new", "wb") as file:
            file.write(content)
        self._flush(path + ".new")
        os.replace(path + ".new", path)
        self._flush(os.path.dirname(path))

    def _flush(self, path: str) -> None:
        if self.sync:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _flush_tree(self, folder: str) -> None:
        for place, _, names in os.walk(folder):
            for name in (*names, "."):
                self._flush(os.path.join(place, name))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
