"""CUDA C++ → machine code for one GPU (cubin) or PTX for those to come, by NVRTC from pip. No GPU is needed; what is compiled is kept by content."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from edgesdk.cache import cache_dir
from edgesdk.errors import CheckFailed, InputError, MissingTool

ARCHITECTURES = {"sm_87": "Jetson Orin", "sm_90": "H100, H200", "sm_110": "Jetson Thor"}
PTX = "compute_80"
"""What a driver makes code of for a GPU that is not among them."""
HINT = "install the compiler with  pip install 'edgesdk[cuda]'"
FLAGS = ("--std=c++17", "--ptxas-options=-v")


@dataclass(frozen=True)
class Kernel:
    """One entry point: `body` (a template of `file` with its parameters) on blocks of `threads`, called with one value of struct `args`."""

    name: str
    file: str
    body: str
    args: str
    threads: int

    @property
    def source(self) -> str:
        return f'#include "{self.file}"\nENTRY({self.name}, {self.threads}, {self.args}, {self.body})\n'


@dataclass(frozen=True)
class Compiled:
    """`code`: a cubin, or PTX. Of a cubin (None: not said): registers a thread, and what went to memory instead, as spills and as arrays."""

    code: bytes
    registers: int | None
    spilled_bytes: int | None
    stack_bytes: int | None


@lru_cache(maxsize=1)
def headers() -> dict[str, str]:
    """Name → text of the sources."""
    folder = files("edgesdk.kernels.cuda")
    return {f.name: f.read_text() for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith((".cuh", ".h"))}


def sources_digest() -> str:
    """Of everything that kernels are compiled from."""
    text = "".join(f"// {n}\n{t}" for n, t in headers().items() if n.endswith(".cuh"))
    return hashlib.sha256("\n".join((text, *FLAGS)).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def fields(args: str) -> tuple[tuple[str, str], ...]:
    """Name and letter (`P` an address, `i` int, `f` float) of each field of a struct of the sources; of structs in it, `name.field`."""
    found = re.search(rf"struct {args} \{{\n(.*?)\n\}};", "\n".join(headers().values()), re.DOTALL)
    if found is None:
        raise InputError(f"there is no struct {args} in the kernels' sources", f"they are {', '.join(headers())}")
    out = []
    for line in found[1].splitlines():
        kind, name, count = re.match(r"\s*(.+?)\s*(\w+)(?:\[(\d+)\])?;", line).groups()  # type: ignore[union-attr]
        if count:
            out += [(f"{name}{i}.{field}", letter) for i in range(int(count)) for field, letter in fields(kind)]
        else:
            out.append((name, "P" if kind.endswith("*") else {"int": "i", "float": "f"}[kind]))
    return tuple(out)


def offset_of(args: str, name: str) -> int:
    """Bytes before a field of a struct of the sources."""
    letters = ""
    for field, letter in fields(args):
        if field == name:
            return struct.calcsize(letters + letter) - struct.calcsize(letter)
        letters += letter
    raise InputError(f"{args}: no field {name}", f"fields: {', '.join(n for n, _ in fields(args))}")


def packed_args(args: str, values: Mapping[str, Any]) -> bytes:
    """The struct `args` that a kernel is called with. Fields that are not given are 0; a name that is no field raises `InputError`."""
    names = fields(args)
    strangers = set(values) - {n for n, _ in names}
    if strangers:
        raise InputError(f"{args}: no field {', '.join(sorted(strangers))}", f"fields: {', '.join(n for n, _ in names)}")
    data = struct.pack("".join(letter for _, letter in names), *(values.get(n, 0) for n, _ in names))
    return data + bytes(-len(data) % 8)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise MissingTool(f"CUDA kernels need a compiler that is not here: {str(error).splitlines()[0]}", HINT) from None
    return nvrtc


def version() -> str:
    """NVRTC's version. Raises `MissingTool`."""
    _, major, minor = _nvrtc().nvrtcVersion()
    return f"{major}.{minor}"


def compiled(kernel: Kernel, arch: str) -> Compiled:
    """A kernel for `arch`, sm_… (a cubin) or compute_… (PTX). Raises `MissingTool`, and `CheckFailed` where it does not compile."""
    text = kernel.source + "".join(f"// {n}\n{t}" for n, t in headers().items() if n.endswith(".cuh"))
    key = hashlib.sha256("\n".join((text, arch, *FLAGS, version())).encode()).hexdigest()[:40]
    path = cache_dir("kernels") / f"{key}.{'cubin' if arch.startswith('sm_') else 'ptx'}"
    log = path.with_suffix(".log")
    if not (path.exists() and log.exists()):
        for file, content in zip((path, log), _compile(kernel, arch), strict=True):
            part = file.with_name(f"{file.name}.part")
            part.write_bytes(content)
            part.replace(file)
    said = log.read_text(errors="replace")
    facts = (re.findall(pattern, said) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill", r"(\d+) bytes stack frame"))
    return Compiled(path.read_bytes(), *(sum(map(int, found)) if found else None for found in facts))


def codes(kernels: Iterable[Kernel], arch: str) -> dict[str, tuple[bytes, bytes]]:
    """Name → machine code and PTX, to be sent to a device without a compiler (`launch.Gpu(code=…)`). Raises as `compiled` does."""
    return {k.name: (compiled(k, arch).code, compiled(k, PTX).code) for k in kernels}


def _compile(kernel: Kernel, arch: str) -> tuple[bytes, bytes]:
    nvrtc = _nvrtc()
    used = {n: t for n, t in headers().items() if n.endswith(".cuh")}
    source, name = kernel.source.encode(), f"{kernel.name}.cu".encode()
    status, program = nvrtc.nvrtcCreateProgram(source, name, len(used), [t.encode() for t in used.values()], [n.encode() for n in used])
    flags = [f.encode() for f in (f"--gpu-architecture={arch}", *FLAGS)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    said = _answer(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        first = next((line for line in said.decode(errors="replace").splitlines() if "error" in line), status.name)
        raise CheckFailed(f"{kernel.name} does not compile for {arch}: {first}", f"NVRTC {version()} knows {', '.join(supported())}")
    parts = (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if arch.startswith("sm_") else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    code = _answer(*parts, program)
    nvrtc.nvrtcDestroyProgram(program)
    return code, said


def _answer(size: Any, get: Any, program: Any) -> bytes:
    out = bytes(size(program)[1])
    get(program, out)
    return out


def supported() -> list[str]:
    """The architectures that this NVRTC compiles for. Raises `MissingTool`."""
    nvrtc = _nvrtc()
    return [f"sm_{n}" for n in nvrtc.nvrtcGetSupportedArchs()[1]]
