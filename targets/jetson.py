"""NVIDIA Jetson boards: Arm CPUs under Linux, and a GPU that needs NVIDIA's own software on the board."""

from __future__ import annotations

from edgesdk.target import Target

TARGET = Target(
    name="jetson",
    runtimes=("executorch", "litert"),
    links=("ssh", "local"),
    kernels=("cuda", "neon", "numba"),
    build_only=("executorch-cuda", "executorch-vulkan", "native-cuda"),
)
