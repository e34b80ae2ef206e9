"""Tokenizers without a package, text that comes token by token, and stop strings."""

from __future__ import annotations

import random

import pytest
from sequence_toy import Toy

from edgesdk.sequence.card import SequenceError
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.generate import generate, stream
from edgesdk.sequence.tokens import Text, tokenizer_of

BYTES = {"kind": "bytes", "first": 3, "after": [1]}
SAYINGS = ["Grüße aus Köln, 12 €", "naïve café – 日本語 ok", "🙂🚲 mixed with text", "plain words only", "  two  spaces", "a\tb\nc"]


def tokenizer(fields, content=b""):
    return tokenizer_of(Toy(tokenizer=fields).card, lambda name: content)


def test_characters():
    t = tokenizer({"kind": "characters", "alphabet": "abc ", "first": 3, "lower": True, "after": [2]})
    assert t.encode(" Ab C ") == [3, 4, 6, 5, 2] and t.decode([5, 6, 3, 2, 0, 1]) == "c a"
    with pytest.raises(SequenceError, match="'x', which the model does not know"):
        t.encode("abx")
    with pytest.raises(SequenceError, match="empty"):
        t.encode("  ")


def test_bytes_and_numbers():
    t = tokenizer(BYTES)
    for text in SAYINGS:
        assert t.decode(t.encode(text)) == text, "the end token writes nothing"
    n = tokenizer({"kind": "none"})
    assert n.encode("12, 5 7") == [12, 5, 7] and n.decode([12, 5, 7]) == "12 5 7"
    with pytest.raises(SequenceError, match="no tokenizer"):
        n.encode("hello")


@pytest.mark.parametrize("wrong", [{"kind": "magic"}, {"kind": "characters"}, {"alphabet": "ab"}])
def test_an_unknown_tokenizer_is_refused(wrong):
    with pytest.raises(SequenceError, match="tokenizer"):
        tokenizer(wrong)


def hugging_face(kind):
    """A small trained tokenizer of the given family, as its JSON."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    words = [" ".join(random.Random(i).choices(["the", "cat", "sat", "on", "mats", *SAYINGS], k=9)) for i in range(60)]
    if kind == "byte level":
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        t.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    elif kind == "metaspace":
        t = Tokenizer(models.Unigram())
        t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        t.train_from_iterator(words, trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>"))
        t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", t.token_to_id("</s>"))])
    elif kind == "byte fallback":
        vocab = {f"<0x{b:02X}>": b for b in range(256)}
        vocab |= {c: 256 + i for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
        t = Tokenizer(models.BPE(vocab, [], byte_fallback=True, fuse_unk=True))
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        t.decoder = decoders.Sequence(steps)
    else:
        t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "the", "cat", "sat", "on", "mats"])}, "[UNK]"))
        t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.add_tokens([AddedToken("<extra>", special=False)])
    t.add_special_tokens([AddedToken("<|end|>", special=True)])
    return t


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "byte fallback", "words"])
def test_a_hugging_face_tokenizer_writes_what_its_package_writes(kind):
    pytest.importorskip("tokenizers")
    theirs = hugging_face(kind)
    ours = tokenizer({"kind": "hugging-face", "file": "tokenizer.json"}, theirs.to_str().encode())
    end = theirs.token_to_id("<|end|>")
    for text in ["the cat sat on mats"] if kind == "words" else SAYINGS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids and ids
        assert ours.decode([*ids, end]) == theirs.decode([*ids, end])
    rng = random.Random(3)
    for _ in range(0 if kind == "byte fallback" else 40):  # the package shows a whole run of bytes as broken where one is
        ids = [i for i in rng.choices(range(theirs.get_vocab_size()), k=12) if theirs.id_to_token(i) != "<extra>"]
        assert ours.decode(ids).replace("�", "") == theirs.decode(ids).replace("�", "")


def test_an_unknown_decoder_is_refused():
    pytest.importorskip("tokenizers")
    from tokenizers import decoders

    theirs = hugging_face("words")
    theirs.decoder = decoders.WordPiece()
    with pytest.raises(SequenceError, match="a decoder of WordPiece"):
        tokenizer({"kind": "hugging-face"}, theirs.to_str().encode())


def test_streamed_text_is_whole_characters_and_is_the_final_text():
    t = tokenizer(BYTES)
    for text in SAYINGS:
        shown = Text(t)
        pieces = [shown.add(token) for token in t.encode(text)]
        assert "".join([*pieces, shown.end()]) == text == shown.whole
        assert not any("�" in p for p in pieces)
    cut = Text(t)
    assert "".join(cut.add(i) for i in t.encode("aé")[:2]) + cut.end() == "a", "half a character is not shown"


def test_stop_strings_across_tokens():
    t = tokenizer(BYTES)

    def shown(text, *stops):
        growing, pieces = Text(t, stops), []
        for token in t.encode(text):
            pieces.append(growing.add(token))
            if growing.stopped:
                break
        return pieces, growing

    pieces, growing = shown("one\n\ntwo", "\n\n")
    assert growing.stopped and growing.whole == "one" == "".join(pieces)
    pieces, growing = shown("one\ntwo", "\n\n")
    assert not growing.stopped and "".join(pieces) == "one\ntwo", "what only began like it is shown once that is known"
    assert pieces[3] == "" and pieces[4] == "\nt"
    assert shown("abab!", "abb", "ba")[1].whole == "a"
    assert shown("aaab", "aab")[1].whole == "a", "a stop string that overlaps its own beginning"
    pieces, growing = shown("ends on", "onward")
    assert "".join(pieces) == "ends " and growing.end() == "on" and growing.whole == "ends on"
    assert shown("Grüße", "ße")[1].whole == "Grü"


def test_text_of_a_generation():
    """Streamed pieces make the final text, with stop strings and stop tokens, also in a beam search."""
    toy = Toy(vocab=30, eos=(), seed=11, tokenizer={"kind": "characters", "alphabet": "abcdefghijklmnopqrstuvwxyz ", "first": 3})
    t = tokenizer_of(toy.card, lambda name: b"")
    (whole,) = generate(toy.run, toy.card, ["hello"], Settings(max_tokens=20), t)
    assert len(whole.text) >= 15 and whole.text == t.decode(whole.tokens)
    stop = whole.text[6:9]
    at = whole.text.index(stop)
    events = list(stream(toy.run, toy.card, ["hello"], Settings(max_tokens=20, stop=(stop, "~")), t))
    result = events[-1]["result"]
    assert result["stopped"] == "stop" and result["text"] == whole.text[:at] == "".join(e["text"] for e in events)
    (result,) = generate(toy.run, toy.card, ["hello"], Settings(max_tokens=20, stop_tokens=(whole.tokens[6],)), t)
    assert result.stopped == "stop" and result.tokens == whole.tokens[: whole.tokens.index(whole.tokens[6])]
    (beams,) = generate(toy.run, toy.card, ["hello"], Settings(max_tokens=20, beams=3, best=3, stop=tuple("aeiou ")), t)
    assert beams.text == beams.alternatives[0]["text"] and not set(beams.text) & set("aeiou ")
    assert beams.alternatives[0]["score"] >= beams.alternatives[-1]["score"]
