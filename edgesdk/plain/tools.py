"""Which of the runtimes' own tools a runner is, and the command lines for it: a flag is given only where its `--help` lists it.

executor_runner    ExecuTorch: outputs to files, since 2026 each call's time
benchmark_model    TensorFlow Lite, LiteRT (also benchmark_litert_model): a summary of times, outputs where it has --output_filepath
run_model          LiteRT: a summary of times
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgesdk.errors import DeviceError
from edgesdk.plain import output
from edgesdk.plain.output import Told

ETDUMP = "model.etdump"
"""Where a tool with an event tracer writes what it saw."""
Kind = Literal["executor_runner", "benchmark_model", "run_model"]
RUNTIMES: dict[Kind, str] = {"executor_runner": "executorch", "benchmark_model": "litert", "run_model": "litert"}
_SIGNS: tuple[tuple[Kind, frozenset[str]], ...] = (
    ("executor_runner", frozenset({"model_path"})),
    ("benchmark_model", frozenset({"graph", "num_runs"})),
    ("run_model", frozenset({"graph", "iterations"})),
)
_FLAG = re.compile(r"^\s*--?(?:\[no\])?(\w+)(?:=\S*\s| \()", re.MULTILINE)
"""gflags: `    -cpu_threads (Number of …) type: int32`; TensorFlow Lite: `\t--num_runs=50   \tint32\t…`; abseil: `    --iterations (The …)`."""


@dataclass(frozen=True)
class Feed:
    """One input of a method, as a file on the device in the folder where the tool runs."""

    file: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """What is to be run."""

    program: str  # its path on the device
    method: str  # the program's own name of it; "" where it has no names
    methods: int  # in the program
    threads: int
    feeds: tuple[Feed, ...] = ()  # none: ones or noise, as the tool likes


@dataclass(frozen=True)
class Tool:
    """A runner on the device, and the flags that it knows."""

    path: str
    kind: Kind
    flags: frozenset[str]

    @property
    def runtime(self) -> str:
        return RUNTIMES[self.kind]

    @property
    def feeds(self) -> bool:
        """Whether inputs can be given to it."""
        needed = {"executor_runner": {"inputs"}, "benchmark_model": {"input_layer", "input_layer_shape", "input_layer_value_files"}}
        return self.kind in needed and needed[self.kind] <= self.flags

    @property
    def unchecked(self) -> str:
        """Why its outputs cannot be compared, or nothing."""
        out = {"executor_runner": "output_file", "benchmark_model": "output_filepath"}.get(self.kind)
        if out is None:
            return f"{self.kind} gives no outputs"
        lacking = [f"--{out}"] if out not in self.flags else []
        lacking += [] if self.feeds else ["--inputs" if self.kind == "executor_runner" else "--input_layer_value_files"]
        return f"this {self.kind} has no {' and no '.join(lacking)}" if lacking else ""

    def refusal(self, call: Call) -> str:
        """Why it cannot run this, or nothing."""
        by = {"executor_runner": "method_name", "benchmark_model": "signature_to_run_for"}.get(self.kind)
        if call.methods > 1 and by not in self.flags:
            return f"this {self.kind} runs one method alone, the program has {call.methods}"
        return ""

    def outputs(self, call: Call) -> tuple[str, ...]:
        """The command line that runs it once and leaves its outputs in files called `out…`."""
        if self.kind == "executor_runner":
            return self._executor(call, 1, ("output_file", "out"))
        return self._benchmark(call, 1, 0, ("output_filepath", "out"))

    def times(self, call: Call, runs: int, warmup: int) -> tuple[str, ...]:
        """The command line for `runs` calls behind `warmup` others and the first."""
        if self.kind == "executor_runner":
            return self._executor(call, 1 + warmup + runs)
        if self.kind == "run_model":
            return (self.path, f"--graph={call.program}", *self._known(("iterations", runs)))
        return self._benchmark(call, runs, max(1, warmup))

    def memory(self, call: Call) -> tuple[str, ...] | None:
        """The command line of a run apart that tells its memory, or None if it has none."""
        if self.kind != "benchmark_model" or "report_peak_memory_footprint" not in self.flags:
            return None
        return self._benchmark(call, 3, 1, ("report_peak_memory_footprint", "true"))

    def operators(self, call: Call, runs: int) -> tuple[str, ...] | None:
        """The command line of a run apart that times single operators, or None if it cannot."""
        if self.kind == "executor_runner" and "etdump_path" in self.flags:
            return self._executor(call, runs, ("etdump_path", ETDUMP))
        if self.kind != "benchmark_model" or "enable_op_profiling" not in self.flags:
            return None
        return self._benchmark(call, runs, 1, ("enable_op_profiling", "true"))

    def read(self, text: str) -> Told:
        """What it printed."""
        return {"executor_runner": output.executor_runner, "benchmark_model": output.benchmark_model, "run_model": output.run_model}[
            self.kind
        ](text)

    def _known(self, *pairs: tuple[str, object]) -> tuple[str, ...]:
        return tuple(f"--{name}={value}" for name, value in pairs if name in self.flags)

    def _executor(self, call: Call, executions: int, *more: tuple[str, object]) -> tuple[str, ...]:
        feeds: list[tuple[str, object]] = [("inputs", ",".join(f.file for f in call.feeds))] if call.feeds else []
        named: list[tuple[str, object]] = [("method_name", call.method)] if call.methods > 1 else []
        counts = (("num_executions", executions), ("cpu_threads", call.threads), ("print_output", "none"))
        return (self.path, f"--model_path={call.program}", *self._known(*named, *feeds, *counts, *more))

    def _benchmark(self, call: Call, runs: int, warmup: int, *more: tuple[str, object]) -> tuple[str, ...]:
        feeds: list[tuple[str, object]] = []
        if call.feeds:  # their names are its own business: it takes the inputs in the graph's order
            names = [f"in{i}" for i in range(len(call.feeds))]
            shapes = ":".join(",".join(map(str, f.shape)) for f in call.feeds)
            files = ",".join(f"{n}:{f.file}" for n, f in zip(names, call.feeds, strict=True))
            feeds = [("input_layer", ",".join(names)), ("input_layer_shape", shapes), ("input_layer_value_files", files)]
        named: list[tuple[str, object]] = [("signature_to_run_for", call.method)] if call.method and call.methods > 1 else []
        counts = (("num_threads", call.threads), ("num_runs", runs), ("warmup_runs", warmup), ("min_secs", 0), ("warmup_min_secs", 0))
        return (self.path, f"--graph={call.program}", *self._known(*named, *feeds, *counts, *more))


def identify(path: str, said: str) -> Tool:
    """Which tool `path` is, by what its `--help` printed. Raises `DeviceError` if it is none of those known."""
    flags = frozenset(_FLAG.findall(said))
    for kind, signs in _SIGNS:
        if signs <= flags:
            return Tool(path, kind, flags)
    first = next((line.strip() for line in said.splitlines() if line.strip()), "nothing")
    raise DeviceError(
        f"{path} is no runner that edgesdk knows: its --help says {first[:80]!r}",
        "give ExecuTorch's executor_runner, LiteRT's benchmark_model or its run_model",
    )


def feeds_of(files: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> tuple[Feed, ...]:
    return tuple(Feed(f, tuple(s)) for f, s in zip(files, shapes, strict=True))
