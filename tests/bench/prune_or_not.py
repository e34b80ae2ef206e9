"""Large and sparse against small and dense at equal bytes ("To prune, or not to prune", arXiv:1710.01878), everything stored counted.

    python tests/bench/prune_or_not.py [--seeds 3] [--steps 600] [--normalizer]

Digits: the built-in CNN and narrower twins, all trained alike on labels. The large one is then pruned in one shot from 64 unlabeled images; the twin
beside it is the narrowest that takes at least as many bytes. Both in float16, then both in 4 bits. Accuracy on the held-out fifth, the mean over seeds.
`--steps`: what stays is trained that long towards the large one, on the same images.
`--normalizer`: the built-in encoder-decoder, pruned against cut into narrower layers (`structured`), both from its calibration inputs, no labels.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgesdk.compress import compress
from edgesdk.compress.masks import sparse_code
from edgesdk.compress.weights import weights_of
from edgesdk.examples import digits
from edgesdk.intake import load_model
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import pack

SPARSITIES = (0.8, 0.9, 0.94, 0.96, 0.97, 0.98, 0.985)
WIDTHS = (0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.25, 0.28, 0.32, 0.36, 0.4, 0.45, 0.5)


class Twin(nn.Module):
    """`DigitsCnn` with every width times `scale`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        a, b, c, d = (max(2, round(scale * n)) for n in (32, 64, 96, 192))
        self.stem = nn.Conv2d(1, a, 3, padding=1)
        self.depthwise = nn.Conv2d(a, a, 3, padding=1, groups=a)
        self.pointwise = nn.Conv2d(a, b, 1)
        self.down = nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.hidden, self.head = nn.Linear(c * 4, d), nn.Linear(d, 10)

    forward = digits.DigitsCnn.forward


def trained(scale: float, seed: int) -> ModelSpec:
    """Trained as the built-in one is, on the same four fifths."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rest = np.random.default_rng(0).permutation(len(data.images))[360:]
    x = torch.from_numpy(data.images[rest].astype(np.float32)[:, None] / 16.0)
    y = torch.from_numpy(data.target[rest].astype(np.int64))
    torch.manual_seed(seed)
    model = digits.fit(Twin(scale), x, y).requires_grad_(False)
    calibration = digits._calibration("forward")
    return ModelSpec(f"twin-{scale}", f"{seed:064d}", {"forward": Method(model, calibration[0])}, calibration=lambda _: calibration)


@dataclass(frozen=True)
class Point:
    bytes: float
    quality: float


def accuracy(spec: ModelSpec) -> float:
    """On the held-out fifth, all images at once."""
    data = np.load(digits.DATA)
    with torch.no_grad():
        out = spec.methods["forward"].module(torch.from_numpy(data["test_images"].astype(np.float32)[:, None] / 16.0))
    return float((out.argmax(1).numpy() == data["test_labels"]).mean())


def rest_bytes(spec: ModelSpec) -> int:
    """Biases and norms, float16."""
    held = {id(p): p for e in spec.methods.values() for p in e.module.parameters()}
    return 2 * (sum(p.numel() for p in held.values()) - sum(w.matrix.numel() for w in weights_of(spec).values()))


def point(spec: ModelSpec, recipe: list[str]) -> Point:
    """The whole model's bytes and accuracy; without a recipe its weights are dense float16."""
    if recipe:
        made = compress(spec, recipe, evaluate=False)
        return Point(made.report.weight_bytes + rest_bytes(made.spec), accuracy(made.spec))
    stored = sum(len(pack(sparse_code(w.matrix, torch.ones_like(w.matrix, dtype=torch.bool)))) for w in weights_of(spec).values())
    return Point(stored + rest_bytes(spec), accuracy(spec))


def mean(points: list[Point]) -> Point:
    return Point(float(np.mean([p.bytes for p in points])), float(np.mean([p.quality for p in points])))


def on_digits(seeds: int, steps: int) -> None:
    large = [trained(1.0, s) for s in range(seeds)]
    small = {w: [trained(w, s) for s in range(seeds)] for w in WIDTHS}
    whole = mean([point(m, []) for m in large])
    say(f"digits-cnn, {seeds} seeds; the large one in float16: {whole.bytes / 1e3:.0f} kB, {whole.quality:.2%}")
    for title, later in (("float16", []), ("4 bits (gptq, a scale a row)", ["gptq:bits=4,group=0"])):
        dense = [(w, mean([point(m, later) for m in twins])) for w, twins in small.items()]
        say(f"\n{title}\n{'pruned':>8} {'kB':>7} {'accuracy':>9}   {'width':>6} {'kB':>7} {'accuracy':>9}   ahead")
        for sparsity in SPARSITIES:
            ours = mean([point(m, [f"magnitude:sparsity={sparsity},steps={steps},ramp=0", *later]) for m in large])
            enough = [(w, p) for w, p in dense if p.bytes >= ours.bytes]
            w, other = enough[0] if enough else dense[-1]
            row = f"{sparsity:>8.1%} {ours.bytes / 1e3:>7.1f} {ours.quality:>9.2%}   {w:>6.2f} {other.bytes / 1e3:>7.1f} {other.quality:>9.2%}"
            say(f"{row}   {'sparse' if ours.quality > other.quality else 'dense' if ours.quality < other.quality else 'level'}")


def on_the_normalizer() -> None:
    model = load_model("example:normalizer")
    say(f"\nnormalizer, 4 bits behind both\n{'recipe':<44} {'kB':>7} {'exact match':>12}")
    for recipe in (
        "magnitude:sparsity=0.3",
        "structured:ratio=0.2,tune=200",
        "magnitude:sparsity=0.5",
        "magnitude:sparsity=0.6",
        "structured:ratio=0.4,tune=200",
    ):
        made = compress(model, [recipe, "gptq:bits=4,group=0"])
        say(f"{recipe:<44} {(made.report.weight_bytes + rest_bytes(made.spec)) / 1e3:>7.1f} {made.report.quality:>12.1%}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--normalizer", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    on_digits(given.seeds, given.steps)
    if given.normalizer:
        on_the_normalizer()
