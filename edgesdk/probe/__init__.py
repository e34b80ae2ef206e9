"""Read what a device is through its link, and write a profile that is bound to that very board."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesdk.agent.client import Agent, Tell
from edgesdk.device import DeviceProfile
from edgesdk.devices import check_text, devices_dir
from edgesdk.errors import InputError
from edgesdk.lease import lease
from edgesdk.probe.compose import compose, recognise
from edgesdk.probe.facts import Facts, read_facts
from edgesdk.probe.gather import texts_of
from edgesdk.probe.saved import changes, keep_measured, name_for, profiles_of, read_raw, write
from edgesdk.probe.toml import toml
from edgesdk.transport import Transport, parse_link

__all__ = ["Facts", "Probed", "facts_of", "probe", "profiles_of"]

MEASURE_S = 300.0


@dataclass(frozen=True)
class Probed:
    """What a device is, its profile, and what is new in it. `text`: the profile as TOML, which lies at `path` if `written`."""

    facts: Facts
    profile: DeviceProfile
    text: str
    path: Path
    written: bool
    again: bool  # there was a profile of this board before
    changes: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Versioned JSON of all of it."""
        import json

        return {
            "kind": "probe", "schema_version": 1, "name": self.profile.name, "path": str(self.path), "written": self.written, "again": self.again,
            "changes": self.changes, "facts": json.loads(self.facts.to_json()), "profile": json.loads(self.profile.to_json()), "toml": self.text,
        }  # fmt: skip


def facts_of(on: str | Transport, python: str | None = None) -> Facts:
    """What the device behind a link is. Raises `LinkError`, `DeviceError`."""
    transport = parse_link(on) if isinstance(on, str) else on
    try:
        texts, via = texts_of(transport, python)
        return read_facts(texts, transport.link, via)
    finally:
        if isinstance(on, str):
            transport.close()


def probe(
    on: str | Transport,
    *,
    name: str | None = None,
    measure: bool = False,
    dry_run: bool = False,
    python: str | None = None,
    wait_s: float = 0.0,
    tell: Tell | None = None,
) -> Probed:
    """Read the device behind the link `on`, and write its profile where `plan --device NAME` finds it.

    `name`: what it is called (default: as before, else model and board). `measure`: times memory, arithmetic and disk there (half a minute, with
    nobody else on the device for `wait_s` at most). `dry_run` writes nothing. Raises `LinkError`, `DeviceError`, and `InputError` for a name that is
    taken.
    """
    tell = tell or (lambda text, share: None)
    transport = parse_link(on) if isinstance(on, str) else on
    try:
        tell("reading what it is", 0.0)
        facts = facts_of(transport, python)
        measured = None
        if measure:
            if facts.via != "agent":
                raise InputError(f"{transport.link}: --measure needs Python on the device", "install it there, or probe without --measure")
            tell("measuring memory, arithmetic and disk", 0.3)
            with lease(transport, "probe", python=python, wait_s=wait_s), Agent(transport, python) as agent:
                measured = agent.ask("speed", timeout_s=MEASURE_S, root=transport.root, last_cache_bytes=last_cache(facts))
    finally:
        if isinstance(on, str):
            transport.close()
    tell("writing its profile", 0.9)
    return _save(facts, measured, name, dry_run)


def last_cache(facts: Facts) -> int:
    """Bytes of the largest cache; 8 MiB where none is told."""
    return max((c.size_bytes for cluster in facts.clusters for c in cluster.caches), default=8 << 20)


def _save(facts: Facts, measured: dict[str, Any] | None, asked: str | None, dry_run: bool) -> Probed:
    base = recognise(facts)
    name = name_for(facts, base, asked)
    path = devices_dir() / f"{name}.toml"
    before = read_raw(path)
    raw = compose(facts, name, base, measured)
    keep_measured(raw, before)
    text = toml(raw)
    profile = check_text(text, f"the profile of {facts.link}")
    if not dry_run:
        write(name, text)
    return Probed(facts, profile, text, path, not dry_run, bool(before), changes(before, raw) if before else [])
