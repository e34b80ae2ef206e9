"""Compression without data: channels cut and quantized in closed form, calibration inputs made up from batch norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.compress import compress
from edgesdk.compress.synthetic import SyntheticConfig, distance, fitted, norms_of, with_synthetic
from edgesdk.compress.udfc import rebuilt
from edgesdk.compress.weights import weights_of
from edgesdk.errors import InputError
from edgesdk.examples import digits
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import decode, pack

torch.set_num_threads(1)


class NormCnn(nn.Module):
    """float32 [B, 1, 8, 8] → [B, 10], batch norms behind its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    """Trained for a moment on digits; it has no calibration inputs."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))[360:]  # the example's held-out fifth stays held out
    x, y = torch.from_numpy(data.images[order].astype(np.float32))[:, None] / 16, torch.from_numpy(data.target[order].astype(np.int64))
    net = NormCnn()
    optimiser = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(5):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    net.eval().requires_grad_(False)
    return ModelSpec("norm-cnn", "0" * 64, {"forward": Method(net, (x[:1],))}, evaluate=digits.accuracy, quality_name="accuracy")


# ---- synthetic


@pytest.mark.parametrize("by", ["generator", "inputs"])
def test_made_up_inputs_meet_the_statistics_of_every_batch_norm(model: ModelSpec, by: Any) -> None:
    made = fitted(model, "forward", SyntheticConfig(steps=150, by=by))
    module, x = model.methods["forward"].module, torch.cat([row for (row,) in made])
    assert x.shape == (64, 1, 8, 8) and bool(torch.isfinite(x).all())
    with torch.no_grad():
        assert float(distance(module, x)) < 0.1 * float(distance(module, torch.randn_like(x)))
    seen: dict[int, torch.Tensor] = {}
    hooks = [n.register_forward_pre_hook(lambda m, i: seen.__setitem__(id(m), i[0])) for n in norms_of(module)]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    for norm in norms_of(module):
        got = seen[id(norm)].movedim(1, -1).reshape(-1, norm.num_features)
        assert float(((got.mean(0) - norm.running_mean) / norm.running_var.sqrt()).abs().mean()) < 0.2
        assert float((got.var(0) / norm.running_var).log().abs().mean()) < 0.4
    again, other = (fitted(model, "forward", SyntheticConfig(steps=3, by=by)) for _ in range(2))
    assert all(torch.equal(a, b) for (a,), (b,) in zip(again, other, strict=True))
    assert not any(m._forward_pre_hooks for m in module.modules())  # nothing swings any more


def test_made_up_inputs_calibrate_better_than_noise(model: ModelSpec) -> None:
    real = digits._calibration("forward")
    noise = [(torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)),) for i in range(64)]
    x = torch.cat([row for (row,) in real])
    with torch.no_grad():
        wanted = model.methods["forward"].module(x)

    def off(spec: ModelSpec, recipe: Any) -> float:
        done = compress(spec, recipe, evaluate=False)
        with torch.no_grad():
            return float((done.spec.methods["forward"].module(x) - wanted).square().mean() / wanted.var())

    errors = {
        "real": off(replace(model, calibration=lambda _: real), "gptq:bits=3,group=0"),
        "synthetic": off(model, ["synthetic:low=0,high=1", "gptq:bits=3,group=0"]),
        "noise": off(replace(model, calibration=lambda _: noise), "gptq:bits=3,group=0"),
    }
    assert errors["real"] < errors["noise"] and errors["synthetic"] < errors["noise"]
    made = with_synthetic(model, SyntheticConfig(count=8, steps=2))
    assert made.calibration is not None and len(made.calibration("forward")) == 8 and model.calibration is None


def test_models_without_batch_norms_or_with_tokens_are_refused() -> None:
    plain = ModelSpec("plain", "0" * 64, {"forward": Method(nn.Linear(4, 2).eval(), (torch.zeros(1, 4),))})
    with pytest.raises(InputError, match="no batch norm"):
        compress(plain, "synthetic")
    tokens = ModelSpec(
        "tokens", "0" * 64, {"forward": Method(nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(3)).eval(), (torch.zeros(1, 3).long(),))}
    )
    with pytest.raises(InputError, match="one tensor of floats"):
        fitted(tokens, "forward", SyntheticConfig())


# ---- udfc


def off_by(model: ModelSpec, spec: ModelSpec) -> float:
    """How far a compressed model's answers to real images are from the whole one's, over their variance."""
    x = torch.cat([row for (row,) in digits._calibration("forward")])
    with torch.no_grad():
        wanted, got = (s.methods["forward"].module(x) for s in (model, spec))
    return float((got - wanted).square().mean() / wanted.var())


def test_compensation_rebuilds_cut_and_rounded_channels(model: ModelSpec) -> None:
    before = sum(p.numel() for p in model.methods["forward"].module.parameters())
    kept, plain = (compress(model, f"udfc:ratio=0.3,bits=6,compensate={c}") for c in ("true", "false"))
    assert off_by(model, kept.spec) < 0.4 * off_by(model, plain.spec)
    assert kept.report.quality is not None and plain.report.quality is not None and kept.report.quality > plain.report.quality + 0.1
    assert sum(p.numel() for p in kept.spec.methods["forward"].module.parameters()) <= 0.72 * before
    held = weights_of(kept.spec)
    assert set(kept.spec.codes) == set(held) and kept.report.weight_bytes == sum(len(pack(c)) for c in kept.spec.codes.values())
    for name, code in kept.spec.codes.items():
        assert code.kind == "grid" and np.array_equal(decode(code), held[name].matrix.numpy())
    four, four_plain = (compress(model, f"udfc:ratio=0,bits=4,compensate={c}", evaluate=False) for c in ("true", "false"))
    assert off_by(model, four.spec) < off_by(model, four_plain.spec)
    assert compress(model, "udfc:ratio=0.3", evaluate=False).spec.digest == compress(model, "udfc:ratio=0.3", evaluate=False).spec.digest


def test_the_closed_form_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    was = torch.randn(300, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 0.5
    now = torch.relu(was[:, :4] + 0.1 * torch.randn(300, 4, generator=generator, dtype=torch.float64))
    change, shift = rebuilt(was, now, 1e-12)
    best = torch.linalg.lstsq(torch.cat([now, torch.ones(300, 1, dtype=torch.float64)], 1), was).solution.T
    torch.testing.assert_close(torch.cat([change, shift[:, None]], 1), best, atol=1e-6, rtol=1e-6)
    same, none = rebuilt(was, was, 0.02)
    torch.testing.assert_close(same, torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(none.abs().max()) < 1e-9


class Sums(nn.Module):
    """The last six channels are copies of the first six: cutting them must leave no trace, through a kernel and through a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Conv2d(2, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3), nn.Linear(36, 3)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.normal_()
            for tensor in (self.a.weight, self.norm.weight, self.norm.bias):
                tensor[6:] = tensor[:6]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.b(nn.functional.silu(self.norm(self.a(x))))).flatten(1))
        return out


def test_redundant_channels_go_without_a_trace_and_bad_requests_are_said() -> None:
    torch.manual_seed(0)
    net = Sums().eval().requires_grad_(False)
    spec = ModelSpec("sums", "0" * 64, {"forward": Method(net, (torch.randn(1, 2, 7, 7),))})
    total = sum(p.numel() for p in net.parameters())
    cut = 6 * (18 + 2 + 36)
    done = compress(spec, f"udfc:ratio={cut / total - 1e-6},quantize=false,strength=1e-9")
    module = done.spec.methods["forward"].module
    assert module.a.out_channels == 6
    x = torch.randn(4, 2, 7, 7)
    torch.testing.assert_close(module(x), net(x), atol=1e-4, rtol=1e-3)
    with pytest.raises(InputError, match="ask for nothing"):
        compress(spec, "udfc:ratio=0,quantize=false")
    with pytest.raises(InputError, match="no channels"):
        compress(ModelSpec("line", "0" * 64, {"forward": Method(nn.Linear(4, 2).eval(), (torch.zeros(1, 4),))}), "udfc")
