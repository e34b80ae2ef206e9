"""Plan + model → bundle: lower, check against the reference, evaluate, pack."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.errors import CheckFailed, InputError, MissingTool

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec
    from edgesdk.plan.types import Plan

__all__ = ["build", "choice_of", "lower"]

Step = Callable[[str, float], None]
DEVICE_TOLERANCE = 0.05
"""Allowed relative error between a device's outputs and this host's for the same program: other instructions round otherwise."""


def choice_of(plan: Plan) -> dict[tuple[str, str], str]:
    """(method, unit) → precision of a plan."""
    return {(u.method, u.unit): u.precision for u in plan.units}


def lower(
    spec: ModelSpec, runtime: str, choice: dict[tuple[str, str], str], say: Callable[[str], None] = lambda text: None, target: str = ""
) -> bytes:  # fmt: skip
    """The program's bytes for a runtime, kept in the cache by content. `target`: the instructions of single units on our own kernels, "" for
    this machine's; of a whole program on them ("native") those whose weights it has, as their twin here.

    Raises `MissingTool`, `InputError`, and `CheckFailed` when the program does not hold a unit in the precision of `choice`.
    """
    from edgesdk import __version__
    from edgesdk.cache import cache_dir
    from edgesdk.lower.held import refuse_difference
    from edgesdk.lower.native_units import any_native
    from edgesdk.runner import installed

    own = runtime if runtime.startswith("native") else f"native-{target}" if target else "native" if any_native(choice.values()) else ""
    by = [installed(), __version__, *(_native_form(own) if own else []), target]
    key = json.dumps(["kept", spec.digest, runtime, sorted([*k, p] for k, p in choice.items()), *by])
    path = cache_dir("lowered") / hashlib.sha256(key.encode()).hexdigest()[:40]
    if path.exists():
        return path.read_bytes()
    content = _lower(spec, runtime, choice, say, target)
    if not runtime.startswith("native"):  # whose program is written by this package, unit by unit
        refuse_difference(spec, runtime, choice, content)
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)
    _remember(spec, runtime, choice, content)
    return content


def _native_form(runtime: str) -> list[object]:
    """What a native program's bytes depend on beside its model: instructions, and how weights are laid out."""
    from edgesdk.kernels.panels import LAYOUT
    from edgesdk.native.lower import target_of

    target = target_of(runtime)
    if not target.startswith("cuda"):
        return [target, LAYOUT]
    from edgesdk.kernels.cuda.compile import sources_digest, version

    return [target, LAYOUT, version(), sources_digest()]


def _remember(spec: ModelSpec, runtime: str, choice: dict[tuple[str, str], str], content: bytes) -> None:
    """Keep the program's own memory plan, so that planning the same model again starts from it."""
    from edgesdk.graph import trace
    from edgesdk.graph.memory import stored_weights
    from edgesdk.graph.memory_plan import RuntimePlan, per_method, remember

    if runtime == "executorch" or (runtime == "litert" and not choice):
        sizes = _memory(runtime, content)
        more = sizes["constants"] - stored_weights(trace(spec), choice, runtime) if "constants" in sizes else 0
        plan = RuntimePlan(runtime=runtime, planned=per_method(sizes), constants_bytes=more)
        remember(plan, spec.digest, choice.values())


def _refuse_caches(spec: ModelSpec, runtime: str) -> None:
    """Raises `InputError` for caches that only our own kernels read."""
    from edgesdk.sequence.card import NAME, NATIVE_BITS, Card
    from edgesdk.sequence.sizes import refuse_narrow

    if NAME in spec.files and (bits := Card.read(spec.files[NAME]).cache_bits) in NATIVE_BITS:
        refuse_narrow(bits, runtime, "", True)


def _lower(spec: ModelSpec, runtime: str, choice: dict[tuple[str, str], str], say: Callable[[str], None], target: str) -> bytes:
    _refuse_caches(spec, runtime)
    if runtime in ("litert", "tflite-runtime"):
        from edgesdk.lower.litert import lower_litert

        return lower_litert(spec, choice, say)
    if runtime == "tflite-micro":
        from edgesdk.lower.micro import lower_micro

        return lower_micro(spec, choice, say)
    if runtime.startswith("executorch"):
        from edgesdk.lower.executorch import lower_executorch

        if spec.flatbuffer is not None:
            raise InputError(f"{spec.name}: a .tflite cannot become a .pte", "plan it with --runtime litert, or give the PyTorch model")
        return lower_executorch(spec, choice, say, runtime.removeprefix("executorch").lstrip("-") or "xnnpack", target=target)
    if runtime.startswith("native"):
        from edgesdk.native.lower import lower_native

        return lower_native(spec, runtime, choice, say, target if runtime == "native" else "")
    raise MissingTool(
        f"edgesdk cannot lower for '{runtime}'",
        "its compiler comes from the vendor and runs on the device; choose --runtime executorch, litert or native",
    )


def build(plan: Plan, spec: ModelSpec, out: str | Path, *, step: Step | None = None, key: str | None = "default") -> Path:
    """Lower, check, evaluate, sign with one's own `key` (None: not at all) and write the bundle.

    Raises `CheckFailed` when the program is wrong, `UnknownName` for a key that is not there; then nothing is written.

    A program for a runtime that this host cannot run (a GPU's, an NPU's) is packed unchecked, and its manifest's `host_check` is empty. One of
    our own kernels for another CPU or a GPU is checked as its twin with the same weights for this one.
    """
    from edgesdk import __version__
    from edgesdk.bundles import write_bundle
    from edgesdk.lower.check import check_program, golden_inputs, reference
    from edgesdk.lower.quiet import silent
    from edgesdk.runner import open_program

    step = step or (lambda text, share: None)
    if plan.digests.get("model") != spec.digest:
        raise InputError(f"the plan was made for another '{plan.model}'", "plan again: the model's code or weights have changed")
    choice = choice_of(plan)
    target = _target(plan)
    runtime = f"native-{target}" if plan.runtime.startswith("native") else plan.runtime
    program = lower(spec, runtime, choice, lambda text: step(text, 0.1), target)
    name, stored, sizes = _stored(plan.runtime, program, spec)
    members: dict[str, bytes] = {
        name: stored,
        "plan.json": plan.to_json().encode(),
        **_files(plan, spec),
        **_kernels(plan, program, target),
    }
    fields: dict[str, Any] = {
        "host_check": {},
        "golden": (),
        "quality": None,
        "runtime_version": "not run on this host",
        "methods": tuple(plan.method_latency),
    }
    if plan.runtime in ("executorch", "litert", "tflite-runtime", "tflite-micro", "native", "native-cuda"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            if _runs_here(target):
                for member in (name, *(n for n in members if n.startswith("libedge"))):
                    Path(folder, member).write_bytes(members[member])
            else:
                _twin(plan, spec, path, target if plan.runtime.startswith("native") else "")
            with silent():
                runner = open_program(str(path), _on_cpu(plan.runtime), plan.threads)
                inputs = golden_inputs(spec)
            step("checking against the reference", 0.6)
            precisions = {u.precision for u in plan.units}
            fields["host_check"] = check_program(runner.run, reference(spec), inputs, set(precisions), f"{spec.name} on {plan.runtime}")
            fields["golden"] = _golden(runner, inputs, members)
            version = f"not run there; LiteRT {runner.version} here" if plan.runtime == "tflite-micro" else runner.version
            fields |= {"methods": runner.methods, "runtime_version": version}
            if spec.evaluate:
                step(f"measuring {spec.quality_name}", 0.8)
                fields["quality"] = spec.evaluate(runner.run)
                _refuse_loss(plan, fields["quality"], spec.quality_name)
    write_bundle(
        out, members, key=key, model_name=spec.name, device=plan.device, runtime=plan.runtime, program=name, threads=plan.threads, plan_digest=plan.digest(),
        memory=_memory(plan.runtime, program) | sizes, edgesdk_version=__version__, **fields,
    )  # fmt: skip
    return Path(out)


def _target(plan: Plan) -> str:
    """The instructions of the plan's device that our own kernels are made for; "" where the plan has none of them."""
    from edgesdk.lower.native_units import any_native

    if not plan.runtime.startswith("native") and not any_native(u.precision for u in plan.units):
        return ""
    from edgesdk.devices import load_device
    from edgesdk.kernels.cpu import target_of

    device = load_device(plan.device)
    isa = device.unit(next(r.unit for r in device.runtimes if r.name == plan.runtime)).isa
    if plan.runtime == "native-cuda":
        from edgesdk.native.cuda_lower import gpu_target

        return gpu_target(device.name, isa)
    return target_of(isa)


def _on_cpu(runtime: str) -> str:
    """The runtime that stands for one here: our kernels on a CPU for those on a GPU, LiteRT for its smaller sister."""
    return {"native-cuda": "native", "tflite-micro": "litert"}.get(runtime, runtime)


def _kernels(plan: Plan, program: bytes, target: str) -> dict[str, bytes]:
    """The library that the device runs our own kernels with: of a native program, where that is no machine that compiles them itself; of single
    units on ExecuTorch, their operator."""
    if target and plan.runtime == "executorch":
        from edgesdk.lower.native_units import library_of
        from edgesdk.runner import OPERATORS

        return {OPERATORS: library_of(program, target)}
    if not target.startswith("arm"):
        return {}
    from edgesdk.native.shared import LIBRARY, shared_library

    return {LIBRARY: shared_library(program)}


def _runs_here(target: str) -> bool:
    """Whether this host's CPU has the instructions that a program's kernels are for."""
    from edgesdk.kernels.cpu import host_targets

    return not target or target in host_targets()


def _twin(plan: Plan, spec: ModelSpec, path: Path, target: str) -> None:
    """The plan's program with the weights that `target` has for this machine, at `path`, with what it needs beside it."""
    from edgesdk.kernels.cpu import host_targets

    path.write_bytes(program := lower(spec, _on_cpu(plan.runtime), choice_of(plan), target=target))
    for name, content in _kernels(plan, program, host_targets()[0]).items():
        path.with_name(name).write_bytes(content)


def _files(plan: Plan, spec: ModelSpec) -> dict[str, bytes]:
    """The model's own files; a sequence model's card says what the plan decided about guessed tokens."""
    from edgesdk.sequence.card import NAME, Card

    if plan.drafting is None or not plan.drafting.pays:
        return spec.files
    card = Card.read(spec.files[NAME])
    card.draft = plan.drafting.kind
    return {**spec.files, NAME: card.to_bytes()}


def _refuse_loss(plan: Plan, quality: float, name: str) -> None:
    """Raises `CheckFailed` when the built program loses more quality than the user allows."""
    allowed = plan.budget.quality_drop
    if allowed is not None and plan.quality is not None and plan.quality - quality > allowed + 1e-9:
        raise CheckFailed(
            f"the built program has {name} {quality:.2%}: it loses {plan.quality - quality:.2%}, {allowed:.2%} are allowed",
            "plan with --verify, which builds and measures candidates, or allow a larger --quality-drop",
            quality=quality, allowed=allowed,
        )  # fmt: skip


def _stored(runtime: str, program: bytes, spec: ModelSpec) -> tuple[str, bytes, dict[str, int]]:
    """The program as the bundle holds it: member name, bytes, and their sizes where its weights are packed.

    A compressed model's program holds its codes in place of the weights they stand for, and is expanded to the very bytes of `program` on load.
    """
    name = "model.native" if runtime.startswith("native") else "model.pte" if runtime.startswith("executorch") else "model.tflite"
    if spec.codes and not runtime.startswith("native") and runtime != "tflite-micro":  # which reads it out of flash as it is
        from edgesdk.lower.pack import packed

        content, sizes = packed(program, spec)
        if len(content) < len(program):
            return f"{name}.packed", content, sizes
    return name, program, {}


def _golden(runner: Any, inputs: dict[str, list[list[Any]]], members: dict[str, bytes]) -> tuple[dict[str, Any], ...]:
    from edgesdk.bundles import array_bytes

    cases = []
    for method, lists in inputs.items():
        for i, arrays in enumerate(lists):
            names: dict[str, tuple[str, ...]] = {}
            for kind, values in (("in", arrays), ("out", runner.run(method, arrays))):
                names[kind] = tuple(f"golden/{method}/{i}/{kind}{k}.npy" for k in range(len(values)))
                members.update({n: array_bytes(v) for n, v in zip(names[kind], values, strict=True)})
            cases.append({"method": method, "inputs": names["in"], "outputs": names["out"], "max_relative_error": DEVICE_TOLERANCE})
    return tuple(cases)


def _memory(runtime: str, program: bytes) -> dict[str, int]:
    if runtime.startswith("executorch"):
        from edgesdk.lower.executorch import memory_plan

        return memory_plan(program)
    if runtime.startswith("native"):
        from edgesdk.native.memory import memory_plan as native_plan

        return native_plan(program)
    from edgesdk.graph.arena import memory_plan as arena_plan

    return arena_plan(program, delegate=runtime != "tflite-micro")
