"""A thousand simulated devices at one Mosquitto on loopback: a good rollout with everything killed on the way, a bad canary, a failure at a later stage.

    python -m tests.bench.fleet_thousand [DEVICES] [OUT.json]      about three minutes on two cores

Devices run the agent's own protocol code and store (tests/lab/agents.py); only the golden check is played, and files are not flushed one by one.
Wall times are of this machine with everything on it: broker, controller and all devices.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from edgesdk.bundles import bundle_digest
from tests.lab.agents import Crowds
from tests.lab.broker import Mosquitto
from tests.tiny import tiny_bundle

COLS = 16384
"""Of the bundle's one layer: 262 kB, five chunks with the rest."""


class Watched:
    """A controller's process: how long it ran and the most memory it and the broker took."""

    def __init__(self, broker: Mosquitto, *args: str) -> None:
        self.broker, self.began = broker, time.perf_counter()
        self.rss = self.broker_rss = 0
        argv = [sys.executable, "-m", "edgesdk", "rollout", *args, "--json"]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def look(self) -> bool:
        """Whether it still runs."""
        if self.process.poll() is not None:
            return False
        self.rss = max(self.rss, psutil.Process(self.process.pid).memory_info().rss)
        self.broker_rss = max(self.broker_rss, self.broker.rss_bytes())
        time.sleep(0.1)
        return True

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def end(self, limit_s: float = 900.0) -> dict[str, Any]:
        until = time.perf_counter() + limit_s
        out = []
        import threading

        reader = threading.Thread(target=lambda: out.append(self.process.stdout.read()))  # type: ignore[union-attr]
        reader.start()
        while self.look():
            if time.perf_counter() > until:
                self.process.kill()
        reader.join()
        self.process.stdout.close()  # type: ignore[union-attr]
        return {**json.loads(out[0]), "code": self.process.returncode}


def row(name: str, watched: Watched, seconds: float, answer: dict[str, Any], **more: Any) -> dict[str, Any]:
    found = {
        "rollout": name, "seconds": round(seconds, 1), "code": answer["code"], "status": answer["status"], "why": answer["why"],
        "stage": answer["stage"], "stages": answer["stages"], "counts": answer["counts"],
        "controller_rss_mb": round(watched.rss / 1e6, 1), "broker_rss_mb": round(watched.broker_rss / 1e6, 1), **more,
    }  # fmt: skip
    print(json.dumps(found), flush=True)  # noqa: T201
    return found


def main(count: int = 1000, out: str = "") -> None:
    folder = Path(tempfile.mkdtemp(prefix="edgesdk-fleet-"))
    folder.chmod(0o755)
    os.environ["EDGESDK_KEYS"], os.environ["EDGESDK_ROLLOUTS"] = str(folder / "keys"), str(folder / "rollouts")
    names = [f"n{i:04d}" for i in range(count)]
    os.environ["EDGESDK_INVENTORY"] = str(folder / "inventory.toml")
    (folder / "inventory.toml").write_text("".join(f"[devices.{n}]\n" for n in names))
    for seed, name in enumerate(("good", "canary", "later")):
        tiny_bundle(folder / f"{name}.edge", seed=seed, cols=COLS)
    digests = {n: bundle_digest(folder / f"{n}.edge") for n in ("good", "canary", "later")}
    head = {"devices": count, "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    try:
        with Mosquitto(folder / "broker") as broker, Crowds(broker.port, folder / "crowd", names, processes=2) as crowd:
            rows = [good(broker, crowd, folder, digests, names), *bad(broker, crowd, folder, digests, names)]
            assert crowd.is_well()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if out:
        Path(out).write_text(json.dumps({**head, "load_after": os.getloadavg(), "rows": rows}, indent=1) + "\n")


def good(broker: Mosquitto, crowd: Crowds, folder: Path, digests: dict[str, str], names: list[str]) -> dict[str, Any]:
    """To all, with the controller killed and begun anew at a tenth and at a half, and the broker with it at a half."""
    began = time.perf_counter()
    watched = Watched(broker, "start", str(folder / "good.edge"), "--broker", broker.link, "--id", "good")
    for share in (0.1, 0.5):
        while len(crowd.installs()) < share * len(names) and watched.look():
            time.sleep(0.3)
        watched.kill()
        if share == 0.5:
            broker.stop(signal.SIGKILL)
            broker.start()
        rss, broker_rss = watched.rss, watched.broker_rss
        watched = Watched(broker, "resume", "good")
        watched.rss, watched.broker_rss = rss, broker_rss
    answer = watched.end()
    seconds = time.perf_counter() - began
    lines = crowd.installs()
    have = sum(c == digests["good"] for c in crowd.currents().values())
    more = {
        "have_it": have,
        "install_lines": len(lines),
        "devices_with_lines": len({x.split()[0] for x in lines}),
        "controller_killed": 2,
        "broker_killed": 1,
    }
    return row("good", watched, seconds, answer, **more)


def bad(broker: Mosquitto, crowd: Crowds, folder: Path, digests: dict[str, str], names: list[str]) -> list[dict[str, Any]]:
    """A canary that finds it wrong; then one device in a later stage."""
    rows = []
    for name, stages, broken in (("canary", "5,10%,50%,100%", names[:1]), ("later", "1,30%,100%", names[:: max(1, len(names) // 20)])):
        crowd.find_bad({digests[name]: broken})
        began, before = time.perf_counter(), len(crowd.installs())
        canary = ("--canary", names[0]) if name == "canary" else ()
        asked = ("start", str(folder / f"{name}.edge"), "--broker", broker.link, "--id", name, "--stages", stages, *canary)
        watched = Watched(broker, *asked)
        answer = watched.end()
        seconds = time.perf_counter() - began
        still = sum(c == digests["good"] for c in crowd.currents().values())
        rows.append(row(name, watched, seconds, answer, took_the_bad_one=len(crowd.installs()) - before, have_the_good_one=still))
    return rows


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, sys.argv[2] if len(sys.argv) > 2 else "")
