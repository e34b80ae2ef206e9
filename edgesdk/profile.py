"""Measure a bundle on a device: as a job there that a broken link does not end, told as a report."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgesdk.agent.client import Agent, Tell
from edgesdk.errors import EdgeError, InputError
from edgesdk.installed import Here, installed, stored
from edgesdk.jobs import PATIENCE_S, Line, begin, cancel, follow, keep_trying, new_id, state_of
from edgesdk.lease import lease
from edgesdk.measured import make_report, plan_of
from edgesdk.report import Measurement, Mode, Report
from edgesdk.transport import Transport

RUNS = {"cold": 10, "warm": 50, "burst": 50, "sustained": 1}
SUSTAINED_S = 300.0
OWN_TIMES = ("native", "executorch")
"""Runtimes that may tell times of their own operators on the device; units of the others are lowered and timed alone, on the host."""


def profile(
    bundle: str | Path | None = None,
    on: str | Transport = "local",
    *,
    mode: Mode = "warm",
    runs: int | None = None,
    duration_s: float | None = None,
    rate_hz: float | None = None,
    warmup: int = 5,
    method: str | None = None,
    device: str | None = None,
    python: str | None = None,
    runner: str | None = None,
    allow_unchecked: bool = False,
    operators: bool = False,
    energy: bool = True,
    wait_s: float = 0.0,
    patience_s: float = PATIENCE_S,
    tell: Tell | None = None,
    started: Callable[[str], None] = lambda job: None,
) -> Report:
    """Time calls of a bundle's methods on the device behind the link `on`, in a process of its own there.

    `mode`: warm, `runs` calls of each method behind each other after `warmup`; burst, ten and a pause; cold, each in a fresh process with what the
    disk holds in memory dropped where that is permitted; sustained, all methods in turn for `duration_s` (five minutes). `duration_s` goes for `runs`
    in warm and burst, too. `rate_hz`: calls arrive at that rate whether the device keeps up or not, and their wait is told apart from their run time.
    `bundle` None: what is installed there. A bundle that is not there is installed first (see `flash`). `device` is the profile's name
    (default: what the bundle was built for; `host` on a local link). `operators` adds times of single operators. `energy` False: no power sensor is
    read, and there is no rest before. `runner`: the device has no Python; a runtime's own tool measures warm calls (see `edgesdk.plain`), even where
    its outputs cannot be compared if `allow_unchecked`. `wait_s`: how long to wait for others who use the device. `patience_s`: how long to try a broken link again;
    `started` hears the job's id, by which `attach` finds it later. Raises what `flash` raises, and `DeviceError` if the program fails there.
    """
    duration_s = SUSTAINED_S if mode == "sustained" and duration_s is None else duration_s
    runs = RUNS.get(mode, 1) if runs is None else runs
    _check(mode, runs, warmup, duration_s, rate_hz)
    if runner is not None:
        from edgesdk.plain.profile import profile as plain

        if mode != "warm" or duration_s is not None or rate_hz is not None:
            raise InputError(
                "a runtime's own tool measures so many warm calls", "leave --mode, --duration and --rate out, or take --python"
            )
        return plain(
            bundle, on, runner, runs=runs, warmup=warmup, method=method, device=device, operators=operators, allow_unchecked=allow_unchecked,
            wait_s=wait_s, tell=tell,
        )  # fmt: skip
    line, job = Line(on), new_id()
    request: dict[str, Any] = {
        "mode": mode,
        "runs": runs,
        "warmup": warmup,
        "duration_s": duration_s,
        "rate_hz": rate_hz,
        "operators": operators,
    }
    request |= {"energy": energy, "method": method}
    try:
        if line.transport.link == "fake":
            raise InputError("the fake device measures nothing", "use --on local or --on ssh://…")
        here, facts = _start(line, bundle, job, request, device, python, wait_s, patience_s, tell)
        started(job)
        try:
            raw = follow(line, job, python=python, tell=tell, patience_s=patience_s)
        except BaseException as error:
            if not isinstance(error, EdgeError):  # whoever waited has gone
                with contextlib.suppress(EdgeError):
                    cancel(job, line.transport, python)
            raise
        return _report(line, here, facts, raw, request, job, tell)
    finally:
        line.close()


def _check(mode: Mode, runs: int, warmup: int, duration_s: float | None, rate_hz: float | None) -> None:
    """Raises `InputError`."""
    if mode not in RUNS:
        raise InputError(f"mode '{mode}'", f"give one of {', '.join(RUNS)}")
    if runs < 1 or warmup < 0:
        raise InputError(f"runs = {runs}, warmup = {warmup}", "give at least one run")
    if duration_s is not None and (duration_s <= 0 or mode == "cold"):
        raise InputError(f"duration = {duration_s} s in mode {mode}", "a duration is above 0; cold runs are counted: --runs")
    if rate_hz is not None and (rate_hz <= 0 or mode in ("cold", "burst")):
        raise InputError(f"rate = {rate_hz} calls a second in mode {mode}", "a rate is above 0, and of warm or sustained calls")


def _start(
    line: Line, bundle: str | Path | None, job: str, request: dict[str, Any], device: str | None, python: str | None, wait_s: float,
    patience_s: float, tell: Tell | None,
) -> tuple[Here, dict[str, Any]]:  # fmt: skip
    """Install what is not there, and begin the job. (the bundle there, the device's facts)"""
    mine = not line.transport.leased
    with lease(line.transport, "profile", python=python, wait_s=wait_s):
        here = installed(line.transport, bundle, python)
        if request["operators"] and here.manifest.runtime not in OWN_TIMES and not line.transport.link.startswith("local"):
            what = f"'{here.manifest.runtime}' tells no times of single operators on a device"
            raise InputError(what, "leave --operators out, or use --on local: there each unit is lowered and timed alone")
        request["host"] = {"device": device, "digest": here.digest}
        request["folder"] = here.folder

        def once() -> dict[str, Any]:
            with Agent(line.transport, python) as agent:
                facts = agent.ask("facts")
                begin(agent, line.transport, job, request, wait_s, lease=mine)
                return facts

        return here, keep_trying(line, once, job, patience_s, tell)


def attach(
    job: str, on: str | Transport = "local", *, python: str | None = None, patience_s: float = PATIENCE_S, tell: Tell | None = None
) -> Report:
    """The report of a job that was begun before, once it is done. Raises `InputError` where the device has none of that id, else as `profile`."""
    line = Line(on)
    try:
        state = keep_trying(line, functools.partial(state_of, line, job, python), job, patience_s, tell)
        raw = follow(line, job, python=python, tell=tell, patience_s=patience_s)
        request = state["request"]

        def facts() -> dict[str, Any]:
            with Agent(line.transport, python) as agent:
                return agent.ask("facts")

        here = stored(line.transport, request["host"]["digest"])
        return _report(line, here, keep_trying(line, facts, job, patience_s, tell), raw, request, job, tell)
    finally:
        line.close()


def _report(
    line: Line, here: Here, facts: dict[str, Any], raw: dict[str, Any], request: dict[str, Any], job: str, tell: Tell | None,
    when: str | None = None,
) -> Report:  # fmt: skip
    how = Measurement(mode=request["mode"], job=job, duration_s=request["duration_s"], rate_hz=request["rate_hz"])
    local = line.transport.link.startswith("local")
    report = make_report(here, line.transport.link, facts, raw, request["host"]["device"], how, when)
    if not (local and request["operators"] and "reason" in (raw.get("operators") or {"reason": ""})):
        return report
    from edgesdk.operators import time_units

    try:
        rows, route = time_units(here.manifest, plan_of(here), tell=tell)
    except InputError as error:  # what was measured stays
        rows, route = (), f"none: {error.what}"
    return report.model_copy(update={"operators": rows, "operators_route": route})
