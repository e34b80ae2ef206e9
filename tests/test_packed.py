"""Packed weights and programs: what is written is read back, counted, near the entropy, and refused when damaged."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgesdk.packed import Code, decode, pack, rotate, unpack
from edgesdk.packed.difference import base_of, expand_difference
from edgesdk.packed.entropy import PackedError, pack_bytes, pack_chunks, rans_decode, rans_encode, unpack_bytes, unpack_chunks
from edgesdk.packed.matrices import TRELLIS, to_trellis
from edgesdk.packed.program import Piece, expand_program, expand_to, is_packed, pack_program

NONE = np.zeros(0, np.uint8)


def grid(rng: np.random.Generator, rows: int, cols: int, bits: int, group: int) -> Code:
    groups = -(-cols // group) if group else 1
    arrays = (rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8), rng.random((rows, groups)).astype(np.float16), NONE)
    return Code("grid", (rows, cols), (bits, group), arrays)


@pytest.mark.parametrize("count", [1, 2, 7, 600, 4096, 50_001])
@pytest.mark.parametrize("top", [1, 2, 16, 256])
def test_entropy_coding_round_trip(count: int, top: int) -> None:
    q = np.random.default_rng(count + top).integers(0, top, count).astype(np.uint8)
    data = rans_encode(q)
    assert data is not None and np.array_equal(rans_decode(data, count), q)


def test_entropy_coding_comes_near_the_entropy() -> None:
    q = np.clip(np.round(np.random.default_rng(0).standard_normal(200_000) * 1.5) + 4, 0, 7).astype(np.uint8)
    p = np.bincount(q) / q.size
    entropy = -(p * np.log2(p)).sum()
    assert len(rans_encode(q) or b"") * 8 / q.size < entropy * 1.01


@pytest.mark.parametrize("rows, cols, bits, group", [(3, 5, 4, 0), (8, 70, 3, 32), (1, 1, 8, 0), (64, 64, 2, 16)])
@pytest.mark.parametrize("entropy", [True, False])
def test_grids_round_trip_odd_groups_too(rows: int, cols: int, bits: int, group: int, entropy: bool) -> None:
    code = grid(np.random.default_rng(1), rows, cols, bits, group)
    again = unpack(pack(code, entropy))
    assert np.array_equal(decode(again), decode(code)) and decode(again).dtype == np.float32
    assert pack(again, entropy) == pack(code, entropy)


def test_trees_round_trip() -> None:
    rng = np.random.default_rng(2)
    mask = (rng.random((6, 40)) < 0.1).astype(np.uint8)
    values = Code("dense", (1, int(mask.sum())), (), (rng.standard_normal((1, int(mask.sum()))).astype(np.float16),))
    low = Code("lowrank", (6, 40), (), (), (grid(rng, 6, 2, 8, 0), grid(rng, 2, 40, 8, 0)))
    table = Code(
        "table",
        (6, 40),
        (2, 8),
        (rng.integers(0, 4, (6, 40)).astype(np.uint8), rng.random((6, 4)).astype(np.float16), rng.random((6, 5)).astype(np.float16)),
    )
    vector = Code(
        "vector", (6, 40), (4, 0), (rng.integers(0, 256, (6, 10)).astype(np.uint8), rng.random((256, 4)).astype(np.float16), NONE)
    )
    scaled = Code("scaled", (6, 40), (), (rng.random(6).astype(np.float16), NONE), (vector,))
    turned = Code("hadamard", (6, 40), (5, 8), (), (grid(rng, 6, 40, 4, 0),))
    order = rng.permutation(40).astype(np.uint16)
    picked = Code("pick", (6, 40), (1,), (order,), (Code("stack", (6, 40), (1,), (), (grid(rng, 6, 30, 4, 0), grid(rng, 6, 10, 8, 0))),))
    tree = Code("sum", (6, 40), (), (), (Code("sparse", (6, 40), (), (mask,), (values,)), low, table, scaled, turned, picked))
    assert np.array_equal(decode(unpack(pack(tree))), decode(tree))
    difference = Code("sum", (6, 40), (), (), (Code("base", (6, 40)), low))
    assert np.allclose(decode(unpack(pack(difference)), np.ones((6, 40))), 1 + decode(low))
    with pytest.raises(PackedError, match="base"):
        decode(difference)


def test_ternary_takes_a_fifth_of_a_byte() -> None:
    q = np.random.default_rng(0).integers(0, 3, (100, 100)).astype(np.uint8)
    code = Code("grid", (100, 100), (2, 0), (q, np.ones((100, 1), np.float16), NONE))
    assert len(pack(code, entropy=False)) < 100 * 100 / 5 + 200 + 40


def test_rotation_is_orthonormal() -> None:
    w = np.random.default_rng(0).standard_normal((4, 96)).astype(np.float32)
    assert np.allclose(rotate(rotate(w, 3, 32), 3, 32, back=True), w, atol=1e-5)
    assert np.allclose(np.linalg.norm(rotate(w, 3, 32), axis=1), np.linalg.norm(w, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    "raw", [b"", b"a", b"abc" * 1000, np.random.default_rng(0).standard_normal(30_000).astype(np.float32).tobytes(), bytes(2_000_000)]
)
def test_bytes_round_trip(raw: bytes) -> None:
    assert unpack_bytes(pack_bytes(raw, 4)) == raw


def test_exponents_of_floats_are_coded() -> None:
    raw = (np.random.default_rng(0).standard_normal(100_000) * 0.05).astype(np.float32).tobytes()
    assert len(pack_bytes(raw, 4)) < 0.87 * len(raw)


def bfloat16(count: int, seed: int = 0) -> bytes:
    values = (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


@pytest.mark.parametrize("width, dtype", [(2, "<u2"), (4, "<u4")])
def test_any_bits_of_floats_come_back(width: int, dtype: str) -> None:
    rng = np.random.default_rng(1)
    odd = np.array([0, 1, 2**15, 2**15 + 1, 0x7F80, 0xFF80, 0x7FC1, 0x7C00, 0xFC01], dtype)  # zeros, denormals, infinities, NaNs
    for raw in (np.tile(odd, 40).tobytes(), rng.bytes(1001 * width), rng.bytes(999) + b"x", bfloat16(4096) + np.tile(odd, 5).tobytes()):
        assert unpack_bytes(pack_bytes(raw, width)) == raw
        assert len(pack_bytes(raw, width)) < len(raw) + 12


def test_a_third_of_bfloat16_is_saved() -> None:
    raw = bfloat16(400_000)
    values = np.frombuffer(raw, np.uint8).reshape(-1, 2)
    exponent = ((values[:, 1].astype(int) << 1) | (values[:, 0] >> 7)) & 255
    share = np.bincount(exponent) / len(exponent)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() / 8
    assert len(pack_bytes(raw, 2)) / len(raw) < (entropy + 1) / 2 + 0.003 < 0.668


def test_bytes_stream_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgesdk.packed.entropy.CHUNK", 1 << 17)
    raw = bfloat16(300_000)
    stored = b"".join(pack_chunks(io.BytesIO(raw).read, len(raw), 2))
    assert len(stored) < 0.68 * len(raw)
    source, at = io.BytesIO(stored), 0
    for chunk in unpack_chunks(source.read):
        assert chunk == raw[at : at + len(chunk)] and len(chunk) <= 1 << 17
        at += len(chunk)
        assert source.tell() <= 0.7 * at + 100  # not one chunk is read ahead
    assert at == len(raw)
    with pytest.raises(PackedError):
        list(pack_chunks(io.BytesIO(raw[:900]).read, 901, 2))


def test_a_program_is_expanded_into_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    code, scales = grid(rng, 8, 36, 4, 0), rng.random(8).astype("<f4")
    piece = Piece(50, code, (8, 36), (0, 1))
    rows = Piece(50 + piece.size, code, (8, 36), (0, 1), "int8-row", 50 + piece.size + 8 * 36)  # its scales come after it
    program = rng.bytes(50) + piece.content() + rows.content(scales) + scales.tobytes() + bytes(3_000)
    stored = tmp_path / "packed"
    stored.write_bytes(pack_program(program, [rows, piece]))
    with stored.open("rb") as source, (tmp_path / "program").open("w+b") as target:
        expand_to(source.read, target)
    assert (tmp_path / "program").read_bytes() == program == expand_program(stored.read_bytes())


def test_a_program_expands_to_the_same_bytes() -> None:
    rng = np.random.default_rng(3)
    code = grid(rng, 8, 36, 4, 0)
    piece = Piece(0, code, (8, 4, 3, 3), (0, 2, 3, 1))
    q8 = Code("grid", (8, 36), (8, 0), (rng.integers(1, 256, (8, 36)).astype(np.uint8), np.zeros(0, np.float16), NONE))
    ints = Piece(0, q8, (8, 36), (0, 1), "int8")
    head, middle, tail = rng.bytes(100), rng.bytes(31), rng.bytes(57)
    program = head + piece.content() + middle + ints.content() + tail
    pieces = [Piece(100, code, piece.shape, piece.axes), Piece(100 + len(piece.content()) + 31, q8, ints.shape, ints.axes, "int8")]
    packed = pack_program(program, pieces)
    assert is_packed(packed) and not is_packed(program) and expand_program(packed) == program and len(packed) < len(program)
    with pytest.raises(PackedError, match="does not hold"):
        pack_program(program, [Piece(99, code, piece.shape, piece.axes)])


def test_damage_is_refused_and_nothing_else_is_raised() -> None:
    rng = np.random.default_rng(4)
    code = grid(rng, 8, 36, 4, 12)
    program = rng.bytes(64) + Piece(64, code, (8, 36), (0, 1)).content() + bytes(500)
    packed = pack_program(program, [Piece(64, code, (8, 36), (0, 1))])
    for cut in range(0, len(packed), 7):
        with pytest.raises(PackedError):
            expand_program(packed[:cut])
    for at in range(8, len(packed), 5):
        damaged = bytearray(packed)
        damaged[at] ^= 1 + at % 255
        with contextlib.suppress(PackedError):  # or the changed bit does not matter
            assert expand_program(bytes(damaged)) == program
    with pytest.raises(PackedError):
        unpack(pack(code) + b"x")


@pytest.mark.parametrize("rows, cols", [(1, 130), (130, 1), (16, 8), (97, 131)])
@pytest.mark.parametrize("spread", [0.4, 3.0, 300.0])
def test_matrices_of_unequal_rows_and_columns_round_trip_in_few_bytes(rows: int, cols: int, spread: float) -> None:
    rng = np.random.default_rng(rows)
    v = np.rint(rng.standard_normal((rows, cols)) * spread * np.exp(0.8 * rng.standard_normal(cols)))
    q = (v - v.min()).astype(np.uint16)
    code = Code("grid", q.shape, (13, 0), (q, NONE, NONE))
    assert np.array_equal(unpack(pack(code)).arrays[0], q)
    if rows * cols > 10_000 and spread < 100:
        assert len(pack(code)) < 0.97 * len(rans_encode(q.ravel()) or b"")


def test_a_trellis_is_seen_and_a_damaged_one_refused() -> None:
    rng = np.random.default_rng(0)
    k = np.rint(rng.standard_normal((80, 40)) * 2).astype(np.int64)
    v, state, following = np.empty_like(k), np.zeros(40, np.intp), np.array(TRELLIS)
    for i in range(80):
        v[i] = 2 * k[i] - (state >> 1) * np.sign(k[i])
        state = following[state, k[i] & 1]
    found = to_trellis(v)
    assert found is not None and np.array_equal(found[0], k)
    code = Code("grid", v.shape, (8, 0), ((v + 128).astype(np.uint8), NONE, NONE))
    data = pack(code)
    assert np.array_equal(unpack(data).arrays[0], code.arrays[0]) and len(data) * 8 / v.size < np.log2(np.abs(v).max() * 2 + 1) - 1
    for at in range(20, len(data), 97):
        with contextlib.suppress(PackedError):
            unpack(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])


def test_what_earlier_versions_wrote_is_read_as_before() -> None:
    """tests/packed_before.json: one of every way to write an array, a packed program and a difference to it, written before packed/ was a folder."""

    def arrays(code: Code) -> bytes:
        return b"".join(a.tobytes() for a in code.arrays) + b"".join(arrays(part) for part in code.parts)

    stored = json.loads((Path(__file__).parent / "packed_before.json").read_text())
    data = {name: base64.b64decode(entry["bytes"]) for name, entry in stored.items()}
    found = {name: arrays(unpack(b)) for name, b in data.items() if name not in ("program", "difference")}
    found["program"] = expand_program(data["program"])
    found["difference"] = expand_difference(data["difference"], found["program"])
    assert base_of(data["difference"]) == "base.pte"
    for name, content in found.items():
        assert hashlib.sha256(content).hexdigest().startswith(stored[name]["sha256"]), name
    for name in ("dense", "modelled", "trellis", "ternary", "pattern", "sum"):
        assert pack(replace(unpack(data[name]))) == data[name], name  # and is written so still


@pytest.mark.parametrize("shape", [(900,), (70, 40), (260, 190)])
def test_few_lanes_are_coded_as_many_are(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """Short arrays go through Python's integers, long ones through numpy; both write and read the same bytes."""
    q = np.clip(np.rint(np.random.default_rng(3).standard_normal(shape) * 2 + 8), 0, 15).astype(np.uint8)
    code = Code("dense", shape, (), (q,))
    stored = []
    for few in (1, 2000):
        for module in ("entropy", "matrices"):
            monkeypatch.setattr(f"edgesdk.packed.{module}.FEW", few)
        stored.append(pack(code))
        assert all(np.array_equal(unpack(s).arrays[0], q) for s in stored)
    assert stored[0] == stored[1] and len(stored[0]) < q.size / 2 + 60


def test_a_code_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q = np.random.default_rng(4).integers(0, 16, (40, 40)).astype(np.uint8)
    code = Code("grid", q.shape, (4, 0), (q, np.ones((40, 1), np.float16), np.zeros(0, np.uint8)))
    stored = pack(code)
    monkeypatch.setattr("edgesdk.packed.pack_integers", None)
    assert pack(code) is pack(code) and pack(code) == stored and pack(unpack(stored)) == stored and pack(copy.deepcopy(code)) == stored
    with pytest.raises(TypeError):
        pack(replace(code, numbers=(4, 40)))  # another code
