"""What the pruning methods share: which weights stay, how those are fitted to make good for the others, and how they are stored.

The error of a layer whose weights W become X is (X - W) H (X - W)ᵀ with H the mean of x·xᵀ. `sparsest` looks for a mask and weights of
little error by alternating directions (as ALPS, "Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models"),
`fit_kept` finds the best weights under a given mask by conjugate gradients.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgesdk.compress.types import Stats, Step, Weight
from edgesdk.compress.weights import set_weight, weights_of
from edgesdk.errors import InputError
from edgesdk.packed import Code, pack

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

Choice = Callable[[torch.Tensor], torch.Tensor]
"""Scores [..., rows, cols] → a mask of the same shape, True where a weight stays."""


def prunable(spec: ModelSpec, only: str = "") -> dict[str, Weight]:
    """The weights that pruning looks at: linears and convolutions whose names match. Raises `InputError` where there is none."""
    found = {n: w for n, w in weights_of(spec).items() if w.op != "embedding" and re.search(only, n)}
    if not found:
        raise InputError(f"{spec.name}: no linear or convolution has a name that matches only='{only}'", "leave `only` out, or correct it")
    return found


def one_shot(
    spec: ModelSpec,
    weights: Mapping[str, Weight],
    stats: Mapping[str, Stats],
    choices: Mapping[str, Choice],
    step: Step,
    *,
    inputs: bool,
    fit: bool,
) -> dict[str, torch.Tensor]:
    """Prune every weight by its choice, in place; the masks. `fit`: choose and fit by second moments, where there are any; else by size,
    with `inputs` times that of the weight's input."""
    masks = {}
    for i, (name, weight) in enumerate(weights.items()):
        step(f"pruning {name}", i / len(weights))
        seen = stats.get(name)
        if fit and seen is not None:
            matrix, mask = sparsest(weight.matrix, seen.gram, choices[name])
        else:
            mask = choices[name](weight.matrix.abs() * input_sizes(weight, seen if inputs else None))
            matrix = weight.matrix * mask
        masks[name] = mask
        set_weight(spec, name, matrix)
    return masks


# ---- choosing


def largest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """True for the `keep` largest scores of the whole tensor, the earlier of equal ones."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.argsort(scores.reshape(-1), descending=True, stable=True)[:keep]] = True
    return mask.reshape(scores.shape)


def of_every(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """True for the n largest of every m columns in a row; a shorter last group keeps its n largest, too."""
    cols = scores.shape[-1]
    padded = torch.nn.functional.pad(scores, (0, -cols % m), value=-math.inf).reshape(*scores.shape[:-1], -1, m)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    mask.scatter_(-1, torch.argsort(padded, dim=-1, descending=True, stable=True)[..., :n], True)
    return mask.reshape(*scores.shape[:-1], -1)[..., :cols]


def input_sizes(weight: Weight, stats: Stats | None) -> torch.Tensor:
    """The root mean square of the input that each weight is multiplied with, [rows, cols], their mean square over a row 1; ones without data."""
    if stats is None:
        return torch.ones_like(weight.matrix)
    power = stats.gram.diagonal(dim1=1, dim2=2).clamp_min(0)
    power = power / power.mean(1, keepdim=True).clamp_min(1e-30)
    return power.sqrt().float().repeat_interleave(weight.rows // len(power), 0)


# ---- fitting


def _scaled(gram: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """H with a diagonal of 1 (damped), and the square roots of the diagonal that it had: float64 [groups, cols, cols], [groups, 1, cols]."""
    h = gram.double().clone()
    diagonal = h.diagonal(dim1=1, dim2=2)
    diagonal += (damp * diagonal.mean(1, keepdim=True)).clamp_min(1e-10)
    size = diagonal.sqrt()
    return h / size[:, :, None] / size[:, None, :], size[:, None, :]


def fit_kept(matrix: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, *, damp: float = 0.01, rounds: int = 60) -> torch.Tensor:
    """The weights [rows, cols] of least output error that are 0 outside the mask (each row by conjugate gradients), float32."""
    h, size = _scaled(gram, damp)
    shape = (len(h), -1, matrix.shape[1])
    w = matrix.double().reshape(shape) * size
    kept = mask.reshape(w.shape).double()
    x = w * kept
    r = ((w - x) @ h) * kept
    p, power = r.clone(), (r * r).sum(2, keepdim=True)
    for _ in range(min(rounds, matrix.shape[1])):
        if float(power.max()) <= 1e-20 * float((w * w).sum(2).max()):
            break
        hp = (p @ h) * kept
        a = power / (p * hp).sum(2, keepdim=True).clamp_min(1e-300)
        x, r = x + a * p, r - a * hp
        before, power = power, (r * r).sum(2, keepdim=True)
        p = r + power / before.clamp_min(1e-300) * p
    return (x / size).reshape(matrix.shape).float()


def sparsest(
    matrix: torch.Tensor, gram: torch.Tensor, choose: Choice, *, damp: float = 0.01, rounds: int = 40
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, mask) of little output error with a mask that `choose` allows: weights are pulled towards what their mask leaves, ever
    harder, then fitted under it. Never worse than the mask by size and input."""
    h, size = _scaled(gram, damp)
    w = matrix.double().reshape(len(h), -1, matrix.shape[1]) * size
    values, vectors = torch.linalg.eigh(h)
    wanted = w @ h
    mask = choose((w * w).reshape(matrix.shape))
    best, best_mask = fit_kept(matrix, mask, gram, damp=damp), mask
    least = error_of(matrix, best, gram)
    target, dual = w * mask.reshape(w.shape), torch.zeros_like(w)
    for pull in torch.logspace(-2, 1, rounds, dtype=torch.float64).tolist():
        x = (((wanted + pull * (target - dual)) @ vectors) / (values + pull)[:, None]) @ vectors.transpose(1, 2)
        mask = choose(((x + dual) ** 2).reshape(matrix.shape))
        target = (x + dual) * mask.reshape(w.shape)
        dual = dual + x - target
    fitted = fit_kept(matrix, mask, gram, damp=damp)
    return (fitted, mask) if error_of(matrix, fitted, gram) < least else (best, best_mask)


def error_of(matrix: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    d = (other - matrix).double().reshape(len(gram), -1, matrix.shape[1])
    return float(((d @ gram.double()) * d).sum())


# ---- storing


def sparse_code(matrix: torch.Tensor, mask: torch.Tensor, *, half: bool = True, pattern: tuple[int, int] | None = None) -> Code:
    """Only what the mask leaves of a matrix, as float16 or float32, and where it is; for n of every m (`pattern`) the pattern of each group.

    Raises `InputError` where float16 cannot hold a value.
    """
    values = matrix[mask].numpy().astype(np.float32)
    if half and values.size and not bool(np.isfinite(values.astype(np.float16)).all()):
        raise InputError("a weight that stays is too large for float16", 'set store="float32"')
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    kept = Code("dense", (1, len(values)), (), (values.astype(np.float16 if half else np.float32)[None],))
    plain = Code("sparse", shape, (), (mask.to(torch.uint8).numpy(),), (kept,))
    if pattern is None or math.comb(pattern[1], pattern[0]) > 256:
        return plain
    grouped = Code("sparse", shape, (), (), (kept, _pattern_code(mask, *pattern)))
    return min(grouped, plain, key=lambda c: len(pack(c)))


def _pattern_code(mask: torch.Tensor, n: int, m: int) -> Code:
    """A mask of n of every m as indices of the patterns that occur."""
    rows, cols = mask.shape
    groups = torch.nn.functional.pad(mask, (0, -cols % m)).reshape(-1, m).to(torch.uint8).numpy()
    known = np.array([[i in c for i in range(m)] for k in range(n + 1) for c in itertools.combinations(range(m), k)], np.uint8)
    place = {bytes(p): i for i, p in enumerate(known)}
    found = np.array([place[bytes(g)] for g in groups])
    used, q = np.unique(found, return_inverse=True)
    q = q.reshape(rows, -1).astype(np.uint8 if len(used) <= 256 else np.uint16)
    return Code("vector", (rows, cols), (m, 0), (q, known[used], np.zeros(0, np.float16)))


def mask_of(code: Code | None) -> torch.Tensor | None:
    """Where the weights of a sparse code are that were not pruned; None for another code."""
    if code is None or code.kind != "sparse":
        return None
    from edgesdk.packed import places

    return torch.from_numpy(places(code))


def report(weights: Mapping[str, Weight], masks: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """How much of which weight was pruned, for people."""
    total, left = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    lines = [f"{n}: {1 - float(m.double().mean()):.1%} of {weights[n].rows}x{weights[n].cols} pruned" for n, m in masks.items()]
    return (f"{1 - left / max(1, total):.2%} of {total} weights pruned", *lines)
