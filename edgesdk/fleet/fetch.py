"""Files of a bundle come to a device: as chunks that a broker keeps, or out of the bundle at a URL. Goes to the device as it is.

Over the broker a device asks for `WINDOW` chunks at a time by subscribing to them: the broker sends each as it keeps it, and no more than was asked for
is ever on its way, so that thousands of devices can fetch at once and each at its own pace. What has arrived is on the disk and is not asked for again.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from edgesdk.agent.look import sha256

from .store import Store, members_of
from .wire import CHUNK_BYTES, Refused, Topics

WINDOW = 16
ASK_AGAIN_S = 20.0
"""A chunk that did not come by then is asked for again: the broker was restarted, or the controller has not published it yet."""
PIECE_BYTES = 1 << 20
URL_S = 30.0
WRONG = 3
"""How often a file may arrive with a wrong digest."""
MOST_MANIFEST_BYTES = 1 << 24


class Fetch:
    """The files of one order's bundle. Raises `Refused` where they are not to be had and `Full` from any of its methods."""

    def __init__(
        self,
        store: Store,
        wire: Any,
        topics: Topics,
        order: Mapping[str, Any],
        signer: Callable[[bytes, bytes], str],
        clock: Callable[[], float],
    ) -> None:
        self.store, self.wire, self.topics, self.order, self.signer, self.clock = store, wire, topics, order, signer, clock
        self.digest = order["bundle"]
        self.url, self.places = order.get("url"), order.get("places") or {}
        if any(order[p]["size"] > MOST_MANIFEST_BYTES for p in ("manifest", "signature")) or order["manifest"]["sha256"] != self.digest:
            raise Refused("its manifest is too large, or another bundle's")
        first = [(f"{p}.json", order[p]["sha256"], order[p]["size"]) for p in ("manifest", "signature")]
        self.wanted: list[tuple[str, str, int]] = [f for f in first if not self._there(f[0], f[1])]
        self.done = False
        self.share = 0.0
        self._listed = False
        self._asked: set[int] = set()
        self._held: dict[int, bytes] = {}
        self._wrong = 0
        self._asked_s = 0.0
        self._fails = 0
        self._next_url_s = 0.0
        self._sizes = [0, 1]
        if store.whole(self.digest):
            self.done, self.wanted = True, []

    def connected(self) -> None:
        """Ask (again)."""
        self._asked.clear()
        self._ask()

    def stop(self) -> None:
        self._drop(sorted(self._asked))
        self.wanted = []

    # ---- over the broker

    def _ask(self) -> None:
        """Ask for the next chunks of the file that is being fetched; files that are there already are passed over."""
        while not self.done:
            if not self.wanted:
                self._list()
                continue
            name, sha, size = self.wanted[0]
            there = self.store.arrived(self.digest, name)
            if there >= size:
                if not size:
                    self.store.append(self.digest, name, b"", 0)
                self._named(name, sha)
                continue
            if self.url:
                return
            first = there // CHUNK_BYTES
            last = min((size - 1) // CHUNK_BYTES, first + WINDOW - 1)
            new = [i for i in range(first, last + 1) if i not in self._asked and i not in self._held]
            if new:
                self._asked.update(new)
                self._asked_s = self.clock()
                self.wire.subscribe([self.topics.chunk(sha, i) for i in new])
            return

    def chunk(self, sha: str, index: int, payload: bytes) -> None:
        """A chunk has come; one that comes twice or was not asked for is passed over."""
        if not self.wanted or self.wanted[0][1] != sha or index not in self._asked:
            return
        name, _, size = self.wanted[0]
        if len(payload) != min(CHUNK_BYTES, size - index * CHUNK_BYTES):
            return  # taken back by the controller, or of somebody else
        self._held[index] = payload
        self._asked.discard(index)
        self.wire.unsubscribe([self.topics.chunk(sha, index)])
        there = self.store.arrived(self.digest, name) // CHUNK_BYTES
        ready = bytearray()
        first = there
        while there in self._held:
            ready += self._held.pop(there)
            there += 1
        if ready:
            self.store.append(self.digest, name, bytes(ready), first * CHUNK_BYTES)
            self._sizes[0] += len(ready)
            self.share = min(1.0, self._sizes[0] / self._sizes[1])
        if not self._asked or len(self._asked) <= WINDOW // 2:
            self._ask()

    def step(self) -> bool:
        """What time brings: chunks that did not come, the next piece from a URL; whether there may be more at once."""
        if self.url:
            if self.wanted and self.clock() >= self._next_url_s:
                self._piece()
                return self._fails == 0
            return False
        if self._asked and self.clock() - self._asked_s >= ASK_AGAIN_S:
            self._drop(sorted(self._asked))
            self.connected()
        return False

    def _drop(self, indices: list[int]) -> None:
        if indices and self.wanted:
            self.wire.unsubscribe([self.topics.chunk(self.wanted[0][1], i) for i in indices])
        self._asked.clear()

    # ---- files

    def _named(self, name: str, sha: str) -> None:
        """A file is there in its length: it gets its name, or is fetched anew."""
        self._held.clear()
        if self.store.complete(self.digest, name, sha):
            self.wanted.pop(0)
            return
        self._wrong += 1
        if self._wrong >= WRONG:
            raise Refused(f"{name} arrived {WRONG} times with a wrong digest")

    def _list(self) -> None:
        """Behind the manifest and its signature: is it one that may be installed, and what does the device lack of it?"""
        if self._listed:
            self.done = True
            return
        self._listed = True
        manifest, signatures = (self._read(f"{p}.json") for p in ("manifest", "signature"))
        self.signer(manifest, signatures)
        members = members_of(manifest)
        there = self.store.contents(self.digest)
        self.wanted = [
            (name, sha, size)
            for name, sha, size in members
            if not self._there(name, sha) and not (sha in there and self.store.share(self.digest, name, there[sha], sha))
        ]
        self._sizes = [0, max(1, sum(size - self.store.arrived(self.digest, name) for name, _, size in self.wanted))]
        self.done = not self.wanted

    def _there(self, name: str, sha: str) -> bool:
        return sha256(self.store.arriving(self.digest, name)) == sha

    def _read(self, name: str) -> bytes:
        with open(self.store.arriving(self.digest, name), "rb") as file:
            return file.read()

    # ---- from a URL

    def _piece(self) -> None:
        """The next bytes of the bundle at the URL; a server that fails is asked again later."""
        name, sha, size = self.wanted[0]
        place = self.places.get(sha)
        if not isinstance(place, int):
            raise Refused(f"the order does not say where {name} lies in {self.url}")
        there = self.store.arrived(self.digest, name)
        there = there if there < size else 0
        end = min(size, there + PIECE_BYTES)
        try:
            data = _range(str(self.url), place + there, place + end)
        except (OSError, ValueError, urllib.error.URLError):
            self._fails += 1
            self._next_url_s = self.clock() + min(60.0, 2.0**self._fails)
            return
        self._fails = 0
        self.store.append(self.digest, name, data, there)
        self._sizes[0] += len(data)
        self.share = min(1.0, self._sizes[0] / self._sizes[1])
        self._ask()


def _range(url: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file. Raises `ValueError` where the server sends others."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(url)
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-{end - 1}"})
    with urllib.request.urlopen(request, timeout=URL_S) as answer:
        if answer.status != 206:
            raise ValueError(f"status {answer.status}: the server sends no parts of files")
        data: bytes = answer.read(end - begin + 1)
    if len(data) != end - begin:
        raise ValueError("cut short")
    return data
