"""The one PyTorch implementation of every layout in `config`: trained by `forward`, exported through `encode`, `prefill` and `decode`.

Written in operators that XNNPACK takes as one delegate (means are products with a vector, keys and values stay apart from their caches)
and that read caches where they are. Shapes are those of the package's contract: B batch, S source, N tokens of a call, T slots of a cache,
H heads of queries, K of keys and values (G = H / K queries share one), D their size. Masks are additive, 0 or `HIDDEN`.

Names of parameters, which loaders map to (what a configuration lacks has none):

    embed.weight [V, dim]                                  the decoder's (or the only) embedding, and the head where it is tied
    source_embed.weight [V, dim]                           the encoder's, only where its width differs from the decoder's
    head.weight [V, dim], head.bias / head_bias [V]        the head of its own / the bias beside a tied one
    sound.first.weight, .bias, sound.second.weight, .bias  the two convolutions
    {encoder,decoder}.position.weight [positions, dim]     learned positions; behind sound, one row for two frames
    {encoder,decoder}.relative.weight [buckets, H]         T5's relative bias, shared by the stack's layers
    {encoder,decoder}.embed_norm, .final_norm              a norm has .weight and, of kind "layer", .bias
    {encoder,decoder}.layers.I.self_norm, .ffn_norm, decoder.layers.I.cross_norm
    {encoder,decoder}.layers.I.self_attn.{q,k,v,o}.weight, .bias, with qk_norm .q_norm.weight, .k_norm.weight
    decoder.layers.I.cross_attn.{q,k,v,o}.weight, .bias
    {encoder,decoder}.layers.I.ffn.{gate,up,down}.weight, .bias
    decoder.shared.{norm,k,v,k_norm}.weight                the one cache of the decoder-decoder layout; its readers have no k and v
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesdk.sequence.config import SequenceConfig
from edgesdk.sequence.config import Stack as StackConfig
from edgesdk.sequence.layers import Held, Layer, Norm, Pair, SharedCache
from edgesdk.sequence.positions import HIDDEN, buckets, frequencies, ordered, sinusoids


class Stack(nn.Module):
    """What encoder and decoder have in common: places, norms, layers. `table`: rows of learned or sinusoidal positions."""

    def __init__(self, config: SequenceConfig, stack: StackConfig, layers: Sequence[Layer], table: int, both_ways: bool) -> None:
        super().__init__()
        self.config, self.stack, self.both_ways = config, stack, both_ways
        self.layers = nn.ModuleList(layers)
        self.embed_norm = Norm(stack.dim, config) if config.embed_norm else None
        self.final_norm = Norm(stack.dim, config) if config.final_norm else None
        if config.positions == "learned":
            self.position = nn.Embedding(table + config.position_offset, stack.dim)
        if config.positions == "relative":
            self.relative = nn.Embedding(config.relative_buckets, stack.heads)
            self.buckets = buckets(config, both_ways)
        if config.positions == "rope":
            self.turns = frequencies(config, stack.head)

    def enter(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embeddings [B, N, dim] with their positions [B, N], normed where the model does."""
        if self.config.positions == "learned":
            x = x + self.position(positions + self.config.position_offset)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoids(positions, self.stack.dim)
        return x if self.embed_norm is None else self.embed_norm(x)

    def leave(self, x: Tensor) -> Tensor:
        return x if self.final_norm is None else self.final_norm(x)

    def places(self, positions: Tensor) -> Pair | None:
        """Cosines and sines [B, 1, N, D / 2] of rotary positions."""
        if self.config.positions != "rope":
            return None
        b, n = positions.shape
        turns = torch.tensor(self.turns, device=positions.device)
        angles = positions.to(torch.float32).reshape(b, 1, n, 1) * turns
        return torch.cos(angles), torch.sin(angles)

    def scores_mask(self, mask: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """A mask [B, 1 or N, time] as it is added to scores [B, K, G·N, time], with the relative bias where the model has one.

        `seen` [B or 1, time]: positions of what is attended to.
        """
        n = mask.shape[1]
        if self.config.positions == "relative":
            far, kv_heads = self.config.relative_distance, self.stack.kv_heads
            table = self.relative(torch.tensor(self.buckets, device=mask.device))
            distance = seen.to(torch.float32)[:, None, :] - positions.to(torch.float32)[:, :, None]
            bias = F.embedding((distance.clamp(-far, far) + far).to(torch.int64), table).permute(0, 3, 1, 2)  # [B, H, N, time]
            return over_heads(bias + mask[:, None], kv_heads)
        groups = self.stack.heads // self.stack.kv_heads
        return over_heads(torch.cat([mask] * groups, 1) if n > 1 and groups > 1 else mask)


def over_heads(mask: Tensor, kv_heads: int = 1) -> Tensor:
    """A mask [B, rows, time], or one for each head [B, H, N, time], as `attend` takes it."""
    return mask.reshape(*([] if mask.shape[0] == 1 else [mask.shape[0]]), kv_heads, -1, mask.shape[-1])


class Encoder(Stack):
    """Sees the whole source, both ways; a window of W reaches W - 1 tokens to each side."""

    def __init__(self, config: SequenceConfig, stack: StackConfig) -> None:
        table = config.sound.frames // 2 if config.sound else config.max_positions
        super().__init__(config, stack, [Layer(config, stack.of(i)) for i in range(stack.layers)], table, both_ways=True)

    def forward(self, x: Tensor, source_mask: Tensor) -> Tensor:
        """Embeddings [B, S, dim] and their mask [B, S] → the memory [B, S, dim]."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        x, places, padding = self.enter(x, positions), self.places(positions), source_mask.reshape(-1, 1, x.shape[1])
        masks = {
            w: self.scores_mask(padding + ordered(positions, w, both_ways=True) if w else padding, positions, positions)
            for w in {self.stack.window(i) for i in range(self.stack.layers)}
        }
        for i, layer in enumerate(self.layers):
            x, _ = layer(x, places, masks[self.stack.window(i)])
        return self.leave(x)


class Decoder(Stack):
    """Sees the past, its caches, and the memory's keys and values where there is one (`memory`: its width, else 0)."""

    def __init__(self, config: SequenceConfig, stack: StackConfig, memory: int) -> None:
        self_layers = stack.layers if config.shared_from is None else config.shared_from
        layers = [Layer(config, stack.of(i), memory, reader=i >= self_layers) for i in range(stack.layers)]
        super().__init__(config, stack, layers, config.max_positions, both_ways=False)
        self.shared_from = config.shared_from
        if self.shared_from is not None:
            self.shared = SharedCache(config, stack)

    def masks(self, padding: Tensor, positions: Tensor) -> dict[int, Tensor]:
        """For tokens that attend to each other alone: window → mask. `padding`: [B, N]."""
        windows = {self.stack.window(i) for i in range(self.stack.layers)}
        return {
            w: self.scores_mask(padding.reshape(-1, 1, padding.shape[1]) + ordered(positions, w), positions, positions) for w in windows
        }

    def cached_masks(self, mask: Tensor, window_mask: Tensor | None, positions: Tensor) -> dict[int, Tensor]:
        """For tokens that attend to caches, too: slot t of a cache that sees all holds position t where there is a relative bias."""
        if self.config.positions == "relative":
            slots = torch.arange(mask.shape[2] - positions.shape[1], device=mask.device, dtype=torch.float32)[None].expand(
                mask.shape[0], -1
            )
            seen = torch.cat([slots, positions.to(torch.float32)], 1)  # LiteRT makes its inputs int32 and would not join them with int64
        else:
            seen = positions
        found = {0: self.scores_mask(mask, positions, seen)}
        if window_mask is not None:
            found |= {w: self.scores_mask(window_mask, positions, seen) for w in set(self.stack.windows) - {0}}
        return found

    def forward(
        self, x: Tensor, positions: Tensor, masks: dict[int, Tensor], caches: Sequence[Held] = (),
        cross: Sequence[Held] = (), source_mask: Tensor | None = None, last: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, list[Pair]]:  # fmt: skip
        """Embeddings [B, N, dim] → hidden states before the head and every cache's new pair.

        `last`: the one token [B] whose hidden state is wanted, and the mask [B, N] of padding; then readers of the shared cache see it alone.
        """
        x, places = self.enter(x, positions), self.places(positions)
        cross_mask = None if source_mask is None else over_heads(source_mask.reshape(-1, 1, source_mask.shape[1]))
        made: list[Pair] = []
        shared: Sequence[Held] = ()
        for i, layer in enumerate(self.layers):
            if i == self.shared_from:
                made.append(self.shared(x, places))
                shared = [*caches[i:], made[-1]]
                if last is not None:
                    x, places, masks = self._alone(x, positions, *last)
            cache = caches[i] if caches and not shared else None
            x, new = layer(x, places, masks[self.stack.window(i)], cache, shared, cross[i] if cross else None, cross_mask)
            made += [new] if new is not None else []
        if last is not None and self.shared_from is None:
            x = pick(x, last[0])
        return self.leave(x), made

    def _alone(self, x: Tensor, positions: Tensor, last: Tensor, padding: Tensor) -> tuple[Tensor, Pair | None, dict[int, Tensor]]:
        b, n, _ = x.shape
        after = ((torch.arange(n, device=x.device).reshape(1, n) - last.reshape(b, 1)).to(torch.float32)).clamp(0, 1) * HIDDEN
        places = self.places(positions.gather(1, last.reshape(b, 1)))
        return pick(x, last), places, {0: over_heads((padding + after).reshape(b, 1, n))}


def pick(x: Tensor, last: Tensor) -> Tensor:
    """x [B, N, dim] at token `last` [B] → [B, 1, dim]."""
    b, n, dim = x.shape
    rows = last if b == 1 else torch.arange(0, b * n, n, device=x.device) + last
    return x.reshape(b * n, dim).index_select(0, rows).reshape(b, 1, dim)


class SoundFront(nn.Module):
    """Features [B, bins, frames] → [B, frames / 2, dim]: two convolutions of width 3 with GELU, the second with stride 2."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(features, dim, 3, padding=1)
        self.second = nn.Conv1d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.second(F.gelu(self.first(x)))).transpose(1, 2)


class SequenceModel(nn.Module):
    """See the module's docstring for the names of its parameters."""

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.config = config
        encoder, decoder = config.encoder, config.decoder
        self.encoder = Encoder(config, encoder) if encoder else None
        self.decoder = Decoder(config, decoder, encoder.dim if encoder else 0) if decoder else None
        self.sound = SoundFront(config.sound.features, encoder.dim) if config.sound and encoder else None
        out = (decoder or encoder).dim  # type: ignore[union-attr]
        self.embed = nn.Embedding(config.vocab, out) if decoder or not config.sound else None
        two = encoder and decoder and encoder.dim != decoder.dim and not config.sound
        self.source_embed = nn.Embedding(config.vocab, encoder.dim) if encoder and two else None
        self.head = None if config.tied else nn.Linear(out, config.vocab, bias=config.head_bias)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab)) if config.tied and config.head_bias else None
        self.apply(_start)
        self._quiet_outputs()

    def _quiet_outputs(self) -> None:
        """What ends in the residual stream starts small, so that a deep stack starts near the identity."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.endswith((".o", ".down")):
                module.weight.data.mul_(0.5)

    def tokens(self, ids: Tensor, source: bool = False) -> Tensor:
        """Embeddings of token ids; `source`: as the encoder takes them."""
        table = self.source_embed if source and self.source_embed is not None else self.embed
        assert table is not None
        x = table(ids)
        return x if self.config.embed_scale == 1.0 else x * self.config.embed_scale  # type: ignore[no-any-return]

    def encode(self, source: Tensor, source_mask: Tensor) -> Tensor:
        """Tokens [B, S] or features [B, bins, 2 · S], and their mask [B, S] → the memory [B, S, dim]."""
        assert self.encoder is not None
        x = self.sound(source) if self.sound is not None else self.tokens(source, source=True)
        return self.encoder(x, source_mask)  # type: ignore[no-any-return]

    def cross(self, memory: Tensor) -> list[Pair]:
        """Every decoder layer's keys and values [B, K, S, D] of the memory."""
        assert self.decoder is not None
        return [layer.cross_attn.keys_values(memory, None) for layer in self.decoder.layers]  # type: ignore[union-attr,operator]

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, dim] → [..., V]."""
        hidden = hidden if self.config.logit_scale == 1.0 else hidden * self.config.logit_scale
        if self.head is not None:
            return self.head(hidden)  # type: ignore[no-any-return]
        assert self.embed is not None
        return F.linear(hidden, self.embed.weight, self.head_bias)

    def prefill(
        self, tokens: Tensor, positions: Tensor, last: Tensor, mask: Tensor, cross: Sequence[Held] = (), source_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Pair]]:
        """Logits [B, V] at token `last` and the new pairs of every cache."""
        assert self.decoder is not None
        masks = self.decoder.masks(mask, positions)
        hidden, new = self.decoder(self.tokens(tokens), positions, masks, (), cross, source_mask, (last, mask))
        return self.logits(hidden)[:, 0], new

    def decode(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, caches: Sequence[Held], window_mask: Tensor | None = None,
        cross: Sequence[Held] = (), source_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Pair]]:  # fmt: skip
        """Logits [B, N, V] and the new pairs, over caches that are left as they are."""
        assert self.decoder is not None
        masks = self.decoder.cached_masks(mask, window_mask, positions)
        hidden, new = self.decoder(self.tokens(tokens), positions, masks, caches, cross, source_mask)
        return self.logits(hidden), new

    def forward(self, source: Tensor | None, source_mask: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Teacher forcing: logits [B, N, V], at each of `tokens` [B, N] (which begin with the start token) those of the token after it.

        `source`: tokens [B, S] or features; `source_mask`: [B, S], all seen where None. Without an encoder the source stands before the tokens,
        whose positions follow its last token that is seen; it may be None. Encoder-only: logits [B, S, V], no tokens.
        """
        if source is not None and source_mask is None:
            times = source.shape[-1] // (2 if self.sound is not None else 1)
            source_mask = torch.zeros(source.shape[0], times, device=source.device)
        if self.encoder is not None:
            assert source is not None and source_mask is not None
            memory = self.encode(source, source_mask)
            if self.decoder is None:
                return self.logits(memory)
        assert self.decoder is not None and tokens is not None
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None].expand(tokens.shape[0], -1)
        padding = torch.zeros(tokens.shape, device=tokens.device)
        if self.encoder is not None:
            masks = self.decoder.masks(padding, positions)
            hidden, _ = self.decoder(self.tokens(tokens), positions, masks, (), self.cross(memory), source_mask)
            return self.logits(hidden)
        ids = tokens
        if source is not None and source_mask is not None:
            before = torch.arange(source.shape[1], device=tokens.device)[None].expand(tokens.shape[0], -1)
            positions = torch.cat([before, positions + (source_mask > HIDDEN / 2).sum(1, keepdim=True)], 1)
            ids, padding = torch.cat([source, tokens], 1), torch.cat([source_mask, padding], 1)
        hidden, _ = self.decoder(self.tokens(ids), positions, self.decoder.masks(padding, positions))
        return self.logits(hidden[:, -tokens.shape[1] :])


def _start(module: nn.Module) -> None:
    """Random weights that keep the size of what passes: matrices by their width, embeddings so that a tied head starts with small logits."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    bias: Any = getattr(module, "bias", None)
    if isinstance(module, nn.Linear) and bias is not None:
        nn.init.zeros_(bias)
