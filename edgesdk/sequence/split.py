"""One model on two machines: the encoder runs where there is power, its keys and values cross the link in few bits, the decoder runs here.

`Helper` answers calls of a bundle's methods over TCP, `Remote` asks it; both sides use the standard library and numpy only. Floats cross as
`bits`-bit integers on a grid per channel, entropy-coded (`edgesdk.packed`) where the link is slow, and only as many source positions as the mask lets through: the others
are never seen. A frame is 4 bytes of length, 4 of CRC-32, then a JSON header of one line and the arrays' bytes; all big-endian.

There is no authentication: a helper listens on this machine alone unless told otherwise; reach one elsewhere by `ssh -L 7070:127.0.0.1:7070`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .card import NAME, Card, SequenceError
from .programs import Run

LARGEST = 1 << 28
"""Bytes of one frame at most."""
SLOW = 150_000
"""Bytes a second: on a slower link entropy coding saves more time than it takes (about 0.5 µs a value on both sides, for 8 to 20% of the bytes)."""


class AwayError(SequenceError):
    """The other machine cannot be reached, or failed."""


class SplitError(Exception):
    """The other side is gone, is too slow, or sent what is no frame."""


def _entropy() -> Any:
    return importlib.import_module("edgesdk.packed.entropy" if __name__.startswith("edgesdk.") else "packed.entropy")


def pair_digest(read: Callable[[str], bytes]) -> str:
    """What two bundles must share to be halves of one model: the model's digest and the card. Their runtimes may differ."""
    model = json.loads(read("plan.json"))["digests"]["model"]
    return hashlib.sha256(str(model).encode() + read(NAME)).hexdigest()


def away(card: Card) -> list[str]:
    """The methods that a helper runs: those of an encoder that stands before a decoder."""
    return [n for n, m in card.methods.items() if m["role"] == "encode"] if card.cross else []


def quantized(array: Any, bits: int) -> tuple[Any, Any, Any]:
    """`array` float32 [rows, heads, positions, size] as int [same] with the middle and the step of each channel (float16 [rows, heads, 1, size])."""
    low, high = array.min(2, keepdims=True), array.max(2, keepdims=True)
    middle = ((low + high) / 2).astype(np.float16)
    most = _most(bits)
    reach = np.maximum(high - middle.astype(np.float32), middle.astype(np.float32) - low)
    step = np.maximum(reach / most, 1e-7).astype(np.float16)
    step = np.where(step == 0, np.float16(6e-8), step)
    codes = np.clip(np.rint((array - middle.astype(np.float32)) / step.astype(np.float32)), -most, most)
    return codes.astype(np.int8), middle, step


def encode_arrays(arrays: Sequence[Any], bits: int = 32, seen: int = 0, coded: bool = False) -> tuple[dict[str, Any], bytes]:
    """Arrays as a JSON-able head and bytes. float32 of four dimensions goes in `bits` (2…8; 32: as it is), its third dimension cut to `seen`
    positions where `seen` > 0; with `coded`, near the entropy of these integers."""
    heads: list[dict[str, Any]] = []
    parts, codes = [], []
    for a in arrays:
        a = np.ascontiguousarray(a)
        head: dict[str, Any] = {"dtype": a.dtype.str, "shape": list(a.shape)}
        if a.dtype == np.float32 and a.ndim == 4 and bits < 32:
            grid, middle, step = quantized(a[:, :, : seen or a.shape[2]], bits)
            head["seen"] = grid.shape[2]
            parts += [middle.tobytes(), step.tobytes()]
            codes.append(grid.reshape(-1))
        else:
            parts.append(a.tobytes())
        heads.append(head)
    about: dict[str, Any] = {"arrays": heads}
    if codes:
        numbers = (np.concatenate(codes).astype(np.int16) + _most(bits)).astype(np.uint8)
        stream = _entropy().rans_encode(numbers) if coded else None
        about |= {"bits": bits, "coded": stream is not None}
        parts.append(squeezed(numbers, bits) if stream is None else stream)
    return about, b"".join(parts)


def _most(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def squeezed(numbers: Any, bits: int) -> bytes:
    """uint8 below 2^bits, `bits` each."""
    return bytes(np.packbits(np.unpackbits(numbers[:, None], axis=1)[:, 8 - bits :]).tobytes())


def unsqueezed(data: bytes, bits: int, count: int) -> Any:
    """What `squeezed` made. Raises `SplitError`."""
    if len(data) * 8 < count * bits:
        raise SplitError("a frame ends too early")
    wide = np.zeros((count, 8), np.uint8)
    wide[:, 8 - bits :] = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    return np.packbits(wide, axis=1)[:, 0]


def decode_arrays(about: dict[str, Any], data: bytes) -> list[Any]:
    """What `encode_arrays` made. Raises `SplitError`."""
    at, arrays, waiting = 0, [], []

    def take(dtype: Any, shape: Sequence[int]) -> Any:
        nonlocal at
        count = int(np.prod(shape, dtype=np.int64))
        size = count * np.dtype(dtype).itemsize
        if count < 0 or at + size > len(data):
            raise SplitError("a frame ends too early")
        at += size
        return np.frombuffer(data, dtype, count, at - size).reshape(shape)

    for head in about["arrays"]:
        shape, dtype = tuple(int(n) for n in head["shape"]), np.dtype(str(head["dtype"]))
        if dtype.kind not in "iuf" or any(n < 0 for n in shape):
            raise SplitError(f"a frame holds an array of {dtype}")
        if "seen" not in head:
            arrays.append(take(dtype, shape).copy())
            continue
        rows, k, slots, size = shape
        seen = int(head["seen"])
        if not 0 <= seen <= slots or rows * k * slots * size * 4 > LARGEST:
            raise SplitError(f"a frame shows {seen} of {slots} positions")
        waiting.append((len(arrays), shape, seen, take(np.float16, (rows, k, 1, size)), take(np.float16, (rows, k, 1, size))))
        arrays.append(None)
    if waiting:
        bits, counts = int(about["bits"]), [s[0] * s[1] * seen * s[3] for _, s, seen, _, _ in waiting]
        numbers = _stream(bytes(data[at:]), bits, sum(counts), bool(about["coded"])).astype(np.float32) - _most(bits)
        start = 0
        for (place, shape, seen, middle, step), count in zip(waiting, counts):  # noqa: B905 (Python 3.9)
            whole = np.zeros(shape, np.float32)
            grid = numbers[start : start + count].reshape(shape[0], shape[1], seen, shape[3])
            whole[:, :, :seen] = grid * step.astype(np.float32) + middle.astype(np.float32)
            arrays[place], start = whole, start + count
    return arrays


def _stream(data: bytes, bits: int, count: int, coded: bool) -> Any:
    if not 2 <= bits <= 8:
        raise SplitError(f"a frame holds values of {bits} bits")
    if not coded:
        return unsqueezed(data, bits, count)
    try:
        return _entropy().rans_decode(data, count)
    except _entropy().PackedError as error:
        raise SplitError(str(error)) from None


def send(link: socket.socket, header: dict[str, Any], data: bytes = b"") -> int:
    """One frame; how many bytes it took."""
    body = json.dumps(header).encode() + b"\n" + data
    frame = struct.pack(">II", len(body), zlib.crc32(body)) + body
    link.sendall(frame)
    return len(frame)


def receive(link: socket.socket) -> tuple[dict[str, Any], bytes, int]:
    """One frame's header and arrays, and its length in bytes. Raises `SplitError`."""
    size, crc = struct.unpack(">II", _exactly(link, 8))
    if size > LARGEST:
        raise SplitError(f"a frame of {size} bytes: more than {LARGEST}")
    body = _exactly(link, size)
    if zlib.crc32(body) != crc:
        raise SplitError("a frame was damaged on the way")
    line, _, data = body.partition(b"\n")
    try:
        header = json.loads(line)
    except ValueError:
        raise SplitError("a frame has no header") from None
    if not isinstance(header, dict):
        raise SplitError("a frame has no header")
    return header, data, size + 8


def _exactly(link: socket.socket, size: int) -> bytes:
    parts, left = [], size
    while left:
        try:
            part = link.recv(min(left, 1 << 20))
        except socket.timeout:  # noqa: UP041 (Python 3.9)
            raise SplitError("the other side does not answer") from None
        except OSError as error:
            raise SplitError(f"the link broke ({error})") from None
        if not part:
            raise SplitError("the other side hung up")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


class Helper:
    """Answers calls of `methods` through `run`; `digest` names the programs, so that two different bundles are never mixed.

    `with Helper(…) as helper:` serves in threads until the block ends; `helper.address` is where.
    """

    def __init__(
        self, run: Run, methods: Sequence[str], digest: str, host: str = "127.0.0.1", port: int = 0, timeout_s: float = 60.0
    ) -> None:
        self._run, self.methods, self.digest, self.timeout_s = run, tuple(methods), digest, timeout_s
        self._one, self._ended = threading.Lock(), threading.Event()
        self._listen = socket.create_server((host, port))
        self._listen.settimeout(0.2)
        self.address: tuple[str, int] = self._listen.getsockname()[:2]
        self.answered = 0

    def __enter__(self) -> Helper:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._ended.set()
        self._listen.close()

    def serve(self) -> None:
        """Accept until `close`."""
        while not self._ended.is_set():
            try:
                link, _ = self._listen.accept()
            except socket.timeout:  # noqa: UP041 (Python 3.9)
                continue
            except OSError:
                return
            threading.Thread(target=self._talk, args=(link,), daemon=True).start()

    def _talk(self, link: socket.socket) -> None:
        with link:
            link.settimeout(self.timeout_s)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                send(link, {"edgesdk": "split", "digest": self.digest, "methods": self.methods})
                while not self._ended.is_set():
                    self._answer(link)
            except (SplitError, OSError):
                return  # the asker is gone, or sends what is no frame

    def _answer(self, link: socket.socket) -> None:
        header, data, _ = receive(link)
        method, bits = str(header.get("method")), int(header.get("wanted_bits", 32))
        try:
            if method not in self.methods:
                raise ValueError(f"no method '{method}' here; known: {', '.join(self.methods)}")
            arrays = decode_arrays(header, data)
            with self._one:
                began = time.perf_counter()
                out = [np.asarray(a) for a in self._run(method, arrays)]
                seconds = time.perf_counter() - began
        except Exception as error:
            send(link, {"error": str(error).splitlines()[0] if str(error) else type(error).__name__})
            return
        about, body = encode_arrays(out, bits, int(header.get("seen", 0)), bool(header.get("code")))
        self.answered += 1
        send(link, {**about, "run_s": seconds}, body)


class Remote:
    """`run` in which the methods that the helper has run there and all others here. Raises `SequenceError` where it cannot be reached or has
    other programs."""

    def __init__(self, address: tuple[str, int], digest: str, here: Run, bits: int = 8, timeout_s: float = 30.0) -> None:
        if bits not in (*range(2, 9), 32):
            raise SequenceError(f"{bits} bits over the link", "2 to 8, or 32 for floats as they are")
        self._here, self.bits, self.where = here, bits, f"{address[0]}:{address[1]}"
        self.sent_bytes = self.received_bytes = 0
        self._code = False
        self.wait_s = self.run_s = 0.0  # of all calls over the link; `run_s` is the other machine's part of it
        try:
            self._link = socket.create_connection(address, timeout_s)
        except OSError as error:
            raise AwayError(f"the helper at {self.where} cannot be reached ({error})", "start it: edgesdk serve BUNDLE") from None
        self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = self._guard(lambda: receive(self._link))[0]
        if hello.get("edgesdk") != "split":
            self.close()
            raise SequenceError(f"what listens at {self.where} is no helper", "start one: edgesdk serve BUNDLE")
        if hello.get("digest") != digest:
            self.close()
            raise SequenceError(f"the helper at {self.where} serves another bundle", "give both sides the same bundle")
        self.methods = tuple(hello.get("methods", ()))

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (SplitError, OSError) as error:
            self.close()
            raise AwayError(f"the helper at {self.where}: {error}", "look at the link and at the helper, and run again") from None

    def __call__(self, method: str, arrays: Sequence[Any]) -> Sequence[Any]:
        if method not in self.methods:
            return self._here(method, arrays)
        began = time.perf_counter()
        seen = int((np.asarray(arrays[1]) == 0).sum(1).max()) if len(arrays) == 2 else 0
        about, body = encode_arrays(arrays)
        call = {"method": method, "wanted_bits": self.bits, "seen": seen, "code": self._code, **about}
        self.sent_bytes += self._guard(lambda: send(self._link, call, body))
        header, data, size = self._guard(lambda: receive(self._link))
        if "error" in header:
            raise AwayError(
                f"the helper at {self.where}: {header['error']}", "run the command again; if it stays, look at the helper's bundle"
            )
        waited, ran = time.perf_counter() - began, float(header.get("run_s", 0.0))
        out = self._guard(lambda: decode_arrays(header, data))
        self.received_bytes += size
        self.wait_s, self.run_s = self.wait_s + time.perf_counter() - began, self.run_s + ran
        self._code = self._code or size / max(waited - ran, 1e-9) < SLOW
        return list(out)

    @property
    def told(self) -> dict[str, Any]:
        """Of all calls so far."""
        return {
            "bits": self.bits,
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "wait_s": self.wait_s,
            "run_s": self.run_s,
        }

    def close(self) -> None:
        self._link.close()
