"""Deployment: which bundle is active, which was before it, and whether it was found good, on one device."""

from __future__ import annotations

from typing import ClassVar, Literal

from edgesdk.noun import Noun, Part

Action = Literal["installed", "already-installed", "rolled-back", "status", "dry-run"]


class Installed(Part):
    digest: str
    good: bool  # its golden outputs matched on this device


class GoldenResult(Part):
    method: str
    case: int
    relative_error: float | None  # None: not a number
    allowed: float


class Deployment(Noun):
    KIND: ClassVar[str] = "deployment"

    action: Action
    link: str
    root: str  # folder on the device
    current: str | None  # bundle digest
    previous: str | None
    good: bool  # the current one
    model_name: str | None = None
    installed: tuple[Installed, ...] = ()
    golden: tuple[GoldenResult, ...] = ()
    gate_s: dict[str, float] = {}  # median seconds a call, by method, where a latency gate was asked for
    emulated: bool | None = None
    sent_bytes: int = 0
    resumed_bytes: int = 0  # were there from an earlier, cut transfer
    shared_bytes: int = 0  # were there in another installed bundle
    steps: tuple[str, ...] = ()  # what was done, or with --dry-run would be
