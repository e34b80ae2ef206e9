"""Bytes in few bytes: rANS (range asymmetric numeral systems: Duda 2013, arXiv:1311.2540), interleaved over lanes so that numpy steps through all
at once, and any bytes in chunks of 4 MiB."""

from __future__ import annotations

import io
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

PROB_BITS = 14
LOW = 1 << 16  # rANS states stay in [2^16, 2^32)
FEW = 32  # lanes from which numpy is faster than Python's integers
CHUNK = 1 << 22


class PackedError(Exception):
    """What is read is no packed weight or program, or it was damaged."""


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    n = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise PackedError("packed weights end too early")
        byte = data[at]
        at += 1
        n |= (byte & 127) << shift
        if byte < 128:
            return n, at
        shift += 7


def read_number(read: Callable[[int], bytes]) -> int:
    """A varint from a stream."""
    n = shift = 0
    while True:
        byte = read(1)
        if not byte or shift > 63:
            raise PackedError("packed bytes end too early")
        n |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return n
        shift += 7


def _frequencies(symbols: Any) -> Any:
    """Counts of the symbols 0…max, scaled to a sum of 2^14, none that occurs below 1."""
    counts = np.bincount(symbols)
    total = 1 << PROB_BITS
    if np.count_nonzero(counts) > total // 2:
        return None
    scaled = np.maximum((counts * (total / counts.sum())).astype(np.int64), counts > 0)
    while scaled.sum() != total:  # the commonest symbols pay or get the rest
        order = np.argsort(-scaled)
        for i in order[: max(1, min(len(order), abs(int(scaled.sum()) - total)))]:
            if scaled.sum() == total:
                break
            scaled[i] += 1 if scaled.sum() < total else -1 if scaled[i] > 1 else 0
    return scaled


def lanes_of(count: int) -> int:
    return max(1, min(1024, count // 2048))


def rans_encode(symbols: Any, below: int | None = None) -> bytes | None:
    """Unsigned integers (1-D, below 2^16) → bytes near their entropy, with their table; None where that cannot be smaller, or than `below` bytes."""
    count = len(symbols)
    freq = _frequencies(symbols) if count else None
    if freq is None:
        return None
    used = np.flatnonzero(freq)
    table = varint(len(used)) + b"".join(varint(int(d)) for d in np.diff(used, prepend=0)) + b"".join(varint(int(n)) for n in freq[used])
    cum, lanes = np.concatenate([[0], np.cumsum(freq)[:-1]]), lanes_of(count)
    if below is not None:
        bits = float((np.bincount(symbols)[used] * (PROB_BITS - np.log2(freq[used]))).sum())
        if len(table) + 2 * lanes + 0.99 * bits / 8 > below:
            return None
    padded = np.full(-(-count // lanes) * lanes, int(np.argmax(freq)), np.int64)
    padded[:count] = symbols
    f, c = (a[padded][None] for a in (freq, cum))
    return table + encode_steps(f, c, lanes)


def encode_steps(f: Any, c: Any, lanes: int) -> bytes:
    """States and words of symbols with frequencies f and those of all smaller symbols c, int64 [rows, cols]; row by row, `lanes` columns at a step."""
    if lanes < FEW:
        return _encode_few(f, c, lanes)
    f, c = f.astype(np.uint64), c.astype(np.uint64)
    x, words = np.full(lanes, LOW, np.uint64), []
    up, down = np.uint64(PROB_BITS), np.uint64(16)
    for i in range(len(f) - 1, -1, -1):
        for start in range((f.shape[1] - 1) // lanes * lanes, -1, -lanes):
            fi, ci = f[i, start : start + lanes], c[i, start : start + lanes]
            part = x[: len(fi)]
            full = part >= (fi << np.uint64(32 - PROB_BITS))
            words.append((part[full] & np.uint64(0xFFFF)).astype("<u2"))
            part[full] >>= down
            part[:] = ((part // fi) << up) + part % fi + ci
    return bytes(x.astype("<u4").tobytes() + np.concatenate(words[::-1]).tobytes())


def _encode_few(f: Any, c: Any, lanes: int) -> bytes:
    """The same by Python's integers, which are faster than numpy's short arrays."""
    x, words = [LOW] * lanes, []
    for row in range(len(f) - 1, -1, -1):
        fs, cs = f[row].tolist(), c[row].tolist()
        for i in range(len(fs) - 1, -1, -1):
            n, state = fs[i], x[i % lanes]
            if state >= n << (32 - PROB_BITS):
                words.append(state & 0xFFFF)
                state >>= 16
            whole, rest = divmod(state, n)
            x[i % lanes] = (whole << PROB_BITS) + rest + cs[i]
    return np.array(x, "<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()


def rans_decode(data: bytes, count: int) -> Any:
    """The `count` symbols (uint16). Raises `PackedError` when the bytes are not whole."""
    n, at = read_varint(data, 0)
    pairs = []
    for _ in range(2 * n):
        value, at = read_varint(data, at)
        pairs.append(value)
    symbols, freq = np.cumsum(pairs[:n]).astype(np.uint16), np.array(pairs[n:], np.int64)
    if n == 0 or freq.sum() != 1 << PROB_BITS:
        raise PackedError("the table of an entropy-coded array is damaged")
    lanes = lanes_of(count)
    steps = -(-count // lanes)
    if len(data) < at + 4 * lanes or (len(data) - at) % 2:
        raise PackedError("an entropy-coded array is cut off")
    x, words = np.frombuffer(data, "<u4", lanes, at).astype(np.uint32), np.frombuffer(data, "<u2", -1, at + 4 * lanes)
    if lanes < FEW:
        states = x.tolist()
        places, read = decode_few(states, words.tolist(), 0, [0] * (steps * lanes), [(np.cumsum(freq) - freq).tolist()], [freq.tolist()])
        x = np.array(states)
    else:
        slots, read = _decode_steps(x, words, freq, steps)
        places = np.repeat(np.arange(n), freq)[slots.ravel()]
    if read != len(words) or not bool(np.all(x == LOW)):
        raise PackedError("an entropy-coded array is damaged")
    return symbols[places][:count]


def _decode_steps(x: Any, words: Any, freq: Any, steps: int) -> tuple[Any, int]:
    """The slots [steps, lanes] of symbols of one table, and how many words were read; the states x are changed."""
    lanes = len(x)
    f = np.repeat(freq, freq).astype(np.uint32)  # of every slot
    b = (np.arange(1 << PROB_BITS) - np.repeat(np.cumsum(freq) - freq, freq)).astype(np.uint32)
    words = np.concatenate([words, np.zeros(lanes, np.uint16)]).astype(np.uint32)
    slots, part, read = np.empty((steps, lanes), np.uint16), np.empty(lanes, np.uint32), 0
    mask, up, down = np.uint32((1 << PROB_BITS) - 1), np.uint32(PROB_BITS), np.uint32(16)
    for t in range(steps):
        low = x & mask
        slots[t] = low
        x >>= up
        x *= f.take(low, out=part, mode="clip")
        x += b.take(low, out=part, mode="clip")
        short = np.flatnonzero(x < LOW)
        k = len(short)
        if k:
            x[short] = (x[short] << down) | words[read : read + k]
            read += k
    return slots, read


def decode_few(
    x: list[int], words: list[int], read: int, tables: list[int], cum: list[list[int]], freq: list[list[int]]
) -> tuple[list[int], int]:
    """One row of what `encode_steps` coded, by Python's integers: the place of each symbol in its table, `tables` says which of `cum` and `freq`,
    and how many words were read then. Changes the states x. Raises `PackedError`."""
    lanes, out, mask = len(x), [], (1 << PROB_BITS) - 1
    for i, table in enumerate(tables):
        state = x[i % lanes]
        low = state & mask
        place = bisect_right(cum[table], low) - 1
        out.append(place)
        state = freq[table][place] * (state >> PROB_BITS) + low - cum[table][place]
        if state < LOW:
            if read == len(words):
                raise PackedError("an entropy-coded array is cut off")
            state = (state << 16) | words[read]
            read += 1
        x[i % lanes] = state
    return out, read


def pack_bytes(raw: bytes, width: int = 1) -> bytes:
    """Any bytes, losslessly. `width`: of the numbers that they are, 1 where they are none."""
    return b"".join(pack_chunks(io.BytesIO(raw).read, len(raw), width))


def pack_chunks(read: Callable[[int], bytes], total: int, width: int = 1) -> Iterator[bytes]:
    """What `pack_bytes` gives, piece by piece: `read(n)` is asked for the `total` bytes in chunks of 4 MiB. Each is stored by the best of raw,
    zlib, and rANS of every byte plane: of bytes, of numbers, of numbers turned left by a bit (which puts the whole exponent of a float32 or
    bfloat16 into one plane, and the sign beside the mantissa; ZipNN, arXiv:2411.05239, DFloat11, arXiv:2504.11651)."""
    yield varint(total)
    done = 0
    while done < total:
        chunk = read(min(CHUNK, total - done))
        if not chunk:
            raise PackedError("the bytes to pack end too early")
        done += len(chunk)
        ways = [b"\0" + chunk, b"\1" + zlib.compress(chunk, 9)]
        splits = {}
        for planes in sorted({1, width}):
            if planes <= 8 and len(chunk) % planes == 0 and len(chunk) >= 64 * planes:
                splits[1 + planes] = np.frombuffer(chunk, np.uint8).reshape(-1, planes).T
                if planes in (2, 4):
                    turned = _turned(np.frombuffer(chunk, f"<u{planes}"), 1)
                    splits[16 + planes] = turned.view(np.uint8).reshape(-1, planes).T
        if splits:
            way = min(splits, key=lambda w: sum(min(_entropy(p), 8.0) * p.size for p in splits[w]))
            ways.append(bytes([way]) + _pack_planes(splits[way]))
        best = min(ways, key=len)
        yield varint(len(best)) + best


def _turned(numbers: Any, left: int) -> Any:
    """Unsigned numbers with their bits turned left, little-endian."""
    bits = 8 * numbers.dtype.itemsize
    return ((numbers << left) | (numbers >> (bits - left))).astype(numbers.dtype)


def _entropy(plane: Any) -> float:
    """Bits a byte."""
    counts = np.bincount(plane)
    share = counts[counts > 0] / plane.size
    return float(-(share * np.log2(share)).sum())


def _pack_planes(planes: Any) -> bytes:
    """Each plane after its coded length; 0: as it is."""
    out = []
    for plane in planes:
        coded = rans_encode(plane) if _entropy(plane) < 7.98 else None
        out.append(varint(len(coded)) + coded if coded is not None and len(coded) < plane.size else varint(0) + plane.tobytes())
    return b"".join(out)


def unpack_bytes(data: bytes) -> bytes:
    """Raises `PackedError`."""
    return b"".join(unpack_chunks(io.BytesIO(data).read))


def unpack_chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """What was packed, in chunks of at most 4 MiB; `read(n)` gives the packed bytes. Needs memory for a few chunks. Raises `PackedError`."""
    total, done = read_number(read), 0
    while done < total:
        length, size = read_number(read), min(CHUNK, total - done)
        body = read(length) if length <= 2 * CHUNK else b""
        if len(body) < length or not body:
            raise PackedError("packed bytes end too early")
        if body[0] == 0:
            chunk = body[1:]
        elif body[0] == 1:
            try:
                chunk = zlib.decompressobj().decompress(body[1:], size)
            except zlib.error as error:
                raise PackedError(f"packed bytes are damaged: {error}") from None
        elif body[0] > 16:
            width = body[0] - 16
            if width not in (2, 4):
                raise PackedError("packed bytes are of another kind")
            chunk = _turned(np.frombuffer(_unpack_planes(body[1:], width, size), f"<u{width}"), 8 * width - 1).tobytes()
        else:
            chunk = _unpack_planes(body[1:], body[0] - 1, size)
        if len(chunk) != size:
            raise PackedError("packed bytes have the wrong length")
        done += size
        yield chunk


def _unpack_planes(body: bytes, planes: int, size: int) -> bytes:
    rows, at = np.empty((size // planes, planes), np.uint8), 0
    for i in range(planes):
        length, at = read_varint(body, at)
        taken = length or len(rows)
        part = body[at : at + taken]
        if len(part) < taken:
            raise PackedError("packed bytes end too early")
        rows[:, i] = rans_decode(part, len(rows)) if length else np.frombuffer(part, np.uint8)
        at += taken
    return rows.tobytes()
