"""An encoder elsewhere: what crosses the link, how few bits it takes, and what a bad link or helper does."""

from __future__ import annotations

import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from edgesdk.sequence.card import SequenceError
from edgesdk.sequence.split import Helper, Remote, SplitError, decode_arrays, encode_arrays, receive, send

SHAPE = (1, 2, 16, 8)  # rows, heads, source positions, size of a head


def cross(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(SHAPE) * rng.uniform(0.1, 3, (1, 2, 1, 8)) + 0.5).astype(np.float32)


def programs(method: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
    if method == "encode":
        return [cross(int(arrays[0][0, 0])), cross(7)]
    return [arrays[0] + 1]


@pytest.fixture
def helper() -> Iterator[Helper]:
    with Helper(programs, ["encode"], "abc") as one:
        yield one


def source(seen: int) -> list[np.ndarray]:
    mask = np.full((1, 16), -1e4, np.float32)
    mask[:, :seen] = 0
    return [np.full((1, 16), 3, np.int64), mask]


def test_floats_cross_as_they_are_and_other_methods_stay_here(helper: Helper) -> None:
    remote = Remote(helper.address, "abc", programs, bits=32)
    out = remote("encode", source(16))
    np.testing.assert_array_equal(out[0], cross(3))
    np.testing.assert_array_equal(remote("decode", [np.arange(3)])[0], np.arange(3) + 1)
    assert helper.answered == 1
    remote.close()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_few_bits_lose_no_more_than_half_a_step(bits: int) -> None:
    array = cross(1)
    sizes = []
    for coded in (False, True):
        about, data = encode_arrays([array, array[:, :1]], bits, coded=coded)
        (back, part) = decode_arrays(about, data)
        sizes.append(len(data))
        np.testing.assert_array_equal(part, back[:, :1])
    assert sizes[0] == 2 * 2 * (16 + 8) + -(-(256 + 128) * bits // 8), "bits, and the middle and step of each channel"
    span = array.max(2, keepdims=True) - array.min(2, keepdims=True)
    assert (np.abs(back - array) <= span / (2 ** (bits - 1) - 1) / 4 * 1.02 + 2e-3).all()


def test_bytes_on_the_link_fall_with_bits_and_with_what_is_seen(helper: Helper) -> None:
    took = {}
    for bits, seen in ((32, 16), (8, 16), (4, 16), (8, 4)):
        remote = Remote(helper.address, "abc", programs, bits=bits)
        out = remote("encode", source(seen))
        assert (out[0][:, :, seen:] == 0).all() or bits == 32
        took[bits, seen] = remote.received_bytes
        remote.close()
    assert took[8, 4] < took[8, 16] < took[32, 16] and took[4, 16] < took[8, 16]


def test_a_constant_channel_and_an_empty_array_come_back() -> None:
    array = np.zeros((1, 1, 5, 3), np.float32)
    array[..., 1] = 100.0
    about, data = encode_arrays([array, np.zeros((0, 4), np.float32)], 8)
    back = decode_arrays(about, data)
    np.testing.assert_allclose(back[0], array, atol=1e-3)
    assert back[1].shape == (0, 4)


def test_another_bundle_is_refused(helper: Helper) -> None:
    with pytest.raises(SequenceError, match="another bundle"):
        Remote(helper.address, "other", programs)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as spare:
        address = spare.getsockname()[:2]
    with pytest.raises(SequenceError, match="cannot be reached"):
        Remote(address, "abc", programs)


def test_bits_that_do_not_exist(helper: Helper) -> None:
    with pytest.raises(SequenceError, match="9 bits"):
        Remote(helper.address, "abc", programs, bits=9)


def test_what_fails_there_is_said_here(helper: Helper) -> None:
    remote = Remote(helper.address, "abc", programs)
    remote.methods = ("encode", "decode")
    with pytest.raises(SequenceError, match="no method 'decode' here"):
        remote("decode", [np.arange(3)])
    np.testing.assert_allclose(remote("encode", source(16))[1], cross(7), atol=0.05)  # the link goes on
    remote.close()


def _once(answer: bytes) -> tuple[str, int]:
    """A server that says hello, then `answer` to whatever is asked, and hangs up."""
    server = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        link, _ = server.accept()
        with link, server:
            send(link, {"edgesdk": "split", "digest": "abc", "methods": ["encode"]})
            link.recv(1 << 16)
            link.sendall(answer)

    threading.Thread(target=talk, daemon=True).start()
    return server.getsockname()[:2]


BODY = b'{"arrays": []}\n'


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "hung up"),
        (struct.pack(">II", len(BODY), 1) + BODY, "damaged"),
        (struct.pack(">II", 1 << 30, 1), "more than"),
        (struct.pack(">II", 4, zlib.crc32(b"ab\nc")) + b"ab\nc", "no header"),
        (struct.pack(">II", 100, 0) + b"abc", "hung up"),
    ],
)
def test_a_broken_link(answer: bytes, said: str) -> None:
    remote = Remote(_once(answer), "abc", programs)
    with pytest.raises(SequenceError, match=said):
        remote("encode", source(4))


def test_arrays_that_lie_about_their_size() -> None:
    with pytest.raises(SplitError, match="too early"):
        decode_arrays({"arrays": [{"dtype": "<f4", "shape": [1 << 40]}]}, b"abc")
    with pytest.raises(SplitError, match="array of"):
        decode_arrays({"arrays": [{"dtype": "|O8", "shape": [1]}]}, b"abcdefgh")
    about, data = encode_arrays([cross(1)], 4)
    with pytest.raises(SplitError, match="too early"):
        decode_arrays(about, data[:-1])
    about["arrays"][0]["seen"] = 99
    with pytest.raises(SplitError, match="99 of 16"):
        decode_arrays(about, data)
    about, data = encode_arrays([np.zeros((1, 2, 16, 8), np.float32)], 4, coded=True)
    with pytest.raises(SplitError):
        decode_arrays(about, data[:-3])


def test_entropy_coding_is_for_slow_links() -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal((1, 4, 256, 64)).astype(np.float32)
    plain, coded = (encode_arrays([array], 4, coded=c) for c in (False, True))
    assert len(coded[1]) < 0.92 * len(plain[1]) and coded[0]["coded"] and not plain[0]["coded"]
    np.testing.assert_array_equal(decode_arrays(*plain)[0], decode_arrays(*coded)[0])


def test_a_helper_lives_on_after_a_bad_asker(helper: Helper) -> None:
    with socket.create_connection(helper.address) as link:
        receive(link)
        link.sendall(b"GET / HTTP/1.1\r\n\r\n" * 3)
    time.sleep(0.05)
    remote = Remote(helper.address, "abc", programs)
    assert len(remote("encode", source(16))) == 2
    remote.close()
