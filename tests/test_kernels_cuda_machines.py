"""The machines that CUDA kernels run on: faults that the emulated one finds, and a GPU's driver as a fake that runs launches on it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgesdk.errors import CheckFailed, DeviceError, InputError, MissingTool
from edgesdk.kernels.cuda import compile as compiling
from edgesdk.kernels.cuda import driver as driving
from edgesdk.kernels.cuda import launch as launching
from edgesdk.kernels.cuda.compile import Compiled, Kernel, compiled
from edgesdk.kernels.cuda.emulated import Emulated, compiler, library
from edgesdk.kernels.cuda.launch import Gpu
from edgesdk.kernels.cuda.linear import Linear, product_kernel
from edgesdk.kernels.cuda.machine import Copy, Memory, launch
from edgesdk.kernels.cuda.rows import argmax, row_kernel
from edgesdk.packed import Code, decode


@dataclass(frozen=True)
class Written(Kernel):
    """A kernel with a text of its own, called with struct Argmax."""

    text: str = ""

    @property
    def source(self) -> str:
        head = f'#include "rows.cuh"\nON_GPU void of_{self.name}(const Argmax& p) {{ const int i = threadIdx.x; {self.text} }}\n'
        return f"{head}ENTRY({self.name}, {self.threads}, Argmax, of_{self.name})\n"


def written(name: str, text: str) -> Written:
    return Written(name, "rows.cuh", "", "Argmax", 64, text)


def next_of(wait: str) -> str:
    return f"shared<int>(0)[i] = i; {wait} p.out[i] = shared<int>(0)[(i + 1) % 64];"


GOOD = written("good", next_of("sync_block();"))
NO_BARRIER = written("no_barrier", next_of(""))
BEYOND = written("beyond", "p.out[i] = p.out[p.cols + i];")
SHARED_BEYOND = written("shared_beyond", "p.out[i] = shared<int>(0)[i + 64];")
ALONE = written("alone", "if (i < 32) sync_block(); p.out[i] = 0;")
APART = written("apart", "if (i % 32 < 16) sync_warp(); else p.out[i] = from_lane_xor(i, 1);")
NO_WAIT = written("no_wait", "copy_async(shared<u8>(i * 16), p.out, 16); copies_commit(); sync_block(); p.out[i] = shared<int>(0)[i * 4];")
WAIT = written(
    "waited",
    "copy_async(shared<u8>(i * 16), p.out, 8); copies_commit(); copies_wait<0>(); sync_block(); p.out[i] = shared<int>(0)[i * 4 + 2];",
)
FAULTS = [GOOD, NO_BARRIER, BEYOND, SHARED_BEYOND, ALONE, APART, NO_WAIT, WAIT]
PRODUCT = product_kernel(4, False, 32, False, 1, 1, False)
ARGMAX = row_kernel("argmax", "Argmax", "float")


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        compiler()
    except MissingTool as error:
        pytest.skip(error.what)


def outcome(kernel: Kernel, seed: int, shared_bytes: int = 256) -> list[int]:
    machine = Emulated(FAULTS, seed)
    out = machine.put(np.full(64, 7, np.int32))
    machine.run([launch(kernel, (1,), {"out": out, "cols": 64}, shared_bytes)])
    return [int(n) for n in machine.get(out)]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_faults_of_kernels_are_found(seed: int) -> None:
    neighbours = [(i + 1) % 64 for i in range(64)]
    assert outcome(GOOD, seed) == neighbours
    assert outcome(NO_BARRIER, seed) != neighbours
    for kernel, words in ((BEYOND, "outside"), (SHARED_BEYOND, "outside"), (ALONE, "never come"), (APART, "different operations")):
        with pytest.raises(CheckFailed, match=words):
            outcome(kernel, seed)
    assert (outcome(NO_WAIT, seed, 1024) == [7] * 64) == (seed % 2 == 1)  # only where copies happen late
    assert outcome(WAIT, seed, 1024) == [0] * 64  # the bytes that were not asked for are 0


def test_a_source_that_does_not_compile_is_refused() -> None:
    with pytest.raises(CheckFailed, match="nonsense"):
        library([written("bad", "nonsense;")])


class NoMemory(int):
    """A status as the driver gives it."""

    name = "CUDA_ERROR_OUT_OF_MEMORY"

    def __new__(cls) -> NoMemory:
        return super().__new__(cls, 2)


class FakeDriver:
    """The driver's functions that `Gpu` calls, over the emulated machine. Copies and launches are counted."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=1,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=2,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=3,
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CU_MEMHOSTALLOC_DEVICEMAP = 2
    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, kernels: list[Kernel], capability: tuple[int, int] = (9, 0), status: int = 0) -> None:
        self.machine, self.capability, self.status = Emulated(kernels), capability, status
        self.kernels = {k.name: k for k in kernels}
        self.recorded: list[Any] | None = None
        self.loaded: list[bytes] = []
        self.launched = 0

    def __getattr__(self, name: str) -> Any:
        """Functions without an effect here: success, and a handle where one is asked for."""
        handles = ("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuGraphInstantiate", "cuEventCreate")

        def call(*args: Any) -> tuple[Any, ...]:
            self.check(name, args)
            return (
                (self.status, args[0])
                if name in handles and name == "cuGraphInstantiate"
                else (self.status, 5)
                if name in handles
                else (self.status,)
            )

        call.__name__ = name
        return call

    def check(self, name: str, args: tuple[Any, ...]) -> None:
        """As many arguments as the real function takes, where it is installed."""
        driver = pytest.importorskip("cuda.bindings.driver")
        text = getattr(driver, name).__doc__.split("\n")[0]
        inside = text[text.index("(") + 1 : text.rindex(")")]
        assert len(args) == (inside.count(",") + 1 if inside else 0), text

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, 1

    def cuDeviceGetName(self, length: int, device: Any) -> tuple[int, bytes]:
        return 0, b"Fake" + bytes(length - 4)

    def cuDeviceGetAttribute(self, kind: int, device: Any) -> tuple[int, int]:
        return 0, (*self.capability, 4)[kind - 1]

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        return 0, self.machine.empty((size,), np.uint8).address

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: Any) -> tuple[int]:
        ctypes.memmove(to, source, size)
        return (0,)

    cuMemcpyDtoHAsync = cuMemcpyDtoDAsync = cuMemcpyHtoDAsync

    def cuMemcpyAsync(self, to: int, source: int, size: int, stream: Any) -> tuple[int]:
        if self.recorded is None:
            return self.cuMemcpyHtoDAsync(to, source, size, stream)
        self.recorded.append(Copy(*(Memory(address, (size,), np.dtype(np.uint8)) for address in (to, source))))
        return (0,)

    def no_memory(self, size: int) -> tuple[Any]:
        return (NoMemory(),)

    def cuMemGetInfo(self) -> tuple[int, int, int]:
        return 0, 3_000_000, 9_000_000

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        assert flags == self.CU_MEMHOSTALLOC_DEVICEMAP
        return self.cuMemAlloc(size)

    def cuMemHostGetDevicePointer(self, pointer: int, flags: int) -> tuple[int, int]:
        return 0, pointer

    def cuModuleLoadData(self, image: bytes) -> tuple[int, bytes]:
        if image == b"refused":
            return 209, b""
        self.loaded.append(image)
        return 0, image

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[int, str]:
        return 0, name.decode()

    def cuLaunchKernel(self, function: str, *args: Any) -> tuple[int]:
        self.check("cuLaunchKernel", (function, *args))
        x, y, z, threads, _, _, shared_bytes, _, params, _ = args
        kernel = self.kernels[function]
        assert threads == kernel.threads
        values = {n: 0 for n, _ in compiling.fields(kernel.args)}
        size = len(compiling.packed_args(kernel.args, values))
        data = ctypes.string_at(ctypes.cast(params, ctypes.POINTER(ctypes.c_void_p))[0] or 0, size)
        item = launching.Launch(kernel, (x, y, z), shared_bytes, data)
        if self.recorded is not None:
            self.recorded.append(item)
        else:
            self.launched += 1
            self.machine.run([item])
        return (0,)

    def cuStreamBeginCapture(self, stream: Any, mode: int) -> tuple[int]:
        self.recorded = []
        return (0,)

    def cuStreamEndCapture(self, stream: Any) -> tuple[int, Any]:
        recorded, self.recorded = self.recorded, None
        return 0, recorded

    def cuGraphLaunch(self, graph: Any, stream: Any) -> tuple[int]:
        self.machine.run(graph)
        return (0,)

    def cuEventElapsedTime(self, first: Any, last: Any) -> tuple[int, float]:
        return 0, 2.0


def fake(monkeypatch: pytest.MonkeyPatch, kernels: Sequence[Kernel] = (PRODUCT, ARGMAX), **fields: Any) -> FakeDriver:
    driver = FakeDriver(list(kernels), **fields)
    monkeypatch.setattr(launching, "_driver", lambda: driver)
    monkeypatch.setattr(launching, "compiled", lambda kernel, arch: Compiled(f"{kernel.name} {arch}".encode(), None, None, None))
    monkeypatch.setattr(launching, "supported", lambda: ["sm_90"])
    return driver


def layer_of(gpu: Gpu) -> tuple[Linear, Any]:
    rng = np.random.default_rng(0)
    code = Code(
        "grid",
        (20, 64),
        (4, 32),
        (rng.integers(0, 16, (20, 64)).astype(np.uint8), rng.random((20, 2)).astype(np.float32), np.zeros(0, np.uint8)),
    )
    return Linear(gpu, code), decode(code).astype(np.float64)


def test_a_gpu_is_driven_from_weights_to_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = fake(monkeypatch)
    gpu = Gpu()
    assert (gpu.name, gpu.arch, gpu.units) == ("Fake", "sm_90", 4)
    layer, w = layer_of(gpu)
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float16)
    x_memory, y, token = gpu.put(x), gpu.empty((1, 20), np.float32), gpu.empty((1,), np.int32)
    launches = [layer.launch(x_memory, y), argmax(y, token)]
    gpu.run(launches)
    assert np.abs(gpu.get(y) - x.astype(np.float64) @ w.T).max() < 0.02
    assert driver.loaded == [f"{k.name} sm_90".encode() for k in (PRODUCT, ARGMAX)]
    step, launched = gpu.graph(launches), driver.launched
    gpu.put(-x, into=x_memory)
    step()
    assert driver.launched == launched
    assert gpu.get(token)[0] == (-x.astype(np.float64) @ w.T).argmax()
    assert gpu.seconds(step) == pytest.approx(0.002)


def test_what_was_compiled_before_is_used_and_other_gpus_get_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = fake(monkeypatch, capability=(12, 1))
    made = {PRODUCT.name: [b"refused", b"PTX"], ARGMAX.name: [b"made before"]}
    for given, loaded in (
        (None, [f"{k.name} compute_80".encode() for k in (PRODUCT, ARGMAX)]),
        (made.__getitem__, [b"PTX", b"made before"]),
    ):
        driver.loaded.clear()
        gpu = Gpu(code=given)
        layer, _ = layer_of(gpu)
        y = gpu.empty((1, 20), np.float32)
        gpu.run([layer.launch(gpu.put(np.zeros((1, 64), np.float16)), y), argmax(y, gpu.empty((1,), np.int32))])
        assert driver.loaded == loaded
        gpu.close()
    with pytest.raises(DeviceError, match="no code for Fake"):
        Gpu(code=lambda name: [b"refused"]).run([argmax(y, gpu.empty((1,), np.int32))])


def test_memory_that_is_not_free_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = fake(monkeypatch)
    gpu = Gpu()
    monkeypatch.setattr(driver, "cuMemAlloc", type(driver).no_memory.__get__(driver))
    with pytest.raises(DeviceError, match="8 MB more do not fit; 3 of 9 MB are free"):
        gpu.empty((2_000_000,), np.float32)


def test_memory_of_the_host_is_read_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    gpu = Gpu()
    shared, there = gpu.shared(64), gpu.empty((64,), np.uint8)
    shared.array[:] = np.arange(64)
    gpu.run([Copy(there, shared.memory)])
    assert np.array_equal(gpu.get(there), np.arange(64))


def test_machines_without_a_fit_gpu_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, capability=(7, 5))
    with pytest.raises(DeviceError, match="compute capability"):
        Gpu()
    with pytest.raises(DeviceError, match="no such GPU"):
        Gpu(3)
    fake(monkeypatch, status=100)
    with pytest.raises(DeviceError, match="no NVIDIA GPU"):
        Gpu()


def test_without_a_driver_two_lines_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(driving, "NAMES", ("libnothing.so.1",))
    with pytest.raises(DeviceError, match="there is no libnothing") as caught:
        Gpu()
    assert "JetPack" in caught.value.hint


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingTool, match="edgesdk\\[cuda\\]"):
        compiled(ARGMAX, "sm_90")


def test_architectures_that_the_compiler_does_not_know_are_refused() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(CheckFailed, match="sm_13"):
        compiled(ARGMAX, "sm_13")


def test_a_struct_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no struct Nothing"):
        compiling.fields("Nothing")


def test_the_benchmark_runs_and_its_table_has_a_row_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench import kernels_cuda as bench
    from tests.cuda_kernels import ALL

    fake(monkeypatch, ALL)
    gpu = Gpu()
    code = bench.weights(0, 40, 96, 4, 32)
    sizes = bench.Sizes(layers=1, dim=64, heads=2, kv_heads=1, head=64, feed=96, words=40, positions=16)
    found: dict[str, Any] = {
        "gpu": gpu.name, "nvrtc": "-", "copy": bench.copy_rate(gpu, 2, 1 << 12), "torch": {"40 x 96": {"float16": {1: [1.0]}}},
        "products": [{"shape": "40 x 96", "form": "int4 g32", "times": bench.product(gpu, code, [1], 2, 1 << 13)}],
        "decode": {"tiny": bench.decode_loop(gpu, 4, 32, 8, sizes, 3, 1)},
        "programs": {"whole": {"parameters": 331e6, "launched": 263, "graph": [0.5], "launches": [1.0]}},
    }  # fmt: skip
    text = bench.table(found)
    assert "| 40 x 96 | int4 g32 | 1 |" in text and "| tiny |" in text and "| whole | 331M | 263 | 2 | 1 |" in text
    assert found["products"][0]["times"][0]["error"] < 2e-3


def test_the_benchmark_says_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    from tests.bench import kernels_cuda as bench

    fake(monkeypatch, status=100)
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path)])
    assert bench.main() == 3
    assert "no NVIDIA GPU can be used here" in capsys.readouterr().err


SCRIPT = """
import numpy as np
from edgesdk.kernels.cuda.launch import Gpu
from edgesdk.kernels.cuda.machine import Copy
from edgesdk.kernels.cuda.rows import halve
gpu = Gpu(code=lambda name: [b"\\x7fELF"])
assert (gpu.name, gpu.arch, gpu.units) == ("No GPU", "sm_90", 132)
x = gpu.put(np.arange(21, dtype=np.float32).reshape(3, 7))
copy = gpu.empty(x.shape, x.dtype)
gpu.copy(copy, x)
assert (gpu.get(copy) == np.arange(21).reshape(3, 7)).all()
launches = [halve(x, gpu.empty((3, 8), np.float16), gpu.empty((3,), np.float32))]
gpu.run(launches)
shared = gpu.shared(16)
shared.array[:] = 5
there = gpu.empty((16,), np.uint8)
gpu.run([Copy(there, shared.memory)])
assert (gpu.get(there) == 5).all()
assert gpu.seconds(gpu.graph(launches)) == 0.003
gpu.close()
"""


@pytest.mark.parametrize("bindings", [True, False])
def test_a_driver_is_handed_what_launches_say(tmp_path: Path, bindings: bool) -> None:
    """cuda-bindings, as installed, or ctypes alone, over a libcuda.so.1 that only says what it is asked."""
    if bindings:
        pytest.importorskip("cuda.bindings.driver")
    source = Path(__file__).parent / "native" / "cuda_driver.c"
    gcc = shutil.which("gcc")
    if gcc is None or sys.platform != "linux":
        pytest.skip("no gcc to build a driver without a GPU with")
    built = [
        gcc,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        str(tmp_path / "libcuda.so.1"),
        str(source),
        "-Wl,-soname,libcuda.so.1",
        "-ldl",
    ]
    subprocess.run(built, check=True)
    script, where = SCRIPT if bindings else f"import sys; sys.modules['cuda'] = None\n{SCRIPT}", {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **where}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    launched = "driver: launch 3 1 1, 256 1 1, shared 32, numbers 7 7"
    said = [
        "driver: module ELF",
        "driver: function rows_halve",
        launched,
        "driver: capture 1",
        launched,
        "driver: graph",
        "driver: unload",
        "driver: close",
    ]
    assert done.stderr.splitlines() == said
