"""What is compressed: a model with its calibration data, a loss on that data and a score for every held-out case."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgesdk.compress.weights import holders, replaced, rows_in, weights_of
from edgesdk.intake import load_model
from edgesdk.model import ModelSpec
from edgesdk.plan.fake_quant import samples

POSITIONS = 2048
"""Inputs of a weight that the peers are given: as many, drawn from all that calibration shows."""


@dataclass
class Subject:
    """`logits(spec, which)` are the outputs over the "calibration" or the "held-out" cases; both scores are computed from them.

    `score` gives a figure for every held-out case, higher is better; `apart` is how far every case's outputs are from the float model's, lower is
    better. Its mean over the calibration cases is what everyone's settings are chosen by; held-out cases are not looked at before that.
    """

    name: str
    spec: ModelSpec
    metric: str
    cases: str  # what the held-out cases are, for people
    logits: Callable[[ModelSpec, str], Any]
    score: Callable[[Any, Any], np.ndarray]  # held-out outputs, the float model's → [cases]
    apart: Callable[[Any, Any, str], np.ndarray]  # outputs, the float model's, which → [cases]

    def __post_init__(self) -> None:
        self.spec = ModelSpec(**{**self.spec.__dict__, "methods": copy.deepcopy(self.spec.methods)})
        self.weights = {n: w.matrix.numpy().copy() for n, w in weights_of(self.spec).items()}
        self.ops = {n: w.op for n, w in weights_of(self.spec).items()}
        self.elements = sum(w.size for w in self.weights.values())
        self.float_logits: dict[str, Any] = {}

    def outputs(self, values: Mapping[str, np.ndarray], which: str) -> Any:
        with torch.no_grad(), replaced(self.spec, {n: torch.from_numpy(np.asarray(v, np.float32)) for n, v in values.items()}):
            return self.logits(self.spec, which)

    def reference(self, which: str) -> Any:
        if which not in self.float_logits:
            self.float_logits[which] = self.outputs({}, which)
        return self.float_logits[which]

    def calibration_loss(self, values: Mapping[str, np.ndarray]) -> float:
        found = float(self.apart(self.outputs(values, "calibration"), self.reference("calibration"), "calibration").mean())
        return found if np.isfinite(found) else 1e9

    def scores(self, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Score and distance of every held-out case."""
        now, wanted = self.outputs(values, "held-out"), self.reference("held-out")
        return self.score(now, wanted), np.nan_to_num(self.apart(now, wanted, "held-out"), nan=1e9, posinf=1e9)

    def inputs(self) -> dict[str, np.ndarray]:
        """Name → inputs of a weight over the calibration data, float32 [groups, positions, cols]: what the peers calibrate with."""
        found: dict[str, list[torch.Tensor]] = {}
        hooks = []
        for name, uses in holders(self.spec).items():
            for _, _, module in uses:
                if not isinstance(module, torch.nn.Embedding):
                    hooks.append(
                        module.register_forward_pre_hook(
                            lambda m, inputs, name=name: found.setdefault(name, []).append(rows_in(m, inputs[0]).float())
                        )
                    )
        with torch.no_grad():
            for method, entry in self.spec.methods.items():
                for sample in samples(self.spec, method, 64):
                    entry.module(*sample)
        for hook in hooks:
            hook.remove()
        rng = np.random.default_rng(0)
        answer = {}
        for name, parts in found.items():
            whole = torch.cat(parts, 1).numpy()
            keep = rng.permutation(whole.shape[1])[: max(1, POSITIONS // len(whole))]
            answer[name] = np.ascontiguousarray(whole[:, np.sort(keep)])
        return answer


def apart(now: Any, wanted: Any, real: Any = None) -> np.ndarray:
    """Squared difference of logits [cases, ..., classes] over their variance, their means taken off: [cases]. `real`: which positions count."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (now, wanted))
    d, size = ((a - b) ** 2).sum(-1), (b**2).sum(-1)
    if real is not None:
        d, size = d * real, size * real
    return np.asarray(d.reshape(len(d), -1).sum(1) / (size.sum() / len(d)))


def digits() -> Subject:
    from edgesdk.examples import digits as example

    spec = load_model("example:digits-cnn")
    data = np.load(example.DATA)
    images = torch.from_numpy(data["test_images"].astype(np.float32)[:, None] / 16.0)
    labels = torch.from_numpy(data["test_labels"].astype(np.int64))
    noise = torch.Generator().manual_seed(5)
    held = torch.cat([images, *(images + 0.2 * torch.randn(images.shape, generator=noise) for _ in range(9))])
    calibration = torch.cat([c[0] for c in example._calibration("forward")])

    def score(now: Any, _: Any) -> np.ndarray:
        right = (now.argmax(-1).reshape(-1, len(labels)) == labels).double()
        return np.asarray(right.mean(0))

    return Subject(
        "digits-cnn", spec, "accuracy", "360 held-out images, each plain and with 9 draws of noise (0.2 of the range)",
        lambda spec, which: spec.methods["forward"].module(held if which == "held-out" else calibration), score,
        lambda now, wanted, _: apart(now, wanted).reshape(-1, len(labels) if len(now) % len(labels) == 0 else len(now)).mean(0),
    )  # fmt: skip


def normalizer(name: str, cases: int = 1000) -> Subject:
    """Exact match by one pass: greedy writing gives the wanted text just when every next token is the likeliest one after the wanted ones."""
    from edgesdk.examples import normalizer_data as data
    from edgesdk.examples.normalizer import pairs
    from edgesdk.sequence.pairs import IGNORED
    from edgesdk.sequence.teach import forced

    spec = load_model(f"example:{name}")
    given = {"held-out": pairs(data.cases(cases, 7, True)), "calibration": pairs(data.cases(64, 3, False))}
    sets = {which: found.batch(range(len(found))) for which, found in given.items()}

    def logits(spec: ModelSpec, which: str) -> Any:
        core, rows = spec.methods["decode"].module.core, range(len(given[which]))
        parts = [forced(core, given[which].batch(rows[at : at + 250]), data.PAD) for at in range(0, len(rows), 250)]
        longest = sets[which].wanted.shape[1]
        return torch.cat([torch.nn.functional.pad(p, (0, 0, 0, longest - p.shape[1])) for p in parts])

    def score(now: Any, _: Any) -> np.ndarray:
        wanted = sets["held-out"].wanted
        return np.asarray(((now.argmax(-1) == wanted) | (wanted == IGNORED)).all(1).double())

    def distance(now: Any, wanted: Any, which: str) -> np.ndarray:
        return apart(now, wanted, sets[which].wanted != IGNORED)

    return Subject(name, spec, "exact match", f"{cases} held-out cases whose answers no training case has", logits, score, distance)


def _elsewhere(module: str, maker: str, *args: Any) -> Callable[[], Subject]:
    """A subject of another module, which is imported when it is asked for."""
    return lambda: getattr(importlib.import_module(module), maker)(*args)  # type: ignore[no-any-return]


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "digits-cnn": digits,
    "normalizer": lambda: normalizer("normalizer"),
    "normalizer-decoder-only": lambda: normalizer("normalizer-decoder-only"),
    "g2p": _elsewhere("peers.text", "g2p"),
    **{f"mlperf-{name}": _elsewhere("peers.tiny", "subject", name) for name in ("resnet8", "vww", "kws", "ad")},
    "minilm": _elsewhere("peers.text", "minilm"),
}
"""Every model; those whose files are not there raise FileNotFoundError."""
