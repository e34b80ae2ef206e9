"""A byte stream that arrives whole over a line that loses and spoils bytes. Goes to the device as it is: standard library, Python 3.9 and later.

A frame is one line of text, `~BASE64\\n`, of kind, session, the offset of its bytes in the stream, the offset that is wanted next, data, and a
CRC-32 of all that. A line keeps the order of what passes, so that a frame is known to be lost as soon as a later one was acknowledged; only the
last ones wait for a clock. Frames shrink while they are lost and grow while they arrive: with 1% of all bytes spoiled the best are of about 30 bytes.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib

HEADER = struct.Struct(">BHII")
DATA, ACK, RESET, BYE = range(4)
DEVICE = 128
"""Added to the kind of what the device sends: a terminal that echoes is not taken for it."""
LEAST, MOST = 24, 512
"""Bytes of data in a frame."""
WINDOW = 2048
"""Bytes on their way: a terminal's own buffer holds 4096."""
FAR = 1 << 16
RANGES = 16
"""Stretches beyond the wanted byte that an acknowledgement names."""
KEEP_S = 3.0


def frame(kind: int, session: int, offset: int = 0, wanted: int = 0, data: bytes = b"") -> bytes:
    body = HEADER.pack(kind, session, offset, wanted) + data
    return b"~" + base64.b64encode(body + struct.pack(">I", zlib.crc32(body))) + b"\n"


def parse(line: bytes) -> tuple[int, int, int, int, bytes] | None:
    """Kind, session, offset, wanted, data of a line without its end; None where it is spoiled or none of ours."""
    try:
        body = base64.b64decode(line[line.rindex(b"~") + 1 :].rstrip(b"\r"), validate=True)
    except (ValueError, binascii.Error):
        return None
    if len(body) < HEADER.size + 4 or zlib.crc32(body[:-4]) != struct.unpack(">I", body[-4:])[0]:
        return None
    kind, session, offset, wanted = HEADER.unpack(body[: HEADER.size])
    return kind, session, offset, wanted, body[HEADER.size : -4]


class Line:
    """One end. `feed` takes what came, `frames` gives what is to be sent now; time comes from outside."""

    def __init__(self, session: int, side: int = 0) -> None:
        """`side`: `DEVICE` there, 0 here."""
        self.session, self.side = session, side
        self.received = bytearray()  # in order, for `take`
        self.reset: int | None = None  # a session that the other end asks for
        self.heard = 0.0  # when the last good frame came
        self.ended = False  # the other end said goodbye
        self._raw = bytearray()
        self._wanted, self._held, self._owe = 0, {}, False  # type: int, dict[int, bytes], bool
        self._out, self._base, self._next = bytearray(), 0, 0  # bytes from offset `_base` on; `_next` is new
        self._flying: list[list[float]] = []  # number, first, end, time
        self._lost: list[tuple[int, int]] = []
        self._number, self._size, self._wait, self._round, self._said = 0, 128, 1.0, 0.0, 0.0

    @property
    def pending(self) -> int:
        """Bytes that were written and are not acknowledged."""
        return len(self._out)

    @property
    def acknowledged(self) -> int:
        return self._base

    def write(self, data: bytes) -> None:
        self._out += data

    def take(self) -> bytes:
        """What has come, in order."""
        data = bytes(self.received)
        self.received.clear()
        return data

    # ---- what comes

    def feed(self, raw: bytes, now: float) -> None:
        self._raw += raw
        *lines, rest = bytes(self._raw).split(b"\n")
        self._raw = bytearray(rest[-4 * MOST :])
        for line in lines:
            found = parse(line)
            if found is None:
                continue
            kind, session, offset, wanted, data = found
            if kind & DEVICE == self.side:
                continue
            kind &= ~DEVICE
            if kind == RESET:
                self.reset, self._owe = session, True
            if session != self.session:
                continue
            self.heard = now
            if kind == BYE:
                self.ended = True
            elif kind in (DATA, ACK):
                self._acknowledge(wanted, data if kind == ACK else b"", now)
                if kind == DATA and data:
                    self._keep(offset, data)

    def _keep(self, offset: int, data: bytes) -> None:
        self._owe = True
        if offset > self._wanted + FAR:
            return
        if len(self._held.get(offset, b"")) < len(data):
            self._held[offset] = data
        for at in sorted(self._held):
            if at > self._wanted:
                break
            part = self._held.pop(at)[self._wanted - at :]
            self.received += part
            self._wanted += len(part)

    def _acknowledge(self, wanted: int, ranges: bytes, now: float) -> None:
        if not self._base <= wanted <= self._next:
            return
        del self._out[: wanted - self._base]
        self._base = wanted
        there = [(0, wanted)]
        for i in range(0, len(ranges) - 3, 4):
            first, length = struct.unpack_from(">HH", ranges, i)
            there.append((wanted + first, wanted + first + length))
        newest, left = 0.0, []
        for one in self._flying:
            if any(first <= one[1] and one[2] <= end for first, end in there):
                if one[0] > newest:
                    newest, self._round = one[0], now - one[3]
                self._size = min(MOST, self._size + max(1, self._size // 16))
                self._wait = max(0.2, 2 * self._round + 0.1)
            else:
                left.append(one)
        seen = there[-1][1] if len(there) > RANGES else self._next  # what lies beyond the last of them may have come, too
        gone = [one for one in left if one[0] < newest and one[2] <= seen]
        self._flying = [one for one in left if one not in gone]
        self._lose(gone)
        self._lost = [(max(a, wanted), b) for a, b in self._lost if b > wanted]

    def _lose(self, gone: list[list[float]]) -> None:
        for one in gone:
            self._lost.append((int(one[1]), int(one[2])))
            self._size = max(LEAST, int(0.7 * self._size))
        self._lost.sort()

    # ---- what goes

    def frames(self, now: float) -> bytes:
        late = [one for one in self._flying if now - one[3] > self._wait]
        if late:
            self._flying = [one for one in self._flying if now - one[3] <= self._wait]
            self._lose(late)
            self._wait = min(4.0, 2 * self._wait)
        out = bytearray()
        while sum(one[2] - one[1] for one in self._flying) < WINDOW:
            if self._lost:
                first, end = self._lost.pop(0)
                if end > first + self._size:
                    self._lost.insert(0, (first + self._size, end))
                    end = first + self._size
            elif self._next < self._base + len(self._out):
                first, end = self._next, min(self._next + self._size, self._base + len(self._out))
                self._next = end
            else:
                break
            self._number += 1
            self._flying.append([self._number, first, end, now])
            out += frame(DATA | self.side, self.session, first, self._wanted, bytes(self._out[first - self._base : end - self._base]))
        if (self._owe and (self._held or not out)) or now - self._said > KEEP_S:
            out += self._ack()
        if out:
            self._owe, self._said = False, now
        return bytes(out)

    def _ack(self) -> bytes:
        """What is wanted next, and the first stretches that came beyond it."""
        found: list[list[int]] = []
        for at, data in sorted(self._held.items()):
            if found and at <= found[-1][1]:
                found[-1][1] = max(found[-1][1], at + len(data))
            else:
                found.append([at, at + len(data)])
        parts = [struct.pack(">HH", a - self._wanted, b - a) for a, b in found[:RANGES] if b - self._wanted < FAR]
        return frame(ACK | self.side, self.session, 0, self._wanted, b"".join(parts))
