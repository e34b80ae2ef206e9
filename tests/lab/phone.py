"""A stand-in for a phone: Debian's adbd and a real adb server in a network namespace of their own, reached by the real `adb` program.

It is this machine behind another door: no Android, no `getprop`, this machine's Python. Needs root, for the namespace.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from edgesdk.cache import cache_dir
from tests.lab.image import LabError

PACKAGES = ("adbd", "android-libbase", "android-libboringssl", "android-libcutils", "android-liblog")
"""Of Debian 12's backports; its own `adb` is older."""
SERIAL = "127.0.0.1:5555"


def missing() -> str:
    """What keeps the stand-in from running here, or nothing."""
    tools = [t for t in ("adb", "unshare", "nsenter", "ip", "apt-get", "dpkg") if shutil.which(t) is None]
    if tools:
        return f"the stand-in phone needs {', '.join(tools)}: run .ci/board-packages as root"
    return "" if os.geteuid() == 0 else "the stand-in phone needs root, for a network namespace"


def daemon() -> Path:
    """The folder of adbd and its libraries, fetched once. Raises `LabError`."""
    folder = cache_dir("lab") / "adbd"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "adbd.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                _fetch(Path(work))
                Path(work, "root").rename(folder)
    return folder


def _fetch(work: Path) -> None:
    """Debian's backports from wherever this machine gets Debian, without touching its own list of sources."""
    shown = _must("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)").splitlines()
    places = [line.split()[0] for line in shown if line.endswith(" bookworm main")]
    if not places:
        raise LabError("the stand-in phone needs Debian 12's packages: this machine's apt sources have none")
    (work / "sources.list").write_text(f"deb {places[0]} bookworm-backports main\n")
    (work / "lists" / "partial").mkdir(parents=True)
    options = [
        f"Dir::Etc::sourcelist={work}/sources.list",
        "Dir::Etc::sourceparts=-",
        f"Dir::State::lists={work}/lists",
        "APT::Sandbox::User=root",
    ]
    apt = ["apt-get", "-qq", *(x for o in options for x in ("-o", o))]
    _must(*apt, "update")
    _must(*apt, "download", *PACKAGES, cwd=work)
    for package in work.glob("*.deb"):
        _must("dpkg", "-x", str(package), str(work / "root"))


def _must(*argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise LabError(f"{argv[0]}: {done.stderr.strip()[-300:]}; the stand-in phone needs Debian 12's backports")
    return done.stdout


class Phone:
    """`folder` holds an `adb` that talks to the namespace's server: put it first on PATH. Ends what it started, and nothing else."""

    def __enter__(self) -> Self:
        self._parts = daemon()
        self._all = contextlib.ExitStack()
        self.folder = Path(self._all.enter_context(tempfile.TemporaryDirectory(prefix="edgesdk-phone-")))
        self.root = self.folder / "data"
        holder = self._start("unshare", "-n", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity", pipe=True)
        assert holder.stdout is not None
        holder.stdout.readline()
        self._net = f"--net=/proc/{holder.pid}/ns/net"
        real = shutil.which("adb")
        wrapper = self.folder / "adb"
        wrapper.write_text(f'#!/bin/sh\nHOME={self.folder} exec nsenter {self._net} {real} "$@"\n')
        wrapper.chmod(0o755)
        self._start(str(wrapper), "-L", "tcp:5037", "nodaemon", "server")
        try:
            self.start()
        except LabError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._all.close()

    @property
    def url(self) -> str:
        import sys

        return f"adb://{SERIAL}?root={self.root}&python={sys.executable}"

    def start(self) -> None:
        """Start its adbd, and wait until it answers. Raises `LabError`."""
        path = next(self._parts.glob("usr/lib/*/android"))
        program = self._parts / "usr/lib/android-sdk/platform-tools/adbd"
        environment = {**os.environ, "LD_LIBRARY_PATH": str(path), "ADBD_PORT": "5555"}
        self._adbd = self._start("nsenter", self._net, str(program), environment=environment)
        for _ in range(100):
            if (
                b"connected to"
                in subprocess.run([self.folder / "adb", "connect", SERIAL], capture_output=True, timeout=30, check=False).stdout
            ):
                return
            time.sleep(0.1)
        raise LabError("the stand-in phone does not answer")

    def kill(self) -> None:
        """Its adbd dies, as in a crash or a power cut of the phone."""
        self._adbd.kill()
        self._adbd.wait()

    def disconnect(self) -> None:
        """The cable is pulled, as adb's server sees it."""
        subprocess.run([self.folder / "adb", "disconnect", SERIAL], capture_output=True, timeout=30, check=False)

    def _start(self, *argv: str, pipe: bool = False, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        out = subprocess.PIPE if pipe else subprocess.DEVNULL
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, env=environment)
        self._all.callback(_end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
