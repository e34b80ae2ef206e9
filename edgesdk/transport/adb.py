"""A phone or board over adb, through the user's own `adb` program: its server, keys and USB permissions hold.

    adb:                                             the only device that is attached
    adb://SERIAL[?root=FOLDER&python=PATH]           by its serial, as `adb devices` shows it
    adb://HOST:PORT[?…]                              over the network; connected to if it is not yet

A link that is cut in the middle of a command leaves `adb shell` with exit code 0 and no word (adb 29), so that each command ends by saying so.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from urllib.parse import parse_qs

from edgesdk.errors import DeviceError, InputError, LinkError, MissingTool, UnknownName
from edgesdk.transport.base import PipeTransport, Result, split_link

ROOT = "/data/local/tmp/edgesdk"
"""Where the shell's user may write and run files on Android."""
QUERY = ("root", "python")
_ENDED = re.compile(rb"edgesdk-ended (\d+)\r?\n$")
CAUSES = (
    ("no devices", "no device is attached", "plug it in and turn USB debugging on; `adb devices` lists what is seen"),
    ("more than one", "several devices are attached", "name one: adb://SERIAL, as `adb devices` shows it"),
    ("unauthorized", "it has not allowed this computer", "unlock its screen and accept the question about USB debugging"),
    ("still authorizing", "it has not allowed this computer yet", "unlock its screen and accept the question about USB debugging"),
    ("permissions", "insufficient permissions for its USB port", "add an udev rule for it (apt install android-sdk-platform-tools-common)"),
    ("offline", "it is attached but does not answer", "run `adb reconnect`, or plug it in again"),
    ("not found", "no such device is attached", "`adb devices` lists what is seen; over the network: adb://HOST:PORT"),
    ("cannot connect to daemon", "adb's server does not start", "run `adb start-server` and see what it says"),
    ("failed to connect", "nothing answers there", "check address and port, and that debugging over the network is on"),
    ("failed to authenticate", "it has not allowed this computer", "unlock its screen and accept the question about debugging"),
)


class AdbTransport(PipeTransport):
    """Each command is one `adb shell`; the device needs Android 7 or later, whose shell has exit codes."""

    def __init__(self, link: str) -> None:
        url = split_link(link, "adb: or adb://SERIAL")
        query = {k: v[-1] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        for name in query:
            if name not in QUERY:
                raise UnknownName("adb option", name, QUERY)
        if url.path not in ("", "/") or url.netloc.startswith("-") or "@" in url.netloc:
            raise InputError(f"{link}: not an adb link", "write it like adb: or adb://SERIAL?root=/data/local/tmp/edgesdk")
        if shutil.which("adb") is None:
            raise MissingTool("the program 'adb' is not installed", "apt install adb, or Android's platform-tools")
        self.serial = url.netloc
        self.link = link.split("?")[0]
        self.root = query.get("root", ROOT)
        self.python = query.get("python", "python3")
        self._adb = ("adb", "-s", self.serial) if self.serial else ("adb",)
        self._to_connect = ":" in self.serial  # not before it is used: a link may only be looked at

    def _client(self, *argv: str) -> Result:
        """What adb itself answers, without the device."""
        try:
            done = subprocess.run(argv, capture_output=True, timeout=30, check=False, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise LinkError(f"{self.link}: adb does not answer in 30 s", "run `adb kill-server`, then the command again") from None
        return Result(done.returncode, done.stdout, done.stderr)

    def _connect(self) -> None:
        """Over the network; a device that came back is offline to adb until it is let go and connected to again."""
        for _ in range(5):
            said = self._client("adb", "connect", self.serial)
            if error := self._cause(said.out + said.err):
                raise error
            state = self._client(*self._adb, "get-state")
            if state.code == 0 or b"offline" not in state.err:
                return
            self._client("adb", "disconnect", self.serial)
            time.sleep(0.5)

    def _argv(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        if self._to_connect:
            self._connect()
            self._to_connect = False
        return (*self._adb, "shell", "-T", f'{shlex.join(argv)}; c=$?; echo "edgesdk-ended $c" >&2; exit $c')

    def _own(self, result: Result) -> Result:
        if ended := _ENDED.search(result.err):
            return Result(int(ended[1]), result.out, result.err[: ended.start()])
        if error := self._cause(result.err):
            raise error
        if b"shell_v2" not in self._client(*self._adb, "features").out and self._client(*self._adb, "get-state").code == 0:
            raise DeviceError(f"{self.link}: its shell has no exit codes (Android 6 or older)", "edgesdk needs Android 7 or later over adb")
        raise LinkError(f"{self.link}: the link broke", "run the same command again: a transfer resumes where it stopped")

    def _cause(self, said: bytes) -> LinkError | None:
        text = said.decode(errors="replace")
        lines = [line for line in text.splitlines() if line.startswith(("error:", "adb:", "failed to", "* cannot", "cannot"))]
        for sign, what, hint in CAUSES:
            if any(sign in line for line in lines):
                return LinkError(f"{self.link}: {what}", hint)
        return LinkError(f"{self.link}: {lines[-1]}", "see what `adb devices` says") if lines else None
