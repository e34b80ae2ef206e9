"""Time single programs for calibration. Goes to the device as it is."""

from __future__ import annotations

import os
from typing import Any

from .installed import import_runtime, numpy_runner
from .speed import read_rates, time_call
from .wire import Refused

OPEN: dict[tuple[str, str, int], Any] = {}


def rates(sizes: dict[str, int]) -> dict[str, float]:
    """Bytes a second that one thread reads, by level."""
    numpy_runner()
    return read_rates(sizes)


def time_method(folder: str, runtime: str, threads: int, method: str, inputs: str) -> dict[str, float]:
    """Seconds a call of one method of the program in `folder`, with the arrays that `inputs.npz` there holds under `inputs`.

    The program stays open for the next call.
    """
    numpy, runner = numpy_runner()
    key = (folder, runtime, threads)
    if key not in OPEN:
        import_runtime(runtime)
        OPEN.clear()
        try:
            OPEN[key] = runner.open_program(os.path.join(folder, "program.bin"), runtime, threads)
        except Exception as error:
            hint = getattr(error, "hint", "") or "the device's runtime may be older than the host's"
            raise Refused(f"a calibration program cannot be opened here: {error}", hint) from None
    with numpy.load(os.path.join(folder, "inputs.npz"), allow_pickle=False) as held:
        arrays = [held[f"{inputs}/{i}"] for i in range(sum(name.startswith(inputs + "/") for name in held.files))]
    program = OPEN[key]
    return {"seconds": time_call(lambda: program.run(method, arrays), threads)}
