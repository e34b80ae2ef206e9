"""The device's side of a fleet as a program: `python agent.zip fleet --broker mqtts://…`, or `edgesdk fleet agent` where edgesdk is installed.

Goes to the device as it is: standard library and paho-mqtt, Python 3.9. What it trusts is `ROOT/trusted` (`edgesdk keys show >> ROOT/trusted`).
"""

from __future__ import annotations

import argparse
import os
import platform
import queue
import signal
import sys
import threading
import time
from typing import Any

from edgesdk.agent.ed25519 import holds
from edgesdk.agent.fresh import in_fresh_process
from edgesdk.agent.signed import keys
from edgesdk.errors import EdgeError, InputError

from .broker import KEEPALIVE_S, Broker, refusal
from .device import Device
from .store import Store
from .wire import NAME, Refused, Topics, pack

TICK_S = 1.0
GOODBYE_S = 5.0


def check(folder: str, calls: int) -> dict[str, Any]:
    """Golden outputs in a process of their own. Raises `RuntimeError` where the program cannot be run here."""
    heard: list[dict[str, Any]] = []
    in_fresh_process({"verb": "check", "id": 1, "folder": folder, "repeat": calls}, heard.append)
    answer = next((m for m in heard if "ok" in m), None)
    if answer is None:
        raise RuntimeError("; ".join(str(m.get("error", "")) for m in heard) or "no answer")
    found: dict[str, Any] = answer["ok"]
    return found


class PahoWire:
    """The way to the broker through a paho client."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def publish(self, topic: str, payload: bytes) -> None:
        if self.client.is_connected():  # else it is said once it is: the last word is all that counts
            self.client.publish(topic, payload, qos=1, retain=True)

    def subscribe(self, topics: list[str]) -> None:
        if self.client.is_connected():
            self.client.subscribe([(t, 1) for t in topics])

    def unsubscribe(self, topics: list[str]) -> None:
        if self.client.is_connected():
            self.client.unsubscribe(topics)


class Agent:
    """One device at a broker, until `stop`. What the broker says is taken up in order by the thread that calls `run`."""

    def __init__(self, broker: Broker, name: str, fleet: str, store: Store, trusted: dict[str, bytes]) -> None:
        self.client = broker.client(f"edgesdk-{fleet}-{name}")
        self.broker, self.heard = broker, queue.SimpleQueue()  # type: ignore[var-annotated]
        topics = Topics(fleet)
        self.device = Device(name, fleet, store, PahoWire(self.client), trusted, holds, time.monotonic)
        self.offline = (topics.presence(name), pack({"online": False}))
        self.client.will_set(*self.offline, qos=1, retain=True)
        self.client.on_connect = self._connected
        self.client.on_message = lambda client, userdata, message: self.heard.put((message.topic, message.payload))
        self.stopped = threading.Event()

    def _connected(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.heard.put((None, reason))

    def run(self) -> None:
        self.client.connect_async(self.broker.host, self.broker.port, KEEPALIVE_S)
        self.client.loop_start()
        try:
            while not self.stopped.is_set():
                self._turn()
        finally:
            self._goodbye()

    def _turn(self) -> None:
        try:
            topic, what = self.heard.get(timeout=TICK_S)
        except queue.Empty:
            topic, what = "", b""
        if topic is None and what.is_failure:
            log(str(refusal(self.broker, what)))  # a broker may learn of the device later: it is tried again
        elif topic is None:
            log(f"connected to {self.broker.name}")
            self.device.connected()
        elif topic:
            self.device.message(topic, what)
        if self.heard.empty():
            before = self.device.state["state"]
            while self.heard.empty() and self.device.step():
                pass
            if self.device.state["state"] != before:
                log(f"{self.device.state['state']} {self.device.state['why']}".strip())

    def stop(self) -> None:
        self.stopped.set()

    def _goodbye(self) -> None:
        if self.client.is_connected():
            self.client.publish(*self.offline, qos=1, retain=True).wait_for_publish(GOODBYE_S)
            self.client.disconnect()
        self.client.loop_stop()


def log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fleet", description="Take part in rollouts over a broker, as the device that this runs on.")
    parser.add_argument("--broker", required=True, help="mqtt://host:1883 or mqtts://user@host:8883")
    parser.add_argument("--name", default=platform.node(), help="the device's name, as in the inventory (the machine's own)")
    parser.add_argument("--fleet", default="default", help="the fleet's name (default)")
    parser.add_argument("--root", default=os.path.expanduser("~/.edgesdk"), help="where bundles are kept (~/.edgesdk)")
    parser.add_argument("--password-file", help="a file with the broker's password (or EDGESDK_MQTT_PASSWORD)")
    parser.add_argument("--ca", help="certificates that the broker's is checked against (the system's)")
    parser.add_argument("--cert", help="this device's own certificate, PEM")
    parser.add_argument("--key", help="its key, PEM")
    return parser


def trusted_keys(root: str) -> dict[str, bytes]:
    """Whom this device believes. Raises `InputError` where that is nobody."""
    path = os.path.join(root, "trusted")
    found = keys(path)
    if not found:
        raise InputError(f"{path}: no keys: every order would be refused", f"put yours there: edgesdk keys show > {path}")
    return found


def serve(arguments: list[str]) -> None:
    """Run until SIGTERM or Ctrl-C. Raises `EdgeError`."""
    asked = options().parse_args(arguments)
    if not NAME.fullmatch(asked.name):
        raise InputError(f"--name {asked.name}: cannot be a name", "use letters, digits, and . _ - inside")
    root = os.path.abspath(asked.root)
    broker = Broker(asked.broker, asked.password_file, asked.ca, asked.cert, asked.key)
    try:
        agent = Agent(broker, asked.name, asked.fleet, Store(root, check), trusted_keys(root))
    except Refused as error:
        raise InputError(f"--fleet: {error}", "give another name") from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()


def main() -> None:
    try:
        serve(sys.argv[2:])
    except EdgeError as error:
        sys.stderr.write(f"error: {error.what}\n  hint: {error.hint}\n")
        sys.exit(error.exit_code)
