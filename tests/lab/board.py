"""A board that runs under qemu: boots in seconds, reached over real ssh, its link can be cut and its disk filled. Timings mean nothing."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

from tests.lab.image import Image, LabError, build
from tests.lab.powered import Disk

TOOLS = ("qemu-system-aarch64", "ssh", "ssh-keygen", "cpio", "mkfs.ext4", "dpkg", "apt-get")
OPTIONS = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes", "ConnectTimeout=20")


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Link:
    """A TCP relay on loopback that passes at most `limit` bytes towards the board, then cuts every connection.

    `bytes_per_s`: how fast it is, both ways together; None: as fast as it can.
    """

    def __init__(self, target: int) -> None:
        self.target, self.limit, self.passed = target, float("inf"), 0
        self.bytes_per_s: float | None = None
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)  # what waits here has not been sent
        self._server.bind(("127.0.0.1", 0))
        self._server.listen()
        self.port = int(self._server.getsockname()[1])
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, count: float) -> None:
        """Let `count` more bytes pass (a block more at most); 0 cuts at once."""
        self.limit, self.passed = count, 0

    def restore(self) -> None:
        """Let everything pass again."""
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
                    data = end.recv(65536 if self.bytes_per_s is None else 4096)
                    if not data or self.passed >= self.limit:
                        return
                    if end is client:
                        self.passed += len(data)
                    if self.bytes_per_s is not None:
                        time.sleep(len(data) / self.bytes_per_s)
                    (board if end is client else client).sendall(data)


class Board:
    """`with Board() as board:`; `board.url` is what --on takes. Raises `LabError` with the console's text when it does not boot.

    `data` is the size of the disk at /data, as mount takes it: in memory, or with `keeps` on an ext4 disk that is there again behind `power_cut`.
    The console's text stays in `console.log` beside the image.
    """

    def __init__(self, cpu: str = "cortex-a76", memory_mb: int = 1024, data: str = "48M", *, keeps: bool = False) -> None:
        self.cpu, self.memory_mb, self.data, self.keeps = cpu, memory_mb, data, keeps
        self.image: Image = build()
        self.console = b""
        self.host, self.port = "127.0.0.1", 0
        self._folder = tempfile.TemporaryDirectory(prefix="edgesdk-board-")

    def __enter__(self) -> Self:
        try:
            if self.keeps:
                self.disk = Disk(Path(self._folder.name), self.data)
            self._start()
        except BaseException:
            self.__exit__()
            raise
        self.link = Link(self.port)
        return self

    def _start(self) -> None:
        for attempt in range(3):
            try:
                self._boot()
                break
            except LabError:  # another process took the port in between
                if attempt == 2 or b"host forwarding" not in self.console:
                    raise
        self._wait_for_ssh(30)

    def power_cut(self) -> None:
        """The machine is gone from one moment to the next (kill -9), and what its disk had not been told to keep."""
        self._qemu.kill()
        self._end()
        if self.keeps:
            self.disk.power_cut()

    def power_on(self) -> None:
        """Boot again behind a power cut; the address is a new one."""
        with contextlib.suppress(OSError):
            Path(self._folder.name, "known_hosts").unlink()  # its host key is made anew at each boot
        self._start()
        self.link.target = self.port

    def _command(self) -> list[str]:
        """What starts the machine, with `self.port` as its ssh."""
        return [
            "setpriv", "--pdeathsig", "KILL",  # never outlives the tests
            "qemu-system-aarch64", "-M", "virt", "-cpu", self.cpu, "-smp", "2", "-m", str(self.memory_mb), "-display", "none", "-nodefaults",
            "-no-reboot", "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd),
            "-append", f"console=ttyAMA0 quiet panic=1 mitigations=off lab.data={self.data}",
            "-drive", f"if=none,id=d,file={self.image.disk},format=raw,readonly=on", "-device", "virtio-blk-pci,drive=d",
            "-netdev", f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22", "-device", "virtio-net-pci,netdev=n,romfile=",
            "-serial", "stdio", "-monitor", "none",
            *(("-drive", f"if=none,id=k,{self.disk.drive}", "-device", "virtio-blk-pci,drive=k") if self.keeps else ()),
        ]  # fmt: skip

    def _boot(self) -> None:
        start, self.port, self.console = time.monotonic(), free_port(), b""
        self._qemu = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._wait_for(b"BOARD-READY", 90)
        self.boot_s = time.monotonic() - start
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        with contextlib.suppress(OSError):
            self.image.disk.with_name("console.log").write_bytes(self.console)
        self._folder.cleanup()

    def stop(self) -> None:
        """Pull the plug."""
        if hasattr(self, "link"):
            self.link.close()
        if hasattr(self, "_qemu"):
            self._qemu.kill()
            self._end()
        if self.keeps and hasattr(self, "disk"):
            self.disk.close()

    def _end(self) -> None:
        """Behind a kill."""
        self._qemu.wait(20)
        if hasattr(self, "_reader"):
            self._reader.join(5)
        if self._qemu.stdout is not None:
            self._qemu.stdout.close()

    def _wait_for(self, mark: bytes, limit_s: float) -> None:
        assert self._qemu.stdout is not None
        end = time.monotonic() + limit_s
        while mark not in self.console:
            ready, _, _ = select.select([self._qemu.stdout], [], [], max(0.0, end - time.monotonic()))
            data = self._qemu.stdout.read1(65536) if ready else b""  # type: ignore[attr-defined]
            if not data:
                why = "qemu ended" if ready else f"no sign of life in {limit_s:.0f} s"
                raise LabError(f"the board did not boot ({why}); its console:\n{self.console.decode(errors='replace')[-2000:]}")
            self.console += data

    def _drain(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := self._qemu.stdout.read1(65536):  # type: ignore[union-attr]
                self.console += data

    def _wait_for_ssh(self, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        while self.ssh("true").returncode != 0:
            if time.monotonic() > end:
                raise LabError("the board's ssh does not answer")
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
        return f"ssh://root@{self.host}:{port}?identity={self.image.key}&root=/data/edgesdk&known_hosts={self._folder.name}/known_hosts"

    def ssh(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the board."""
        options = [word for o in OPTIONS for word in ("-o", o)]
        command = ["ssh", *options, "-i", str(self.image.key), "-p", str(self.port), f"root@{self.host}", *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    def fill_disk(self, leave_bytes: int = 100_000) -> None:
        """Fill the disk at /data up to `leave_bytes`."""
        free = self.free_bytes()
        self.ssh(f"dd if=/dev/zero of=/data/filler bs=1024 count={max(0, free - leave_bytes) // 1024}")
        if self.free_bytes() > leave_bytes + 65536:
            raise LabError("the board's disk could not be filled")

    def free_disk(self) -> None:
        """Undo `fill_disk`."""
        self.ssh("rm", "-f", "/data/filler")

    def free_bytes(self) -> int:
        """Free bytes at /data."""
        return int(self.ssh("df -k /data | tail -1 | awk '{print $4}'").stdout) * 1024


def missing() -> str | None:
    """What to run when the board cannot be started here, else None."""
    path = ":".join(("/usr/sbin", "/sbin", "/usr/bin", "/bin"))
    absent = [tool for tool in TOOLS if not shutil.which(tool) and not shutil.which(tool, path=path)]
    return f"{', '.join(absent)} not found\n  hint: run .ci/board-packages as root, then `make board`" if absent else None
