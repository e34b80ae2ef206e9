"""Text to token ids and back, and text that comes token by token. Standard library only; `encode` of a Hugging Face tokenizer wants its package.

`tokenizer` of a card says which: {"kind": …, "before": [ids], "after": [ids], "lower": bool} and, by kind,

    characters    "alphabet": str, "first": id of its first character (3)
    bytes         "first": id of byte 0 (3)
    hugging-face  "file": the bundle's member that holds its tokenizer.json
    none          ids in and out, as numbers with spaces between
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .card import Card, SequenceError


class Tokenizer:
    """`encode(text)` gives ids; `piece(id)` the bytes that a token writes. This one takes and writes no text."""

    strip_first = False  # the first piece's space is no part of the text

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.before, self.after = ([int(t) for t in fields.get(k, ())] for k in ("before", "after"))
        self.lower = bool(fields.get("lower", False))

    def encode(self, text: str) -> list[int]:
        """Raises `SequenceError` on text that the model does not take."""
        if not text.strip():
            raise SequenceError("the prompt is empty", "give some text")
        return [*self.before, *self._ids(text.strip().lower() if self.lower else text), *self.after]

    def _ids(self, text: str) -> list[int]:
        raise SequenceError("there is no tokenizer for this text", "give token ids")

    def piece(self, token: int) -> bytes:
        return b""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer; a cut-off character at its end is left out."""
        text = Text(self)
        for token in tokens:
            text.add(int(token))
        text.end()
        return text.whole


class Characters(Tokenizer):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.alphabet, self.first = str(fields["alphabet"]), int(fields.get("first", 3))
        self._id = {c: i + self.first for i, c in enumerate(self.alphabet)}

    def _ids(self, text: str) -> list[int]:
        if unknown := next((c for c in text if c not in self._id), None):
            raise SequenceError(f"the prompt has {unknown!r}, which the model does not know", f"it knows {self.alphabet!r}")
        return [self._id[c] for c in text]

    def piece(self, token: int) -> bytes:
        at = token - self.first
        return self.alphabet[at].encode() if 0 <= at < len(self.alphabet) else b""


class Bytes(Tokenizer):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.first = int(fields.get("first", 3))

    def _ids(self, text: str) -> list[int]:
        return [b + self.first for b in text.encode()]

    def piece(self, token: int) -> bytes:
        return bytes([token - self.first]) if 0 <= token - self.first < 256 else b""


class Numbers(Tokenizer):
    """Ids as they are."""

    strip_first = True

    def _ids(self, text: str) -> list[int]:
        try:
            return [int(t) for t in text.replace(",", " ").split()]
        except ValueError:
            raise SequenceError("this bundle has no tokenizer", "give token ids: --prompt '12 5 7'") from None

    def piece(self, token: int) -> bytes:
        return b" %d" % token


class HuggingFace(Tokenizer):
    """A `tokenizer.json`. Its pieces are read from the file, so that a device without the package can write text."""

    def __init__(self, fields: Mapping[str, Any], content: bytes) -> None:
        super().__init__(fields)
        self._content = content
        self._package: Any = None
        data = json.loads(content)
        vocab = data["model"]["vocab"]
        names = dict(enumerate(v[0] for v in vocab)) if isinstance(vocab, list) else {i: t for t, i in vocab.items()}
        self._piece, self.strip_first = _pieces(data.get("decoder"))
        self._names: dict[int, str] = names
        self._added = {t["id"]: b"" if t.get("special") else t["content"].encode() for t in data.get("added_tokens", ())}

    def _ids(self, text: str) -> list[int]:
        if self._package is None:
            try:
                import tokenizers
            except ImportError:
                raise SequenceError("the package 'tokenizers' is not installed here", "pip install tokenizers, or give token ids") from None
            self._package = tokenizers.Tokenizer.from_str(self._content.decode())
            self._package.no_truncation()
            self._package.no_padding()
        return [int(i) for i in self._package.encode(text).ids]

    def piece(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        name = self._names.get(token)
        return b"" if name is None else self._piece(name)


def _pieces(decoder: Any) -> tuple[Callable[[str], bytes], bool]:
    """How a token's name becomes bytes, and whether the text's first space falls away."""
    if decoder is None:
        return (lambda name: b" " + name.encode()), True
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {s["type"]: s for s in steps}
    if "ByteLevel" in kinds:
        table = {chr(c): b for b, c in _byte_characters().items()}
        return (lambda name: bytes(table[c] for c in name)), False
    if not set(kinds) <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        known = "ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip"
        raise SequenceError(f"tokenizer.json has a decoder of {', '.join(kinds)}", f"known: {known}; build with a tokenizer of kind none")
    mark = kinds["Metaspace"].get("replacement", "\u2581") if "Metaspace" in kinds else "\u2581"
    scheme = kinds.get("Metaspace", {}).get("prepend_scheme", "always")

    def piece(name: str) -> bytes:
        if "ByteFallback" in kinds and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace(mark, " ").encode()

    return piece, "Strip" in kinds or ("Metaspace" in kinds and scheme != "never")


def _byte_characters() -> dict[int, int]:
    """Byte → the character that stands for it in byte-level vocabularies: itself where it prints, else one from 256 on (GPT-2's table)."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printed]
    return {**{b: b for b in printed}, **{b: 256 + i for i, b in enumerate(others)}}


def tokenizer_of(card: Card, read: Callable[[str], bytes]) -> Tokenizer:
    """The card's tokenizer; `read(name)` gives a member of its bundle. Raises `SequenceError`."""
    fields, kind = card.tokenizer, card.tokenizer.get("kind")
    try:
        if kind == "hugging-face":
            return HuggingFace(fields, read(str(fields.get("file", "tokenizer.json"))))
        kinds: dict[Any, type[Tokenizer]] = {"characters": Characters, "bytes": Bytes, "none": Numbers}
        if kind in kinds:
            return kinds[kind](fields)
    except (KeyError, TypeError) as error:
        raise SequenceError(f"the tokenizer of kind {kind!r} lacks {error}", "build the bundle again") from None
    raise SequenceError(f"unknown kind of tokenizer {kind!r}", "known: characters, bytes, hugging-face, none")


class Text:
    """Text that grows token by token. What `add` gives may be shown at once: whole characters, and nothing that a stop string may begin with.

    `whole` is the text so far; it ends before the stop string, which `stopped` tells of.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._piece, self._stops = tokenizer.piece, [s for s in stops if s]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strip_first
        self._held = ""
        self.whole, self.stopped = "", False

    def add(self, token: int) -> str:
        text = self._decoder.decode(self._piece(token))
        if self._strip and text:
            self._strip, text = False, text[1:] if text.startswith(" ") else text
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stops) if at >= 0]
        if found:
            self._held, self.stopped = self._held[: min(found)], True
            return self._give(len(self._held))
        keep = max((n for s in self._stops for n in range(1, min(len(s), len(self._held) + 1)) if self._held.endswith(s[:n])), default=0)
        return self._give(len(self._held) - keep)

    def end(self) -> str:
        """What was held back, now that no token comes."""
        return self._give(len(self._held))

    def _give(self, characters: int) -> str:
        given, self._held = self._held[:characters], self._held[characters:]
        self.whole += given
        return given
