"""Calibration of the device behind a link: the same programs, timed there by the agent; the answer holds for that very board."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgesdk.agent.client import Agent
from edgesdk.cache import cache_dir
from edgesdk.calibrate import RUNTIMES, Step, every_runtime
from edgesdk.calibrate_places import There
from edgesdk.devices import bound_to, load_device
from edgesdk.efficiency import Efficiency
from edgesdk.errors import DeviceError, InputError, MissingTool
from edgesdk.lease import lease
from edgesdk.probe import Facts, facts_of, profiles_of
from edgesdk.transport import Transport, parse_link

if TYPE_CHECKING:
    from edgesdk.device import DeviceProfile


def calibrate_on(
    on: str | Transport,
    device: str | None,
    *,
    runtime: str | None,
    threads: int,
    precisions: Sequence[str] | None,
    allow_emulated: bool,
    python: str | None,
    wait_s: float,
    step: Step,
    save: bool,
) -> list[Efficiency]:
    """See `edgesdk.calibrate.calibrate`."""
    transport = parse_link(on) if isinstance(on, str) else on
    try:
        step("reading what it is", 0.0)
        facts = facts_of(transport, python)
        profile = profile_for(facts, device)
        refuse_emulated(facts, allow_emulated)
        require_numpy(facts)
        wanted = runtimes_there(facts, profile, runtime)
        marks = {
            "board": facts.board_id, "emulated": bool(facts.emulated),
            "notes": ("measured on an emulator: no silicon's times",) if facts.emulated else (f"measured on {profile.name}",),
        }  # fmt: skip
        with lease(transport, "calibrate", python=python, wait_s=wait_s), _there(transport, python, profile, wanted, threads) as place:
            if place.resumed:
                step(f"{place.resumed} timings are kept from before the link broke", 0.0)
            answers = every_runtime(profile, wanted, threads, place, step, precisions, save=save, marks=marks)
            place.kept.unlink(missing_ok=True)
            return answers
    finally:
        if isinstance(on, str):
            transport.close()


@contextlib.contextmanager
def _there(transport: Transport, python: str | None, profile: DeviceProfile, wanted: dict[str, str], threads: int) -> Iterator[There]:
    assert profile.board
    name = f"{profile.name}-{profile.board.id}-{'+'.join(f'{r}-{v}' for r, v in wanted.items())}-{threads}.timed"
    with Agent(transport, python) as agent:
        place = There(transport, agent, cache_dir("calibration") / name)
        try:
            yield place
        finally:
            place.clean()


def profile_for(facts: Facts, device: str | None) -> DeviceProfile:
    """The profile that is bound to the board: the one named `device`, else the only one. Raises `InputError`."""
    link = facts.link
    if device is not None:
        profile = load_device(device)
        if profile.board is None:
            hint = f"read the board behind it first: edgesdk devices probe {link}; then calibrate --on {link}"
            raise InputError(f"--device {device}: no profile of one board", hint)
        if said := bound_to(profile, facts.model_dump(), link):
            raise InputError(said, f"take the profile of that board, or read it: edgesdk devices probe {link}")
        return profile
    found = profiles_of(facts.board_id)
    if not found:
        raise InputError(
            f"{link}: no profile is bound to board {facts.board_id or 'without an id'}", f"read it first: edgesdk devices probe {link}"
        )
    if len(found) > 1:
        raise InputError(f"{link}: {len(found)} profiles are bound to it: {', '.join(p.name for p in found)}", "name one with --device")
    return found[0]


def refuse_emulated(facts: Facts, allow: bool) -> None:
    if facts.emulated and not allow:
        hint = "its times say nothing of silicon; --allow-emulated measures it all the same and marks what it gives"
        raise InputError(f"{facts.link}: an emulator ({facts.emulated[0]})", hint)


def require_numpy(facts: Facts) -> None:
    """Raises `DeviceError` where programs could be sent and not run."""
    if facts.via != "agent" or "numpy" not in facts.runtimes:
        lacking = "Python" if facts.via != "agent" else "numpy for its Python"
        raise DeviceError(
            f"{facts.link}: calibration needs {lacking} there", "install it on the device, or name an interpreter with --python PATH"
        )


def runtimes_there(facts: Facts, profile: DeviceProfile, asked: str | None) -> dict[str, str]:
    """Runtime → version of those that can be measured there: all, or the one asked for. Our own kernels need nothing but numpy on arm64.

    Raises `MissingTool`, and `InputError` for a version that the profile does not know: plans would not take what is measured.
    """
    from edgesdk import __version__

    here = {name: version for name, version in facts.runtimes.items() if name in RUNTIMES}
    if facts.arch == "aarch64":
        here.setdefault("native", __version__)
    known: set[str] = {r.name for r in profile.runtimes}
    wanted: dict[str, str] = {name: here[name] for name in RUNTIMES if name in here and name in known and asked in (None, name)}
    if not wanted:
        what = asked or " or ".join(RUNTIMES)
        raise MissingTool(
            f"{facts.link}: {what} is not installed for its Python", "install it there (pip install ai-edge-litert numpy), then probe again"
        )
    for name, version in wanted.items():
        if profile.board and profile.board.runtimes.get(name, version) != version:
            what = f"{facts.link}: {name} is {version} now, {profile.name} was read with {profile.board.runtimes[name]}"
            raise InputError(what, f"read it again first: edgesdk devices probe {facts.link}")
    return wanted
