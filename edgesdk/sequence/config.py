"""What a model of the family is: stacks of layers, how they attend, normalise and place tokens. Plain data; no framework is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from edgesdk.noun import Noun, Part

SequenceLayout = Literal["decoder-only", "encoder-decoder", "encoder-ctc", "decoder-decoder"]


class Stack(Part):
    """Equal layers of one width. `windows` is each layer's attention span in tokens, 0 for all of them; empty: all layers see all."""

    layers: PositiveInt
    dim: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head: PositiveInt  # size of one head
    ffn: PositiveInt
    windows: tuple[NonNegativeInt, ...] = ()
    ffns: tuple[PositiveInt, ...] = ()  # each layer's own feed-forward width, where they differ; none is above `ffn`

    @model_validator(mode="after")
    def _agree(self) -> Stack:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} heads of keys and values evenly")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows for {self.layers} layers")
        if self.ffns and (len(self.ffns) != self.layers or max(self.ffns) > self.ffn):
            raise ValueError(f"ffns = {self.ffns} for {self.layers} layers of at most {self.ffn}")
        return self

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def of(self, layer: int) -> Stack:
        """The stack as one layer has it."""
        return self.model_copy(update={"ffn": self.ffns[layer], "ffns": ()}) if self.ffns else self

    def only(self, layers: Sequence[int]) -> Stack:
        """The stack of some of its layers, in that order."""
        update = {name: tuple(values[i] for i in layers) for name, values in (("windows", self.windows), ("ffns", self.ffns)) if values}
        return self.model_copy(update={"layers": len(layers), **update})


class Sound(Part):
    """Features instead of source tokens: two convolutions of width 3 over `features` bins, the second with stride 2."""

    features: PositiveInt
    frames: PositiveInt  # what one call takes; the encoder sees half of them


class RopeScaling(Part):
    """Rotary positions stretched beyond the length a model was first trained for, after Position Interpolation (linear) or Llama 3.1.

    With the wavelength λ of a pair of channels: below `original / high` it stays, above `original / low` its frequency is divided by
    `factor`, between them it is the mean of both weighted by (original / λ - low) / (high - low). `linear` divides all of them.
    """

    kind: Literal["linear", "llama3"]
    factor: PositiveFloat
    low: PositiveFloat = 1.0
    high: PositiveFloat = 4.0
    original: PositiveInt = 8192


class SequenceConfig(Noun):
    KIND: ClassVar[str] = "sequence-config"

    layout: SequenceLayout
    vocab: PositiveInt
    encoder: Stack | None = None
    decoder: Stack | None = None
    shared_from: PositiveInt | None = None  # decoder-decoder: the first layer that reads the one shared cache
    sound: Sound | None = None

    norm: Literal["rms", "layer"] = "rms"
    norm_place: Literal["pre", "post"] = "pre"
    norm_eps: PositiveFloat = 1e-6
    final_norm: bool = True
    embed_norm: bool = False  # BART normalises its embeddings
    qk_norm: bool = False  # Qwen3 normalises queries and keys
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    k_bias: bool = True  # Whisper's keys have none where queries and values have one; without `qkv_bias` it says nothing
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    positions: Literal["rope", "learned", "sinusoidal", "relative", "none"] = "rope"
    max_positions: PositiveInt = 4096
    position_offset: NonNegativeInt = 0  # rows that a learned table keeps for itself
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    relative_buckets: PositiveInt = 32  # T5
    relative_distance: PositiveInt = 128
    attention_scale: PositiveFloat | None = None  # None: head ** -0.5
    embed_scale: PositiveFloat = 1.0
    logit_scale: PositiveFloat = 1.0
    tied: bool = True  # the head is the (decoder's) embedding
    head_bias: bool = False

    @model_validator(mode="after")
    def _whole(self) -> SequenceConfig:
        wants = {
            "decoder-only": (False, True),
            "encoder-decoder": (True, True),
            "encoder-ctc": (True, False),
            "decoder-decoder": (False, True),
        }
        encoder, decoder = wants[self.layout]
        if (self.encoder is not None) != encoder or (self.decoder is not None) != decoder:
            raise ValueError(f"layout {self.layout} has {'an' if encoder else 'no'} encoder and {'a' if decoder else 'no'} decoder")
        if (self.shared_from is not None) != (self.layout == "decoder-decoder"):
            raise ValueError("shared_from goes with the layout decoder-decoder")
        if self.decoder and self.shared_from is not None and self.shared_from >= self.decoder.layers:
            raise ValueError(f"shared_from = {self.shared_from} of {self.decoder.layers} layers")
        if self.sound and not self.encoder:
            raise ValueError("sound goes with an encoder")
        if self.sound and not self.decoder and self.tied:
            raise ValueError("tied = True, but a model from sound to CTC has no embedding")
        if self.decoder:
            self._windows(self.decoder)
        return self

    def _windows(self, decoder: Stack) -> None:
        """Raises `ValueError` for what one `window_mask` cannot say, and for what a ring of slots cannot (positions of its keys)."""
        if len(set(decoder.windows) - {0}) > 1:
            raise ValueError(f"decoder.windows = {decoder.windows}: all windows of a decoder are of one size")
        if self.shared_from is not None and any(decoder.windows[self.shared_from :]):
            raise ValueError(f"decoder.windows = {decoder.windows}: layers from shared_from = {self.shared_from} on see all")
        if self.positions == "relative" and (any(decoder.windows) or self.shared_from is not None):
            raise ValueError("relative positions go with neither a decoder's windows nor a shared cache")

    def _attention(self, stack: Stack, memory: int) -> int:
        return 2 * stack.dim * stack.heads * stack.head + 2 * memory * stack.kv_heads * stack.head

    @property
    def parameters(self) -> int:
        """Weights of all matrices (norms, biases and tables of positions left out), the embedding once where it is tied."""
        total = self.vocab * (self.encoder or self.decoder).dim  # type: ignore[union-attr]
        for stack in (self.encoder, self.decoder):
            if stack:
                inner = sum(stack.ffns) if stack.ffns else stack.layers * stack.ffn
                total += stack.layers * self._attention(stack, stack.dim) + (3 if self.gated else 2) * stack.dim * inner
        if self.encoder and self.decoder:
            total += self.decoder.layers * self._attention(self.decoder, self.encoder.dim)
            total += self.vocab * self.decoder.dim if self.encoder.dim != self.decoder.dim else 0
        if self.decoder and self.shared_from is not None:
            shared = self.decoder.layers - self.shared_from
            total -= (shared - 1) * 2 * self.decoder.dim * self.decoder.kv_heads * self.decoder.head
        out = self.decoder or self.encoder
        return total + (0 if self.tied else self.vocab * out.dim)  # type: ignore[union-attr]
