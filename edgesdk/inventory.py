"""The inventory: a TOML file that gives devices names, tags and groups, so that `--on` need not spell out links.

    [devices.pi5-01]
    link = "ssh://pi@10.0.0.11"       # may be left out for boards that only a broker reaches (edgesdk rollout)
    device = "raspberry-pi-5"         # its profile, used where --device is not given
    tags = ["lab", "cooled"]

    [groups]
    pi5 = ["pi5-01", "tag:cooled", "group:spare"]

The file is `--inventory FILE`, else `$EDGESDK_INVENTORY`, else `edgesdk-inventory.toml` in the current folder.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from edgesdk.errors import EdgeError, InputError, MissingTool, UnknownName
from edgesdk.noun import Part, describe

FILE = "edgesdk-inventory.toml"
VARIABLE = "EDGESDK_INVENTORY"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
"""Of devices, tags and groups; it is also part of a broker's topics."""
_RESERVED = ("local", "fake")
KINDS = ("local", "local:/folder", "ssh://user@host:22", "adb://SERIAL", "serial:/dev/ttyUSB0", "fake")
_LINKS = ("ssh://", "adb:", "serial:", "local:")


@dataclass(frozen=True)
class Entry:
    """A device as it is reached from here. `link` None: only a broker reaches it; `device` is its profile's name."""

    name: str
    link: str | None
    device: str | None = None
    tags: tuple[str, ...] = ()


class _Device(Part):
    link: str | None = None
    device: str | None = None
    tags: tuple[Annotated[str, Field(pattern=f"^{NAME.pattern}$")], ...] = ()


class _File(Part):
    devices: dict[str, _Device] = Field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Inventory:
    """Devices by name, in the file's order; groups as the selectors they are written with."""

    path: str | None = None
    devices: dict[str, Entry] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def tags(self) -> list[str]:
        return sorted({t for d in self.devices.values() for t in d.tags})

    def select(self, item: str) -> list[Entry]:
        """The devices of one selector: a name, `group:NAME` (`group:all` is every device) or `tag:NAME`. Raises `UnknownName`."""
        kind, sign, name = item.partition(":")
        if not sign and item in self.devices:
            return [self.devices[item]]
        if kind == "tag" and name in self.tags():
            return [d for d in self.devices.values() if name in d.tags]
        if kind == "group" and name in self.groups:
            return list(_once(d for part in self.groups[name] for d in self.select(part)))
        if item == "group:all":
            return list(self.devices.values())
        known = [*self.devices, *(f"group:{g}" for g in (*self.groups, "all")), *(f"tag:{t}" for t in self.tags())]
        for meant in (f"group:{item}", f"tag:{item}"):
            if meant in known:
                raise InputError(f"{item} is no device", f"did you mean '{meant}'?")
        raise UnknownName("device, group or tag", item, known)


def _once(entries: Iterable[Entry]) -> Iterable[Entry]:
    return {e.name: e for e in entries}.values()


def load_inventory(path: str | Path | None = None) -> Inventory:
    """The checked inventory; an empty one where no file is named or in the folder. Raises `InputError` by file and field."""
    given = path or os.environ.get(VARIABLE)
    if not given and not Path(FILE).exists():
        return Inventory()
    file = Path(given or FILE)
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        hint = f"give a file that can be read: --inventory FILE, or {VARIABLE}"
        raise InputError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})", hint) from None
    except (ValueError, RecursionError) as error:  # a name that is there twice is among these
        raise InputError(f"{file}: not TOML: {error}", "correct that line and run the command again") from None
    try:
        parsed = _File.model_validate(raw)
    except ValidationError as error:
        raise InputError(*describe(error, str(file))) from None
    devices = {name: Entry(name, d.link, d.device, d.tags) for name, d in parsed.devices.items()}
    found = Inventory(str(file), devices, parsed.groups)
    _check(found)
    return found


def _check(inventory: Inventory) -> None:
    """Names, links, profiles and groups. Raises `InputError` for the first mistake."""
    where = inventory.path
    for field_name, names in (("devices", inventory.devices), ("groups", inventory.groups)):
        for name in names:
            if not NAME.fullmatch(name) or name in _RESERVED:
                hint = f"use letters, digits, and . _ - inside; {' and '.join(_RESERVED)} are links"
                raise InputError(f"{where}: {field_name}.{name}: cannot be a name", hint)
    links: dict[str, str] = {}
    cases: dict[str, str] = {}
    for name, device in inventory.devices.items():
        if (other := cases.setdefault(name.lower(), name)) != name:
            raise InputError(f"{where}: devices.{name}: differs from devices.{other} in case alone", "rename one of the two")
        if device.link is None:
            continue
        _check_link(device.link, f"{where}: devices.{name}.link = {device.link!r}")
        if (other := links.setdefault(device.link, name)) != name:
            raise InputError(f"{where}: devices.{name}.link = {device.link!r}: that of devices.{other}, too", "one device, one name")
    _check_profiles(inventory)
    for group in inventory.groups:
        _check_group(inventory, group, ())


def _check_link(link: str, where: str) -> None:
    from edgesdk.transport import parse_link

    if not is_link(link):
        raise InputError(f"{where}: not a link", "write it like ssh://user@host, adb://SERIAL, serial:/dev/ttyUSB0, local:/folder")
    try:
        parse_link(link).close()
    except MissingTool:
        return  # what reaches it is not installed here: its verb says so
    except EdgeError as error:
        raise InputError(f"{where}: {error.what}", error.hint) from None


def _check_profiles(inventory: Inventory) -> None:
    from edgesdk.devices import load_device

    first = {d.device: name for name, d in reversed(inventory.devices.items()) if d.device}
    for device, name in first.items():
        try:
            load_device(device)
        except EdgeError as error:
            raise InputError(f"{inventory.path}: devices.{name}.device: {error.what}", error.hint) from None


def _check_group(inventory: Inventory, group: str, above: tuple[str, ...]) -> None:
    if group in above:
        ring = " → ".join((*above[above.index(group) :], group))
        raise InputError(f"{inventory.path}: groups.{group}: a ring of groups: {ring}", "take one of them out of another")
    for item in inventory.groups[group]:
        if item.startswith("group:") and item[6:] in inventory.groups:
            _check_group(inventory, item[6:], (*above, group))
        elif item == "group:all":
            continue
        else:
            try:
                inventory.select(item)
            except UnknownName as error:
                raise InputError(f"{inventory.path}: groups.{group}: {error.what}", error.hint) from None


# ---- what --on takes


def is_link(text: str) -> bool:
    return text in _RESERVED or text.startswith(_LINKS)


def is_several(on: str) -> bool:
    """Whether `on` asks for a table of devices, even of one: a list, a group or a tag."""
    return "," in on or on.startswith(("group:", "tag:"))


def chosen(on: str) -> list[Entry]:
    """The devices of `--on`: links and selectors of the inventory, divided by commas, each device once. Raises `InputError`, `UnknownName`."""
    items = [item.strip() for item in on.split(",")]
    if "" in items:
        raise InputError(f"--on {on!r}: an empty name", "write it like pi5-01,group:lab,ssh://user@host")
    inventory = Inventory() if all(is_link(i) for i in items) else load_inventory()
    found = list(_once(e for item in items for e in ([Entry(item, item)] if is_link(item) else inventory.select(item))))
    if not found:
        raise InputError(f"--on {on}: no device in it", f"look at it: edgesdk inventory list ({inventory.path})")
    return found


def link_of(name: str) -> str:
    """The link of a device of the inventory. Raises `UnknownName`, and `InputError` for a group or a device without a link."""
    inventory = load_inventory()
    if name not in inventory.devices and not is_several(name):
        raise UnknownName("link", name, [*inventory.devices, *KINDS])
    found = inventory.select(name) if not is_several(name) else chosen(name)
    if len(found) != 1:
        raise InputError(f"--on {name}: {len(found)} devices", "this takes one device at a time; flash, profile and run take several")
    return reached(found[0])


def reached(entry: Entry) -> str:
    """Its link. Raises `InputError` if it has none."""
    if entry.link is None:
        raise InputError(f"{entry.name} has no link in the inventory", "only a broker reaches it: edgesdk rollout; or add link = …")
    return entry.link
