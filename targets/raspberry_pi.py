"""Raspberry Pi boards: Arm CPUs under Linux."""

from __future__ import annotations

from edgesdk.target import Target

TARGET = Target(
    name="raspberry-pi",
    runtimes=("litert", "executorch", "tflite-runtime"),
    links=("ssh", "local", "serial"),
    kernels=("neon", "numba"),
    build_only=(),
)
