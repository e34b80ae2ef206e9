"""Single linear layers of an ExecuTorch program on our own kernels: put in before export, found again in the program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError
from edgesdk.native.formats import bits_and_group, is_native, name_of
from edgesdk.native.operator import OPERATOR, head_of, native_linear, packed

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


def any_native(precisions: Iterable[str]) -> bool:
    return any(is_native(p) for p in precisions)


def put_in(spec: ModelSpec, modules: dict[str, Any], choice: Mapping[tuple[str, str], str], target: str) -> None:
    """Replace linear layers whose precision is native, the same in all methods that share one. `target`: of `kernels.cpu`.

    Raises `InputError` for a target without kernels, `MissingTool` without what compiles them.
    """
    from edgesdk.lower.inject import codes_by_module

    wanted = {key: p for key, p in choice.items() if is_native(p)}
    if not wanted:
        return
    kernels, codes = _kernels(target), codes_by_module(spec)
    made: dict[int, Any] = {}
    for (method, unit), precision in wanted.items():
        path = unit.split("#")[0]
        owner, name = modules[method].get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        module = getattr(owner, name)
        if not hasattr(module, "weight"):
            continue  # done, in a method that shares the owner
        if id(module) not in made:
            bias = None if module.bias is None else module.bias.detach().float().numpy()
            code = _code(codes.get((method, path)), module.weight.detach().float().numpy(), precision, kernels)
            made[id(module)] = (module, native_linear(packed(code, kernels, bias, precision), code.shape[0]))
        setattr(owner, name, made[id(module)][1])


def _kernels(target: str) -> Any:
    from edgesdk.errors import MissingTool
    from edgesdk.kernels.cpu import TARGETS

    if target not in TARGETS:
        raise InputError(f"there are no kernels for '{target}'", f"known: {', '.join(TARGETS)}")
    try:
        from edgesdk.kernels.numba.library import Compiled
    except ImportError:
        raise MissingTool("numba is not installed", "pip install -c constraints.txt 'edgesdk[kernels]'") from None
    return Compiled(target)


def _code(stored: Any, weight: Any, precision: str, kernels: Any) -> Any:
    """A compressed weight's own codes where they are of this precision, else the weight rounded to it as native programs round theirs."""
    if stored is not None and name_of(stored) == precision:
        return stored
    if "table" in precision:
        raise InputError(f"{precision}: nothing is rounded to tables", "compress the model with a method that stores them")
    from edgesdk.native.lower import rounded_to

    return rounded_to(weight, *(bits_and_group(precision) or (8, 0)), kernels)


def calls(program: Any, plan: Any) -> list[Any]:
    """The heads of the weights that a method's calls of our operator take, in order. `program`, `plan`: as ExecuTorch's schema has them."""
    found = []
    for chain in plan.chains:
        for call in (i.instr_args for i in chain.instructions if hasattr(i.instr_args, "op_index")):
            if plan.operators[call.op_index].name == OPERATOR:
                tensor = plan.values[call.args[1]].val
                found.append(head_of(bytes(program.constant_buffer[tensor.data_buffer_idx].storage)))
    return found


def library_of(content: bytes, target: str) -> bytes:
    """The operators' library for a program. Raises `MissingTool`."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    from edgesdk.lower.quiet import quiet
    from edgesdk.native.operator_build import operator_library

    with quiet():
        parsed = deserialize_pte_binary(content)
    program = getattr(parsed, "program", parsed)
    return operator_library(target, {head["form"].decode() for plan in program.execution_plan for head in calls(program, plan)})
