"""What every compression method is made of: a weight as a matrix, statistics of its inputs, settings, and the two kinds of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from edgesdk.noun import Part

if TYPE_CHECKING:
    import torch

    from edgesdk.graph.types import Op
    from edgesdk.model import ModelSpec
    from edgesdk.packed import Code

Step = Callable[[str, float], None]
Need = Literal["inputs", "gradients"]
Family = Literal["integer", "codebook", "mixed", "data-free", "pruning", "low-rank", "lossless", "recovery"]


class Config(Part):
    """Settings of a method; each method has its own subclass."""


@dataclass(frozen=True)
class Weight:
    """A stored weight as methods see it.

    `matrix` is float32 [rows, cols]: rows are output channels (an embedding's entries), cols the reduction a row runs over
    (a convolution's input channels of one group times its kernel). `tied` names further kinds of operators that use the same parameter.
    """

    name: str
    op: Op
    shape: tuple[int, ...]
    matrix: torch.Tensor
    groups: int = 1
    tied: tuple[str, ...] = ()
    coded: Code | None = None  # how an earlier stage stored it; `matrix` is then what that decodes to
    original: torch.Tensor | None = None  # the matrix before any stage coded it; None: `matrix` itself
    kept: torch.Tensor | None = None  # bool [rows, cols]: what an earlier stage left when it pruned; the others are to stay 0

    @property
    def rows(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def cols(self) -> int:
        return int(self.matrix.shape[1])


@dataclass(frozen=True)
class Stats:
    """What calibration inputs tell about one weight. `gram` is the mean of x·xᵀ over positions, float64 [groups, cols, cols]:
    rows r of group g see gram[g]; it stands for half the second derivative of the squared output error. `mean` and `absmax` are float32 [cols]
    over all groups. `fisher` is the mean squared gradient of random projections of the outputs, float32 [rows, cols] (None unless asked for)."""

    count: int
    gram: torch.Tensor
    mean: torch.Tensor
    absmax: torch.Tensor
    fisher: torch.Tensor | None = None


class WeightMethod(Protocol):
    """Turns one weight into a `Code`, for itself."""

    level: ClassVar[Literal["weight"]]
    name: ClassVar[str]
    family: ClassVar[Family]
    source: ClassVar[str]  # the paper or library
    needs: ClassVar[frozenset[Need]]
    config: ClassVar[type[Config]]

    def why_not(self, weight: Weight, config: Any) -> str | None:
        """Why the method does not apply to this weight, or None when it does."""

    def options(self, weight: Weight) -> Sequence[Config]:
        """Settings worth trying, fewest bytes first."""

    def apply(self, weight: Weight, stats: Stats | None, config: Any) -> Code:
        """The code; `stats` is given where `needs` asks for it. Raises `InputError`."""


class ModelMethod(Protocol):
    """Changes a whole model: its shapes, or weights that hang together."""

    level: ClassVar[Literal["model"]]
    name: ClassVar[str]
    family: ClassVar[Family]
    source: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    config: ClassVar[type[Config]]

    def why_not(self, spec: ModelSpec, config: Any) -> str | None:
        """Why the method does not apply to this model, or None when it does."""

    def options(self, spec: ModelSpec) -> Sequence[Config]:
        """Settings worth trying."""

    def apply(self, spec: ModelSpec, config: Any, step: Step) -> Change:
        """Changes the modules of `spec` in place (the caller gives a copy) and says what was done. Raises `InputError`."""


class Runs(Part):
    """What a choice was made for, and what is predicted of it there; nothing here was measured."""

    device: str
    runtime: str
    threads: int
    forms: dict[str, str]  # weight → the precision it is to run as
    latency_s: dict[str, float]  # of one call of a method; "": of one whole answer
    memory_bytes: int
    energy_j: float | None  # of one whole answer, at most; None: the profile has no power figure


@dataclass(frozen=True)
class Change:
    """What a model method did: `edits` make the new shapes out of the base model's (see `surgery`), `notes` are for people."""

    edits: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    codes: dict[str, Code] = field(default_factory=dict)  # weights that are stored in a certain form from now on
    made_by: dict[str, tuple[str, dict[str, Any], float]] = field(default_factory=dict)  # method, settings, error of a code not its own
    calibration: Callable[[str], Sequence[tuple[Any, ...]]] | None = None  # other calibration inputs from now on
    runs: Runs | None = None


Method = WeightMethod | ModelMethod
