"""The peers of `kernels_x86`: each multiplies one row or many by `layers` different matrices, one call for all of them.

A matrix is the first one with its rows moved, so that no two are the same (ExecuTorch and ONNX Runtime keep equal weights once) and each must
be read from memory. Runtimes of graphs get eight layers in one program where there is one row of inputs, each taking the first columns of what
the one before gave, so that the call from Python weighs nothing; with many rows a call is one layer, and 10 to 20 µs of it are the call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesdk.cache import cache_dir

MOVE = 16
"""Rows by which each matrix is moved against the one before."""
CHAIN = 8


@dataclass(frozen=True)
class Contestant:
    """`call()` multiplies by all `layers`; `first()` gives what the last call made of the first one, float [M, rows]."""

    name: str
    weight_bytes: int  # that a layer reads
    layers: int
    call: Callable[[], Any]
    first: Callable[[], Any]
    weights: Any = None  # float32, where they are not the task's


@dataclass(frozen=True)
class Task:
    """weights float32 [rows, cols], x float32 [M, cols]; `stream`: bytes of weights that a call should go through."""

    weights: Any
    x: Any
    threads: int
    stream: int

    def layers(self, nbytes: int) -> int:
        """How many matrices of `nbytes`; more than one row of inputs are bound by arithmetic, and three do."""
        return max(3, -(-self.stream // nbytes)) if len(self.x) == 1 else 3

    def moved(self, array: Any, i: int) -> Any:
        return np.roll(array, MOVE * i, 0)

    @property
    def chain(self) -> int:
        return CHAIN if len(self.x) == 1 else 1


def folder() -> Path:
    return cache_dir("kernels") / "peers"


def install() -> None:
    """ONNX Runtime by pip beside (not in) this environment; llama.cpp, and ggml with it, compiled for this CPU from the source package of
    llama-cpp-python, which stays beside it."""
    pip = [sys.executable, "-m", "pip"]
    packages = ["onnxruntime", "onnx", "ml_dtypes"]
    subprocess.run([*pip, "install", "-q", "--upgrade", "--no-deps", "--target", str(folder() / "python"), *packages], check=True)
    if ggml_path() is not None:
        return
    source = folder() / "llama-cpp-python"
    if not source.exists():
        command = [*pip, "download", "-q", "--no-deps", "--no-binary=llama-cpp-python", "-d", str(source), "llama-cpp-python"]
        subprocess.run(command, check=True)
    unpacked = folder() / "llama-host"
    with tarfile.open(next(source.glob("*.tar.gz"))) as t:
        t.extractall(unpacked, filter="data")
    root = next(unpacked.glob("*/vendor/llama.cpp"))
    (root / "ggml" / "ggml.pc.in").touch()  # left out of the source package; only pkg-config would read it
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON"]
    options += [f"-DLLAMA_BUILD_{what}=OFF" for what in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")]
    subprocess.run([shutil.which("cmake") or "cmake", "-S", str(root), "-B", str(unpacked / "build"), *options], check=True)
    subprocess.run([shutil.which("cmake") or "cmake", "--build", str(unpacked / "build"), "-j2", "--target", "llama"], check=True)


def peers(task: Task) -> dict[str, Callable[[], Contestant]]:
    """Name → what makes it; making raises `ImportError`, `OSError` or `RuntimeError` where the peer is not there."""
    return {
        "ExecuTorch 8da4w g32": lambda: executorch(task, 4),
        "ExecuTorch 8da8w": lambda: executorch(task, 8),
        "ggml Q4_0 repacked": lambda: ggml(task, "Q4_0"),
        "ggml Q4_K repacked": lambda: ggml(task, "Q4_K"),
        "ggml Q8_0": lambda: ggml(task, "Q8_0"),
        "ONNX Runtime int4 g32, accuracy 4": lambda: onnxruntime(task),
        "torch int4pack g32 (bf16 inputs)": lambda: torch_int4(task),
        "torch int8 dynamic": lambda: torch_int8(task),
        "torch int8pack (bf16 inputs)": lambda: torch_int8pack(task),
        "torch bf16": lambda: torch_bf16(task),
    }


# ---- ExecuTorch


def executorch(task: Task, bits: int) -> Contestant:
    """Dynamic int8 inputs, lowered to XNNPACK. Programs are kept in the cache: lowering takes seconds a layer."""
    import torch

    from edgesdk.runner import open_program

    rows, cols = task.weights.shape
    nbytes = rows * (cols + 4) if bits == 8 else rows * cols // 2 + rows * (cols // 32 * 2 + 4)
    layers = task.layers(nbytes)
    sizes = [1] + [min(task.chain, layers - i) for i in range(1, layers, task.chain)]
    methods, first = [], 0
    for size in sizes:
        path = lowered(task, bits, first, size)
        methods.append(open_program(str(path), "executorch", task.threads)._method("forward")._method)
        first += size
    x, kept = torch.from_numpy(task.x), []

    def call() -> None:
        outs = [m.call([x], False) for m in methods]
        kept[:] = outs[:1]

    return Contestant(f"ExecuTorch 8da{bits}w{' g32' * (bits == 4)}", nbytes, layers, call, lambda: kept[0][0].numpy())


def lowered(task: Task, bits: int, first: int, count: int) -> Path:
    """A program of layers `first` … `first + count - 1`."""
    import executorch.version

    rows, cols = task.weights.shape
    said = f"{executorch.version.__version__} {bits} {first} {count} {task.x.shape}".encode() + task.weights[:2].tobytes()
    path = folder() / "lowered" / f"{rows}x{cols}-{hashlib.sha256(said).hexdigest()[:20]}.pte"
    if path.exists():
        return path
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(cols, rows, bias=False) for _ in range(count))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x[:, :cols] if x.shape[1] > cols else x)
            return x

    kind: dict[str, Any] = {"weight_dtype": torch.int4, "weight_granularity": PerGroup(32)}
    if bits == 8:
        kind = {"weight_dtype": torch.int8, "weight_granularity": PerAxis(0)}
    with torch.no_grad():
        chain = Chain().eval()
        for i, layer in enumerate(chain.layers):
            layer.weight.copy_(torch.from_numpy(task.moved(task.weights, first + i)))  # type: ignore[operator, union-attr]
        quantize_(chain, Int8DynamicActivationIntxWeightConfig(**kind))
        exported = torch.export.export(chain, (torch.from_numpy(task.x),))
        config = EdgeCompileConfig(_check_ir_validity=False)
        made = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], compile_config=config).to_executorch()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.buffer)
    return path


# ---- torch


def torch_bf16(task: Task) -> Contestant:
    import torch

    weights = torch.from_numpy(task.weights).bfloat16()
    nbytes = weights.numel() * 2
    all_of_them = [weights.roll(MOVE * i, 0) for i in range(task.layers(nbytes))]
    return _torch("torch bf16", nbytes, all_of_them, torch.from_numpy(task.x).bfloat16(), torch.nn.functional.linear)


def torch_int8pack(task: Task) -> Contestant:
    import torch

    weights = torch.from_numpy(task.weights)
    scale = weights.abs().amax(1) / 127
    q, scale = torch.round(weights / scale[:, None]).to(torch.int8), scale.bfloat16()
    each = [(q.roll(MOVE * i, 0).contiguous(), scale.roll(MOVE * i)) for i in range(task.layers(q.numel()))]
    x = torch.from_numpy(task.x).bfloat16()
    name = "torch int8pack (bf16 inputs)"
    return _torch(name, q.numel(), each, x, lambda x, w: torch.ops.aten._weight_int8pack_mm(x, *w))


def torch_int8(task: Task) -> Contestant:
    """Inputs rounded to int8 for each call, weights int8 a row (FBGEMM or oneDNN, whichever torch takes)."""
    import torch

    weights = torch.from_numpy(task.weights)
    scale = weights.abs().amax(1) / 127
    zero, ops = torch.zeros(len(scale), dtype=torch.int64), torch.ops.quantized
    q = torch.quantize_per_channel(weights, scale.double(), zero, 0, torch.qint8)
    each = []
    for i in range(task.layers(weights.numel())):
        moved = torch._make_per_channel_quantized_tensor(q.int_repr().roll(MOVE * i, 0), scale.roll(MOVE * i).double(), zero, 0)
        each.append(ops.linear_prepack(moved, None))
    return _torch("torch int8 dynamic", weights.numel(), each, torch.from_numpy(task.x), lambda x, w: ops.linear_dynamic(x, w, False))


def torch_int4(task: Task) -> Contestant:
    """w ≈ scale · (q - 8) + zero, a scale and a zero a group of 32; inputs in bf16."""
    import torch

    rows, cols = task.weights.shape
    groups = torch.from_numpy(task.weights).reshape(rows, -1, 32)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    q = torch.round((groups - low[..., None]) / scale[..., None]).clamp(0, 15).to(torch.int32).reshape(rows, cols)
    both = torch.stack([scale, low + 8 * scale], 2).permute(1, 0, 2).contiguous().bfloat16()
    nbytes = rows * cols // 2 + both.numel() * 2
    each = []
    for i in range(task.layers(nbytes)):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.roll(MOVE * i, 0), 1)
        each.append((packed, both.roll(MOVE * i, 1).contiguous()))
    mm, x = torch.ops.aten._weight_int4pack_mm_for_cpu, torch.from_numpy(task.x).bfloat16()
    return _torch("torch int4pack g32 (bf16 inputs)", nbytes, each, x, lambda x, w: mm(x, w[0], 32, w[1]))


def _torch(name: str, nbytes: int, weights: list[Any], x: Any, product: Callable[[Any, Any], Any]) -> Contestant:
    import torch

    kept: list[Any] = []

    def call() -> None:
        with torch.no_grad():
            kept[:] = [product(x, weights[0])]
            for w in weights[1:]:
                product(x, w)

    return Contestant(name, nbytes, len(weights), call, lambda: kept[0].float().numpy())


# ---- ONNX Runtime


def onnxruntime(task: Task) -> Contestant:
    """MatMulNBits, blocks of 32, no zeros, accuracy level 4 (inputs rounded to int8)."""
    sys.path.append(str(folder() / "python"))
    import onnxruntime as ort

    rows, cols = task.weights.shape
    groups = task.weights.reshape(rows, -1, 32)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(2)[..., None], 2)
    scale = (peak / -8).astype(np.float32)
    q = np.clip(np.rint(groups / scale) + 8, 0, 15).astype(np.uint8)
    packed, scale = q[..., ::2] | q[..., 1::2] << 4, scale[..., 0]
    nbytes = packed.nbytes + scale.nbytes
    layers = task.layers(nbytes)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = task.threads, 1, 3
    sessions, first = [], 0
    for size in [1] + [min(task.chain, layers - i) for i in range(1, layers, task.chain)]:
        content = onnx_model(rows, cols, len(task.x), [(task.moved(packed, first + i), task.moved(scale, first + i)) for i in range(size)])
        sessions.append(ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]))
        first += size
    kept: list[Any] = []

    def call() -> None:
        kept[:] = [s.run(None, {"x": task.x}) for s in sessions][:1]

    return Contestant("ONNX Runtime int4 g32, accuracy 4", nbytes, layers, call, lambda: kept[0][0])


def onnx_model(rows: int, cols: int, m: int, weights: list[tuple[Any, Any]]) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, at = [], [], "x"
    for name, value in (("from", [0]), ("to", [cols]), ("axis", [1])):
        constants.append(numpy_helper.from_array(np.array(value, np.int64), name))
    for i, (packed, scale) in enumerate(weights):
        if i and rows > cols:
            nodes.append(helper.make_node("Slice", [at, "from", "to", "axis"], [f"x{i}"]))
            at = f"x{i}"
        constants += [numpy_helper.from_array(packed, f"w{i}"), numpy_helper.from_array(scale.reshape(-1), f"s{i}")]
        kind = {"K": cols, "N": rows, "bits": 4, "block_size": 32, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", [at, f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **kind))
        at = f"y{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [m, c]) for n, c in (("x", cols), (at, rows))]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


# ---- ggml

TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12}


class _Init(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def ggml_path() -> Path | None:
    """Where ggml's libraries are: EDGESDK_GGML, or what `install` built."""
    named = os.environ.get("EDGESDK_GGML")
    found = sorted(Path(named).rglob("libggml-cpu.so")) if named else sorted((folder() / "llama-host").rglob("libggml-cpu.so"))
    return found[0].parent if found else None


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


class _Ggml:
    """ggml's C functions: what they take and give is numbers and pointers."""

    def __init__(self) -> None:
        path = ggml_path()
        if path is None:
            raise ImportError("ggml is not built")
        self.libraries = [ctypes.CDLL(str(path / f"lib{n}.so"), ctypes.RTLD_GLOBAL) for n in ("ggml-base", "ggml-cpu")]
        self("ggml_log_set", _SILENT, None)

    def __call__(self, name: str, *args: Any, gives: Any = ctypes.c_void_p) -> Any:
        function = next(getattr(lib, name) for lib in self.libraries if hasattr(lib, name))
        function.restype = gives
        return function(*args)

    def context(self, tensors: int) -> Any:
        return ctypes.c_void_p(self("ggml_init", _Init((tensors + 16) * 1024, None, True)))

    def tensor(self, context: Any, kind: int, cols: int, rows: int) -> Any:
        return ctypes.c_void_p(self("ggml_new_tensor_2d", context, kind, ctypes.c_int64(cols), ctypes.c_int64(rows)))

    def repack(self) -> Any:
        """Where weights are rearranged for the CPU's vectors as they are stored."""
        cpu = ctypes.c_void_p(self("ggml_backend_cpu_reg"))
        device = ctypes.c_void_p(self("ggml_backend_reg_dev_get", cpu, ctypes.c_size_t(0)))
        address = self("ggml_backend_reg_get_proc_address", cpu, b"ggml_backend_dev_get_extra_bufts")
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        i = 0
        while kinds[i]:
            if b"REPACK" in self("ggml_backend_buft_name", ctypes.c_void_p(kinds[i]), gives=ctypes.c_char_p):
                return ctypes.c_void_p(kinds[i])
            i += 1
        raise RuntimeError("ggml was built without repacking")


def ggml(task: Task, kind: str) -> Contestant:
    """One graph of products that all take the same inputs; ggml rounds them for each."""
    lib, (rows, cols) = _Ggml(), task.weights.shape
    row = lib("ggml_row_size", TYPES[kind], ctypes.c_int64(cols), gives=ctypes.c_size_t)
    q = np.zeros((rows, row), np.uint8)
    source = ctypes.c_void_p(task.weights.ctypes.data)
    lib(
        "ggml_quantize_chunk",
        TYPES[kind],
        source,
        ctypes.c_void_p(q.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
        None,
    )
    layers, plain = task.layers(q.nbytes), ctypes.c_void_p(lib("ggml_backend_cpu_buffer_type"))
    held, made = lib.context(layers), lib.context(2 * layers + 64)
    weights = [lib.tensor(held, TYPES[kind], cols, rows) for _ in range(layers)]
    if not lib("ggml_backend_alloc_ctx_tensors_from_buft", held, plain if kind == "Q8_0" else lib.repack()):
        raise RuntimeError(f"ggml has no room for {kind}")
    for i, w in enumerate(weights):
        moved = task.moved(q, i)
        lib("ggml_backend_tensor_set", w, ctypes.c_void_p(moved.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(moved.nbytes))
    x = lib.tensor(made, TYPES["F32"], cols, len(task.x))
    graph = ctypes.c_void_p(lib("ggml_new_graph_custom", made, ctypes.c_size_t(layers + 16), False))
    outs = [ctypes.c_void_p(lib("ggml_mul_mat", made, w, x)) for w in weights]
    for y in outs:
        lib("ggml_build_forward_expand", graph, y)
    lib("ggml_backend_alloc_ctx_tensors_from_buft", made, plain)
    values = np.ascontiguousarray(task.x)
    lib("ggml_backend_tensor_set", x, ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(values.nbytes))
    cpu = ctypes.c_void_p(lib("ggml_backend_cpu_init"))
    lib("ggml_backend_cpu_set_n_threads", cpu, task.threads)

    def first() -> Any:
        out = np.zeros((len(task.x), rows), np.float32)
        lib("ggml_backend_tensor_get", outs[0], ctypes.c_void_p(out.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes))
        return out

    name = f"ggml {kind}{' repacked' * (kind != 'Q8_0')}"
    return Contestant(name, q.nbytes, layers, lambda: lib("ggml_backend_graph_compute", cpu, graph, gives=ctypes.c_int), first)
