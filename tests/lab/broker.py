"""Mosquitto on loopback, started and stopped as a test needs it."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

from tests.lab.board import LabError


def missing() -> str:
    """What to install, or nothing."""
    return "" if shutil.which("mosquitto", path="/usr/sbin:/usr/bin") else "needs Mosquitto: .ci/board-packages"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Mosquitto:
    """A broker in `folder`; `keeps`: what it retains outlives a restart; `lines`: more of its configuration."""

    def __init__(self, folder: Path, keeps: bool = True, lines: str = "", port: int | None = None, open_: bool = True) -> None:
        self.folder, self.port = folder, port or free_port()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # it gives up root
        self.config = folder / "mosquitto.conf"
        self.config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous {str(open_).lower()}\nlog_type error\nlog_type warning\n"
            + (f"persistence true\npersistence_location {folder}/\nautosave_interval 1\n" if keeps else "")
            + lines
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def link(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        program = shutil.which("mosquitto", path="/usr/sbin:/usr/bin")
        assert program
        with (self.folder / "mosquitto.log").open("ab") as log:
            self.process = subprocess.Popen([program, "-c", str(self.config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for _ in range(200):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise LabError(f"mosquitto does not start: {(self.folder / 'mosquitto.log').read_text()[-300:]}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None

    def rss_bytes(self) -> int:
        assert self.process
        return int(psutil.Process(self.process.pid).memory_info().rss)
