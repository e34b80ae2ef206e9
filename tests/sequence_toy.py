"""A small random sequence model in numpy that follows the contract of `edgesdk.sequence`, and what it must give, computed the long way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgesdk.sequence.card import Card

HIDDEN = -1e4


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Toy:
    """Two decoder layers, two heads of keys and values; with an encoder, windows or one shared cache as asked for.

    `run` answers the card's methods; `logits(source, tokens)` is the same model without caches, buckets or padding.
    """

    LAYERS, HEADS, SIZE = 2, 2, 4

    def __init__(
        self,
        *,
        encoder: bool = False,
        window: int = 0,
        shared: bool = False,
        ctc: bool = False,
        vocab: int = 11,
        batches: Sequence[int] = (1,),
        sources: Sequence[int] = (6, 12),
        prefills: Sequence[int] = (4, 8),
        caches: Sequence[int] = (8, 16, 32),
        chunks: Sequence[int] = (1, 4),
        eos: Sequence[int] = (1,),
        start: Sequence[int] | None = None,
        max_output: int = 24,
        sharp: float = 3.0,
        seed: int = 0,
        tokenizer: dict[str, Any] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.vocab, self.dim, self.encoder, self.shared, self.sharp = vocab, self.HEADS * self.SIZE, encoder, shared, sharp
        self.windows = [window, window if not shared else 0]
        self.embed = rng.standard_normal((vocab, self.dim))
        self.place = rng.standard_normal((256, self.dim)) * 0.7
        w = rng.standard_normal((self.LAYERS, 7, self.dim, self.dim)) * self.dim**-0.5
        self.q, self.k, self.v, self.o, self.cross_q, self.cross_k, self.cross_v = np.swapaxes(w, 0, 1)
        methods: dict[str, dict[str, Any]] = {}
        behind = [*sources] if encoder else [0]
        for b in batches:
            tail = f"_b{b}"
            for s in sources if encoder or ctc else ():
                methods[f"encode_{s}{tail}"] = {"role": "encode", "batch": b, "source": s, "cache": 0, "tokens": 0}
            for s in () if ctc else behind:
                for n in prefills:
                    methods[f"prefill_{s}_{n}{tail}"] = {"role": "prefill", "batch": b, "source": s, "cache": 0, "tokens": n}
                for t in caches:
                    for n in chunks:
                        methods[f"decode_{s}_{t}_x{n}{tail}"] = {"role": "decode", "batch": b, "source": s, "cache": t, "tokens": n}
        pairs = [{"heads": self.HEADS, "head": self.SIZE}] * self.LAYERS
        self.card = Card(
            {
                "layout": "encoder-ctc" if ctc else "encoder-decoder" if encoder else "decoder-decoder" if shared else "decoder-only",
                "vocab": vocab,
                "methods": methods,
                "caches": [{**p, "window": w} for p, w in zip(pairs, self.windows, strict=True)],
                "cross": pairs if encoder else [],
                "start": ((2,) if encoder else ()) if start is None else start,
                "eos": eos,
                "pad": 0,
                "max_output": max_output,
                "tokenizer": tokenizer or {"kind": "none"},
            }
        )
        self.shapes: list[tuple[str, list[tuple[int, ...]]]] = []

    def split(self, x: np.ndarray) -> np.ndarray:
        return np.swapaxes(x.reshape(*x.shape[:2], self.HEADS, self.SIZE), 1, 2)

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
        out = softmax(q @ np.swapaxes(k, 2, 3) * self.SIZE**-0.5 * 2 + mask[:, None]) @ v
        return np.swapaxes(out, 1, 2).reshape(q.shape[0], q.shape[2], self.dim)

    def run(self, method: str, arrays: Sequence[Any]) -> list[Any]:
        m, feed = self.card.methods[method], list(arrays)
        self.shapes.append((method, [a.shape for a in arrays]))
        if m["role"] == "encode":
            source, mask = feed
            assert source.shape == mask.shape == (m["batch"], m["source"]) and source.dtype == np.int64 and mask.dtype == np.float32
            return self.encode(source, mask)
        tokens, positions = feed.pop(0), feed.pop(0)
        last = feed.pop(0) if m["role"] == "prefill" else None
        mask = feed.pop(0)
        b, n = tokens.shape
        assert (b, n) == (m["batch"], m["tokens"]) == positions.shape and tokens.dtype == positions.dtype == np.int64
        causal = np.triu(np.full((n, n), HIDDEN), 1)
        if last is None:
            assert mask.shape == (b, n, m["cache"] + n) and mask.dtype == np.float32
            masks = [mask, feed.pop(0) if self.windows[0] else mask]
        else:
            assert mask.shape == (b, n)
            far = np.arange(n)[:, None] - np.arange(n) >= (self.windows[0] or n)
            masks = [mask[:, None] + causal, mask[:, None] + causal + far * HIDDEN]
        cross = [feed.pop(0) for _ in range(1 + 2 * self.LAYERS)] if self.encoder else []
        held = feed if last is None else [np.zeros((b, self.HEADS, 0, self.SIZE))] * 2 * self.LAYERS
        assert len(held) == 2 * self.LAYERS and all(a.shape[0] == b for a in held)
        x, new = self.layers(tokens, positions, masks, cross, held)
        logits = x @ self.embed.T * self.sharp
        return [(logits if last is None else logits[np.arange(b), last]).astype(np.float32), *(a.astype(np.float32) for a in new)]

    def inputs(self, method: str) -> list[tuple[tuple[int, ...], str]]:
        """(shape, dtype) of each input, as a runner tells them."""
        m = self.card.methods[method]
        b, n, s, t, kv = m["batch"], m["tokens"], m["source"], m["cache"], (self.HEADS, self.SIZE)
        if m["role"] == "encode":
            return [((b, s), "int64"), ((b, s), "float32")]
        found: list[tuple[tuple[int, ...], str]] = [((b, n), "int64")] * 2
        if m["role"] == "prefill":
            found += [((b,), "int64"), ((b, n), "float32")]
        else:
            found.append(((b, n, t + n), "float32"))
            found += [((b, n, self.windows[0] + n), "float32")] if self.windows[0] else []
        if s:
            found += [((b, s), "float32")] + [((b, kv[0], s, kv[1]), "float32")] * 2 * self.LAYERS
        if m["role"] == "decode":
            found += [((b, kv[0], w or t, kv[1]), "float32") for w in self.windows for _ in "kv"]
        return found

    def encode(self, source: np.ndarray, mask: np.ndarray) -> list[Any]:
        x = self.embed[source] + self.place[: source.shape[1]]
        x = x + self.attend(self.split(x), self.split(x), self.split(x), mask[:, None])
        if self.card.layout == "encoder-ctc":
            return [(x @ self.embed.T).astype(np.float32)]
        pairs = zip(self.cross_k, self.cross_v, strict=True)
        return [self.split(x @ w).astype(np.float32) for pair in pairs for w in pair]

    def layers(self, tokens: Any, positions: Any, masks: Any, cross: Any, held: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        x, new = self.embed[tokens] + self.place[positions], []
        for i in range(self.LAYERS):
            k, v = self.split(x @ self.k[i]), self.split(x @ self.v[i])
            new += [k, v]
            keys, values = np.concatenate([held[2 * i], k], 2), np.concatenate([held[2 * i + 1], v], 2)
            x = x + self.attend(self.split(x @ self.q[i]), keys, values, masks[1 if self.windows[i] else 0]) @ self.o[i]
            if cross:
                x = x + self.attend(self.split(x @ self.cross_q[i]), cross[1 + 2 * i], cross[2 + 2 * i], cross[0][:, None])
        return x / np.sqrt((x * x).mean(-1, keepdims=True)), new

    def logits(self, source: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """[V] behind the last of `tokens`; `source` is read by the encoder, or stands before them."""
        cross = []
        if self.encoder:
            zero = np.zeros((1, len(source)))
            cross = [zero, *self.encode(np.asarray([source]), zero)]
        row = [*([] if self.encoder else source), *self.card.start, *tokens]
        n = len(row)
        causal = np.triu(np.full((1, n, n), HIDDEN), 1)
        far = np.arange(n)[:, None] - np.arange(n) >= (self.windows[0] or n)
        empty = [np.zeros((1, self.HEADS, 0, self.SIZE))] * 2 * self.LAYERS
        x, _ = self.layers(np.asarray([row]), np.arange(n)[None], [causal, causal + far * HIDDEN], cross, empty)
        return (x[0, -1] @ self.embed.T * self.sharp).astype(np.float32)

    def greedy(self, source: Sequence[int], cap: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < cap:
            best = int(np.argmax(self.logits(source, tokens)))
            if best in self.card.eos:
                break
            tokens.append(best)
        return tokens
