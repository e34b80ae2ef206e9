"""The CUDA driver by ctypes alone, where the cuda-bindings package is not installed: a device then runs programs with Python and numpy.

Functions have the names, arguments and answers (a status, then what comes out) of `cuda.bindings.driver`, those that `launch.Gpu` calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from edgesdk.errors import DeviceError

NAMES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
CUdevice_attribute = SimpleNamespace(
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
)
CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0)
CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
CU_MEMHOSTALLOC_DEVICEMAP = 2
"""Values of cuda.h, which do not change from version to version."""

_KINDS: dict[str, Any] = {
    "i": ctypes.c_int, "u": ctypes.c_uint, "z": ctypes.c_size_t, "p": ctypes.c_void_p, "a": ctypes.c_uint64, "f": ctypes.c_float, "s": ctypes.c_char_p,
}  # fmt: skip
"""Letter → int, unsigned, size, a handle or an address of the host, an address of the GPU, float, bytes."""
_CALLS = {
    "cuInit": ("cuInit", "u"),
    "cuDeviceGetCount": ("cuDeviceGetCount", ">i"),
    "cuDeviceGet": ("cuDeviceGet", ">i i"),
    "cuDeviceGetAttribute": ("cuDeviceGetAttribute", ">i i i"),
    "cuDevicePrimaryCtxRetain": ("cuDevicePrimaryCtxRetain", ">p i"),
    "cuCtxSetCurrent": ("cuCtxSetCurrent", "p"),
    "cuStreamCreate": ("cuStreamCreate", ">p u"),
    "cuStreamDestroy": ("cuStreamDestroy_v2", "p"),
    "cuStreamSynchronize": ("cuStreamSynchronize", "p"),
    "cuStreamBeginCapture": ("cuStreamBeginCapture_v2", "p i"),
    "cuStreamEndCapture": ("cuStreamEndCapture", "p >p"),
    "cuMemAlloc": ("cuMemAlloc_v2", ">a z"),
    "cuMemFree": ("cuMemFree_v2", "a"),
    "cuMemGetInfo": ("cuMemGetInfo_v2", ">z >z"),
    "cuMemHostAlloc": ("cuMemHostAlloc", ">p z u"),
    "cuMemHostGetDevicePointer": ("cuMemHostGetDevicePointer_v2", ">a p u"),
    "cuMemFreeHost": ("cuMemFreeHost", "p"),
    "cuMemcpyAsync": ("cuMemcpyAsync", "a a z p"),
    "cuMemcpyHtoDAsync": ("cuMemcpyHtoDAsync_v2", "a p z p"),
    "cuMemcpyDtoHAsync": ("cuMemcpyDtoHAsync_v2", "p a z p"),
    "cuMemcpyDtoDAsync": ("cuMemcpyDtoDAsync_v2", "a a z p"),
    "cuModuleLoadData": ("cuModuleLoadData", ">p s"),
    "cuModuleUnload": ("cuModuleUnload", "p"),
    "cuModuleGetFunction": ("cuModuleGetFunction", ">p p s"),
    "cuFuncSetAttribute": ("cuFuncSetAttribute", "p i i"),
    "cuLaunchKernel": ("cuLaunchKernel", "p u u u u u u u p p p"),
    "cuGraphInstantiate": ("cuGraphInstantiateWithFlags", ">p p a"),
    "cuGraphLaunch": ("cuGraphLaunch", "p p"),
    "cuGraphDestroy": ("cuGraphDestroy", "p"),
    "cuGraphExecDestroy": ("cuGraphExecDestroy", "p"),
    "cuEventCreate": ("cuEventCreate", ">p u"),
    "cuEventRecord": ("cuEventRecord", "p p"),
    "cuEventSynchronize": ("cuEventSynchronize", "p"),
    "cuEventElapsedTime": ("cuEventElapsedTime", ">f p p"),
    "cuEventDestroy": ("cuEventDestroy_v2", "p"),
}
"""Name → the library's symbol, and its parameters in order, with ">" those that come out."""
_ERRORS = {1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY", 100: "CUDA_ERROR_NO_DEVICE", 209: "CUDA_ERROR_NO_BINARY_FOR_GPU"}


class Status(int):
    """0, or what went wrong."""

    name: str


def _library() -> Any:
    for name in NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError(
        f"no NVIDIA GPU can be used here: there is no {NAMES[0]}",
        "install NVIDIA's driver (on a Jetson: JetPack), or run it on a machine with a GPU",
    )


class Driver:
    """Raises `DeviceError` where there is no driver."""

    def __init__(self) -> None:
        self._library = _library()
        for name in (
            "CUdevice_attribute",
            "CUstream_flags",
            "CUevent_flags",
            "CUstreamCaptureMode",
            "CUfunction_attribute",
            "CU_MEMHOSTALLOC_DEVICEMAP",
        ):
            setattr(self, name, globals()[name])

    def _status(self, value: int) -> Status:
        status, text = Status(value), ctypes.c_char_p()
        status.name = _ERRORS.get(value, f"CUDA error {value}") if value else "CUDA_SUCCESS"
        if (
            value
            and hasattr(self._library, "cuGetErrorName")
            and not self._library.cuGetErrorName(value, ctypes.byref(text))
            and text.value
        ):
            status.name = text.value.decode()
        return status

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if name not in _CALLS:
            raise AttributeError(name)
        symbol, letters = _CALLS[name]
        call, kinds = getattr(self._library, symbol), letters.split()

        def run(*given: Any) -> tuple[Any, ...]:
            left: list[Any] = list(given)
            outs: list[Any] = []
            args: list[Any] = []
            for kind in kinds:
                if kind[0] == ">":
                    outs.append(_KINDS[kind[1]]())
                    args.append(ctypes.byref(outs[-1]))
                else:
                    args.append(_KINDS[kind](left.pop(0)))
            if left:
                raise TypeError(f"{name}: {len(given)} arguments, {len(left)} too many")
            return (self._status(call(*args)), *(out.value or 0 for out in outs))

        run.__name__ = name
        setattr(self, name, run)
        return run

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Any, ...]:
        text = ctypes.create_string_buffer(length)
        return self._status(self._library.cuDeviceGetName(text, length, device)), text.raw
