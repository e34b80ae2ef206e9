"""This machine."""

from __future__ import annotations

from edgesdk.target import Target

TARGET = Target(
    name="host",
    runtimes=("litert", "executorch"),
    links=("local",),
    kernels=("numba",),
    build_only=(),
)
