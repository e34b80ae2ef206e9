"""Make up for what an earlier stage lost: a low-rank path beside a quantized, pruned or otherwise coded weight, fitted to its inputs.

EoRA: "Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation" (arXiv:2410.21271). With gram = Q·Λ·Qᵀ the paper
takes the first r singular vectors of ΔW·Q·√Λ and carries them back by its inverse, ΔW = W - Ŵ. Any root of the gram gives the same product;
here it is the Cholesky factor of `svd`. The factors are rounded, too: at equal bytes more ranks of 4 or 6 bits usually beat fewer of 16.
The answer is `sum(the earlier code, lowrank)`: the earlier stage's integers stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from edgesdk.compress.svd import Space, Spectrum, factor_bytes, factor_code, space_of, spectrum_of, stored
from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.errors import InputError
from edgesdk.packed import Code, decode

Bits = Literal[4, 6, 8, 16]


class EoraConfig(Config):
    extra: Annotated[float, Field(gt=0, le=16)] = 0.5  # bits a weight that the factors may take
    rank: Annotated[int, Field(ge=1)] | None = None  # instead of `extra`
    bits: Bits | None = None  # of the factors; by default those of the least error (8 with a rank)
    data: bool = True  # in the space of the calibration inputs; false: plain singular vectors

    @model_validator(mode="after")
    def _one(self) -> EoraConfig:
        if self.rank is not None and "extra" in self.model_fields_set:
            raise ValueError("give one of rank and extra")
        return self


def affordable(spectrum: Spectrum, rows: int, cols: int, bits: int, room: int) -> Code | None:
    """The factors of about the greatest rank that are stored in at most `room` bytes; None where not even one rank is.

    It begins with the rank that fits at fixed rate; entropy coding leaves room for some more.
    """
    most = min(rows, cols)
    rank = min(most, max(1, fixed_rank(rows, cols, bits, room)))
    found: Code | None = None
    for _ in range(6):
        code = factor_code(*spectrum.factors(rank), spectrum.space, bits)
        size = stored(code)
        if size > room:
            if found is not None or rank == 1:
                return found
            rank -= 1
            continue
        more = (room - size) * rank // size
        if found is not None or not more or rank == most:
            return code
        found, rank = code, min(most, rank + more)
    return found


def fixed_rank(rows: int, cols: int, bits: int, room: int) -> int:
    """The greatest rank whose factors take at most `room` bytes without entropy coding; 0 where none does."""
    return sum(factor_bytes(rows, cols, r, bits) <= room for r in range(1, min(rows, cols) + 1))


def error_of(space: Space, missing: torch.Tensor, code: Code | None) -> float:
    """What of `missing` [rows, cols] is left, squared, in a space."""
    return float((space.into(missing if code is None else missing - torch.from_numpy(decode(code))) ** 2).sum())


def compensation(missing: torch.Tensor, space: Space, room: int, bits: Sequence[int]) -> Code | None:
    """The low-rank code of at most `room` bytes that leaves about the least error; None where none leaves less than nothing does."""
    spectrum, (rows, cols) = spectrum_of(missing, space), missing.shape
    ranks = {b: max(1, fixed_rank(rows, cols, b, room)) for b in bits}
    errors = {b: error_of(space, missing, factor_code(*spectrum.factors(r), space, b)) for b, r in ranks.items()}
    for best in sorted(errors, key=lambda b: errors[b]):
        code = affordable(spectrum, rows, cols, best, room)
        if code is not None:
            return code if error_of(space, missing, code) < error_of(space, missing, None) else None
    return None


class Eora:
    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "eora"
    family: ClassVar[Family] = "low-rank"
    source: ClassVar[str] = "EoRA (arXiv:2410.21271); ours: factors of 4 to 8 bits, whichever lose least at equal bytes"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[EoraConfig]] = EoraConfig

    def why_not(self, weight: Weight, config: EoraConfig) -> str | None:
        if weight.coded is None or weight.original is None:
            return "no earlier stage coded it"
        if weight.groups > 1:
            return "its channels are in groups"
        if config.rank is not None and config.rank > min(weight.rows, weight.cols):
            return f"rank {config.rank} is more than {weight.rows}x{weight.cols} has"
        return None

    def options(self, weight: Weight) -> Sequence[EoraConfig]:
        return [EoraConfig(extra=e) for e in (0.25, 0.5, 1.0)]

    def apply(self, weight: Weight, stats: Stats | None, config: EoraConfig) -> Code:
        if weight.coded is None or weight.original is None or weight.original.shape != weight.matrix.shape:
            raise InputError(f"eora: no earlier stage coded {weight.name}", "name a quantizer before it: gptq:bits=3, then eora")
        space = space_of(stats if config.data else None)
        missing = weight.original - weight.matrix
        if config.rank is not None:
            code: Code | None = factor_code(*spectrum_of(missing, space).factors(config.rank), space, config.bits or 8)
        else:
            room = int(config.extra * missing.numel() / 8)
            code = compensation(missing, space, room, (config.bits,) if config.bits else (4, 6, 8, 16))
        return weight.coded if code is None else Code("sum", tuple(missing.shape), (), (), (weight.coded, code))


METHOD = Eora()
