"""What a device does with orders, apart from how they come: it keeps its state on the disk, fetches what it lacks, installs, reports.

Goes to the device as it is: standard library, Python 3.9. Whatever is cut off is gone on with: the order, its counter and what was current
before are on the disk before anything is done, chunks that arrived are not fetched again, and what has settled is only reported anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .fetch import Fetch
from .store import Busy, Full, Store
from .wire import SETTLED, Refused, Topics, Verify, bundle_signer, opened, pack

STATE = "fleet/state.json"
JOURNAL = "fleet/journal"
TRIES = 3
"""How often a check may end with the device before the bundle is held to be what ends it."""
GATE_CALLS = 11
REMEMBERED = 8
TELL_S = 5.0
BUSY_S = 5.0
KEEP = 2


class Wire(Protocol):
    """The way to the broker."""

    def publish(self, topic: str, payload: bytes) -> None: ...

    def subscribe(self, topics: list[str]) -> None: ...

    def unsubscribe(self, topics: list[str]) -> None: ...


class Device:
    """One device: `connected`, `message` and `step` are called, one at a time; it answers over the wire.

    Its state: {"counter": of the last order, "order", "state": fetching | checking | installing, or one of `SETTLED`, "why", "tries", "before":
    rollout → what was current before it installed}.
    """

    def __init__(
        self, name: str, fleet: str, store: Store, wire: Wire, trusted: Mapping[str, bytes], verify: Verify, clock: Callable[[], float]
    ) -> None:
        self.name, self.store, self.wire, self.trusted, self.verify, self.clock = name, store, wire, trusted, verify, clock
        self.topics = Topics(fleet)
        self.state: dict[str, Any] = {"counter": 0, "order": None, "state": "idle", "why": "", "tries": 0, "before": {}}
        self.state.update(self._saved())
        self.refused: dict[str, Any] | None = None
        self.fetch: Fetch | None = None
        self.again_s = 0.0
        self._told_s = clock() - TELL_S

    # ---- called from outside

    def connected(self) -> None:
        """The broker is there (again): say so, hear orders, go on."""
        self.wire.publish(self.topics.presence(self.name), pack({"online": True}))
        self.wire.subscribe([self.topics.desired(self.name)])
        if self.state["order"]:
            self._report()
        if self.fetch:
            self.fetch.connected()
        elif self.state["state"] == "fetching":
            self._fetch()

    def message(self, topic: str, payload: bytes) -> None:
        where = self.topics.split(topic)
        if where == ("desired", self.name):
            if payload:
                self._ordered(payload)
        elif len(where) == 3 and where[0] == "blob" and self.fetch and where[2].isdigit():
            self._guarded(lambda fetch: fetch.chunk(where[1], int(where[2]), payload))

    def step(self) -> bool:
        """Do what can be done now, which may take its time; False if there is nothing."""
        if self.clock() < self.again_s:
            return False
        if self.fetch and not self.fetch.done:
            more = self._guarded(Fetch.step)
            if self.fetch and not self.fetch.done and self.clock() - self._told_s >= TELL_S:
                self._report(self.fetch.share)
            return more
        if self.fetch:
            self.fetch = None
            self._to("checking")
        if self.state["state"] in ("checking", "installing"):
            self._install()
            return True
        if self.state["state"] == "going-back":
            self._go_back()
            return True
        return False

    # ---- orders

    def _ordered(self, payload: bytes) -> None:
        """Take an order, if it is one and newer than the last."""
        try:
            order = opened(payload, self.topics.fleet, self.name, self.trusted, self.verify)
        except Refused as error:
            self._refuse(str(error), getattr(error, "counter", None))
            return
        counter, last = order["counter"], self.state["order"] or {}
        if counter == self.state["counter"] and (order["rollout"], order["step"]) == (
            last.get("rollout"),
            last.get("step"),
        ):  # once more, to be sure
            if self.state["state"] in SETTLED:
                self._report()
            return
        if counter <= self.state["counter"]:
            self._refuse("older than the last order: replayed, or of a controller that was restored from a copy", counter)
            return
        self._end_fetch()
        self.refused = None
        self.state.update(counter=counter, order=order, tries=0, why="")
        if order["step"] == "install":
            current = self.store.slot("current")
            if current == order["bundle"] and self.store.good(order["bundle"]):
                self._to("good", "was there before")
                return
            before = {k: v for k, v in list(self.state["before"].items())[1 - REMEMBERED :] if k != order["rollout"]}
            self.state["before"] = {**before, order["rollout"]: {"bundle": order["bundle"], "current": current}}
            self._to("fetching")
            self._fetch()
        elif order["step"] == "rollback":
            self._to("going-back")
        else:
            self._to("held")

    def _refuse(self, why: str, counter: int | None) -> None:
        self.refused = {"counter": counter, "why": why}
        self._report()

    # ---- fetching

    def _fetch(self) -> None:
        order = self.state["order"]
        try:
            self.fetch = Fetch(self.store, self.wire, self.topics, order, self._signer, self.clock)
            self.fetch.connected()
        except Refused as error:
            self._failed(str(error))

    def _signer(self, manifest: bytes, signatures: bytes) -> str:
        return bundle_signer(manifest, signatures, self.trusted, self.verify)

    def _guarded(self, act: Callable[[Fetch], Any]) -> bool:
        """Go on fetching; what cannot be had ends the order. Whether `act` says so."""
        try:
            return bool(self.fetch and act(self.fetch))
        except Refused as error:
            self._failed(str(error))
        except Full as error:
            self._failed(f"the disk cannot be written: {error.strerror}")
        return False

    def _end_fetch(self) -> None:
        if self.fetch:
            self.fetch.stop()
            self.fetch = None

    # ---- installing

    def _install(self) -> None:
        order, digest = self.state["order"], self.state["order"]["bundle"]
        try:
            with self.store.alone("install what a rollout brought"):
                self.store.activate(digest)
                signer = self._signer_of(digest)
                if self.state["state"] == "checking" and not self._checked(order, digest):
                    return
                self._to("installing")
                if not self.store.switch(digest, signer, "installed"):
                    self._failed("its files changed on the device's disk")
                    return
                self._journal(order)
                self.store.tidy(KEEP)
        except Busy as error:
            self.again_s = self.clock() + BUSY_S
            self._say("why", f"waits: in use by {error}")
            return
        except Refused as error:
            self._failed(str(error))
            return
        except OSError as error:
            self._failed(f"the disk cannot be written: {error.strerror}")
            return
        self._to("good")

    def _checked(self, order: Mapping[str, Any], digest: str) -> bool:
        """Golden outputs, in the store, before anything is switched."""
        if self.state["tries"] >= TRIES:
            self._failed(f"the device ended {TRIES} times while it was checked")
            return False
        self.state["tries"] += 1
        self._save()
        try:
            wrong = self.store.accept(digest, order.get("gate_s"), GATE_CALLS)
        except RuntimeError as error:  # the program cannot be run here
            wrong = str(error)
        if wrong:
            self._failed(wrong)
        return not wrong

    def _signer_of(self, digest: str) -> str:
        folder = self.store.path("store", digest)
        try:
            with open(os.path.join(folder, "manifest.json"), "rb") as a, open(os.path.join(folder, "signature.json"), "rb") as b:
                return self._signer(a.read(), b.read())
        except FileNotFoundError:
            raise Refused("the bundle is not signed") from None

    def _failed(self, why: str) -> None:
        """The order has come to nothing: what is current stays, the new bundle is removed."""
        self._end_fetch()
        digest = self.state["order"]["bundle"]
        self.store.remove(self.store.path("store", digest + ".part"))
        if digest not in (self.store.slot("current"), self.store.slot("previous")):
            self.store.remove(self.store.path("store", digest))
        with contextlib.suppress(OSError):  # a full disk
            self.store.record("refused", digest, "-", why)
        self._to("failed", why)

    def _go_back(self) -> None:
        """What this rollout brought is given up again; anything else that is current stays."""
        order, digest = self.state["order"], self.state["order"]["bundle"]
        before = self.state["before"].get(order["rollout"], {})
        if self.store.slot("current") != digest or before.get("bundle") != digest:
            self._to("rolled-back", "was not installed by this rollout")
            return
        back = before["current"]
        try:
            with self.store.alone("roll back"):
                if back and not (self.store.good(back) and self.store.whole(back) and self.store.switch(back, "-", "rolled-back")):
                    self._to("failed", f"what was before ({back[:12]}) is not whole any more")
                    return
                if not back:
                    self.store.point("current", None)
                    self.store.record("rolled-back", digest, "-", "there was nothing before")
        except Busy as error:
            self.again_s = self.clock() + BUSY_S
            self._say("why", f"waits: in use by {error}")
            return
        except OSError as error:
            self._to("failed", f"the disk cannot be written: {error.strerror}")
            return
        self._to("rolled-back")

    # ---- state

    def _to(self, state: str, why: str = "") -> None:
        """The next state: on the disk first, then told."""
        self.state.update(state=state, why=why)
        self._save()
        self._report()

    def _say(self, key: str, value: str) -> None:
        if self.state[key] != value:
            self.state[key] = value
            self._report()

    def _report(self, share: float | None = None) -> None:
        order = self.state["order"] or {}
        self._told_s = self.clock()
        report = {
            "device": self.name, "counter": self.state["counter"], "rollout": order.get("rollout"), "step": order.get("step"),
            "bundle": order.get("bundle"), "state": self.state["state"], "why": self.state["why"], "share": share,
            "current": self.store.slot("current"), "previous": self.store.slot("previous"), "refused": self.refused,
        }  # fmt: skip
        self.wire.publish(self.topics.report(self.name), pack(report))

    def _save(self) -> None:
        self.store.write(STATE, json.dumps(self.state).encode())

    def _saved(self) -> dict[str, Any]:
        """The state of the last run; none where there was none."""
        try:
            with open(self.store.path(STATE), "rb") as file:
                saved = json.loads(file.read())
            return saved if isinstance(saved, dict) else {}
        except (OSError, ValueError):
            return {}

    def _journal(self, order: Mapping[str, Any]) -> None:
        """A line for each install, once: what was installed by which order."""
        line = f"{order['rollout']} {order['counter']} installed {order['bundle']}\n".encode()
        path = self.store.path(JOURNAL)
        try:
            with open(path, "rb") as file:
                held = file.read()
        except OSError:
            held = b""
        if line not in held:
            self.store.write(JOURNAL, held + line)
