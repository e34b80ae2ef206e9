"""The loader in an ESP32's ROM, and esptool's flasher behind it, on a pseudo-terminal: enough of the published serial protocol for the real esptool.

Flash is as flash is: erasing sets bits, writing clears them. Faults: noise, silence, a plug that is pulled, cells that do not hold.
"""

from __future__ import annotations

import hashlib
import os
import random
import select
import struct
import threading
import tty
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from esptool.targets import CHIP_DEFS

END, ESC = b"\xc0", b"\xdb"
FLASH_ID = {4 << 20: 0x1640EF, 16 << 20: 0x1840EF}
"""As the bytes ef 40 16: maker, kind, log2 of the size."""


@dataclass
class Faults:
    """What goes wrong."""

    silent: bool = False
    noise: float = 0.0  # share of the bytes from the chip that are other ones, once it writes
    unplug_at_block: int | None = None
    worn: bool = False  # one bit of what is written does not hold
    no_flasher: bool = False  # what is loaded into memory does not start


class EspRom:
    """`with EspRom() as chip:` esptool talks to `chip.port`; `chip.flash` is what lies in flash."""

    def __init__(self, chip: str = "esp32", flash_bytes: int = 4 << 20, faults: Faults | None = None, secure: bool = False) -> None:
        self.cls, self.flash, self.faults = CHIP_DEFS[chip], bytearray(b"\xff" * flash_bytes), faults or Faults()
        self.secure = secure
        base = self.cls.SPI_REG_BASE
        self._cmd, self._usr2, self._w0 = base, base + self.cls.SPI_USR2_OFFS, base + self.cls.SPI_W0_OFFS
        self.regs: dict[int, int] = {}
        if self.cls.MAGIC_VALUE:
            self.regs[self.cls.CHIP_DETECT_MAGIC_REG_ADDR] = self.cls.MAGIC_VALUE
        self.stub = self._writing = False
        self.log: list[int] = []
        self._at = self._size = self._blocks = 0
        self._inflate: zlib._Decompress | None = None  # type: ignore[name-defined]
        self._random = random.Random(1)

    def __enter__(self) -> EspRom:
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.port = os.ttyname(self._slave)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        self._unplug()

    def _unplug(self) -> None:
        for handle in (self._slave, self._master):
            if handle >= 0:
                os.close(handle)
        self._slave = self._master = -1

    def _serve(self) -> None:
        held = b""
        while not self._over.is_set() and self._master >= 0:
            if not select.select([self._master], [], [], 0.05)[0]:
                continue
            held += os.read(self._master, 65536)
            while held.count(END) >= 2:
                _, packet, held = held.split(END, 2)
                packet = packet.replace(ESC + b"\xdc", END).replace(ESC + b"\xdd", ESC)
                if len(packet) >= 8 and packet[0] == 0:
                    op, size, check = struct.unpack_from("<BHI", packet, 1)
                    self._do(op, packet[8 : 8 + size], check)
                    if self._master < 0:
                        return

    def _send(self, packet: bytes) -> None:
        framed = END + packet.replace(ESC, ESC + b"\xdd").replace(END, ESC + b"\xdc") + END
        if self._writing and self.faults.noise:
            framed = bytes(self._random.randrange(256) if self._random.random() < self.faults.noise else b for b in framed)
        if not self.faults.silent and self._master >= 0:
            os.write(self._master, framed)

    def _answer(self, op: int, value: int = 0, data: bytes = b"", error: int = 0) -> None:
        data += struct.pack("BB", bool(error), error) + (b"" if self.stub else b"\0\0")
        self._send(struct.pack("<BBHI", 1, op, len(data), value) + data)

    def _do(self, op: int, data: bytes, check: int) -> None:
        self.log.append(op)
        known: dict[int, Callable[[bytes, int], None]] = {
            0x02: self._begin, 0x03: self._block, 0x08: self._sync, 0x06: self._run, 0x09: self._write_reg, 0x0A: self._read_reg,
            0x0E: self._read_slow, 0x13: self._md5,
        }  # fmt: skip
        if self.stub:
            known |= {0x10: self._begin, 0x11: self._deflated, 0xD2: self._read}
        if op in known:
            known[op](data, check)
        elif op == 0x14 and not self.cls.USES_MAGIC_VALUE:
            self._answer(op, 0, struct.pack("<IB7sII", 4 if self.secure else 0, 0, bytes(7), self.cls.IMAGE_CHIP_ID, 0))
        elif op in (0x04, 0x05, 0x07, 0x0B, 0x0D, 0x0F, 0x12):
            self._answer(op)
        else:
            for _ in range(8):
                self._answer(0xFF, error=5)

    def _sync(self, data: bytes, check: int) -> None:
        self.stub = self._writing = False  # the chip was reset before
        for _ in range(8):
            self._answer(0x08, 0x20120707)

    def _read_reg(self, data: bytes, check: int) -> None:
        self._answer(0x0A, self.regs.get(struct.unpack("<I", data[:4])[0], 0))

    def _write_reg(self, data: bytes, check: int) -> None:
        address, value = struct.unpack_from("<II", data)
        self.regs[address] = value
        if address == self._cmd and value & (1 << 18):
            command = self.regs.get(self._usr2, 0) & 0xFF
            self.regs[self._w0] = {0x9F: FLASH_ID[len(self.flash)], 0x5A: 0x50444653}.get(command, 0)
            self.regs[address] = 0
        self._answer(0x09)

    def _run(self, data: bytes, check: int) -> None:
        self._answer(0x06)
        if not self.faults.no_flasher:
            self.stub = True
            self._send(b"OHAI")

    def _begin(self, data: bytes, check: int) -> None:
        size, _, block, offset = struct.unpack_from("<IIII", data)
        self._at, self._size, self._blocks, self._writing = offset, block, 0, size > 0
        self._inflate = zlib.decompressobj()
        end = offset + -(-size // 4096) * 4096
        self.flash[offset:end] = b"\xff" * (min(end, len(self.flash)) - offset)
        self._answer(self.log[-1])

    def _store(self, at: int, data: bytes) -> None:
        self.flash[at : at + len(data)] = bytes(a & b for a, b in zip(self.flash[at : at + len(data)], data, strict=True))
        if self.faults.worn:
            self.flash[at] ^= 1

    def _piece(self, data: bytes, check: int) -> tuple[int, bytes] | None:
        """The number and content of a block; None if the plug was pulled or it was spoiled on its way."""
        size, number = struct.unpack_from("<II", data)
        self._blocks += 1
        if self._blocks == self.faults.unplug_at_block:
            self._unplug()
            return None
        piece = data[16 : 16 + size]
        total = 0xEF
        for b in piece:
            total ^= b
        if total != check:
            self._answer(self.log[-1], error=7)
            return None
        return number, piece

    def _block(self, data: bytes, check: int) -> None:
        if got := self._piece(data, check):
            self._store(self._at + got[0] * self._size, got[1])
            self._answer(0x03)

    def _deflated(self, data: bytes, check: int) -> None:
        if (got := self._piece(data, check)) and self._inflate:
            plain = self._inflate.decompress(got[1])
            self._store(self._at, plain)
            self._at += len(plain)
            self._answer(0x11)

    def _md5(self, data: bytes, check: int) -> None:
        address, size = struct.unpack_from("<II", data)
        digest = hashlib.md5(self.flash[address : address + size])
        self._answer(0x13, 0, digest.digest() if self.stub else digest.hexdigest().encode())

    def _read_slow(self, data: bytes, check: int) -> None:
        address, size = struct.unpack("<II", data)
        self._answer(0x0E, 0, bytes(self.flash[address : address + size]).ljust(64, b"\0"))

    def _read(self, data: bytes, check: int) -> None:
        address, size, block, _ = struct.unpack("<IIII", data)
        self._answer(0xD2)
        content = bytes(self.flash[address : address + size])
        for i in range(0, size, block):
            self._send(content[i : i + block])
        self._send(hashlib.md5(content).digest())


def partition_table(*rows: tuple[str, int, int, int, int], encrypted: str = "") -> bytes:
    """Label, type, subtype, offset, size → a table as it lies at 0x8000, closed by its MD5. `encrypted`: the label of one with that flag."""
    form = struct.Struct("<HBBII16sI")
    body = b"".join(form.pack(0x50AA, kind, sub, offset, size, name.encode(), name == encrypted) for name, kind, sub, offset, size in rows)
    return (body + b"\xeb\xeb" + b"\xff" * 14 + hashlib.md5(body).digest()).ljust(0xC00, b"\xff")
