"""Norms, activations, heads, attention, embeddings on our kernels: every target that this machine runs, against float64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesdk.kernels import reference
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.library import ACTIVATIONS, NORMS, bits_of, form, library
from edgesdk.kernels.pack import pack
from edgesdk.kernels.registry import kernels
from edgesdk.kernels.tape import Rows, Tape, panel_sizes
from edgesdk.packed import Code

BEST = host_targets()[0]


def filled(tape: Tape, values: Any) -> Rows:
    room = tape.room(*values.shape)
    room.array[:] = values
    return room


def padded(values: Any) -> Any:
    out = np.zeros(-(-len(values) // 32) * 32, np.float32)
    out[: len(values)] = values
    return out


def values_of(rounded: Any, cols: int) -> Any:
    """What rounded inputs stand for, [M, cols]."""
    q = rounded.q.view(np.uint8 if rounded.shift else np.int8).astype(np.float64)
    flat = q.transpose(1, 0, 2).reshape(rounded.rows, -1)
    assert np.array_equal(q.sum(2).astype(np.int32), rounded.q_sums)
    return (rounded.q_scale[:, None] * (flat - rounded.q_zero[:, None]))[:, :cols]


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize("shift", [0, 128])
@pytest.mark.parametrize("before", ["", *NORMS, *ACTIVATIONS])
def test_rounding_with_what_comes_before_it(target: str, shift: int, before: str) -> None:
    rng = np.random.default_rng(1)
    for m, cols in ((5, 70), (1, 32), (2, 1), (3, 257)):
        x, other = (rng.standard_normal((m, cols)).astype(np.float32) * 3 + 1 for _ in range(2))
        weight, bias = (rng.standard_normal(cols).astype(np.float32) for _ in range(2))
        for gated in (False, True) if before in ACTIVATIONS else (False,):
            tape = Tape(library(target))
            out = tape.room(m, cols)
            norm = (padded(weight), padded(bias) if before == "layer" else None, 1e-5) if before in NORMS else None
            found = tape.round(filled(tape, x), shift, before=before, other=filled(tape, other) if gated else None, norm=norm, out=out)
            tape.run()
            wanted = x.astype(np.float64)
            if before in NORMS:
                wanted = reference.norm(before, x, weight, bias, 1e-5)
            elif before:
                wanted = reference.activation(before, x, other if gated else 1)
            if before:
                assert np.abs(out.array - wanted).max() <= 3e-6 * max(1, np.abs(wanted).max())
                assert not out.values[:, cols:].any()
            step = (np.maximum(wanted.max(1), 0) - np.minimum(wanted.min(1), 0)) / 255
            assert (np.abs(values_of(found, cols) - wanted) <= 0.51 * step[:, None] + 1e-6 * np.abs(wanted).max()).all()


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 4), cols=st.integers(1, 100), size=st.sampled_from([1e-42, 1e-37, 1e-30, 1e-3, 1.0, 1e30]), seed=st.integers(0, 999)
)
def test_rounding_of_any_size(m: int, cols: int, size: float, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((m, cols)) * size).astype(np.float32)
    tape = Tape(library(BEST))
    found = tape.round(filled(tape, x), 0)
    tape.run()
    step = (np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)) / 255
    assert (np.abs(values_of(found, cols) - x) <= 0.51 * step[:, None] + 3e-36).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_extreme_values(name: str) -> None:
    x = np.array([[-1e30, -200, -88, -87, -20, -1e-20, 0, 1e-20, 20, 87, 89, 200, 1e4]], np.float32)
    tape = Tape(library(BEST))
    out = tape.room(*x.shape)
    tape.round(filled(tape, x), 0, before=name, out=out)
    tape.run()
    wanted = reference.activation(name, x)
    if name == "gelu_tanh":
        wanted[0, 0] = 0  # the reference's own cube overflows
    assert np.isfinite(out.array).all()
    assert np.abs(out.array - wanted).max() < 0.02


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize("size", [2, 24, 64])
def test_heads_are_normed_turned_and_scaled(target: str, size: int) -> None:
    rng = np.random.default_rng(3)
    b, n, heads = 2, 3, 4
    x = rng.standard_normal((b * n, heads * size)).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    cos, sin = (rng.standard_normal((b * n, size // 2)).astype(np.float32) for _ in range(2))
    for normed in (False, True):
        for turned in (False, True):
            out = np.full((b, heads, n, size), np.nan, np.float32)
            tape = Tape(library(target))
            rows = filled(tape, x)
            tape.add(
                "heads" + "_normed" * normed + "_turned" * turned + f"_{size}", b * n, x=rows, stride=rows.stride, n=n, heads=heads,
                weight=weight, eps=bits_of(1e-6), cos=cos, sin=sin, scale=bits_of(0.5), out=out,
            )  # fmt: skip
            tape.run()
            turns = [t.reshape(b, n, -1) for t in (cos, sin)] if turned else None
            more = {"weight": weight, "eps": 1e-6} if normed else {}
            wanted = reference.heads(x.reshape(b, n, -1), heads, turns=turns, scale=0.5, **more)
            assert np.abs(out - wanted).max() < 1e-5


@pytest.mark.parametrize("target", host_targets())
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("zeros", [False, True])
def test_embeddings_come_out_of_panels(target: str, bits: int, zeros: bool) -> None:
    rng, kernels = np.random.default_rng(bits), library(target)
    for group in (0, 32, 64):
        rows, cols = 50, 70
        groups = 1 if group == 0 else -(-cols // group)
        q = rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
        zero = rng.integers(0, 1 << bits, (rows, groups)).astype(np.uint8) if zeros else np.zeros(0, np.uint8)
        code = Code("grid", (rows, cols), (bits, group), (q, (rng.random((rows, groups)) + 0.1).astype(np.float32), zero))
        p = pack(code, kernels.lanes, kernels.together, kernels.half)
        tape = Tape(kernels)
        out, places = tape.room(5, cols), rng.standard_normal((9, 96)).astype(np.float32)
        ids, at = np.array([0, 49, 17, 3, 33]), np.arange(5)
        tape.add(
            f"embed_{form(bits, p.group != 0, p.zeros.size > 0)}", 5, ids=ids, codes=p.codes, scales=p.scales, zeros=p.zeros, row_scale=p.row_scale,
            **panel_sizes(p), blocks=p.blocks, factor=bits_of(3.0), places=places, at=at, offset=2, out=out, stride=out.stride,
        )  # fmt: skip
        tape.run()
        wanted = reference.embedding(code, ids, 3.0, places[at + 2][:, :cols])
        assert np.abs(out.array - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_a_kernel_that_is_not_there_and_an_arg_that_it_has_not() -> None:
    tape = Tape(library(BEST))
    with pytest.raises(KeyError):
        tape.add("gemv_4_block", 1, colour=3)
    with pytest.raises((KeyError, ValueError)):
        library(BEST).address("silu_gated")
    with pytest.raises(ImportError, match="this CPU runs"):
        library("arm-i8mm" if BEST.startswith("x86") else "x86-avx2")


def test_every_kernel_of_the_registry_is_there() -> None:
    seen = set()
    for kernel in kernels():
        assert (kernel.name, kernel.made) not in seen and callable(kernel.reference)
        seen.add((kernel.name, kernel.made))
        if kernel.made == "llvm":
            name = f"{kernel.name}_16" if kernel.name.startswith(("heads", "attend")) else kernel.name
            assert library(BEST).address(name)
    from edgesdk.kernels.neon.build import kernels as in_c

    assert {name for name, made in seen if made == "c"} == set(in_c())


def test_single_weights_are_added_and_rows_picked() -> None:
    rng = np.random.default_rng(0)
    x, before = rng.standard_normal((3, 40)).astype(np.float32), rng.standard_normal((3, 7)).astype(np.float32)
    matrix = np.where(rng.random((7, 40)) < 0.1, rng.standard_normal((7, 40)), 0)
    matrix[2] = 0
    rows, columns = np.nonzero(matrix)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=7))]).astype(np.int32)
    values = matrix[rows, columns].astype(np.float32)
    tape = Tape(library(BEST))
    taken, out = filled(tape, x), filled(tape, before)
    columns = columns.astype(np.int32)
    tape.add("sparse", 7, x=taken, stride=taken.stride, m=3, starts=starts, columns=columns, values=values, out=out, out_stride=out.stride)
    last, picked = np.array([2]), tape.room(1, 40)
    tape.add("pick", 1, x=taken, stride=taken.stride, n=3, last=last, out=picked)
    tape.run()
    assert np.abs(out.array - before - reference.sparse(x, starts, columns, values)).max() < 1e-5
    assert np.array_equal(picked.array, reference.pick(x[None], last))


@pytest.mark.parametrize("target", host_targets())
def test_the_largest_of_each_row(target: str) -> None:
    rng = np.random.default_rng(4)
    for n, k in ((1, 1), (5, 9), (100, 1), (1000, 40), (33, 33)):
        for x in (rng.standard_normal((3, n)), rng.integers(-2, 3, (3, n)), np.full((3, n), -np.inf), np.arange(3.0 * n).reshape(3, n)):
            x = x.astype(np.float32)
            x[1, :: max(1, n // 3)] = np.nan
            x[2, n // 2] = np.inf
            values, ids = np.zeros((3, k), np.float32), np.zeros((3, k), np.int64)
            tape = Tape(library(target))
            tape.add("top", 3, x=x, stride=x.strides[0], n=n, k=k, values=values, ids=ids)
            tape.run()
            wanted = reference.top(x, k)
            assert np.array_equal(values, wanted[0]) and np.array_equal(ids, wanted[1])


def test_the_verb_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    from edgesdk.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["kernels", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and told["host_targets"] == list(host_targets())
    assert {"gemv_4_block", "attend_int8", "round"} <= {k["name"] for k in told["kernels"]}
