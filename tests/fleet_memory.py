"""A broker in memory and devices around it, driven one act at a time, so that any order of events, loss and crash can be played."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from pathlib import Path
from types import SimpleNamespace

from edgesdk.agent.ed25519 import holds
from edgesdk.fleet import controller as controlling
from edgesdk.fleet.controller import Controller
from edgesdk.fleet.device import Device
from edgesdk.fleet.journal import Folder
from edgesdk.fleet.rollout import Spec, order_of
from edgesdk.fleet.store import Store
from edgesdk.signing import own_key, trusted


class Killed(BaseException):
    """Power cut, or kill -9."""


class Session:
    """A connection as a paho client shows it, and as a device's wire."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker, self.topics, self.inbox, self.online = broker, set(), deque(), False
        self.will = None
        self.hurt = lambda: None  # may raise Killed

    def connect_async(self, *_):
        self.broker.sessions.append(self)
        self.online = True
        self.inbox.append(None)

    def is_connected(self):
        return self.online

    def max_queued_messages_set(self, _):
        pass

    loop_start = loop_stop = disconnect = lambda self: None

    def subscribe(self, topics):
        self.hurt()
        for topic in (t if isinstance(t, str) else t[0] for t in topics):
            self.topics.add(topic)
            if self.online and topic in self.broker.retained:
                self.inbox.append((topic, self.broker.retained[topic]))

    def unsubscribe(self, topics):
        self.topics.difference_update(topics)

    def publish(self, topic, payload, qos=1, retain=None):
        self.hurt()
        if self.online:
            self.broker.send(topic, payload, retain is not False and "/echo/" not in topic)
        return SimpleNamespace(is_published=lambda: True)

    def lost(self, will=True):
        """The connection is gone."""
        self.online = False
        self.topics.clear()
        self.inbox.clear()
        with contextlib.suppress(ValueError):
            self.broker.sessions.remove(self)
        if will and self.will:
            self.broker.send(*self.will, True)


class MemoryBroker:
    name, host, port = "memory", "memory", 0

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.retained: dict[str, bytes] = {}

    def client(self, client_id):
        self.last = Session(self)
        return self.last

    def send(self, topic, payload, retain):
        if retain:
            self.retained[topic] = payload
            if not payload:
                del self.retained[topic]
        for session in self.sessions:
            if topic in session.topics:
                session.inbox.append((topic, payload))


class Fleet:
    """`names` at a broker in memory; `bad(name)` says whose golden outputs are wrong. `act` does one thing by chance, `settle` all that is to be done."""

    def __init__(self, folder: Path, bundle: Path, names, *, seed=0, bad=lambda name: False, unplugged=(), key="default", **asked):
        self.folder, self.names, self.bad, self.key = folder, names, bad, key
        self.chance = random.Random(seed)
        self.time = 1000.0
        self.broker = MemoryBroker()
        self.devices: dict[str, Device] = {}
        self.wires: dict[str, Session] = {}
        self.kills = 0.0  # the chance that any word to the broker or act of a store ends its process
        self.crashes = 0
        self.trusted = {k: raw_key(v) for k, v in trusted().items()} or {own_key().id: raw_key(own_key())}
        self.spec = spec_of(bundle, names, **asked)
        self.rollout_folder = Folder.create(self.spec, bundle)
        self.controller: Controller | None = None
        self._lock = contextlib.ExitStack()
        for name in names:
            if name not in unplugged:
                self.plug(name)

    # ---- who is there

    def plug(self, name):
        """Start a device's agent on what its disk holds."""
        if name in self.wires:
            self.wires[name].lost()
        wire = self.wires[name] = Session(self.broker)
        store = Store(str(self.folder / name), lambda folder, calls: self._check(name), sync=False)
        write = store.write

        def torn(where, content):
            self._perhaps()
            write(where, content)
            self._perhaps()

        store.write = torn
        try:
            self.devices[name] = Device(name, self.spec.fleet, store, wire, self.trusted, holds, lambda: self.time)
        except Killed:
            self.crashes += 1
        wire.hurt = self._perhaps
        topics = self.devices[name].topics
        wire.will = (topics.presence(name), b'{"online":false,"v":1}')
        wire.connect_async()

    def unplug(self, name):
        self.wires.pop(name).lost()
        self.devices.pop(name)

    def _check(self, name):
        self._perhaps()
        return {
            "cases": [{"method": "forward", "case": 0, "error": 1.0 if self.bad(name) else 0.0, "allowed": 0.1, "ok": not self.bad(name)}],
            "seconds": {},
        }

    def drive(self):
        """Start a controller on what the journal holds."""
        self.leave()
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(self.rollout_folder.alone())
        self.controller = Controller(self.rollout_folder, self.broker)
        self.controller.now = lambda: self.time
        self.controller.begin()
        self.controller.client.hurt = self._perhaps

    def leave(self):
        """kill -9 of the controller."""
        if self.controller:
            self.controller.client.lost()
            self.controller = None
        self._lock.close()

    def restart_broker(self, forgets):
        for session in list(self.broker.sessions):
            session.lost(will=False)
            session.connect_async()
        if forgets:
            self.broker.retained.clear()

    def _perhaps(self):
        if self.kills and self.chance.random() < self.kills:
            raise Killed

    # ---- what happens

    def deliver(self, name, twice=False):
        """The next message of a device, or None of the controller."""
        session = self.wires[name] if name else self.controller.client
        if not session.inbox:
            return False
        item = session.inbox.popleft()
        for _ in range(2 if twice and item else 1):
            if name is None:
                self.controller._heard.put(item or ("", SimpleNamespace(is_failure=False)))
            elif item is None:
                self.devices[name].connected()
            else:
                self.devices[name].message(*item)
        return True

    def guarded(self, act, reborn):
        try:
            return act()
        except Killed:
            self.crashes += 1
            reborn()
            return True

    def turn(self):
        return self.guarded(self._turn, self.drive)

    def _turn(self):
        busy = False
        while self.deliver(None):
            busy = True
        before = self.rollout_folder.path.joinpath("journal").stat().st_size
        self.controller.turn()
        return busy or self.rollout_folder.path.joinpath("journal").stat().st_size != before

    def device_turn(self, name, twice=False):
        def act():
            return self.deliver(name, twice) | self.devices[name].step()

        return self.guarded(act, lambda: self.plug(name))

    def act(self):
        """One thing by chance."""
        what = self.chance.random()
        if what < 0.7:
            name = self.chance.choice(sorted(self.wires))
            self.device_turn(name, twice=self.chance.random() < 0.1)
        elif what < 0.95:
            self.turn()
        else:
            self.time += self.chance.random() * 3
            if self.chance.random() < 0.1:
                self.restart_broker(self.chance.random() < 0.5)
            if self.chance.random() < 0.1:
                self.plug(self.chance.choice(sorted(self.wires)))

    def settle(self, turns=400):
        """Until the rollout has ended and nobody has anything to do."""
        self.kills = 0.0
        for _ in range(turns):
            busy = self.turn()
            for name in list(self.wires):
                while self.device_turn(name):
                    busy = True
            if not busy and self.controller.rollout.ended:
                self.controller.clear()
                return self.controller.rollout
            self.time += 5.0
        raise AssertionError(f"did not settle: {self.controller.rollout}")

    # ---- what is so

    def installs(self, name):
        """How often a device wrote down that it installed something."""
        path = self.folder / name / "fleet/journal"
        return path.read_text().splitlines() if path.exists() else []

    def current(self, name):
        return Store(str(self.folder / name), lambda *_: {}).slot("current")


def spec_of(
    bundle,
    names,
    *,
    stages=(1, 3, 10**9),
    canaries=(),
    halt_on=1,
    halt_share=None,
    wait_s=0.0,
    timeout_s=1e6,
    away_s=60.0,
    rollout="r1",
    url=None,
    gate_s=None,
):
    from edgesdk.bundles import bundle_digest

    return Spec(
        id=rollout, fleet="test", bundle=bundle_digest(bundle), model_name="tiny", devices=order_of(names, canaries, rollout),
        stages=tuple(sorted({min(s, len(names)) for s in stages})), halt_on=halt_on, halt_share=halt_share, wait_s=wait_s, timeout_s=timeout_s,
        away_s=away_s, gate_s=gate_s, url=url, broker="memory", key="default",
    )  # fmt: skip


def raw_key(key):
    import base64

    return base64.b64decode(key.public)


def quick(monkeypatch):
    """No waiting for messages: they are there or not."""
    monkeypatch.setattr(controlling, "TICK_S", 0.001)
