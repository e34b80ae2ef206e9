"""Hugging Face folders and ids, through transformers where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError, MissingTool
from edgesdk.lower.quiet import silent
from edgesdk.model import Method, ModelSpec
from edgesdk.model_help import MODEL_HELP
from edgesdk.sequence.hub import TOKENS, checkpoint_of, spec_of
from edgesdk.sequence.hub_families import FAMILIES
from edgesdk.sequence.sizes import Sizes

if TYPE_CHECKING:
    import torch


def load_hugging_face(ref: str, sizes: Sizes) -> ModelSpec:
    """A model in a local folder, or of an id through the hub's cache or network.

    Those of `FAMILIES` become the programs of a sequence model (see `sequence.hub.spec_of`), all others one static `forward`: text models take
    input_ids int64 [1, 64] (encoder-decoders decoder_input_ids [1, 64] as well), or the lengths asked for, and give logits or hidden states;
    models of images pixel_values float32 [1, channels, height, width], of sound input_values float32 [1, 16000].
    Raises `InputError` (not complete, offline, not known) or `MissingTool`.
    """
    config, inner, left = load_model_of(ref)
    if type(inner).__name__ in FAMILIES:
        return spec_of(Path(ref).name, checkpoint_of(ref, config, inner, left), sizes)
    for refuse in (sizes.refuse_draft, sizes.refuse_cache_bits):
        refuse(f"{ref} is not a sequence model of {', '.join(FAMILIES)}", "leave it out")
    return _spec(ref, config, inner, _inputs(config, inner, sizes))


def load_model_of(ref: str) -> tuple[Any, Any, list[str]]:
    """(configuration of transformers, its model in eval mode, float32, names of weights that it has no use for) of a folder or an id.

    Raises `InputError` or `MissingTool`.
    """
    local = Path(ref).is_dir()
    if local and not (Path(ref) / "config.json").exists():
        raise InputError(f"{ref}: has no config.json", "give a folder that save_pretrained wrote")
    if importlib.util.find_spec("transformers") is None:
        raise MissingTool(
            f"--model {ref}: transformers is not installed", "pip install 'edgesdk[hub]'; or give another form: " + MODEL_HELP
        )
    return _load(ref, local)


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Short waits for the hub, and no progress bars or warnings of transformers on the user's terminal."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    import transformers.utils.logging as told

    was, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity(told.CRITICAL)
    told.disable_progress_bar()
    try:
        with silent():  # what transformers imports says its own on stderr
            yield
    finally:
        told.set_verbosity(was)
        if bars:
            told.enable_progress_bar()


def _load(ref: str, local: bool) -> tuple[Any, Any, list[str]]:
    """See `load_model_of`. Code that comes with a model is never run."""
    import torch

    with _quiet_hub():
        import transformers

        options = {"trust_remote_code": False, "local_files_only": local}
        try:
            config = transformers.AutoConfig.from_pretrained(ref, **options)
            kind = getattr(transformers, (config.architectures or [""])[0] or "AutoModel", transformers.AutoModel)
            options = options_of(kind, options) | {"dtype": torch.float32, "attn_implementation": "eager"}
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what is wrong is said below
            model, told = kind.from_pretrained(ref, config=config, **options)
        except Exception as error:
            hint = "the folder is not complete, or transformers does not know the model"
            if not local:
                hint = "no network, or no such model: download it where there is a network, then give its folder"
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(f"--model {ref}: {reason[:200]}", hint) from None
    for name, given, wanted in sorted(told["mismatched_keys"]):
        raise InputError(
            f"--model {ref}: {name} is {list(given)}, wanted {list(wanted)}", "its config.json and its weights are of two models"
        )
    if missing := sorted(told["missing_keys"]):  # transformers would leave them random
        raise InputError(
            f"--model {ref}: its weights lack {missing[0]} ({len(missing)} in all)", "the checkpoint is not complete: get it again"
        )
    return config, model.eval().requires_grad_(False), sorted(told["unexpected_keys"])


def options_of(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Only the Auto classes take `trust_remote_code`."""
    return options if kind.__name__.startswith("Auto") else {k: v for k, v in options.items() if k != "trust_remote_code"}


def _inputs(config: Any, model: Any, sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Example inputs by the model's main input. Raises `InputError` for a kind of input that is not taken."""
    import torch

    seed, main = torch.Generator().manual_seed(0), getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        text = config.get_text_config()
        longest = int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or TOKENS)
        lengths = [n[-1] if n else min(TOKENS, longest) for n in (sizes.inputs, sizes.outputs)]
        if max(lengths) > longest:
            raise InputError(f"{max(lengths)} tokens: the model has positions for {longest}", "ask for a shorter input and output")
        ids = torch.randint(0, int(text.vocab_size), (1, max(lengths)), generator=seed)
        source, target = (ids[:, :n].clone() for n in lengths)
        return (source, target) if config.is_encoder_decoder else (source,)
    sizes.refuse_inputs(f"a model of {main} takes no text", "leave it out")
    if main == "pixel_values":
        size = getattr(config, "image_size", 224) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return (torch.randn(1, int(getattr(config, "num_channels", 3)), height, width, generator=seed),)
    if main == "input_values":
        return (torch.randn(1, 16000, generator=seed),)
    raise InputError(f"a model of '{main}' is not taken from Hugging Face", "wrap it in a function of your own: file.py:function")


def _spec(ref: str, config: Any, inner: Any, inputs: tuple[torch.Tensor, ...]) -> ModelSpec:
    import dataclasses

    import torch

    from edgesdk.intake import _digest, checked

    names = [inner.main_input_name, "decoder_input_ids"][: len(inputs)]
    fixed = {"return_dict": False} | ({"use_cache": False} if hasattr(config, "use_cache") else {})

    class Plain(torch.nn.Module):
        """Positional tensors in, the first output out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def forward(self, *values: torch.Tensor) -> Any:
            return self.model(**dict(zip(names, values, strict=True)), **fixed)[0]

    module = Plain().eval()
    about = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    spec = checked(ModelSpec(name=Path(ref).name, digest="", methods={"forward": Method(module, inputs)}), f"--model {ref}")
    return dataclasses.replace(spec, digest=_digest(module, repr(sorted(about.items())).encode(), inputs))
