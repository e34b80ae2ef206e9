"""The weights of one model of the family as parts of another's: what adaptation copies, elastic sub-models share and skipped layers leave.

A child has a choice of its parent's layers and, in every matrix, its first rows and columns. They are views, so that training through them trains
the parent. `arranged` puts what matters most first, without a change of what the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgesdk.errors import InputError
from edgesdk.sequence.config import SequenceConfig, Stack

LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Parent:
    """A model's weights by name (those of `named_parameters`), and what it is."""

    config: SequenceConfig
    weights: Mapping[str, Tensor]

    def stack(self, name: str) -> str:
        """The parent's stack that a child's encoder or decoder comes from."""
        return name if getattr(self.config, name) else ("decoder" if name == "encoder" else "encoder")


@dataclass(frozen=True)
class Piece:
    """`value` came from the parent's `source`; None: it has no origin and keeps what it begins with."""

    source: str
    value: Tensor | None
    how: Literal["whole", "part", "averaged", "new"]


def spread(count: int, of: int) -> tuple[int, ...]:
    """`count` of `of` layers, the first and the last among them, evenly spread. Raises `InputError` where there are not so many."""
    if not 1 <= count <= of:
        raise InputError(f"{count} layers of a model that has {of}", f"take 1 to {of}")
    return tuple(round(i * (of - 1) / max(1, count - 1)) for i in range(count))


def origin(name: str, parent: Parent, layers: Mapping[str, Sequence[int]], cross: bool) -> str:
    """The parent's name for a child's parameter; empty where the parent has none. `cross`: cross-attention may come from self-attention."""
    found = LAYER.fullmatch(name)
    if found:
        stack, layer, rest = found[1], int(found[2]), found[3]
        start = f"{parent.stack(stack)}.layers.{layers[stack][layer]}."
        if start + rest not in parent.weights and cross and rest.startswith("cross_"):
            rest = rest.replace("cross_", "self_", 1)
        return start + rest if start + rest in parent.weights else ""
    head, _, rest = name.partition(".")
    names = [name]
    if head in ("encoder", "decoder"):
        names.append(f"{parent.stack(head)}.{rest}")
    if head in ("embed", "source_embed", "head") and rest == "weight":
        names += ["source_embed.weight", "embed.weight"] if head == "source_embed" else ["embed.weight"]
    return next((n for n in names if n in parent.weights), "")


def inherited(
    shapes: Mapping[str, Sequence[int]],
    config: SequenceConfig,
    parents: Mapping[str, Parent],
    layers: Mapping[str, Sequence[int]],
    *,
    cross: bool = True,
) -> dict[str, Piece]:
    """Every parameter of a child of `config` (name → shape in `shapes`) as a part of a parent's; nothing is copied.

    `parents`: that of the "encoder" (with its source embedding) and of the "decoder" (with all else). `layers`: which of the parent's layers each
    stack takes. Raises `InputError`: the child is larger, or shares heads in another way than a parent's can be cut or averaged into.
    """
    _check_heads(config, parents)
    answer = {}
    for name, shape in shapes.items():
        parent = parents["encoder" if name.startswith(("encoder.", "source_embed.", "sound.")) and "encoder" in parents else "decoder"]
        source = origin(name, parent, layers, cross)
        answer[name] = _piece(name, tuple(shape), config, parent, source) if source else Piece("", None, "new")
    return answer


def _piece(name: str, shape: tuple[int, ...], config: SequenceConfig, parent: Parent, source: str) -> Piece:
    had = parent.weights[source]
    value = _averaged(had, config, parent, name) if re.search(r"_attn\.[kv]\.", name) else had
    if value.dim() != len(shape) or any(n > most for n, most in zip(shape, value.shape, strict=True)):
        if ".cross_attn." in name:  # an encoder wider than the decoder: keys and values of its own
            return Piece("", None, "new")
        raise InputError(
            f"{name}: {list(shape)} cannot be cut out of {list(value.shape)}", "a model is made of parts of another: take no more"
        )
    averaged, whole = value is not had, tuple(value.shape) == shape
    return Piece(source, value[tuple(slice(n) for n in shape)], "averaged" if averaged else "whole" if whole else "part")


def _stacks(config: SequenceConfig, parents: Mapping[str, Parent]) -> list[tuple[str, Stack, Stack]]:
    """(name, the child's, the parent's) stacks."""
    found = []
    for name in ("encoder", "decoder"):
        own = getattr(config, name)
        if own:
            parent = parents.get(name) or parents["decoder"]
            found.append((name, own, getattr(parent.config, parent.stack(name))))
    return found


def _check_heads(config: SequenceConfig, parents: Mapping[str, Parent]) -> None:
    for name, own, theirs in _stacks(config, parents):
        if own.head != theirs.head:
            raise InputError(
                f"{name}: heads of {own.head} cannot be cut out of heads of {theirs.head}", "take fewer heads, each of them whole"
            )
        same = own.heads * theirs.kv_heads == theirs.heads * own.kv_heads
        pooled = own.heads == theirs.heads and theirs.kv_heads % own.kv_heads == 0
        if not (same or pooled):
            raise InputError(
                f"{name}: {own.heads} heads on {own.kv_heads} of keys and values cannot come from {theirs.heads} on {theirs.kv_heads}",
                "keep how many share one, or keep all heads and let more of them share one",
            )


def _averaged(value: Tensor, config: SequenceConfig, parent: Parent, name: str) -> Tensor:
    """Keys' or values' weight where more queries share one than did: the mean over the heads that become one."""
    stack = name.partition(".")[0]
    own, theirs = getattr(config, stack), getattr(parent.config, parent.stack(stack))
    if own is None or own.heads != theirs.heads or own.kv_heads == theirs.kv_heads:
        return value
    return value.reshape(own.kv_heads, theirs.kv_heads // own.kv_heads, theirs.head, *value.shape[1:]).mean(1).flatten(0, 1)


# ---- what matters most first


def arranged(config: SequenceConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model with the neurons of every feed-forward, the groups of heads and the channels of every stack in order of their weight,
    so that the first of them are the best part to keep. What the model computes stays as it is (but for the order of float additions).

    A neuron counts by its rows' and columns' sizes multiplied, a group of heads by what its values and its output can give, a channel by the size of all
    that is written into it.
    """
    now = dict(weights)
    for name in ("encoder", "decoder"):
        stack = getattr(config, name)
        if not stack:
            continue
        for i in range(stack.layers):
            _sort_neurons(now, f"{name}.layers.{i}.ffn")
            for kind in ("self_attn", "cross_attn"):
                _sort_heads(now, f"{name}.layers.{i}.{kind}", stack)
    return now


def _take(now: dict[str, Tensor], name: str, order: Tensor, dim: int) -> None:
    if name in now:
        now[name] = now[name].detach().index_select(dim, order)


def _sort_neurons(now: dict[str, Tensor], at: str) -> None:
    size = now[f"{at}.down.weight"].detach().norm(dim=0)
    for part in ("gate", "up"):
        if f"{at}.{part}.weight" in now:
            size = size * now[f"{at}.{part}.weight"].detach().norm(dim=1)
    order = torch.argsort(size, descending=True, stable=True)
    for part in ("gate", "up"):
        _take(now, f"{at}.{part}.weight", order, 0)
        _take(now, f"{at}.{part}.bias", order, 0)
    _take(now, f"{at}.down.weight", order, 1)


def _sort_heads(now: dict[str, Tensor], at: str, stack: Stack) -> None:
    """Groups (a head of keys and values with its queries) by the size of the products of their values and outputs."""
    if f"{at}.v.weight" not in now or f"{at}.o.weight" not in now:
        return
    v = now[f"{at}.v.weight"].detach().reshape(stack.kv_heads, stack.head, -1)
    o = now[f"{at}.o.weight"].detach().reshape(-1, stack.kv_heads, stack.heads // stack.kv_heads, stack.head)
    size = torch.stack([(o[:, g].flatten(0, 1) @ v[g]).norm() for g in range(stack.kv_heads)])
    groups = torch.argsort(size, descending=True, stable=True)
    place = torch.arange(stack.head)
    kept = (groups[:, None] * stack.head + place).flatten()
    share = stack.heads // stack.kv_heads
    queries = (((groups[:, None] * share + torch.arange(share)).flatten())[:, None] * stack.head + place).flatten()
    for part, order in (("q", queries), ("k", kept), ("v", kept)):
        _take(now, f"{at}.{part}.weight", order, 0)
        _take(now, f"{at}.{part}.bias", order, 0)
    _take(now, f"{at}.o.weight", queries, 1)
