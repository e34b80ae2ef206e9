"""Every error a user can meet.

    EdgeError                 what is wrong; what to do          (exit code)
    ├── InputError            bad input or usage                     2
    │   ├── UnknownName       a lookup by name failed                2
    │   └── MissingTool       something is not installed             2
    ├── NoAnswer              the answer is no                       1
    │   ├── DoesNotFit        no plan within the budget              1
    │   └── CheckFailed       outputs, digest or latency are wrong   1
    └── DeviceError           the device or the link failed          3
        └── LinkError         the link broke; retrying may help      3

The CLI catches `EdgeError` once, prints its two lines and exits with its code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


class EdgeError(Exception):
    """`what` is wrong (names the file, field and value); `hint` says what to do next."""

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, hint: str = "", **fields: Any) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.fields = fields

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what


class InputError(EdgeError):
    """The input or the usage is wrong."""


class UnknownName(InputError):
    """`given` is not one of `known`; the nearest match is offered."""

    def __init__(self, kind: str, given: str, known: Iterable[str]) -> None:
        names = sorted(set(known))
        near = difflib.get_close_matches(given.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
        match = next((n for n in names if near and n.lower() == near[0]), None)
        listed = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
        hint = f"did you mean '{match}'? known: {listed}" if match else f"known: {listed}"
        super().__init__(f"unknown {kind} '{given}'", hint, kind=kind, given=given, nearest=match)


class MissingTool(InputError):
    """A package, program or vendor SDK is needed and absent; `hint` is the command that installs it."""


class NoAnswer(EdgeError):
    """The question was understood and the answer is no."""

    exit_code: ClassVar[int] = 1


class DoesNotFit(NoAnswer):
    """No plan is within the budget."""


class CheckFailed(NoAnswer):
    """A program, an output, a digest or a gate is not what it must be."""


class DeviceError(EdgeError):
    """The device refused or failed."""

    exit_code: ClassVar[int] = 3


class LinkError(DeviceError):
    """The link to the device broke; the same command resumes."""


def select_by_name(kind: str, given: str, table: Mapping[str, T]) -> T:
    """`table[given]`, ignoring case; raises `UnknownName` with the nearest match otherwise."""
    for name, value in table.items():
        if name.lower() == given.lower():
            return value
    raise UnknownName(kind, given, table)
