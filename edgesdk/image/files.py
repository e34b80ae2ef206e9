"""Files put into the file systems of an image, without root and without mounting: `debugfs` for ext4, `mtools` for FAT."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from edgesdk.errors import CheckFailed, DeviceError, InputError, MissingTool
from edgesdk.image.partitions import Ext4, Partition
from edgesdk.transport.base import Blob
from edgesdk.units import show_bytes

PACKAGES = {"debugfs": "e2fsprogs", "e2fsck": "e2fsprogs", "mcopy": "mtools", "mdir": "mtools"}
SBIN = ("/usr/sbin", "/sbin")
SLACK_BLOCKS = 64
"""For what grows beside files: folders' blocks, extents' blocks."""


@dataclass(frozen=True)
class Owner:
    """User and group by number."""

    user: int = 0
    group: int = 0

    def __str__(self) -> str:
        return f"{self.user}:{self.group}"


ROOT_USER = Owner()


@dataclass(frozen=True)
class Folder:
    """A folder that is made if it is not there."""

    path: str
    owner: Owner = ROOT_USER
    mode: int = 0o755

    def __str__(self) -> str:
        return f"mkdir {self.path}  # {self.mode:o} {self.owner}"


@dataclass(frozen=True)
class File:
    """A file; what was there under its name is replaced."""

    path: str
    blob: Blob = field(compare=False)
    owner: Owner = ROOT_USER
    mode: int = 0o644

    def __str__(self) -> str:
        return f"put   {self.path}  # {show_bytes(self.blob.size_bytes)}, {self.mode:o} {self.owner}, sha256 {self.blob.sha256[:12]}…"


@dataclass(frozen=True)
class Symlink:
    """A symbolic link; what was there under its name is replaced."""

    path: str
    target: str

    def __str__(self) -> str:
        return f"link  {self.path} -> {self.target}"


Entry = Folder | File | Symlink


def tool(name: str) -> str:
    """Where a program is. Raises `MissingTool` with the package's name."""
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(SBIN))
    if not found:
        package = PACKAGES[name]
        raise MissingTool(f"the program '{name}' is not installed", f"apt install {package} (macOS: brew install {package})")
    return found


def _run(argv: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C", "DEBUGFS_PAGER": "__none__", "MTOOLS_SKIP_CHECK": "1"}
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, errors="replace", env=environment, check=False)


class ExtFiles:
    """The files of one ext4 file system inside an image; `shown` is what errors call it."""

    def __init__(self, image: Path, part: Partition, shown: Path | None = None) -> None:
        if "?" in str(image) or '"' in str(image):
            raise InputError(f"{image}: a '?' or a quote in the path", "e2fsprogs reads them as its own; rename the file or the folder")
        self.image, self.part = shown or image, part
        self._device = f"{image}?offset={part.start_bytes}" if part.start_bytes else str(image)

    def check(self) -> None:
        """Raises `CheckFailed` if `e2fsck` finds fault."""
        done = _run([tool("e2fsck"), "-fn", self._device])
        if done.returncode:
            faults = [line for line in done.stdout.splitlines() if line.strip() and not re.match(r"Pass \d|e2fsck ", line)]
            said = "; ".join(faults[:2]) or done.stderr.strip().splitlines()[-1:] or f"e2fsck ended with {done.returncode}"
            raise CheckFailed(
                f"{self.image}: {self.part} is damaged: {said}", "fetch the image again; `e2fsck -f` on the partition may repair it"
            )

    def exists(self, path: str) -> bool:
        return self.stat(path) is not None

    def stat(self, path: str) -> str | None:
        """What debugfs says of a path (links are not followed), or None if nothing is there."""
        shown = self._ask(f"stat {_quoted(path)}")
        return shown if shown.startswith("Inode:") else None

    def read(self, path: str) -> bytes:
        """A file's bytes; none if it is not there. Links are not followed."""
        with tempfile.TemporaryDirectory(prefix="edgesdk-") as folder:
            out = Path(folder, "out")
            self._ask(f"dump {_quoted(path)} {_quoted(str(out))}")
            return out.read_bytes() if out.exists() else b""

    def resolve(self, path: str) -> str:
        """The path with the links among its folders followed, as the running system would (`/lib/x` where `/lib` leads to `usr/lib`)."""
        done = PurePosixPath("/")
        for hops, name in enumerate(PurePosixPath(path).parts[1:]):
            done = done / name
            target = re.search(r'^Fast link dest: "(.*)"$', self.stat(str(done)) or "", re.MULTILINE)
            if target and hops < 40:
                done = PurePosixPath(os.path.normpath(done.parent / target[1]))
        return str(done)

    def put(self, entries: Sequence[Entry]) -> None:
        """Do them in order, then hold each against what is there. Raises `CheckFailed`."""
        with tempfile.TemporaryDirectory(prefix="edgesdk-") as folder:
            script = [line for i, e in enumerate(entries) for line in self._commands(e, Path(folder, str(i)))]
            complaints = self._script(script, write=True).stderr
            looks = [f"stat {_quoted(e.path)}" for e in entries]
            looks += [
                f"dump {_quoted(e.path)} {_quoted(str(Path(folder, f'{i}.back')))}" for i, e in enumerate(entries) if isinstance(e, File)
            ]
            shown = re.split(r"^debugfs: (?:stat|dump) .*\n", self._script(looks).stdout, flags=re.MULTILINE)[1:]
            said = [line for line in complaints.splitlines() if line.strip() and not line.startswith("debugfs ")]
            for i, entry in enumerate(entries):
                if i >= len(shown) or not _is(entry, shown[i], Path(folder, f"{i}.back")):
                    why = f" ({'; '.join(said[:2])})" if said else ""
                    raise CheckFailed(
                        f"{self.image}: {entry.path} did not get into {self.part}{why}", "the copy is not kept; try another image"
                    )

    def _script(self, lines: Sequence[str], write: bool = False) -> subprocess.CompletedProcess[str]:
        return _run([tool("debugfs"), *(["-w"] if write else []), "-f", "-", self._device], "\n".join(lines) + "\n")

    def _commands(self, entry: Entry, content: Path) -> list[str]:
        """debugfs's commands for one entry; `write` takes a name in the folder it is in."""
        path, name = _quoted(entry.path), _quoted(PurePosixPath(entry.path).name)
        if isinstance(entry, Folder):
            return [] if self.exists(entry.path) else [f"mkdir {path}", *_attributes(path, 0o040000 | entry.mode, entry.owner)]
        before = [f"rm {path}"] if self.exists(entry.path) else []
        if isinstance(entry, Symlink):
            return [*before, f"symlink {path} {_quoted(entry.target)}"]
        with entry.blob.open() as source, content.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        put = [f"cd {_quoted(str(PurePosixPath(entry.path).parent))}", f"write {_quoted(str(content))} {name}", "cd /"]
        return [*before, *put, *_attributes(path, 0o100000 | entry.mode, entry.owner)]

    def _ask(self, command: str) -> str:
        return _run([tool("debugfs"), "-R", command, self._device]).stdout


def _is(entry: Entry, shown: str, content: Path) -> bool:
    """Whether debugfs's `stat` shows this entry, with the content that was read back."""
    if isinstance(entry, Symlink):
        return f'"{entry.target}"' in shown
    found = re.search(r"Type: (\w+)\s+Mode:\s+(\d+).*?User:\s+(\d+)\s+Group:\s+(\d+)", shown, re.DOTALL)
    if found is None:
        return False
    if isinstance(entry, Folder):
        return found[1] == "directory"  # one that was there keeps its owner
    wanted = ("regular", f"{entry.mode:04o}", str(entry.owner.user), str(entry.owner.group))
    if found.groups() != wanted or not content.exists():
        return False
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.blob.sha256


def _attributes(path: str, mode: int, owner: Owner) -> list[str]:
    return [f"sif {path} mode 0{mode:o}", f"sif {path} uid {owner.user}", f"sif {path} gid {owner.group}"]


def _quoted(text: str) -> str:
    """A word for debugfs. Raises `InputError` for what its command line cannot hold."""
    if any(c in text for c in '"\n\r\0'):
        raise InputError(f"{text!r}: a quote or a line's end in a name", "give the file or the folder another name")
    return f'"{text}"'


def require_room(fs: Ext4, part: Partition, entries: Sequence[Entry], image: Path) -> None:
    """Raises `DeviceError` that says how much is missing. What is replaced is not counted as free."""
    block = fs.block_bytes
    needed = SLACK_BLOCKS + sum(-(-e.blob.size_bytes // block) if isinstance(e, File) else 1 for e in entries)
    if (missing := needed * block - fs.free_bytes) > 0:
        what = f"{image}: {part}: {show_bytes(needed * block)} needed, {show_bytes(fs.free_bytes)} free: {show_bytes(missing)} too little"
        raise DeviceError(what, "nothing was written; give a larger image, or a smaller bundle (`edgesdk plan --storage`)")
    if len(entries) > fs.free_inodes:
        raise DeviceError(f"{image}: {part}: {len(entries)} new files, room for {fs.free_inodes}", "give an image with more inodes")


class FatFiles:
    """The files of one FAT file system inside an image; `shown` is what errors call it."""

    def __init__(self, image: Path, part: Partition, shown: Path | None = None) -> None:
        self.image, self.part = shown or image, part
        self._device = f"{image}@@{part.start_bytes}"

    def free_bytes(self) -> int:
        """Raises `CheckFailed` if mtools cannot read it."""
        done = _run([tool("mdir"), "-i", self._device, "-a", "::/"])
        found = re.search(r"([\d ,]+) bytes free", done.stdout)
        if done.returncode or not found:
            raise CheckFailed(f"{self.image}: {self.part} cannot be read: {done.stderr.strip()[:200]}", "fetch the image again")
        return int(re.sub(r"\D", "", found[1]))

    def put(self, path: str, content: bytes) -> None:
        """A file, replaced if it is there. Raises `DeviceError` (no room) and `CheckFailed`."""
        if len(content) > self.free_bytes():
            what = f"{self.image}: {self.part}: {show_bytes(len(content))} needed for {path}, {show_bytes(self.free_bytes())} free"
            raise DeviceError(what, "give an image with a larger boot partition")
        with tempfile.TemporaryDirectory(prefix="edgesdk-") as folder:
            given, back = Path(folder, "given"), Path(folder, "back")
            given.write_bytes(content)
            done = _run([tool("mcopy"), "-i", self._device, "-o", "-n", str(given), f"::{path}"])
            _run([tool("mcopy"), "-i", self._device, "-n", f"::{path}", str(back)])
            if done.returncode or not back.exists() or back.read_bytes() != content:
                why = done.stderr.strip()[:200] or "it is not what was written"
                raise CheckFailed(
                    f"{self.image}: {path} did not get into {self.part}: {why}", "look at the folder's name; try another image"
                )
