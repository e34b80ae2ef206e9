"""LLVM IR → machine code: for this CPU, or as an object file for another one. What is compiled once is kept in the cache by content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import __version__ as llvmlite_version
from llvmlite import ir

from .simd import permutes

TRIPLES = {"x86": "x86_64-unknown-linux-gnu", "arm": "aarch64-unknown-linux-gnu"}
FEATURES = {
    "x86-avx512vnni": "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+f16c,+fma,+avx2,-prefer-256-bit",
    "x86-avxvnni": "+avxvnni,+avx2,+f16c,+fma",
    "x86-avx2": "+avx2,+f16c,+fma",
    "arm-i8mm": "+neon,+dotprod,+i8mm,+fullfp16",
    "arm-dotprod": "+neon,+dotprod",
    "arm-neon": "+neon",
}
"""Target → the instructions that LLVM may use, so that a kernel never traps on a CPU of that target."""

_KEPT: list[Any] = []  # engines own the code they compiled


@lru_cache(maxsize=1)
def _start() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def features_of(target: str) -> str:
    return FEATURES.get(target, "") + ",+avx512vbmi" * permutes(target)


def machine_for(target: str, cpu: str = "") -> Any:
    """LLVM's machine for a target; "plain" is this computer without any of its vector extensions."""
    _start()
    family = target.partition("-")[0]
    triple = TRIPLES.get(family, llvm.get_process_triple())
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features_of(target), opt=3, reloc="pic", codemodel="default" if family == "arm" else "jitdefault"
    )


def object_code(module: ir.Module, target: str, cpu: str = "", names: Mapping[str, str] | None = None) -> bytes:
    """The object file (ELF) of a module. `names`: the functions that are wanted, and what they are called in it; the others are left out."""
    from edgesdk.cache import cache_dir

    machine = machine_for(target, cpu)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    text = str(module)
    key = hashlib.sha256("\n".join((text, target, cpu, features_of(target), llvmlite_version, str(names))).encode()).hexdigest()[:40]
    path = cache_dir("kernels") / f"{key}.o"
    if path.exists():
        return path.read_bytes()
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    if names is not None:
        for function in parsed.functions:
            if function.name in names:
                function.name = names[function.name]
            elif not function.is_declaration:
                function.linkage = "internal"
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_unrolling = False  # loops are unrolled where they are written; more of it only spills registers
    llvm.create_pass_builder(machine, options).getModulePassManager().run(parsed, llvm.create_pass_builder(machine, options))
    content: bytes = machine.emit_object(parsed)
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)
    return content


def loaded(content: bytes, names: list[str], target: str) -> dict[str, int]:
    """Name → address of the functions of an object file, in this process, for as long as it runs."""
    empty = llvm.parse_assembly("")
    engine = llvm.create_mcjit_compiler(empty, machine_for(target))
    engine.add_object_file(llvm.ObjectFileRef.from_data(content))
    engine.finalize_object()
    _KEPT.append(engine)
    return {name: int(engine.get_function_address(name)) for name in names}
