"""Fine-tuned models as small differences to one base model: low-rank residuals, dropped and rescaled differences, masks.

lowrank   "Efficient Storage of Fine-Tuned Models via Low-Rank Approximation of Weight Residuals" (arXiv:2305.18425): W = base + L1·L2, ranks chosen
          layer by layer within one budget of bytes, by the squared singular value that a stored byte buys, factors in few bits. With `data` values are
          taken in the space of the inputs, rows weighed by the outputs' gradients (as in `lqlora`): better with inputs of the new task, far worse with
          those of the old one (a normalizer taught other dates, 0.5 bits: 40.0% against 87.0%)
dare      "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch" (arXiv:2311.03099): a share p of the
          differences is dropped at random, the rest multiplied by 1 / (1 - p), which keeps the expectation. It fails where differences are large
          (the paper: ranges of 0.002 work, 0.03 do not, at weights of about 0.02); such a model is refused
mask      "Masking as an Efficient Alternative to Finetuning for Pretrained Language Models" (arXiv:2004.12406): a learned bit a weight, which keeps
          or cuts it (`learn_masks`)
Norms and biases are stored as they are, rounded to float16. The answer saves as a `.edgec` that names the base model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from edgesdk.compress.lqlora import LqloraConfig, Task, tasks_of
from edgesdk.compress.pipeline import CodedWeight, Compressed, Compression, Stage, digest_of
from edgesdk.compress.rtn import RtnConfig, grid_of, to_code
from edgesdk.compress.svd import Spectrum, factor_bytes, factor_code, spectrum_of
from edgesdk.compress.types import Config, Step, Weight
from edgesdk.compress.weights import holders, output_error, set_weight, weights_of
from edgesdk.errors import InputError
from edgesdk.packed import Code, decode, pack
from edgesdk.plan.fake_quant import run

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

How = Literal["lowrank", "dare", "mask"]


class DeltaConfig(Config):
    how: How = "lowrank"
    bits: Annotated[float, Field(gt=0, le=32)] = 2.0  # lowrank: bits a weight for all differences together
    factors: Literal[4, 6, 8, 16] = 4  # lowrank: bits of the factors
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.9  # dare: share of the differences that is dropped
    values: Annotated[int, Field(ge=2, le=8)] = 4  # dare: bits of the differences that are left
    seed: int = 0  # dare
    limit: Annotated[float, Field(gt=0)] = (
        0.5  # dare: refuse where the largest percent of the differences is above this, in deviations of the weights
    )
    data: bool = False  # lowrank: weigh by the tuned model's calibration inputs; only with inputs of the new task


def delta(
    base: ModelSpec, tuned: ModelSpec, config: DeltaConfig | None = None, *, ref: str = "", evaluate: bool = True, step: Step | None = None
) -> Compressed:
    """`tuned` as a difference to `base`, both of the same shape; `ref`: what `base` was loaded by, so that the file can name it.

    The report's quality is the tuned model's own `evaluate`, before and after. Raises `InputError`: other shapes, nothing differs, DARE beyond its limit,
    masks where weights are not masked.
    """
    config, step = config or DeltaConfig(), step or (lambda text, share: None)
    before, after = weights_of(base), weights_of(tuned)
    _same_shapes(base, tuned, before, after)
    if all(torch.equal(after[n].matrix, w.matrix) for n, w in before.items()):
        raise InputError(f"{tuned.name} has the weights of {base.name}", "give the fine-tuned model second")
    make = {"lowrank": _low_rank, "dare": _dare, "mask": _masks}[config.how]
    codes = make(tuned, before, after, config, step)
    spec = replace(tuned, methods=copy.deepcopy(tuned.methods), codes={}, digest=base.digest, name=f"{tuned.name}-compressed")
    _round_the_rest(spec)
    rows = []
    for name, code in codes.items():
        decoded = torch.from_numpy(decode(code, before[name].matrix.numpy()))
        set_weight(spec, name, decoded)
        error = output_error(replace(after[name], matrix=after[name].matrix), decoded, None)
        settings = config.model_dump(mode="json", include=FIELDS[config.how])
        size = 4 * after[name].matrix.numel()
        rows.append(
            CodedWeight(weight=name, method=f"delta-{config.how}", settings=settings, bytes=len(pack(code)), float_bytes=size, error=error)
        )
    quality = quality_before = None
    if evaluate and tuned.evaluate:
        step(f"measuring {tuned.quality_name}", 0.95)
        quality_before, quality = (float(tuned.evaluate(run(s))) for s in (tuned, spec))
    elements = sum(w.matrix.numel() for w in after.values())
    digest = digest_of(spec, ())
    report = Compression(
        model=tuned.name, base=ref, base_digest=base.digest, compressed_digest=digest, stages=(Stage(method="delta", settings=config.model_dump(mode="json")),),
        weights=tuple(rows), kept={}, weight_elements=elements, weight_bytes=sum(r.bytes for r in rows), float_bytes=4 * elements,
        quality=quality, quality_before=quality_before,
    )  # fmt: skip
    return Compressed(replace(spec, alternatives={}, digest=digest), report, base, codes)


FIELDS: dict[str, set[str]] = {"lowrank": {"bits", "factors", "data"}, "dare": {"drop", "values", "seed"}, "mask": set()}
BASE = "base"


def _same_shapes(base: ModelSpec, tuned: ModelSpec, before: Mapping[str, Weight], after: Mapping[str, Weight]) -> None:
    states = [{f"{m}/{k}": tuple(v.shape) for m, e in s.methods.items() for k, v in e.module.state_dict().items()} for s in (base, tuned)]
    if not states[0] or states[0] != states[1] or list(before) != list(after):
        other = sorted({n for s in states for n in s if states[0].get(n) != states[1].get(n)})
        what = f": {other[0]} differs" if other else ""
        raise InputError(f"{tuned.name} is no fine-tuned {base.name}{what}", "both must have the same methods, weights and shapes")


def _round_the_rest(spec: ModelSpec) -> None:
    """Norms, biases and whatever is no weight matrix: float32 rounded to float16 where that is near."""
    weights = {id(uses[0][2].weight) for uses in holders(spec).values()}
    with torch.no_grad():
        for entry in spec.methods.values():
            for value in [*entry.module.parameters(), *entry.module.buffers()]:
                if id(value) not in weights and value.dtype == torch.float32:
                    half = value.half().float()
                    if bool(((half - value).abs() <= 1e-3 * value.abs() + 1e-7).all()):
                        value.copy_(half)


def _plus(shape: Sequence[int], *parts: Code) -> Code:
    rows, cols = shape
    own = Code(BASE, (rows, cols))
    return Code("sum", (rows, cols), (), (), (own, *parts)) if parts else own


# ---- low rank


def _low_rank(
    tuned: ModelSpec, before: Mapping[str, Weight], after: Mapping[str, Weight], config: DeltaConfig, step: Step
) -> dict[str, Code]:
    tasks = _tasks(tuned, after, config, step)
    moved = {n: after[n].matrix - w.matrix for n, w in before.items()}
    spectra = {}
    for i, (name, task) in enumerate(tasks.items()):
        step(f"difference of {name}", i / len(tasks))
        if task.weight.groups == 1 and bool(moved[name].any()):
            spectra[name] = spectrum_of(moved[name], task.space)
    room = config.bits * sum(w.matrix.numel() for w in after.values()) / 8
    codes = {n: _plus(after[n].matrix.shape) for n in before}
    for name, difference in moved.items():
        if name not in spectra and bool(difference.any()):  # channels in groups: 8 bits for each difference
            codes[name] = _plus(difference.shape, _integers(difference, 8))
            room -= len(pack(codes[name]))
    if room <= 0:
        raise InputError(f"{config.bits} bits a weight are too few", "weights in groups alone take more: raise bits")
    return codes | _within(spectra, after, room, config.factors)


def _within(spectra: Mapping[str, Spectrum], after: Mapping[str, Weight], room: float, bits: int) -> dict[str, Code]:
    """Low-rank codes of about `room` bytes as they are packed: the ranks that save most error for each byte, whatever the layer."""
    share, codes = 1.0, dict[str, Code]()
    for _ in range(3):  # entropy coding leaves some of the room
        ranks = ranks_within(spectra, share * room, bits)
        made = {n: _plus(after[n].matrix.shape, factor_code(*spectra[n].factors(r), spectra[n].space, bits)) for n, r in ranks.items() if r}
        size = sum(len(pack(c)) for c in made.values())
        if size <= room:
            codes = made
        if not size or 0.98 * room < size <= room:
            break
        share *= 0.995 * room / size
    return codes


def ranks_within(spectra: Mapping[str, Spectrum], room: float, bits: int) -> dict[str, int]:
    """Ranks whose factors take at most `room` bytes at fixed rate, by the squared singular value that each byte buys."""
    steps = []
    for name, s in spectra.items():
        rows, cols = s.left.shape[0], s.right.shape[1]
        cost = factor_bytes(rows, cols, 2, bits) - factor_bytes(rows, cols, 1, bits)
        first = factor_bytes(rows, cols, 1, bits)
        steps += [(float(v) ** 2 / cost, name, i, cost if i else first) for i, v in enumerate(s.values)]
    ranks = dict.fromkeys(spectra, 0)
    closed: set[str] = set()
    for _, name, i, cost in sorted(steps, key=lambda s: (-s[0], s[1], s[2])):
        if name in closed:
            continue
        if cost > room:
            closed.add(name)
            continue
        room -= cost
        ranks[name] = i + 1
    return ranks


def uniform_rank(spectra: Mapping[str, Spectrum], room: float, bits: int) -> dict[str, int]:
    """The one rank for all layers that takes at most `room` bytes at fixed rate, for comparison."""
    rank = 0
    while sum(factor_bytes(s.left.shape[0], s.right.shape[1], min(rank + 1, len(s.values)), bits) for s in spectra.values()) <= room:
        rank += 1
        if rank > max(len(s.values) for s in spectra.values()):
            break
    return {n: min(rank, len(s.values)) for n, s in spectra.items()}


def _tasks(tuned: ModelSpec, after: Mapping[str, Weight], config: DeltaConfig, step: Step) -> dict[str, Task]:
    """How errors of every weight count; plain where there is no calibration data or a weight is never called."""
    known: dict[str, Task] = {}
    if config.data and tuned.calibration is not None:
        known = tasks_of(tuned, LqloraConfig(), step)[0]
    return {n: known.get(n) or Task(w, None, None) for n, w in after.items()}


def _integers(matrix: torch.Tensor, bits: int, group: int = 0) -> Code:
    """Round to nearest, a scale for every row or group."""
    config = RtnConfig(bits=bits, group=group)
    scale, _ = grid_of(matrix, config)
    wide = scale.repeat_interleave(group or matrix.shape[1], 1)[:, : matrix.shape[1]]
    top = 2 ** (bits - 1) - 1
    return to_code(torch.clamp(torch.round(matrix / wide), -top, top) + top + 1, scale, None, config)


# ---- DARE


def spread_of(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest percent of the differences, in deviations of the weights."""
    moved = (after - before).abs().reshape(-1)
    k = max(1, int(0.99 * len(moved)))
    return float(torch.kthvalue(moved, k).values / before.std(unbiased=False).clamp_min(1e-30))


def dropped(moved: torch.Tensor, drop: float, seed: int) -> torch.Tensor:
    """Differences of which a share is 0 and the rest 1 / (1 - drop) as large."""
    keep = torch.rand(moved.shape, generator=torch.Generator().manual_seed(seed)) >= drop
    return moved * keep / (1 - drop)


def _dare(tuned: ModelSpec, before: Mapping[str, Weight], after: Mapping[str, Weight], config: DeltaConfig, step: Step) -> dict[str, Code]:
    codes = {}
    for i, (name, w) in enumerate(before.items()):
        wide = spread_of(w.matrix, after[name].matrix)
        if wide > config.limit and config.drop > 0:
            what = (
                f"{name}: differences of {wide:.2g} deviations of its weights are too large to be dropped at random (limit {config.limit})"
            )
            raise InputError(what, "the model was trained on, not fine-tuned: use how=lowrank, or drop=0")
        left = dropped(after[name].matrix - w.matrix, config.drop, config.seed + i)
        codes[name] = _plus(left.shape, _sparse(left, config.values)) if bool(left.any()) else _plus(left.shape)
    return codes


def _sparse(matrix: torch.Tensor, bits: int) -> Code:
    mask = matrix != 0
    values = _integers(matrix[mask][None], bits, 256)
    return Code("sparse", (matrix.shape[0], matrix.shape[1]), (), (mask.to(torch.uint8).numpy(),), (values,))


def merge(base: ModelSpec, tuned: Sequence[ModelSpec], drop: float = 0.9, share: float = 1.0, seed: int = 0) -> ModelSpec:
    """One model of several fine-tuned ones: base + share · Σ (differences, dropped and rescaled). Norms and biases take the sum of their differences.

    Raises `InputError` where shapes differ. Whether tasks disturb each other is for `evaluate` to say.
    """
    made = replace(base, methods=copy.deepcopy(base.methods), name=f"{base.name}-merged", codes={})
    start, weights = weights_of(base), {id(u[0][2].weight) for u in holders(made).values()}
    every = [weights_of(t) for t in tuned]
    for other, seen in zip(tuned, every, strict=True):
        _same_shapes(base, other, start, seen)
    for i, (name, w) in enumerate(start.items()):
        moves = [dropped(seen[name].matrix - w.matrix, drop, seed + i + 1000 * k) for k, seen in enumerate(every)]
        set_weight(made, name, w.matrix + share * torch.stack(moves).sum(0))
    with torch.no_grad():
        for m, entry in made.methods.items():
            for key, value in entry.module.named_parameters():
                if id(value) not in weights:
                    weights.add(id(value))
                    first = base.methods[m].module.get_parameter(key)
                    value.copy_(first + share * sum(t.methods[m].module.get_parameter(key) - first for t in tuned))
    return replace(made, digest=digest_of(made, ()))


# ---- masks


def _masks(tuned: ModelSpec, before: Mapping[str, Weight], after: Mapping[str, Weight], config: DeltaConfig, step: Step) -> dict[str, Code]:
    codes = {}
    for name, w in before.items():
        matrix, kept = after[name].matrix, after[name].matrix == w.matrix
        if bool(kept.all()):
            codes[name] = _plus(matrix.shape)
            continue
        if bool(matrix[~kept].any()):
            raise InputError(
                f"{name} is not the base's weight with some of it cut", "train masks with delta.learn_masks, or use how=lowrank"
            )
        shape = (w.rows, w.cols)
        codes[name] = Code("masked", shape, (), (kept.to(torch.uint8).numpy(),), (Code(BASE, shape),))
    return codes


def learn_masks(
    spec: ModelSpec, loss: Callable[[ModelSpec, int], torch.Tensor], steps: int, *, rate: float = 0.02, start: float = 0.02, only: str = ""
) -> ModelSpec:
    """A copy of `spec` whose weights are cut where that lowers `loss(copy, step)`, a scalar; nothing else is trained.

    Every weight has a score, first `start`; it is kept while the score is not below 0, and the gradient goes through as if the mask were the score
    (straight-through, as in the paper). `rate` is Adam's.
    """
    made = replace(spec, methods=copy.deepcopy(spec.methods), codes={})
    chosen = {n: uses[0][2].weight for n, uses in holders(made).items() if re.search(only, n)}
    if not chosen:
        raise InputError(f"no weight of {spec.name} matches '{only}'", "`edgesdk compress --list --model …` names them")
    whole = {n: w.detach().clone() for n, w in chosen.items()}
    scores = {n: torch.full_like(w, start) for n, w in whole.items()}
    for entry in made.methods.values():
        entry.module.requires_grad_(False)
    for w in chosen.values():
        w.requires_grad_(True)
    optimiser = torch.optim.Adam([{"params": list(scores.values())}], lr=rate)
    for i in range(steps):
        _cut(chosen, whole, scores)
        with torch.enable_grad():
            grads = torch.autograd.grad(loss(made, i), list(chosen.values()), allow_unused=True)
        for (n, score), g in zip(scores.items(), grads, strict=True):
            score.grad = torch.zeros_like(score) if g is None else g * whole[n]
        optimiser.step()
    _cut(chosen, whole, scores)
    return replace(made, digest=digest_of(made, ()))


def _cut(chosen: Mapping[str, Any], whole: Mapping[str, torch.Tensor], scores: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for n, w in chosen.items():
            w.copy_(whole[n] * (scores[n] >= 0))
