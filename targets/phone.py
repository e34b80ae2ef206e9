"""Phones: big and little Arm cores, a GPU and an NPU that needs the vendor's SDK."""

from __future__ import annotations

from edgesdk.target import Target

TARGET = Target(
    name="phone",
    runtimes=("executorch", "litert"),
    links=("adb",),
    kernels=("neon",),
    build_only=("executorch-qnn", "executorch-coreml", "executorch-vulkan"),
)
