"""Bundle: one file that holds everything a device needs. An uncompressed zip: `manifest.json`, then members by name.

Every member's sha256 is in the manifest; the bundle's digest is the sha256 of the manifest's bytes, so it stands for all of it.
"""

from __future__ import annotations

from typing import ClassVar

from edgesdk.noun import Noun, Part


class Member(Part):
    name: str
    size_bytes: int
    sha256: str


class GoldenCase(Part):
    """Inputs and the outputs expected of them, as `.npy` members; a check passes within rtol/atol of the reference norm."""

    method: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    max_relative_error: float  # ‖out − expected‖ / ‖expected‖ allowed on the device


class Manifest(Noun):
    KIND: ClassVar[str] = "bundle"

    model_name: str
    device: str
    runtime: str  # "executorch" | "litert"
    runtime_version: str
    program: str  # member name: "model.pte" | "model.tflite", with ".packed" where its weights are stored as codes
    methods: tuple[str, ...]
    threads: int
    plan_digest: str
    host_check: dict[str, float]  # method → relative error of the program against the reference on this host
    members: tuple[Member, ...]
    golden: tuple[GoldenCase, ...]
    memory: dict[
        str, int
    ]  # the runtime's own memory plan: "program", "planned:<method>:<i>", …; "packed", "codes" and "covered" of a packed one
    quality: float | None = None  # of the built program, by the model's own `evaluate`
    edgesdk_version: str
