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
from edgesdk.compress.shrink import copy_of, cuttable, edits_of, mask, outputs
from edgesdk.compress.surgery import apply_edits
from edgesdk.errors import InputError
from edgesdk.model import Method, ModelSpec
from tests.small_models import Attention, Concat, Residual, Transformer, seeded, spec_of

torch.set_num_threads(1)

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

    loaded = Runtime.get().load_program(program)  # a method reads what its program holds: keep it
    method = loaded.load_method("forward")
    return method.execute([t.contiguous() for t in spec.methods["forward"].example_inputs])[0].numpy()


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


@pytest.mark.parametrize("score", ["entropy", "similarity", "output"])
def test_a_block_that_does_next_to_nothing_is_left_out_first(score: str) -> None:
    spec = spec_of(seeded(Stack), 5, 8)
    done = compress(spec, f"depth:score={score}")
    assert "layers.1 left out" in done.report.notes[0]
    module = done.spec.methods["forward"].module
    assert len(module.layers) == 3 and len(spec.methods["forward"].module.layers) == 4
    torch.testing.assert_close(outputs(done.spec)[0], outputs(spec)[0], atol=0.05, rtol=0.1)


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
            apply_edits(trial, [found.edit])
            errors.append(float((outputs(trial)[0] - wanted).square().mean()))
        chance += sum(errors) / len(errors)
        ours += float((outputs(compress(spec, "depth").spec)[0] - wanted).square().mean())
    assert ours < 0.5 * chance
    with pytest.raises(InputError, match="no list of blocks"):
        compress(spec_of(seeded(Concat), 3, 8, 8), "depth")
    with pytest.raises(InputError, match="no further one"):
        compress(spec_of(seeded(Stack), 5, 8), "depth:blocks=9")
