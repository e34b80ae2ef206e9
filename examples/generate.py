"""Greedy generation over any `run(method, numpy inputs) -> numpy outputs`: the module, its compressed twin, or the built program.

Standard library and numpy only, so that a bundle and its `tokenizer.json` are enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesdk.errors import InputError

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

Run = Callable[[str, Sequence[Any]], list[Any]]
TOKENIZER = "tokenizer.json"
"""The member of a bundle (and the key of `ModelSpec.files`) that holds the tokenizer."""


def tokenizer_of(source: ModelSpec | Mapping[str, Any] | bytes) -> Mapping[str, Any]:
    """The tokenizer of a spec, of the bytes of its JSON, or as it is. Raises `InputError` when there is none."""
    if isinstance(source, Mapping):
        found = source
    else:
        content = source if isinstance(source, bytes) else source.files.get(TOKENIZER)
        if content is None:
            raise InputError(
                "this model has no tokenizer.json, so it takes no text", "give a model made for text, such as example:normalizer"
            )
        try:
            found = json.loads(content)
        except ValueError as error:
            raise InputError(f"{TOKENIZER}: not JSON ({error})", "build the bundle again") from None
    wanted = {"alphabet", "pad", "bos", "eos", "encoder", "max_input", "max_output"}
    if not isinstance(found, Mapping) or found.get("kind") != "characters" or not wanted <= set(found):
        raise InputError(f"{TOKENIZER}: not a tokenizer of kind 'characters'", f"it needs {', '.join(sorted(wanted))}")
    return found


def encode_text(tokenizer: Mapping[str, Any], text: str) -> list[int]:
    """Character ids, EOS, then padding up to `max_input`. Raises `InputError` on a character or a length the model does not take."""
    alphabet, length, text = tokenizer["alphabet"], int(tokenizer["max_input"]), text.strip().lower()
    if not text:
        raise InputError("the text is empty", "give something to write in normal form, such as 'quarter past four pm'")
    if unknown := sorted(set(text) - set(alphabet)):
        raise InputError(f"the text has {unknown[0]!r}, which the model does not know", f"it knows {alphabet.strip()!r} and the space")
    if len(text) >= length:
        raise InputError(f"the text has {len(text)} characters", f"the model takes {length - 1} at most")
    return [alphabet.index(c) + 3 for c in text] + [tokenizer["eos"]] + [tokenizer["pad"]] * (length - 1 - len(text))


def generate(run: Run, source: ModelSpec | Mapping[str, Any] | bytes, text: str) -> str:
    """The greedy answer to `text`; one `decode` a character. Raises `InputError` on a text the model does not take."""
    tokenizer = tokenizer_of(source)
    src = np.asarray([encode_text(tokenizer, text)], np.int64)
    longest, encoder = int(tokenizer["max_output"]), bool(tokenizer["encoder"])
    if encoder:
        rest = list(run("encode", [src]))
        logits, self_k, self_v = run("prefill", rest)
        first = 0
    else:
        logits, self_k, self_v, mask = run("prefill", [src])
        rest, first = [mask], src.shape[1]  # the caches hold the source, too
    ids: list[int] = []
    for t in range(1, longest + 1):
        ids.append(int(np.argmax(logits)))
        if ids[-1] == tokenizer["eos"] or t == longest:
            break
        inputs = [np.asarray([ids[-1]], np.int64), np.asarray([first + t], np.int64), self_k, self_v, *rest]
        logits, self_k, self_v = run("decode", inputs)
    return "".join(tokenizer["alphabet"][i - 3] for i in ids if i >= 3)
