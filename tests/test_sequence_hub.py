"""Hugging Face checkpoints as sequence models: tiny random ones of every family, held against transformers itself."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgesdk.errors import EdgeError, InputError, UnknownName
from edgesdk.graph import trace
from edgesdk.intake import load_model
from edgesdk.lower import lower
from edgesdk.lower.quiet import silent
from edgesdk.plan.fake_quant import run as run_of
from edgesdk.runner import open_program
from edgesdk.sequence.card import Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.generate import generate
from edgesdk.sequence.hub import Checkpoint, convert, load_checkpoint, spec_of
from edgesdk.sequence.positions import HIDDEN
from edgesdk.sequence.programs import Programs
from edgesdk.sequence.session import Session
from edgesdk.sequence.sizes import Sizes

transformers = pytest.importorskip("transformers")

VOCAB, FRAMES = 64, 24
GROUPED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIDES = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MARIAN = {
    "max_position_embeddings": 40,
    "pad_token_id": 63,
    "decoder_start_token_id": 63,
    "eos_token_id": 0,
    "activation_function": "swish",
}
WHISPER = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None}
SOUND = {"max_source_positions": FRAMES // 2, "max_target_positions": 32, "num_mel_bins": 8, "begin_suppress_tokens": None}
NARROW = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}

torch.set_num_threads(1)
FAMILIES = {
    "t5": ("T5", {**T5, **NARROW, "num_layers": 2, "num_decoder_layers": 1}),
    "t5-v1.1": ("T5", {**T5, "num_layers": 1, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5", {**T5, "num_layers": 1}),
    "bart": ("Bart", {**SIDES, "encoder_layers": 2, "max_position_embeddings": 40, "scale_embedding": True}),
    "marian": ("Marian", {**SIDES, **MARIAN, "scale_embedding": True}),
    "whisper": ("Whisper", {**SIDES, **WHISPER, **SOUND}),
    "llama": ("Llama", GROUPED),
    "llama-3": (
        "Llama",
        {
            **GROUPED,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama-linear": ("Llama", {**GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 6}),
    "qwen2": ("Qwen2", {**GROUPED, "num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 12, "tie_word_embeddings": True}),
}
CLASSES = {"T5": "T5ForConditionalGeneration", "Bart": "BartForConditionalGeneration", "Marian": "MarianMTModel"}
CLASSES["MT5"] = "MT5ForConditionalGeneration"
CLASSES["Whisper"] = "WhisperForConditionalGeneration"


def tiny(family: str):
    """A random model of transformers, with no weight at its usual start (norms of ones and biases of zeros would hide a mistake)."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(getattr(transformers, f"{name}Config")(**settings)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if not (name == "Marian" and "embed_positions" in key):
                value.add_(torch.randn_like(value) * 0.1)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    if name == "Bart":
        model.generation_config.forced_bos_token_id = 0
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family's model, saved."""
    root = tmp_path_factory.mktemp("hub")
    for family in FAMILIES:
        tiny(family).save_pretrained(root / family)
    return root


def relative(got, want) -> float:
    return float((got - want).abs().max() / want.std())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(folders, family, capfd):
    theirs, checkpoint = tiny(family), load_checkpoint(str(folders / family))
    assert isinstance(checkpoint, Checkpoint) and checkpoint.tokenizer == {"kind": "none"}
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 60, (2, 9), generator=draw)
    with torch.no_grad():
        if family == "whisper":
            source = torch.randn(2, 8, FRAMES, generator=draw)
            want, got = theirs(input_features=source, decoder_input_ids=tokens).logits, checkpoint.model(source, None, tokens)
        elif checkpoint.config.encoder:
            source, seen = torch.randint(3, 60, (2, 14), generator=draw), torch.ones(2, 14)
            seen[1, 9:] = 0
            want = theirs(input_ids=source, attention_mask=seen, decoder_input_ids=tokens).logits
            got = checkpoint.model(source, (1 - seen) * HIDDEN, tokens)
        else:
            want, got = theirs(input_ids=tokens).logits, checkpoint.model(None, None, tokens)
    assert relative(got, want) < 1e-5
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_special_tokens(folders):
    specials = {f: load_checkpoint(str(folders / f)).specials for f in ("t5", "bart", "marian", "whisper", "llama")}
    assert {f: s.start for f, s in specials.items()} == {"t5": (0,), "bart": (2, 0), "marian": (63,), "whisper": (3,), "llama": ()}
    assert {f: (s.eos, s.pad) for f, s in specials.items()} == {
        "t5": ((1,), 0),
        "bart": ((2,), 1),
        "marian": ((0,), 63),
        "whisper": ((2,), 1),
        "llama": ((2,), 0),
    }


def test_whisper_begins_in_english_without_time_stamps(folders, tmp_path):
    shutil.copytree(folders / "whisper", tmp_path / "w")
    path = tmp_path / "w" / "generation_config.json"
    more = {"lang_to_id": {"<|de|>": 10, "<|en|>": 11}, "task_to_id": {"transcribe": 20, "translate": 21}, "no_timestamps_token_id": 30}
    more |= {"decoder_start_token_id": 3, "eos_token_id": 2, "suppress_tokens": [5, 6], "begin_suppress_tokens": [7, 2]}
    path.write_text(json.dumps(more))
    specials = load_checkpoint(str(tmp_path / "w")).specials
    assert specials.start == (3, 11, 20, 30) and specials.suppress == (5, 6) and specials.suppress_first == (7, 2)
    path.write_text(json.dumps({**more, "forced_decoder_ids": [[1, 10], [2, 21]]}))
    assert load_checkpoint(str(tmp_path / "w")).specials.start == (3, 10, 21, 30)


def changed(folder: Path, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut(folder: Path, size: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
BAD = {
    "no weights": ("llama", lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "header cut": ("llama", lambda f: cut(f, 3000), "header"),
    "weights cut": ("llama", lambda f: cut(f, -3000), "not fully covered"),
    "another width": ("llama", lambda f: changed(f, intermediate_size=56), "down_proj.weight is [32, 48], wanted [32, 56]"),
    "a layer more": ("llama", lambda f: changed(f, num_hidden_layers=2), "its weights lack model.layers.1."),
    "a layer less": ("llama-3", lambda f: changed(f, num_hidden_layers=1), "no place for model.layers.1."),
    "yarn": ("llama", lambda f: changed(f, rope_parameters=YARN), "rope_type = 'yarn'"),
    "part of a head": ("llama", lambda f: changed(f, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary"),
    "activation": ("llama", lambda f: changed(f, hidden_act="relu2"), "'relu2'"),
    "heads": ("llama", lambda f: changed(f, num_attention_heads=6, head_dim=8), ""),
    "two embeddings": ("marian", lambda f: changed(f, share_encoder_decoder_embeddings=False), ""),
    "compressed": ("llama", lambda f: changed(f, quantization_config={"quant_method": "gptq", "bits": 4}), ""),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(folders, tmp_path, case):
    family, spoil, said = BAD[case]
    shutil.copytree(folders / family, tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(InputError) as caught:
        load_checkpoint(str(tmp_path / "bad"))
    assert said in caught.value.what and caught.value.hint and "\n" not in caught.value.what


def test_another_kind_of_model_is_refused(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **small)).save_pretrained(tmp_path)
    with pytest.raises(UnknownName, match="kind of sequence model 'BertForMaskedLM'"):
        load_checkpoint(str(tmp_path))


def test_separate_embeddings_are_refused():
    model = tiny("bart")
    model.model.encoder.embed_tokens.weight = torch.nn.Parameter(model.model.encoder.embed_tokens.weight.detach() + 1)
    with pytest.raises(EdgeError, match="encoder and decoder apart"):
        convert(model.config, model)


ENGLISH = ["the cat sat on the mat", "a dog ran away from the big cat", "cats and dogs sit on mats", "where is the dog today"] * 20
GERMAN = ["die Katze saß auf der Matte", "ein Hund lief vor der großen Katze weg", "wo ist der Hund heute"] * 20
TEXTS = ["the cat", "  the   dog sat ", "zebra ß the", "a, b.", "where the dog", "ﬁne ｔｈｅ"]


def pieces(lines, path: Path):
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=made, vocab_size=30, minloglevel=2)
    path.write_bytes(made.getvalue())
    loaded = sentencepiece.SentencePieceProcessor(str(path))
    return [loaded.id_to_piece(i) for i in range(3, loaded.get_piece_size())]


def test_marian_tokenizer_is_one_file(folders, tmp_path):
    import tokenizers

    shutil.copytree(folders / "marian", tmp_path / "m")
    found = [*pieces(ENGLISH, tmp_path / "m" / "source.spm"), *pieces(GERMAN, tmp_path / "m" / "target.spm")]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(["</s>", "<unk>", ">>deu<<", *found, "<pad>"]))}
    (tmp_path / "m" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de"}'
    )
    checkpoint = load_checkpoint(str(tmp_path / "m"))
    assert checkpoint.tokenizer == {"kind": "hugging-face", "file": "tokenizer.json"}
    ours = tokenizers.Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    with pytest.warns(UserWarning, match="sacremoses"):
        theirs = transformers.MarianTokenizer.from_pretrained(tmp_path / "m")
    for text in [*TEXTS, ">>deu<< the dog", ""]:
        assert ours.encode(text).ids == theirs(text).input_ids, text
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"separate_vocabs": true}')
    with pytest.raises(InputError, match="separate_vocabs"):
        load_checkpoint(str(tmp_path / "m"))


def test_fast_tokenizer_goes_into_the_bundle(folders, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(ENGLISH, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<unk>", "<s>", "</s>"]))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.enable_padding(length=20)
    shutil.copytree(folders / "llama", tmp_path / "l")
    made.save(str(tmp_path / "l" / "tokenizer.json"))
    (tmp_path / "l" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}')
    checkpoint = load_checkpoint(str(tmp_path / "l"))
    ours = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "l")
    assert ours.encode("the cat sat").ids == theirs("the cat sat").input_ids
    (tmp_path / "l" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"no tokenizer.json can be made of tokenizer.json"):
        load_checkpoint(str(tmp_path / "l"))


def prompts_of(family: str):
    draw = np.random.default_rng(2)
    if family == "whisper":
        return [draw.standard_normal((8, FRAMES)).astype(np.float32) for _ in range(2)]
    return [draw.integers(3, 60, n).tolist() for n in (11, 5)]


def answers_of_transformers(theirs, prompts, steps: int):
    """Tokens [prompts, steps] and the logits [prompts, steps, V] that transformers chose them by; no end token ends an answer."""
    tokens, logits = [], []
    for prompt in prompts:
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": steps, "min_new_tokens": steps, "output_logits": True}
        if theirs.config.model_type == "whisper":
            begin = torch.tensor([[theirs.generation_config.decoder_start_token_id]])
            found, given = [], torch.from_numpy(prompt)[None]
            for _ in range(steps):
                found.append(theirs(input_features=given, decoder_input_ids=begin).logits[:, -1])
                begin = torch.cat([begin, found[-1].argmax(-1, keepdim=True)], 1)
            tokens.append(begin[0, 1:])
            logits.append(torch.cat(found))
            continue
        made = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), return_dict_in_generate=True,
            eos_token_id=None, forced_eos_token_id=None, **settings,
        )  # fmt: skip
        tokens.append(made.sequences[0, -steps:])
        logits.append(torch.cat(made.logits))
    return torch.stack(tokens).numpy(), torch.stack(logits).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_generate(folders, family):
    """Prompts of two lengths side by side in one batch, padded, through encode, prefill and decode."""
    theirs, prompts, steps = tiny(family), prompts_of(family), 12
    checkpoint = load_checkpoint(str(folders / family))
    spec = spec_of(family, checkpoint, Sizes(() if family == "whisper" else (16,), (16,)), batch=2)
    card = Card.read(spec.files["sequence.json"])
    with torch.no_grad():
        tokens, logits = answers_of_transformers(theirs, prompts, steps)
    if len(card.start) > 1:  # the forced tokens are in transformers' answer
        forced = len(card.start) - 1
        assert (tokens[:, :forced] == card.start[1:]).all()
        tokens, logits = tokens[:, forced:], logits[:, forced:]
    session = Session(Programs(card, run_of(spec)), prompts)
    for i in range(tokens.shape[1]):
        assert np.abs(session.logits - logits[:, i]).max() / logits.std() < 1e-4, i
        assert (session.logits.argmax(-1) == tokens[:, i]).all()
        session.logits = session.feed(tokens[:, i : i + 1])[:, 0]
        session.keep(np.ones(2, np.int64))


def test_tokens_that_must_not_be_chosen(folders):
    checkpoint, prompts = load_checkpoint(str(folders / "marian")), prompts_of("marian")

    def answers(specials, **settings):
        spec = spec_of("marian", replace(checkpoint, specials=replace(specials, eos=())), Sizes((12,), (8,)))
        card = Card.read(spec.files["sequence.json"])
        return [r.tokens for r in generate(run_of(spec), card, prompts, Settings(**settings))]

    plain = answers(checkpoint.specials)
    never = {tokens[-1] for tokens in plain}
    first = {tokens[0] for tokens in plain} - never
    barred = replace(checkpoint.specials, suppress=tuple(never), suppress_first=tuple(first))
    for settings in ({}, {"beams": 2}, {"temperature": 2.0, "seed": 1}):
        for tokens in answers(barred, **settings):
            assert len(tokens) == 8 and not never & set(tokens) and tokens[0] not in first


def test_lengths_are_asked_for_and_checked(folders):
    spec = load_model(str(folders / "bart"), Sizes((20,), (9,)))
    card = Card.read(spec.files["sequence.json"])
    assert set(spec.methods) == {"encode", "prefill", "decode"} and spec.layout == "encoder-decoder" and card.max_output == 9
    assert spec.methods["encode"].example_inputs[0].shape == (1, 20) and card.methods["decode"]["cache"] == 11
    assert load_model(str(folders / "bart"), Sizes((20,), (9,))).digest == spec.digest
    assert load_model(str(folders / "bart")).digest != spec.digest
    with pytest.raises(InputError, match="more positions than the model's 40"):
        load_model(str(folders / "bart"), Sizes((41,)))
    with pytest.raises(InputError, match="64 tokens in and 65 out"):
        load_model(str(folders / "llama"), Sizes((64,), (65,)))
    with pytest.raises(InputError, match="programs of fixed lengths"):
        load_model("example:digits-cnn", Sizes((8,)))
    whisper = load_model(str(folders / "whisper"))
    assert whisper.methods["encode"].example_inputs[0].shape == (1, 8, FRAMES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The user's own cache holds no lowered programs of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESDK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


LOWERED = [("t5", "litert", "fp32"), ("whisper", "executorch", "fp32"), ("llama", "executorch", "int8-dynamic")]
MORE = [(f, r, p) for f in FAMILIES for r in ("executorch", "litert") for p in ("fp32", "int8-dynamic") if (f, r, p) not in LOWERED]


@pytest.mark.parametrize(("family", "runtime", "precision"), LOWERED)
def test_lowered_steps_are_those_of_torch(folders, cache, tmp_path, family, runtime, precision):
    lowered_steps(folders, tmp_path, family, runtime, precision)


@pytest.mark.wide
@pytest.mark.parametrize(("family", "runtime", "precision"), MORE)
def test_all_lowered_steps_are_those_of_torch(folders, cache, tmp_path, family, runtime, precision):
    lowered_steps(folders, tmp_path, family, runtime, precision)


def lowered_steps(folders, tmp_path, family, runtime, precision):
    """Four greedy steps of the lowered programs beside those of torch."""
    spec = spec_of(family, load_checkpoint(str(folders / family)), Sizes(() if family == "whisper" else (12,), (6,)))
    units = [(m.name, u.name) for m in trace(spec).methods for u in m.units if u.op == "linear"] if precision != "fp32" else []
    path = tmp_path / "program"
    path.write_bytes(lower(spec, runtime, dict.fromkeys(units, precision)))
    card, prompts = Card.read(spec.files["sequence.json"]), prompts_of(family)[:1]
    with silent():
        opened = open_program(str(path), runtime)
        wanted, got = Session(Programs(card, run_of(spec)), prompts), Session(Programs(card, opened.run), prompts)
    for _ in range(4):
        worst = np.abs(got.logits - wanted.logits).max() / wanted.logits.std()
        assert (0 < worst < 0.2) if units else worst < 1e-3  # XNNPACK approximates GELU
        token = wanted.logits.argmax(-1)[:, None]
        for session in (wanted, got):
            session.logits = session.feed(token)[:, 0]
            session.keep(np.ones(1, np.int64))
