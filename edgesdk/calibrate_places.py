"""Where calibration's programs run: in this process, or on the device behind a link, where the agent times them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from edgesdk.errors import EdgeError, LinkError

if TYPE_CHECKING:
    from edgesdk.agent.client import Agent
    from edgesdk.transport.base import Transport

T = TypeVar("T")
Inputs = Mapping[str, Sequence[Any]]
"""A name → arrays in the order of a method's inputs."""
Timer = Callable[[str, str, int], float]
"""(the program's method, the name of its inputs, which pass) → seconds a call."""
PROGRAM = "program.bin"
KEPT_S = 3600.0
"""Times from before a broken link are of use for so long."""


class Place(Protocol):
    here: bool  # this process

    def rates(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Bytes a second that one thread reads from arrays of these sizes, by level."""

    def open(self, files: Mapping[str, bytes], runtime: str, threads: int, inputs: Inputs) -> Timer:
        """A program (`PROGRAM`, and what must lie beside it), ready to be timed."""

    def turns(self, items: Sequence[T], passes: int) -> Iterator[tuple[int, T]]:
        """(pass, item) in the order in which they are timed."""


class Here:
    """This process. Passes are apart in time: a busy stretch spoils one of them."""

    here = True

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def rates(self, sizes: Mapping[str, int]) -> dict[str, float]:
        from edgesdk.agent.speed import read_rates

        return read_rates(sizes)

    def open(self, files: Mapping[str, bytes], runtime: str, threads: int, inputs: Inputs) -> Timer:
        from edgesdk.agent.speed import time_call
        from edgesdk.runner import open_program

        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        program = open_program(str(folder / PROGRAM), runtime, threads)
        return lambda method, name, turn: time_call(lambda: program.run(method, list(inputs[name])), threads)

    def turns(self, items: Sequence[T], passes: int) -> Iterator[tuple[int, T]]:
        for turn in range(passes):
            for item in items:
                yield turn, item


@dataclass
class There:
    """A device: programs are sent under names of their content when they are first timed, one at a time, and removed behind it.

    `kept`: a file of what was timed already; a run after a broken link goes on from it.
    """

    transport: Transport
    agent: Agent
    kept: Path
    here: bool = False

    def __post_init__(self) -> None:
        self._done = _read(self.kept)
        self._sent: str | None = None
        self.resumed = len(self._done)

    @property
    def folder(self) -> str:
        return f"{self.transport.root}/calibrate"

    def rates(self, sizes: Mapping[str, int]) -> dict[str, float]:
        return {level: float(rate) for level, rate in self.agent.ask("rates", sizes=dict(sizes)).items()}

    def open(self, files: Mapping[str, bytes], runtime: str, threads: int, inputs: Inputs) -> Timer:
        every = {**files, "inputs.npz": _npz(inputs)}
        digest = hashlib.sha256(b"".join(hashlib.sha256(c).digest() for c in every.values())).hexdigest()[:24]

        def timer(method: str, name: str, turn: int) -> float:
            key = f"{digest} {method} {name} {turn}"
            if key not in self._done:
                place = self._send(digest, every)
                arguments = {"folder": place, "runtime": runtime, "threads": threads, "method": method, "inputs": name}
                self._keep(key, float(self._asked(arguments)))
            return self._done[key]

        return timer

    def turns(self, items: Sequence[T], passes: int) -> Iterator[tuple[int, T]]:
        """One program after the other, so that the device holds one."""
        for item in items:
            for turn in range(passes):
                yield turn, item

    def clean(self) -> None:
        """Leave nothing on the device."""
        from edgesdk.transport.scripts import REMOVE, script

        with contextlib.suppress(EdgeError):
            self.transport.run(script("remove", REMOVE, self.folder))

    def _send(self, digest: str, files: Mapping[str, bytes]) -> str:
        place = f"{self.folder}/{digest}"
        if self._sent != digest:
            self.clean()
            with self._resumable():
                for name, content in files.items():
                    self.transport.put(content, f"{place}/{name}")
            self._sent = digest
        return place

    def _asked(self, arguments: Mapping[str, Any]) -> float:
        with self._resumable():
            return float(self.agent.ask("time", **arguments)["seconds"])

    @contextlib.contextmanager
    def _resumable(self) -> Iterator[None]:
        try:
            yield
        except LinkError as error:
            raise LinkError(error.what, f"run the same command again: {len(self._done)} timings are kept") from None

    def _keep(self, key: str, seconds: float) -> None:
        self._done[key] = seconds
        with contextlib.suppress(OSError), self.kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, seconds]) + "\n")


def _read(path: Path) -> dict[str, float]:
    """What was timed before a link broke; nothing of a file that is too old."""
    found: dict[str, float] = {}
    try:
        if time.time() - path.stat().st_mtime > KEPT_S:
            path.unlink()
            return found
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                key, seconds = json.loads(line)
                found[str(key)] = float(seconds)
    except OSError:
        pass
    return found


def _npz(inputs: Inputs) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    named: dict[str, Any] = {f"{name}/{i}": np.ascontiguousarray(a) for name, arrays in inputs.items() for i, a in enumerate(arrays)}
    np.savez(buffer, **named)
    return buffer.getvalue()
