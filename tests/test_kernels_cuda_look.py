"""What native programs need of CUDA beside products, and caches of a GPU's own: each against `kernels.reference` on a CPU, thread by thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgesdk.errors import InputError
from edgesdk.kernels import reference
from edgesdk.kernels.cuda import rows as of_rows
from edgesdk.kernels.cuda.linear import Linear
from edgesdk.kernels.cuda.look import HEADS, heads, heads_of, look
from edgesdk.kernels.cuda.machine import Machine, Memory
from edgesdk.sequence.caches import held
from tests.cuda_kernels import TOLERANCE, far, poisoned, weights

pytest_plugins = ["tests.cuda_fixture"]


def of_heads(rng: np.random.Generator, b: int, n: int, count: int, size: int) -> dict[str, Any]:
    x = rng.standard_normal((b * n, count * size + 8)).astype(np.float32)
    turns = tuple(f(rng.random((b * n, size // 2)) * 6).astype(np.float32) for f in (np.cos, np.sin))
    return {"x": x, "weight": rng.standard_normal(size).astype(np.float32), "turns": turns}


@pytest.mark.parametrize(("b", "n", "size"), [(1, 1, 64), (2, 3, 24), (1, 5, 40)])
def test_heads_of_three_are_split_normed_and_turned(machine: Machine, b: int, n: int, size: int) -> None:
    rng = np.random.default_rng(size)
    ways: tuple[dict[str, Any], ...] = ({"weight": True, "turns": True, "scale": 0.3}, {"turns": True}, {})
    parts, outs, wanted = [], [], []
    for count, ways_of in zip((6, 2, 2), ways, strict=True):
        made = of_heads(rng, b, n, count, size)
        given = {k: made[k] for k in ways_of if k != "scale"}
        x = made["x"][:, : count * size].reshape(b, n, -1)
        places = tuple(t.reshape(b, n, -1) for t in made["turns"])
        more = {"turns": places} if "turns" in given else {}
        more |= {"weight": made["weight"], "eps": 1e-6} if "weight" in given else {}
        wanted.append(reference.heads(x, count, scale=ways_of.get("scale", 1.0), **more))
        out = poisoned(machine, (b, count, n, size), np.float32)
        memory: dict[str, Any] = {"turns": tuple(machine.put(t) for t in made["turns"])} if "turns" in given else {}
        memory |= {"weight": machine.put(made["weight"]), "eps": 1e-6} if "weight" in given else {}
        parts.append(heads_of(machine.put(made["x"]), out, scale=ways_of.get("scale", 1.0), **memory))
        outs.append(out)
    machine.run([heads(parts, b * n)])
    assert all(far(machine.get(o), w) < 1e-5 for o, w in zip(outs, wanted, strict=True))
    one = poisoned(machine, outs[1].shape, np.float32)
    machine.run([heads([{**parts[1], "out": one}], b * n)])
    assert np.array_equal(machine.get(one), machine.get(outs[1]))
    assert HEADS.threads == 32


def numbers(kept: list[Any], bits: int) -> Any:
    """Keys or values [b, kv, slots, D] as float32, of what a session holds: codes, and what stands beside them."""
    if bits == 8:
        return kept[0].astype(np.float32) * kept[1][..., None]
    if bits == 16:
        return kept[0].astype(np.float32)
    codes = np.concatenate([kept[0] & 15, kept[0] >> 4], -1).astype(np.float32)
    beside = kept[1].astype(np.float32).reshape(*kept[1].shape[:-1], -1, 1, 2)
    parts = codes.reshape(*codes.shape[:-1], beside.shape[-3], -1)
    return (parts * beside[..., 0] + beside[..., 1]).reshape(codes.shape)


@pytest.mark.parametrize(
    ("b", "heads_", "kv", "n", "slots", "tokens", "size", "bits"),
    [
        (1, 2, 2, 1, 40, 1, 64, 32),  # a token
        (2, 4, 2, 1, 30, 1, 64, 8),
        (1, 4, 2, 3, 300, 3, 24, 8),  # several tokens, positions in two formats shared out over blocks
        (1, 8, 2, 2, 200, 2, 24, 32),
        (2, 4, 2, 9, 9, 0, 24, 32),  # a prompt that sees itself
        (1, 8, 1, 5, 70, 5, 128, 32),
        (1, 8, 1, 1, 70, 1, 128, 8),
        (1, 8, 1, 1, 70, 1, 128, 4),  # two groups of columns
        (1, 2, 2, 1, 70, 1, 64, 16),
        (1, 4, 2, 2, 90, 2, 48, 4),
        (1, 2, 1, 1, 70, 1, 24, 4),
    ],
)
def test_attention_is_that_of_float64(
    machine: Machine, b: int, heads_: int, kv: int, n: int, slots: int, tokens: int, size: int, bits: int
) -> None:
    rng = np.random.default_rng(slots)
    q = (rng.standard_normal((b, heads_, n, size)) * size**-0.5).astype(np.float32)
    old, new = ([rng.standard_normal((b, kv, t, size)).astype(np.float32) for _ in "kv"] for t in (slots, tokens))
    mask = np.where(rng.random((b, heads_, n, slots + tokens)) < 0.3, -1e4, rng.standard_normal((b, heads_, n, slots + tokens))).astype(
        np.float32
    )
    mask[..., -1] = 0
    keys, values = (np.concatenate(pair, 2) for pair in zip(old, new, strict=True))
    if bits != 32:
        kept = held(old, bits)
        each = [kept[i::2] for i in range(2)]
        keys[:, :, :slots], values[:, :, :slots] = (numbers(e, bits) for e in each)
        caches = dict(zip(("keys", "values", "key_scales", "value_scales"), kept, strict=False))
    else:
        hidden = (mask[:, :, :, :slots] < -5000).reshape(b, kv, -1, slots).all(2)
        for x in old:
            x[hidden] = np.nan  # what no query sees is not read
        caches = dict(zip(("keys", "values"), old, strict=True))
        keys, values = (np.nan_to_num(x) for x in (keys, values))
    out = poisoned(machine, (b * n, heads_ * size + 8), np.float16)
    memory = {name: machine.put(a) for name, a in caches.items()}
    item = look(
        machine, machine.put(q), memory, slots, kv, out, new=(machine.put(new[0]), machine.put(new[1])) if tokens else None, mask=machine.put(mask),
        mask_strides=(heads_ * n * (slots + tokens), n * (slots + tokens), slots + tokens), bits=bits,
    )  # fmt: skip
    wanted = reference.attention(q, keys, values, mask)
    for _ in range(2):
        machine.run([item])
        assert far(machine.get(out)[:, : heads_ * size], wanted) < 2 * TOLERANCE
        machine.put(np.full(out.shape, np.nan, np.float16), out)
    assert item.grid[1] > 1 or slots + tokens <= 64 or machine.units < 5


def test_a_mask_of_rows_and_of_heads_is_found_by_its_strides(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 4, 3, 24)).astype(np.float32) for _ in range(3))
    for shape, strides in (((2, 3), (3, 0, 0)), ((2, 3, 3), (9, 0, 3)), ((2, 4, 3, 3), (36, 9, 3))):
        mask = np.where(rng.random(shape) < 0.4, -1e4, 0).astype(np.float32)
        mask[..., 0] = 0
        out = poisoned(machine, (6, 96), np.float16)
        caches = {"keys": machine.put(k), "values": machine.put(v)}
        machine.run([look(machine, machine.put(q), caches, 3, 4, out, mask=machine.put(mask), mask_strides=strides)])
        whole = mask[:, None, None] if len(shape) == 2 else mask[:, None] if len(shape) == 3 else mask
        assert far(machine.get(out), reference.attention(q, k, v, np.broadcast_to(whole, (2, 4, 3, 3)))) < TOLERANCE


def test_a_query_that_sees_nothing_gets_zeros_and_forms_that_are_not_there_are_refused(machine: Machine) -> None:
    q, k = (machine.put(np.ones((1, 2, 1, 64), np.float32)) for _ in range(2))
    out = poisoned(machine, (1, 128), np.float16)
    mask = machine.put(np.full((1, 1), -1e4, np.float32))
    machine.run([look(machine, q, {"keys": k, "values": k}, 1, 2, out, mask=mask)])
    assert not machine.get(out).any()
    for size, kv, bits in ((20, 2, 32), (64, 3, 32), (64, 2, 2)):
        with pytest.raises(InputError, match="caches have 32, 16, 8 or 4 bits"):
            look(machine, machine.put(np.ones((1, 2, 1, size), np.float32)), {}, 1, kv, out, bits=bits)


@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu", False), ("gelu_tanh", True), ("relu", False)])
def test_activations_are_halved_without_overflow(machine: Machine, activation: str, gated: bool) -> None:
    rng = np.random.default_rng(0)
    x, other = (rng.standard_normal((3, 304)).astype(np.float32) * np.array([[1], [300], [1e6]], np.float32) for _ in range(2))
    out, scale = poisoned(machine, x.shape, np.float16), poisoned(machine, (3,), np.float32)
    machine.run([of_rows.halve(machine.put(x), out, scale, 300, activation, machine.put(other) if gated else None)])
    back = machine.get(out)[:, :300].astype(np.float64) * machine.get(scale)[:, None]
    wanted = reference.activation(activation, x, other if gated else 1.0)[:, :300]
    assert (np.abs(back - wanted).max(1) < TOLERANCE * np.abs(wanted).max(1)).all()


def test_norms_of_float32_stay_in_place(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((3, 96), 96, 96))
    memory = machine.put(x)
    machine.run([of_rows.norm(memory, machine.put(weight), memory, bias=machine.put(bias), cols=90)])
    assert far(machine.get(memory)[:, :90], reference.norm("layer", x[:, :90], weight[:90], bias[:90], 1e-6)) < 1e-5
    assert np.array_equal(machine.get(memory)[:, 90:], x[:, 90:])


def test_rows_are_picked_and_single_weights_added(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    x, last = rng.standard_normal((6, 40)).astype(np.float32), np.array([2, 1], np.int64)
    out = poisoned(machine, (2, 40), np.float32)
    machine.run([of_rows.pick(machine.put(x), machine.put(last), out, 3, 40)])
    assert np.array_equal(machine.get(out), reference.pick(x.reshape(2, 3, 40), last))
    matrix = np.where(rng.random((19, 40)) < 0.2, rng.standard_normal((19, 40)), 0).astype(np.float32)
    matrix[3] = 0
    rows, columns = np.nonzero(matrix)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=19))]).astype(np.int32)
    halves, scale, sums = x.astype(np.float16), rng.random(6).astype(np.float32) + 1, rng.standard_normal((6, 24)).astype(np.float32)
    memory = machine.put(sums)
    kept: list[Memory] = [machine.put(a) for a in (starts, columns.astype(np.int32), matrix[rows, columns])]
    machine.run([of_rows.sparse(machine.put(halves), machine.put(scale), *kept, memory)])
    wanted = sums[:, :19] + reference.sparse(halves.astype(np.float64) * scale[:, None], starts, columns, matrix[rows, columns])
    assert far(machine.get(memory)[:, :19], wanted) < 1e-5
    assert np.array_equal(machine.get(memory)[:, 19:], sums[:, 19:])


def test_embeddings_have_a_factor_and_places(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    code, table, places = (
        weights(1, 40, 77, 8, 0, False),
        rng.standard_normal((40, 96)).astype(np.float32),
        rng.standard_normal((12, 96)).astype(np.float32),
    )
    ids, at = np.array([3, 39, 0], np.int64), np.array([0, 4, 9], np.int64)
    memory, there, layer = machine.put(ids), (machine.put(places), machine.put(at), 2), Linear(machine, code)
    for which, given in (("panels", code), ("table", table[:, :77])):
        for placed in (None, there):
            out = poisoned(machine, (3, 80), np.float32)
            if which == "panels":
                machine.run([of_rows.embed(layer, memory, out, 1.5, placed)])
            else:
                machine.run([of_rows.lookup(machine.put(table), 77, memory, out, 1.5, placed)])
            added = places[at + 2, :77] if placed else None
            assert far(machine.get(out)[:, :77], reference.embedding(given, ids, 1.5, added)) < TOLERANCE
