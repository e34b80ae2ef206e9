"""A serial console on a pair of pseudo-terminals: a login and a shell behind a line that spoils bytes, and whose plug can be pulled."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import select
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Self

TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
"""Makes the terminal that it is started on its own, then becomes what it is told to."""
GETTY = """
import os, sys, termios
while True:
    sys.stdout.write("\\r\\nboard login: "); sys.stdout.flush()
    name = sys.stdin.readline().strip()
    if not name:
        continue
    old = termios.tcgetattr(0); new = termios.tcgetattr(0); new[3] &= ~termios.ECHO
    sys.stdout.write("Password: "); sys.stdout.flush()
    termios.tcsetattr(0, termios.TCSANOW, new)
    word = sys.stdin.readline().strip()
    termios.tcsetattr(0, termios.TCSANOW, old)
    if name == "pi" and word == "berry":
        print("\\r\\nWelcome"); sys.stdout.flush()
        os.spawnvp(os.P_WAIT, "sh", ["sh", "-i"])
    else:
        print("\\r\\nLogin incorrect")
"""


class Console:
    """`path` is the port as the host sees it. `noise` is the share of bytes that are spoiled, in both directions."""

    def __init__(self, folder: Path, *, noise: float = 0.0, login: bool = False, seed: int = 0) -> None:
        self.path, self.noise, self.login = folder / "ttyUSB0", noise, login
        self._random = random.Random(seed)
        self.passed = 0

    def __enter__(self) -> Self:
        self._board, slave = pty.openpty()

        argv = [sys.executable, "-c", TAKE, *([sys.executable, "-c", GETTY] if self.login else ["sh", "-i"])]
        environment = {**os.environ, "PS1": "# ", "ENV": "", "TERM": "dumb"}
        self._process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment)
        os.close(slave)
        self._host: int | None = None
        self._over = False
        self.plug()
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()
        return self

    def plug(self) -> None:
        """The adapter appears."""
        self._host, slave = pty.openpty()
        self.path.symlink_to(os.ttyname(slave))
        settings = termios.tcgetattr(slave)
        settings[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
        settings[1] &= ~termios.OPOST
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        os.close(slave)

    def unplug(self) -> None:
        """The adapter disappears; what was on its way is lost."""
        host, self._host = self._host, None
        self.path.unlink()
        time.sleep(0.1)
        assert host is not None
        os.close(host)

    def _relay(self) -> None:
        while not self._over:
            ends = [fd for fd in (self._board, self._host) if fd is not None]
            with contextlib.suppress(OSError, ValueError):
                ready, _, _ = select.select(ends, [], [], 0.05)
                for fd in ready:
                    try:
                        data = os.read(fd, 512)
                    except OSError:  # nobody has the other end open
                        time.sleep(0.01)
                        continue
                    target = self._host if fd == self._board else self._board
                    if target is not None and data:
                        self.passed += len(data)
                        os.write(target, self._spoiled(data))

    def _spoiled(self, data: bytes) -> bytes:
        out = bytearray(data)
        for i in range(len(out)):
            if self._random.random() < self.noise:
                out[i] = self._random.randrange(256)
        return bytes(out)

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join(5)
        self._process.kill()
        self._process.wait()
        for fd in (self._board, self._host):
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)
