"""What is done with the bundle in a folder: check, run, generate, health. Goes to the device as it is."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

from .look import sha256
from .signed import require_signature
from .wire import Refused


def manifest_of(folder: str) -> dict[str, Any]:
    """What a bundle says of itself, if this device runs it: see `signed`."""
    try:
        with open(os.path.join(folder, "manifest.json"), "rb") as file:
            text = file.read()
        manifest: dict[str, Any] = json.loads(text)
    except (OSError, ValueError) as error:
        raise Refused(f"no bundle in {folder} ({error})", "install one: edgesdk flash BUNDLE --on …") from None
    require_signature(folder, text)
    return manifest


def numpy_runner() -> Any:
    try:
        numpy, runner = (importlib.import_module(name) for name in ("numpy", "runner"))
    except ImportError as error:
        raise Refused(f"{sys.executable} of {platform.node()} has no numpy ({error})", "install it there, or --python PATH") from None
    return numpy, runner


MODULES = {
    "executorch": ("executorch.runtime",),
    "litert": ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"),
    "tflite-runtime": ("tflite_runtime.interpreter", "ai_edge_litert.interpreter"),
    "native": ("numba", "ctypes"),  # ctypes, where the bundle has the kernels as a library
    "native-cuda": ("cuda.bindings.driver", "ctypes"),  # ctypes, which reaches the driver as well
}
PACKAGES = {"litert": "ai-edge-litert", "native": "numba"}


def import_runtime(runtime: str) -> None:
    """Import the runtime alone, so that its time and memory are not counted as the program's."""
    for name in MODULES.get(runtime, ()):
        try:
            importlib.import_module(name)
            return
        except ImportError:
            continue
    hint = f"install it for {sys.executable} (pip install {PACKAGES.get(runtime, runtime)}), or --python PATH"
    raise Refused(f"the runtime '{runtime}' is not installed on this device", hint)


def open_runner(folder: str, manifest: dict[str, Any]) -> Any:
    _, runner = numpy_runner()
    import_runtime(manifest["runtime"])
    try:
        return runner.open_program(os.path.join(folder, manifest["program"]), manifest["runtime"], int(manifest["threads"]))
    except Exception as error:
        hint = getattr(error, "hint", "") or "the device's runtime may be older than the host's"
        raise Refused(f"the program cannot be opened here: {error}", hint) from None


def load_arrays(folder: str, names: list[str]) -> list[Any]:
    numpy = sys.modules["numpy"]
    return [numpy.load(os.path.join(folder, name), allow_pickle=False) for name in names]


def relative_error(got: list[Any], wanted: list[Any]) -> float | None:
    """The largest over the outputs of |got - wanted| / |wanted|; None if it is no number."""
    numpy = sys.modules["numpy"]
    worst = 0.0
    if len(got) != len(wanted):
        return None
    for g, w in zip(got, wanted):  # noqa: B905 (3.9 has no strict)
        g, w = numpy.asarray(g, dtype=numpy.float64).ravel(), numpy.asarray(w, dtype=numpy.float64).ravel()
        if g.size != w.size:
            return None
        norm = float(numpy.linalg.norm(w))
        error = float(numpy.linalg.norm(g - w)) / (norm if norm > 0 else 1.0)
        if not math.isfinite(error):
            return None
        worst = max(worst, error)
    return worst


def check(folder: str, repeat: int = 0) -> dict[str, Any]:
    """Each golden case's relative error; the median seconds of `repeat` more calls a method, if asked for."""
    manifest = manifest_of(folder)
    runner = open_runner(folder, manifest)
    cases: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}
    for case in manifest["golden"]:
        method = case["method"]
        inputs = load_arrays(folder, case["inputs"])
        error = relative_error(runner.run(method, inputs), load_arrays(folder, case["outputs"]))
        allowed = case["max_relative_error"]
        index = counts[method] = counts.get(method, -1) + 1
        cases.append({"method": method, "case": index, "error": error, "allowed": allowed, "ok": error is not None and error <= allowed})
        if repeat and method not in seconds:
            seconds[method] = sorted(timed(runner, method, inputs) for _ in range(repeat))[repeat // 2]
    return {"cases": cases, "seconds": seconds}


def timed(runner: Any, method: str, inputs: list[Any]) -> float:
    start = time.perf_counter_ns()
    runner.run(method, inputs)
    return (time.perf_counter_ns() - start) / 1e9


def inputs_for(folder: str, manifest: dict[str, Any], runner: Any, method: str) -> list[Any]:
    """The first golden case's inputs, else zeros."""
    for case in manifest["golden"]:
        if case["method"] == method:
            return load_arrays(folder, case["inputs"])
    numpy = sys.modules["numpy"]
    return [numpy.zeros(shape, dtype) for shape, dtype in runner.inputs(method)]


def health(folder: str) -> dict[str, Any]:
    """The digest of what is installed in `folder` and the members that are not what the manifest says."""
    try:
        with open(os.path.join(folder, "manifest.json"), "rb") as file:
            text = file.read()
    except OSError as error:
        raise Refused(f"no bundle in {folder} ({error.strerror})", "install one: edgesdk flash BUNDLE --on …") from None
    require_signature(folder, text)
    bad = []
    for member in json.loads(text)["members"]:
        if sha256(os.path.join(folder, member["name"])) != member["sha256"]:
            bad.append(member["name"])
    return {"digest": hashlib.sha256(text).hexdigest(), "bad": bad}


OPEN: dict[str, Any] = {}


def opened(folder: str) -> Any:
    """A runner of the program in `folder`, which stays open for the next call."""
    folder = os.path.realpath(folder)
    if folder not in OPEN:
        OPEN.clear()
        OPEN[folder] = open_runner(folder, manifest_of(folder))
    return OPEN[folder]


def array_of(text: str) -> Any:
    """An array from base64 of .npy."""
    return sys.modules["numpy"].load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def run(folder: str, method: str, inputs: list[str]) -> dict[str, Any]:
    """One call."""
    runner = opened(folder)
    numpy = sys.modules["numpy"]
    arrays = [array_of(text) for text in inputs]
    start = time.perf_counter_ns()
    try:
        outputs = runner.run(method, arrays)
    except Exception as error:
        bad_input = type(error).__name__ == "RunnerError"
        hint = getattr(error, "hint", "") or "give one array for each input, in order, of the shape named"
        raise Refused(str(error).splitlines()[0], hint, bad_input) from None
    seconds = (time.perf_counter_ns() - start) / 1e9
    texts = []
    for array in outputs:
        buffer = io.BytesIO()
        numpy.save(buffer, array, allow_pickle=False)
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    return {"outputs": texts, "seconds": seconds}


def generate(
    folder: str,
    prompts: list[Any],
    settings: dict[str, Any],
    tell: Callable[[dict[str, Any]], None],
    cancelled: Callable[[], bool],
    encoder: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answers to prompts (token ids; sound as base64 .npy); the whole loop runs here, the encoder perhaps on a helper."""
    runner = opened(folder)
    serve = importlib.import_module("sequence.serve")
    inputs = [array_of(p) if isinstance(p, str) else p for p in prompts]
    try:
        serve.serve(runner.run, folder, inputs, settings, tell, cancelled, encoder)
    except serve.SequenceError as error:
        raise Refused(error.what, error.hint, not isinstance(error, serve.AwayError)) from None
    except sys.modules["runner"].RunnerError as error:
        raise Refused(f"the prompt is not what the program takes: {error}", "give a text, or inputs of that shape", True) from None
    except Exception as error:
        if not getattr(error, "hint", ""):
            raise
        raise Refused(str(error).splitlines()[0], error.hint) from None  # type: ignore[attr-defined]
    return {}
