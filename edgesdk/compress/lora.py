"""`lora`: a thin float correction beside every coded weight, trained towards the uncompressed model, and stored in few bits as well.

Sources: LoRA (arXiv:2106.09685) for the adapters; QLoRA (arXiv:2305.14314) for training them over a quantized model; LQ-LoRA (arXiv:2311.12023) and
EoRA (arXiv:2410.21271) for starting from what the quantization lost instead of from zero: the best rank-r fit of W - decoded in the space of the
layer's inputs. Ours: the factors are stored as integers (trained as such, with learned steps), no labels. The weight becomes the code
`sum` of the quantized code and a `lowrank` one, so every byte of the adapter is counted; nothing is merged back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.learned import Learned, frozen, joined, learn
from edgesdk.compress.qat import originals
from edgesdk.compress.svd import even_rank, factor_code, space_of, spectrum_of
from edgesdk.compress.training import TrainConfig, Training, free_parameters, lessons_of, why_no_training
from edgesdk.compress.types import Change, Family, Need, Stats, Step, Weight
from edgesdk.compress.weights import set_weight, stats_of, weights_of
from edgesdk.errors import InputError
from edgesdk.packed import Code, decode

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class LoraConfig(TrainConfig):
    rank: Annotated[int, Field(ge=1)] = 4
    bits: Literal[4, 6, 8, 16] = 8  # of the factors; 16: float16
    start: Literal["lost", "zero"] = "lost"  # what the adapters begin with: what the quantization lost, or nothing
    quantized: Literal["kept", "trained"] = "kept"  # the codes beside them
    others: bool = True  # biases, norms and weights without a code are trained, too
    only: str = ""  # a regular expression over the names of the weights


class Lora:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "lora"
    family: ClassVar[Family] = "recovery"
    source: ClassVar[str] = "LoRA (arXiv:2106.09685), QLoRA (arXiv:2305.14314), LQ-LoRA (arXiv:2311.12023), EoRA (arXiv:2410.21271)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[LoraConfig]] = LoraConfig

    def why_not(self, spec: ModelSpec, config: LoraConfig) -> str | None:
        if not any(re.search(config.only, n) for n in spec.codes):
            return "none of its weights is stored as a code yet (put a method like gptq:bits=3 before it)"
        if not self.chosen(spec, config):
            return f"two factors of rank {config.rank} are no smaller than any of its coded weights"
        return why_no_training(spec, config)

    def options(self, spec: ModelSpec) -> Sequence[LoraConfig]:
        return [LoraConfig(rank=r) for r in (2, 4, 8, 16)]

    def chosen(self, spec: ModelSpec, config: LoraConfig) -> dict[str, Weight]:
        """The coded weights that an adapter is thinner than."""
        found = {n: w for n, w in weights_of(spec).items() if n in spec.codes and re.search(config.only, n)}
        return {n: w for n, w in found.items() if w.groups == 1 and config.rank <= even_rank(w.rows, w.cols)}

    def apply(self, spec: ModelSpec, config: LoraConfig, step: Step) -> Change:
        chosen, known, before = self.chosen(spec, config), originals(spec), dict(spec.codes)
        stats = stats_of(spec, step=step) if spec.calibration is not None and config.start == "lost" else {}
        learned: dict[str, Learned] = {}
        for name, weight in chosen.items():
            adapter = first_adapter(weight, known.get(name), stats.get(name), config)
            code = Code("sum", before[name].shape, (), (), (before[name], adapter))
            beside = learn(before[name], scale="learned") if config.quantized == "trained" else frozen(before[name])
            learned[name] = joined(code, [beside, learn(adapter)])
        if config.quantized == "trained":
            learned |= {n: learn(c, known.get(n)) for n, c in before.items() if n not in chosen}
        free = free_parameters(spec, spec.codes) if config.others else []
        lessons = lessons_of(spec, config)
        bare = lessons.held_out()
        outcome = Training(spec, lessons, learned, free, config, name=self.name).run(step)
        if min(outcome.before, outcome.after) >= bare:
            for name in chosen:
                set_weight(spec, name, torch.from_numpy(decode(before[name])))
            raise InputError(
                f"lora: adapters of rank {config.rank} do not bring the loss on held-out inputs below {bare:.4g}",
                "take more steps or a higher rank, or leave lora out",
            )
        notes = (f"lora: loss without adapters {bare:.4g}", outcome.note(self.name, config.steps), f"{len(chosen)} weights have an adapter")
        return Change((), notes, outcome.codes)


def first_adapter(weight: Weight, original: torch.Tensor | None, stats: Stats | None, config: LoraConfig) -> Code:
    """The `lowrank` code [rows, cols] an adapter begins as: the best fit of what was lost, or a product of zero."""
    space = space_of(stats)
    if original is not None and config.start == "lost" and not bool(torch.equal(original, weight.matrix)):
        return factor_code(*spectrum_of(original - weight.matrix, space).factors(config.rank), space, config.bits)
    generator = torch.Generator().manual_seed(config.seed)
    right = torch.randn(config.rank, weight.cols, generator=generator, dtype=torch.float64) * float(weight.matrix.std())
    code = factor_code(torch.ones(weight.rows, config.rank, dtype=torch.float64), right, space, config.bits)
    left = code.parts[0]
    if config.bits == 16:
        return Code("lowrank", code.shape, (), (), (Code("dense", left.shape, (), (left.arrays[0] * 0,)), code.parts[1]))
    empty = left.arrays[0] * 0 + (1 << (config.bits - 1))
    return Code("lowrank", code.shape, (), (), (Code("grid", left.shape, left.numbers, (empty, *left.arrays[1:])), code.parts[1]))


METHOD = Lora()
