"""Find, check and detect devices. The one door through which a profile comes in."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgesdk.device import DeviceProfile
from edgesdk.errors import EdgeError, InputError, UnknownName
from edgesdk.noun import describe

LISTS_BY = {"units": "name", "caches": "level", "runtimes": "name", "power_modes": "name", "variants": "suffix"}
"""How list items are addressed in `[sources]`: `units.cpu.clock_hz`, `units.cpu.caches.2.size_bytes`."""

NOT_CONFIRMED = "not confirmed"
"""How the source of a figure begins that is commonly quoted and that no page seen confirms."""


def load_device(name_or_path: str) -> DeviceProfile:
    """The profile of a name, an alias, a variant (`pi5-4gb`), a TOML file, or `host` (detected live).

    Raises `UnknownName` with the nearest match, or `InputError` by file and field.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        return check_profile(name_or_path)
    wanted = name_or_path.lower()
    if wanted in ("host", "local"):
        from edgesdk.host import detect_host

        return detect_host()
    names: dict[str, tuple[str, str | None]] = {}
    for stem, raw in _raw_profiles():
        for base in (raw.get("name", stem), *raw.get("aliases", ())):
            names[base] = (stem, None)
            for variant in raw.get("variants", ()):
                names[f"{base}-{variant.get('suffix')}"] = (stem, variant.get("suffix"))
    if wanted not in names:
        raise UnknownName("device", name_or_path, [*names, "host"])
    stem, suffix = names[wanted]
    return _shipped(stem, suffix)


def list_devices() -> list[DeviceProfile]:
    """Every shipped profile that is right, in order of name; a broken one never blocks the others."""
    found = []
    for stem, _ in _raw_profiles():
        try:
            found.append(_shipped(stem, None))
        except EdgeError:
            continue
    return found


def check_profile(path: str | Path) -> DeviceProfile:
    """The profile in a file. Raises `InputError` naming the file, the field and what was wanted."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "give the path of a device's TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML ({error})", "see docs/adding-a-device.md for a profile's form") from None
    return _build(raw, str(path))


def figures(profile: DeviceProfile) -> list[str]:
    """The dotted names of everything that a profile states as a fact: its numbers, the counts of cores, the instruction sets."""
    found = list(_numbers(profile.model_dump(mode="json", exclude={"variants", "sources"})))
    for unit in profile.units:
        found += [f"units.{unit.name}.cores", *([f"units.{unit.name}.isa"] if unit.isa else [])]
    return found


def not_confirmed(profile: DeviceProfile) -> list[str]:
    """Those of `figures` that have no source, or whose source says that nothing seen confirms them."""
    sources = {field: _source(profile.sources, field) for field in figures(profile)}
    return [field for field, source in sources.items() if source is None or source.startswith(NOT_CONFIRMED)]


def _source(sources: dict[str, str], field: str) -> str | None:
    """The source of a field: that of the longest key that covers it."""
    keys = [s for s in sources if field == s or field.startswith(s + ".")]
    return sources[max(keys, key=len)] if keys else None


def _raw_profiles() -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in sorted(files("edgesdk.profiles").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".toml"):
            try:
                yield entry.name.removesuffix(".toml"), tomllib.loads(entry.read_text(encoding="utf-8"))
            except tomllib.TOMLDecodeError:
                continue


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
    missing = [field for field in _numbers(raw) if _source(profile.sources, field) is None]
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
