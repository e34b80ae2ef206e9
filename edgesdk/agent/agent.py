"""The agent: what edgesdk runs on a device. It is sent there with runner.py and its like, as one archive.

This file stands alone: standard library, Python 3.9 and later; numpy only where a program is run.
It answers requests, one framed line each (`LENGTH CRC32 JSON`), from stdin on stdout:

    facts                                             what this machine is, and how warm and fast right now
    check   folder [repeat]                           golden inputs through the program in `folder`, against golden outputs
    profile folder runs warmup [method]                 raw times and memory, in a process of its own
    run     folder method inputs                         one call, arrays as base64 .npy
    generate folder prompts settings encoder             answers, event by event, until a request `cancel` comes or the line ends
    health  folder                                    digest of the manifest and sha256 of every member
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import math
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

VERSION = 1
Write = Callable[["dict[str, Any]"], None]
HERE = os.path.dirname(os.path.abspath(__file__))


class Refused(Exception):
    """A request that cannot be answered: what is wrong, and what to do."""

    def __init__(self, what: str, hint: str = "", bad_input: bool = False) -> None:
        super().__init__(what)
        self.what, self.hint, self.bad_input = what, hint, bad_input


# ---- the wire


def encode(message: dict[str, Any]) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return b"%d %08x %s\n" % (len(body), zlib.crc32(body), body)


def decode(line: bytes) -> dict[str, Any]:
    length, crc, body = line.rstrip(b"\n").split(b" ", 2)
    if len(body) != int(length) or b"%08x" % zlib.crc32(body) != crc:
        raise Refused("the request was damaged on the way", "run the command again")
    message: dict[str, Any] = json.loads(body)
    return message


# ---- facts


def read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20).replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def cpuinfo() -> tuple[str, dict[str, str]]:
    """(the CPU's name, the keys that appear, megahertz if listed)"""
    keys: dict[str, str] = {}
    for line in read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        keys.setdefault(name.strip(), value.strip())
    name = keys.get("model name") or keys.get("Hardware") or keys.get("CPU part") or platform.processor() or "unknown"
    return name, keys


def emulated() -> list[str]:
    """Reasons to believe that this is an emulator; empty on silicon. A virtual machine on the same kind of CPU is none."""
    reasons = []
    name, keys = cpuinfo()
    machine = platform.machine()
    if "QEMU" in name or "TCG" in name:
        reasons.append("/proc/cpuinfo: " + name)
    if machine.startswith(("aarch64", "arm")) and "vendor_id" in keys and "flags" in keys:
        reasons.append("/proc/cpuinfo is of another kind of CPU than " + machine)
    for path in ("/proc/device-tree/compatible", "/sys/firmware/devicetree/base/compatible"):
        if "dummy-virt" in read(path):
            reasons.append("device tree: linux,dummy-virt")
            break
    vendor = read("/sys/class/dmi/id/sys_vendor")
    if "QEMU" in vendor and machine.startswith(("aarch64", "arm")):
        reasons.append("DMI: " + vendor)
    return reasons


def clock_hz() -> float | None:
    """The fastest core's clock right now, or None."""
    best = 0.0
    for core in range(os.cpu_count() or 1):
        text = read(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq")
        if text.isdigit():
            best = max(best, int(text) * 1000.0)
    if not best:
        for line in read("/proc/cpuinfo").splitlines():
            if line.startswith("cpu MHz"):
                best = max(best, float(line.split(":")[1]) * 1e6)
    return best or None


def temperature_c() -> float | None:
    """The warmest thermal zone, or None."""
    best = None
    for zone in range(32):
        text = read(f"/sys/class/thermal/thermal_zone{zone}/temp")
        if text.lstrip("-").isdigit() and -40 < int(text) / 1000.0 < 200:
            best = max(best if best is not None else -99.0, int(text) / 1000.0)
    return best


def throttled() -> bool | None:
    """True if the board says that it is held back now or since boot began; None if it does not say (Raspberry Pi: get_throttled)."""
    for path in ("/sys/devices/platform/soc/soc:firmware/get_throttled",):
        text = read(path)
        if text:
            return int(text, 16) & 0xF != 0
    return None


def memory_bytes(key: str) -> int | None:
    for line in read("/proc/meminfo").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def own_bytes(key: str) -> int | None:
    """VmRSS or VmHWM of this process, in bytes, or None."""
    for line in read("/proc/self/status").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def conditions() -> dict[str, Any]:
    return {"clock_hz": clock_hz(), "temperature_c": temperature_c(), "throttled": throttled()}


def facts() -> dict[str, Any]:
    runtimes: dict[str, str] = {}
    numpy = None
    try:
        import numpy as np

        numpy = np.__version__
        runner = importlib.import_module("runner")
        runtimes = runner.installed()
    except ImportError:
        pass
    return {
        "machine": platform.machine(),
        "system": platform.system() + " " + platform.release(),
        "board": read("/proc/device-tree/model") or read("/sys/class/dmi/id/product_name") or None,
        "python": platform.python_version(),
        "numpy": numpy,
        "cpu": cpuinfo()[0],
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes("MemTotal"),
        "memory_available_bytes": memory_bytes("MemAvailable"),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "runtimes": runtimes,
        "emulated": emulated(),
        **conditions(),
    }


# ---- bundles


def manifest_of(folder: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, "manifest.json"), "rb") as file:
            manifest: dict[str, Any] = json.loads(file.read())
            return manifest
    except (OSError, ValueError) as error:
        raise Refused(f"no bundle in {folder} ({error})", "install one: edgesdk flash BUNDLE --on …") from None


def numpy_runner() -> Any:
    try:
        numpy, runner = (importlib.import_module(name) for name in ("numpy", "runner"))
    except ImportError as error:
        raise Refused(f"{sys.executable} of {platform.node()} has no numpy ({error})", "install it there, or --python PATH") from None
    return numpy, runner


MODULES = {
    "executorch": ("executorch.runtime",),
    "litert": ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"),
    "tflite-runtime": ("tflite_runtime.interpreter", "ai_edge_litert.interpreter"),
}
PACKAGES = {"litert": "ai-edge-litert"}


def import_runtime(runtime: str) -> None:
    """Import the runtime alone, so that its time and memory are not counted as the program's."""
    for name in MODULES.get(runtime, ()):
        try:
            importlib.import_module(name)
            return
        except ImportError:
            continue
    hint = f"install it for {sys.executable} (pip install {PACKAGES.get(runtime, runtime)}), or --python PATH"
    raise Refused(f"the runtime '{runtime}' is not installed on this device", hint)


def open_runner(folder: str, manifest: dict[str, Any]) -> Any:
    _, runner = numpy_runner()
    import_runtime(manifest["runtime"])
    try:
        return runner.open_program(os.path.join(folder, manifest["program"]), manifest["runtime"], int(manifest["threads"]))
    except Exception as error:
        raise Refused(f"the program cannot be opened here: {error}", "the device's runtime may be older than the host's") from None


def load_arrays(folder: str, names: list[str]) -> list[Any]:
    numpy = sys.modules["numpy"]
    return [numpy.load(os.path.join(folder, name), allow_pickle=False) for name in names]


def relative_error(got: list[Any], wanted: list[Any]) -> float | None:
    """The largest over the outputs of |got - wanted| / |wanted|; None if it is no number."""
    numpy = sys.modules["numpy"]
    worst = 0.0
    if len(got) != len(wanted):
        return None
    for g, w in zip(got, wanted):  # noqa: B905 (3.9 has no strict)
        g, w = numpy.asarray(g, dtype=numpy.float64).ravel(), numpy.asarray(w, dtype=numpy.float64).ravel()
        if g.size != w.size:
            return None
        norm = float(numpy.linalg.norm(w))
        error = float(numpy.linalg.norm(g - w)) / (norm if norm > 0 else 1.0)
        if not math.isfinite(error):
            return None
        worst = max(worst, error)
    return worst


def check(folder: str, repeat: int = 0) -> dict[str, Any]:
    """Each golden case's relative error; the median seconds of `repeat` more calls a method, if asked for."""
    manifest = manifest_of(folder)
    runner = open_runner(folder, manifest)
    cases: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}
    for case in manifest["golden"]:
        method = case["method"]
        inputs = load_arrays(folder, case["inputs"])
        error = relative_error(runner.run(method, inputs), load_arrays(folder, case["outputs"]))
        allowed = case["max_relative_error"]
        index = counts[method] = counts.get(method, -1) + 1
        cases.append({"method": method, "case": index, "error": error, "allowed": allowed, "ok": error is not None and error <= allowed})
        if repeat and method not in seconds:
            seconds[method] = sorted(timed(runner, method, inputs) for _ in range(repeat))[repeat // 2]
    return {"cases": cases, "seconds": seconds}


def timed(runner: Any, method: str, inputs: list[Any]) -> float:
    start = time.perf_counter_ns()
    runner.run(method, inputs)
    return (time.perf_counter_ns() - start) / 1e9


def inputs_for(folder: str, manifest: dict[str, Any], runner: Any, method: str) -> list[Any]:
    """The first golden case's inputs, else zeros."""
    for case in manifest["golden"]:
        if case["method"] == method:
            return load_arrays(folder, case["inputs"])
    numpy = sys.modules["numpy"]
    return [numpy.zeros(shape, dtype) for shape, dtype in runner.inputs(method)]


def profile(
    folder: str, runs: int, warmup: int, method: str | None = None, tell: Callable[[str, float], None] = lambda text, share: None
) -> dict[str, Any]:
    """Raw seconds and memory of this process: it must be a fresh one."""
    manifest = manifest_of(folder)
    methods = [method] if method else list(manifest["methods"])
    for name in methods:
        if name not in manifest["methods"]:
            raise Refused(f"no method '{name}'; known: {', '.join(manifest['methods'])}", "give one of them with --method", True)
    numpy_runner()
    rss_start = own_bytes("VmRSS")
    start = time.perf_counter_ns()
    import_runtime(manifest["runtime"])
    import_s = (time.perf_counter_ns() - start) / 1e9
    try:  # forget the peak that importing made
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    rss_before = own_bytes("VmRSS")
    load_s = []
    for _ in range(2):
        runner: Any = None
        start = time.perf_counter_ns()
        runner = open_runner(folder, manifest)
        for name in methods:
            runner.inputs(name)
        load_s.append((time.perf_counter_ns() - start) / 1e9)
        if len(load_s) == 1:
            first = {name: timed(runner, name, inputs_for(folder, manifest, runner, name)) for name in methods}
            peak_cold = own_bytes("VmHWM")
    before, results, told = None, [], time.monotonic()
    for position, name in enumerate(methods):
        inputs = inputs_for(folder, manifest, runner, name)
        for _ in range(warmup):
            runner.run(name, inputs)
        before = before or conditions()
        samples = []
        for index in range(runs):
            samples.append(timed(runner, name, inputs))
            if time.monotonic() - told > 0.5:
                told = time.monotonic()
                tell(f"{name} {index + 1}/{runs}", (position + (index + 1) / runs) / len(methods))
        results.append({"method": name, "first_s": first[name], "samples_s": samples})
    if method is None and os.path.exists(os.path.join(folder, "sequence.json")):
        answers = importlib.import_module("sequence.measure")
        results += answers.measure(runner.run, folder, lambda name: inputs_for(folder, manifest, runner, name), runs, warmup, tell)
    after = conditions()
    return {
        "import_s": import_s, "load_cold_s": load_s[0], "load_warm_s": load_s[1], "methods": results, "before": before, "after": after,
        "rss_start_bytes": rss_start, "rss_before_load_bytes": rss_before, "peak_rss_bytes": peak_cold, "runtime_version": runner.version,
    }  # fmt: skip


def sha256(path: str) -> str | None:
    """A file's digest in hex, or None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def health(folder: str) -> dict[str, Any]:
    """The digest of what is installed in `folder` and the members that are not what the manifest says."""
    try:
        with open(os.path.join(folder, "manifest.json"), "rb") as file:
            text = file.read()
    except OSError as error:
        raise Refused(f"no bundle in {folder} ({error.strerror})", "install one: edgesdk flash BUNDLE --on …") from None
    bad = []
    for member in json.loads(text)["members"]:
        if sha256(os.path.join(folder, member["name"])) != member["sha256"]:
            bad.append(member["name"])
    return {"digest": hashlib.sha256(text).hexdigest(), "bad": bad}


OPEN: dict[str, Any] = {}


def opened(folder: str) -> Any:
    """A runner of the program in `folder`, which stays open for the next call."""
    folder = os.path.realpath(folder)
    if folder not in OPEN:
        OPEN.clear()
        OPEN[folder] = open_runner(folder, manifest_of(folder))
    return OPEN[folder]


def array_of(text: str) -> Any:
    """An array from base64 of .npy."""
    return sys.modules["numpy"].load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def run(folder: str, method: str, inputs: list[str]) -> dict[str, Any]:
    """One call."""
    runner = opened(folder)
    numpy = sys.modules["numpy"]
    arrays = [array_of(text) for text in inputs]
    start = time.perf_counter_ns()
    try:
        outputs = runner.run(method, arrays)
    except Exception as error:
        bad_input = type(error).__name__ == "RunnerError"
        raise Refused(str(error).splitlines()[0], "give one array for each input, in order, of the shape named", bad_input) from None
    seconds = (time.perf_counter_ns() - start) / 1e9
    texts = []
    for array in outputs:
        buffer = io.BytesIO()
        numpy.save(buffer, array, allow_pickle=False)
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    return {"outputs": texts, "seconds": seconds}


def generate(
    folder: str,
    prompts: list[Any],
    settings: dict[str, Any],
    tell: Callable[[dict[str, Any]], None],
    cancelled: Callable[[], bool],
    encoder: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answers to prompts (token ids; sound as base64 .npy); the whole loop runs here, the encoder perhaps on a helper."""
    runner = opened(folder)
    serve = importlib.import_module("sequence.serve")
    inputs = [array_of(p) if isinstance(p, str) else p for p in prompts]
    try:
        serve.serve(runner.run, folder, inputs, settings, tell, cancelled, encoder)
    except serve.SequenceError as error:
        raise Refused(error.what, error.hint, not isinstance(error, serve.AwayError)) from None
    except sys.modules["runner"].RunnerError as error:
        raise Refused(f"the prompt is not what the program takes: {error}", "give a text, or inputs of that shape", True) from None
    return {}


# ---- serving

FRESH: dict[str, Callable[..., dict[str, Any]]] = {"check": check, "profile": profile}
VERBS: dict[str, Callable[..., dict[str, Any]]] = {"facts": facts, "health": health, "run": run, "generate": generate, **FRESH}


class Lines:
    """Lines from a file descriptor, and whether one waits."""

    def __init__(self, fd: int) -> None:
        self.fd, self.held, self.ended = fd, bytearray(), False

    def _more(self) -> None:
        chunk = os.read(self.fd, 1 << 20)
        self.ended = not chunk
        self.held += chunk

    def next(self) -> bytes:
        """The next line; nothing at the end."""
        at = 0
        while (end := self.held.find(b"\n", at)) < 0:
            if self.ended:
                return b""
            at = len(self.held)
            self._more()
        line = bytes(self.held[: end + 1])
        del self.held[: end + 1]
        return line

    def cancelled(self) -> bool:
        """Whether a request has come (the only one that comes before an answer is `cancel`) or the other side is gone."""
        while not self.ended and b"\n" not in self.held and select.select([self.fd], [], [], 0)[0]:
            self._more()
        return self.ended or b"\n" in self.held


def in_fresh_process(request: dict[str, Any], write: Write) -> None:
    """`check` and `profile` run in a process of their own: its memory is the program's, its crash is an answer."""
    argv = [sys.executable, "-B", os.path.abspath(sys.argv[0]), "--one"]
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    assert child.stdin and child.stdout
    child.stdin.write(encode(request))
    child.stdin.close()
    answered = False
    for line in child.stdout:
        message = decode(line)
        answered = answered or "progress" not in message
        write(message)
    code = child.wait()
    errors.seek(0)
    complaint = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    errors.close()
    if not answered:
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = "; ".join(complaint) or "the program may use instructions that this CPU does not have"
        write({"id": request["id"], "error": f"the runtime crashed on the device ({reason})", "hint": hint})


def answer(request: dict[str, Any], write: Write, fresh: bool, lines: Lines) -> None:
    verb = request.pop("verb", "")
    number = request.pop("id", 0)
    try:
        if verb not in VERBS:
            raise Refused(f"the agent has no verb '{verb}'", "known: " + ", ".join(sorted(VERBS)))
        if verb == "profile":
            request["tell"] = lambda text, share: write({"id": number, "progress": [text, share]})
        if verb == "generate":
            request.update(tell=lambda event: write({"id": number, "event": event}), cancelled=lines.cancelled)
        if verb in FRESH and not fresh:
            request.pop("tell", None)
            in_fresh_process({"verb": verb, "id": number, **request}, write)
            return
        write({"id": number, "ok": VERBS[verb](**request)})
    except Refused as error:
        write({"id": number, "error": error.what, "hint": error.hint, "bad_input": error.bad_input})
    except Exception as error:
        write({"id": number, "error": f"{verb} failed: {type(error).__name__}: {error}", "hint": ""})


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints must not get between the frames

    def write(message: dict[str, Any]) -> None:
        out.write(encode(message))
        out.flush()

    fresh = "--one" in sys.argv
    sys.path.insert(0, HERE)
    if not fresh:
        write({"hello": "edgesdk-agent", "version": VERSION})
    lines = Lines(0)
    for line in iter(lines.next, b""):
        try:
            request = decode(line)
            if request.get("verb") == "cancel":
                continue  # what it ends has ended
        except (Refused, ValueError):
            write({"id": 0, "error": "the request was damaged on the way", "hint": "run the command again"})
            continue
        answer(request, write, fresh, lines)


if __name__ == "__main__":
    main()
