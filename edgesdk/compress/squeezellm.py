"""SqueezeLLM: a learned table for most weights, the few that suit no table or matter most stored beside it as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from edgesdk.compress.any4 import Any4Config, Scalar, fit, own_table, to_code
from edgesdk.compress.kmeans import damped, grouped, short
from edgesdk.compress.types import Family, Need, Stats, Weight
from edgesdk.packed import Code, decode


class SqueezeConfig(Any4Config):
    outliers: Annotated[float, Field(ge=0, le=0.1)] = 0.004  # share of the weights stored beside the table because they are the largest
    sensitive: Annotated[float, Field(ge=0, le=0.1)] = 0.0005  # share stored beside it because the outputs depend on them most
    sensitivity: Literal["fisher", "inputs"] = "fisher"  # what k-means weights by: squared gradients, or H_jj alone


class SqueezeLlm:
    """SqueezeLLM (SqueezeLLM: Dense-and-Sparse Quantization, arXiv:2306.07629): W = table[index] + sparse. The table of a row is the k-means
    of its weights, each counted with its Fisher information F_ij = mean (∂loss/∂w_ij)²; the 0.4% of largest magnitude and the 0.05% of
    largest F are kept apart. Beyond the paper: indices are chosen with error feedback and coordinate descent under H (mean x·xᵀ), the
    sparse values take up rounding error, too, and where rows are short all share one table and differ by a scale (see any4)."""

    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "squeezellm"
    family: ClassVar[Family] = "codebook"
    source: ClassVar[str] = "SqueezeLLM: Dense-and-Sparse Quantization (arXiv:2306.07629); error feedback as in GPTQ (arXiv:2210.17323)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs", "gradients"})
    config: ClassVar[type[SqueezeConfig]] = SqueezeConfig

    def why_not(self, weight: Weight, config: SqueezeConfig) -> str | None:
        if weight.matrix.numel() < 2 ** (config.bits + 2):
            return f"{weight.matrix.numel()} weights are too few for a table of {2**config.bits}"
        return None

    def options(self, weight: Weight) -> Sequence[SqueezeConfig]:
        return [SqueezeConfig(bits=b, outliers=o) for b in (2, 3, 4) for o in (0.004, 0.02)]

    def apply(self, weight: Weight, stats: Stats | None, config: SqueezeConfig) -> Code:
        w, h = grouped(weight), damped(weight, stats)
        fisher = fisher_of(weight, stats, h, config)
        if weight.kept is not None:
            fisher = fisher.masked_fill(~weight.kept.reshape(fisher.shape), 0)
        free = apart(weight.matrix, fisher.reshape(weight.matrix.shape), config).reshape(w.shape)
        state = Scalar(w, h, config.group or weight.cols, own_table(weight, config), free, weight.kept)
        fit(state, (state.wide**2 * fisher).masked_fill(free, 0), config)
        return with_sparse(weight, state, config)


def fisher_of(weight: Weight, stats: Stats | None, h: torch.Tensor, config: SqueezeConfig) -> torch.Tensor:
    """Sensitivity of every weight [groups, rows, cols]: its squared gradient, H_jj where that is not known."""
    inputs = h.diagonal(dim1=1, dim2=2)[:, None].float().expand(grouped(weight).shape)
    if config.sensitivity == "inputs" or stats is None or stats.fisher is None or not bool(stats.fisher.any()):
        return inputs
    fisher = stats.fisher.reshape(inputs.shape)
    return fisher + 1e-3 * fisher.mean()


def apart(matrix: torch.Tensor, fisher: torch.Tensor, config: SqueezeConfig) -> torch.Tensor:
    """bool [rows, cols]: what is stored beside the table."""
    free = torch.zeros(matrix.numel(), dtype=torch.bool)
    for share, size in ((config.outliers, matrix.abs()), (config.sensitive, (fisher * matrix**2))):
        count = int(share * matrix.numel())
        free[size.flatten().masked_fill(free, -1).topk(count).indices] = True
    return free.reshape(matrix.shape) & (matrix != 0)


def with_sparse(weight: Weight, state: Scalar, config: SqueezeConfig) -> Code:
    """Table plus sparse: where a weight is stored beside the table, its index is the commonest one and the sparse value the rest,
    to 6 significant bits (a float16 of which a good part is always the same takes fewer bytes in an entropy code)."""
    common = int(torch.bincount(state.codes[~state.free]).argmax())
    state.codes[state.free] = common
    dense = to_code(weight, state, config.bits)
    mask = state.free.reshape(weight.matrix.shape).numpy()
    if not mask.any():
        return dense
    rest = (state.loose.reshape(weight.matrix.shape) - torch.from_numpy(decode(dense)))[torch.from_numpy(mask)]
    rounded = torch.sign(rest) * short(rest.abs(), 6)
    values = Code("dense", (1, len(rest)), (), (rounded.to(torch.float16).numpy()[None],))
    return Code("sum", dense.shape, (), (), (dense, Code("sparse", dense.shape, (), (mask.astype(np.uint8),), (values,))))


METHOD = SqueezeLlm()
