"""What goes into an image so that its first boot checks a bundle: the store as an install lays it out, the agent, and something that starts the check."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from edgesdk.agent.client import ARCHIVE, agent_files, agent_folder
from edgesdk.bundles import BESIDE, member_names, read_member
from edgesdk.errors import InputError
from edgesdk.image.files import ROOT_USER, Entry, File, Folder, Owner, Symlink
from edgesdk.install import Source
from edgesdk.transport.base import Blob

ROOT = "/var/lib/edgesdk"
CHECK = "first_boot.py"
UNIT = """[Unit]
Description=Check the bundle that came with the image
ConditionPathExists={root}/{pending}
After=local-fs.target

[Service]
Type=oneshot
ExecStart={python} -B {root}/{check} {root} {agent}
TimeoutStartSec=900

[Install]
WantedBy=multi-user.target
"""
SCRIPT = """#!/bin/sh
# Checks the bundle that came with the image, once.
case "$1" in start|"") [ -e {root}/{pending} ] && {python} -B {root}/{check} {root} {agent} & ;; esac
exit 0
"""
PENDING = "first-boot.pending"
"""Under the root: the digest and the signer's id, until the check is done."""


class System(Protocol):
    """A root file system that is looked at: inside an image (`ExtFiles`), or in a folder."""

    image: Path
    part: Any

    def exists(self, path: str) -> bool: ...
    def resolve(self, path: str) -> str: ...


def entries(
    source: Source, system: System, root: str = ROOT, owner: Owner = ROOT_USER, python: str = "python3", signer: str | None = None
) -> list[Entry]:
    """What to put where. Raises `InputError` where the image has no Python or nothing that starts services."""
    if not source.manifest.golden:
        what = f"{source.path}: holds no golden outputs: it was built for a runtime that the host cannot run"
        raise InputError(what, "such a program cannot be checked on the first boot; build for --runtime litert or executorch")
    interpreter = _python(system, python)
    root = system.resolve(root)
    store = f"{root}/store/{source.digest}"
    contents = {f"{store}/{m.name}": source.blob(m) for m in source.manifest.members}
    beside = sorted(set(BESIDE) & set(member_names(source.path)))
    contents |= {f"{store}/{name}": Blob.of(read_member(source.path, name)) for name in beside}
    contents |= {f"{agent_folder(root)}/{name}": Blob.of(data) for name, data in agent_files().items()}
    contents[f"{root}/{CHECK}"] = Blob.of((files("edgesdk.image") / CHECK).read_bytes())
    contents[f"{root}/{PENDING}"] = Blob.of(f"{source.digest} {signer or '-'}\n".encode())
    made: list[Entry] = [Folder(path, owner) for path in _folders(contents, root)]
    made = [*(Folder(str(p)) for p in reversed(PurePosixPath(root).parents) if str(p) != "/"), *made]
    made += [File(path, blob, owner) for path, blob in contents.items()]
    return [*made, *_starter(system, root, interpreter)]


def _folders(paths: dict[str, Blob], root: str) -> list[str]:
    """Every folder from `root` down, parents first."""
    found = {str(p) for path in paths for p in PurePosixPath(path).parents if str(p) == root or str(p).startswith(root + "/")}
    return sorted(found)


def _python(system: System, python: str) -> str:
    if python.startswith("/"):
        places = [python]
    else:
        places = [f"/usr/bin/{python}", f"/usr/local/bin/{python}", f"/bin/{python}"]
    for place in places:
        if system.exists(system.resolve(place)):
            return place
    what = f"{system.image}: {system.part} has no {python} ({', '.join(places)})"
    raise InputError(
        what, "the first boot checks the bundle with Python 3.9 or later: give an image that has it, or its path with --python"
    )


def _starter(system: System, root: str, python: str) -> list[Entry]:
    """A systemd unit, or a script for busybox's and System V's init."""
    words = {"root": root, "python": python, "check": CHECK, "pending": PENDING, "agent": f"{agent_folder(root)}/{ARCHIVE}"}
    if any(system.exists(system.resolve(p)) for p in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")):
        name, folder = "edgesdk-first-boot.service", "/etc/systemd/system"
        wants = f"{folder}/multi-user.target.wants"
        unit = File(f"{folder}/{name}", Blob.of(UNIT.format(**words).encode()))
        return [Folder("/etc/systemd"), Folder(folder), Folder(wants), unit, Symlink(f"{wants}/{name}", f"../{name}")]
    script = Blob.of(SCRIPT.format(**words).encode())
    if system.exists("/etc/rc2.d"):  # System V's init: a script, and a link for each level that users reach
        links: list[Entry] = [
            Symlink(f"/etc/rc{n}.d/S99edgesdk", "../init.d/edgesdk") for n in (2, 3, 4, 5) if system.exists(f"/etc/rc{n}.d")
        ]
        return [File("/etc/init.d/edgesdk", script, mode=0o755), *links]
    if system.exists("/etc/init.d/rcS"):  # busybox's, as Buildroot has it: rcS runs S??*
        return [File("/etc/init.d/S99edgesdk", script, mode=0o755)]
    what = f"{system.image}: {system.part} has neither systemd nor /etc/init.d/rcS nor /etc/rc2.d: nothing would start the check"
    raise InputError(what, "give an image with one of them, or boot it and use `edgesdk flash BUNDLE --on …`")
