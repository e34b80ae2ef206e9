"""Small userlands for the tests: busybox's shell and tools alone, as on small boards, and mksh with toybox alone, as on Android."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import tempfile
from pathlib import Path

from edgesdk.cache import cache_dir
from tests.lab.image import LabError

PACKAGES = {"busybox": ("busybox",), "toybox": ("toybox", "mksh")}


def missing() -> str:
    """What keeps them from being fetched, or nothing."""
    tools = [t for t in ("apt-get", "dpkg") if shutil.which(t) is None]
    return f"small userlands need {', '.join(tools)}" if tools else ""


def userland(name: str) -> Path:
    """A folder that is all of PATH: `sh` and the tools of busybox or toybox. Raises `LabError`."""
    folder = cache_dir("lab") / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                _make(name, Path(work), folder)
    return folder / "path"


def _make(name: str, work: Path, folder: Path) -> None:
    _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *PACKAGES[name]], work)
    for package in work.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(work / "root")], work)
    programs, path = work / "made" / "bin", work / "made" / "path"
    programs.mkdir(parents=True)
    for program in PACKAGES[name]:
        shutil.copy2(work / "root" / "bin" / program, programs)
    path.mkdir()
    box = folder / "bin" / name
    listed = _run([str(programs / name), *(["--list"] if name == "busybox" else [])], work).split()
    for tool in listed:
        (path / tool).symlink_to(box)
    if name == "toybox":
        (path / "sh").symlink_to(folder / "bin" / "mksh")
    (work / "made").rename(folder)


def _run(argv: list[str], cwd: Path) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise LabError(f"{argv[0]}: {done.stderr.strip()[-300:]}")
    return done.stdout
