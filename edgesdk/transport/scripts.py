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
    'for d in $(ls -t store 2>/dev/null); do [ -d "store/$d" ] || continue; g=; [ -f "store/$d/.good" ] && read -r g < "store/$d/.good"; '
    'if [ "$g" = "$d" ]; then g=good; else g=unchecked; fi; echo "store $d $g"; done; '
    'for a in $(ls -t agent 2>/dev/null); do echo "agent $a"; done; [ -f trusted ] && echo "trusted"; '
    '[ ! -f history ] || tail -n "$2" history | while IFS= read -r l; do printf "history %s\\n" "$l"; done; exit 0'
)
"""$1 root, $2 how much of the history → lines `current DIGEST`, `previous DIGEST`, `store DIGEST good|unchecked` and `agent DIGEST` (the newest first),
`trusted` if there are keys, `history LINE`. Good is what says so with its own name: a file that a power cut left empty says nothing."""

HASHES = 'cd "$1" 2>/dev/null || exit 0; shift; for f in "$@"; do [ -f "$f" ] && sha256sum "$f"; done; exit 0'
"""$1 folder, then names → `sha256  name` for those that are there."""

SHARE = 'mkdir -p "${2%/*}" && rm -f "$2" && { ln "$1" "$2" 2>/dev/null || cp "$1" "$2"; }'
"""$1 a file that is there, $2 where it is wanted too."""

_FLUSH = 'LC_ALL=C; export LC_ALL; flush() { sync -f "$@" 2>/dev/null || sync; }; '
"""The file systems that hold these are on the disk, with all that was written before and the folders it is in; all of them where `sync` knows no -f."""

LINK = (
    _FLUSH + 'd=${2%/*}; flush "$d"; rm -f "$2.new" && ln -s "$1" "$2.new" && { mv -T -f "$2.new" "$2" 2>/dev/null || '
    '"$3" -c "import os, sys; os.replace(sys.argv[1], sys.argv[2])" "$2.new" "$2" 2>/dev/null || { rm -f "$2" && mv "$2.new" "$2"; }; } && '
    'flush "$d"'
)
"""$1 target, $2 link, $3 python: the link is made aside and renamed over the old one, so a reader sees the old or the new. What it leads to is on
the disk before, and it itself behind. Where neither `mv -T` nor python is (an old Android) it takes two moves, and a power cut between them is what
the history undoes."""

ACTIVATE = _FLUSH + 'flush "$1"; rm -rf "$2" && mv "$1" "$2" && flush "${2%/*}"'
"""What was sent is on the disk before it gets its name: after a power cut a bundle in the store is whole."""

GOOD = _FLUSH + 'printf "%s\\n" "$2" | cat > "$1/.good.new" && mv -f "$1/.good.new" "$1/.good" && flush "$1"'
"""$1 a bundle's folder, $2 its digest."""

RECORD = (
    _FLUSH + 'h=$1/history; mkdir -p "$1" || exit 73; '
    '[ ! -f "$h" ] || [ "$(wc -l < "$h")" -lt 400 ] || { tail -n 200 "$h" > "$h.new" && mv -f "$h.new" "$h"; } || exit 74; '
    '[ -z "$(tail -c 1 "$h" 2>/dev/null)" ] || echo >> "$h"; l="$2 $(date -u +%Y-%m-%dT%H:%M:%SZ) $3 $4 $5 $6"; '
    'c=$(printf %s "$l" | sha256sum | cut -c 1-16); printf "%s %s\\n" "$c" "$l" | cat >> "$h" && flush "$h"'
)
"""$1 root, $2 number, $3 action, $4 digest, $5 signer, $6 result: one line more, `CHECK NUMBER TIME ACTION DIGEST SIGNER RESULT`, where CHECK begins
the sha256 of the rest; behind a line that a power cut tore a new one is begun. Half of 400 lines are forgotten."""

REMOVE = (
    'LC_ALL=C; export LC_ALL; for d; do [ -e "$d" ] || continue; '
    'case $d in *.gone) ;; *) rm -rf "$d.gone"; mv "$d" "$d.gone" || exit 74; d=$d.gone;; esac; rm -rf "$d" || exit 74; done'
)
"""Each is given another name first: what a power cut leaves of it is no bundle."""
SUITS = 'p=$1; shift; exec "$p" "$@"'
"""$1 python, then what it is to do."""
UNLINK = 'rm -f "$@"'
FREE = 'd=$1; while [ ! -d "$d" ]; do case "$d" in /*/*|[!/]*/*) d=${d%/*};; /*) d=/;; *) d=.;; esac; done; df -Pk "$d"'
"""$1 a folder that may not be there yet → the disk it is or will be on."""


def script(name: str, text: str, *args: str) -> tuple[str, ...]:
    """The argument tuple that runs `text` as `edgesdk-NAME` with `args`."""
    return ("sh", "-c", text, f"edgesdk-{name}", *args)
