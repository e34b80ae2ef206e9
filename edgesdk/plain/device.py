"""What the agent does, on a device without Python: `PlainDevice.ask` has the agent's verbs `check`, `health` and `facts`."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.agent.client import agent_files
from edgesdk.bundle import Manifest
from edgesdk.errors import DeviceError, InputError
from edgesdk.plain.explain import explain, wrong_machine
from edgesdk.plain.output import Told
from edgesdk.plain.scripts import DIAGNOSE, EXECUTABLE, FACTS, RUN, WHERE
from edgesdk.plain.tools import Call, Tool, feeds_of, identify
from edgesdk.survey import Survey, hashes
from edgesdk.transport.base import Blob, Result, Transport
from edgesdk.transport.scripts import REMOVE, UNLINK, script
from edgesdk.transport.steps import Ask, Put, Run, Step

if TYPE_CHECKING:
    from edgesdk.plain.tflite import Signature

Read = Callable[[str], bytes]
"""A member's bytes."""
HELP_S = 60.0
RUN_S = 1800.0


@dataclass(frozen=True)
class Runner:
    """A native runner: where it is on the device, and what is to be sent if it is not there yet."""

    path: str
    blob: Blob | None
    digest: str
    own: bool  # it came from here

    def send(self) -> Generator[Step, Any, None]:
        """The steps that bring it there."""
        if self.blob is not None:
            yield Put(self.path, self.blob, self.blob.sha256, self.blob.size_bytes)
        if self.own:
            yield Run(script("executable", EXECUTABLE, self.path), "it is a program")


def find_runner(transport: Transport, given: str) -> Runner:
    """`given` is a file here, which goes to a folder of its content's name there, or a path on the device. Raises `InputError`, `DeviceError`."""
    if transport.link == "fake":
        raise InputError("the fake device runs no programs", "use --on local, adb: or ssh://…")
    root, machine = top(transport)
    here = Path(os.path.expanduser(given))
    if os.path.isfile(here):
        with here.open("rb") as file:
            head = file.read(20)
        if why := wrong_machine(head, machine):
            raise InputError(f"--runner {given}: it {why}", "build it for the device's CPU")
        blob = Blob.of(here)
        folder = f"{root}/runners/{blob.sha256[:16]}"
        there = hashes(transport, folder, [here.name]).get(here.name) == blob.sha256
        return Runner(f"{folder}/{here.name}", None if there else blob, blob.sha256, True)
    folder, _, name = given.rpartition("/")
    if given.startswith("/") and (digest := hashes(transport, folder or "/", [name]).get(name)):
        return Runner(given, None, digest, False)
    raise InputError(
        f"--runner {given}: no such file here, and none on {transport.link}", "give a file here, or its whole path on the device"
    )


def top(transport: Transport) -> tuple[str, str]:
    """(the root from the top, what `uname -m` says) of the device."""
    lines = transport.must(script("where", WHERE, transport.root), "looking at the device").text.splitlines()
    if len(lines) < 2:
        raise DeviceError(
            f"{transport.link}: its shell answers {lines}", "edgesdk needs sh, cat, wc, sha256sum, mkdir, mv, ln and rm there"
        )
    return lines[-2], lines[-1]


class PlainDevice:
    """Runs a runtime's own tool on the device. `read` gives members of the bundle (default: from the device itself).

    `allow_unchecked`: a tool that gives no outputs still passes `check`, whose answer then says so (`unchecked`).
    """

    def __init__(self, transport: Transport, runner: Runner | None, *, allow_unchecked: bool = False, read: Read | None = None) -> None:
        self.transport, self._runner, self.allow_unchecked, self._read = transport, runner, allow_unchecked, read
        self.root = top(transport)[0]
        self.scratch = f"{self.root}/scratch"
        self._tool: Tool | None = None
        self._signatures: dict[tuple[str, str], Signature] = {}

    @property
    def runner(self) -> Runner:
        assert self._runner is not None, "nothing is run without one"
        return self._runner

    def prepare(self, manifest: Manifest) -> Generator[Step, Any, None]:
        """The steps that bring the runner there and ask it whether it is for this program."""
        yield from self.runner.send()
        yield Ask("fits", (("runtime", manifest.runtime), ("program", manifest.program)), "the runner is for this program")

    def ready(self, state: Survey) -> Survey:
        """What was found on the device, with the agent taken for there: none is sent. Raises `DeviceError` where keys there want one."""
        if state.trusted_keys:
            what = f"{self.transport.link}: the device runs only what keys of its own signed, which its shell cannot check"
            raise DeviceError(what, "install Python there, or take the keys away: edgesdk keys")
        return replace(state, agent={name: hashlib.sha256(data).hexdigest() for name, data in agent_files().items()})

    @property
    def tool(self) -> Tool:
        """Which tool it is, asked once."""
        if self._tool is None:
            result = self._start((self.runner.path, "--help"), HELP_S)
            if result.code >= 126:
                raise self._explained(result)
            self._tool = identify(self.runner.path, (result.out + b"\n" + result.err).decode(errors="replace"))
        return self._tool

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """The agent's answer to `check` (folder, repeat), `health` (folder) or `facts`."""
        answer: dict[str, Any] = getattr(self, f"_{verb}")(**arguments)
        return answer

    def close(self) -> None:
        """Remove what the runs left there."""
        self.transport.run(script("remove", REMOVE, self.scratch))

    def run(self, argv: Sequence[str], *, poll: bool = False, timeout_s: float = RUN_S) -> tuple[str, int | None]:
        """(what it printed, the peak of its memory in bytes where it was looked at). Raises `DeviceError` that explains a failure."""
        result = self._start(tuple(argv), timeout_s, poll)
        text = (result.out + b"\n" + result.err).decode(errors="replace")
        if result.code != 0:
            raise self._explained(result)
        found = re.search(r"^edgesdk-peak (\d+)$", text, re.MULTILINE)
        return text, int(found[1]) * 1024 if found else None

    def _start(self, argv: tuple[str, ...], timeout_s: float, poll: bool = False) -> Result:
        return self.transport.run(script("run", RUN, self.scratch, "1" if poll else "0", *argv), timeout=timeout_s)

    def _explained(self, result: Result) -> DeviceError:
        told = self.transport.run(script("diagnose", DIAGNOSE, self.runner.path)).text
        facts = {name: rest for name, _, rest in (line.partition(" ") for line in told.splitlines())}
        return explain(self.transport.link, self.runner.path, result, facts)

    def manifest(self, folder: str) -> Manifest:
        return Manifest.from_json(self.transport.get(f"{folder}/manifest.json"), f"{self.transport.link}: manifest.json")

    def member(self, folder: str, name: str) -> bytes:
        return self._read(name) if self._read is not None else self.transport.get(f"{folder}/{name}")

    def call(self, folder: str, manifest: Manifest, method: str, inputs: Sequence[str] = ()) -> tuple[Call, Signature | None]:
        """How `method` is run, its inputs put into the scratch folder, and what reads its outputs (None: they are raw).

        Raises `DeviceError` where the tool cannot run it.
        """
        from edgesdk.bundles import read_array

        self.fits(manifest)
        arrays = [read_array(self.member(folder, name)) for name in inputs] if self.tool.feeds else []
        reader: Signature | None = None
        name, methods = method, len(manifest.methods)
        raw = [(a.tobytes(), tuple(a.shape)) for a in arrays]
        if self.tool.runtime == "litert" and self.tool.feeds:
            reader = self._signature(folder, manifest.program, method)
            name, methods = reader.name, reader.methods
            raw = reader.raw_inputs(arrays) if arrays else []
        files = [f"in{i}.bin" for i in range(len(raw))]
        for file, (content, _) in zip(files, raw, strict=True):
            self.transport.put(content, f"{self.scratch}/{file}")
        whole = folder if folder.startswith("/") else f"{self.root}{folder.removeprefix(self.transport.root)}"
        call = Call(f"{whole}/{manifest.program}", name, methods, manifest.threads, feeds_of(files, [s for _, s in raw]))
        if why := self.tool.refusal(call):
            raise DeviceError(f"{self.transport.link}: {why}", "take a newer runner, or a device with Python")
        return call, reader

    def _signature(self, folder: str, program: str, method: str) -> Signature:
        from edgesdk.plain.tflite import signature

        if (folder, method) not in self._signatures:
            self._signatures[folder, method] = signature(self.member(folder, program), method)
        return self._signatures[folder, method]

    def fits(self, manifest: Manifest) -> None:
        """Raises `DeviceError` if the tool is not for the bundle's program."""
        self._fits(manifest.runtime, manifest.program)
        if any(m.name.endswith("libedgeoperators.so") for m in manifest.members):
            what = f"{self.transport.link}: the program has units on edgesdk's own kernels, which {self.tool.kind} does not know"
            raise DeviceError(what, "build without them, or for a device with Python", answered=True)

    def _fits(self, runtime: str, program: str) -> dict[str, Any]:
        tool, link = self.tool, self.transport.link
        if runtime != tool.runtime:
            wanted = {"executorch": "executor_runner", "litert": "benchmark_model"}.get(runtime)
            hint = f"give a {wanted}" if wanted else f"bundles for {runtime} need Python on the device: --python PATH"
            raise DeviceError(f"{link}: the bundle is for {runtime}, {tool.path.rpartition('/')[2]} is a {tool.kind}", hint, answered=True)
        if program.endswith(".packed"):
            what = f"{link}: the program holds its weights as codes, which {tool.kind} cannot read"
            raise DeviceError(what, "build without --storage, or for a device with Python", answered=True)
        return {}

    def _check(self, folder: str, repeat: int = 0) -> dict[str, Any]:
        """Each golden case's relative error; the median (or mean) seconds of `repeat` more calls a method, if asked for."""
        manifest = self.manifest(folder)
        self.fits(manifest)
        why = self.tool.unchecked
        if why and not self.allow_unchecked:
            hint = "take a newer one, or install it unchecked: --allow-unchecked (it is then never marked as good)"
            raise DeviceError(f"{self.transport.link}: {why}: the golden outputs cannot be compared", hint, answered=True)
        cases: list[dict[str, Any]] = []
        seconds: dict[str, float] = {}
        counts: dict[str, int] = {}
        for case in manifest.golden:
            call, reader = self.call(folder, manifest, case.method, case.inputs)
            index = counts[case.method] = counts.get(case.method, -1) + 1
            if why:
                self.run(self.tool.times(call, 1, 0))  # it loads and runs, no more is known
            else:
                error = self._error(folder, call, reader, case.outputs)
                ok = error is not None and error <= case.max_relative_error
                cases.append({"method": case.method, "case": index, "error": error, "allowed": case.max_relative_error, "ok": ok})
            if repeat and case.method not in seconds:
                seconds[case.method] = typical(
                    self.tool.read(self.run(self.tool.times(call, repeat, 1))[0]), 2, self.transport.link, self.tool.kind
                )
        return {"cases": cases, "seconds": seconds, **({"unchecked": why} if why else {})}

    def _error(self, folder: str, call: Call, reader: Signature | None, names: Sequence[str]) -> float | None:
        """The relative error of one call's outputs against the members `names`; None where they are no numbers or not of that size."""
        import numpy as np

        from edgesdk.agent.installed import relative_error
        from edgesdk.bundles import read_array

        wanted = [read_array(self.member(folder, name)) for name in names]
        files = [f"{self.scratch}/out"] if reader is not None else [f"{self.scratch}/out-{i}.bin" for i in range(len(wanted))]
        self.transport.must(script("unlink", UNLINK, *files), "making way for its outputs")  # a case before may have left some
        self.run(self.tool.outputs(call))
        if reader is not None:
            return relative_error(reader.arrays(self.transport.get(files[0])), wanted)
        got = []
        for file, array in zip(files, wanted, strict=True):
            content = self.transport.get(file)
            if len(content) != array.nbytes:
                return None
            got.append(np.frombuffer(content, array.dtype))
        return relative_error(got, wanted)

    def _health(self, folder: str) -> dict[str, Any]:
        """The digest of what is installed in `folder` and the members that are not what the manifest says."""
        text = self.transport.get(f"{folder}/manifest.json")
        manifest = Manifest.from_json(text, f"{self.transport.link}: manifest.json")
        there = hashes(self.transport, folder, [m.name for m in manifest.members])
        bad = [m.name for m in manifest.members if there.get(m.name) != m.sha256]
        return {"digest": hashlib.sha256(text).hexdigest(), "bad": bad}

    def _facts(self) -> dict[str, Any]:
        from edgesdk.plain.facts import read_facts

        return read_facts(self.transport.must(script("facts", FACTS), "reading facts").text)


def typical(told: Told, skip: int, link: str, kind: str) -> float:
    """The median seconds of a call, else the mean; the first `skip` samples are no part of it. Raises `DeviceError` where no time was printed."""
    samples = sorted(told.samples_s[skip:])
    found = samples[len(samples) // 2] if samples else told.p50_s if told.p50_s is not None else told.mean_s
    if found is None:
        raise silent(link, kind)
    return found


def silent(link: str, kind: str) -> DeviceError:
    """The error for a tool that printed no times."""
    hint = "build it with logging: -DEXECUTORCH_ENABLE_LOGGING=ON" if kind == "executor_runner" else "take another build of it"
    return DeviceError(f"{link}: the {kind} printed no times", hint, answered=True)


def name_of(runner: Runner, tool: Tool) -> str:
    """The tool with what is known of its version: the digest of its file."""
    return f"{tool.kind} {runner.digest[:12]}"
