"""A staged rollout as a value: events in, events out. It touches nothing: a journal keeps its events, a controller acts on them.

Whatever happened is an event; the state is what all events come to, so that a controller that was killed is where it was once it has read its
journal. An order is an event (`tell`) before it is sent: what was sent is known, and sent again to be sure; a device does it once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from edgesdk.errors import InputError
from edgesdk.fleet.wire import SETTLED, WORKING
from edgesdk.noun import Noun

Event = dict[str, Any]
Status = Literal["running", "paused", "halted", "aborted", "rolling-back", "finished"]
MOST_COUNTER, MOST_WHY = 1 << 62, 300
"""Of what a device says: anybody may write to a broker that lets them."""
COMMANDS = ("pause", "resume", "abort", "rollback")


class Spec(Noun):
    """What was asked for, once and for all."""

    KIND: ClassVar[str] = "rollout"

    id: str
    fleet: str
    bundle: str  # digest
    model_name: str
    devices: tuple[str, ...]  # in the order they get it
    stages: tuple[int, ...]  # devices by the end of each, rising
    halt_on: int | None  # failures that halt it; None: `halt_share`
    halt_share: float | None  # of those that were told
    wait_s: float  # between a stage that is good and the next
    timeout_s: float  # a device that is there and does not end is one that failed
    away_s: float  # a device that was gone for so long is not waited for
    gate_s: float | None  # latency
    url: str | None
    broker: str
    key: str  # the name of one's own key that signs the orders
    login: dict[str, str] = Field(default_factory=dict)  # files: password_file, ca, cert, key


@dataclass
class Told:
    """The last order of a device and what is known of it."""

    step: str
    counter: int
    at: float
    state: str = "told"
    why: str = ""
    late: bool = False

    @property
    def settled(self) -> bool:
        return self.state in SETTLED or self.late

    @property
    def failed(self) -> bool:
        return self.state == "failed" or (self.late and self.state not in SETTLED)


def parse_stages(text: str, count: int, canaries: int = 0) -> tuple[int, ...]:
    """`1,10%,50%,100%` of `count` devices → how many have it by the end of each stage. Raises `InputError`."""
    found: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", part)
        if not match or (not match[2] and "." in match[1]) or float(match[1]) == 0 or (match[2] and float(match[1]) > 100):
            raise InputError(f"--stages {text}: '{part}' is no stage", "give counts or shares that rise: 1,10%,50%,100%")
        found.append(min(count, math.ceil(count * float(match[1]) / 100 - 1e-9) if match[2] else int(match[1])))
    if sorted(found) != found:
        raise InputError(f"--stages {text}: of {count} devices that is {', '.join(map(str, found))}: it does not rise", "sort them")
    if found[-1] != count:
        raise InputError(
            f"--stages {text}: ends at {found[-1]} of {count} devices", "end with 100%; give fewer devices with --on for a part"
        )
    return tuple(sorted({max(canaries, n) for n in found}))


def parse_halt(text: str) -> tuple[int | None, float | None]:
    """`1` → (1, None), `5%` → (None, 0.05). Raises `InputError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    if not match or float(match[1]) == 0 or (not match[2] and "." in match[1]) or (match[2] and float(match[1]) > 100):
        raise InputError(f"--halt-on {text}: no count and no share", "write it like 1 or 5%")
    return (None, float(match[1]) / 100) if match[2] else (int(match[1]), None)


def order_of(devices: Sequence[str], canaries: Sequence[str], rollout: str) -> tuple[str, ...]:
    """Canaries first, the others mixed: the same for the same rollout, and no stage is one corner of the fleet."""
    rest = [d for d in devices if d not in canaries]
    return (*canaries, *sorted(rest, key=lambda d: hashlib.sha256(f"{rollout} {d}".encode()).digest()))


@dataclass
class Rollout:
    """The state of one rollout. `apply` takes what happened, `decide` says what is to happen now; neither touches anything else."""

    spec: Spec
    status: Status = "running"
    why: str = ""
    stage: int = 0  # stages that were begun
    settled_at: float | None = None  # when the last begun stage was
    told: dict[str, Told] = field(default_factory=dict)
    counter: int = 0  # the highest that is known of
    commands: int = 0  # taken up
    ended: bool = False

    # ---- what happened

    def apply(self, event: Event) -> None:
        getattr(self, "_on_" + event["e"])(event)

    def _on_stage(self, event: Event) -> None:
        self.stage, self.settled_at = event["n"], None

    def _on_settled(self, event: Event) -> None:
        self.settled_at = event["at"]

    def _on_tell(self, event: Event) -> None:
        self.told[event["device"]] = Told(event["step"], event["counter"], event["at"])
        self.counter = max(self.counter, event["counter"])

    def _on_report(self, event: Event) -> None:
        told = self.told[event["device"]]
        told.state, told.why = event["state"], event["why"]
        if told.state in SETTLED:
            told.late = False

    def _on_late(self, event: Event) -> None:
        told = self.told[event["device"]]
        told.late, told.why = True, f"did not end within {self.spec.timeout_s:.0f} s"

    def _on_behind(self, event: Event) -> None:
        self.counter = max(self.counter, event["counter"])

    def _on_halt(self, event: Event) -> None:
        self.status, self.why = "halted", event["why"]

    def _on_command(self, event: Event) -> None:
        """What a person asked for; what makes no sense any more changes nothing."""
        self.commands += 1
        wanted = event["command"]
        if wanted == "pause" and self.status == "running":
            self.status = "paused"
        elif wanted == "resume" and self.status in ("paused", "finished"):
            self.status, self.ended = "running", False
        elif wanted == "abort" and self.status in ("running", "paused"):
            self.status, self.why = "aborted", "asked for"
        elif wanted == "rollback" and self.status != "halted":
            self.status, self.why, self.ended = "rolling-back", "asked for", False

    def _on_end(self, event: Event) -> None:
        self.ended = True
        if self.status == "running":
            self.status = "finished"

    # ---- what a device says

    def heard(self, device: str, report: Event, now: float) -> list[Event]:
        """The events of a report; none for what is old, known or not about this rollout."""
        told = self.told.get(device)
        counter = report.get("counter")
        if told is None or told.state == "superseded" or not isinstance(counter, int) or not 0 <= counter < MOST_COUNTER:
            return []
        ours, refused = report.get("rollout") == self.spec.id, report.get("refused")
        if counter > told.counter or (counter == told.counter and not ours):
            if ours:  # the journal is an old copy of what was once done
                return [{"e": "behind", "counter": counter}, self._tell(device, told.step, max(self.counter, counter) + 1, now)]
            why = f"by rollout {report.get('rollout')}"[:MOST_WHY]
            return [] if told.settled else [{"e": "report", "device": device, "state": "superseded", "why": why}]
        if counter < told.counter:
            if not isinstance(refused, dict) or refused.get("counter") != told.counter or told.settled:
                return []
            return [{"e": "report", "device": device, "state": "failed", "why": f"refused: {refused.get('why')}"[:MOST_WHY]}]
        state, why = report.get("state"), str(report.get("why") or "")[:MOST_WHY]
        if told.state in SETTLED or state not in (*WORKING, *SETTLED):
            return []
        return [] if (state, why) == (told.state, told.why) else [{"e": "report", "device": device, "state": state, "why": why}]

    # ---- what is to happen

    def decide(self, now: float, present: Mapping[str, float], gone: Collection[str], floor: int = 0) -> list[Event]:
        """The next events, to be applied in order; none if there is nothing to do.

        `present`: since when devices are there, `gone`: those that have not been for a while; one may be neither. Counters begin above `floor`.
        """
        if self.ended:
            return []
        if self.status in ("running", "paused") and (why := self._enough_failed()):
            return [{"e": "halt", "why": why, "at": now}]
        late = [d for d, t in self.told.items() if not t.settled and d in present and now - max(t.at, present[d]) > self.spec.timeout_s]
        if late:
            return [{"e": "late", "device": d} for d in late]
        base = max(self.counter, floor) + 1
        if self.status == "running":
            return self._go_on(now, gone, base)
        installs = [d for d, t in self.told.items() if t.step == "install" and t.state != "superseded"]
        if self.status in ("halted", "rolling-back"):
            return self._all_to("rollback", installs, now, gone, base)
        if self.status == "aborted":
            return self._all_to("hold", [d for d in installs if not self.told[d].settled], now, gone, base)
        return []

    def _enough_failed(self) -> str:
        """Why it is to halt: any of the first stage, or so many or such a share as was asked for."""
        failed = [d for d, t in self.told.items() if t.step == "install" and t.failed]
        first = [d for d in failed if d in self.spec.devices[: self.spec.stages[0]]]
        limit = self.spec.halt_on if self.spec.halt_on is not None else (self.spec.halt_share or 0.0) * len(self.told)
        if not failed or (len(failed) < limit and not first):
            return ""
        one = (first or failed)[0]
        return f"{len(failed)} of {len(self.told)} failed; {one}: {self.told[one].why}"

    def _go_on(self, now: float, gone: Collection[str], base: int) -> list[Event]:
        """The next stage, once this one is good and has been for a while; the end behind the last."""
        if self.stage == 0:
            return list(self._begin(1, now, base))
        waited = [d for d in self.spec.devices[: self.spec.stages[self.stage - 1]] if not self.told[d].settled]
        if self.stage == 1:
            open_ = waited  # the first ones have to answer: nothing is known before they do
        else:
            open_ = [d for d in waited if d not in gone]
        if open_:
            return []
        if self.stage == len(self.spec.stages):
            return [{"e": "end", "at": now}]
        if self.settled_at is None:
            return [{"e": "settled", "at": now}]
        return list(self._begin(self.stage + 1, now, base)) if now - self.settled_at >= self.spec.wait_s else []

    def _begin(self, number: int, now: float, base: int) -> Iterator[Event]:
        yield {"e": "stage", "n": number, "at": now}
        fresh = [d for d in self.spec.devices[: self.spec.stages[number - 1]] if d not in self.told]
        yield from (self._tell(d, "install", base + i, now) for i, d in enumerate(fresh))

    def _all_to(self, step: str, devices: list[str], now: float, gone: Collection[str], base: int) -> list[Event]:
        if devices:
            return [self._tell(d, step, base + i, now) for i, d in enumerate(devices)]
        waited = [d for d, t in self.told.items() if not t.settled and d not in gone]
        return [] if waited else [{"e": "end", "at": now}]

    def _tell(self, device: str, step: str, counter: int, now: float) -> Event:
        return {"e": "tell", "device": device, "step": step, "counter": counter, "at": now}

    # ---- what it has come to

    def counts(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """State → devices; `waiting` are those that were not told yet."""
        found: dict[str, int] = {}
        for device in self.spec.devices if names is None else names:
            told = self.told.get(device)
            state = "waiting" if told is None else "failed" if told.failed else told.state
            found[state] = found.get(state, 0) + 1
        return found

    def stages(self) -> list[tuple[str, ...]]:
        """The devices of each stage."""
        edges = (0, *self.spec.stages)
        return [self.spec.devices[a:b] for a, b in itertools.pairwise(edges)]

    @property
    def unsettled(self) -> list[str]:
        return [d for d, t in self.told.items() if not t.settled]
