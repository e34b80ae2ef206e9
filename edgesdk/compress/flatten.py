"""FlatQuant: inputs and weights are made flat before both are rounded to few bits, by a learned transform of every layer's inputs.

Source: FlatQuant: Flatness Matters for LLM Quantization (arXiv:2410.09426). y = x·Wᵀ = (x·D·T)·(W·D⁻¹·T⁻ᵀ)ᵀ with D a scale a channel and T = left ⊗ right of
sizes a·b = cols, so that T takes a·b·(a + b) multiplications a row in place of cols². Tried for each layer, against the precision to come: nothing,
a scale (SmoothQuant), a random rotation of both factors, and both of these trained by Adam through the rounding; the least output error is
taken. The transform runs before the layer (see `wrapped`); its inverse lies in the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.layers import inputs_of, layers_of, lost, need_calibration, none_found, round_matrix, round_rows
from edgesdk.compress.smooth import candidates
from edgesdk.compress.surgery import apply_edits
from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.compress.weights import holders

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

Turn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""left [a, a], right [b, b], scale [a·b]."""


class FlattenConfig(Config):
    bits: Annotated[int, Field(ge=2, le=8)] = 4  # of the weights to come
    activations: Literal[4, 8] = 4  # bits of the activations to come
    group: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=0, le=5000)] = 60  # of training from each of the two starts
    only: str = ""


class FlattenMethod:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "flatten"
    family: ClassVar[Family] = "integer"
    source: ClassVar[str] = "FlatQuant (arXiv:2410.09426)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[FlattenConfig]] = FlattenConfig

    def why_not(self, spec: ModelSpec, config: FlattenConfig) -> str | None:
        return need_calibration(spec)

    def options(self, spec: ModelSpec) -> Sequence[FlattenConfig]:
        return [FlattenConfig(), FlattenConfig(activations=8)]

    def apply(self, spec: ModelSpec, config: FlattenConfig, step: Step) -> Change:
        inputs = inputs_of(spec)
        layers = {n: m for n, m in layers_of(spec).items() if isinstance(m, torch.nn.Linear) and n in inputs and re.search(config.only, n)}
        if not layers:
            raise none_found(spec, config.only)
        edits: list[dict[str, Any]] = []
        gains, cost = [], 0
        for i, (name, module) in enumerate(layers.items()):
            uses = holders(spec)[name]
            if any(not isinstance(m, torch.nn.Linear) for _, _, m in uses):
                continue  # an embedding's weight cannot be turned with it
            step(f"flattening {name}", i / len(layers))
            matrix = module.weight.detach().float()
            turn, gain = best_turn(inputs[name], matrix, config)
            if turn is None:
                continue
            gains.append(gain)
            cost += multiplications(*(len(t) for t in turn[:2]))
            made = [{"do": "flatten", "path": p, "sizes": [len(t) for t in turn[:2]]} for p in dict.fromkeys(p for _, p, _ in uses)]
            apply_edits(spec, made)
            edits += made
            put(spec, made, turn, matrix)
        share = sum(gains) / max(1, len(gains))
        text = f"flatten: {len(gains)} of {len(layers)} layers turned, {cost} multiplications a row more; their output error fell to {share:.2f} of what it was"
        return Change(tuple(edits), (text,))


def sizes(cols: int) -> tuple[int, int]:
    """a · b = cols, as near to each other as can be."""
    a = max(d for d in range(1, int(cols**0.5) + 1) if cols % d == 0)
    return a, cols // a


def multiplications(a: int, b: int) -> int:
    """Of a row of a·b inputs with left ⊗ right, and its scale."""
    return a * b * (a + b) + a * b


def turned(x: torch.Tensor, turn: Turn) -> torch.Tensor:
    left, right, scale = turn
    made: torch.Tensor = left.T @ ((x * scale).reshape(len(x), len(left), len(right)) @ right)
    return made.reshape(x.shape)


def unturned(matrix: torch.Tensor, turn: Turn) -> torch.Tensor:
    """The weight for turned inputs: W · D⁻¹ · T⁻ᵀ."""
    left, right, scale = turn
    w = (matrix / scale).reshape(len(matrix), len(left), len(right))
    answer: torch.Tensor = (torch.linalg.inv(left) @ w @ torch.linalg.inv(right).T).reshape(matrix.shape)
    return answer


def best_turn(x: torch.Tensor, matrix: torch.Tensor, config: FlattenConfig) -> tuple[Turn | None, float]:
    """The transform of least output error (None: none helps by 2%), and the error over that without one."""

    def measure(turn: Turn) -> float:
        return lost(
            x, matrix, round_rows(turned(x, turn), config.activations), round_matrix(unturned(matrix, turn), config.bits, config.group)
        )

    a, b = sizes(x.shape[1])
    plain = (torch.eye(a), torch.eye(b), torch.ones(a * b))
    starts = [(plain[0], plain[1], 1 / s) for s in candidates(x, [matrix], x.shape[1], 5)]
    scaled = min(starts, key=measure)
    generator = torch.Generator().manual_seed(0)
    rotated = (_orthogonal(a, generator), _orthogonal(b, generator), torch.ones(a * b))
    found = [scaled, rotated, *(stored(learned(x, matrix, t, config)) for t in (scaled, rotated) if config.steps)]
    first, best = measure(plain), min(map(stored, found), key=measure)
    gain = measure(best) / max(first, 1e-30)
    return (best, gain) if gain < 0.98 else (None, 1.0)


def stored(turn: Turn) -> Turn:
    """As bfloat16 holds it, which is half the bytes; the inverse in the weights is that of these numbers."""
    left, right, scale = (t.detach().to(torch.bfloat16).float() for t in turn)
    return left, right, scale


def _orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator))
    answer: torch.Tensor = q * torch.sign(r.diagonal())
    return answer


def learned(x: torch.Tensor, matrix: torch.Tensor, start: Turn, config: FlattenConfig) -> Turn:
    """Adam on all three through both roundings (straight through), keeping the best step."""
    turn = [t.clone().requires_grad_(True) for t in (*start[:2], start[2].log())]
    optimiser = torch.optim.Adam(turn, lr=0.02)
    wanted = (x @ matrix.T).detach()
    size = float((wanted**2).mean()) + 1e-30
    best, least = start, float("inf")

    def through(t: torch.Tensor, made: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return t + (made(t) - t).detach()

    for i in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * (1 - i / config.steps)
        with torch.enable_grad():
            now: Turn = (turn[0], turn[1], turn[2].exp())
            seen = through(turned(x, now), lambda t: round_rows(t, config.activations))
            made = through(unturned(matrix, now), lambda t: round_matrix(t, config.bits, config.group))
            loss = ((seen @ made.T - wanted) ** 2).mean() / size
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        if not bool(torch.isfinite(loss)):
            break
        if float(loss.detach()) < least:
            best, least = (turn[0].detach().clone(), turn[1].detach().clone(), turn[2].detach().exp()), float(loss.detach())
        optimiser.step()
    return best


def put(spec: ModelSpec, edits: list[dict[str, Any]], turn: Turn, matrix: torch.Tensor) -> None:
    """Set the values of the modules that `edits` made."""
    weight = unturned(matrix.double(), (turn[0].double(), turn[1].double(), turn[2].double())).float()
    paths = {e["path"] for e in edits}
    with torch.no_grad():
        for entry in spec.methods.values():
            for path, module in entry.module.named_modules(remove_duplicate=False):
                if path in paths:
                    for target, value in zip(
                        (module[0].left, module[0].right, module[0].scale, module[1].weight), (*turn, weight), strict=True
                    ):
                        target.copy_(value)


METHOD = FlattenMethod()
