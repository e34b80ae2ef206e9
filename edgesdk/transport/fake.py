"""A device in memory: for tests and dry runs. It has a file system and can be told to fail; it measures nothing.

It understands the scripts of `edgesdk.transport.scripts` by their names and plays the agent's `facts`, `check` and `health`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from edgesdk.agent.frames import decode, encode
from edgesdk.errors import CheckFailed, DeviceError, LinkError
from edgesdk.transport.base import CHUNK_BYTES, Blob, Progress, Result, Stream, Transport, refused


@dataclass
class Failures:
    """What is to go wrong. Each byte count is spent as it happens."""

    cut_after_bytes: int | None = None  # the link breaks after so many bytes; the next call finds it whole again
    disk_bytes: int | None = None  # all the files together may take so much
    corrupt: bool = False  # what arrives is not what was sent
    check_error: float = 0.0  # the relative error that the golden check answers
    agent_crashes: bool = False
    held_by: str = ""  # who else uses the device
    cut_at: int | None = None  # the link breaks at this command from now on (0: the next), which is not done
    answer_lost: bool = False  # with `cut_at`: it is done, its answer is lost
    read_only: bool = False
    lacks: tuple[str, ...] = ()  # Python packages that are not there
    elf: str = ""  # what its Python begins with, in hex


@dataclass
class FakeTransport(Transport):
    """`files` is path → bytes, `links` path → target; `log` holds every command."""

    link: str = "fake"
    root: str = ".edgesdk"
    python: str = "python3"
    failures: Failures = field(default_factory=Failures)
    files: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # what it says of itself (see `edgesdk.agent.look`); a device without Python
    log: list[tuple[str, ...]] = field(default_factory=list)

    def run(self, argv: tuple[str, ...], stdin: bytes | None = None, timeout: float = 60.0) -> Result:
        self.log.append(argv)
        lost = self._cut()
        result = self._run(argv)
        if lost:
            raise LinkError(f"{self.link}: the link broke", "run the same command again")
        return result

    def _cut(self) -> bool:
        """Count down to the cut. Raises `LinkError` before the command; True: behind it."""
        fail = self.failures
        if fail.cut_at is None:
            return False
        fail.cut_at -= 1
        if fail.cut_at >= 0:
            return False
        fail.cut_at = None
        if not fail.answer_lost:
            raise LinkError(f"{self.link}: the link broke", "run the same command again")
        return True

    def _run(self, argv: tuple[str, ...]) -> Result:
        if argv[0] == "cat":
            data = self.files.get(self._real(argv[1]))
            return Result(0, data, b"") if data is not None else Result(1, b"", f"cat: {argv[1]}: No such file".encode())
        name = argv[3].removeprefix("edgesdk-") if argv[:2] == ("sh", "-c") and len(argv) > 3 else ""
        action = getattr(self, f"_do_{name}", None)
        if action is None:
            return Result(127, b"", f"the fake device does not know {argv[0]} {name}".encode())
        if self.failures.read_only and name not in _READS:
            return Result(1, b"", b"sh: Read-only file system")
        if name in _GROWS and self.failures.disk_bytes is not None and self._free() <= 0:
            return Result(74, b"", b"cat: write error: No space left on device")
        out = action(*argv[4:])
        return Result(0, out.encode(), b"")

    def put(self, data: Blob | bytes | Path, remote: str, *, resume: bool = True, progress: Progress | None = None) -> int:
        blob = data if isinstance(data, Blob) else Blob.of(data)
        self.log.append(("put", remote))
        lost = self._cut()
        if self.failures.read_only:
            raise refused(self.link, f"writing {remote}", Result(73, b"", b"sh: Read-only file system"))
        part = remote + ".part"
        there = min(len(self.files.get(part, b"")), blob.size_bytes) if resume else 0
        self.files[part] = self.files.get(part, b"")[:there]
        with blob.open() as source:
            source.seek(there)
            while chunk := source.read(CHUNK_BYTES):
                self._receive(part, chunk)
                if progress:
                    progress(len(self.files[part]), blob.size_bytes)
        got = self.files.pop(part)
        digest = hashlib.sha256(got + b"!" if self.failures.corrupt else got).hexdigest()
        if digest != blob.sha256:
            what = f"{self.link}: {remote}: sha256 {digest}, wanted {blob.sha256}"
            raise CheckFailed(what, "refused and removed; a bad cable, memory or disk?")
        self.files[remote] = got
        if lost:
            raise LinkError(f"{self.link}: the link broke", "run the same command again")
        return there

    def _receive(self, part: str, chunk: bytes) -> None:
        fail = self.failures
        if fail.cut_after_bytes is not None:
            taken = chunk[: fail.cut_after_bytes]
            self.files[part] += taken
            fail.cut_after_bytes -= len(taken)
            if len(taken) < len(chunk):
                fail.cut_after_bytes = None
                raise LinkError(f"{self.link}: the link broke", "run the same command again: a transfer resumes where it stopped")
            return
        if fail.disk_bytes is not None and self._free() < len(chunk):
            del self.files[part]
            raise refused(self.link, f"writing {part}", Result(74, b"", b"cat: write error: No space left on device"))
        self.files[part] += chunk

    def get(self, remote: str) -> bytes:
        return self.must(("cat", remote), f"reading {remote}").out

    def open(self, argv: tuple[str, ...]) -> Stream:
        if "-c" in argv:  # the lock of `edgesdk.lease`
            if self.failures.read_only:
                return _FakeAgent(self, [b"cannot [Errno 30] Read-only file system\n"])
            return _FakeAgent(self, [f"held {self.failures.held_by}\n".encode() if self.failures.held_by else b"yours\n"])
        self.log.append(argv)
        return _FakeAgent(self, [encode({"hello": "edgesdk-agent", "version": 2})])

    def _real(self, path: str) -> str:
        """`path` with a leading link followed."""
        for name, target in self.links.items():
            if path == name or path.startswith(name + "/"):
                return f"{name.rpartition('/')[0]}/{target}{path[len(name) :]}"
        return path

    def _do_size(self, path: str) -> str:
        return str(len(self.files.get(path, b"")))

    def _do_survey(self, root: str, recent: str) -> str:
        lines = [f"{s} {self.links[f'{root}/{s}'].rpartition('/')[2]}" for s in ("current", "previous") if f"{root}/{s}" in self.links]
        stores = dict.fromkeys(p[len(root) + 7 :].split("/")[0] for p in reversed(self.files) if p.startswith(f"{root}/store/"))
        lines += [f"store {d} {'good' if self.files.get(f'{root}/store/{d}/.good') == d.encode() else 'unchecked'}" for d in stores]
        agents = dict.fromkeys(p[len(root) + 7 :].split("/")[0] for p in reversed(self.files) if p.startswith(f"{root}/agent/"))
        lines += [f"agent {a}" for a in agents] + (["trusted"] if f"{root}/trusted" in self.files else [])
        history = self.files.get(f"{root}/history", b"").decode().split("\n")[:-1]
        return "\n".join(lines + [f"history {line}" for line in history[-int(recent) :]])

    def _do_good(self, folder: str, digest: str) -> str:
        self.files[f"{folder}/.good"] = digest.encode()
        return ""

    def _do_record(self, root: str, *words: str) -> str:
        line = f"{words[0]} 2026-01-01T00:00:00Z {' '.join(words[1:])}"
        check = hashlib.sha256(line.encode()).hexdigest()[:16]
        self.files[f"{root}/history"] = self.files.get(f"{root}/history", b"") + f"{check} {line}\n".encode()
        return ""

    def _do_suits(self, python: str, flag: str, program: str, *modules: str) -> str:
        return json.dumps([self.failures.elf, [m for m in modules if m not in self.failures.lacks], python])

    def _do_hashes(self, folder: str, *names: str) -> str:
        found = [(n, self.files[f"{folder}/{n}"]) for n in names if f"{folder}/{n}" in self.files]
        return "\n".join(f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in found)

    def _do_share(self, source: str, target: str) -> str:
        self.files[target] = self.files[source]
        return ""

    def _do_link(self, target: str, link: str, python: str) -> str:
        self.links[link] = target
        return ""

    def _do_activate(self, source: str, target: str) -> str:
        self._do_remove(target)
        for path in [p for p in self.files if p.startswith(source + "/")]:
            self.files[target + path[len(source) :]] = self.files.pop(path)
        return ""

    def _do_remove(self, *paths: str) -> str:
        for path in paths:
            for found in [p for p in self.files if p == path or p.startswith(path + "/")]:
                del self.files[found]
        return ""

    def _do_unlink(self, *paths: str) -> str:
        for path in paths:
            self.links.pop(path, None)
            self.files.pop(path, None)
        return ""

    def _free(self) -> int:
        """What is there under two names is there once."""
        return max(0, (self.failures.disk_bytes or 0) - sum({id(content): len(content) for content in self.files.values()}.values()))

    def _do_look(self, root: str, mark: str, *_: str) -> str:
        return "".join(f"\n{mark}{name}\n{text}\n" for name, text in self.texts.items())

    def _do_free(self, root: str) -> str:
        limit = self.failures.disk_bytes
        free = (1 << 40) if limit is None else self._free()
        return f"Filesystem 1024-blocks Used Available Capacity Mounted on\nfake 1 1 {free // 1024} 1% /"


_READS = ("size", "survey", "hashes", "free", "suits")
_GROWS = ("good", "record")


class _FakeAgent:
    """Answers `facts`, `check` and `health` from the fake's files; refuses to measure."""

    def __init__(self, device: FakeTransport, lines: list[bytes]) -> None:
        self._device, self._lines = device, lines

    def send(self, line: bytes) -> None:
        lost = self._device._cut()
        asked = decode(line.rstrip(b"\n"))
        if self._device.failures.agent_crashes:
            raise DeviceError("fake: the agent ended: exit code -4", "look at the line above; --python PATH picks another interpreter")
        self._lines.append(encode({"id": asked["id"], **self._answer(asked)}))
        if lost:
            raise LinkError("fake: the link broke", "run the same command again")

    def _answer(self, asked: dict[str, object]) -> dict[str, object]:
        device, error = self._device, self._device.failures.check_error
        if asked["verb"] == "facts":
            return {"ok": {"machine": "fake", "system": "Fake", "emulated": ["the fake device"], "runtimes": {}, "python": "3"}}
        if asked["verb"] == "check":
            case = {"method": "forward", "case": 0, "error": error, "allowed": 1e-3, "ok": error <= 1e-3}
            return {"ok": {"cases": [case], "seconds": {}}}
        if asked["verb"] == "health":
            manifest = device.files.get(device._real(f"{asked['folder']}/manifest.json"), b"")
            return {"ok": {"digest": hashlib.sha256(manifest).hexdigest(), "bad": []}}
        return {"error": f"the fake device does not do '{asked['verb']}': it measures nothing", "hint": "use --on local or ssh://…"}

    def readline(self, timeout_s: float) -> bytes:
        return self._lines.pop(0).rstrip(b"\n")

    def ready(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass
