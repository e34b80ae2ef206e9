"""Qualcomm IoT boards under Linux: Arm CPUs, and a Hexagon NPU that needs the vendor's SDK."""

from __future__ import annotations

from edgesdk.target import Target

TARGET = Target(
    name="dragonwing",
    runtimes=("litert", "executorch"),
    links=("ssh", "adb", "local"),
    kernels=("neon",),
    build_only=("executorch-qnn", "executorch-vulkan"),
)
