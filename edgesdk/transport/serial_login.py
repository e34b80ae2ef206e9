"""From a serial console in whatever state to our own program running there: the port, the login, and what is typed to a shell.

What is typed is compared with its echo before Enter is pressed, so that noise cannot make a command of it.
"""

from __future__ import annotations

import ast
import contextlib
import re
import time
import zlib
from base64 import b64encode
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from edgesdk.errors import DeviceError, InputError, LinkError
from edgesdk.transport.serial_line import RESET, Line, frame

TRIES = 40
ASKS_SIZE = rb"(?:\x1b\[6n)?"
"""busybox's shell asks a terminal for its cursor behind each prompt. Lines end in a newline: a getty that first heard one takes no carriage return after."""
RECEIVER = """import sys,zlib,base64
d=b''
for l in sys.stdin.buffer:
 try:
  n,c,b=l.split();b=base64.b64decode(b)
  if int(c,16)!=zlib.crc32(n+b):continue
  n=int(n)
 except Exception:continue
 if n==-1:break
 if n==len(d):d+=b
 t=b'%d'%len(d);print('\\ngot',len(d),'%08x'%zlib.crc32(t),flush=True)
exec(zlib.decompress(d))
"""
"""What is typed to the device's Python, to take the rest: pieces `OFFSET CRC BASE64`, each answered by how many bytes there are."""


def program(session: int) -> bytes:
    """The source of the device's end, for `exec`: the two files without what only people and checkers read."""
    place = files("edgesdk.transport")
    tree = ast.parse("\n".join((place / f"serial_{name}.py").read_text() for name in ("line", "device")))
    return (ast.unparse(_Bare().visit(tree)) + f"\nserve({session})\n").encode()


class _Bare(ast.NodeTransformer):
    """Without docstrings and annotations, and without the imports that are there already."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.level or node.module in ("__future__", "typing") else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return ast.copy_location(ast.Assign([node.target], node.value, None), node) if node.value else None

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        self.generic_visit(node)
        return node


class Port:
    """The serial port itself; one that went away is opened again when it is back."""

    def __init__(self, path: str, baud: int, link: str) -> None:
        self.path, self.baud, self.link = path, baud, link
        self._port: Any = None
        self.gone: float | None = None
        self.open()

    def open(self) -> None:
        import serial

        try:
            self._port = serial.Serial(self.path, self.baud, timeout=0.02, write_timeout=10, exclusive=True)
        except serial.SerialException as error:
            reason = str(error)
            if "Permission denied" in reason:
                raise LinkError(
                    f"{self.link}: permission denied", f"add yourself to the group of {self.path}: sudo usermod -aG dialout $USER"
                ) from None
            if "exclusively lock" in reason or "busy" in reason:
                raise LinkError(
                    f"{self.link}: another program has the port open", "end it (screen, minicom, another edgesdk), then run it again"
                ) from None
            raise LinkError(f"{self.link}: no such port", "plug it in; ls /dev/tty* shows what is there") from None
        except ValueError as error:
            raise InputError(
                f"{self.link}: baud = {self.baud} ({error})", "use the rate that the board's console has, like 115200"
            ) from None

    def read(self) -> bytes:
        """What has come, waited for briefly; nothing while the port is away."""
        return self._act(lambda: bytes(self._port.read(max(1, self._port.in_waiting)))) or b""

    def write(self, data: bytes) -> None:
        self._act(lambda: self._port.write(data))

    def _act(self, act: Callable[[], Any]) -> Any:
        if self._port is None:
            time.sleep(0.2)
            with contextlib.suppress(LinkError):
                self.open()
                self.gone = None
            if self._port is None:
                return None
        try:
            return act()
        except OSError:  # serial.SerialException is one
            self.close()
            self.gone = self.gone or time.monotonic()
            return None

    def close(self) -> None:
        if self._port is not None:
            with contextlib.suppress(OSError):
                self._port.close()
            self._port = None


class Login:
    """From a console in whatever state to `serve` running there."""

    def __init__(self, port: Port, link: str, user: str, password: str, python: str) -> None:
        self.port, self.link, self.user, self.password, self.python = port, link, user, password, python
        self.quiet_s = 0.15 + 300 / port.baud

    def begin(self, session: int) -> None:
        """Raises `LinkError` where nobody answers, `DeviceError` where there is no Python or the login is refused."""
        if self._taken_over(session):
            return
        for _ in range(5):
            self._shell()
            self._typed('while read -r l;do eval "$l";done')
            if not self._answers("echo ok$((40+2))", rb"ok42"):
                continue
            version = self._answers(
                f"{self.python} -c 'import sys;print(\"py\",sys.version_info>=(3,9))' 2>&1;echo en''ded", rb"py (True|False)|en" + rb"ded"
            )
            if not version or version[1] != b"True":
                self._typed("break")
                raise DeviceError(
                    f"{self.link}: the interpreter '{self.python}' is not there or older than 3.9", "give its path: ?python=PATH"
                )
            if self._started(session):
                return
        raise LinkError(f"{self.link}: too much noise to begin with", "lower the rate (?baud=), shorten the cable, check the ground wire")

    def _taken_over(self, session: int) -> bool:
        """Whether our own program runs there still, left by a session that was cut."""
        line = Line(session)
        for _ in range(4):
            self.port.write(b"\n" + frame(RESET, session))
            until = time.monotonic() + self.quiet_s + 0.3
            while time.monotonic() < until:
                line.feed(self.port.read(), time.monotonic())
                if line.heard:
                    return True
        return False

    def _read(self, enough: re.Pattern[bytes] | None = None, wait_s: float = 0.0) -> bytes:
        """What comes until it is quiet, or until a pattern is seen."""
        found, last, until = b"", time.monotonic(), time.monotonic() + wait_s
        while time.monotonic() - last < self.quiet_s or time.monotonic() < until:
            if came := self.port.read():
                found, last = found + came, time.monotonic()
            if enough is not None and enough.search(found):
                break
            if self.port.gone is not None:
                raise LinkError(f"{self.link}: the port went away", "plug it in again, then run the command again")
        return found

    def _shell(self) -> None:
        """Log in where that is asked for."""
        for i in range(TRIES):
            if i in (3, 9):  # our own loop, left by a session that was cut; or our receiver, waiting in it
                self.port.write(b"break\n" + piece(-1, b".") if i == 9 else b"break\n")
            self.port.write(b"\x15\n")
            said = self._read(re.compile(rb"(ogin|ssword): *$|[#$>%] ?" + ASKS_SIZE + b"$"), 2.0)
            if re.search(rb"(?i)log[^\n]{0,3}: *$|ogin: *$", said):
                self._log_in()
            elif re.search(rb"(?i)ssword: *$|passw[^\n]{0,3}: *$", said):
                self.port.write(b"\n")
                self._read(wait_s=3.0)
            elif said.strip():
                return
        raise LinkError(
            f"{self.link}: nothing answers on that line", "is it the console, is the board on, is the rate right (?baud=115200)?"
        )

    def _log_in(self) -> None:
        if not self.user:
            raise LinkError(
                f"{self.link}: the console asks for a login", "give a user: ?user=root (and its password: EDGESDK_SERIAL_PASSWORD)"
            )
        self._typed(self.user)
        said = self._read(re.compile(rb"(?i)passw|ssword|[#$] " + ASKS_SIZE + b"$"), 5.0)
        if re.search(rb"(?i)pass|word", said):
            self.port.write(self.password.encode() + b"\n")
            said = self._read(re.compile(rb"(?i)incorrect|ogin: *$|[#$] " + ASKS_SIZE + b"$"), 8.0)
            if b"incorrect" in said:
                raise DeviceError(
                    f"{self.link}: the console does not let {self.user} in",
                    "check user and password (?password_file=, EDGESDK_SERIAL_PASSWORD)",
                )

    def _typed(self, text: str) -> None:
        """Type a line; Enter is pressed once the echo is what was typed."""
        wanted = text.encode()
        for _ in range(TRIES):
            self.port.write(wanted)
            seen = self._read(re.compile(re.escape(wanted) + b"$"), 0.0)
            if seen.endswith(wanted):
                self.port.write(b"\n")
                return
            self.port.write(b"\x15")
            self._read()
        raise LinkError(
            f"{self.link}: what is typed there does not come back as it was", "something else may run on that console; or too much noise"
        )

    def _answers(self, text: str, pattern: bytes) -> re.Match[bytes] | None:
        """What a typed command printed, asked up to five times."""
        for _ in range(5):
            self._typed(text)
            if found := re.search(pattern, self._read(re.compile(pattern), 5.0)):
                return found
        return None

    def _started(self, session: int) -> bool:
        """Type the receiver, send it the program piece by piece, and hear the program answer."""
        code = b64encode(RECEIVER.encode()).decode()
        self._typed("S=")
        for i in range(0, len(code), 40):
            self._typed(f"S=${{S}}{code[i : i + 40]}")
        self._typed(f"stty raw -echo;{self.python} -c \"import base64;exec(base64.b64decode('$S'))\";stty sane;break")
        rest, there, silent, size = zlib.compress(program(session), 9), 0, 0, 96
        while there < len(rest) and silent < TRIES:
            self.port.write(piece(there, rest[there : there + size]))
            answer = self._read(re.compile(rb"got \d+ [0-9a-f]{8}"), 0.0 if there else 1.0)  # at first Python has to start
            counts = [int(n) for n, crc in re.findall(rb"got (\d+) ([0-9a-f]{8})", answer) if b"%08x" % zlib.crc32(n) == crc]
            silent, size = (0, min(96, size + 8)) if counts else (silent + 1, max(16, size // 2))
            there = max(counts, default=there)
        for _ in range(10):
            self.port.write(piece(-1, b"."))
            if self._taken_over(session):
                return True
        return False


def piece(offset: int, data: bytes) -> bytes:
    """A line that `RECEIVER` takes."""
    number = b"%d" % offset
    return b"\n%s %08x %s\n" % (number, zlib.crc32(number + data), b64encode(data))
