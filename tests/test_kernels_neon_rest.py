"""Attention over every form of cache, the largest of a row, depthwise convolutions as LLVM makes them for arm64: on emulated cores against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_kernels_attention import numbers, random

from edgesdk.kernels import reference
from edgesdk.kernels.attention import FORMS, kernel, room
from edgesdk.kernels.depthwise import pack
from edgesdk.kernels.library import ATTEND_ARGS, DEPTHWISE_ARGS, TOP_ARGS, bits_of
from edgesdk.kernels.neon import build
from edgesdk.sequence.caches import held
from tests import emulated

pytestmark = [
    pytest.mark.skipif(
        not build.compilers(), reason="no C compiler for arm64: pip install ziglang, or apt-get install gcc-aarch64-linux-gnu"
    ),
    pytest.mark.skipif(emulated.emulator() is None, reason="no emulator of arm64 programs: apt-get install qemu-user-static"),
]
CORES = [(target, cpu) for target, cpus in emulated.CPUS.items() for cpu in cpus]
HEADS = [*((form, 64) for form in FORMS), ("int4", 24)]
KERNELS = [*(kernel(form, size) for form, size in HEADS), "top", "depthwise_3_1", "depthwise_3_2_float"]


@pytest.fixture(scope="module")
def harness() -> tuple[Path, list[str]]:
    targets = tuple(emulated.CPUS)
    names = [f"llvm_{build.symbol(t, k)}" for t in targets for k in KERNELS]
    return emulated.program(names, emulated.emitted(targets, KERNELS)), names


def attended(name: str, form: str, size: int, rng: Any) -> tuple[emulated.Case, Any]:
    b, n, heads, kv, slots = 1, 3, 4, 2, 21
    q, keys, values, new_keys, new_values = (
        random(rng, b, h, t, size) for h, t in ((heads, n), (kv, slots), (kv, slots), (kv, n), (kv, n))
    )
    mask = np.where(rng.random((b, 1, n, slots + n)) < 0.3, -1e4, rng.standard_normal((b, 1, n, slots + n))).astype(np.float32)
    mask[..., slots] = 0
    arrays = held([keys, values], FORMS[form])
    case = emulated.Case()
    given = {"q": q, "keys": arrays[0], "values": arrays[1], "new_keys": new_keys, "new_values": new_values, "mask": mask}
    given |= dict(zip(("key_scales", "value_scales"), arrays[2:], strict=False))
    given |= {"out": np.full((n, heads * size), np.nan, np.float32), "scores": room(form, size, heads, slots + n)}
    for what, array in given.items():
        case.add(what, array)
    sizes = {"slots": slots, "tokens": n, "n": n, "heads": heads, "shared": 2, "stride": 4 * heads * size, "mask_row": 4 * (slots + n)}
    case.steps.append((name, case.table(ATTEND_ARGS, sizes), (0, heads), 1))
    seen = [np.concatenate(x, 2) for x in zip(numbers(arrays, form), (new_keys, new_values), strict=True)]
    return case, reference.attention(q, *seen, mask)


def convolved(name: str, stride: int, floats: bool, rng: Any) -> tuple[emulated.Case, Any]:
    x, weights = (rng.integers(-128, 128, s).astype(np.int8) for s in ((1, 6, 7, 48), (3, 3, 48)))
    scales = (rng.random(48) * 1e-3 + 1e-4).astype(np.float32)
    p, wanted = pack(weights, scales, None, 7, stride, 4, 0), reference.depthwise(x, weights, scales, None, 7, stride, (1, 1, 1, 1))
    case = emulated.Case()
    out = np.zeros(wanted.shape, np.float32 if floats else np.int8)
    for what, array in {
        "x": x,
        "nothing": np.full(48, 7, np.int8),
        "weights": p.weights,
        "bias": p.bias,
        "scales": p.scales,
        "out": out,
    }.items():
        case.add(what, array)
    sizes = {"height": 6, "width": 7, "channels": 48, "rows": wanted.shape[1], "columns": wanted.shape[2], "top": 1, "left": 1}
    low, high = (bits_of(-1e30), bits_of(1e30)) if floats else (bits_of(-128.0), bits_of(127.0))
    case.steps.append((name, case.table(DEPTHWISE_ARGS, sizes | {"low": low, "high": high}), (0, wanted.shape[1]), 1))
    return case, wanted


@pytest.mark.parametrize(("target", "cpu"), CORES)
def test_they_are_those_of_float64(target: str, cpu: str, harness: tuple[Path, list[str]], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)

    def called(name: str) -> str:
        return f"llvm_{build.symbol(target, name)}"

    attention = [attended(called(kernel(form, size)), form, size, rng) for form, size in HEADS]
    whole, real = convolved(called("depthwise_3_1"), 1, False, rng), convolved(called("depthwise_3_2_float"), 2, True, rng)
    x, top = random(rng, 2, 101), emulated.Case()
    for what, array in {"x": x, "values": np.zeros((2, 7), np.float32), "ids": np.zeros((2, 7), np.int64)}.items():
        top.add(what, array)
    top.steps.append((called("top"), top.table(TOP_ARGS, {"stride": 404, "n": 101, "k": 7}), (0, 2), 1))
    emulated.run(*harness, [*(c for c, _ in attention), whole[0], real[0], top], cpu, tmp_path)
    for case, wanted in attention:
        assert np.abs(case.given("out", np.float32, wanted.shape) - wanted).max() < 2e-4
    assert np.abs(whole[0].given("out", np.int8, whole[1].shape) - np.clip(whole[1], -128, 127)).max() <= 0.5001
    assert np.abs(real[0].given("out", np.float32, real[1].shape) - real[1]).max() <= 1e-6 * np.abs(real[1]).max()
    values, ids = reference.top(x, 7)
    assert np.array_equal(top.given("values", np.float32, (2, 7)), values) and np.array_equal(top.given("ids", np.int64, (2, 7)), ids)
