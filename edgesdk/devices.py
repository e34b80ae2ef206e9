"""Find, check and detect devices. The one door through which a profile comes in.

A user's own profiles lie under `$EDGESDK_DEVICES`, else `$XDG_CONFIG_HOME/edgesdk/devices` (`~/.config/edgesdk/devices`).
"""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgesdk.device import DeviceProfile
from edgesdk.errors import EdgeError, InputError, UnknownName
from edgesdk.noun import describe

LISTS_BY = {"units": "name", "caches": "level", "runtimes": "name", "power_modes": "name", "variants": "suffix"}
"""How list items are addressed in `[sources]`: `units.cpu.clock_hz`, `units.cpu.caches.2.size_bytes`."""

HOSTS = ("host", "local")
"""Names of this machine, detected live."""

NOT_CONFIRMED = "not confirmed"
"""How the source of a figure begins that is commonly quoted and that no page seen confirms."""


def devices_dir() -> Path:
    """The folder of the user's own profiles; it need not be there."""
    given, config = os.environ.get("EDGESDK_DEVICES"), os.environ.get("XDG_CONFIG_HOME")
    return Path(given) if given else (Path(config) if config else Path.home() / ".config") / "edgesdk" / "devices"


def load_device(name_or_path: str) -> DeviceProfile:
    """The profile of a name, an alias, a variant (`pi5-4gb`), a user's own profile, a TOML file, or `host` (detected live).

    Raises `UnknownName` with the nearest match, or `InputError` by file and field, and where a user's profile has the name of a shipped one.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        return check_profile(name_or_path)
    wanted = name_or_path.lower()
    names, own = shipped_names(), user_files()
    if wanted in own:
        if wanted in names or wanted in HOSTS:
            hint = "rename the file and the `name` in it: a profile of yours never stands in for a shipped one"
            raise InputError(f"{own[wanted]}: '{wanted}' is the name of a shipped device, too", hint)
        return _own(own[wanted])
    if wanted in HOSTS:
        from edgesdk.host import detect_host

        return detect_host()
    if wanted not in names:
        raise UnknownName("device", name_or_path, [*names, *own, "host"])
    stem, suffix = names[wanted]
    return _shipped(stem, suffix)


def shipped_names() -> dict[str, tuple[str, str | None]]:
    """Every name, alias and variant of a shipped profile → (its file, the variant)."""
    names: dict[str, tuple[str, str | None]] = {}
    for stem, raw in _raw_profiles():
        for base in (raw.get("name", stem), *raw.get("aliases", ())):
            names[base] = (stem, None)
            for variant in raw.get("variants", ()):
                names[f"{base}-{variant.get('suffix')}"] = (stem, variant.get("suffix"))
    return names


def user_files() -> dict[str, Path]:
    """Name → file of every profile of the user's own, right or wrong."""
    return {path.stem.lower(): path for path in sorted(devices_dir().glob("*.toml"))}


def list_devices() -> list[DeviceProfile]:
    """Every profile that is right, the shipped ones in order of name, then the user's own; a broken one never blocks the others."""
    return [*shipped_devices(), *user_devices()]


def shipped_devices() -> list[DeviceProfile]:
    found = []
    for stem, _ in _raw_profiles():
        try:
            found.append(_shipped(stem, None))
        except EdgeError:
            continue
    return found


def user_devices() -> list[DeviceProfile]:
    found = []
    for name in user_files():
        try:
            found.append(load_device(name))
        except EdgeError:
            continue
    return found


def _own(path: Path) -> DeviceProfile:
    profile = check_profile(path)
    if profile.name != path.stem.lower():
        raise InputError(f"{path}: name = '{profile.name}', wanted '{path.stem.lower()}'", "a profile of your own is called as its file")
    return profile


def bound_to(profile: DeviceProfile, facts: Mapping[str, Any], link: str = "the link") -> str | None:
    """Why the board that `facts` are of (an agent's `facts`, a saved `device-facts`) is not the one `profile` was read from, in one line.

    None where it is, and where the profile is of no single board.
    """
    if profile.board is None or facts.get("board_id") == profile.board.id:
        return None
    mine = f"{profile.name} is the profile of board {profile.board.id} ({profile.board.model})"
    if not facts.get("board_id"):
        return f"{mine}; the one behind {link} cannot be told from others"
    model = facts.get("model") or facts.get("board") or facts.get("machine") or "unknown"
    return f"{mine}; behind {link} is board {facts['board_id']} ({model})"


def check_profile(path: str | Path) -> DeviceProfile:
    """The profile in a file. Raises `InputError` naming the file, the field and what was wanted."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "give the path of a device's TOML file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not TOML ({error})", "see docs/adding-a-device.md for a profile's form") from None
    return check_text(text, str(path))


def check_text(text: str, where: str) -> DeviceProfile:
    """The profile in a TOML text that `where` names. Raises `InputError`."""
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib's own error, numbers of thousands of digits, lists in lists without end
        raise InputError(f"{where}: not TOML ({error})", "see docs/adding-a-device.md for a profile's form") from None
    return _build(raw, where)


def figures(profile: DeviceProfile) -> list[str]:
    """The dotted names of everything that a profile states as a fact: its numbers, the counts of cores, the instruction sets."""
    found = list(_numbers(profile.model_dump(mode="json", exclude={"variants", "sources"})))
    for unit in profile.units:
        found += [f"units.{unit.name}.cores", *([f"units.{unit.name}.isa"] if unit.isa else [])]
    return found


def not_confirmed(profile: DeviceProfile) -> list[str]:
    """Those of `figures` that have no source, or whose source says that nothing seen confirms them."""
    sources = {field: source_of(profile.sources, field) for field in figures(profile)}
    return [field for field, source in sources.items() if source is None or source.startswith(NOT_CONFIRMED)]


def source_of(sources: dict[str, str], field: str) -> str | None:
    """The source of a field: that of the longest key that covers it."""
    keys = [s for s in sources if field == s or field.startswith(s + ".")]
    return sources[max(keys, key=len)] if keys else None


@cache
def _raw_profiles() -> tuple[tuple[str, dict[str, Any]], ...]:
    """(file's stem, fields) of every shipped profile that is TOML."""
    found = []
    for entry in sorted(files("edgesdk.profiles").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".toml"):
            with contextlib.suppress(tomllib.TOMLDecodeError):
                found.append((entry.name.removesuffix(".toml"), tomllib.loads(entry.read_text(encoding="utf-8"))))
    return tuple(found)


@cache
def _shipped(stem: str, suffix: str | None) -> DeviceProfile:
    raw = dict(_raw_profiles())[stem]
    where = f"profiles/{stem}.toml"
    return _variant(raw, suffix, where) if suffix else _build(raw, where)


def _variant(raw: dict[str, Any], suffix: str, where: str) -> DeviceProfile:
    changed = deepcopy(raw)
    variant = next(v for v in raw["variants"] if v["suffix"] == suffix)
    for field, value in variant["set"].items():
        _set(changed, field.split("."), value, f"{where}: variants.{suffix}.{field}")
    changed["name"] = f"{raw['name']}-{suffix}"
    changed["title"] = f"{raw['title']} ({suffix.upper()})"
    changed["aliases"], changed["variants"] = [f"{a}-{suffix}" for a in raw.get("aliases", ())], []
    sources = changed.setdefault("sources", {})
    sources.update(dict.fromkeys(variant["set"], sources.get(f"variants.{suffix}", f"variant {suffix}")))
    return _build(changed, where)


def _set(node: Any, path: list[str], value: Any, where: str) -> None:
    for part in path[:-1]:
        node = _item(node, part) if isinstance(node, list) else node.get(part) if isinstance(node, dict) else None
        if node is None:
            raise InputError(f"{where}: no such field", "a variant replaces fields that the profile has")
    node[path[-1]] = value


def _item(items: list[Any], key: str) -> Any:
    return next((i for i in items if any(str(i.get(k)) == key for k in set(LISTS_BY.values()) if k in i)), None)


def _build(raw: dict[str, Any], where: str) -> DeviceProfile:
    try:
        profile = DeviceProfile.model_validate(raw)
    except ValidationError as error:
        raise InputError(*describe(_named(error, raw), where)) from None
    missing = [field for field in _numbers(raw) if source_of(profile.sources, field) is None]
    if missing:
        more = f" ({len(missing)} numbers in all)" if len(missing) > 1 else ""
        raise InputError(f"{where}: {missing[0]}: no source{more}", f'add it to [sources], like "{missing[0]}" = "https://…"')
    if profile.default_power_mode and profile.default_power_mode not in [m.name for m in profile.power_modes]:
        known = [m.name for m in profile.power_modes]
        raise InputError(
            f"{where}: default_power_mode = '{profile.default_power_mode}', wanted one of {known}", "name one of its power modes"
        )
    return profile


def _named(error: ValidationError, raw: dict[str, Any]) -> ValidationError:
    """The same error with list positions replaced by names (`units.cpu.isa`, not `units.0.isa`)."""
    lines = []
    for item in error.errors():
        node: Any = raw
        loc: list[str | int] = []
        for part in item["loc"]:
            parent, node = (
                node,
                (node[part] if isinstance(node, list) and isinstance(part, int) else node.get(part) if isinstance(node, dict) else None),
            )
            named = isinstance(parent, list) and isinstance(node, dict)
            loc.append(next((str(node[k]) for k in set(LISTS_BY.values()) if k in node), part) if named else part)
        message = re.sub(r"^Input should be (?='.* or )", "wanted one of ", item["msg"])
        lines.append({"type": "value_error", "loc": tuple(loc), "input": item["input"], "ctx": {"error": ValueError(message)}})
    return ValidationError.from_exception_data("profile", lines)  # type: ignore[arg-type]


def _numbers(node: Any, path: str = "") -> Iterator[str]:
    """The dotted names of every number in a profile."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in ("variants", "sources", "schema"):
                yield from _numbers(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        field = path.rsplit(".", 1)[-1]
        for i, value in enumerate(node):
            name = value.get(LISTS_BY.get(field, ""), i) if isinstance(value, dict) else i
            yield from _numbers(value, f"{path}.{name}")
    elif isinstance(node, int | float) and not isinstance(node, bool) and not path.endswith((".level", ".cores", ".shared_by")):
        yield path
