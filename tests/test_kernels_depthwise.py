"""Depthwise convolutions of int8 on our kernels: every target that this machine runs, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgesdk.kernels import reference
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.depthwise import PLACES, pack
from edgesdk.kernels.library import bits_of, library
from edgesdk.kernels.tape import Tape


def convolved(
    target: str, x: Any, weights: Any, scales: Any, bias: Any, zero: int, stride: int, pads: Any, out_zero: int, floats: bool
) -> Any:
    kernels, (above, below, left, right) = library(target), pads
    size, (b, height, width, channels) = len(weights), x.shape
    rows, columns = ((n + p - size) // stride + 1 for n, p in ((height, above + below), (width, left + right)))
    p = pack(weights, scales, bias, zero, stride, kernels.lanes, kernels.shift_of(8))
    out = np.full((b, rows, columns, channels), np.nan, np.float32) if floats else np.full((b, rows, columns, channels), 99, np.int8)
    low, high = (-1e30, 1e30) if floats else (-128 - out_zero, 127 - out_zero)
    tape = Tape(kernels)
    tape.add(
        f"depthwise_{size}_{stride}{'_float' * floats}", b * rows, x=x, nothing=np.full(channels, zero, np.int8), weights=p.weights, bias=p.bias,
        scales=p.scales, out=out, height=height, width=width, channels=channels, rows=rows, columns=columns, top=above, left=left, zero=out_zero,
        low=bits_of(low), high=bits_of(high),
    )  # fmt: skip
    tape.run()
    return out


SLOW = [pytest.mark.wide]  # to compile
CASES = [
    pytest.param(t, size, stride, marks=SLOW if size == 5 and t != host_targets()[0] else [])
    for t in host_targets()
    for size, stride in PLACES
]


@pytest.mark.parametrize(("target", "size", "stride"), CASES)
def test_depthwise_convolutions(target: str, size: int, stride: int) -> None:
    rng = np.random.default_rng(size + stride)
    for b, height, width, channels, pads in (
        (1, 7, 9, 16, (size // 2,) * 4), (2, 5, 6, 112, (0, 1, 0, 1)), (1, size, size, 48, (0, 0, 0, 0)), (1, 3, 1, 64, (2, 2, 2, 2)), (1, 8, 12, 160, (1, 2, 2, 1)),
    ):  # fmt: skip
        if min(height + pads[0] + pads[1], width + pads[2] + pads[3]) < size:
            continue
        x = rng.integers(-128, 128, (b, height, width, channels)).astype(np.int8)
        weights = rng.integers(-128, 128, (size, size, channels)).astype(np.int8)
        x[0, 0, 0], weights[:, :, 0], weights[:, :, 1] = -128, 127, -128
        scales = (rng.random(channels) * 1e-3 + 1e-4).astype(np.float32)
        bias = rng.integers(-9000, 9000, channels).astype(np.int32)
        for zero, out_zero in ((0, 0), (-128, 5), (127, -128)):
            wanted = reference.depthwise(x, weights, scales, bias, zero, stride, pads)
            got = convolved(target, x, weights, scales, bias, zero, stride, pads, 0, True)
            assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1e-6 * max(1.0, np.abs(wanted).max())
            got = convolved(target, x, weights, scales, bias, zero, stride, pads, out_zero, False).astype(np.float64)
            assert np.abs(got - np.clip(wanted + out_zero, -128, 127)).max() <= 0.5001


def test_other_shapes_are_refused() -> None:
    for shape, stride in (((3, 3, 20), 1), ((7, 7, 16), 1), ((3, 3, 16), 3), ((3, 5, 16), 1)):
        with pytest.raises(ValueError, match="depthwise weights"):
            pack(np.zeros(shape, np.int8), np.ones(shape[2], np.float32), None, 0, stride, 16, 0)
