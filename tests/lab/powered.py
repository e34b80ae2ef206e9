"""A disk that loses in a power cut what it was never told to keep: a block device over NBD whose write cache is volatile.

What the machine wrote is on the disk for good once it asked for a flush (or wrote with FUA), as on a drive with a write cache. `power_cut` keeps each
512-byte sector that was written since then or loses it, by a coin: in any order, as a drive may.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import IO

SECTOR = 512
_OPTION_MAGIC = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_INFO, _ACK, _UNSUPPORTED = 3, 1, 0x80000001
_GO, _ABORT = 7, 2
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_FUA = 1
_FLAGS = 1 | 4 | 8  # has flags, can flush, knows FUA


class Disk:
    """An empty ext4 of `size` ("48M"), served at `socket` until `close`."""

    def __init__(self, folder: Path, size: str, seed: int = 0) -> None:
        image = folder / "data.img"
        with image.open("wb") as file:
            file.truncate(int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]])
        subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image)], check=True)
        self._kept = bytearray(image.read_bytes())
        image.unlink()
        self._now, self._cached = bytearray(self._kept), set[int]()  # what is read, and the sectors of it that are in the cache alone
        self._coin = random.Random(seed)
        self.lost = self.flushes = 0
        self.path = folder / "disk.sock"
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def drive(self) -> str:
        """As qemu's -drive takes it; a flush of the guest's comes here."""
        return f"file=nbd+unix:///?socket={self.path},format=raw,cache=writeback"

    def power_cut(self) -> None:
        """Lose about half of what was in the cache alone."""
        with self._lock:
            for sector in self._cached:
                place = slice(sector * SECTOR, (sector + 1) * SECTOR)
                if self._coin.random() < 0.5:
                    self._kept[place] = self._now[place]
                else:
                    self.lost += 1
            self._cached.clear()
            self._now[:] = self._kept

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                with client, contextlib.suppress(OSError, EOFError), client.makefile("rwb") as pipe:
                    if self._greet(pipe):
                        self._serve(pipe)

    def _greet(self, pipe: IO[bytes]) -> bool:
        """The handshake (fixed newstyle); False: the client went again."""
        pipe.write(b"NBDMAGIC" + _OPTION_MAGIC + struct.pack(">H", 3))
        pipe.flush()
        _take(pipe, 4)
        while True:
            magic, option, length = struct.unpack(">8sII", _take(pipe, 16))
            assert magic == _OPTION_MAGIC
            _take(pipe, length)

            def reply(kind: int, data: bytes = b"", option: int = option) -> None:
                pipe.write(struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data)) + data)

            if option == _GO:
                reply(_INFO, struct.pack(">HQH", 0, len(self._now), _FLAGS))
            reply(_ACK if option in (_GO, _ABORT) else _UNSUPPORTED)
            pipe.flush()
            if option in (_GO, _ABORT):
                return option == _GO

    def _serve(self, pipe: IO[bytes]) -> None:
        while True:
            _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", _take(pipe, 28))
            data = _take(pipe, length) if kind == _WRITE else b""
            if kind == _DISCONNECT:
                return
            with self._lock:
                out = self._do(kind, flags, offset, length, data)
            known = kind in (_READ, _WRITE, _FLUSH)
            pipe.write(struct.pack(">IIQ", 0x67446698, 0 if known else 22, cookie) + out)
            pipe.flush()

    def _do(self, kind: int, flags: int, offset: int, length: int, data: bytes) -> bytes:
        sectors = range(offset // SECTOR, (offset + length) // SECTOR)
        if kind == _READ:
            return bytes(self._now[offset : offset + length])
        if kind == _WRITE:
            self._now[offset : offset + length] = data
            if flags & _FUA:
                self._kept[offset : offset + length] = data
                self._cached.difference_update(sectors)
            else:
                self._cached.update(sectors)
        elif kind == _FLUSH:
            self.flushes += 1
            for sector in self._cached:
                place = slice(sector * SECTOR, (sector + 1) * SECTOR)
                self._kept[place] = self._now[place]
            self._cached.clear()
        return b""


def _take(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if data is None or len(data) < count:
        raise EOFError
    return data
