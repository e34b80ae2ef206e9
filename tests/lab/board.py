"""A board that runs under qemu: boots in seconds, reached over real ssh, its link can be cut and its disk filled. Timings mean nothing."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Self

from tests.lab.image import Image, build

SSH = (
    "-o",
    "StrictHostKeyChecking=no",
    "-o",
    "UserKnownHostsFile=/dev/null",
    "-o",
    "LogLevel=ERROR",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=20",
)


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Link:
    """A TCP relay on loopback that passes at most `limit` bytes towards the board, then cuts every connection."""

    def __init__(self, target: int) -> None:
        self.target, self.port, self.limit, self.passed = target, free_port(), float("inf"), 0
        self._server = socket.create_server(("127.0.0.1", self.port))
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, count: float) -> None:
        self.limit, self.passed = count, 0

    def restore(self) -> None:
        self.cut_after(float("inf"))

    def close(self) -> None:
        self._open = False
        self._server.close()

    def _accept(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                client, _ = self._server.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as board:
            while True:
                ready, _, _ = select.select([client, board], [], [], 60)
                for end in ready:
                    data = end.recv(65536)
                    if not data or self.passed >= self.limit:
                        return
                    if end is client:
                        self.passed += len(data)
                    (board if end is client else client).sendall(data)


class Board:
    """`with Board() as board:`; `board.url` is what --on takes. Raises `RuntimeError` with the console's text when it does not boot."""

    def __init__(self, cpu: str = "cortex-a76") -> None:
        self.image: Image = build()
        self.port, self.cpu = free_port(), cpu

    def __enter__(self) -> Self:
        start = time.monotonic()
        command = [
            "qemu-system-aarch64", "-M", "virt", "-cpu", self.cpu, "-smp", "2", "-m", "1024", "-display", "none", "-nodefaults", "-no-reboot",
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd), "-append", "console=ttyAMA0 quiet panic=1 mitigations=off",
            "-drive", f"if=none,id=d,file={self.image.disk},format=raw,readonly=on", "-device", "virtio-blk-pci,drive=d",
            "-netdev", f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22", "-device", "virtio-net-pci,netdev=n,romfile=",
            "-serial", "stdio", "-monitor", "none",
        ]  # fmt: skip
        self._qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.console = b""
        try:
            self._wait_for(b"BOARD-READY", 90)
            self.boot_s = time.monotonic() - start
            threading.Thread(target=self._drain, daemon=True).start()
            self._wait_for_ssh(30)
        except BaseException:
            self.__exit__()
            raise
        self.link = Link(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "link"):
            self.link.close()
        self._qemu.kill()
        self._qemu.wait(20)
        assert self._qemu.stdout is not None
        self._qemu.stdout.close()

    def _wait_for(self, mark: bytes, limit_s: float) -> None:
        assert self._qemu.stdout is not None
        end = time.monotonic() + limit_s
        while mark not in self.console:
            if not select.select([self._qemu.stdout], [], [], max(0.0, end - time.monotonic()))[0] or self._qemu.poll() is not None:
                raise RuntimeError(
                    f"the board did not boot in {limit_s:.0f} s; its console:\n{self.console.decode(errors='replace')[-2000:]}"
                )
            self.console += self._qemu.stdout.read1(65536)  # type: ignore[attr-defined]

    def _drain(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := self._qemu.stdout.read1(65536):  # type: ignore[union-attr]
                self.console += data

    def _wait_for_ssh(self, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        while self.ssh("true").returncode != 0:
            if time.monotonic() > end:
                raise RuntimeError("the board's ssh does not answer")
            time.sleep(0.3)

    @property
    def url(self) -> str:
        """Straight to the board."""
        return self._url(self.port)

    @property
    def cuttable_url(self) -> str:
        """Through `link`, which the test can cut."""
        return self._url(self.link.port)

    def _url(self, port: int) -> str:
        return f"ssh://root@127.0.0.1:{port}?identity={self.image.key}&root=/data/edgesdk&known_hosts={self.image.key}.hosts{port}"

    def ssh(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the board."""
        command = ["ssh", *SSH, "-i", str(self.image.key), "-p", str(self.port), "root@127.0.0.1", *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    def fill_disk(self, leave_bytes: int = 100_000) -> None:
        """Fill the data disk up to `leave_bytes`."""
        free = int(self.ssh("df -k /data | tail -1 | awk '{print $4}'").stdout) * 1024
        self.ssh(f"dd if=/dev/zero of=/data/filler bs=1024 count={max(0, free - leave_bytes) // 1024}")

    def free_disk(self) -> None:
        self.ssh("rm -f /data/filler")


def missing() -> str | None:
    """What to run when the board cannot be started here, else None."""
    found = [
        p
        for p in ("qemu-system-aarch64", "ssh", "cpio", "dpkg", "apt-get")
        if not any(Path(d, p).exists() for d in ("/usr/bin", "/bin", "/usr/sbin"))
    ]
    return f"{', '.join(found)} not found: run .ci/board-packages as root" if found else None
