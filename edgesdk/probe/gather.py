"""Ask a device for its texts: through the agent where there is Python, else by one plain shell script."""

from __future__ import annotations

from edgesdk.agent.client import Agent, require_python
from edgesdk.agent.look import COMMANDS, FILES, FOLDERS, PROGRAMS
from edgesdk.errors import DeviceError, LinkError
from edgesdk.transport.base import Transport
from edgesdk.transport.scripts import script

MARK = "@edgesdk@ "
LOOK = (
    "LC_ALL=C; export LC_ALL; d=$1; m=$2; p=$3; f=$4; shift 4; "
    'while [ ! -d "$d" ]; do case "$d" in /*/*|[!/]*/*) d=${d%/*};; /*) d=/;; *) d=.;; esac; done; '
    'echo "$m!df"; df -Pk "$d" 2>/dev/null || df -k "$d" 2>/dev/null; '
    '[ -w "$d" ] && printf "\\n$m!writable\\nyes\\n" || printf "\\n$m!writable\\nno\\n"; '
    'for n in $p; do w=$(command -v "$n" 2>/dev/null); for x in $f; do [ -z "$w" ] && [ -x "$x/$n" ] && w="$x/$n"; done; '
    '[ -n "$w" ] && printf "\\n$m!program %s\\n%s\\n" "$n" "$w"; done; '
    'for c in "$@"; do case "$c" in '
    '!*) n=${c%%=*}; set -f; set -- ${c#*=}; set +f; command -v "$1" >/dev/null 2>&1 && { printf "\\n$m%s\\n" "$n"; "$@" 2>/dev/null </dev/null; };; '
    '*) for x in $c; do [ -f "$x" ] && [ -r "$x" ] && { printf "\\n$m%s\\n" "$x"; cat "$x" 2>/dev/null; }; done;; esac; done; exit 0'
)
"""$1 edgesdk's folder, $2 the mark of a new text, $3 programs to look for, $4 folders of them, then patterns of files and `!name=command …`."""
LOOK_S = 120.0


def texts_of(transport: Transport, python: str | None = None) -> tuple[dict[str, str], str]:
    """(texts by name, "agent" or "shell"). Raises `LinkError`, and `DeviceError` where neither Python nor a shell answers."""
    try:
        require_python(transport, python or transport.python)
    except LinkError:
        raise
    except DeviceError:
        if python is not None:  # asked for by name
            raise
        return by_shell(transport), "shell"
    with Agent(transport, python) as agent:
        texts = agent.ask("look", root=transport.root)["texts"]
    return {str(name): str(text) for name, text in texts.items()}, "agent"


def by_shell(transport: Transport) -> dict[str, str]:
    """The same by a plain shell (the one of busybox or toybox is enough)."""
    commands = [f"!{name}={' '.join(argv)}" for name, argv in COMMANDS.items()]
    asked = script("look", LOOK, transport.root, MARK, " ".join(PROGRAMS), " ".join(FOLDERS), *commands, *FILES)
    return split(transport.must(asked, "reading what it is", timeout=LOOK_S).out)


def split(out: bytes) -> dict[str, str]:
    """What `LOOK` wrote, by name."""
    text = out.decode(errors="replace").replace("\0", " ")
    parts = (part.partition("\n") for part in ("\n" + text).split("\n" + MARK)[1:])
    return {name.strip(): body.strip() for name, _, body in parts if body.strip()}
