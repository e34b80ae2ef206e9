"""Microcontrollers with an Ethos-U: programs are compiled ahead of time and linked into a firmware."""

from __future__ import annotations

from edgesdk.target import Target

TARGET = Target(
    name="mcu",
    runtimes=("executorch-ethos-u", "tflite-micro"),
    links=("serial",),
    kernels=(),
    build_only=("executorch-ethos-u", "tflite-micro"),
)
