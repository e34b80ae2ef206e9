"""Bytes of a native program: its file, its weights, and what each method computes in."""

from __future__ import annotations

import tempfile
from pathlib import Path


def memory_plan(content: bytes) -> dict[str, int]:
    """`program`, `constants`, and `planned:<method>:0` where this machine has the instructions that the program is for; of a GPU's on paper."""
    from edgesdk.kernels.cpu import host_targets

    from .machine import Machine, Method
    from .program import Program

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.native")
        path.write_bytes(content)
        program = Program(str(path))
        answer = {"program": len(content), "constants": int(program.header["bytes"])}
        if program.target.startswith("cuda"):
            from edgesdk.kernels.cuda.machine import Paper

            from .cuda import CudaMachine, CudaMethod

            gpu = CudaMachine(str(path), device=Paper())
            answer |= {"constants": int(program.header["code_at"])}
            answer |= {f"planned:{name}:0": CudaMethod(gpu, name).nbytes for name in gpu.methods}
        if program.target in host_targets():
            machine = Machine(str(path))
            answer |= {f"planned:{name}:0": Method(machine, name).nbytes for name in machine.methods}
    return answer
