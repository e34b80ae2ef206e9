"""A device over ssh, through the user's own OpenSSH client: their config, keys, agent and jump hosts hold.

    ssh://[user@]host[:port][?identity=FILE&root=FOLDER&python=PATH&known_hosts=FILE]

`EDGESDK_SSH_OPTIONS` (split like a shell does) is put before our own options; in ssh the first value given wins.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
from urllib.parse import parse_qs

from edgesdk.errors import InputError, LinkError, MissingTool, UnknownName
from edgesdk.transport.base import PipeTransport, Result, split_link

DEFAULTS = (
    "BatchMode=yes",  # a password prompt would hang a script
    "ConnectTimeout=10",
    "StrictHostKeyChecking=accept-new",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "LogLevel=ERROR",
)
QUERY = ("identity", "root", "python", "known_hosts")

CAUSES = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key has changed",
        "set up anew? then ssh-keygen -R {name}; if not, someone may be in between",
    ),
    ("Host key verification failed", "its host key is not trusted", "connect once with `ssh {target}` and check the key"),
    (
        "Permission denied",
        "it does not let this user in",
        "wrong key or user, not a wrong host: try `ssh {target}`; ?identity=FILE picks a key",
    ),
    ("Too many authentication failures", "it does not let this user in", "too many keys were offered: ?identity=FILE picks one"),
    ("Connection refused", "nothing listens on that port", "the machine is up; check the port and that sshd runs there"),
    ("Could not resolve hostname", "no such host", "check the name; names come from DNS, mDNS (.local) or ~/.ssh/config"),
    ("No route to host", "it cannot be reached", "check cable, Wi-Fi and address, and that it is switched on"),
    ("Network is unreachable", "it cannot be reached", "this machine has no route to that network"),
    ("timed out", "no answer", "check address and port, that it is switched on, and that no firewall is in between"),
    ("Identity file", "the identity file cannot be read", "give a private key that exists: ?identity=FILE"),
)


class SshTransport(PipeTransport):
    """Each command is one `ssh`; they share one connection (ControlMaster) while this object is open."""

    def __init__(self, link: str) -> None:
        url = split_link(link, "ssh://user@host:22")
        query = {k: v[-1] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        for name in query:
            if name not in QUERY:
                raise UnknownName("ssh option", name, QUERY)
        try:
            port = url.port
        except ValueError:
            raise InputError(f"{link}: the port is not a number", "write it like ssh://user@host:22") from None
        if not url.hostname or url.password or url.path not in ("", "/"):
            raise InputError(f"{link}: not an ssh link", "write it like ssh://user@host:22?identity=~/.ssh/id_ed25519")
        if url.hostname.startswith("-") or (url.username or "").startswith("-"):
            raise InputError(f"{link}: a name may not begin with '-'", "write it like ssh://user@host:22")
        if shutil.which("ssh") is None:
            raise MissingTool("the program 'ssh' is not installed", "apt install openssh-client")
        self.name = url.hostname
        self.link = link.split("?")[0]
        self.root = query.get("root", ".edgesdk")  # relative: to the user's home there
        self.python = query.get("python", "python3")
        self._target = f"{url.username}@{self.name}" if url.username else self.name
        self._control: str | None = tempfile.mkdtemp(prefix="edgesdk-ssh-")
        self._options = self._build(port, query)

    def _build(self, port: int | None, query: dict[str, str]) -> tuple[str, ...]:
        options = shlex.split(os.environ.get("EDGESDK_SSH_OPTIONS", ""))
        if port:
            options += ["-p", str(port)]
        if "identity" in query:
            path = os.path.expanduser(query["identity"])
            if not os.path.isfile(path):
                raise InputError(f"{path}: no such identity file", "give a private key that exists: ?identity=FILE")
            options += ["-i", path, "-o", "IdentitiesOnly=yes"]
        if "known_hosts" in query:
            options += ["-o", f"UserKnownHostsFile={os.path.expanduser(query['known_hosts'])}"]
        for value in (*DEFAULTS, "ControlMaster=auto", "ControlPersist=60", f"ControlPath={self._control}/c"):
            options += ["-o", value]
        return tuple(options)

    def _argv(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        return ("ssh", "-T", *self._options, "--", self._target, shlex.join(argv))

    def _own(self, result: Result) -> Result:
        if result.code != 255 and result.code >= 0:
            return result
        text = result.err.decode(errors="replace")
        for sign, what, hint in CAUSES:
            if sign in text:
                raise LinkError(f"{self.link}: {what}", hint.format(name=self.name, target=self._target))
        last = f" ({result.complaint})" if text.strip() else ""
        raise LinkError(f"{self.link}: the link broke{last}", "run the same command again: a transfer resumes where it stopped")

    def close(self) -> None:
        if self._control is None:
            return
        import subprocess

        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            argv = ("ssh", *self._options, "-O", "exit", "--", self._target)
            if os.path.exists(f"{self._control}/c"):
                subprocess.run(argv, capture_output=True, timeout=5, check=False)
        shutil.rmtree(self._control, ignore_errors=True)
        self._control = None
