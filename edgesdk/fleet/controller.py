"""Drives a rollout over a broker: sends what the rollout decides, writes down what devices say, and can be killed at any moment."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

from edgesdk.errors import DeviceError
from edgesdk.fleet.broker import KEEPALIVE_S, Broker, refusal
from edgesdk.fleet.files import chunk_names, chunks_of, files_of
from edgesdk.fleet.journal import Folder
from edgesdk.fleet.rollout import MOST_COUNTER, Event, Rollout
from edgesdk.fleet.wire import CHUNK_BYTES, Refused, Topics, envelope, pack, unpack
from edgesdk.signing import signature_of

TICK_S = 0.2
BATCH = 100
"""Devices that are asked about at a time: a broker drops what it has to keep for one client beyond a limit (Mosquitto: 1000 messages)."""
AGAIN_S = 60.0
"""Devices that have not settled are asked about anew so often, in case that the broker dropped what they said."""
AT_ONCE = 64
"""Chunks on their way to the broker."""
SEND_S = 60.0
FIRST_S = 30.0
"""How long a broker may take to be there at first; later it is waited for."""


class Presence:
    """Who is there, since when, and who has been gone for a while."""

    def __init__(self, away_s: float) -> None:
        self.away_s = away_s
        self.online: dict[str, float] = {}
        self.offline: dict[str, float] = {}
        self.since = 0.0

    def forget(self, now: float) -> None:
        """The broker was gone: nothing is known."""
        self.online.clear()
        self.offline.clear()
        self.since = now

    def heard(self, name: str, is_online: bool, now: float) -> None:
        here, there = (self.online, self.offline) if is_online else (self.offline, self.online)
        there.pop(name, None)
        here.setdefault(name, now)

    def gone(self, names: tuple[str, ...], now: float) -> set[str]:
        return {n for n in names if n not in self.online and now - self.offline.get(n, self.since) >= self.away_s}


class Controller:
    """`run` until the rollout has ended. `changed(rollout)` hears of every change."""

    def __init__(self, folder: Folder, broker: Broker, changed: Callable[[Rollout], None] = lambda rollout: None) -> None:
        self.folder, self.broker, self.changed = folder, broker, changed
        self.spec = folder.spec
        self.topics = Topics(self.spec.fleet)
        self.presence = Presence(self.spec.away_s)
        self.rollout = Rollout(self.spec)
        self.synced = self.offered = self.repeated = False
        self.names = frozenset(self.spec.devices)
        self._heard: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._batches: Iterator[tuple[str, ...]] = iter(())
        self._echo = f"{self.topics.base}/echo/{self.spec.id}"
        self._files = files_of(folder.bundle)
        self._order = self._fixed_part()
        self._asked_s = 0.0
        self._base = 0.0
        self.floor = 0  # the highest counter that any device has told: another's clock may be ahead

    # ---- the loop

    def run(self) -> Rollout:
        """Raises `DeviceError` where another drives it or the broker is not there or refuses; the rollout can be resumed in any case."""
        with self.folder.alone():
            self.begin()
            try:
                self._first()
                while not self.rollout.ended:
                    self.turn()
                if self.rollout.ended:
                    self.clear()
            finally:
                self.client.disconnect()
                self.client.loop_stop()
        return self.rollout

    def begin(self) -> None:
        """Read what has happened so far and begin to connect."""
        self.rollout = self.folder.read()
        last = max((t.at for t in self.rollout.told.values()), default=0.0)
        self._base = max(time.time(), last) - time.monotonic()
        client = self.client = self.broker.client(f"edgesdk-controller-{self.spec.fleet}-{self.spec.id}")
        client.max_queued_messages_set(0)
        client.on_connect = lambda c, u, flags, reason, p: self._heard.put(("", reason))
        client.on_disconnect = lambda c, u, flags, reason, p: self._heard.put(("-", reason))
        client.on_message = lambda c, u, message: self._heard.put((message.topic, message.payload))
        client.connect_async(self.broker.host, self.broker.port, KEEPALIVE_S)
        client.loop_start()
        self._take_commands()

    def now(self) -> float:
        """Seconds since 1970 that never go back: a clock that jumps neither shortens nor stretches a stage."""
        return self._base + time.monotonic()

    def _first(self) -> None:
        """The first connection; one that does not come is told."""
        try:
            topic, what = self._heard.get(timeout=FIRST_S)
            while topic == "-":
                topic, what = self._heard.get(timeout=FIRST_S)
        except queue.Empty:
            raise DeviceError(
                f"{self.broker.name}: no broker answers", "check host, port and firewall; then: edgesdk rollout resume"
            ) from None
        self._take(topic, what)

    def turn(self) -> None:
        """What came, what was asked, what follows from it."""
        try:
            self._take(*self._heard.get(timeout=TICK_S))
            while True:
                self._take(*self._heard.get_nowait())
        except queue.Empty:
            pass
        self._take_commands()
        if not self.synced:
            return
        if not self.offered:
            self._offer()
        if not self.offered:
            return
        if not self.repeated:
            self.repeated = True
            for device, told in self.rollout.told.items():
                if told.state != "superseded":
                    self._send(device)
        now = self.now()
        while events := self._decided(now):
            self._happen(events)
        if now - self._asked_s >= AGAIN_S:
            self._ask_about(tuple(self.rollout.unsettled))

    def _take_commands(self) -> None:
        self._happen([{"e": "command", "command": c} for c in self.folder.asked(self.rollout.commands)])

    def _decided(self, now: float) -> list[Event]:
        return self.rollout.decide(now, self.presence.online, self.presence.gone(self.spec.devices, now), max(self.floor, int(now * 1000)))

    def _happen(self, events: list[Event]) -> None:
        """On the disk first, then in the state, then at the broker."""
        if not events:
            return
        self.folder.append(events)
        for event in events:
            self.rollout.apply(event)
        for event in events:
            if event["e"] == "tell":
                self._send(event["device"])
        self.changed(self.rollout)

    # ---- what comes

    def _take(self, topic: str, what: Any) -> None:
        if topic == "":
            if what.is_failure:
                raise refusal(self.broker, what)
            self._connected()
        elif topic == "-":
            self.synced = False
        elif topic == self._echo:
            self._next_batch()
        else:
            self._told(self.topics.split(topic), what)

    def _connected(self) -> None:
        """Hear of all devices, some at a time; then say again what was said."""
        self.synced = self.offered = self.repeated = False
        self.presence.forget(self.now())
        self.client.subscribe([(self._echo, 1), (self.topics.offer(self.spec.bundle), 1)])
        self._ask_about(self.spec.devices)

    def _ask_about(self, names: tuple[str, ...]) -> None:
        self._asked_s = self.now()
        self._batches = iter([names[i : i + BATCH] for i in range(0, len(names), BATCH)])
        self._next_batch()

    def _next_batch(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            self.synced = True
            return
        self.client.subscribe([(t(n), 1) for n in batch for t in (self.topics.report, self.topics.presence)])
        self.client.publish(self._echo, b"", qos=1)  # comes back behind what the broker kept of these

    def _told(self, where: tuple[str, ...], payload: bytes) -> None:
        if where == ("offer", self.spec.bundle):
            self.offered = bool(payload)
        if len(where) != 2 or where[1] not in self.names or not payload:
            return
        try:
            message = unpack(payload)
        except Refused:
            return  # nobody's
        if where[0] == "presence":
            self.presence.heard(where[1], message.get("online") is True, self.now())
            self.changed(self.rollout)
        elif where[0] == "report":
            counter = message.get("counter")
            if isinstance(counter, int) and counter < MOST_COUNTER:
                self.floor = max(self.floor, counter)
            self._happen(self.rollout.heard(where[1], message, self.now()))

    # ---- what goes

    def _fixed_part(self) -> Event:
        """What all orders of this rollout say."""
        files = {name: (sha, size, place) for name, sha, size, place in self._files}
        order: Event = {"fleet": self.spec.fleet, "rollout": self.spec.id, "bundle": self.spec.bundle, "gate_s": self.spec.gate_s}
        for part in ("manifest", "signature"):
            sha, size, _ = files[f"{part}.json"]
            order[part] = {"sha256": sha, "size": size}
        if self.spec.url:
            order |= {"url": self.spec.url, "places": {sha: place for sha, _, place in files.values()}}
        return order

    def _send(self, device: str) -> None:
        """The last order of a device, as it was when it was first sent."""
        told = self.rollout.told[device]
        order = {**self._order, "device": device, "counter": told.counter, "step": told.step}
        self.client.publish(self.topics.desired(device), envelope(order, self._sign), qos=1, retain=True)

    def _sign(self, text: bytes) -> tuple[str, bytes]:
        return signature_of(text, self.spec.key)

    def _offer(self) -> None:
        """Every chunk of the bundle to the broker, then word that all are there; gone on with if the broker goes meanwhile."""
        if self.spec.url:
            self.offered = True
            return
        for count, (sha, index, data) in enumerate(chunks_of(self.folder.bundle, self._files), 1):
            info = self.client.publish(self.topics.chunk(sha, index), data, qos=1, retain=True)
            if count % AT_ONCE == 0 and not self._sent(info):
                return
        self.client.publish(self.topics.offer(self.spec.bundle), pack({"chunk_bytes": CHUNK_BYTES}), qos=1, retain=True)
        self.offered = True

    def _sent(self, info: Any) -> bool:
        until = time.monotonic() + SEND_S
        while not info.is_published():
            if not self.client.is_connected() or time.monotonic() > until:
                return False
            info.wait_for_publish(TICK_S)
        return True

    def clear(self) -> None:
        """Take the bundle back from the broker once nobody will fetch it any more."""
        info = None
        if not self.spec.url and not (self.rollout.status == "finished" and self.rollout.unsettled):
            self.client.publish(self.topics.offer(self.spec.bundle), b"", qos=1, retain=True)
            for _, sha, index in chunk_names(self._files):
                info = self.client.publish(self.topics.chunk(sha, index), b"", qos=1, retain=True)
        if info is not None:
            self._sent(info)
