"""Tokens a second of a whole native program on a GPU: one CUDA graph a token beside one launch after the other, with everything that the host does.

A row of `kernels_cuda`, which see. The model has random weights, so only its time means something.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from edgesdk.errors import CheckFailed
from edgesdk.kernels.cuda.machine import Machine
from edgesdk.native.cuda import CudaMachine
from edgesdk.native.cuda_lower import lower_cuda
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.config import SequenceConfig
from edgesdk.sequence.generate import generate
from tests.bench.layout_programs import prompt, spec_of

FIRST = 2
"""Tokens of the short answer that is taken off the long one: reading the prompt and writing the graph count with neither."""


def program_loop(device: Machine, config: SequenceConfig, precision: str, source: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of a token behind a prompt of `source`, each repeat's own. Raises `CheckFailed` where graphs and launches answer differently."""
    spec = spec_of(config, source, FIRST + tokens + 1, 1)
    choice = {(m, path): precision for m, method in spec.methods.items() for path, _ in method.module.named_modules()}
    content = lower_cuda(spec, "cuda-sm90", choice, compiling=False)  # kernels are compiled for the GPU found
    card, given = Card.read(spec.files[NAME]), [prompt(config, source).tolist()]
    del spec
    found: dict[str, Any] = {"parameters": config.parameters, "program_bytes": len(content), "prompt": source, "tokens": tokens}
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.native")
        path.write_bytes(content)
        for name in ("graph", "launches"):
            machine = CudaMachine(str(path), device=device, graphs=name == "graph")

            def answer(count: int, machine: CudaMachine = machine) -> tuple[float, Any]:
                start = time.perf_counter()
                result = generate(machine.run, card, given, Settings(max_tokens=count))
                return time.perf_counter() - start, result[0].tokens

            answers[name] = answer(FIRST + tokens)[1]  # and everything is there
            found[name] = [(answer(FIRST + tokens)[0] - answer(FIRST)[0]) / tokens for _ in range(repeats)]
            found["launched"] = len(machine._open["decode"].tape.finished())  # type: ignore[attr-defined]
    if answers["graph"] != answers["launches"]:
        raise CheckFailed("a program's graphs and its launches write different tokens", "run  pytest -m gpu tests/test_native_cuda.py")
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| native program | parameters | launches a token | tokens/s, graph | tokens/s, launches |", "|---|---|---|---|---|"]
    for name, one in found.items():
        fast, plain = (statistics.median(one[n]) for n in ("graph", "launches"))
        lines.append(f"| {name} | {one['parameters'] / 1e6:.0f}M | {one['launched']} | {1 / fast:.0f} | {1 / plain:.0f} |")
    return "\n".join(lines)
