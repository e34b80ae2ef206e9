"""One token of a decoder as a list of launches, for a CUDA graph: embedding, layers, logits, the next token, and the position that grows.

Layers are pre-norm with RMS norms: y = x + Wo · attention(norm(x)), x = y + Wd · (silu(Wg · norm(y)) · Wu · norm(y)); embeddings are tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgesdk.errors import InputError

from . import attention, rows
from .linear import Linear
from .machine import Launch, Machine, Memory


@dataclass(frozen=True)
class Layer:
    """Weights of one layer. `qkv` has the rows of queries, keys and values one behind the other; `gate` ends in silu; norms float32 [dim]."""

    qkv: Linear
    out: Linear
    gate: Linear
    up: Linear
    down: Linear
    attention_norm: Memory
    feed_norm: Memory
    cache: attention.Cache


@dataclass(frozen=True)
class State:
    """What a step reads and writes, a row a sequence: `token` and `position` int32 [batch], `history` int32 [batch, most tokens], logits."""

    token: Memory
    position: Memory
    history: Memory
    logits: Memory


def decode_step(
    machine: Machine,
    layers: Sequence[Layer],
    head: Linear,
    final_norm: Memory,
    batch: int,
    turns: tuple[Memory, Memory],
    history: int,
    eps: float = 1e-6,
) -> tuple[list[Launch], State]:
    """The launches of one step for `batch` sequences of at most `history` tokens, and its state, all zeros.

    `head` is [tokens, dim] and is the embedding, too; `turns`: cosines and sines [positions, head / 2]. Values between layers are float32,
    all others float16. A step reads `token` and `position`, writes the next token over them and adds 1 to the position.
    """
    dim = head.weights.cols
    state = State(
        token=machine.put(np.zeros(batch, np.int32)),
        position=machine.put(np.zeros(batch, np.int32)),
        history=machine.put(np.zeros((batch, history), np.int32)),
        logits=machine.empty((batch, head.weights.rows), np.float32),
    )
    x, normed = machine.empty((batch, dim), np.float32), machine.empty((batch, dim), np.float16)
    launches = [rows.embed(head, state.token, x)]
    for layer in layers:
        launches += _layer(machine, layer, x, normed, state, turns, eps)
    launches += [
        rows.norm(x, final_norm, normed, eps=eps),
        head.launch(normed, state.logits),
        rows.argmax(state.logits, state.token, state.position, state.history),
    ]
    return launches, state


def _layer(machine: Machine, layer: Layer, x: Memory, normed: Memory, state: State, turns: Any, eps: float) -> list[Launch]:
    batch, dim, cache = x.shape[0], x.shape[1], layer.cache
    own = cache.kv_heads * cache.dim
    wide = layer.qkv.weights.rows - 2 * own
    qkv = machine.empty((batch, wide + 2 * own), np.float16)
    q, seen = (machine.empty((batch, wide), np.float16) for _ in range(2))
    gated, raised = (machine.empty((batch, layer.up.weights.rows), np.float16) for _ in range(2))
    k, v = (qkv.columns(wide + i * own) for i in range(2))
    if dim != layer.out.weights.rows:
        raise InputError(
            f"attention gives {layer.out.weights.rows} numbers, layers hand on {dim}", "the rows of `out` are the columns of the head"
        )
    return [
        rows.norm(x, layer.attention_norm, normed, eps=eps),
        layer.qkv.launch(normed, qkv),
        attention.keep(cache, qkv, k, v, state.position, q, turns),
        attention.attend(machine, cache, q, state.position, seen),
        layer.out.launch(seen, x, residual=x),
        rows.norm(x, layer.feed_norm, normed, eps=eps),
        layer.up.launch(normed, raised),
        layer.gate.launch(normed, gated, factor=raised),
        layer.down.launch(gated, x, residual=x),
    ]
