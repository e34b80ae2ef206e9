"""What is on a device before anything is done. Looking changes nothing there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from edgesdk.agent.client import agent_files, agent_folder
from edgesdk.bundle import Manifest
from edgesdk.deployment import Entry
from edgesdk.errors import DeviceError, InputError, LinkError
from edgesdk.history import read_history
from edgesdk.transport.base import Transport
from edgesdk.transport.scripts import FREE, HASHES, SUITS, SURVEY, script

if TYPE_CHECKING:
    from edgesdk.install import Source

RECENT = 20
"""Lines of history that are read with everything else."""
_SUITS = """
import importlib.util, json, os, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
with open(os.path.realpath(sys.executable), 'rb') as file:
    head = file.read(20)
print(json.dumps([head.hex(), [m for m in sys.argv[1:] if there(m)], sys.executable]))
"""
_MACHINES = {3: "x86", 40: "arm", 62: "x86-64", 183: "arm64", 243: "RISC-V"}
"""`e_machine` of ELF files (System V ABI)."""


@dataclass(frozen=True)
class Survey:
    """What is on the device before anything is done."""

    current: str | None
    previous: str | None
    good: dict[str, bool]  # installed digest → found good, the newest first
    parts: tuple[str, ...]  # names of folders of cut transfers, the newest first
    gone: tuple[str, ...]  # folders under root whose removal was cut off
    agents: tuple[str, ...]  # folders under root, the newest first
    trusted_keys: bool
    history: tuple[Entry, ...]
    members: dict[str, tuple[str, int]]  # sha256 → (path of a file there with that content, size)
    arrived: dict[str, str]  # name → sha256 of what is there of the bundle to install, whole or in its .part folder
    agent: dict[str, str]  # name → sha256
    free_bytes: int | None


def survey(transport: Transport, digest: str | None = None, names: Iterable[str] = (), *, recent: int = RECENT) -> Survey:
    """Look at the device; changes nothing. With `digest`, also at what an install of that bundle needs to know."""
    root = transport.root
    lines = transport.must(script("survey", SURVEY, root, str(recent)), "looking at the store").text.splitlines()
    told = [(words[0], words[1].split(" ")) for line in lines if len(words := (line + " ").split(" ", 1)) == 2]
    slots = {kind: rest[0] for kind, rest in told if kind in ("current", "previous")}
    stores = {rest[0]: rest[1] == "good" for kind, rest in told if kind == "store" and len(rest) >= 2}
    agents = [rest[0] for kind, rest in told if kind == "agent"]
    good = {name: is_good for name, is_good in stores.items() if not name.endswith((".part", ".gone"))}
    members: dict[str, tuple[str, int]] = {}
    for other in good if digest else ():
        if other == digest:
            continue
        manifest = _manifest(transport, other)
        if manifest is None:
            continue  # of another version: nothing to share
        members |= {m.sha256: (f"{root}/store/{other}/{m.name}", m.size_bytes) for m in manifest.members}
    return Survey(
        current=slots.get("current"),
        previous=slots.get("previous"),
        good=good,
        parts=tuple(name for name in stores if name.endswith(".part")),
        gone=(*(f"store/{n}" for n in stores if n.endswith(".gone")), *(f"agent/{a}" for a in agents if a.endswith(".gone"))),
        agents=tuple(f"agent/{a}" for a in agents if not a.endswith(".gone")),
        trusted_keys=any(kind == "trusted" for kind, _ in told),
        history=read_history(line.removeprefix("history ") for line in lines if line.startswith("history ")),
        members=members,
        arrived=hashes(transport, place(root, digest, good), names) if digest else {},
        agent=hashes(transport, agent_folder(root), agent_files()),
        free_bytes=free_bytes(transport.must(script("free", FREE, root), "looking at its disk").text) if digest else None,
    )


def _manifest(transport: Transport, digest: str) -> Manifest | None:
    """An installed bundle's manifest, or None where it cannot be read."""
    try:
        return Manifest.from_json(transport.get(f"{transport.root}/store/{digest}/manifest.json"), f"{digest[:12]}: manifest.json")
    except LinkError:
        raise
    except (InputError, DeviceError):
        return None


def place(root: str, digest: str, good: Iterable[str]) -> str:
    """Where a bundle's files are or arrive: its own folder if it has one, else its .part."""
    return f"{root}/store/{digest}" + ("" if digest in good else ".part")


def hashes(transport: Transport, folder: str, names: Iterable[str]) -> dict[str, str]:
    """name → sha256 of the files that are there."""
    found: dict[str, str] = {}
    listed = list(names)
    for i in range(0, len(listed), 50):
        text = transport.must(script("hashes", HASHES, folder, *listed[i : i + 50]), f"reading {folder}", timeout=600.0).text
        found |= read_hashes(text)
    return found


def read_hashes(text: str) -> dict[str, str]:
    """What the script `hashes` printed."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}


def free_bytes(text: str) -> int | None:
    """What `df -Pk` printed: free bytes, or None if the device cannot say."""
    fields = text.splitlines()[-1].split() if text else []
    return int(fields[-3]) * 1024 if len(fields) >= 5 and fields[-3].isdigit() else None


def damaged(transport: Transport, digest: str) -> tuple[str, ...]:
    """Files of an installed bundle that are not what its manifest says they are."""
    manifest = _manifest(transport, digest)
    if manifest is None:
        return ("manifest.json",)
    wanted = {"manifest.json": digest} | {m.name: m.sha256 for m in manifest.members}
    found = hashes(transport, f"{transport.root}/store/{digest}", wanted)
    return tuple(name for name, sha in wanted.items() if found.get(name) != sha)


def require_suitable(transport: Transport, source: Source, python: str) -> None:
    """Whether the device can run the bundle, before anything is sent. Raises `DeviceError`: another architecture, no runtime, no numpy."""
    from edgesdk.agent.installed import MODULES, PACKAGES

    runtime = source.manifest.runtime
    either = [m.partition(".")[0] for m in MODULES.get(runtime, ())]
    argv = script("suits", SUITS, python, "-c", _SUITS, "numpy", *either)
    result = transport.must(argv, "looking for the runtime")
    try:
        head, there, interpreter = json.loads(result.text.splitlines()[-1])
    except (ValueError, IndexError):
        raise DeviceError(f"{transport.link}: '{python}' answers '{result.text[:60]}'", "give another one with --python PATH") from None
    for name in (m.name for m in source.manifest.members if PurePosixPath(m.name).suffix == ".so"):
        wanted, has = _machine(source.head(name)), _machine(bytes.fromhex(head))
        if wanted and has and wanted != has:
            what = f"{transport.link}: {name} in the bundle is for {wanted}, the device's Python is for {has}"
            raise DeviceError(what, "nothing was sent; plan and build it for this device: edgesdk plan --device …")
    missing = [PACKAGES.get(runtime, runtime)] if either and not set(either) & set(there) else []
    missing += ["numpy"] if "numpy" not in there else []
    if missing:
        hint = f"nothing was sent; install it there: {interpreter} -m pip install {' '.join(missing)}, or --python PATH"
        raise DeviceError(f"{transport.link}: {' and '.join(missing)} not found for {interpreter}", hint)


def _machine(head: bytes) -> str | None:
    """What an ELF file runs on, or None where `head` begins none."""
    if head[:4] != b"\x7fELF" or len(head) < 20:
        return None
    number = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    bits = "" if number in (62, 183, 3, 40) else f" of {32 * head[4]} bits"
    return _MACHINES.get(number, f"machine {number}") + bits
