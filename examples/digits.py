"""`example:digits-cnn`: a small CNN on 8×8 handwritten digits.

Data: UCI "Optical Recognition of Handwritten Digits" (CC BY 4.0), as scikit-learn ships it; `digits_data.npz` holds the held-out fifth and
some training images for calibration, `digits_cnn.npz` the trained weights. `python -m edgesdk.examples.digits` makes both again in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgesdk.model import Method, ModelSpec

HERE = Path(__file__).parent
WEIGHTS, DATA = HERE / "digits_cnn.npz", HERE / "digits_data.npz"


class DigitsCnn(nn.Module):
    """float32 [1, 1, 8, 8] in 0..1 → float32 [1, 10] logits; 152 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 64, 1)
        self.down = nn.Conv2d(64, 96, 3, stride=2, padding=1)
        self.hidden = nn.Linear(96 * 2 * 2, 192)
        self.head = nn.Linear(192, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(image))
        x = torch.relu(self.pointwise(torch.relu(self.depthwise(x))))
        x = nn.functional.max_pool2d(torch.relu(self.down(x)), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def accuracy(run: Callable[[str, Sequence[Any]], list[Any]]) -> float:
    """Share of the held-out images that `run` gets right."""
    data = np.load(DATA)
    images = data["test_images"].astype(np.float32)[:, None] / 16.0
    right = sum(int(run("forward", [image[None]])[0].argmax() == label) for image, label in zip(images, data["test_labels"], strict=True))
    return right / len(images)


def _calibration(method: str) -> list[tuple[torch.Tensor]]:
    images = np.load(DATA)["calibration_images"].astype(np.float32)[:, None] / 16.0
    return [(torch.from_numpy(image[None]),) for image in images]


def digits_cnn() -> ModelSpec:
    """The trained model with its held-out evaluation and calibration data."""
    from edgesdk.examples import digest_files, load_weights

    model = load_weights(DigitsCnn(), WEIGHTS)
    methods = {"forward": Method(model, _calibration("forward")[0])}
    labels = "\n".join("0123456789").encode()
    return ModelSpec(
        name="digits-cnn", digest=digest_files(__file__, WEIGHTS), methods=methods, calibration=_calibration, evaluate=accuracy,
        quality_name="accuracy", files={"labels.txt": labels},
    )  # fmt: skip


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = 25) -> nn.Module:
    """Train a model on images [n, 1, 8, 8] and their labels [n], in place."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * (len(x) // 64 + 1))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def train(seed: int = 0) -> float:
    """Train on four fifths of scikit-learn's digits and write weights and data; returns the held-out accuracy."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(images))
    test, rest = order[:360], order[360:]
    np.savez_compressed(DATA, test_images=images[test], test_labels=labels[test], calibration_images=images[rest[:64]])
    x = torch.from_numpy(images[rest].astype(np.float32)[:, None] / 16.0)
    y = torch.from_numpy(labels[rest].astype(np.int64))
    model = fit(DigitsCnn(), x, y)
    np.savez_compressed(WEIGHTS, **{k: v.numpy() for k, v in model.state_dict().items()})
    with torch.no_grad():
        return accuracy(lambda _, inputs: [model(torch.from_numpy(inputs[0])).numpy()])


if __name__ == "__main__":
    import sys

    sys.stdout.write(f"held-out accuracy {train():.2%}\n")
