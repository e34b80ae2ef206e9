"""Many devices at a real broker in a few processes: the agent's own protocol code, its store on the disk, only the golden check is played.

    python -m tests.lab.agents HOST PORT FOLDER SEED NAME…        one process with these devices

What kind of a device a name is, is drawn from it: most are sound, some slow, some come late, some fall off and are started anew from their disk, some
get every message twice. `FOLDER/bad.json` says who finds which bundle wrong: {digest: [names]}.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import random
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

from edgesdk.agent.ed25519 import holds
from edgesdk.agent.signed import keys
from edgesdk.fleet.broker import Broker
from edgesdk.fleet.device import Device
from edgesdk.fleet.store import Store
from edgesdk.fleet.wire import pack

KINDS = ("sound",) * 12 + ("slow", "slow", "late", "late", "flaky", "flaky", "double", "double")
TICK_S = 1.0


class Simulated:
    """One device: a paho client that `Crowd` drives, and what the real agent is made of."""

    def __init__(self, crowd: Crowd, name: str) -> None:
        self.crowd, self.name = crowd, name
        self.chance = random.Random(f"{crowd.seed} {name}")
        self.kind = self.chance.choice(KINDS)
        self.client = None
        self.socket = None
        self.handle = -1
        self.device: Device | None = None

    def connect(self) -> None:
        """Begin: a new agent and a new connection, on what the disk holds."""
        if self.socket is not None:
            return
        self.client = self.crowd.broker.client(f"edgesdk-default-{self.name}")
        self.client.on_connect = self._connected
        self.client.on_message = self._message
        store = Store(str(self.crowd.folder / self.name), self._check, sync=False)
        self.device = Device(self.name, "default", store, self, self.crowd.trusted, holds, time.monotonic)
        self.client.will_set(self.device.topics.presence(self.name), pack({"online": False}), qos=1, retain=True)
        try:
            self.client.connect(self.crowd.broker.host, self.crowd.broker.port, 60)
        except OSError:
            self.crowd.later(self.chance.uniform(0.3, 2.0), self.connect)
            return
        self.socket = self.client.socket()
        self.crowd.watch(self)
        if self.kind == "flaky":
            self.crowd.later(self.chance.uniform(1.0, 12.0), self.fall_off)

    def fall_off(self) -> None:
        """As if its plug was pulled: no goodbye, and what it had not written is gone."""
        self.crowd.left(self)

    def drop(self) -> None:
        if self.socket is not None:
            self.crowd.unwatch(self)
            with contextlib.suppress(OSError):
                self.socket.close()
            self.socket = None

    def _check(self, folder: str, calls: int) -> dict:
        bad = self.name in self.crowd.bad().get(Path(folder).name, ())
        return {"cases": [{"method": "forward", "case": 0, "error": 1.0 if bad else 0.0, "allowed": 0.1, "ok": not bad}], "seconds": {}}

    # ---- what comes

    def _connected(self, client, userdata, flags, reason, properties) -> None:
        self.device.connected()

    def _message(self, client, userdata, message) -> None:
        topic, payload = message.topic, message.payload
        if client is not self.client:
            return
        if self.kind == "slow":
            self.crowd.later(self.chance.uniform(0.1, 1.0), lambda: self._take(topic, payload))
        else:
            for _ in range(2 if self.kind == "double" else 1):
                self._take(topic, payload)

    def _take(self, topic: str, payload: bytes) -> None:
        self.device.message(topic, payload)
        while self.device.step():
            pass

    def tick(self) -> None:
        self.client.loop_misc()
        while self.device.step():
            pass

    # ---- what goes (the device's wire)

    def publish(self, topic: str, payload: bytes) -> None:
        if self.socket is not None and self.client.is_connected():
            self.client.publish(topic, payload, qos=1, retain=True)

    def subscribe(self, topics: list[str]) -> None:
        if self.socket is not None and self.client.is_connected():
            self.client.subscribe([(t, 1) for t in topics])

    def unsubscribe(self, topics: list[str]) -> None:
        if self.socket is not None and self.client.is_connected():
            self.client.unsubscribe(topics)


class Crowd:
    """The devices of this process, in one loop."""

    def __init__(self, host: str, port: int, folder: Path, seed: int, names: list[str]) -> None:
        self.broker, self.folder, self.seed = Broker(f"mqtt://{host}:{port}"), folder, seed
        self.trusted = keys(str(folder / "trusted")) or {}
        self.selector = selectors.DefaultSelector()
        self.queue: list = []
        self.numbers = itertools.count()
        self._bad: dict = {}
        self._bad_time = 0.0
        self.devices = [Simulated(self, name) for name in names]
        for device in self.devices:
            self.later(device.chance.uniform(5.0, 12.0) if device.kind == "late" else device.chance.uniform(0.0, 2.0), device.connect)

    def later(self, seconds: float, act) -> None:
        heapq.heappush(self.queue, (time.monotonic() + seconds, next(self.numbers), act))

    def bad(self) -> dict:
        path = self.folder / "bad.json"
        if path.exists() and path.stat().st_mtime != self._bad_time:
            self._bad_time, self._bad = path.stat().st_mtime, json.loads(path.read_text())
        return self._bad

    def watch(self, device: Simulated) -> None:
        device.handle = device.socket.fileno()
        if device.handle in self.selector.get_map():  # of one whose socket paho has closed meanwhile
            self.left(self.selector.get_map()[device.handle].data)
        self.selector.register(device.handle, selectors.EVENT_READ, device)

    def unwatch(self, device: Simulated) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(device.handle)  # paho may have closed the socket itself

    def run(self) -> None:
        ticked = 0.0
        while True:
            now = time.monotonic()
            while self.queue and self.queue[0][0] <= now:
                heapq.heappop(self.queue)[2]()
            for key, _ in self.selector.select(0.05):
                self._serve(key.data)
            if now - ticked >= TICK_S:
                ticked = now
                for device in self.devices:
                    self._serve(device, device.tick)
            for device in self.devices:
                if device.socket is not None and device.client.want_write():
                    self._serve(device, device.client.loop_write)

    def _serve(self, device: Simulated, act=None) -> None:
        """Let a client read, or `act`; one that the broker has left comes again later."""
        if device.socket is not None:
            (act or device.client.loop_read)()
            if device.client.socket() is None:
                self.left(device)

    def left(self, device: Simulated) -> None:
        device.drop()
        self.later(device.chance.uniform(0.2, 2.0), device.connect)


class Crowds:
    """`names` in `processes` processes, from the outside."""

    def __init__(self, port: int, folder: Path, names: list[str], processes: int = 2, seed: int = 1) -> None:
        from edgesdk.signing import own_key

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trusted").write_text(own_key().line + "\n")
        self.folder, self.names = folder, names
        argv = [sys.executable, "-m", "tests.lab.agents", "127.0.0.1", str(port), str(folder), str(seed)]
        root = Path(__file__).parents[2]
        with (folder / "log").open("wb") as log:
            self.processes = [subprocess.Popen([*argv, *names[i::processes]], stderr=log, cwd=root) for i in range(processes)]

    def __enter__(self) -> Crowds:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def is_well(self) -> bool:
        return all(p.poll() is None for p in self.processes)

    def find_bad(self, bad: dict[str, list[str]]) -> None:
        part = self.folder / "bad.part"
        part.write_text(json.dumps(bad))
        part.replace(self.folder / "bad.json")

    def currents(self) -> dict[str, str | None]:
        return {name: Store(str(self.folder / name), lambda *_: {}).slot("current") for name in self.names}

    def installs(self) -> list[str]:
        """Every line of every device's journal."""
        paths = [self.folder / name / "fleet/journal" for name in self.names]
        return [f"{p.parents[1].name} {line}" for p in paths if p.exists() for line in p.read_text().splitlines()]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Crowd(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]).run()
