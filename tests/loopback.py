"""A real sshd on loopback with keys of its own, and a proxy that cuts the line after so many bytes."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Server:
    port: int
    keys: Path
    user: str

    def link(self, root: Path, port: int | None = None, **query: str) -> str:
        options = {
            "identity": str(self.keys / "client"),
            "known_hosts": str(self.keys / "known_hosts"),
            "root": str(root),
            "python": sys.executable,
        }
        text = "&".join(f"{k}={quote(v)}" for k, v in (options | query).items())
        return f"ssh://{self.user}@127.0.0.1:{port or self.port}?{text}"


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Start sshd for this user; skips the test where that is impossible."""
    import getpass

    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs OpenSSH's client and server: apt install openssh-server")
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "client.pub", folder / "authorized")
    port = free_port()
    options = (
        f"Port={port}", "ListenAddress=127.0.0.1", f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/authorized", "PidFile=none",
        "StrictModes=no", "UsePAM=no", "PasswordAuthentication=no", "MaxStartups=50",
    )  # fmt: skip
    with contextlib.suppress(OSError):
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it when root runs it
    argv = [SSHD, "-D", "-e", "-f", "/dev/null", *(x for o in options for x in ("-o", o))]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            for _ in range(100):
                with socket.socket() as s:
                    if s.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if server.poll() is not None:
                    pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-200:]}")
                time.sleep(0.05)
            yield Server(port, folder, getpass.getuser())
        finally:
            server.terminate()
            server.wait(10)


@contextlib.contextmanager
def cutting_proxy(port: int, after_bytes: int) -> Iterator[int]:
    """A port that passes on to `port` and closes every connection once `after_bytes` have gone towards it, in all."""
    listener = socket.create_server(("127.0.0.1", 0))
    left = [after_bytes]

    def pump(source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                if counted:
                    left[0] -= len(data)
                    if left[0] < 0:
                        break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for source, sink, counted in ((client, server, True), (server, client, False)):
                    threading.Thread(target=pump, args=(source, sink, counted), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
