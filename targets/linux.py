"""Any other board under Linux."""

from __future__ import annotations

from edgesdk.target import Target

TARGET = Target(
    name="linux",
    runtimes=("litert", "executorch", "tflite-runtime"),
    links=("ssh", "local", "serial", "adb"),
    kernels=("neon", "numba"),
    build_only=(),
)
