"""Pruning: what hangs together is found, cuts are exact, shapes, bytes and MACs fall, and programs made of the result run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.compress import compress
from edgesdk.compress.dependency import trace
from edgesdk.compress.shrink import copy_of, cuttable, edits_of, mask, outputs
from edgesdk.compress.surgery import apply_edits
from edgesdk.errors import InputError
from edgesdk.model import Method, ModelSpec


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
