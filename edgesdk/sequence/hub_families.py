"""What each Hugging Face family is as a `SequenceConfig`, and which of its weights goes where.

The facts are those of the `transformers` models of the same name; a setting that this family of models cannot be is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from edgesdk.errors import InputError
from edgesdk.sequence.config import RopeScaling, SequenceConfig, Sound, Stack

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Their name of an activation → ours."""


def refuse(setting: str, value: object, can: str) -> InputError:
    return InputError(
        f"config.json: {setting} = {value!r} is not taken", f"{can}; or wrap the model in a function of your own: file.py:function"
    )


def _activation(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise refuse("the activation", name, f"known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope(c: Any) -> dict[str, Any]:
    """theta and scaling of rotary positions."""
    rope = dict(c.rope_parameters)
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("partial_rotary_factor", rope["partial_rotary_factor"], "only whole heads are turned")
    theta: dict[str, Any] = {"rope_theta": float(rope["rope_theta"])}
    if kind == "default":
        return theta
    if kind == "linear":
        return {**theta, "rope_scaling": RopeScaling(kind="linear", factor=rope["factor"])}
    if kind == "llama3":
        return {
            **theta,
            "rope_scaling": RopeScaling(
                kind="llama3",
                factor=rope["factor"],
                low=rope["low_freq_factor"],
                high=rope["high_freq_factor"],
                original=rope["original_max_position_embeddings"],
            ),
        }
    raise refuse("rope_type", kind, "known: default, linear, llama3")


def _llama(c: Any) -> SequenceConfig:
    """Llama, SmolLM, Mistral, Qwen2 and Qwen3: pre-norm, rotary positions, gated, grouped heads."""
    qwen2, qwen3 = c.model_type == "qwen2", c.model_type == "qwen3"
    window = getattr(c, "sliding_window", None) or 0
    kinds = getattr(c, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * c.num_hidden_layers
    if unknown := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
        raise refuse("layer_types", unknown[0], "known: full_attention, sliding_attention")
    windows = tuple(window if k == "sliding_attention" else 0 for k in kinds)
    bias = bool(getattr(c, "attention_bias", False))
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return SequenceConfig(
        layout="decoder-only",
        vocab=c.vocab_size,
        decoder=Stack(
            layers=c.num_hidden_layers,
            dim=c.hidden_size,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads or c.num_attention_heads,
            head=head,
            ffn=c.intermediate_size,
            windows=windows if any(windows) else (),
        ),
        norm_eps=c.rms_norm_eps,
        qk_norm=qwen3,
        qkv_bias=qwen2 or bias,
        out_bias=bias,
        ffn_bias=bool(getattr(c, "mlp_bias", False)),
        activation=_activation(c.hidden_act),
        max_positions=c.max_position_embeddings,
        tied=c.tie_word_embeddings,
        **_rope(c),
    )


def _t5(c: Any) -> SequenceConfig:
    """T5 (relu) and T5 v1.1, Flan-T5, mT5 (gated gelu): RMS norm, relative positions shared by all layers, scores without a scale."""

    def stack(layers: int) -> Stack:
        return Stack(layers=layers, dim=c.d_model, heads=c.num_heads, kv_heads=c.num_heads, head=c.d_kv, ffn=c.d_ff)

    return SequenceConfig(
        layout="encoder-decoder",
        vocab=c.vocab_size,
        encoder=stack(c.num_layers),
        decoder=stack(c.num_decoder_layers),
        norm_eps=c.layer_norm_epsilon,
        activation=_activation(c.dense_act_fn),
        gated=c.is_gated_act,
        positions="relative",
        relative_buckets=c.relative_attention_num_buckets,
        relative_distance=c.relative_attention_max_distance,
        attention_scale=1.0,
        logit_scale=c.d_model**-0.5 if getattr(c, "scale_decoder_outputs", False) else 1.0,
    )


def _stacks(c: Any) -> dict[str, Any]:
    """What BART, Marian and Whisper have in common: layer norm, biases, a plain feed-forward part."""

    def stack(layers: int, heads: int, ffn: int) -> Stack:
        if c.d_model % heads:
            raise refuse("d_model", c.d_model, f"a multiple of {heads} heads is")
        return Stack(layers=layers, dim=c.d_model, heads=heads, kv_heads=heads, head=c.d_model // heads, ffn=ffn)

    return {
        "layout": "encoder-decoder",
        "vocab": c.vocab_size,
        "encoder": stack(c.encoder_layers, c.encoder_attention_heads, c.encoder_ffn_dim),
        "decoder": stack(c.decoder_layers, c.decoder_attention_heads, c.decoder_ffn_dim),
        "norm": "layer",
        "norm_eps": 1e-5,
        "qkv_bias": True,
        "out_bias": True,
        "ffn_bias": True,
        "gated": False,
        "activation": _activation(c.activation_function),
    }


def _bart(c: Any) -> SequenceConfig:
    scale = c.d_model**0.5 if c.scale_embedding else 1.0
    return SequenceConfig(
        **_stacks(c),
        norm_place="post",
        final_norm=False,
        embed_norm=True,
        positions="learned",
        max_positions=c.max_position_embeddings,
        position_offset=2,
        embed_scale=scale,
        head_bias=True,
    )


def _marian(c: Any) -> SequenceConfig:
    if not c.share_encoder_decoder_embeddings:
        raise refuse("share_encoder_decoder_embeddings", False, "one embedding for both sides is")
    scale = c.d_model**0.5 if c.scale_embedding else 1.0
    return SequenceConfig(
        **_stacks(c),
        norm_place="post",
        final_norm=False,
        positions="sinusoidal",
        max_positions=c.max_position_embeddings,
        embed_scale=scale,
        head_bias=True,
    )


def _whisper(c: Any) -> SequenceConfig:
    """Its encoder's sinusoidal table is stored as a weight, so that it is read like a learned one."""
    return SequenceConfig(
        **_stacks(c),
        sound=Sound(features=c.num_mel_bins, frames=2 * c.max_source_positions),
        k_bias=False,
        positions="learned",
        max_positions=c.max_target_positions,
    )


Names = Iterator[tuple[str, str]]
"""Pairs (our parameter, their parameter) without `.weight` or `.bias`, which both have alike."""


def _llama_names(config: SequenceConfig) -> Names:
    assert config.decoder is not None
    yield "embed", "model.embed_tokens"
    yield "decoder.final_norm", "model.norm"
    for i in range(config.decoder.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        yield ours + "self_norm", theirs + "input_layernorm"
        yield ours + "ffn_norm", theirs + "post_attention_layernorm"
        for part in ("q", "k", "v", "o"):
            yield f"{ours}self_attn.{part}", f"{theirs}self_attn.{part}_proj"
        for part in ("q_norm", "k_norm") if config.qk_norm else ():
            yield f"{ours}self_attn.{part}", f"{theirs}self_attn.{part}"
        for part in ("gate", "up", "down"):
            yield f"{ours}ffn.{part}", f"{theirs}mlp.{part}_proj"


def _t5_names(config: SequenceConfig) -> Names:
    assert config.encoder is not None and config.decoder is not None
    feed = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if config.gated else {"up": "wi", "down": "wo"}
    yield "embed", "shared"
    for stack, layers in (("encoder", config.encoder.layers), ("decoder", config.decoder.layers)):
        yield f"{stack}.relative", f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        yield f"{stack}.final_norm", f"{stack}.final_layer_norm"
        attentions = [("self", 0, "SelfAttention")] + ([("cross", 1, "EncDecAttention")] if stack == "decoder" else [])
        for i in range(layers):
            ours, theirs = f"{stack}.layers.{i}.", f"{stack}.block.{i}.layer."
            for kind, at, name in attentions:
                yield f"{ours}{kind}_norm", f"{theirs}{at}.layer_norm"
                for part in ("q", "k", "v", "o"):
                    yield f"{ours}{kind}_attn.{part}", f"{theirs}{at}.{name}.{part}"
            last = f"{theirs}{len(attentions)}."
            yield ours + "ffn_norm", last + "layer_norm"
            for part, name in feed.items():
                yield f"{ours}ffn.{part}", f"{last}DenseReluDense.{name}"


def _bart_names(config: SequenceConfig) -> Names:
    """BART, Marian and Whisper, which call things alike."""
    assert config.encoder is not None and config.decoder is not None
    yield "embed", "model.decoder.embed_tokens"
    if config.sound:
        yield "sound.first", "model.encoder.conv1"
        yield "sound.second", "model.encoder.conv2"
    for stack, layers in (("encoder", config.encoder.layers), ("decoder", config.decoder.layers)):
        if config.positions == "learned":
            yield f"{stack}.position", f"model.{stack}.embed_positions"
        if config.embed_norm:
            yield f"{stack}.embed_norm", f"model.{stack}.layernorm_embedding"
        if config.final_norm:
            yield f"{stack}.final_norm", f"model.{stack}.layer_norm"
        attentions = [("self", "self_attn")] + ([("cross", "encoder_attn")] if stack == "decoder" else [])
        for i in range(layers):
            ours, theirs = f"{stack}.layers.{i}.", f"model.{stack}.layers.{i}."
            for kind, name in attentions:
                yield f"{ours}{kind}_norm", f"{theirs}{name}_layer_norm"
                for part in ("q", "k", "v"):
                    yield f"{ours}{kind}_attn.{part}", f"{theirs}{name}.{part}_proj"
                yield f"{ours}{kind}_attn.o", f"{theirs}{name}.out_proj"
            yield ours + "ffn_norm", theirs + "final_layer_norm"
            yield ours + "ffn.up", theirs + "fc1"
            yield ours + "ffn.down", theirs + "fc2"


@dataclass(frozen=True)
class Family:
    """`config` reads their configuration; `names` pairs our parameters with theirs (see `Names`)."""

    config: Callable[[Any], SequenceConfig]
    names: Callable[[SequenceConfig], Names]


FAMILIES = {
    "LlamaForCausalLM": Family(_llama, _llama_names),
    "MistralForCausalLM": Family(_llama, _llama_names),
    "Qwen2ForCausalLM": Family(_llama, _llama_names),
    "Qwen3ForCausalLM": Family(_llama, _llama_names),
    "T5ForConditionalGeneration": Family(_t5, _t5_names),
    "MT5ForConditionalGeneration": Family(_t5, _t5_names),
    "BartForConditionalGeneration": Family(_bart, _bart_names),
    "MarianMTModel": Family(_marian, _bart_names),
    "WhisperForConditionalGeneration": Family(_whisper, _bart_names),
}
"""Their class → how it is read."""
