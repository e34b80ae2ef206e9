"""A GPU through the CUDA driver (by the cuda-bindings package, or without it): memory, kernels compiled for it, launches on one stream, graphs of launches."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgesdk.errors import DeviceError

from .compile import PTX, Kernel, compiled, supported
from .machine import Copy, Launch, Memory, Shared, Work

Code = Callable[[str], Sequence[bytes]]
PLAIN_SHARED = 48 << 10
"""Bytes of shared memory that a kernel may have without asking for more."""


def _driver() -> Any:
    """cuda-bindings where it is installed, else the driver itself. Raises `DeviceError` where there is none."""
    try:
        from cuda.bindings import driver
    except ImportError:
        from .driver import Driver

        return Driver()
    return driver


class _Owned:
    """Frees what it holds when nobody holds it, and keeps what that needs."""

    def __init__(self, free: Callable[[Any], Any], value: Any, keeps: Any = None) -> None:
        self._free, self.value, self.keeps = free, value, keeps

    def __del__(self) -> None:
        self._free(self.value)


class Gpu:
    """A `Machine`. `code`: name of a kernel → what was compiled before, machine code or PTX, the first that the driver takes; where it is None
    kernels are compiled when they are first launched. It is used by the thread that made it, or that called `use` last, until it is closed.

    Raises `DeviceError` where there is no driver or no such GPU, or where the driver reports a fault.
    """

    def __init__(self, index: int = 0, code: Code | None = None) -> None:
        self._d = d = _driver()
        try:
            self._do(d.cuInit, 0)
        except (RuntimeError, DeviceError) as error:
            said = str(error).splitlines()[0]
            raise DeviceError(
                f"no NVIDIA GPU can be used here: {said}",
                "install NVIDIA's driver (on a Jetson: JetPack), or run it on a machine with a GPU",
            ) from None
        count = self._do(d.cuDeviceGetCount)
        if index >= count:
            raise DeviceError(f"GPU {index} of {count}: there is no such GPU", "nvidia-smi lists them")
        device = self._do(d.cuDeviceGet, index)
        self.name = self._do(d.cuDeviceGetName, 256, device).split(b"\0")[0].decode()
        kinds = d.CUdevice_attribute
        major, minor, self.units = (
            int(self._do(d.cuDeviceGetAttribute, kind, device))
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        if major < 8:
            raise DeviceError(
                f"{self.name} has compute capability {major}.{minor}", "the kernels need 8.0 or later (Ampere: Jetson Orin and newer)"
            )
        self.arch = f"sm_{major}{minor}"
        self._context = self._do(d.cuDevicePrimaryCtxRetain, device)
        self.use()
        self.stream = self._do(d.cuStreamCreate, int(d.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._code = code
        self._functions: dict[Kernel, Any] = {}
        self._modules: list[Any] = []

    def _do(self, call: Callable[..., tuple[Any, ...]], *args: Any) -> Any:
        """What a function of the driver returns behind its status, if it is one thing. Raises `DeviceError`."""
        values = self._all(call, *args)
        return values[0] if values else None

    def _all(self, call: Callable[..., tuple[Any, ...]], *args: Any) -> list[Any]:
        status, *values = call(*args)
        if int(status) != 0:
            name = getattr(status, "name", str(status))
            raise DeviceError(
                f"{call.__name__}: {name}", "after a fault in a kernel the process must start again; compute-sanitizer finds it"
            )
        return values

    # ---- memory

    def empty(self, shape: Sequence[int], dtype: Any) -> Memory:
        """Raises `DeviceError` where that much is not free."""
        memory = Memory(0, tuple(int(n) for n in shape), np.dtype(dtype), None)
        try:
            held = self._do(self._d.cuMemAlloc, max(memory.nbytes, 16))
        except DeviceError as error:
            if "OUT_OF_MEMORY" not in error.what:
                raise
            free, total = self._all(self._d.cuMemGetInfo)
            raise DeviceError(
                f"{self.name}: {memory.nbytes / 1e6:.0f} MB more do not fit; {int(free) / 1e6:.0f} of {int(total) / 1e6:.0f} MB are free",
                "close other programs, or build the model with fewer bits, a shorter --input-length or int8 caches",
            ) from None
        return Memory(int(held), memory.shape, memory.dtype, _Owned(self._d.cuMemFree, held))

    def put(self, array: Any, into: Memory | None = None) -> Memory:
        array = np.ascontiguousarray(array)
        into = into or self.empty(array.shape, array.dtype)
        self._do(self._d.cuMemcpyHtoDAsync, into.address, array.ctypes.data, array.nbytes, self.stream)
        self.wait()
        return into

    def get(self, memory: Memory) -> Any:
        out = np.empty(memory.shape, memory.dtype)
        self._do(self._d.cuMemcpyDtoHAsync, out.ctypes.data, memory.address, out.nbytes, self.stream)
        self.wait()
        return out

    def copy(self, to: Memory, source: Memory) -> None:
        """Device to device, as many bytes as `source` has."""
        self._do(self._d.cuMemcpyDtoDAsync, to.address, source.address, source.nbytes, self.stream)

    def shared(self, nbytes: int) -> Shared:
        """Memory of the host that stays where it is, mapped for the GPU; on a Jetson both are the same DRAM."""
        flags = int(self._d.CU_MEMHOSTALLOC_DEVICEMAP)
        held = self._do(self._d.cuMemHostAlloc, max(nbytes, 16), flags)
        address = self._do(self._d.cuMemHostGetDevicePointer, held, 0)
        owner = _Owned(self._d.cuMemFreeHost, held)
        view: Any = (ctypes.c_uint8 * nbytes).from_address(int(held))
        view.owner = owner  # an array made of it keeps it
        return Shared(np.frombuffer(view, np.uint8), Memory(int(address), (nbytes,), np.dtype(np.uint8), owner))

    def wait(self) -> None:
        self._do(self._d.cuStreamSynchronize, self.stream)

    def use(self) -> None:
        """The thread that calls it works with this GPU from now on."""
        self._do(self._d.cuCtxSetCurrent, self._context)

    def close(self) -> None:
        """Waits for what is under way and gives kernels and stream back; memory goes with its last holder."""
        if self.stream is None:
            return
        self.wait()
        for module in self._modules:
            self._do(self._d.cuModuleUnload, module)
        self._functions.clear()
        self._modules.clear()
        self._do(self._d.cuStreamDestroy, self.stream)
        self.stream = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of a process there may be no driver left to give back to
            self.close()

    # ---- kernels

    def _function(self, kernel: Kernel, shared_bytes: int) -> Any:
        if kernel not in self._functions:
            module = self._module(kernel)
            self._modules.append(module)
            self._functions[kernel] = self._do(self._d.cuModuleGetFunction, module, kernel.name.encode())
        function = self._functions[kernel]
        if shared_bytes > PLAIN_SHARED:
            kind = self._d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._do(self._d.cuFuncSetAttribute, function, kind, shared_bytes)
        return function

    def _module(self, kernel: Kernel) -> Any:
        """The first code of a kernel that the driver takes. Raises `DeviceError` where there is none."""
        if self._code is None:
            codes: Sequence[bytes] = (compiled(kernel, self.arch if self.arch in supported() else PTX).code,)
        else:
            codes = self._code(kernel.name)
        said = "there is none"
        for code in codes:
            try:
                return self._do(self._d.cuModuleLoadData, code)
            except DeviceError as error:
                said = error.what
        raise DeviceError(
            f"{kernel.name}: no code for {self.name} ({self.arch}): {said}",
            "the driver is older than the compiler (for JetPack 6 build with cuda-bindings 12.9 and NVRTC 12.6), or the program is for another GPU",
        )

    def run(self, work: Sequence[Work]) -> None:
        for item in work:
            if isinstance(item, Copy):
                self._do(self._d.cuMemcpyAsync, item.to.address, item.source.address, item.source.nbytes, self.stream)
                continue
            function = self._function(item.kernel, item.shared_bytes)
            args = ctypes.create_string_buffer(item.args, len(item.args))
            table = (ctypes.c_void_p * 1)(ctypes.addressof(args))
            block, params = (item.kernel.threads, 1, 1), ctypes.addressof(table)
            self._do(self._d.cuLaunchKernel, function, *item.grid, *block, item.shared_bytes, self.stream, params, 0)

    def graph(self, work: Sequence[Work]) -> Callable[[], None]:
        """The work as one graph; calling it starts all of it. Its memory is kept as long as it is."""
        kept = tuple(work)
        for item in (w for w in kept if isinstance(w, Launch)):
            self._function(item.kernel, item.shared_bytes)  # nothing may be compiled or loaded while launches are recorded
        self._do(self._d.cuStreamBeginCapture, self.stream, self._d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        self.run(kept)
        recorded = _Owned(self._d.cuGraphDestroy, self._do(self._d.cuStreamEndCapture, self.stream))
        ready = _Owned(self._d.cuGraphExecDestroy, self._do(self._d.cuGraphInstantiate, recorded.value, 0), kept)
        return lambda: self._do(self._d.cuGraphLaunch, ready.value, self.stream)

    def seconds(self, work: Callable[[], None]) -> float:
        """Time of the work on the GPU, by events on its stream."""
        flags = int(self._d.CUevent_flags.CU_EVENT_DEFAULT)
        first, last = (_Owned(self._d.cuEventDestroy, self._do(self._d.cuEventCreate, flags)) for _ in range(2))
        self._do(self._d.cuEventRecord, first.value, self.stream)
        work()
        self._do(self._d.cuEventRecord, last.value, self.stream)
        self._do(self._d.cuEventSynchronize, last.value)
        return float(self._do(self._d.cuEventElapsedTime, first.value, last.value)) / 1000
