"""A board whose network loses packets: its Ethernet frames pass a relay that drops some, both ways, between two real TCP stacks.

The relay is a process in a network namespace of its own, with a TAP device there and a datagram socket to qemu; `ssh` enters that namespace. Needs root.
The kernel's own `tc netem` is not in every kernel; this needs none.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.lab.board import Board
from tests.lab.image import LabError

_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_HOST, _BOARD = "10.0.2.2", "10.0.2.15"


class LossyBoard(Board):
    """`loss`: of all frames, each way. While it is open, `ssh` on PATH is one that gets there."""

    def __init__(self, loss: float, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.host, self._loss = _BOARD, loss

    def __enter__(self) -> Self:
        folder = Path(self._folder.name)
        argv = ["unshare", "-n", sys.executable, "-m", "tests.lab.lossy", str(folder), str(self._loss)]
        self._relay = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != b"up\n":
            raise LabError("no TAP device in a network namespace: this needs root and /dev/net/tun")
        wrapper = folder / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec nsenter --net=/proc/{self._relay.pid}/ns/net {shutil.which("ssh")} "$@"\n')
        wrapper.chmod(0o755)
        self._path, os.environ["PATH"] = os.environ["PATH"], f"{folder}{os.pathsep}{os.environ['PATH']}"
        return super().__enter__()

    def __exit__(self, *unused: object) -> None:
        os.environ["PATH"] = self._path
        assert self._relay.stdin is not None and self._relay.stdout is not None
        self._relay.stdin.close()
        self._relay.stdout.close()
        self._relay.wait(10)
        super().__exit__(*unused)

    @property
    def lost(self) -> tuple[int, int]:
        """Frames lost, and all of them."""
        lost, total = (Path(self._folder.name) / "lost").read_text().split()
        return int(lost), int(total)

    def _command(self) -> list[str]:
        ends = f"local.type=unix,local.path={self._folder.name}/board,remote.type=unix,remote.path={self._folder.name}/relay"
        command = [f"dgram,id=n,{ends}" if word.startswith("user,id=n") else word for word in super()._command()]
        self.port = 22
        return command


def main() -> None:
    """Relay frames between a TAP device here and the board's, until our input ends."""
    folder, loss = Path(sys.argv[1]), float(sys.argv[2])
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", b"board0", _TAP_WITHOUT_HEADER))
    for words in (["addr", "add", f"{_HOST}/24", "dev", "board0"], ["link", "set", "board0", "up"], ["link", "set", "lo", "up"]):
        subprocess.run(["ip", *words], check=True)
    board = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    board.bind(str(folder / "relay"))
    sys.stdout.write("up\n")
    sys.stdout.flush()
    dice, lost, total = random.Random(5), 0, 0
    while True:
        ready, _, _ = select.select([tap, board, 0], [], [])
        if 0 in ready and not os.read(0, 1):
            return
        for end in ready:
            frame = os.read(tap, 65536) if end is tap else board.recv(65536) if end is board else b""
            total += 1
            if dice.random() < loss:
                lost += 1
                (folder / "lost").write_text(f"{lost} {total}")
                continue
            try:
                if end is tap:
                    board.sendto(frame, str(folder / "board"))
                elif end is board:
                    os.write(tap, frame)
            except OSError:  # nobody is there yet
                pass


if __name__ == "__main__":
    main()
