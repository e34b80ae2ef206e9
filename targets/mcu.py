"""Microcontrollers: programs lie in flash, beside a firmware that runs them, or are linked into it (`edgesdk flash --to esp32:, uf2:, smp:`)."""

from __future__ import annotations

from edgesdk.target import Target

TARGET = Target(
    name="mcu",
    runtimes=("executorch-ethos-u", "tflite-micro"),
    links=("serial",),
    kernels=(),
    build_only=("executorch-ethos-u", "tflite-micro"),
)
