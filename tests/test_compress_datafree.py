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
from edgesdk.errors import InputError
from edgesdk.examples import digits
from edgesdk.model import Method, ModelSpec

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


def test_made_up_inputs_meet_the_statistics_of_every_batch_norm(model: ModelSpec) -> None:
    made = fitted(model, "forward", SyntheticConfig(steps=150))
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
    again = fitted(model, "forward", SyntheticConfig(steps=3))
    assert all(torch.equal(a, b) for (a,), (b,) in zip(again, fitted(model, "forward", SyntheticConfig(steps=3)), strict=True))


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
