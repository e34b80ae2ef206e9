"""`example:normalizer`: an encoder-decoder transformer that writes dates, times, numbers and money in normal form, and its twins.

Three methods with static shapes and explicit caches:

    encode(src)                                        → cross_k, cross_v, mask     keys and values of the source, computed once
    prefill(cross_k, cross_v, mask)                    → logits, self_k, self_v     the first token
    decode(token, position, self_k, self_v, cross_k, cross_v, mask) → logits, self_k, self_v

The decoder-only twin has `prefill(src) → logits, self_k, self_v, mask` and `decode(token, position, self_k, self_v, mask)`.
Shapes: src int64 [1, 56]; token, position int64 [1]; caches float32 [layers, heads, time, head]; mask float32 [time], 0 or -1e4.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgesdk.examples import normalizer_data as data
from edgesdk.examples.generate import TOKENIZER, Run, generate
from edgesdk.model import Layout, Method, ModelSpec
from edgesdk.plan.harm import one_thread

HERE = Path(__file__).parent
S, T = data.MAX_INPUT, data.MAX_OUTPUT
DIM, HEADS, FFN = 96, 4, 256
LAYOUTS = {"normalizer": (4, 2), "normalizer-deep-encoder": (5, 1), "normalizer-decoder-only": (0, 7)}
"""Name → (encoder layers, decoder layers); the three have about the same number of parameters."""


CALIBRATION_CASES = 64


class RMSNorm(nn.Module):
    """x / rms(x) · g, in operators every runtime has."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.g


class Attention(nn.Module):
    """Multi-head attention over keys and values that may come from a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, time, dim] → [B, heads, time, head]."""
        return x.reshape(x.shape[0], x.shape[1], HEADS, DIM // HEADS).transpose(1, 2)

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(self.split(self.q(x)), k.transpose(-1, -2)) * (DIM // HEADS) ** -0.5 + mask
        mixed = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2)
        return self.o(mixed.reshape(x.shape[0], x.shape[1], DIM))


class Block(nn.Module):
    """Pre-norm block: self-attention, cross-attention where `cross`, feed-forward."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.norm_self, self.norm_ffn, self.attn = RMSNorm(), RMSNorm(), Attention()
        self.up, self.down = nn.Linear(DIM, FFN), nn.Linear(FFN, DIM)
        if cross:
            self.norm_cross, self.cross = RMSNorm(), Attention()

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm_ffn(x))))

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, memory: torch.Tensor | None = None, memory_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = self.norm_self(x)
        x = x + self.attn(h, *self.attn.keys_values(h), mask)
        if memory is not None and memory_mask is not None:
            x = x + self.cross(self.norm_cross(x), *self.cross.keys_values(memory), memory_mask)
        return self.ffn(x)

    def step(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        cross: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        """Over keys and values that hold those of `x` already; `h` is the normed `x` that they were made from."""
        x = x + self.attn(h, k, v, mask)
        if cross:
            x = x + self.cross(self.norm_cross(x), *cross)
        return self.ffn(x)


class Normalizer(nn.Module):
    """Encoder layers may be none: then source, BOS and output are one causal sequence."""

    def __init__(self, encoder_layers: int, decoder_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(data.VOCABULARY, DIM)
        self.position = nn.Embedding(S + T, DIM)
        self.encoder = nn.ModuleList(Block(cross=False) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(Block(cross=encoder_layers > 0) for _ in range(decoder_layers))
        self.norm_memory, self.norm_out = RMSNorm(), RMSNorm()
        self.head = nn.Linear(DIM, data.VOCABULARY)
        self.offset = 0 if encoder_layers else S

    def tokens(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        return self.embed(ids) + self.position(torch.arange(start, start + ids.shape[1]))

    def memory(self, src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoded source [B, S, dim] and its additive mask [B, 1, 1, S]."""
        mask = ((src == data.PAD).to(torch.float32) * -1e4)[:, None, None]
        x = self.tokens(src)
        for block in self.encoder:
            x = block(x, mask)
        return self.norm_memory(x), mask

    def forward(self, src: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Teacher forcing: logits [B, T, vocabulary] for `out` [B, T] shifted right. For training."""
        shifted = nn.functional.pad(out[:, :-1], (1, 0), value=data.BOS)
        if self.encoder:
            memory, memory_mask = self.memory(src)
            x, ids = self.tokens(shifted), shifted
        else:
            memory = memory_mask = None
            ids = torch.cat([src, shifted], 1)
            start = torch.arange(ids.shape[1]) + (torch.arange(ids.shape[1]) >= src.shape[1]) * (S - src.shape[1])
            x = self.embed(ids) + self.position(start)
        mask = torch.full((x.shape[1], x.shape[1]), -1e4).triu(1)[None, None]
        if not self.encoder:
            padded = torch.cat([src == data.PAD, torch.zeros_like(shifted, dtype=torch.bool)], 1)
            mask = mask + padded.to(torch.float32)[:, None, None] * -1e4
        for block in self.decoder:
            x = block(x, mask, memory, memory_mask)
        return self.head(self.norm_out(x[:, -out.shape[1] :]))


class Encode(nn.Module):
    def __init__(self, core: Normalizer) -> None:
        super().__init__()
        self.core = core

    def forward(self, src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        memory, mask = self.core.memory(src)
        pairs = [block.cross.keys_values(memory) for block in self.core.decoder]
        return torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]), mask.reshape(S)


class Decode(nn.Module):
    """One token over explicit caches; writes its key and value at `position`."""

    def __init__(self, core: Normalizer) -> None:
        super().__init__()
        self.core = core

    def step(
        self,
        x: torch.Tensor,
        here: torch.Tensor,
        seen: torch.Tensor,
        self_k: torch.Tensor,
        self_v: torch.Tensor,
        cross: tuple[torch.Tensor, ...],
    ) -> Any:
        keys, values = [], []
        for i, block in enumerate(self.core.decoder):
            h = block.norm_self(x)
            k, v = block.attn.keys_values(h)
            keys.append(self_k[i : i + 1] * (1.0 - here) + k * here)
            values.append(self_v[i : i + 1] * (1.0 - here) + v * here)
            pair = (cross[0][i : i + 1], cross[1][i : i + 1], cross[2]) if cross else ()
            x = block.step(x, h, keys[-1], values[-1], seen, pair)
        return self.core.head(self.core.norm_out(x))[:, 0], torch.cat(keys), torch.cat(values)

    def forward(self, token: torch.Tensor, position: torch.Tensor, self_k: torch.Tensor, self_v: torch.Tensor, *rest: torch.Tensor) -> Any:
        time = torch.arange(self_k.shape[2])
        here = (time == position).to(torch.float32)[:, None]
        seen = (time > position).to(torch.float32) * -1e4
        x = (self.core.embed(token) + self.core.position(position))[None]
        if len(rest) == 1:
            return self.step(x, here, seen + rest[0], self_k, self_v, ())
        return self.step(x, here, seen, self_k, self_v, rest)


class CrossPrefill(nn.Module):
    """The first token of an encoder-decoder: BOS over an empty cache."""

    def __init__(self, core: Normalizer) -> None:
        super().__init__()
        self.core, self.decode = core, [Decode(core)]  # in a list: the core's weights are listed once

    def forward(self, cross_k: torch.Tensor, cross_v: torch.Tensor, mask: torch.Tensor) -> Any:
        empty = torch.zeros(len(self.core.decoder), HEADS, T, DIM // HEADS)
        x = self.core.tokens(torch.full((1, 1), data.BOS))
        time = torch.arange(T)
        here, seen = (time == 0).to(torch.float32)[:, None], (time > 0).to(torch.float32) * -1e4
        return self.decode[0].step(x, here, seen, empty, empty, (cross_k, cross_v, mask))


class CausalPrefill(nn.Module):
    """Source and BOS through a decoder-only model; caches are made for the output as well."""

    def __init__(self, core: Normalizer) -> None:
        super().__init__()
        self.core = core

    def forward(self, src: torch.Tensor) -> Any:
        ids = torch.cat([src, torch.full((1, 1), data.BOS)], 1)
        padded = torch.cat([(src[0] == data.PAD).to(torch.float32) * -1e4, torch.zeros(T)])
        mask = torch.full((S + 1, S + 1), -1e4).triu(1) + padded[: S + 1]
        x, keys, values = self.core.tokens(ids), [], []
        for block in self.core.decoder:
            h = block.norm_self(x)
            k, v = block.attn.keys_values(h)
            rest = torch.zeros(1, HEADS, T - 1, DIM // HEADS)
            keys.append(torch.cat([k, rest], 2))
            values.append(torch.cat([v, rest], 2))
            x = block.step(x, h, k, v, mask)
        return self.core.head(self.core.norm_out(x[:, -1:]))[:, 0], torch.cat(keys), torch.cat(values), padded


def tokenizer(encoder: bool) -> dict[str, Any]:
    """What `generate` needs to know, as it goes into `tokenizer.json`."""
    return {
        "kind": "characters", "alphabet": data.ALPHABET, "pad": data.PAD, "bos": data.BOS, "eos": data.EOS, "encoder": encoder,
        "max_input": S, "max_output": T,
    }  # fmt: skip


def exact_match(encoder: bool, n: int = 200) -> Callable[[Run], float]:
    """A quality function: the share of `n` held-out cases written exactly right."""

    def evaluate(run: Run) -> float:
        return sum(generate(run, tokenizer(encoder), said) == wanted for said, wanted in data.cases(n, 7, True)) / n

    return evaluate


def _weights(name: str) -> Path:
    return HERE / f"{name.replace('-', '_')}.npz"


def _spec(name: str) -> ModelSpec:
    from edgesdk.examples import digest_files, load_weights

    weights = _weights(name)
    core = load_weights(Normalizer(*LAYOUTS[name]), weights)
    encoder = LAYOUTS[name][0] > 0
    modules: dict[str, nn.Module] = {"encode": Encode(core)} if encoder else {}
    modules |= {"prefill": CrossPrefill(core) if encoder else CausalPrefill(core), "decode": Decode(core)}

    @cache
    def met(cases: int) -> dict[str, list[tuple[torch.Tensor, ...]]]:
        """Inputs of every method met while training cases are generated by the float model."""
        seen: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in modules}

        def run(called: str, inputs: Sequence[Any]) -> list[Any]:
            tensors = tuple(torch.from_numpy(np.asarray(i)) for i in inputs)
            seen[called].append(tensors)
            with torch.no_grad():
                outputs = modules[called](*tensors)
            return [o.numpy() for o in outputs]

        with one_thread():
            for said, _ in data.cases(cases, 3, False):
                generate(run, tokenizer(encoder), said)
        return seen

    def calibration(method: str) -> list[tuple[torch.Tensor, ...]]:
        return met(CALIBRATION_CASES)[method]

    methods = {n: Method(m, met(1)[n][0], unroll=8 if n == "decode" else 1) for n, m in modules.items()}
    others: dict[Layout, str] = {
        "encoder-decoder": "normalizer",
        "deep-encoder": "normalizer-deep-encoder",
        "decoder-only": "normalizer-decoder-only",
    }
    return ModelSpec(
        name=name,
        digest=digest_files(__file__, data.__file__, weights),
        methods=methods,
        layout=next(layout for layout, known in others.items() if known == name),
        calibration=calibration,
        evaluate=exact_match(encoder),
        quality_name="exact match",
        alternatives={k: f"example:{v}" for k, v in others.items() if v != name} if name == "normalizer" else {},
        files={TOKENIZER: json.dumps(tokenizer(encoder)).encode()},
    )


def encoder_decoder() -> ModelSpec:
    """Four encoder layers, two decoder layers: two thirds and one third."""
    return _spec("normalizer")


def deep_encoder() -> ModelSpec:
    """Five encoder layers, one decoder layer."""
    return _spec("normalizer-deep-encoder")


def decoder_only() -> ModelSpec:
    """Seven decoder layers over one sequence."""
    return _spec("normalizer-decoder-only")
