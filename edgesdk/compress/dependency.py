"""Which parts of a model can be cut out together: the channels, neurons and heads of every method, found by following them through the graph.

Every element of every activation carries a label: the output channel it comes from. Labels go through the exported graph beside the real values;
an operator that combines two of them (an addition, a depthwise convolution, a product of queries and keys) joins them into one unit.
What is left are OTO's zero-invariant groups (Only Train Once, arXiv:2107.07467; OTOv2, arXiv:2303.06862): rows of what makes a channel,
the norms that scale it, columns of what reads it. Channels that reach a method's output, or an operator that is not known, stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgesdk.compress.follow import Walk
from edgesdk.compress.labels import Labels
from edgesdk.errors import InputError

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


@dataclass(frozen=True, order=True)
class Axis:
    """One dimension of a parameter or buffer, by the first path that reaches it."""

    path: str
    tensor: str
    dim: int


@dataclass
class Family:
    """Units of the same build (the channels of one layer, the heads of one attention): each can be cut out for itself.

    `units` [u] maps an axis to the indices that go with unit u. `exact`: cutting a unit out is the same as nothing reading it any more
    (not so where a norm averages over units). `number`: attributes, as (path, name, value per unit), that must follow the number of units.
    """

    units: list[dict[Axis, list[int]]]
    exact: bool = True
    numbers: tuple[tuple[str, str, int], ...] = ()

    @property
    def axes(self) -> list[Axis]:
        return list(self.units[0])

    @property
    def readers(self) -> list[Axis]:
        """Where the units are read: columns of linears and convolutions."""
        return [a for a in self.axes if a.tensor == "weight" and a.dim == 1]

    @property
    def name(self) -> str:
        """The layer that makes the units."""
        makers = [a.path for a in self.axes if a.dim == 0 and a.tensor == "weight"] or [a.path for a in self.axes]
        return makers[0]


@dataclass
class Trace:
    """What following the channels found, and how often each weight is multiplied: path → positions of one whole answer."""

    families: list[Family]
    positions: dict[str, int] = field(default_factory=dict)


def holders_of(spec: ModelSpec) -> dict[int, list[tuple[str, str]]]:
    """Parameter or buffer id → (path, tensor) of every module that holds it, each module once.

    A path that means different tensors in different methods is left out: an edit could not tell them apart.
    """
    meant: dict[tuple[str, str], set[int]] = {}
    found: dict[int, dict[tuple[int, str], tuple[str, str]]] = {}
    for entry in spec.methods.values():
        for path, module in entry.module.named_modules(remove_duplicate=False):
            own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for tensor, value in own.items():
                meant.setdefault((path, tensor), set()).add(id(value))
                found.setdefault(id(value), {}).setdefault((id(module), tensor), (path, tensor))
    answer = {i: list(places.values()) for i, places in found.items()}
    return {i: places for i, places in answer.items() if all(len(meant[p]) == 1 for p in places)}


def trace(spec: ModelSpec) -> Trace:
    """The families of a model that could be cut, not yet tried (see `shrink.cuttable`). Raises `InputError` when it cannot be exported."""
    labels, positions = Labels(), dict[int, int]()
    walks = [Walk(spec, name, labels, positions) for name in spec.methods]  # kept: they hold the tensors whose ids are used
    held = holders_of(spec)
    members: dict[int, dict[Axis, list[int]]] = {}
    for (tensor, dim), found in labels.axes.items():
        roots = labels.canon(found).tolist()
        if tensor not in held:
            labels.fix(found)
            continue
        for path, name in held[tensor]:
            for i, root in enumerate(roots):
                members.setdefault(root, {}).setdefault(Axis(path, name, dim), []).append(i)
    fixed = {labels.find(i) for i in labels.fixed}
    normed = {labels.find(i) for i in labels.normed}
    families: dict[tuple[tuple[Axis, int], ...], list[int]] = {}
    for root, unit in members.items():
        if root not in fixed:
            families.setdefault(tuple((a, len(i)) for a, i in unit.items()), []).append(root)
    if not walks:
        raise InputError(f"{spec.name} has no method", "only PyTorch models can be cut")
    found_families = [Family([members[r] for r in roots], exact=not any(r in normed for r in roots)) for roots in families.values()]
    return Trace(
        [f for f in found_families if len(f.units) > 1 and f.readers], {held[i][0][0]: n for i, n in positions.items() if i in held}
    )
