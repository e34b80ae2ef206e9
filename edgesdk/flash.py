"""Install a bundle on a device: send what it lacks, verify, check on the device, switch; or leave everything as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.agent.client import Agent, agent_folder
from edgesdk.deployment import Action, Deployment, GoldenResult, Installed
from edgesdk.errors import DeviceError, InputError
from edgesdk.history import unfinished
from edgesdk.install import Source, Steps, Survey, install, read_source, rollback
from edgesdk.lease import lease
from edgesdk.signing import Signer, signer_of
from edgesdk.survey import damaged, require_suitable, survey
from edgesdk.transport import Transport, parse_link
from edgesdk.transport.scripts import LINK, REMOVE, script
from edgesdk.transport.steps import Ask, Link, Put, Run, Step, Watch
from edgesdk.upkeep import recover, remove, spare

if TYPE_CHECKING:
    from edgesdk.plain.device import PlainDevice

WHOLE_HISTORY = 400


class Performer:
    """Does steps over a transport, or only notes them (`dry`); `plain` stands in for the agent where the device has no Python."""

    def __init__(self, transport: Transport, python: str, dry: bool, watch: Watch | None, plain: PlainDevice | None = None) -> None:
        self.transport, self.python, self.dry, self.watch, self.plain = transport, python, dry, watch, plain
        self.steps: list[Step] = []
        self.sent_bytes = self.resumed_bytes = 0
        self.answers: dict[str, dict[str, Any]] = {}
        self._agent: Agent | PlainDevice | None = None

    def all(self, steps: Steps) -> None:
        """Send each step's result back into the generator; the agent that was asked ends with it."""
        try:
            self._all(steps)
        finally:
            if self._agent is not None:
                self._agent.close()
                self._agent = None

    def _all(self, steps: Steps) -> None:
        result: Any = None
        try:
            step = next(steps)
            while True:
                self.steps.append(step)
                try:
                    result = self._optimistic(step) if self.dry else self._do(step)
                except DeviceError as error:
                    step = steps.throw(error)
                    continue
                step = steps.send(result)
        except StopIteration:
            return

    def _optimistic(self, step: Step) -> Any:
        """What a dry run takes for granted: all is well."""
        if not isinstance(step, Ask):
            return None
        if step.verb != "health":
            return {"cases": [], "seconds": {}}
        folder = str(dict(step.arguments)["folder"])
        link = next((s.target for s in reversed(self.steps) if isinstance(s, Link) and s.link == folder), folder)
        return {"digest": link.rpartition("/")[2], "bad": []}

    def _do(self, step: Step) -> Any:
        if self.watch and not isinstance(step, Put):
            self.watch(step, 0, 0)
        if isinstance(step, Put):
            watch = self.watch
            there = self.transport.put(step.blob, step.remote, progress=(lambda a, b: watch(step, a, b)) if watch else None)
            self.sent_bytes += step.size_bytes - there
            self.resumed_bytes += there
            return None
        if isinstance(step, Run):
            return self.transport.must(step.argv, step.why, timeout=300.0).text
        if isinstance(step, Link):
            self.transport.must(script("link", LINK, step.target, step.link, step.python), f"switching {step.link}")
            return None
        answer = self.agent().ask(step.verb, **dict(step.arguments))
        self.answers[step.verb] = answer
        return answer

    def agent(self) -> Agent | PlainDevice:
        if self._agent is None:
            self._agent = self.plain or Agent(self.transport, self.python, agent_folder(self.transport.root))
        return self._agent


def flash(
    bundle: str | Path,
    on: str | Transport = "local",
    *,
    dry_run: bool = False,
    python: str | None = None,
    keep: int = 2,
    latency_gate: float | None = None,
    allow_unsigned: bool = False,
    runner: str | None = None,
    allow_unchecked: bool = False,
    wait_s: float = 0.0,
    watch: Watch | None = None,
) -> Deployment:
    """Install `bundle` on the device behind the link `on` and make it current, if its outputs are right there.

    `latency_gate` is in seconds: no method's median call may take longer. `keep` is how many bundles stay installed (at least 2).
    `allow_unsigned`: one that no trusted key signed, too. `wait_s`: how long to wait for others who use the device.
    `runner`: the device has no Python; a runtime's own tool, a file here or a path there, runs the program (see `edgesdk.plain`).
    `allow_unchecked`: even with a tool that gives no outputs; the bundle is then not marked good.

    Raises `CheckFailed` (signature, outputs, digest or gate; the device keeps what it had), `DeviceError` (full disk, in use …), `LinkError` (the
    same call resumes) and `InputError`.
    """
    if keep < 2:
        raise InputError(f"keep = {keep}, wanted at least 2", "the current and the previous bundle are always kept")
    source = read_source(bundle)
    signer = None if allow_unsigned else signer_of(bundle)
    names = list(source.files())
    with _performing(on, dry_run, python, runner, wait_s, watch, bundle, allow_unchecked) as performer:
        transport, plain = performer.transport, performer.plain
        before = _in_order(performer, source.digest, names)
        if _whole(source, before) and before.current == source.digest and latency_gate is None:
            return _deployment("already-installed", transport, before, source, performer, signer)
        if plain is None:
            require_suitable(transport, source, performer.python)
        else:
            performer.all(plain.prepare(source.manifest))
        steps = install(
            source,
            before,
            transport.root,
            performer.python,
            keep=keep,
            latency_gate_s=latency_gate,
            signer=signer.id if signer else None,
        )
        performer.all(steps)
        after = before if dry_run else survey(transport)
        return _deployment("dry-run" if dry_run else "installed", transport, after, source, performer, signer)


def roll_back(
    on: str | Transport = "local",
    *,
    dry_run: bool = False,
    python: str | None = None,
    runner: str | None = None,
    wait_s: float = 0.0,
    watch: Watch | None = None,
) -> Deployment:
    """Make the previous bundle current again; with any `runner`, without Python there.

    Raises `DeviceError` if there is none or the device is in use, `CheckFailed` if it is damaged.
    """
    with _performing(on, dry_run, python, runner, wait_s, watch) as performer:
        transport, before = performer.transport, _in_order(performer)
        performer.all(rollback(before, transport.root, performer.python))
        after = before if dry_run else survey(transport)
        return _deployment("dry-run" if dry_run else "rolled-back", transport, after, None, performer)


def clean(
    on: str | Transport = "local",
    *,
    keep: int = 2,
    dry_run: bool = False,
    python: str | None = None,
    runner: str | None = None,
    wait_s: float = 0.0,
    watch: Watch | None = None,
) -> Deployment:
    """Remove what is no more needed: see `upkeep.spare`; the newest cut transfer stays, as it can be gone on with; with any
    `runner`, without Python there, and the runners go, too. Raises `DeviceError`."""
    with _performing(on, dry_run, python, runner, wait_s, watch) as performer:
        transport, before = performer.transport, _in_order(performer)
        resumed = before.parts[0].removesuffix(".part") if before.parts else None
        runners = [f"{transport.root}/runners"] if runner is not None else []
        performer.all(remove([*spare(before, transport.root, keep=keep, resumed=resumed), *runners], "no more needed"))
        after = before if dry_run else survey(transport)
        return _deployment("dry-run" if dry_run else "cleaned", transport, after, None, performer)


def status(on: str | Transport = "local") -> Deployment:
    """What is installed on the device, what was done there, and whether what is current is still whole."""
    with connected(on) as transport:
        state = survey(transport, recent=WHOLE_HISTORY)
        found = _deployment("status", transport, state, None)
        return found.model_copy(update={"damaged": damaged(transport, state.current) if state.current else ()})


def _in_order(performer: Performer, digest: str | None = None, names: Iterable[str] = ()) -> Survey:
    """What is on the device, behind the end of a switch that was cut off."""
    transport = performer.transport
    ready = performer.plain.ready if performer.plain else lambda state: state
    before = ready(survey(transport, digest, names))
    if unfinished(before.history) is None:
        return before
    performer.all(recover(before, transport.root, performer.python))
    return before if performer.dry else ready(survey(transport, digest, names))


def _whole(source: Source, state: Survey) -> bool:
    """Whether a bundle is there, found good, and each of its files still what it was."""
    return state.good.get(source.digest, False) and all(state.arrived.get(name) == b.sha256 for name, b in source.files().items())


@contextlib.contextmanager
def _performing(
    on: str | Transport,
    dry_run: bool,
    python: str | None,
    runner: str | None,
    wait_s: float,
    watch: Watch | None,
    bundle: str | Path | None = None,
    allow_unchecked: bool = False,
) -> Iterator[Performer]:
    """Who does steps on a device that nobody else changes meanwhile."""
    with connected(on) as transport, contextlib.ExitStack() as held:
        if not dry_run:
            held.enter_context(lease(transport, "install", python=python, wait_s=wait_s, plain=runner is not None))
        plain = _plain(transport, runner, bundle, allow_unchecked)
        yield Performer(transport, python or transport.python, dry_run, watch, plain)


def _plain(transport: Transport, runner: str | None, bundle: str | Path | None = None, allow_unchecked: bool = False) -> PlainDevice | None:
    """What takes the agent's place where a native runner was given; without a bundle nothing is run there."""
    if runner is None:
        return None
    from edgesdk.bundles import read_member
    from edgesdk.plain.device import PlainDevice, find_runner

    if bundle is None:
        return PlainDevice(transport, None)
    found = find_runner(transport, runner)
    return PlainDevice(transport, found, allow_unchecked=allow_unchecked, read=lambda name: read_member(bundle, name))


class connected:
    """A transport for a link; one that was given is left open."""

    def __init__(self, on: str | Transport) -> None:
        self._own = isinstance(on, str)
        self._transport = parse_link(on) if isinstance(on, str) else on

    def __enter__(self) -> Transport:
        return self._transport

    def __exit__(self, *_: object) -> None:
        if self._own:
            self._transport.close()


def _deployment(
    action: Action, transport: Transport, state: Survey, source: Source | None, done: Performer | None = None, signer: Signer | None = None
) -> Deployment:
    checked = done.answers.get("check", {}) if done else {}
    cases = checked.get("cases", [])
    removed = [
        f.removeprefix(f"{transport.root}/")
        for step in (done.steps if done else ())
        if isinstance(step, Run) and step.argv[:3] == ("sh", "-c", REMOVE)
        for f in step.argv[4:]
    ]
    return Deployment(
        action=action,
        link=transport.link,
        root=transport.root,
        current=state.current,
        previous=state.previous,
        good=bool(state.current and state.good.get(state.current)),
        model_name=source.manifest.model_name if source else None,
        signer=f"{signer.name} ({signer.id})" if signer else None,
        installed=tuple(Installed(digest=d, good=g) for d, g in sorted(state.good.items())),
        golden=tuple(GoldenResult(method=c["method"], case=c["case"], relative_error=c["error"], allowed=c["allowed"]) for c in cases),
        unchecked=checked.get("unchecked"),
        gate_s=checked.get("seconds", {}),
        sent_bytes=done.sent_bytes if done and not done.dry else 0,
        resumed_bytes=done.resumed_bytes if done and not done.dry else 0,
        interrupted=unfinished(state.history) is not None,
        trusted_keys=state.trusted_keys,
        history=state.history,
        removed=tuple(dict.fromkeys(removed)) if done and not done.dry else (),
        steps=tuple(str(s) for s in done.steps) if done else (),
    )
