"""Hugging Face checkpoints as models of this family: configuration, weights, special tokens and tokenizer.

`FAMILIES` (in `hub_families`) says which; everything else about a checkpoint is read, mapped or refused by name here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError, select_by_name
from edgesdk.sequence.config import SequenceConfig
from edgesdk.sequence.hub_families import FAMILIES, Family, refuse
from edgesdk.sequence.sizes import Sizes

if TYPE_CHECKING:
    from torch import Tensor

    from edgesdk.model import ModelSpec
    from edgesdk.sequence.model import SequenceModel


TOKENS = 64
"""Length of source or prompt and of an answer, where none is asked for."""
TYPICAL = 16
"""Tokens of a usual answer."""


@dataclass(frozen=True)
class Specials:
    """Tokens with a meaning: `start` begins every answer, `eos` ends it, `suppress` never and `suppress_first` not at first are chosen."""

    start: tuple[int, ...]
    eos: tuple[int, ...]
    pad: int
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, loaded: `tokenizer` is what `sequence.json` says about it, `files` go into the bundle."""

    model: SequenceModel
    config: SequenceConfig
    specials: Specials
    tokenizer: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


def load_checkpoint(ref: str) -> Checkpoint:
    """The checkpoint in a local folder, or of an id through the hub's cache or network.

    Raises `InputError` for a folder that is not complete and for settings that are not taken, `UnknownName` for another kind of model.
    """
    from edgesdk.intake_hub import load_model_of

    config, theirs, left = load_model_of(ref)
    select_by_name("kind of sequence model", type(theirs).__name__, FAMILIES)
    return checkpoint_of(ref, config, theirs, left)


def checkpoint_of(ref: str, config: Any, theirs: Any, left: Sequence[str] = ()) -> Checkpoint:
    """`theirs`, a model of transformers of one of `FAMILIES`, as this family's. The weights are shared, not copied.

    `left`: names of weights in the checkpoint that `theirs` has no use for. Raises `InputError` where there is one that counts.
    """
    from pathlib import Path

    from edgesdk.sequence.hub_tokenizer import tokenizer_files

    if lost := [name for name in left if name.endswith((".weight", ".bias"))]:
        raise InputError(f"--model {ref}: config.json has no place for {lost[0]} ({len(lost)} in all)", "the two are not of one model")
    model, ours = convert(config, theirs)
    tokenizer, files = tokenizer_files(ref, config.model_type, Path(ref).is_dir())
    return Checkpoint(model, ours, specials_of(config, theirs.generation_config), tokenizer, files)


def spec_of(name: str, checkpoint: Checkpoint, sizes: Sizes | None = None, **more: Any) -> ModelSpec:
    """The programs of a checkpoint; by default, `TOKENS` for the source or prompt and for the answer.

    Behind sound an input's length counts the encoder's positions, two frames each; all that the model hears by default. `more` goes to
    `export.sequence_spec`: `batch`, `prompts`. Raises `InputError` for lengths that the model has no positions for.
    """
    from edgesdk.sequence.export import sequence_spec

    specials, sizes = checkpoint.specials, sizes or Sizes()
    sources, outputs, caches = _lengths(name, checkpoint.config, len(specials.start), sizes)
    typical = sizes.outputs[len(sizes.outputs) // 2] if sizes.outputs else min(outputs[-1], TYPICAL)
    return sequence_spec(
        checkpoint.model, name=name, tokenizer=checkpoint.tokenizer, start=specials.start, eos=specials.eos, pad=specials.pad,
        suppress=specials.suppress, suppress_first=specials.suppress_first, max_output=outputs[-1], files=checkpoint.files,
        source_lengths=sources, cache_lengths=caches, several=(sizes.draft,) if sizes.draft else (), cache_bits=sizes.cache_bits,
        **{"typical_output": typical, **more},
    )  # fmt: skip


def _lengths(name: str, config: SequenceConfig, started: int, asked: Sizes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Tokens of sources or prompts and of answers, and slots of the caches for both or the latter, each rising. Raises `InputError`."""
    bound = config.max_positions if config.positions != "relative" else 1 << 30
    before: tuple[int, ...]
    if config.encoder:
        heard = config.sound.frames // 2 if config.sound else bound
        sources = asked.inputs or (heard if config.sound else min(TOKENS, heard),)
        before, room = (started,), bound - 1  # behind a full cache there is a token more
    else:
        heard, sources = bound, asked.inputs or (min(TOKENS, bound // 2),)
        before, room = sources, bound
    outputs = asked.outputs or (min(TOKENS, room - before[-1]),)
    if sources[-1] > heard or outputs[-1] < 1 or before[-1] + outputs[-1] > room:
        raise InputError(
            f"{name}: {sources[-1]} tokens in and {outputs[-1]} out want more positions than the model's {bound}",
            "ask for less: --input-length, --output-length",
        )
    # each input with the longest answer, the longest input with each answer: what lies between takes the next larger one
    return sources, outputs, tuple(sorted({b + outputs[-1] for b in before} | {before[-1] + n for n in outputs}))


def convert(config: Any, theirs: Any) -> tuple[SequenceModel, SequenceConfig]:
    """A model of transformers as this family's: (model in eval mode with the same weights, its configuration). Raises `InputError`."""
    import torch

    from edgesdk.sequence.model import SequenceModel

    family = FAMILIES[type(theirs).__name__]
    if method := getattr(config, "quantization_config", None):
        raise refuse("quantization_config", getattr(method, "quant_method", "given"), "give the checkpoint before it was compressed")
    ours = family.config(config)
    weights = weights_of(ours, family, theirs)
    ours = ours.model_copy(update={"tied": "head.weight" not in weights, "head_bias": bool({"head_bias", "head.bias"} & set(weights))})
    with torch.device("meta"):  # random weights would be thrown away
        model = SequenceModel(ours)
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in weights:
            raise InputError(f"the checkpoint has no {name}", "it is not a whole model of the kind that its config.json names")
        if weights[name].shape != value.shape:
            shapes = f"{list(weights[name].shape)}, wanted {list(value.shape)}"
            raise InputError(f"the checkpoint's {name} is {shapes}", "config.json and the weights are not of one model")
    if extra := sorted(set(weights) - set(wanted)):
        raise InputError(f"the checkpoint has {extra[0]}, which its config.json does not name", "the two are not of one model")
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False), ours


def weights_of(ours: SequenceConfig, family: Family, theirs: Any) -> dict[str, Tensor]:
    """Our names → their tensors. A head that is the embedding is left out; a bias of zeros beside it, too.

    Raises `InputError` for a weight that has no place here, so that nothing is dropped unseen.
    """
    given = theirs.state_dict()
    target = theirs.get_output_embeddings().weight
    weights: dict[str, Tensor] = {}
    used = _sines(given) if ours.positions == "sinusoidal" else set()
    for our, their in family.names(ours):
        for end in (".weight", ".bias"):
            if their + end in given:
                weights[our + end] = given[their + end]
                used.add(their + end)
    embed = weights["embed.weight"]
    for name, value in given.items():
        if value.data_ptr() == embed.data_ptr() and value.shape == embed.shape:
            used.add(name)
    if target.data_ptr() != embed.data_ptr():
        weights["head.weight"] = target.detach()
        used |= {name for name, value in given.items() if value.data_ptr() == target.data_ptr()}
    bias = given.get("final_logits_bias")
    if bias is not None:
        used.add("final_logits_bias")
        if bool(bias.any()):
            weights["head.bias" if "head.weight" in weights else "head_bias"] = bias.reshape(-1)
    left = sorted(set(given) - used)
    if any(name.endswith("embed_tokens.weight") for name in left):
        raise refuse("embeddings", "of encoder and decoder apart", "one embedding for both sides is")
    if left:
        raise refuse("the weight", left[0], "weights are those of the families that docs/sequence-models.md lists")
    return weights


def _sines(given: dict[str, Tensor]) -> set[str]:
    """Tables of sinusoidal positions, which are computed here. Raises `InputError` for one that holds something else."""
    import torch

    from edgesdk.sequence.positions import sinusoids

    tables = {name: value for name, value in given.items() if name.endswith(".embed_positions.weight")}
    for name, value in tables.items():
        if not torch.allclose(value, sinusoids(torch.arange(len(value)), value.shape[1]), atol=1e-3):
            raise refuse(name, "not sinusoidal", "a Marian model's table of sines and cosines is")
    return set(tables)


def _ids(*values: Any) -> tuple[int, ...]:
    """Numbers, lists of numbers and None as one tuple without repetition."""
    flat: list[int] = []
    for value in values:
        flat += [int(v) for v in value] if isinstance(value, Sequence) else [] if value is None else [int(value)]
    return tuple(dict.fromkeys(flat))


def specials_of(config: Any, generation: Any) -> Specials:
    """From the generation configuration of transformers, which it takes from config.json where a checkpoint has none."""

    def have(name: str) -> Any:
        return getattr(generation, name, None)

    eos = _ids(have("eos_token_id"))
    pad = have("pad_token_id")
    start: tuple[int, ...] = ()
    if config.is_encoder_decoder:
        first = have("decoder_start_token_id")
        first = have("bos_token_id") if first is None else first
        if first is None:
            raise InputError("config.json: no decoder_start_token_id", "name the token that an answer begins with")
        start = (int(first), *_forced(config.model_type, have))
    never = [ids[0] for ids in have("bad_words_ids") or () if len(ids) == 1]
    return Specials(
        start=start,
        eos=eos,
        pad=int(pad) if pad is not None else (eos[0] if eos else 0),
        suppress=_ids([t for t in have("suppress_tokens") or () if t >= 0], never),
        suppress_first=_ids([t for t in have("begin_suppress_tokens") or () if t >= 0]),
    )


def _forced(family: str, have: Callable[[str], Any]) -> tuple[int, ...]:
    """Tokens that an answer must begin with, behind the first.

    Whisper: the language (English where a checkpoint knows several), to write down what is said, without time stamps.
    """
    if family != "whisper":
        return _ids(have("forced_bos_token_id"))
    forced = dict(have("forced_decoder_ids") or ())
    if languages := have("lang_to_id"):
        forced[1] = forced.get(1) or languages.get("<|en|>", next(iter(languages.values())))
        forced[2] = forced.get(2) or (have("task_to_id") or {}).get("transcribe")
    tokens = _ids(*(forced[at] for at in sorted(forced)))
    return _ids(tokens, have("no_timestamps_token_id"))
