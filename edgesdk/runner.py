"""Run a built program with numpy arrays, the same on the host and on a device.

This file stands alone (standard library and numpy; Python 3.9 and later): it is sent to the device as it is.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import importlib.util
import math
import os
import weakref
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np


class RunnerError(Exception):
    """The runtime is absent, or refuses the program or the inputs. `hint`: what to do about it, where the runtime says."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


def installed() -> dict[str, str]:
    """Runtimes that are installed here, with their versions; nothing is imported."""
    found = {}
    for runtime, module, dist in (
        ("executorch", "executorch", "executorch"),
        ("litert", "ai_edge_litert", "ai-edge-litert"),
        ("tflite-runtime", "tflite_runtime", "tflite-runtime"),
        ("native", "numba", "numba"),
    ):
        if importlib.util.find_spec(module) is not None:
            try:
                found[runtime] = version(dist)
            except PackageNotFoundError:
                found[runtime] = "unknown"
    return found


def _program(path: str) -> bytes | None:
    """The program's bytes where its weights are packed or it is a difference to another one, expanded in memory; None where the file is the program."""
    with open(path, "rb") as file:
        if file.read(8) not in (b"EDGEPACK", b"EDGEDIFF"):
            return None
    packed = importlib.import_module(("edgesdk." if __name__.startswith("edgesdk.") else "") + "packed.difference")
    return bytes(packed.load_program(path))


OPERATORS = "libedgeoperators.so"
"""Beside a .pte that has units on our own kernels: the operator that runs them."""
_operators: dict[str, Any] = {}  # digest → library, in the order in which they were opened: the first one's operator has the kernels of all


def load_operators(path: str) -> None:
    """Make a library of operators known to ExecuTorch in this process, if it is not. Raises `RunnerError` where it is not made for this machine."""
    with open(path, "rb") as file:
        content = file.read()
    digest = hashlib.sha256(content).hexdigest()
    if digest in _operators:
        return
    fields = content.partition(b"EDGE-OPERATORS|")[2][:400].split(b"|")
    if len(fields) < 4:
        raise RunnerError(f"{path} holds no operators of edgesdk")
    made_for, target, needs = (f.decode("ascii", "replace") for f in fields[:3])
    here = installed().get("executorch", "none").partition("+")[0]
    if made_for != here:
        raise RunnerError(f"its operators are made for ExecuTorch {made_for}, here is {here}: install that version, or build with this one")
    lacking = sorted(set(needs.split()) - _cpu_features())
    if lacking:
        raise RunnerError(f"its operators are made for {target}: this CPU has no {', '.join(lacking)}")
    from executorch.extension.pybindings import _portable_lib

    ctypes.CDLL(_portable_lib.__file__, ctypes.RTLD_GLOBAL)  # Python opened it without, and its symbols would not be found
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise RunnerError(f"its operators cannot be loaded: {error}") from None
    if not library.edge_operators_register():
        if not _operators:
            raise RunnerError("edgesdk::linear is registered already, by another program's library")
        library.edge_operators_table.restype = ctypes.c_void_p
        next(iter(_operators.values())).edge_operators_add(ctypes.c_void_p(library.edge_operators_table()))
    _operators[digest] = library


def _cpu_features() -> set[str]:
    try:
        with open("/proc/cpuinfo", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.partition(":")[2].split()}


def open_program(path: str, runtime: str, threads: int = 1) -> Any:
    """A runner for `path`: `.methods`, `.inputs(method)`, `.run(method, arrays)`. Raises `RunnerError`."""
    try:
        if runtime == "executorch":
            return ExecuTorchRunner(path, threads)
        if runtime in ("litert", "tflite-runtime"):
            return LiteRtRunner(path, runtime, threads)
        if runtime in ("native", "native-cuda"):
            return NativeRunner(path, threads, runtime)
    except RunnerError:
        raise
    except Exception as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise RunnerError(f"{runtime} refuses {path}: {said[0]}", getattr(error, "hint", "")) from None
    raise RunnerError(f"no runner for runtime '{runtime}'")


class ExecuTorchRunner:
    """A .pte through ExecuTorch's Python runtime.

    All programs of a process share one thread pool, and a loaded program keeps a pointer to it: before the pool is made anew for another
    count, every loaded program is let go; each is loaded again when it is next run.
    """

    _alive: Any = weakref.WeakSet()
    _pool: Any = None  # threads of the pool now

    def __init__(self, path: str, threads: int = 1) -> None:
        self.threads, self.version = threads, installed().get("executorch", "unknown")
        self._source: Any = _program(path) or path
        self._operators = os.path.join(os.path.dirname(path), OPERATORS)
        self._program: Any = None
        self._loaded: dict[str, Any] = {}
        self._inputs: dict[str, list[tuple[tuple[int, ...], str]]] = {}
        self.methods: tuple[str, ...] = ()
        ExecuTorchRunner._alive.add(self)
        self.methods = tuple(sorted(self._open().method_names))

    def _open(self) -> Any:
        """The program, loaded under a pool of this runner's thread count."""
        import torch
        from executorch.runtime import Runtime, Verification

        self.torch = torch
        if ExecuTorchRunner._pool != self.threads:
            for other in list(ExecuTorchRunner._alive):
                other._loaded.clear()
                other._program = None
            gc.collect()
            torch.set_num_threads(self.threads)
            _executorch_pool(self.threads)
            ExecuTorchRunner._pool = self.threads
        if self._program is None:
            if os.path.exists(self._operators):
                load_operators(self._operators)
            self._program = Runtime.get().load_program(self._source, verification=Verification.Minimal)
        return self._program

    def _method(self, name: str) -> Any:
        if name not in self.methods:
            raise RunnerError(f"no method '{name}'; known: {', '.join(self.methods)}")
        program = self._open()
        if name not in self._loaded:
            self._loaded[name] = program.load_method(name)
        return self._loaded[name]

    def inputs(self, method: str) -> list[tuple[tuple[int, ...], str]]:
        if method not in self._inputs:
            meta = self._method(method).metadata
            infos = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
            names = {3: "int32", 4: "int64", 6: "float32", 11: "bool", 1: "int8", 0: "uint8", 5: "float16"}
            self._inputs[method] = [(tuple(i.sizes()), names.get(i.dtype(), str(i.dtype()))) for i in infos]
        return self._inputs[method]

    def run(self, method: str, arrays: list[Any]) -> list[Any]:
        loaded = self._method(method)
        _check_shapes(method, self.inputs(method), arrays)
        tensors = [self.torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
        return [np.array(o.numpy()) for o in loaded.execute(tensors)]


def trace(path: str, calls: dict[str, list[Any]], out: str, runs: int = 10) -> str:
    """Let ExecuTorch's event tracer write what it saw of `runs` calls of each method to `out`; in words, why it wrote nothing."""
    import torch
    from executorch.runtime import Runtime, Verification

    operators = os.path.join(os.path.dirname(path), OPERATORS)
    if os.path.exists(operators):
        load_operators(operators)
    program = Runtime.get().load_program(_program(path) or path, verification=Verification.Minimal, enable_etdump=True)
    if not hasattr(program, "write_etdump_result_to_file"):
        return "this version of ExecuTorch's Python package writes no ETDump"
    for name, arrays in calls.items():
        method = program.load_method(name)
        for _ in range(runs):
            method.execute([torch.from_numpy(np.ascontiguousarray(a)) for a in arrays])
    try:
        program.write_etdump_result_to_file(out, out + ".buffer")
    except (OSError, RuntimeError) as error:
        if os.path.exists(out):
            return f"ExecuTorch's event tracer: {error}"
    return "" if os.path.exists(out) else "this build of ExecuTorch has no event tracer (EXECUTORCH_ENABLE_EVENT_TRACER)"


def _executorch_pool(threads: int) -> None:
    """Make ExecuTorch's thread pool anew (it starts with a thread for every core, whatever torch is told). It says so on stderr: hidden."""
    try:
        from executorch.extension.pybindings import portable_lib
    except ImportError:
        return
    reset = getattr(portable_lib, "_unsafe_reset_threadpool", None)
    if reset is None:
        return
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        reset(threads)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def method_of(signature: str, signatures: int) -> str:
    """The method that a `.tflite`'s signature is, one of so many: `forward` where it is the only one, but for a sequence model's."""
    return "forward" if signatures == 1 and signature.split("_")[0] not in ("encode", "prefill", "decode") else signature


class LiteRtRunner:
    """A .tflite through LiteRT, or tflite-runtime where that is what the device has. Callers see float in and out of int8 models."""

    def __init__(self, path: str, runtime: str, threads: int = 1) -> None:
        here = installed()
        if "litert" in here and (runtime == "litert" or "tflite-runtime" not in here):  # LiteRT is tflite-runtime's successor
            from ai_edge_litert.interpreter import Interpreter

            self.version = here["litert"]
        elif "tflite-runtime" in here:
            from tflite_runtime.interpreter import Interpreter

            self.version = here["tflite-runtime"]
        else:
            raise RunnerError("neither ai-edge-litert nor tflite-runtime is installed")
        content = _program(path)
        where = {"model_path": path} if content is None else {"model_content": content}
        self._interpreter = Interpreter(num_threads=threads, **where)
        signatures = self._interpreter.get_signature_list()
        self._keys = {method_of(k, len(signatures)): k for k in signatures} or {"forward": ""}
        self.methods = tuple(sorted(self._keys))
        self._ready: dict[str, Any] = {}

    def _method(self, name: str) -> Any:
        """(call, input details in order, output names or indices in order)"""
        if name not in self._keys:
            raise RunnerError(f"no method '{name}'; known: {', '.join(self.methods)}")
        if name not in self._ready:
            if self._keys[name]:
                runner = self._interpreter.get_signature_runner(self._keys[name])
                details = sorted(runner.get_input_details().items(), key=lambda kv: name_order(kv[0]))
                outputs = sorted(runner.get_output_details().items(), key=lambda kv: name_order(kv[0]))
            else:
                self._interpreter.allocate_tensors()
                runner = None
                details = [(str(i), d) for i, d in enumerate(self._interpreter.get_input_details())]
                outputs = [(str(i), d) for i, d in enumerate(self._interpreter.get_output_details())]
            self._ready[name] = runner, details, outputs
        return self._ready[name]

    def inputs(self, method: str) -> list[tuple[tuple[int, ...], str]]:
        return [(tuple(int(s) for s in d["shape"]), np.dtype(d["dtype"]).name) for _, d in self._method(method)[1]]

    def run(self, method: str, arrays: list[Any]) -> list[Any]:
        runner, details, outputs = self._method(method)
        _check_shapes(method, self.inputs(method), arrays)
        fed = [quantize(np.asarray(a), d) for a, (_, d) in zip(arrays, details)]
        if runner is not None:
            answer = runner(**{name: a for a, (name, _) in zip(fed, details)})
            return [dequantize(answer[name], d) for name, d in outputs]
        for a, (_, d) in zip(fed, details):
            self._interpreter.set_tensor(d["index"], a)
        self._interpreter.invoke()
        return [dequantize(self._interpreter.get_tensor(d["index"]), d) for _, d in outputs]


class NativeRunner:
    """A program of our own kernels, on a CPU or ("native-cuda") on a GPU."""

    def __init__(self, path: str, threads: int = 1, runtime: str = "native") -> None:
        self._on_gpu = runtime == "native-cuda"
        module = importlib.import_module("edgesdk.native." + ("cuda" if self._on_gpu else "machine"))
        self._machine = (module.CudaMachine if self._on_gpu else module.Machine)(path, threads)
        self.methods: tuple[str, ...] = self._machine.methods
        self.version = str(self._machine.program.header.get("version", "unknown"))

    def inputs(self, method: str) -> list[tuple[tuple[int, ...], str]]:
        if method not in self.methods:
            raise RunnerError(f"no method '{method}'; known: {', '.join(self.methods)}")
        return list(self._machine.inputs(method))

    def run(self, method: str, arrays: list[Any]) -> list[Any]:
        _check_shapes(method, self.inputs(method), arrays)
        return list(self._machine.run(method, arrays))

    def steps(self, method: str, arrays: list[Any], runs: int) -> list[Any]:
        """(part of the model, kernel, seconds in each of `runs` runs) of every step on a CPU; on a GPU none: there a program is one graph."""
        _check_shapes(method, self.inputs(method), arrays)
        return [] if self._on_gpu else list(self._machine.steps(method, arrays, runs))

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """An array for caches, in memory that the program reads where it is."""
        return getattr(self._machine, "zeros", np.zeros)(shape, dtype)

    def close(self) -> None:
        """Gives back what the program holds of a GPU; nothing can be run after it."""
        getattr(self._machine, "close", lambda: None)()


def name_order(name: str) -> tuple[int, str]:
    tail = name.rsplit("_", 1)[-1]
    return (int(tail), "") if tail.isdigit() else (0, name)


def _check_shapes(method: str, wanted: list[tuple[tuple[int, ...], str]], arrays: list[Any]) -> None:
    if len(arrays) != len(wanted):
        raise RunnerError(f"'{method}' takes {len(wanted)} inputs, {len(arrays)} given")
    for i, (array, (shape, _)) in enumerate(zip(arrays, wanted)):
        if math.prod(np.shape(array)) != math.prod(shape) or (
            len(np.shape(array)) == len(shape) and tuple(np.shape(array)) != tuple(shape)
        ):
            raise RunnerError(f"input {i} of '{method}' has shape {list(np.shape(array))}, wanted {list(shape)}")


def _scale(detail: Any) -> tuple[float, int]:
    scale, zero = detail.get("quantization", (0.0, 0))
    return float(scale), int(zero)


def quantize(array: Any, detail: Any) -> Any:
    dtype, (scale, zero) = np.dtype(detail["dtype"]), _scale(detail)
    if dtype.kind in "iu" and dtype.itemsize <= 2 and scale and array.dtype.kind == "f":
        info = np.iinfo(dtype)
        array = np.clip(np.round(array / scale) + zero, info.min, info.max)
    return np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(detail["shape"])


def dequantize(array: Any, detail: Any) -> Any:
    scale, zero = _scale(detail)
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 2 and scale:
        return (array.astype(np.float32) - zero) * np.float32(scale)
    return np.array(array)
