"""A checkpoint's tokenizer as one `tokenizer.json`, which the small `tokenizers` package reads wherever the bundle runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgesdk.errors import InputError

FILE = "tokenizer.json"
SOURCES = (FILE, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "vocab.json", "vocab.txt", "tekken.json")
"""Files from which transformers makes a tokenizer."""
UNLIKELY = -1e4
"""Score of a piece that only the target language has: taken where nothing else covers the text, as transformers does."""


def tokenizer_files(ref: str, family: str, local: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(what `sequence.json` says about the tokenizer, files for the bundle); ({"kind": "none"}, {}) where the checkpoint has none.

    Raises `InputError` where it has one that cannot be had as `tokenizer.json`.
    """
    from transformers.utils.hub import cached_file

    soft = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False, "local_files_only": local}
    found = {name: path for name in SOURCES if (path := cached_file(ref, name, **soft))}
    if not found:
        return {"kind": "none"}, {}
    try:
        if family == "marian" and FILE not in found:
            text = _marian(found)
        else:
            text = _fast(ref, local)
    except InputError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise _not_had(ref, found, reason[:200]) from None
    return {"kind": "hugging-face", "file": FILE}, {FILE: text.encode()}


def _not_had(ref: str, found: dict[str, str], reason: str) -> InputError:
    names = ", ".join(found)
    hint = "write tokenizer.json with transformers (AutoTokenizer…save_pretrained) into the folder, or move its tokenizer files away: the bundle then takes token ids"
    return InputError(f"--model {ref}: no tokenizer.json can be made of {names} ({reason})", hint)


def _fast(ref: str, local: bool) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ref, trust_remote_code=False, local_files_only=local)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ValueError(f"{type(tokenizer).__name__} has no fast form")
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


def _marian(found: dict[str, str]) -> str:
    """Marian's two SentencePiece models with their one vocabulary: pieces keep the source model's scores and the vocabulary's numbers.

    Raises `ValueError` for two vocabularies or a model that is not unigram.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if "source.spm" not in found or "vocab.json" not in found:
        raise ValueError("source.spm and vocab.json are needed")
    settings = Path(found["source.spm"]).with_name("tokenizer_config.json")
    if settings.exists() and json.loads(settings.read_text()).get("separate_vocabs"):
        raise ValueError("separate_vocabs: two vocabularies")
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(Path(found["source.spm"]).read_bytes())
    if proto.trainer_spec.model_type != 1:
        raise ValueError("source.spm is not a unigram model")
    numbers: dict[str, int] = json.loads(Path(found["vocab.json"]).read_text())
    scores = {p.piece: p.score for p in proto.pieces if p.type in (1, 4)}  # normal and user-defined ones
    pieces = [(f"<unused {i}>", UNLIKELY) for i in range(max(numbers.values()) + 1)]
    for piece, number in numbers.items():
        pieces[number] = (piece, scores.get(piece, UNLIKELY))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=numbers["<unk>"], byte_fallback=False))
    steps = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = [AddedToken(t, special=True, normalized=False) for t in numbers if t in ("</s>", "<unk>", "<pad>") or t.startswith(">>")]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", numbers["</s>"])])
    return str(tokenizer.to_str())
