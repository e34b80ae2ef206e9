"""Pruning: what hangs together is found, cuts are exact, shapes, bytes and MACs fall, and programs made of the result run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.compress import compress
from edgesdk.compress.dependency import trace
from edgesdk.compress.depth import blocks_of, removal
from edgesdk.compress.ecoflap import felt
from edgesdk.compress.magnitude import cubic
from edgesdk.compress.masks import error_of, fit_kept, largest, prunable, sparse_code, sparsest
from edgesdk.compress.nm import NmConfig, Trained
from edgesdk.compress.shrink import copy_of, cuttable, edits_of, mask, outputs
from edgesdk.compress.surgery import apply_edits
from edgesdk.compress.weights import weights_of
from edgesdk.errors import InputError
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import decode, pack, unpack

torch.set_num_threads(1)


def spec_of(module: nn.Module, *shape: int, count: int = 24, calibration: bool = True, rank: int = 0) -> ModelSpec:
    """A model with random inputs; `rank` makes inputs that lie in so few dimensions."""
    generator = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(1, *shape, generator=generator),) for _ in range(count)]
    if rank:
        basis = torch.randn(rank, shape[-1], generator=generator)
        inputs = [(torch.randn(1, *shape[:-1], rank, generator=generator) @ basis,) for _ in range(count)]
    module = module.eval().requires_grad_(False)
    return ModelSpec(
        name="small",
        digest="0" * 64,
        methods={"forward": Method(module, inputs[0])},
        calibration=(lambda method: inputs) if calibration else None,
    )


class Residual(nn.Module):
    """Two channels of a residual join are one unit; batch-norm and depthwise follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner, self.inner_norm = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.last, self.head = nn.Conv2d(12, 10, 1), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.norm(self.stem(x)))
        x = x + torch.relu(self.inner_norm(self.inner(x)))
        return self.head(torch.relu(self.last(self.depthwise(x))).mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(14, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.a(x))
        b = nn.functional.interpolate(torch.relu(self.b(a)), scale_factor=2.0)
        return self.c(torch.cat([a, b], 1))


class Attention(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.width = heads, dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            f(x).reshape(x.shape[0], x.shape[1], self.heads, self.width // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.width))


class Transformer(nn.Module):
    def __init__(self, dim: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.attention, self.norm, self.gate, self.up = Attention(dim), nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.down, self.head = nn.Linear(hidden, dim), nn.Linear(dim, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        h = self.norm(x)
        return self.head(x + self.down(nn.functional.silu(self.gate(h)) * self.up(h)))


def seeded(make: Any, *args: Any) -> nn.Module:
    torch.manual_seed(0)
    module = make(*args)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return module


CASES = [(Residual, (3, 8, 8), {"inner", "last"}), (Concat, (3, 8, 8), {"a", "b"}), (Transformer, (6, 16), {"attention.q", "gate"})]


@pytest.mark.parametrize(("make", "shape", "makers"), CASES)
def test_groups_are_found_and_cutting_equals_masking(make: Any, shape: tuple[int, ...], makers: set[str]) -> None:
    spec = spec_of(seeded(make), *shape)
    families = cuttable(spec, [f for f in trace(spec).families if f.exact])
    made = {a.path for f in families for a in f.axes if a.dim == 0}
    assert makers <= made
    for family in families:
        masked, cut = copy_of(spec), copy_of(spec)
        mask(masked, family, [1, 2])
        apply_edits(cut, edits_of(cut, family, [u for u in range(len(family.units)) if u not in (1, 2)]))
        for a, b in zip(outputs(masked), outputs(cut), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_residual_norm_and_depthwise_channels_are_one_unit() -> None:
    spec = spec_of(seeded(Residual), 3, 8, 8)
    family = next(f for f in trace(spec).families if any(a.path == "stem" for a in f.axes))
    assert {a.path for a in family.axes} == {"stem", "norm", "inner", "inner_norm", "depthwise", "last"}
    assert not any(a.path == "head" and a.dim == 0 for f in trace(spec).families for a in f.axes)  # outputs stay


def test_structured_shrinks_what_is_stored_and_computed() -> None:
    spec = spec_of(seeded(Residual), 3, 8, 8)
    done = compress(spec, "structured:ratio=0.4")
    parameters = sum(p.numel() for p in done.spec.methods["forward"].module.parameters())
    assert parameters <= 0.6 * sum(p.numel() for p in spec.methods["forward"].module.parameters())
    assert spec.methods["forward"].module.stem.out_channels == 12  # the given model stays as it was
    again = copy_of(spec)  # the edits alone make the same shapes, as on load
    apply_edits(again, done.report.edits)
    shapes = [p.shape for p in again.methods["forward"].module.parameters()]
    assert shapes == [p.shape for p in done.spec.methods["forward"].module.parameters()]
    assert compress(spec, "structured:ratio=0.4").spec.digest == done.spec.digest


def test_structured_without_data_and_bad_requests() -> None:
    bare = spec_of(seeded(Concat), 3, 8, 8, calibration=False)
    assert compress(bare, "structured:ratio=0.3,importance=magnitude").report.edits
    with pytest.raises(InputError, match="no calibration data"):
        compress(bare, "structured:ratio=0.3")
    with pytest.raises(InputError, match="ratio"):
        compress(bare, "structured:ratio=1.5,importance=magnitude")
    with pytest.raises(InputError, match="can be cut out"):
        compress(spec_of(nn.Linear(8, 4), 8), "structured:ratio=0.3")


def test_tied_embeddings_stay_tied_when_their_width_is_cut() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(20, 12), nn.LayerNorm(12), nn.Linear(12, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.embed(ids)))

    ids = [(torch.randint(0, 20, (1, 5), generator=torch.Generator().manual_seed(i)),) for i in range(8)]
    torch.manual_seed(0)
    spec = ModelSpec("tied", "0" * 64, {"forward": Method(Tied().eval().requires_grad_(False), ids[0])}, calibration=lambda m: ids)
    done = compress(spec, "structured:ratio=0.3,residual=true")
    module = done.spec.methods["forward"].module
    assert module.head.weight is module.embed.weight and module.embed.weight.shape == (20, module.norm.weight.shape[0])
    assert module.norm.weight.shape[0] < 12


def test_a_pruned_program_runs() -> None:
    from edgesdk.lower import lower

    spec = spec_of(seeded(Transformer), 6, 16, rank=6)
    done = compress(spec, "structured:ratio=0.3")
    program = lower(done.spec, "executorch", {})
    assert len(program) < len(lower(spec, "executorch", {}))
    assert np.allclose(run_pte(program, done.spec), outputs(done.spec)[0].numpy(), atol=1e-4)


def run_pte(program: bytes, spec: ModelSpec) -> Any:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(program).load_method("forward")
    return method.execute([t.contiguous() for t in spec.methods["forward"].example_inputs])[0].numpy()


# ---- single weights


def test_magnitude_hits_the_share_exactly_and_stores_less() -> None:
    spec = spec_of(seeded(Transformer), 6, 16)
    for recipe in (
        "magnitude:sparsity=0.6",
        "magnitude:sparsity=0.6,allocation=even",
        "magnitude:sparsity=0.6,allocation=global,steps=12,every=3",
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


def distilled(seed: int, **settings: Any) -> tuple[float, Trained]:
    """The error of a small network's outputs after training under masks, over their variance, on inputs it was not trained on."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    spec = spec_of(net, 16, count=64)
    teacher, weights = copy_of(spec), prunable(spec)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    trained = Trained(spec, weights, {}, dict.fromkeys(weights, settings["n"]), NmConfig(inputs=False, fit=False, rate=3e-3, **settings))
    masks = trained.run(lambda text, share: None, teacher)
    assert all(
        holds(weights_of(spec)[n].matrix, settings["n"], settings["m"]) and bool((weights_of(spec)[n].matrix[~m] == 0).all())
        for n, m in masks.items()
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


# ---- neurons and heads from unlabeled inputs


class Planted(nn.Module):
    """Half of the neurons, and one of four heads, are copies or sums of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(16, 4), nn.Linear(16, 24), nn.Linear(24, 5)
        with torch.no_grad():
            self.up.weight[12:] = 2.0 * self.up.weight[:12]  # relu(2x) = 2 relu(x)
            self.up.bias[12:] = 2.0 * self.up.bias[:12]
            for layer in (self.attention.q, self.attention.k, self.attention.v):
                layer.weight[12:], layer.bias[12:] = layer.weight[:4], layer.bias[:4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x + self.attention(x))))


def test_redundant_neurons_and_heads_go_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **named: Any) -> None:
        raise AssertionError("a gradient or an optimiser was used")

    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", forbidden)
    spec = spec_of(seeded(Planted), 6, 16)
    attention, neurons = 4 * 4 * (3 * 16 + 16) // 4 + 3 * 4, 12 * (16 + 1 + 5)
    total = sum(p.numel() for p in spec.methods["forward"].module.parameters())
    done = compress(spec, f"neurons:ratio={(attention + neurons) / total - 1e-6},damp=1e-9")
    module = done.spec.methods["forward"].module
    assert module.up.out_features == 12 and module.attention.heads == 3 and module.attention.q.out_features == 12
    fresh = torch.randn(3, 6, 16)
    with torch.no_grad():
        torch.testing.assert_close(module(fresh), spec.methods["forward"].module(fresh), atol=2e-4, rtol=1e-3)


def test_correction_and_rank_beat_cutting_by_size() -> None:
    spec = spec_of(seeded(Transformer, 16, 64), 6, 16, rank=6)
    wanted = outputs(spec)[0]

    def error(recipe: str) -> float:
        return float((outputs(compress(spec, recipe).spec)[0] - wanted).square().mean() / wanted.var())

    best = error("neurons:ratio=0.3")
    assert best < 0.5 * error("neurons:ratio=0.3,correct=false")
    assert best < 0.5 * error("structured:ratio=0.3,importance=magnitude,refit=false")
    assert error("neurons:ratio=0.3,rank=leverage") < error("structured:ratio=0.3,importance=magnitude,refit=false")
    with pytest.raises(InputError, match="no calibration data"):
        compress(spec_of(seeded(Concat), 3, 8, 8, calibration=False), "neurons:ratio=0.3")


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


# ---- blocks


class Layer(nn.Module):
    def __init__(self, strength: float) -> None:
        super().__init__()
        self.norm, self.k, self.up, self.down, self.strength = (
            nn.LayerNorm(12),
            nn.Linear(12, 6),
            nn.Linear(12, 24),
            nn.Linear(24, 12),
            strength,
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x + self.strength * self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, strengths: tuple[float, ...] = (1.0, 0.01, 1.0, 0.7)) -> None:
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(8, 12), nn.ModuleList(Layer(s) for s in strengths), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class Start(nn.Module):
    """All layers' caches, one row each, as models with explicit caches have them."""

    def __init__(self, core: Stack) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, rows = self.core.first(x), []
        for layer in self.core.layers:
            rows.append(layer.k(layer.norm(x)))
            x = layer(x)
        return self.core.last(x), torch.stack(rows)


class Next(nn.Module):
    def __init__(self, core: Stack) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, rows = self.core.first(x), []
        for i, layer in enumerate(self.core.layers):
            rows.append(cache[i] + layer.k(layer.norm(x)))
            x = layer(x) + nn.functional.pad(rows[-1], (0, 6)) * layer.strength
        return self.core.last(x), torch.stack(rows)


@pytest.mark.parametrize("score", ["entropy", "similarity", "output"])
def test_a_block_that_does_next_to_nothing_is_left_out_first(score: str) -> None:
    spec = spec_of(seeded(Stack), 5, 8)
    done = compress(spec, f"depth:score={score}")
    assert "layers.1 left out" in done.report.notes[0]
    module = done.spec.methods["forward"].module
    assert len(module.layers) == 3 and len(spec.methods["forward"].module.layers) == 4
    torch.testing.assert_close(outputs(done.spec)[0], outputs(spec)[0], atol=0.05, rtol=0.1)


def test_caches_lose_the_row_of_a_block_in_every_method_and_files_keep_it(tmp_path: Any) -> None:
    from edgesdk.compress.saved import load

    torch.manual_seed(0)
    core = Stack().eval().requires_grad_(False)
    start, then = Start(core), Next(core)
    xs = [torch.randn(1, 5, 8) for _ in range(8)]
    caches = [start(x)[1] for x in xs]
    given = {"prefill": [(x,) for x in xs], "decode": list(zip(xs, caches, strict=True))}
    spec = ModelSpec(
        "stack",
        "0" * 64,
        {"prefill": Method(start, given["prefill"][0]), "decode": Method(then, given["decode"][0])},
        calibration=given.__getitem__,
    )
    done = compress(spec, ["depth:tune=5", "rtn:bits=8"])
    module, inputs = done.spec.methods["decode"].module, done.spec.methods["decode"].example_inputs
    assert inputs[1].shape[0] == 3 and len(module.core.layers) == 3 and module.core is done.spec.methods["prefill"].module.core
    assert done.spec.calibration is not None and done.spec.calibration("decode")[2][1].shape[0] == 3
    assert spec.methods["decode"].example_inputs[1].shape[0] == 4
    logits, cache = module(*inputs)
    whole, _ = then(*given["decode"][0])
    assert cache.shape[0] == 3 and float((logits - whole).abs().max()) < 0.2
    again = load(done.save(tmp_path / "stack.edgec"), base=spec)
    assert torch.equal(again.spec.methods["decode"].module(*again.spec.methods["decode"].example_inputs)[0], logits)


def test_ranking_blocks_beats_chance_and_too_many_are_refused() -> None:
    ours = chance = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        strengths = tuple(float(s) for s in torch.rand(6) ** 2)
        spec = spec_of(Stack(strengths), 5, 8)
        wanted = outputs(spec)[0]
        left = {p: removal(spec, p) for p in blocks_of(spec)}
        errors = []
        for found in left.values():
            assert found is not None
            trial = copy_of(spec)
            apply_edits(trial, found.edits)
            errors.append(float((outputs(trial)[0] - wanted).square().mean()))
        chance += sum(errors) / len(errors)
        ours += float((outputs(compress(spec, "depth").spec)[0] - wanted).square().mean())
    assert ours < 0.5 * chance
    with pytest.raises(InputError, match="no list of blocks"):
        compress(spec_of(seeded(Concat), 3, 8, 8), "depth")
    with pytest.raises(InputError, match="no further one"):
        compress(spec_of(seeded(Stack), 5, 8), "depth:blocks=9")
