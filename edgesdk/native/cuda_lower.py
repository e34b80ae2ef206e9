"""Lowering for a GPU: weights packed for tensor cores, and the machine code of every kernel that the program is made of."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesdk.errors import InputError, UnknownName
from edgesdk.kernels.cuda.compile import ARCHITECTURES, Kernel, codes
from edgesdk.kernels.cuda.machine import Paper
from edgesdk.kernels.cuda.tiles import LAYOUT, PARTS
from edgesdk.kernels.cuda.weights import pack
from edgesdk.kernels.panels import UnfitWeights
from edgesdk.native.lower import Lowering
from edgesdk.packed import Code

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

TARGET = "cuda-"
"""Of a target's name; behind it stands the GPU's architecture, "sm87"."""


def arch_of(target: str) -> str:
    """ "cuda-sm87" → "sm_87". Raises `UnknownName`."""
    known = {f"{TARGET}{name.replace('_', '')}": name for name in ARCHITECTURES}
    if target not in known:
        raise UnknownName("GPU target", target, known)
    return known[target]


def gpu_target(device: str, isa: Iterable[str]) -> str:
    """The target of a device's GPU by its profile. Raises `InputError` where the kernels are not for it."""
    found = next((name for name in isa if name in ARCHITECTURES), None)
    if found is None:
        known = ", ".join(f"{name} ({what})" for name, what in ARCHITECTURES.items())
        raise InputError(f"{device}: its profile names no GPU that the kernels are compiled for", f"isa of the unit is one of {known}")
    return f"{TARGET}{found.replace('_', '')}"


class _CudaLowering(Lowering):
    """Panels are tiles of 16 rows; codes of 2, 3, 4 and 8 bits and tables of up to 16 values run as they are stored."""

    floats: dict[str, int] = {}

    def __init__(self, spec: ModelSpec, choice: Mapping[tuple[str, str], str]) -> None:
        super().__init__(spec, choice, SimpleNamespace(half=True, target="cuda"))
        for stack in (self.config.encoder, self.config.decoder):
            if stack is not None and (stack.head % 8 or stack.head > 256):
                raise InputError(f"{spec.name}: heads of {stack.head} numbers", "on a GPU heads have a multiple of 8, at most 256")

    def readable(self, code: Code) -> bool:
        try:
            pack(code)
        except UnfitWeights:
            return False
        return True

    def pattern(self, path: str, code: Code) -> str:
        return ""

    def add_panels(self, name: str, code: Code, pattern: str = "") -> None:
        tiles = pack(code)
        self.panels[name] = {"rows": tiles.rows, "cols": tiles.cols, "bits": tiles.bits, "group": tiles.group}
        for part in PARTS:
            self.arrays[f"{name}.{part}"] = getattr(tiles, part)


def lower_cuda(
    spec: ModelSpec,
    target: str,
    choice: Mapping[tuple[str, str], str],
    say: Callable[[str], None] = lambda text: None,
    *,
    compiling: bool = True,
) -> bytes:
    """The program for "cuda-sm87" and its like. Without `compiling` it has no machine code and runs on an emulated GPU alone.

    Raises `InputError`, and `MissingTool` where there is no NVRTC.
    """
    from edgesdk.native.lower import header_of
    from edgesdk.native.program import write

    arch = arch_of(target)
    say("packing weights")
    work = _CudaLowering(spec, choice)
    work.add_matrices()
    work.add_rest()
    header = {**header_of(spec, work, target), "tiles": LAYOUT}
    kernels, blocks = asked(write({**header, "kernels": {}}, work.arrays))
    header |= {"blocks": blocks, "kernels": {}, "code_at": None}
    arrays = dict(work.arrays)
    if compiling:
        say(f"compiling {len(kernels)} kernels")
        header["kernels"] = {}
        for name, images in codes(kernels, arch).items():
            parts = [f"code.{name}.{kind}" for kind in ("cubin", "ptx")]
            header["kernels"][name] = parts
            arrays |= {part: np.frombuffer(image, np.uint8) for part, image in zip(parts, images, strict=True)}
    header["code_at"] = sum(-(-a.nbytes // 64) * 64 for a in work.arrays.values())
    return write(header, arrays)


def asked(content: bytes) -> tuple[list[Kernel], dict[str, list[int]]]:
    """The kernels that a program's methods launch, and bytes of the inputs and outputs of each, learned on paper."""
    from edgesdk.native.cuda import CudaMachine, CudaMethod

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.native")
        path.write_bytes(content)
        machine = CudaMachine(str(path), device=Paper())
        kernels: dict[str, Kernel] = {}
        blocks: dict[str, list[int]] = {}
        for name in machine.methods:
            tape: Any = CudaMethod(machine, name).tape
            kernels |= {item.kernel.name: item.kernel for item in tape.finished()}
            blocks[name] = [tape.inputs.used, tape.outputs.used]
    return list(kernels.values()), blocks
