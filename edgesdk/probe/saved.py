"""A user's own profiles on disk: their names, what changed since they were read last, writing them."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgesdk.device import DeviceProfile
from edgesdk.devices import HOSTS, LISTS_BY, devices_dir, shipped_names, source_of, user_devices, user_files
from edgesdk.errors import EdgeError, InputError
from edgesdk.probe.compose import MEASURED, NO_ID
from edgesdk.probe.facts import Facts

KEPT = ("memory.one_thread_bytes_per_s", "memory.bandwidth_bytes_per_s", "storage.read_bytes_per_s")
"""Figures that a probe without --measure does not take away from a profile that has measured ones."""

SWAY = 0.05
"""Less of a change of the share of free memory is none."""


def profiles_of(board: str | None) -> list[DeviceProfile]:
    """The user's own profiles that are bound to a board."""
    return [p for p in user_devices() if p.board and p.board.id == board] if board else []


def name_for(facts: Facts, base: DeviceProfile | None, asked: str | None) -> str:
    """What the profile is to be called: as asked, as the board's profile is called already, else by model and board. Raises `InputError`."""
    known = profiles_of(facts.board_id)
    if asked is None and known:
        return known[0].name
    words = re.sub(r"[^a-z0-9.]+", "-", (base.name if base else facts.model).lower()).strip("-.")[:40] or "board"
    name = asked.lower() if asked else f"{words}-{(facts.board_id or 'board')[:6]}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise InputError(f"--name {asked}: not a name", "letters, digits, dots and dashes, like pi5-kitchen")
    if name in HOSTS or name in shipped_names():
        raise InputError(
            f"--name {asked}: a shipped device is called so", "choose another name: a profile of yours never stands in for a shipped one"
        )
    if name in user_files():
        _refuse_another(user_files()[name], facts)
    return name


def _refuse_another(path: Path, facts: Facts) -> None:
    raw = read_raw(path)
    board = raw.get("board", {}).get("id")
    if board is not None and board != (facts.board_id or NO_ID):
        what = f"{path}: bound to another board ({board}, {raw['board'].get('model')}); this one is {facts.board_id}"
        raise InputError(what, "give this board another --name, or remove that file")
    if board is None:
        raise InputError(f"{path}: a profile that was not read from a board", "give another --name, or remove that file")


def read_raw(path: Path) -> dict[str, Any]:
    """The file's fields as they are; none where it is not there or not TOML."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return {}


def keep_measured(raw: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Figures that were measured earlier, and not now, stay as they were."""
    for key in KEPT:
        table, name = key.split(".")
        source = source_of(dict(before.get("sources", {})), key) or ""
        now = source_of(raw["sources"], key) or ""
        if source.startswith(MEASURED) and not now.startswith(MEASURED) and name in before.get(table, {}):
            raw[table][name] = before[table][name]
            raw["sources"][key] = source


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fields that differ, by their dotted names; where figures come from and the day are left out."""
    old, new = ({k: v for k, v in flat(raw) if not k.startswith(("sources.", "board.probed"))} for raw in (before, after))
    names = [*old, *(k for k in new if k not in old)]
    return [{"field": k, "before": old.get(k), "after": new.get(k)} for k in names if not _alike(k, old.get(k), new.get(k))]


def _alike(field: str, before: Any, after: Any) -> bool:
    """What is free of the memory sways from moment to moment."""
    if field == "memory.usable_share" and isinstance(before, float) and isinstance(after, float):
        return abs(before - after) <= SWAY
    return bool(before == after)


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name → value of everything in a profile; items of lists by their names."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from flat(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list) and node and all(isinstance(v, Mapping) for v in node):
        by = LISTS_BY.get(path.rpartition(".")[2], "")
        for i, value in enumerate(node):
            yield from flat(value, f"{path}.{value.get(by, i)}")
    else:
        yield path, node


def write(name: str, text: str) -> Path:
    """Write a profile where `load_device` finds it. Raises `EdgeError` where the folder cannot be written."""
    path = devices_dir() / f"{name}.toml"
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise EdgeError(
            f"{path}: cannot be written ({error.strerror})", "free some space, or give another folder: EDGESDK_DEVICES"
        ) from None
    return path
