"""A board with MCUboot and an SMP server on a pseudo-terminal: two slots, trials that fall back, uploads that go on where they stopped.

Frames and bodies are those of the `smp` package; the port is a link that a pulled plug removes and a replaced one sets anew.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import select
import struct
import threading
import time
import tty
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cbor2
from smp import packet
from smp.header import Header

IMG, OS = 1, 0
BUFFER = 384


def signed_image(
    body: bytes, version: tuple[int, int, int] = (1, 0, 0), signature: int | None = 0x22, protected: bytes = b"", flags: int = 0
) -> bytes:
    """An image as imgtool makes them, by MCUboot's published form (the signature's bytes mean nothing)."""
    fields = struct.pack("<HH", 0x6908, 4 + len(protected)) + protected if protected else b""
    head = struct.pack("<IIHHIIBBHII", 0x96F3B83D, 0, 32, len(fields), len(body), flags, *version, 0, 0)
    hashed = head + body + fields
    more = struct.pack("<HH", 0x10, 32) + hashlib.sha256(hashed).digest()
    if signature is not None:
        more += struct.pack("<HH", signature, 8) + b"S" * 8
    return hashed + struct.pack("<HH", 0x6907, 4 + len(more)) + more


@dataclass
class Slot:
    version: str
    digest: bytes
    signed: bool = True


@dataclass
class Faults:
    lose_requests: set[int] = field(default_factory=set)  # by number: they never arrive
    lose_answers: set[int] = field(default_factory=set)
    spoil_answers: set[int] = field(default_factory=set)
    unplug_at: int | None = None  # offset of an upload at which the plug is pulled, for `away_s`
    away_s: float = 0.3
    mute: bool = False  # the image on trial never answers
    falls_after: float | None = None  # seconds after which the image on trial restarts the board
    deaf: bool = False  # no SMP server at all
    error: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)  # (group, command) → body of the answer
    writes_wrong: bool = False


class SmpBoard:
    """`with SmpBoard(folder) as board:` smpclient talks to `board.port`."""

    def __init__(self, folder: Path, faults: Faults | None = None) -> None:
        self.port, self.faults = str(folder / "ttyACM0"), faults or Faults()
        self.slots: list[Slot | None] = [Slot("0.9.0", b"\x01" * 32), None]
        self.confirmed, self.pending = True, False
        self.upload, self.sha, self.length, self.received = b"", b"", 0, 0
        self.frames = self.starts = 0
        self._fall_at: float | None = None
        self._back_at: float | None = None
        self._master = self._slave = -1

    def __enter__(self) -> SmpBoard:
        self._plug()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        self._unplug()

    def _plug(self) -> None:
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.symlink(os.ttyname(self._slave), self.port)

    def _unplug(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.port)
        for handle in (self._slave, self._master):
            if handle >= 0:
                os.close(handle)
        self._master = self._slave = -1

    def _serve(self) -> None:
        held = b""
        decoder: Any = None
        while not self._over.is_set():
            now = time.monotonic()
            if self._back_at is not None and now > self._back_at:
                self._back_at = None
                self._plug()
            if self._fall_at is not None and now > self._fall_at:
                self.restart()
            if self._master < 0 or not select.select([self._master], [], [], 0.02)[0]:
                time.sleep(0.005 if self._master < 0 else 0)
                continue
            held += os.read(self._master, 4096)
            while b"\n" in held and self._master >= 0:
                line, _, held = held.partition(b"\n")
                try:
                    if line[:2] == packet.START_DELIMITER:
                        decoder = packet.decode()
                        next(decoder)
                    if decoder is not None:
                        decoder.send(line + b"\n")
                except StopIteration as whole:
                    decoder = None
                    self._hear(whole.value)

    def restart(self) -> None:
        """What MCUboot does at a start."""
        self._fall_at = None
        self.starts += 1
        if self.pending and self.slots[1] is not None:
            self.pending = False
            if not self.slots[1].signed:
                self.slots[1] = None
                return
            self.slots.reverse()
            self.confirmed = False
            if self.faults.falls_after is not None:
                self._fall_at = time.monotonic() + self.faults.falls_after
        elif not self.confirmed:
            self.slots.reverse()
            self.confirmed = True

    def _hear(self, frame: bytes) -> None:
        self.frames += 1
        number = self.frames
        if number in self.faults.lose_requests or self.faults.deaf or (self.faults.mute and not self.confirmed):
            return
        head = Header.loads(frame[: Header.SIZE])
        body = self._do(head.group_id, head.command_id, head.op.value, cbor2.loads(frame[Header.SIZE :]))
        if self._master < 0 or number in self.faults.lose_answers:
            return
        content = cbor2.dumps(body)
        answer = (
            struct.pack(
                "!BBHHBB", (head.op.value + 1) | (head.version.value << 3), 0, len(content), head.group_id, head.sequence, head.command_id
            )
            + content
        )
        for line in packet.encode(answer):
            spoiled = line[:9] + base64.b64encode(b"\0") + line[13:] if number in self.faults.spoil_answers else line
            os.write(self._master, spoiled)
        if (head.group_id, head.command_id) == (OS, 5):
            self.restart()

    def _do(self, group: int, command: int, op: int, body: dict[str, Any]) -> dict[str, Any]:
        if (group, command) in self.faults.error:
            return self.faults.error[group, command]
        known: dict[tuple[int, int], Callable[[dict[str, Any], int], dict[str, Any]]] = {
            (OS, 5): lambda body, op: {}, (OS, 6): lambda body, op: {"buf_size": BUFFER, "buf_count": 4},
            (IMG, 0): self._state, (IMG, 1): self._upload,
        }  # fmt: skip
        return known[group, command](body, op) if (group, command) in known else {"rc": 8}

    def _state(self, body: dict[str, Any], op: int) -> dict[str, Any]:
        if op == 2:
            slot = next((i for i, s in enumerate(self.slots) if s and s.digest == body.get("hash")), None)
            if slot is None:
                return {"err": {"group": IMG, "rc": 8}}
            if slot == 0 and body.get("confirm"):
                self.confirmed, self._fall_at = True, None
            elif slot == 1:
                self.pending = True
        first, second = self.slots
        images = []
        if first:
            images.append({"slot": 0, "version": first.version, "hash": first.digest, "bootable": True, "pending": False,
                           "confirmed": self.confirmed, "active": True, "permanent": False})  # fmt: skip
        if second:
            images.append({"slot": 1, "version": second.version, "hash": second.digest, "bootable": True, "pending": self.pending,
                           "confirmed": not self.confirmed, "active": False, "permanent": False})  # fmt: skip
        return {"images": images, "splitStatus": 0}

    def _upload(self, body: dict[str, Any], op: int) -> dict[str, Any]:
        if body["off"] == 0:
            if body.get("sha") != self.sha or not self.upload:
                self.sha, self.length, self.upload = body["sha"], body["len"], b""
                self.slots[1] = None
            elif self.upload:
                return {"off": len(self.upload)}
        if body["off"] != len(self.upload):
            return {"off": len(self.upload)}
        if self.faults.unplug_at is not None and body["off"] >= self.faults.unplug_at:
            self.faults.unplug_at = None
            self._unplug()
            self._back_at = time.monotonic() + self.faults.away_s
            return {}
        self.upload += body["data"]
        self.received += len(body["data"])
        if len(self.upload) < self.length:
            return {"off": len(self.upload)}
        content, done = (self.upload if not self.faults.writes_wrong else self.upload[:-40] + bytes(40)), len(self.upload)
        at = 32 + struct.unpack_from("<I", content, 12)[0] + struct.unpack_from("<H", content, 10)[0]
        version = struct.unpack_from("<BBH", content, 20)
        self.slots[1] = Slot(
            ".".join(map(str, version)), content[at + 8 : at + 40], signed=len(content) > at + 40 and not self.faults.writes_wrong
        )
        self.upload = b""
        return {"off": done, "match": hashlib.sha256(content).digest() == self.sha} if not self.faults.writes_wrong else {"off": done}
