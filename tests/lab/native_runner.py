"""A stand-in for the runtimes' native tools: it takes `executor_runner`'s or `benchmark_model`'s flags, really runs the program with the Python
runtime, prints in the tool's form and writes its outputs as the tool does. `install` makes one that is started by its name."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

FORMS = Path(__file__).parents[1] / "plain_outputs"
TREE = Path(__file__).parents[2]


def install(folder: Path, kind: str, *, lacks: tuple[str, ...] = (), scale: float = 1.0) -> Path:
    """An executable `folder`/`kind` without the flags `lacks`, whose outputs are multiplied by `scale`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / kind
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(TREE)!r})\n"
        f"from tests.lab.native_runner import main\nsys.exit(main({kind!r}, {lacks!r}, {scale!r}))\n"
    )
    path.chmod(0o755)
    return path


def main(kind: str, lacks: tuple[str, ...], scale: float) -> int:
    form = (FORMS / f"help-{kind}.txt").read_text().splitlines(keepends=True)[1:]
    shown = [line for line in form if not any(f"-{flag} (" in line or f"--{flag}=" in line for flag in lacks)]
    if "--help" in sys.argv:
        sys.stdout.write("".join(shown))
        return 1
    given = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
    for name in given:
        if not any(f"-{name} (" in line or f"--{name}=" in line for line in shown):
            sys.stderr.write(f"ERROR: unknown command line flag '{name}'\n")
            return 1
    return Executor(given, scale).run() if kind == "executor_runner" else Benchmark(given, scale).run()


class Executor:
    def __init__(self, given: dict[str, str], scale: float) -> None:
        self.given, self.scale = given, scale

    def log(self, text: str) -> None:
        sys.stderr.write(f"I 00:00:00.000001 executorch:executor_runner.cpp:1] {text}\n")

    def run(self) -> int:
        import numpy as np

        from edgesdk.runner import open_program

        start = time.perf_counter()
        path = self.given["model_path"]
        runtime = "litert" if Path(path).read_bytes()[4:8] == b"TFL3" else "executorch"  # the quick tests have no real .pte
        runner = open_program(path, runtime, max(1, int(self.given.get("cpu_threads", "1"))))
        method = self.given.get("method_name") or runner.methods[0]
        files = [f for f in self.given.get("inputs", "").split(",") if f]
        wanted = runner.inputs(method)
        arrays = [np.fromfile(f, dtype).reshape(shape) for f, (shape, dtype) in zip(files, wanted, strict=True)] if files else []
        arrays = arrays or [np.ones(shape, dtype) for shape, dtype in wanted]
        self.log(f"Model loaded in {(time.perf_counter() - start) * 1e3:f} ms.")
        outputs, total, count = self._calls(runner, method, arrays)
        self.log(f"Model executed successfully {count} time(s) in {total:f} ms.")
        if "etdump_path" in self.given:
            shutil.copy(os.environ["EDGESDK_TEST_ETDUMP"], self.given["etdump_path"])
        if base := self.given.get("output_file"):
            for i, array in enumerate(outputs):
                (array * array.dtype.type(self.scale)).tofile(f"{base}-{i}.bin")
        return 0

    def _calls(self, runner: Any, method: str, arrays: list[Any]) -> tuple[list[Any], float, int]:
        total, count, outputs = 0.0, int(self.given.get("num_executions", "1")), []
        for i in range(count):
            start = time.perf_counter()
            outputs = runner.run(method, arrays)
            took = (time.perf_counter() - start) * 1e3
            total += took
            self.log(f"Iteration {i + 1} of {count}: {took:f} ms")
        return outputs, total, count


class Benchmark:
    def __init__(self, given: dict[str, str], scale: float) -> None:
        self.given, self.scale = given, scale

    def log(self, text: str) -> None:
        sys.stderr.write(f"INFO: {text}\n")

    def run(self) -> int:
        import numpy as np
        from ai_edge_litert.interpreter import Interpreter

        start = time.perf_counter()
        interpreter = Interpreter(self.given["graph"], num_threads=max(1, int(self.given.get("num_threads", "1"))))
        interpreter.allocate_tensors()
        init = (time.perf_counter() - start) * 1e6
        files = dict(p.split(":") for p in self.given.get("input_layer_value_files", "").split(",") if p)
        for name, detail in zip(files, interpreter.get_input_details(), strict=bool(files)):
            interpreter.set_tensor(detail["index"], np.fromfile(files[name], detail["dtype"]).reshape(detail["shape"]))
        warmup = self._calls(interpreter, int(self.given.get("warmup_runs", "1")))
        timed = self._calls(interpreter, int(self.given.get("num_runs", "50")))
        first = f"{warmup[0] if warmup else timed[0]:.0f}"
        warm = f"{sum(warmup) / max(1, len(warmup)):g}"
        self.log(
            f"Inference timings in us: Init: {init:.0f}, First inference: {first}, Warmup (avg): {warm}, Inference (avg): {sum(timed) / len(timed):g}"
        )
        self.log("Memory footprint delta from the start of the tool (MB): init=1.5 overall=2.5")
        if self.given.get("report_peak_memory_footprint") == "true":
            self.log(f"Overall peak memory footprint (MB) via periodic monitoring: {_peak_kb() / 1024:g}")
        if path := self.given.get("output_filepath"):
            details = interpreter.get_output_details()
            content = [(a * a.dtype.type(self.scale)).tobytes() for a in (interpreter.get_tensor(d["index"]) for d in details)]
            Path(path).write_bytes(b"".join(content))
        return 0

    def _calls(self, interpreter: Any, count: int) -> list[float]:
        took = []
        for _ in range(count):
            start = time.perf_counter()
            interpreter.invoke()
            took.append(round((time.perf_counter() - start) * 1e6))
        if count:
            ranks = sorted(took)
            mean = sum(took) / count
            std = (sum((t - mean) ** 2 for t in took) / count) ** 0.5
            parts = f"p5={ranks[count * 5 // 100]} median={ranks[count // 2]} p95={ranks[count * 95 // 100]}"
            self.log(f"count={count} first={took[0]} curr={took[-1]} min={ranks[0]} max={ranks[-1]} avg={mean:g} std={std:.0f} {parts}\n")
        return took


def _peak_kb() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(main(os.path.basename(sys.argv[0]), (), 1.0))
