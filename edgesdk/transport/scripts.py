"""The few fixed shell scripts a device must run; plain `sh` with cat, wc, sha256sum, mkdir, mv, ln, rm: busybox is enough.

Arguments are positional (`$1` …), never pasted into the text. `$0` is the script's name, so that a fake device knows what is asked.
"""

from __future__ import annotations

SIZE = '[ -f "$1" ] && wc -c < "$1" || echo 0'

RECEIVE = (
    'LC_ALL=C; export LC_ALL; case "$1" in */*) mkdir -p "${1%/*}" || exit 73;; esac; '
    '[ "$4" -gt 0 ] || rm -f "$1.part"; cat >> "$1.part" || exit 74; '
    'n=$(wc -c < "$1.part"); [ "$n" -eq "$2" ] || exit 66; '
    's=$(sha256sum < "$1.part"); [ "${s%% *}" = "$3" ] || { rm -f "$1.part"; echo "got ${s%% *}" >&2; exit 65; }; '
    'mv -f "$1.part" "$1"'
)
"""$1 file, $2 its size in bytes, $3 its sha256, $4 bytes already there. 65 wrong digest, 66 cut short (kept), 73/74 cannot write."""

SURVEY = (
    'cd "$1" 2>/dev/null || exit 0; for s in current previous; do '
    '[ -e "$s/manifest.json" ] && d=$(cd -P "$s" && pwd -P) && echo "$s ${d##*/}"; done; '
    'for d in store/*; do [ -d "$d" ] || continue; if [ -f "$d/.good" ]; then g=good; else g=unchecked; fi; '
    'echo "store ${d#store/} $g"; done'
)
"""$1 root → lines `current DIGEST`, `previous DIGEST`, `store DIGEST good|unchecked`."""

HASHES = 'cd "$1" 2>/dev/null || exit 0; shift; for f in "$@"; do [ -f "$f" ] && sha256sum "$f"; done; exit 0'
"""$1 folder, then names → `sha256  name` for those that are there."""

SHARE = 'mkdir -p "${2%/*}" && rm -f "$2" && { ln "$1" "$2" 2>/dev/null || cp "$1" "$2"; }'
"""$1 a file that is there, $2 where it is wanted too."""

LINK = (
    'sync; rm -f "$2.new" && ln -s "$1" "$2.new" && { mv -T -f "$2.new" "$2" 2>/dev/null || '
    '"$3" -c "import os, sys; os.replace(sys.argv[1], sys.argv[2])" "$2.new" "$2"; } && sync'
)
"""$1 target, $2 link, $3 python: the link is made aside and renamed over the old one, so a reader sees the old or the new. What it leads to is on
the disk before, and it itself behind."""

ACTIVATE = 'sync; rm -rf "$2" && mv "$1" "$2" && sync'
"""What was sent is on the disk before it gets its name: after a power cut a bundle in the store is whole."""
REMOVE = 'rm -rf "$@"'
UNLINK = 'rm -f "$@"'
FREE = 'd=$1; while [ ! -d "$d" ]; do case "$d" in /*/*|[!/]*/*) d=${d%/*};; /*) d=/;; *) d=.;; esac; done; df -Pk "$d"'
"""$1 a folder that may not be there yet → the disk it is or will be on."""


def script(name: str, text: str, *args: str) -> tuple[str, ...]:
    """The argument tuple that runs `text` as `edgesdk-NAME` with `args`."""
    return ("sh", "-c", text, f"edgesdk-{name}", *args)
