"""NVIDIA's flasher as a process: its output passed on and kept, its known failures in two lines.

What it prints: the scripts of Jetson Linux R32 to R36 (flash.sh; tools/kernel_flash/l4t_initrd_flash.sh and l4t_initrd_flash_internal.sh).
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgesdk.bootloaders.types import Watch
from edgesdk.errors import DeviceError, EdgeError, InputError, LinkError, MissingTool

KEPT_LINES = 400
LOG = "edgesdk-flash.log"
SUCCESS = re.compile(r"has been flashed successfully|Flash is successful", re.IGNORECASE)
_MILESTONES = (
    ("Step 1: Build the flashing environment", 0.05), ("Finish generating flash package", 0.3), ("Step 2: Boot the device", 0.35),
    ("Step 3: Start the flashing process", 0.45), ("SSH ready", 0.5), ("Starting to flash to qspi", 0.8), ("Reboot device", 0.99),
)  # fmt: skip
_AGAIN = "hold RECOVERY, tap RESET, let go (each try needs that anew), then run the same command"
_PACKAGES = "sudo {folder}/tools/l4t_flash_prerequisites.sh"
_KNOWN: tuple[tuple[str, type[EdgeError], str, str], ...] = (
    (r"requires root privilege", InputError, "NVIDIA's flasher wants root", "run it as root: sudo -E …"),
    (r"Invalid target board", InputError, "NVIDIA's folder knows no such board", "give one of its *.conf: ?board=jetson-orin-nano-devkit"),
    (r"Unrecognized module SKU|does not support board|board .{1,40} is not supported|[Ii]nvalid board ?id|SKU .{1,20} not supported",
     InputError, "the module behind the cable is not of this board", "give its own ?board=, or a newer Jetson Linux that knows the module"),
    (r"too many devices in RCM mode", DeviceError, "several Jetsons are in recovery mode", "name one: ?usb=1-6 (`edgesdk devices ports`), or unplug the others"),
    (r"No devices to flash|probing the target board failed|ECID is\s*$|[Ff]ailed to read rcm_state", DeviceError, "no Jetson answers in recovery mode", _AGAIN),
    (r"No space left on device", DeviceError, "the disk of this machine is full", "NVIDIA's tools write images as large as the root file system: free space, then run it again"),
    (r"command not found|No such file or directory: '|ModuleNotFoundError|Please install|exportfs: not found|not installed",
     MissingTool, "a program that NVIDIA's flasher needs is not here", _PACKAGES),
    (r"IPv6 is disabled", DeviceError, "IPv6 is off on this machine; NVIDIA's flasher reaches the board over it", "sudo sysctl -w net.ipv6.conf.all.disable_ipv6=0"),
    (r"mount\.nfs|cannot mount the NFS server|NFS server", DeviceError, "the board cannot reach this machine's NFS server",
     "install nfs-kernel-server and let the firewall pass it; VPNs stand in the way, too"),
    (r"cannot connect to its ssh server|expose ssh.*Timeout", DeviceError, "the board started NVIDIA's flashing system, and is not reached over USB",
     "turn off firewall and VPN, let NetworkManager have the USB interface; " + _AGAIN),
    (r"Device ping failed after RCM boot|Waiting for target to boot-up.*Timeout", DeviceError, "the board did not start NVIDIA's flashing system in time",
     "use a short cable in a port of the machine itself, no hub and no virtual machine; " + _AGAIN),
    (r"Return value (3|8|19)\b|tegrarcm_v2.*(fail|error)|USB communication", LinkError, "the USB link to the board broke",
     "use a short cable in a port of the machine itself, no hub and no virtual machine; " + _AGAIN),
    (r"Flash failure|WITH FAILURES", DeviceError, "a command on the board failed while it was written", "see the log for which one; " + _AGAIN),
)  # fmt: skip


def run(argv: Sequence[str], folder: Path, timeout_s: float, watch: Watch | None) -> str:
    """Run it, pass its lines on, keep them in `LOG`; the line that says it went well, empty if none does.

    Raises `InputError`, `MissingTool`, `DeviceError` or `LinkError`, by what it printed; a run beyond `timeout_s` is ended.
    """
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    if os.geteuid() == 0:
        environment["USER"] = "root"  # the scripts ask this variable, and sudo, cron and containers may not set it
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    try:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise DeviceError(
            f"{folder}/{argv[0]}: cannot be started ({error.strerror})", "unpack NVIDIA's Jetson Linux again, as root"
        ) from None
    ended = False
    try:
        with (folder / LOG).open("w", encoding="utf-8") as log:
            for line in _lines(process, time.monotonic() + timeout_s):
                log.write(line + "\n")
                lines.append(line)
                if watch and line.strip():
                    watch(line.strip()[:100], _share(line, lines))
        ended = process.wait(timeout=30) is not None
    except TimeoutError:
        hint = f"its log is {folder / LOG}; ?timeout=120min waits longer; {_AGAIN}"
        raise DeviceError(f"NVIDIA's flasher did not end in {timeout_s / 60:.0f} min", hint) from None
    finally:
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout
        process.stdout.close()
    if process.returncode:
        raise explain(list(lines), process.returncode, argv[0], folder)
    return next((line.strip("* ") for line in reversed(lines) if SUCCESS.search(line)), "")


def _lines(process: subprocess.Popen[bytes], end: float) -> Iterator[str]:
    """Its lines as they come, those ended by a carriage return, too. Raises `TimeoutError`."""
    assert process.stdout
    handle, held = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(handle, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, min(1.0, end - time.monotonic()))):
                if time.monotonic() >= end:
                    raise TimeoutError
                continue
            piece = os.read(handle, 65536)
            *whole, held = re.split(rb"\r\n|[\r\n]", held + piece)
            yield from (line.decode("utf-8", "replace") for line in whole)
            if not piece:
                if held:
                    yield held.decode("utf-8", "replace")
                return


def _share(line: str, lines: deque[str]) -> float:
    """How far it is, by the last milestone seen."""
    for seen in (line, *reversed(lines)):
        for text, share in _MILESTONES:
            if text in seen:
                return share
    return 0.0


def explain(lines: list[str], code: int, program: str, folder: Path) -> EdgeError:
    """What went wrong, by the last known failure among the lines."""
    text = "\n".join(lines)
    flat = text.replace("\n", " ")
    for pattern, kind, what, hint in _KNOWN:
        found = re.search(pattern, text, re.MULTILINE) or ("Timeout" in pattern and re.search(pattern, flat))
        if found:
            said = next((line.strip() for line in reversed(lines) if re.search(pattern, line)), found.group(0)[-120:])
            return kind(f"{what} ({program}: {said[:160]})", hint.format(folder=folder))
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing printed")
    return DeviceError(f"{program} ended with code {code}: {last[:200]}", f"its log is {folder / LOG}; {_AGAIN}")
