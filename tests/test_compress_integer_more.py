"""Integer methods without or around second-order rounding: adaptive groups, outliers apart, rotations, smoothing, flattening, activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_compress_integer import coded, layer, small
from torch import nn

import edgesdk.compress as compress
from edgesdk.compress.activations import METHOD as ACTIVATIONS
from edgesdk.compress.flatten import FlattenConfig, best_turn, multiplications, sizes, turned, unturned
from edgesdk.compress.layers import inputs_of, pairs_of
from edgesdk.compress.registry import configured
from edgesdk.compress.saved import load
from edgesdk.compress.types import Stats, Weight
from edgesdk.compress.weights import weights_of
from edgesdk.errors import InputError
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import decode, pack

torch.set_num_threads(1)


def error(matrix: torch.Tensor, code: object) -> float:
    return float(((torch.from_numpy(decode(code)) - matrix) ** 2).sum())  # type: ignore[arg-type]


# ---- finequant


def blocky() -> Weight:
    """128 × 512; in rows 64 to 127 of columns 256 to 383 every 16th column is ten times larger."""
    matrix = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[64:, 256:384:16] *= 10
    return Weight("w", "linear", (128, 512), matrix)


def test_finequant_shrinks_groups_only_where_the_outliers_are() -> None:
    code, _, _ = coded("finequant", blocky(), None, bits=4, search=False)
    assert code.kind == "stack" and len(code.parts) == 2
    calm, rough = code.parts
    assert calm.kind == "grid" or len({p.numbers[1] for p in calm.parts}) == 1
    sizes = [p.numbers[1] or p.shape[1] for p in rough.parts]
    assert len(sizes) == 3 and sizes[1] < min(sizes[0], sizes[2])


def test_finequant_beats_fixed_groups_at_equal_bytes() -> None:
    weight = blocky()
    code, _, stored = coded("finequant", weight, None, bits=4, search=False)
    ours = np.log2(error(weight.matrix, code)) / 2 + 8 * stored / weight.matrix.numel()
    for group in (0, 128, 64, 32, 16, 8):
        fixed, _, size = coded("rtn", weight, None, bits=4, group=group)
        assert ours < np.log2(error(weight.matrix, fixed)) / 2 + 8 * size / weight.matrix.numel()


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (65, 130), (64, 128), (3, 300)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_finequant_takes_any_shape(shape: tuple[int, int], symmetric: bool) -> None:
    weight = Weight("w", "linear", shape, torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    _, err, _ = coded("finequant", weight, None, bits=4, symmetric=symmetric)
    assert err < 0.02


# ---- easyquant


def test_easyquant_lowers_the_error_step_by_step_and_keeps_few_apart() -> None:
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) < 0.004] *= 8
    weight = Weight("w", "linear", (64, 256), matrix)
    for bits in (3, 4):
        plain, apart, best = (
            coded("easyquant", weight, None, bits=bits, **settings)
            for settings in ({"outliers": 0.0, "optimise": False}, {"optimise": False}, {})
        )
        assert plain[1] > 2 * apart[1] and apart[1] > 1.05 * best[1]
        assert np.array_equal(decode(plain[0]), decode(coded("rtn", weight, None, bits=bits, group=0)[0]))
        mask = best[0].parts[1].arrays[0]
        assert 0 < mask.mean() < 0.01


def test_easyquant_looks_at_no_data_and_holds_outliers_as_they_are() -> None:
    weight, stats = layer()
    weight.matrix[3, 5] = 7.0
    with_data, without = (pack(coded("easyquant", weight, s, bits=3)[0]) for s in (stats, None))
    assert with_data == without
    assert decode(coded("easyquant", weight, None, bits=3)[0])[3, 5] == 7.0


# ---- hadamard


def test_rotation_spreads_outliers() -> None:
    weight, stats = layer(48, 64)
    weight.matrix[torch.rand(48, 64, generator=torch.Generator().manual_seed(2)) < 0.01] *= 10
    assert coded("hadamard", weight, stats, bits=3, group=0)[1] < 0.5 * coded("gptq", weight, stats, bits=3, group=0)[1]
    assert coded("hadamard", weight, stats, bits=8)[1] < 1e-4


def test_rotation_says_where_it_does_not_apply() -> None:
    weight, stats = layer(6, 9)
    method, config = configured("hadamard")
    assert "9 columns" in (method.why_not(weight, config) or "")  # type: ignore[arg-type]
    weight, stats = layer(6, 24)
    assert coded("hadamard", weight, stats, bits=8)[0].numbers == (0, 8)
    pruned = Weight("w", "linear", (6, 24), weight.matrix, kept=torch.zeros(6, 24, dtype=torch.bool))
    with pytest.raises(InputError, match="pruned"):
        coded("hadamard", pruned, stats)


# ---- all of them


WEIGHT_METHODS = [("finequant", {"bits": 4}), ("easyquant", {"bits": 4}), ("hadamard", {"bits": 4, "rate": 0}), ("hadamard", {"rate": 3})]


@pytest.mark.parametrize("name, settings", WEIGHT_METHODS)
def test_odd_matrices_are_sane_and_runs_repeat(name: str, settings: dict[str, object]) -> None:
    weight, stats = layer(6, 12)
    matrix = weight.matrix.clone()
    matrix[2] = 0
    gram = stats.gram.clone()
    gram[:, 4] = gram[:, :, 4] = 0
    odd = Weight("w", "linear", (6, 12), matrix)
    code, _, _ = coded(name, odd, Stats(9, gram, stats.mean, stats.absmax), **settings)
    assert np.abs(decode(code)[2]).max() < 1e-5
    assert pack(code) == pack(coded(name, odd, Stats(9, gram, stats.mean, stats.absmax), **settings)[0])
    coded(name, Weight("w", "linear", (6, 12), torch.zeros(6, 12)), stats, **settings)


@pytest.mark.parametrize("name", ["finequant", "easyquant", "hadamard"])
def test_every_kind_of_weight_goes_through_compress(name: str) -> None:
    made = compress(small(), f"{name}:bits=8")  # type: ignore[operator]
    named = {w.weight for w in made.report.weights} | set(made.report.kept)
    assert named == set(weights_of(small())) and all(w.error < 2e-3 for w in made.report.weights)
    assert {w.weight: len(pack(made.spec.codes[w.weight])) for w in made.report.weights} == {w.weight: w.bytes for w in made.report.weights}


# ---- smoothing, flattening, rounded activations


class Encoder(nn.Module):
    """Two blocks with norms, attention and a ReLU; some channels of the norms are twenty times larger than the others."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(width, 48), nn.Linear(48, width), nn.Linear(width, 10)
        with torch.no_grad():
            for norm in self.norms:
                norm.weight[:3] *= 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norms[0](x)
        scores = torch.softmax(self.q(h) @ self.k(h).transpose(1, 2) * 0.05, -1)
        x = x + self.o(scores @ self.v(h))
        x = x + self.down(torch.relu(self.up(self.norms[1](x))))
        answer: torch.Tensor = self.head(self.norms[2](x))
        return answer


def encoder(layout: str = "plain") -> ModelSpec:
    torch.manual_seed(0)
    module = Encoder().eval()
    given = [(torch.randn(1, 12, 24),) for _ in range(24)]
    return ModelSpec("encoder", "0" * 64, {"forward": Method(module, given[0])}, layout=layout, calibration=lambda _: given)  # type: ignore[arg-type]


def loss(spec: ModelSpec, made: ModelSpec) -> float:
    """Relative squared error of the outputs on inputs that calibration did not see."""
    x = torch.randn(16, 12, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, got = spec.methods["forward"].module(x), made.methods["forward"].module(x)
    return float(((got - wanted) ** 2).sum() / (wanted**2).sum())


def test_smoothing_finds_who_makes_the_inputs_and_changes_nothing_before_rounding() -> None:
    spec = encoder()
    found = {tuple(p.readers): p.name for p in pairs_of(spec)}
    assert found == {
        ("k.weight", "q.weight", "v.weight"): "norms.0",
        ("o.weight",): "v",
        ("up.weight",): "norms.1",
        ("down.weight",): "up",
        ("head.weight",): "norms.2",
    }
    made = compress(spec, "smooth:activations=4")  # type: ignore[operator]
    assert loss(spec, made.spec) < 1e-10 and not made.report.edits
    assert any(
        not torch.equal(a, b)
        for a, b in zip(spec.methods["forward"].module.parameters(), made.spec.methods["forward"].module.parameters(), strict=True)
    )


def test_smoothing_helps_rounded_activations_and_flattening_helps_more() -> None:
    spec = encoder()
    w4a4 = "activations:weights=4,activations=4"
    alone = loss(spec, compress(spec, w4a4).spec)  # type: ignore[operator]
    smooth = loss(spec, compress(spec, ["smooth:bits=4,group=0,activations=4", w4a4]).spec)  # type: ignore[operator]
    flat = loss(spec, compress(spec, ["flatten:steps=60", w4a4]).spec)  # type: ignore[operator]
    assert smooth < 0.8 * alone and flat < smooth


def test_flattening_is_exact_before_rounding_and_learns_more_than_scales_and_rotations() -> None:
    spec = encoder()
    made = compress(spec, "flatten:steps=20")  # type: ignore[operator]
    x = torch.randn(4, 12, 24)
    with torch.no_grad():
        assert torch.allclose(made.spec.methods["forward"].module(x), spec.methods["forward"].module(x), rtol=1e-4, atol=1e-5)
    x, matrix = inputs_of(spec)["up.weight"], spec.methods["forward"].module.up.weight.detach()
    errors = [best_turn(x, matrix, FlattenConfig(steps=steps))[1] for steps in (0, 60)]
    assert errors[1] < 0.95 * errors[0] < 0.95
    turn = best_turn(x, matrix, FlattenConfig(steps=20))[0]
    assert turn is not None
    whole = torch.kron(turn[0], turn[1])
    assert torch.allclose(turned(x, turn), (x * turn[2]) @ whole, rtol=1e-4, atol=1e-4)
    assert torch.allclose(turned(x, turn) @ unturned(matrix, turn).T, x @ matrix.T, rtol=1e-3, atol=1e-3)


def test_the_kronecker_product_costs_what_is_said() -> None:
    assert sizes(96) == (8, 12) and sizes(256) == (16, 16) and sizes(13) == (1, 13) and sizes(1) == (1, 1)
    a, b = sizes(96)
    counted = a * b * b + a * a * b + a * b  # X · right, leftᵀ · that, the scale
    assert multiplications(a, b) == counted < 96 * 96


def test_flattened_and_rounded_models_are_saved_and_loaded(tmp_path: Path) -> None:
    spec = encoder()
    made = compress(spec, ["flatten:steps=5", "activations:weights=4,activations=8,group=8"])  # type: ignore[operator]
    again = load(made.save(tmp_path / "m.edgec"), spec)
    x = torch.randn(1, 12, 24)
    with torch.no_grad():
        assert torch.equal(again.spec.methods["forward"].module(x), made.spec.methods["forward"].module(x))
    exported = torch.export.export(made.spec.methods["forward"].module, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(x), made.spec.methods["forward"].module(x), atol=1e-4)


def test_activations_are_gated_by_layout() -> None:
    decoder = encoder("decoder-only")
    with pytest.raises(InputError, match="decoder-only"):
        compress(decoder, "activations:weights=4,activations=4")  # type: ignore[operator]
    assert compress(decoder, "activations:weights=4,activations=8").report.edits  # type: ignore[operator]
    forced = compress(decoder, "activations:weights=4,activations=4,force=true")  # type: ignore[operator]
    assert any("forced" in n for n in forced.report.notes)
    offered = {layout: [(c.weights, c.activations) for c in ACTIVATIONS.options(encoder(layout))] for layout in ("plain", "decoder-only")}
    assert offered == {"plain": [(8, 8), (4, 8), (4, 4)], "decoder-only": [(8, 8), (4, 8)]}


def test_fewer_bits_lose_more_and_pruning_composes() -> None:
    spec = encoder()
    recipes = [f"activations:weights={w},activations={a}" for w, a in ((8, 8), (4, 8), (4, 4))]
    lost = [loss(spec, compress(spec, r).spec) for r in recipes]  # type: ignore[operator]
    assert lost[0] < 1e-3 and lost[0] < lost[1] < lost[2]
    first, then = compress(spec, ["magnitude:sparsity=0.3", recipes[1]]), compress(spec, "magnitude:sparsity=0.3")  # type: ignore[operator]
    assert loss(spec, first.spec) < loss(spec, then.spec) + 2 * lost[1]


@pytest.mark.parametrize("recipe", ["smooth", "flatten", "activations"])
def test_methods_that_look_at_inputs_want_data_and_names_that_exist(recipe: str) -> None:
    spec = encoder()
    with pytest.raises(InputError, match="calibration"):
        compress(ModelSpec("x", "0" * 64, spec.methods), recipe)  # type: ignore[operator]
    with pytest.raises(InputError, match="matches"):
        compress(spec, f"{recipe}:only=nothing")  # type: ignore[operator]


def test_convolutions_and_everything_else_go_through() -> None:
    spec = small()
    for recipe in ("activations:weights=8,activations=8", "flatten:steps=3"):
        made = compress(spec, recipe)  # type: ignore[operator]
        x = spec.methods["forward"].example_inputs
        with torch.no_grad():
            wanted, got = spec.methods["forward"].module(*x), made.spec.methods["forward"].module(*x)
        assert float(((got - wanted) ** 2).sum() / (wanted**2).sum()) < 2e-3
