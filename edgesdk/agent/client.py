"""The host's side of the agent: send it, start it, ask it."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from edgesdk.agent.frames import decode, encode, is_frame
from edgesdk.agent.wire import VERSION
from edgesdk.errors import DeviceError, InputError, LinkError
from edgesdk.transport.base import NO_PYTHON, Stream, Transport

Tell = Callable[[str, float], None]
START_S = 60.0
POLL_S = 0.05
ARCHIVE = "agent.zip"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_HOST_ONLY = (
    "kernels/linear.py", "kernels/nearest.py", "kernels/pack.py", "kernels/reference.py", "kernels/registry.py", "kernels/sparse.py",
    "kernels/superblocks.py", "kernels/floats.py",
    "kernels/neon/build.py", "kernels/cuda/weights.py", "kernels/cuda/emulated.py", "kernels/cuda/registry.py",
)  # fmt: skip
"""Of the kernels, what packs weights and checks."""
_MAIN = b"""import sys

if sys.argv[1:2] == ["fleet"]:
    from edgesdk.fleet.agent import main
else:
    from agent.agent import main

main()
"""


@functools.cache
def agent_files() -> dict[str, bytes]:
    """What is sent, by name: one archive that the device's Python runs as it is, so that it takes one command to send."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, source in agent_sources().items():
            file.writestr(zipfile.ZipInfo(name, _EPOCH), source, zipfile.ZIP_DEFLATED)
    return {ARCHIVE: archive.getvalue()}


def agent_sources() -> dict[str, bytes]:
    """The files the device needs, by name."""
    top = files("edgesdk")
    places = {"runner.py": top / "runner.py"}
    places |= {
        f"packed/{file.name}": file for file in sorted((top / "packed").iterdir(), key=lambda f: f.name) if file.name.endswith(".py")
    }
    plain = {name: place.read_bytes() for name, place in places.items()}
    return {"__main__.py": _MAIN, **plain, **_part("agent", "agent"), **_part("sequence", "measure", "serve"), **_kernels(), **_fleet()}


def _fleet() -> dict[str, bytes]:
    """What takes part in rollouts over a broker (`edgesdk.fleet.agent`), under the names it has here."""
    return {f"edgesdk/{name}": content for name, content in (_part("fleet", "agent") | _part("agent", "fresh", "look", "signed")).items()}


def _kernels() -> dict[str, bytes]:
    """What runs native programs, under the names it has here."""
    top = files("edgesdk")
    found = {"edgesdk/__init__.py": b"", **{f"edgesdk/{name}": (top / name).read_bytes() for name in ("cache.py", "errors.py")}}
    parts = _part("native", "machine", "cuda") | _part("sequence", "card")
    found |= {f"edgesdk/{name}": content for name, content in parts.items()}
    for folder in ("kernels", "kernels/numba", "kernels/neon", "kernels/cuda"):
        place = files("edgesdk.kernels")
        for part in folder.split("/")[1:]:
            place = place / part
        names = {f"{folder}/{f.name}": f for f in place.iterdir() if f.name.endswith((".py", ".cuh"))}
        found |= {f"edgesdk/{name}": file.read_bytes() for name, file in names.items() if name not in _HOST_ONLY}
    return dict(sorted(found.items()))


def _part(package: str, *modules: str) -> dict[str, bytes]:
    """Modules of a package of edgesdk, and what they import from beside them."""
    found: dict[str, bytes] = {}
    wanted = ["__init__", *modules]
    while wanted:
        name = wanted.pop()
        source = (files("edgesdk") / package / f"{name}.py").read_bytes()
        found[f"{package}/{name}.py"] = source
        beside = {m.decode() for m in re.findall(rb"^ *from \.(\w+) import", source, re.MULTILINE)}
        wanted += [b for b in sorted(beside) if f"{package}/{b}.py" not in found]
    return dict(sorted(found.items()))


def agent_folder(root: str) -> str:
    """Where they go: a folder named by their content, so that two versions of edgesdk never mix."""
    return f"{root}/agent/{hashlib.sha256(agent_files()[ARCHIVE]).hexdigest()[:16]}"


def send_agent(transport: Transport) -> str:
    """Send what the device lacks; returns the agent's folder there."""
    from edgesdk.transport.scripts import HASHES, script

    folder, wanted = agent_folder(transport.root), agent_files()
    there = transport.must(script("hashes", HASHES, folder, *wanted), "looking for the agent").text
    for name, data in wanted.items():
        if f"{hashlib.sha256(data).hexdigest()}  {name}" not in there:
            transport.put(data, f"{folder}/{name}")
    return folder


def require_python(transport: Transport, python: str) -> None:
    """Raises `DeviceError` where the interpreter does not run on the device or is too old."""
    probe = transport.run((python, "-c", "import sys; sys.exit(3 * (sys.version_info < (3, 9)))"), timeout=START_S)
    if probe.code != 0:
        what = "is older than 3.9" if probe.code == 3 else f"does not run there: {probe.complaint}"
        raise DeviceError(f"{transport.link}: the interpreter '{python}' {what}", NO_PYTHON)


def _same_version(link: str, hello: Mapping[str, Any]) -> None:
    """Raises `DeviceError` where what answers is no agent, or one of another edgesdk."""
    if hello.get("hello") != "edgesdk-agent" or hello.get("version") != VERSION:
        what = (
            f"speaks version {hello['version']}, this edgesdk {VERSION}"
            if "version" in hello
            else f"answers {hello}: it is none of edgesdk's"
        )
        raise DeviceError(
            f"{link}: the agent there {what}", "remove the folder `agent` under the device's root; the right one is sent again"
        )


class Agent:
    """A running agent (`folder`: where it is, if it was sent already).

    `ask` raises what the device answers as `DeviceError` (`InputError` where the request was wrong) with the field `answered`, a broken link as
    `LinkError`.
    """

    def __init__(self, transport: Transport, python: str | None = None, folder: str | None = None) -> None:
        self.link = transport.link
        self.python = python or transport.python
        folder = folder or send_agent(transport)
        self._stream: Stream = transport.open((self.python, "-u", "-B", f"{folder}/{ARCHIVE}"))
        self._number = 0
        try:
            while not is_frame(line := self._stream.readline(START_S)):
                pass  # a login banner
            _same_version(self.link, decode(line))
        except LinkError:
            self._stream.close()
            raise
        except DeviceError:
            self._stream.close()
            require_python(transport, self.python)
            raise

    def ask(self, verb: str, timeout_s: float = 600.0, tell: Tell | None = None, **arguments: Any) -> dict[str, Any]:
        """The answer to one request; `tell(text, share)` hears of its progress. `timeout_s` is between two lines."""
        self._request(verb, arguments)
        while True:
            answer = self._answer(timeout_s)
            if "progress" not in answer:
                ok = answer["ok"]
                assert isinstance(ok, dict)
                return ok
            if tell:
                tell(*answer["progress"])

    def _request(self, verb: str, arguments: Mapping[str, Any]) -> None:
        self._number += 1
        self._stream.send(encode({"verb": verb, "id": self._number, **arguments}))

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """The next message about the last request; an error is raised."""
        while True:
            answer = decode(self._stream.readline(timeout_s))
            if answer.get("id") != self._number:
                continue
            if "error" in answer:
                kind = InputError if answer.get("bad_input") else DeviceError
                raise kind(f"{self.link}: {answer['error']}", str(answer.get("hint", "")), answered=True)
            return answer

    def run(self, folder: str, method: str, arrays: list[Any]) -> list[Any]:
        """One call of an installed program: numpy arrays in, numpy arrays out."""
        import base64

        from edgesdk.bundles import array_bytes, read_array

        texts = [base64.b64encode(array_bytes(a)).decode() for a in arrays]
        answer = self.ask("run", folder=folder, method=method, inputs=texts)
        return [read_array(base64.b64decode(t)) for t in answer["outputs"]]

    def generate(
        self,
        folder: str,
        prompts: Sequence[Any],
        settings: Mapping[str, Any],
        cancelled: Callable[[], bool] = lambda: False,
        encoder: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
    ) -> Iterator[dict[str, Any]]:
        """The events (see `edgesdk.sequence.generate`) of answers to `prompts`, token ids or arrays, by an installed sequence bundle.

        `encoder`: {"host", "port", "bits"} of a helper as the device reaches it. Once `cancelled()` is true the device is told to end
        with what there is; its last events still come.
        """
        import base64

        from edgesdk.bundles import array_bytes

        sent = [base64.b64encode(array_bytes(p)).decode() if hasattr(p, "dtype") else p for p in prompts]
        self._request("generate", {"folder": folder, "prompts": sent, "settings": settings, "encoder": encoder})
        told, until = False, time.monotonic() + timeout_s
        while True:
            if not told and cancelled():
                self._stream.send(encode({"verb": "cancel"}))
                told = True
            if not self._stream.ready(POLL_S) and time.monotonic() < until:
                continue
            answer = self._answer(max(POLL_S, until - time.monotonic()))
            if "ok" in answer:
                return
            until = time.monotonic() + timeout_s
            yield answer["event"]

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def failed_cases(answer: dict[str, Any]) -> list[str]:
    """The golden cases of a `check` answer that are wrong, in words."""
    return [
        f"{c['method']}[{c['case']}] is off by {'NaN' if c['error'] is None else format(c['error'], '.2g')}, allowed {c['allowed']:.2g}"
        for c in answer["cases"]
        if not c["ok"]
    ]
