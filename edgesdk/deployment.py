"""Deployment: which bundle is active, which was before it, and whether it was found good, on one device."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

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
    signer: str | None = None  # name and id of the trusted key that signed it; None: not asked for
    installed: tuple[Installed, ...] = ()
    golden: tuple[GoldenResult, ...] = ()
    gate_s: dict[str, float] = Field(default_factory=dict)  # median seconds a call, by method, where a latency gate was asked for
    sent_bytes: int = 0
    resumed_bytes: int = 0  # were there from an earlier, cut transfer
    steps: tuple[str, ...] = ()  # what was done, or with --dry-run would be
