"""The base of every noun: frozen, strict, saved to and loaded from versioned JSON, with a content digest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from edgesdk.errors import InputError


class Part(BaseModel):
    """A frozen piece of a noun; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Noun(Part):
    """A whole noun. `KIND` and `VERSION` are written into every file and checked when it is read."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1

    def to_json(self) -> str:
        """Versioned JSON text, keys in field order."""
        head = {"kind": self.KIND, "schema_version": self.VERSION}
        return json.dumps({**head, **self.model_dump(mode="json")}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "input") -> Self:
        """The noun in `text`. Raises `InputError` naming `where`, the field and the problem."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})", f"expected a saved {cls.KIND}") from None
        if not isinstance(data, dict) or data.pop("kind", None) != cls.KIND:
            raise InputError(f"{where}: not a {cls.KIND}", f'expected JSON with "kind": "{cls.KIND}"')
        version = data.pop("schema_version", None)
        if version != cls.VERSION:
            raise InputError(f"{where}: schema_version = {version}, wanted {cls.VERSION}", "make it again with this edgesdk")
        return cls.check(data, where)

    @classmethod
    def check(cls, data: object, where: str) -> Self:
        """`data` as this noun. Raises `InputError` that lists `where: field: problem`."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(*describe(error, where)) from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write atomically (a temporary file, then a rename)."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(self.to_json() + "\n", encoding="utf-8")
        part.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Raises `InputError`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error})", f"give a saved {cls.KIND}") from None
        return cls.from_json(text, str(path))

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def describe(error: ValidationError, where: str) -> tuple[str, str]:
    """pydantic's error as our two lines: the first problem with its field and value, then the rest."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "(top)"
        given = "" if item["type"] in ("missing", "extra_forbidden") or isinstance(item["input"], dict) else f" = {item['input']!r}"
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        lines.append(f"{field}{given}: {message}")
    rest = f"; {len(lines) - 1} more: " + "; ".join(lines[1:4]) if len(lines) > 1 else ""
    return f"{where}: {lines[0]}", f"correct the field and run the command again{rest}"
