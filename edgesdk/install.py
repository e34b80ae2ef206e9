"""How a bundle gets onto a device, as a generator of steps. It touches nothing itself.

On the device, under `root`:

    store/<digest>/          a whole, verified bundle; `.good` in it once its golden outputs matched there
    store/<digest>.part/     one that is being sent; a later run goes on with it
    current, previous        links into store/, each replaced in one move
    history                  what was done here (see `edgesdk.history`)
    agent/<digest>/          the agent and the runner
    trusted                  keys: if it is there, the agent runs only what one of them signed
    *.gone                   what is being removed

A new bundle is checked in the store, before `current` moves: a program that fails its check is never the current one.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from edgesdk.agent.client import failed_cases
from edgesdk.bundle import Manifest, Member
from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError
from edgesdk.history import Recorder
from edgesdk.survey import Survey, free_bytes, place, read_hashes, survey
from edgesdk.transport.base import Blob
from edgesdk.transport.scripts import ACTIVATE, FREE, GOOD, HASHES, REMOVE, SHARE, SIZE, UNLINK, script
from edgesdk.transport.steps import Ask, Link, Put, Run, Step
from edgesdk.units import show_bytes, show_seconds
from edgesdk.upkeep import remove, send_agent, spare

__all__ = ["Source", "Steps", "Survey", "install", "read_source", "rollback", "survey"]

GATE_CALLS = 11
SLACK_BYTES = 1 << 16
"""For folders, links and the history."""
Steps = Generator[Step, Any, None]


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

    def files(self) -> dict[str, Blob]:
        """All that goes to the device, the manifest and the signatures last."""
        from edgesdk.bundles import BESIDE, member_names, read_member

        there = set(member_names(self.path))
        beside = {name: Blob.of(read_member(self.path, name)) for name in BESIDE if name in there}
        return {m.name: self.blob(m) for m in self.manifest.members} | beside

    def head(self, name: str) -> bytes:
        """A member's first bytes."""
        with zipfile.ZipFile(self.path) as archive, archive.open(name) as file:
            return file.read(64)


def read_source(path: str | Path) -> Source:
    """A verified bundle. Raises `InputError` and `CheckFailed` if it is damaged or names files outside itself."""
    from edgesdk.bundles import bundle_digest, verify_bundle

    manifest = verify_bundle(path)
    for member in manifest.members:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or not name.parts or "\n" in member.name or member.name.startswith("-"):
            raise InputError(f"{path}: member '{member.name}' is not a plain relative name", "build the bundle again")
    return Source(Path(path), manifest, bundle_digest(path))


def install(
    source: Source,
    before: Survey,
    root: str,
    python: str,
    *,
    keep: int = 2,
    latency_gate_s: float | None = None,
    signer: str | None = None,
) -> Steps:
    """The steps from `before` to `source` being current and good. Raises `CheckFailed`; `current` is then what it was.

    `signer`: id of the key that signed it, for the history.
    """
    digest, store = source.digest, f"{root}/store/{source.digest}"
    recorder = Recorder(root, before.history, signer)
    if not source.manifest.golden:
        what = f"{source.path}: holds no golden outputs: it was built for a runtime that the host cannot run"
        raise InputError(what, "such a program cannot be checked after an install; build for --runtime litert or executorch")
    yield from _transfer(source, before, root)
    yield from send_agent(before, root)
    try:
        checked = yield from _accept(source, before, store, latency_gate_s)
    except CheckFailed as error:
        with _unless_full():
            yield recorder.step("refused", digest, error.what)
        raise
    if checked:
        yield Run(script("good", GOOD, store, digest), "mark it good: its outputs are right here")
    old = before.current if before.current != digest else before.previous
    old = old if old in before.good and old != digest else None
    yield from _switch(source, before, old, root, python, recorder)
    with _unless_full():
        yield recorder.step("installed", digest, *(() if checked else ("its outputs were not checked",)))
    after = replace(before, current=digest, previous=old, good={digest: checked, **{d: g for d, g in before.good.items() if d != digest}})
    yield from remove(spare(after, root, keep=keep, resumed=digest), f"keep {keep}")


def _switch(source: Source, before: Survey, old: str | None, root: str, python: str, recorder: Recorder) -> Steps:
    """Make what was checked current and `old` previous. Raises `CheckFailed` where it is not whole then; `old` is current again."""
    digest, store = source.digest, f"{root}/store/{source.digest}"
    if before.current != digest:
        yield recorder.switching(digest, before.current, before.previous)
        if old:
            yield Link(f"{root}/previous", f"store/{old}", python)
        yield Link(f"{root}/current", f"store/{digest}", python)
    state = yield Ask("health", (("folder", f"{root}/current"),), "what is current is whole")
    if state["digest"] == digest and not state["bad"]:
        return
    if old:
        yield Link(f"{root}/current", f"store/{old}", python)
    else:
        yield Run(script("unlink", UNLINK, f"{root}/current"), "nothing was installed before")
    yield Run(script("unlink", UNLINK, f"{store}/.good"), "it is good no more")
    bad = ", ".join(state["bad"]) or "manifest.json"
    with _unless_full():
        yield recorder.step("undone", digest, f"{bad} changed on the disk")
    hint = "check the storage of the device, then flash again"
    raise CheckFailed(f"the installed {bad} changed on the device's disk; rolled back to {_name(old)}", hint)


@contextlib.contextmanager
def _unless_full() -> Iterator[None]:
    """What the history lacks on a full disk is found out by the next who looks; a line is not worth an install."""
    try:
        yield
    except LinkError:
        raise
    except DeviceError:
        pass


def _transfer(source: Source, before: Survey, root: str) -> Steps:
    """Bring every file there, into the .part folder, or beside what is damaged of an installed bundle."""
    folder, whole = place(root, source.digest, before.good), source.files()
    wanted = {name: blob for name, blob in whole.items() if before.arrived.get(name) != blob.sha256}
    if not wanted and folder.endswith(source.digest):
        return
    shared = [name for name, blob in wanted.items() if blob.sha256 in before.members]
    yield from _make_room(source, before, root, {n: b for n, b in wanted.items() if n not in shared}, shared)
    if folder.endswith(source.digest):
        yield Run(script("unlink", UNLINK, f"{folder}/.good"), "some of it is not what it must be")
    for name in shared:
        have = before.members[wanted[name].sha256][0]
        yield Run(script("share", SHARE, have, f"{folder}/{name}"), "the device has this file in another bundle")
    for name in (n for n in wanted if n not in shared):
        yield Put(f"{folder}/{name}", wanted[name], wanted[name].sha256, wanted[name].size_bytes)
    wrong = yield from _verify(folder, whole)
    for name in sorted(set(wrong) & set(shared)):  # that other bundle is damaged
        yield Put(f"{folder}/{name}", whole[name], whole[name].sha256, whole[name].size_bytes)
    if wrong and (wrong := (yield from _verify(folder, {n: whole[n] for n in wrong}))):
        name = min(wrong)
        what = f"{name} on the device has sha256 {wrong[name] or 'none'}, wanted {whole[name].sha256}"
        raise CheckFailed(what, "refused, what was current stays; flash again")
    if folder.endswith(".part"):
        yield Run(script("activate", ACTIVATE, folder, f"{root}/store/{source.digest}"), "the bundle is whole")


def _verify(folder: str, wanted: Mapping[str, Blob]) -> Generator[Step, Any, dict[str, str]]:
    """name → what its sha256 is in place of the right one ("": it is not there)."""
    names = sorted(wanted)
    wrong: dict[str, str] = {}
    for i in range(0, len(names), 50):
        text = yield Run(script("hashes", HASHES, folder, *names[i : i + 50]), "verify every file on the device")
        found = read_hashes(text) if text is not None else {n: wanted[n].sha256 for n in names}  # None: a dry run
        wrong |= {n: found.get(n, "") for n in names[i : i + 50] if found.get(n) != wanted[n].sha256}
    return wrong


def _make_room(source: Source, before: Survey, root: str, sent: Mapping[str, Blob], shared: list[str]) -> Steps:
    """Nothing, where there is room; else remove what may go. Raises `DeviceError` if that is not enough."""
    agent = sum(step.size_bytes for step in send_agent(before, root) if isinstance(step, Put))
    needed, free = sum(b.size_bytes for b in sent.values()) + agent + SLACK_BYTES, before.free_bytes
    if free is None or needed <= free:
        return
    wanted = {m.name: m.sha256 for m in source.manifest.members}
    givers = [before.members[wanted[name]][0] for name in shared if name in wanted]
    folders = [f for f in spare(before, root, keep=2, resumed=source.digest) if not any(g.startswith(f"{f}/") for g in givers)]
    yield from remove(folders, "the disk is full: what is no more needed goes first")
    for name in sent:
        text = yield Run(script("size", SIZE, f"{place(root, source.digest, before.good)}/{name}.part"), "what arrived of it")
        needed -= int(text or 0)
    free = free_bytes((yield Run(script("free", FREE, root), "is there room now?")) or "")
    if free is not None and needed > free:
        hint = "nothing was sent, what is installed stays; free some space there, or build a smaller plan (--storage)"
        raise DeviceError(f"the device's disk is full: {show_bytes(needed)} needed, {show_bytes(free)} free", hint)


def _accept(source: Source, before: Survey, store: str, latency_gate_s: float | None) -> Generator[Step, Any, bool]:
    """Golden outputs and the latency gate, in the store; a bundle that fails is removed. False: its outputs could not be compared, which was allowed."""
    stays = f"current stays {_name(before.current)}"
    gone = Run(script("remove", REMOVE, store), "it failed its check")
    repeat = GATE_CALLS if latency_gate_s is not None else 0
    try:
        answer = yield Ask("check", (("folder", store), ("repeat", repeat)), "golden outputs on the device")
    except DeviceError as error:
        if error.exit_code == 3 and type(error) is DeviceError and before.current != source.digest:
            yield gone
            raise CheckFailed(f"{error.what}; rolled back: {stays}", error.hint) from None
        raise
    wrong = failed_cases(answer)
    slow = [f"{m} takes {show_seconds(s)}" for m, s in answer["seconds"].items() if latency_gate_s is not None and s > latency_gate_s]
    if not wrong and not slow:
        return "unchecked" not in answer
    if before.current != source.digest:
        yield gone
    if wrong:
        hint = "the device's runtime computes something else: `edgesdk flash --status`, and build for its runtime and version"
        raise CheckFailed(f"wrong outputs on the device: {'; '.join(wrong[:3])}; rolled back: {stays}", hint)
    hint = f"the gate was {show_seconds(latency_gate_s)}; a faster plan: `edgesdk plan --latency …`"
    raise CheckFailed(f"too slow on the device: {'; '.join(slow)}; rolled back: {stays}", hint)


def rollback(before: Survey, root: str, python: str) -> Steps:
    """The steps that make `previous` current and the other way round. Raises `DeviceError` if there is none."""
    back, recorder = before.previous, Recorder(root, before.history)
    if not back or back not in before.good or back == before.current:
        raise DeviceError("nothing to roll back to: no previous bundle is installed", "`edgesdk flash --status` lists what is there")
    if not before.good[back]:
        raise CheckFailed(f"the previous bundle {back[:12]} was never found good on this device", "flash it again, so that it is checked")
    yield from send_agent(before, root)
    state = yield Ask("health", (("folder", f"{root}/store/{back}"),), "what was before is still whole")
    if state["digest"] != back or state["bad"]:
        raise CheckFailed(f"the previous bundle {back[:12]} is damaged on the device", "current stays; flash that bundle again")
    with _unless_full():
        yield recorder.switching(back, before.current, back)
    yield Link(f"{root}/current", f"store/{back}", python)
    if before.current:
        yield Link(f"{root}/previous", f"store/{before.current}", python)
    with _unless_full():
        yield recorder.step("rolled-back", back)


def _name(digest: str | None) -> str:
    return digest[:12] if digest else "empty"
