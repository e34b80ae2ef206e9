"""Single weights pruned: by size, in patterns of n of every m, with shares by layer; what is stored, and what later stages keep."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.compress import compress
from edgesdk.compress.ecoflap import felt
from edgesdk.compress.magnitude import cubic
from edgesdk.compress.masks import error_of, fit_kept, largest, of_every, prunable, sparse_code, sparsest
from edgesdk.compress.nm import NmConfig, Patterned
from edgesdk.compress.registry import configured
from edgesdk.compress.shrink import copy_of
from edgesdk.compress.types import Weight
from edgesdk.compress.weights import weights_of
from edgesdk.errors import InputError
from edgesdk.packed import Code, decode, pack, unpack
from edgesdk.packed.entropy import PackedError
from tests.small_models import Concat, Residual, Transformer, seeded, spec_of

torch.set_num_threads(1)


# ---- single weights


def test_magnitude_hits_the_share_exactly_and_stores_less() -> None:
    spec = spec_of(seeded(Transformer), 6, 16)
    for recipe in (
        "magnitude:sparsity=0.6",
        "magnitude:sparsity=0.6,allocation=even",
        "magnitude:sparsity=0.6,allocation=global,steps=12,ramp=0.6,every=3",
        "magnitude:sparsity=0.6,steps=12",
    ):
        done = compress(spec, recipe)
        held = weights_of(done.spec)
        total = sum(w.matrix.numel() for w in held.values())
        left = sum(int((w.matrix != 0).sum()) for w in held.values())
        assert left == round(0.4 * total)
        assert done.report.weight_bytes == sum(len(pack(c)) for c in done.spec.codes.values())
        for name, code in done.spec.codes.items():
            assert np.array_equal(decode(unpack(pack(code))), held[name].matrix.numpy())
        assert compress(spec, recipe).spec.digest == done.spec.digest


def test_the_schedule_is_the_published_cubic() -> None:
    assert [round(cubic(t / 4), 6) for t in range(6)] == [round(1 - (1 - t / 4) ** 3, 6) for t in range(5)] + [1.0]


@pytest.mark.parametrize("later", ["rtn:bits=4", "rtn:bits=4,symmetric=false", "gptq:bits=4", "gptq:bits=3,symmetric=false"])
def test_quantizing_keeps_what_is_pruned_and_costs_fewer_bytes(later: str) -> None:
    spec = spec_of(seeded(Residual), 3, 8, 8)
    alone, pruned, both = (compress(spec, r) for r in ([later], ["magnitude:sparsity=0.7"], ["magnitude:sparsity=0.7", later]))
    held = weights_of(both.spec)
    for name, weight in weights_of(pruned.spec).items():
        assert not held[name].matrix[weight.matrix == 0].any()
    assert both.report.weight_bytes < pruned.report.weight_bytes and both.report.weight_bytes < alone.report.weight_bytes


def test_one_shot_fit_is_best_under_its_mask_and_beats_size_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 20, generator=generator, dtype=torch.float64) @ torch.randn(20, 20, generator=generator, dtype=torch.float64)
    gram, w = (x.T @ x / 400)[None], torch.randn(7, 20, generator=generator)
    fitted, mask = sparsest(w, gram, lambda s: largest(s, 56), damp=1e-9)
    assert int(mask.sum()) == 56 and not fitted[~mask].any()
    for row in range(7):
        best = torch.linalg.lstsq(x[:, mask[row]], x @ w[row].double()).solution
        torch.testing.assert_close(fitted[row, mask[row]].double(), best, atol=1e-4, rtol=1e-3)
    by_size = largest(w.abs(), 56)
    assert error_of(w, fitted, gram) < 0.5 * error_of(w, w * by_size, gram)
    assert error_of(w, fitted, gram) < error_of(w, fit_kept(w, by_size, gram), gram)


def test_pruning_says_what_it_lacks() -> None:
    bare = spec_of(seeded(Concat), 3, 8, 8, calibration=False)
    with pytest.raises(InputError, match="no calibration data"):
        compress(bare, "magnitude:sparsity=0.5")
    assert compress(bare, "magnitude:sparsity=0.5,allocation=global,inputs=false,fit=false").report.weights
    with pytest.raises(InputError, match="matches"):
        compress(spec_of(seeded(Concat), 3, 8, 8), "magnitude:only=nothing")
    with pytest.raises(InputError, match="sparsity"):
        compress(bare, "magnitude:sparsity=1")


def test_zero_rows_and_dead_inputs_are_pruned_sanely() -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        module[0].weight[2] = 0
        module[0].bias[4] = -100.0  # never on
    done = compress(spec_of(module, 8), "magnitude:sparsity=0.5")
    assert all(bool(torch.isfinite(w.matrix).all()) for w in weights_of(done.spec).values())


def test_what_is_lost_is_told_and_can_be_compensated() -> None:
    spec = spec_of(seeded(Transformer), 6, 16)
    pruned = compress(spec, "magnitude:sparsity=0.7")
    assert all(w.error > 0 for w in pruned.report.weights)
    better = compress(spec, ["magnitude:sparsity=0.7", "eora:rank=4"])
    assert sum(w.error for w in better.report.weights) < sum(w.error for w in pruned.report.weights)


# ---- n of every m


def holds(matrix: torch.Tensor, n: int, m: int) -> bool:
    groups = nn.functional.pad(matrix, (0, -matrix.shape[1] % m)).reshape(-1, m)
    return int((groups != 0).sum(1).max()) <= n


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (1, 16), (3, 5)])
def test_every_group_keeps_n_of_m_and_its_pattern_is_stored_in_fewer_bytes(n: int, m: int) -> None:
    spec = spec_of(seeded(Residual), 3, 8, 8)  # rows of 27, 108, 9, 12 and 10
    done = compress(spec, f"nm:n={n},m={m}")
    held = weights_of(done.spec)
    assert done.spec.codes
    for name, code in done.spec.codes.items():
        assert holds(held[name].matrix, n, m)
        assert np.array_equal(decode(unpack(pack(code))), held[name].matrix.numpy())
        mask = held[name].matrix != 0
        assert len(pack(code)) <= len(pack(sparse_code(held[name].matrix, mask)))
    assert any(c.kind == "sparse" and len(c.parts) == 2 for c in done.spec.codes.values()) == (m <= 8)
    later = compress(spec, [f"nm:n={n},m={m}", "gptq:bits=4"])
    assert all(holds(weights_of(later.spec)[name].matrix, n, m) for name in done.spec.codes)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (5, 8), (2, 16)])
def test_quantized_patterns_cost_no_more_than_pattern_and_values(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(48, 100, generator=generator)
    mask = of_every(w.abs(), n, m)
    method, config = configured("rtn", {"bits": 4, "group": 0})
    code = method.apply(Weight("w", "linear", (48, 100), w * mask, kept=mask), None, config)  # type: ignore[call-arg, arg-type]
    assert isinstance(code, Code)
    assert np.array_equal(decode(unpack(pack(code))), decode(code))
    share = float(mask.float().mean())
    groups = 48 * -(-100 // m)
    assert len(pack(code)) < 48 * 100 * share * 4 / 8 + groups * math.log2(math.comb(m, n) + 2) / 8 + 48 * 2 + 300
    packed = pack(code)
    for at in range(0, len(packed), 37):  # other weights, or a refusal: never another error
        broken = bytearray(packed)
        broken[at] ^= 1 + at % 255
        with contextlib.suppress(PackedError):
            unpack(bytes(broken))


def test_shares_by_layer_keep_the_mean_and_bad_patterns_are_refused() -> None:
    spec = spec_of(seeded(Transformer), 6, 16)
    done = compress(spec, "nm:n=2,m=8,allocation=ecoflap,fit=false")
    held = [w.matrix for w in weights_of(done.spec).values()]
    assert sum(int((w != 0).sum()) for w in held) <= sum(w.numel() for w in held) / 4
    assert len({round(float((w != 0).float().mean()) * 8) for w in held}) > 1
    with pytest.raises(InputError, match="less than m"):
        compress(spec, "nm:n=4,m=4")
    with pytest.raises(InputError, match="no row is as long"):
        compress(spec, "nm:n=1,m=64")


def distilled(seed: int, **settings: Any) -> tuple[float, Patterned]:
    """The error of a small network's outputs after training under masks, over their variance, on inputs it was not trained on."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    spec = spec_of(net, 16, count=64)
    teacher, weights = copy_of(spec), prunable(spec)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    config = NmConfig(inputs=False, fit=False, **settings)
    trained = Patterned(spec, weights, {}, dict.fromkeys(weights, settings["n"]), config)
    changing = settings["recipe"] != "fixed"
    trained.train("nm", lambda text, share: None, teacher=teacher, each=trained.choose if changing else None)
    assert all(
        holds(weights_of(spec)[n].matrix, settings["n"], settings["m"]) and bool((weights_of(spec)[n].matrix[~m] == 0).all())
        for n, m in trained.masks.items()
    )
    x = torch.randn(500, 16)
    with torch.no_grad():
        wanted, got = (s.methods["forward"].module(x) for s in (teacher, spec))
    return float((got - wanted).square().mean() / wanted.var()), trained


@pytest.mark.parametrize("m", [8, 16])
def test_decaying_gradients_beat_masks_that_are_closed_from_the_start(m: int) -> None:
    flow, closed = (sum(distilled(seed, n=1, m=m, steps=240, recipe=r)[0] for seed in range(3)) for r in ("flow", "fixed"))
    assert flow < closed


def test_adaptive_masks_change_then_settle_and_beat_fixed_ones() -> None:
    errors = {"adaptive": 0.0, "fixed": 0.0}
    for seed in range(3):
        for recipe in errors:
            error, trained = distilled(seed, n=2, m=4, steps=240, recipe=recipe)
            errors[recipe] += error
            if recipe == "adaptive":
                third = len(trained.changed) // 3
                assert sum(trained.changed) > 0 and sum(trained.changed[-third:]) <= sum(trained.changed[:third])
    assert errors["adaptive"] < errors["fixed"]


# ---- shares by forward passes


class Branches(nn.Module):
    """One branch matters a hundred times more than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(40, 6)
        with torch.no_grad():
            self.head.weight[:, 20:] *= 0.05

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], -1))


def test_forward_scores_follow_true_gradients_and_beat_even_shares() -> None:
    spec = spec_of(seeded(Branches), 12)
    weights = prunable(spec)
    shaken = felt(spec, weights, draws=8)
    module, x = spec.methods["forward"].module, torch.cat([s[0] for s in spec.calibration("forward")[:8]])  # type: ignore[index, misc]
    out, true = module(x), {}
    scale = float(out.std(unbiased=False))
    for name in weights:
        held = module.get_submodule(name.removesuffix(".weight")).weight
        jacobian = torch.autograd.functional.jacobian(
            lambda w, name=name: torch.func.functional_call(module, {name: w}, (x,)) / scale, held.detach()
        )
        true[name] = float(jacobian.square().sum() / out.numel() / held.numel())
    for name in weights:
        assert 0.6 * true[name] < shaken[name] < 1.6 * true[name]
    errors = {}
    for sparsity in (0.6, 0.7):
        for recipe in (f"ecoflap:sparsity={sparsity},local=inputs", f"magnitude:sparsity={sparsity},allocation=even,fit=false"):
            done = compress(spec, recipe)
            held = [w.matrix for w in weights_of(done.spec).values()]
            assert sum(int((w != 0).sum()) for w in held) == round((1 - sparsity) * sum(w.numel() for w in held))
            xs = torch.cat([s[0] for s in spec.calibration("forward")])  # type: ignore[misc]
            with torch.no_grad():
                errors[recipe] = float((done.spec.methods["forward"].module(xs) - module(xs)).square().mean())
        ours, even = list(errors.values())[-2:]
        assert ours < even
