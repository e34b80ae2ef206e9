"""How a bundle gets onto a device, as a generator of steps. It touches nothing itself.

On the device, under `root`:

    store/<digest>/          a whole, verified bundle; `.good` in it once its golden outputs matched there
    store/<digest>.part/     one that is being sent; a later run goes on with it
    current, previous        links into store/, each replaced in one move
    agent/<digest>/          the agent and the runner

A new bundle is checked in the store, before `current` moves: a program that fails its check is never the current one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from edgesdk.agent.client import agent_files, agent_folder, failed_cases
from edgesdk.bundle import Manifest, Member
from edgesdk.errors import CheckFailed, DeviceError, InputError
from edgesdk.transport.base import Blob, Transport
from edgesdk.transport.scripts import ACTIVATE, FREE, HASHES, REMOVE, SHARE, SURVEY, UNLINK, script
from edgesdk.transport.steps import Ask, Link, Put, Run, Step, Write
from edgesdk.units import show_bytes, show_seconds

GATE_CALLS = 11
Steps = Generator[Step, Any, None]


@dataclass(frozen=True)
class Survey:
    """What is on the device before anything is done."""

    current: str | None
    previous: str | None
    good: dict[str, bool]  # installed digest → found good; newest knowledge, no order
    parts: tuple[str, ...]  # names of folders of cut transfers
    members: dict[str, tuple[str, int]]  # sha256 → (path of a file there with that content, size)
    arrived: dict[str, str]  # name → sha256, in the .part folder of the bundle to install
    agent: dict[str, str]  # name → sha256
    free_bytes: int | None


def survey(transport: Transport, digest: str | None = None, names: Iterable[str] = ()) -> Survey:
    """Look at the device; changes nothing. With `digest`, also at what an install of that bundle needs to know."""
    root = transport.root
    lines = [line.split() for line in transport.must(script("survey", SURVEY, root), "looking at the store").text.splitlines()]
    slots = {w[0]: w[1] for w in lines if len(w) == 2}
    good = {w[1]: w[2] == "good" for w in lines if len(w) == 3 and w[0] == "store" and not w[1].endswith(".part")}
    members: dict[str, tuple[str, int]] = {}
    for other in good if digest and digest not in good else ():
        try:
            manifest = Manifest.from_json(transport.get(f"{root}/store/{other}/manifest.json"), f"{other[:12]}: manifest.json")
        except (InputError, DeviceError):
            continue  # of another version: nothing to share
        members |= {m.sha256: (f"{root}/store/{other}/{m.name}", m.size_bytes) for m in manifest.members}
    return Survey(
        current=slots.get("current"),
        previous=slots.get("previous"),
        good=good,
        members=members,
        parts=tuple(w[1] for w in lines if len(w) == 3 and w[0] == "store" and w[1].endswith(".part")),
        arrived=hashes(transport, f"{root}/store/{digest}.part", names) if digest and digest not in good else {},
        agent=hashes(transport, agent_folder(root), agent_files()),
        free_bytes=_free(transport) if digest else None,
    )


def hashes(transport: Transport, folder: str, names: Iterable[str]) -> dict[str, str]:
    """name → sha256 of the files that are there."""
    found: dict[str, str] = {}
    listed = list(names)
    for i in range(0, len(listed), 50):
        text = transport.must(script("hashes", HASHES, folder, *listed[i : i + 50]), f"reading {folder}", timeout=300.0).text
        found |= {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    return found


def _free(transport: Transport) -> int | None:
    """Free bytes where the store is, or None if the device cannot say."""
    result = transport.run(script("free", FREE, transport.root))
    fields = result.text.splitlines()[-1].split() if result.code == 0 and result.text else []
    return int(fields[-3]) * 1024 if len(fields) >= 5 and fields[-3].isdigit() else None


@dataclass(frozen=True)
class Source:
    """A bundle file on the host."""

    path: Path
    manifest: Manifest
    digest: str

    def blob(self, member: Member) -> Blob:
        def read() -> IO[bytes]:
            return zipfile.ZipFile(self.path).open(member.name)

        return Blob(member.size_bytes, member.sha256, read)


def read_source(path: str | Path) -> Source:
    """A verified bundle. Raises `InputError` and `CheckFailed` if it is damaged or names files outside itself."""
    from edgesdk.bundles import bundle_digest, verify_bundle

    manifest = verify_bundle(path)
    for member in manifest.members:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or not name.parts or "\n" in member.name or member.name.startswith("-"):
            raise InputError(f"{path}: member '{member.name}' is not a plain relative name", "build the bundle again")
    return Source(Path(path), manifest, bundle_digest(path))


def install(source: Source, before: Survey, root: str, python: str, *, keep: int = 2, latency_gate_s: float | None = None) -> Steps:
    """The steps from `before` to `source` being current and good. Raises `CheckFailed`; `current` is then what it was."""
    digest, store = source.digest, f"{root}/store/{source.digest}"
    if not source.manifest.golden:
        what = f"{source.path}: holds no golden outputs: it was built for a runtime that the host cannot run"
        raise InputError(what, "such a program cannot be checked after an install; build for --runtime litert or executorch")
    if digest not in before.good:
        yield from _transfer(source, before, root)
    yield from _send_agent(before, root)
    yield from _accept(source, before, store, latency_gate_s)
    yield Write(f"{store}/.good", f"{digest}\n")
    old = before.current if before.current != digest else before.previous
    if old and old in before.good and old != digest:
        yield Link(f"{root}/previous", f"store/{old}", python)
    yield Link(f"{root}/current", f"store/{digest}", python)
    state = yield Ask("health", (("folder", f"{root}/current"),), "what is current is whole")
    if state["digest"] != digest or state["bad"]:
        if old and old in before.good:
            yield Link(f"{root}/current", f"store/{old}", python)
        else:
            yield Run(script("unlink", UNLINK, f"{root}/current"), "nothing was installed before")
        bad = ", ".join(state["bad"]) or "manifest.json"
        hint = "check the storage of the device, then flash again"
        raise CheckFailed(f"the installed {bad} changed on the device's disk; rolled back to {_name(old)}", hint)
    spare = [d for d in before.good if d not in (digest, old)]
    stale = [p for p in before.parts if p != f"{digest}.part"]
    if gone := spare[max(0, keep - 2) :] + stale:
        yield Run(script("remove", REMOVE, *(f"{root}/store/{d}" for d in gone)), f"keep {keep}")


def _transfer(source: Source, before: Survey, root: str) -> Steps:
    part = f"{root}/store/{source.digest}.part"
    wanted = [m for m in source.manifest.members if before.arrived.get(m.name) != m.sha256]
    missing = [m for m in wanted if m.sha256 not in before.members]
    needed = sum(m.size_bytes for m in missing)
    if before.free_bytes is not None and needed > before.free_bytes:
        hint = "nothing was sent, what is installed stays; free some space there, or build a smaller plan (--storage)"
        raise DeviceError(f"the device's disk is full: {show_bytes(needed)} needed, {show_bytes(before.free_bytes)} free", hint)
    for member in wanted:
        if member in missing:
            yield Put(f"{part}/{member.name}", source.blob(member), member.sha256, member.size_bytes)
        else:
            have = before.members[member.sha256][0]
            yield Run(script("share", SHARE, have, f"{part}/{member.name}"), "the device has this file in another bundle")
    from edgesdk.bundles import BESIDE, member_names, read_member

    for name in sorted(set(BESIDE) & set(member_names(source.path))):
        blob = Blob.of(read_member(source.path, name))
        yield Put(f"{part}/{name}", blob, blob.sha256, blob.size_bytes)
    names = sorted(m.name for m in source.manifest.members)
    for i in range(0, len(names), 50):
        text = yield Run(script("hashes", HASHES, part, *names[i : i + 50]), "verify every file on the device")
        _verify(source, text, names[i : i + 50])
    yield Run(script("activate", ACTIVATE, part, f"{root}/store/{source.digest}"), "the bundle is whole")


def _verify(source: Source, text: str | None, names: list[str]) -> None:
    if text is None:  # a dry run
        return
    found = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    wanted = {m.name: m.sha256 for m in source.manifest.members}
    for name in names:
        if found.get(name) != wanted[name]:
            what = f"{name} on the device has sha256 {found.get(name, 'none')}, wanted {wanted[name]}"
            raise CheckFailed(what, "refused, what was current stays; flash again")


def _send_agent(before: Survey, root: str) -> Steps:
    for name, data in agent_files().items():
        blob = Blob.of(data)
        if before.agent.get(name) != blob.sha256:
            yield Put(f"{agent_folder(root)}/{name}", blob, blob.sha256, blob.size_bytes)


def _accept(source: Source, before: Survey, store: str, latency_gate_s: float | None) -> Steps:
    """Golden outputs and the latency gate, in the store; a bundle that fails is removed."""
    stays = f"current stays {_name(before.current)}"
    remove = Run(script("remove", REMOVE, store), "it failed its check")
    repeat = GATE_CALLS if latency_gate_s is not None else 0
    try:
        answer = yield Ask("check", (("folder", store), ("repeat", repeat)), "golden outputs on the device")
    except DeviceError as error:
        if error.exit_code == 3 and type(error) is DeviceError and before.current != source.digest:
            yield remove
            raise CheckFailed(f"{error.what}; rolled back: {stays}", error.hint) from None
        raise
    wrong = failed_cases(answer)
    slow = [f"{m} takes {show_seconds(s)}" for m, s in answer["seconds"].items() if latency_gate_s is not None and s > latency_gate_s]
    if not wrong and not slow:
        return
    if before.current != source.digest:
        yield remove
    if wrong:
        hint = "the device's runtime computes something else: `edgesdk flash --status`, and build for its runtime and version"
        raise CheckFailed(f"wrong outputs on the device: {'; '.join(wrong[:3])}; rolled back: {stays}", hint)
    hint = f"the gate was {show_seconds(latency_gate_s)}; a faster plan: `edgesdk plan --latency …`"
    raise CheckFailed(f"too slow on the device: {'; '.join(slow)}; rolled back: {stays}", hint)


def rollback(before: Survey, root: str, python: str) -> Steps:
    """The steps that make `previous` current and the other way round. Raises `DeviceError` if there is none."""
    back = before.previous
    if not back or back not in before.good or back == before.current:
        raise DeviceError("nothing to roll back to: no previous bundle is installed", "`edgesdk flash --status` lists what is there")
    if not before.good[back]:
        raise CheckFailed(f"the previous bundle {back[:12]} was never found good on this device", "flash it again, so that it is checked")
    yield from _send_agent(before, root)
    state = yield Ask("health", (("folder", f"{root}/store/{back}"),), "what was before is still whole")
    if state["digest"] != back or state["bad"]:
        raise CheckFailed(f"the previous bundle {back[:12]} is damaged on the device", "current stays; flash that bundle again")
    yield Link(f"{root}/current", f"store/{back}", python)
    if before.current:
        yield Link(f"{root}/previous", f"store/{before.current}", python)


def _name(digest: str | None) -> str:
    return digest[:12] if digest else "empty"
