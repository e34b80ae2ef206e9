"""Deployment: which bundle is active, which was before it, and whether it was found good, on one device."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from edgesdk.noun import Noun, Part

Action = Literal["installed", "already-installed", "rolled-back", "cleaned", "status", "dry-run"]


class Installed(Part):
    digest: str
    good: bool  # its golden outputs matched on this device


class GoldenResult(Part):
    method: str
    case: int
    relative_error: float | None  # None: not a number
    allowed: float


class Entry(Part):
    """One act on the device."""

    number: int  # rises by one: the device's clock may jump
    when: str  # by the device's clock
    action: str  # "switching", "installed", "refused", "rolled-back", "finished", "undone", "trusted", …
    digest: str | None
    signer: str | None  # id of the key
    result: str


class Deployment(Noun):
    KIND: ClassVar[str] = "deployment"

    action: Action
    link: str
    root: str  # folder on the device
    current: str | None  # bundle digest
    previous: str | None
    good: bool  # the current one
    model_name: str | None = None
    signer: str | None = None  # name and id of the trusted key that signed it; None: not asked for
    installed: tuple[Installed, ...] = ()
    golden: tuple[GoldenResult, ...] = ()
    unchecked: str | None = None  # why its outputs were not compared on the device, where that was allowed
    gate_s: dict[str, float] = Field(default_factory=dict)  # median seconds a call, by method, where a latency gate was asked for
    sent_bytes: int = 0
    resumed_bytes: int = 0  # were there from an earlier, cut transfer
    damaged: tuple[str, ...] = ()  # with "status": files of the current one that are not what its manifest says
    interrupted: bool = False  # a switch was cut off: the next flash, --rollback or --gc finishes or undoes it
    trusted_keys: bool = False  # the device has keys of its own, and runs only what they signed
    history: tuple[Entry, ...] = ()  # the last acts on the device, the oldest first
    removed: tuple[str, ...] = ()  # what was deleted there: folders under root
    steps: tuple[str, ...] = ()  # what was done, or with --dry-run would be
