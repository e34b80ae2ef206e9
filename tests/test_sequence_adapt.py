"""Sequence models made of others' weights: adaptation, teaching, static layer skipping, elastic sub-models, and the file they are kept in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edgesdk.cli import app
from edgesdk.compress import training
from edgesdk.errors import DoesNotFit, InputError, UnknownName
from edgesdk.intake import load_model
from edgesdk.plan.fake_quant import run as _runner
from edgesdk.plan.harm import one_thread
from edgesdk.sequence import elastic, exits, saved
from edgesdk.sequence.adapt import adapt
from edgesdk.sequence.answers import answers
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.inherit import arranged
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.pairs import Batches, Pairs
from edgesdk.sequence.teach import TeachConfig, answered, forced, teach

VOCAB = 12


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EDGESDK_CACHE", str(tmp_path / "cache"))
    with one_thread():
        yield


def stack(layers: int, dim: int = 16, heads: int = 4, kv_heads: int = 2, ffn: int = 24) -> Stack:
    return Stack(layers=layers, dim=dim, heads=heads, kv_heads=kv_heads, head=4, ffn=ffn)


def model_of(layout: str = "decoder-only", seed: int = 0, layers: int = 4, dim: int = 16, vocab: int = VOCAB, **more: Any) -> SequenceModel:
    encoder = stack(layers, dim) if layout.startswith("encoder") else None
    decoder = None if layout == "encoder-ctc" else stack(layers, dim)
    torch.manual_seed(seed)
    return SequenceModel(SequenceConfig(layout=layout, vocab=vocab, encoder=encoder, decoder=decoder, **more)).eval()


def reversals(count: int, seed: int = 0) -> Pairs:
    """3 to 6 tokens, answered from last to first."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, VOCAB, rng.integers(3, 7)).tolist() for _ in range(count)]
    return Pairs([[*r, 2] for r in rows], [[*r[::-1], 2] for r in rows], start=1, end=2, pad=0)


# ---- adaptation


def test_adapted_weights_are_copies() -> None:
    model = model_of(layers=6)
    made, report = adapt(model, encoder_layers=4, decoder_layers=2)
    given, got = dict(model.named_parameters()), dict(made.named_parameters())
    assert report.layers == {"encoder": (0, 2, 3, 5), "decoder": (0, 5)}
    assert report.new == 0 and report.copied == report.parameters == sum(p.numel() for p in got.values())
    for origin in report.origins:
        assert origin.how == "whole" and torch.equal(got[origin.name], given[origin.source])
    assert torch.equal(got["decoder.layers.1.cross_attn.q.weight"], given["decoder.layers.5.self_attn.q.weight"])
    assert torch.equal(got["encoder.layers.1.ffn.down.weight"], given["decoder.layers.2.ffn.down.weight"])
    got["embed.weight"].data.zero_()
    assert bool(given["embed.weight"].any()), "a copy, not a view"


def test_the_encoder_sees_both_ways() -> None:
    made, _ = adapt(model_of())
    source = torch.tensor([[3, 4, 5, 6]])
    other = torch.tensor([[3, 4, 5, 7]])
    with torch.no_grad():
        a, b = (made.encode(s, torch.zeros(1, 4)) for s in (source, other))
    assert float((a[0, 0] - b[0, 0]).abs().max()) > 1e-4


def test_unbalanced_widths_and_cross_attention_of_its_own() -> None:
    model, wide = model_of(), model_of(seed=1, dim=24)
    made, report = adapt(model, encoder_from=wide, decoder_layers=1)
    how = {o.name: o.how for o in report.origins}
    assert how["decoder.layers.0.cross_attn.k.weight"] == "new" and how["decoder.layers.0.cross_attn.q.weight"] == "whole"
    assert torch.equal(made.source_embed.weight, wide.embed.weight)  # type: ignore[union-attr]
    assert made(torch.tensor([[3, 4]]), None, torch.tensor([[1]])).shape == (1, 1, VOCAB)
    small, report = adapt(model, decoder=stack(2, dim=8, heads=2, kv_heads=1, ffn=10), arrange=False)
    q = dict(model.named_parameters())["decoder.layers.0.self_attn.q.weight"]
    assert torch.equal(dict(small.named_parameters())["decoder.layers.0.self_attn.q.weight"], q[:8, :8])
    fresh, report = adapt(model, cross="new", seed=3)
    assert {o.name for o in report.origins if o.how == "new"} == {n for n, _ in fresh.named_parameters() if ".cross_" in n}


def test_heads_that_share_keys_are_averaged() -> None:
    model = model_of()
    made, report = adapt(model, decoder=stack(4, kv_heads=1))
    k = dict(model.named_parameters())["decoder.layers.0.self_attn.k.weight"]
    assert torch.allclose(dict(made.named_parameters())["decoder.layers.0.self_attn.k.weight"], (k[:4] + k[4:]) / 2)
    assert {o.how for o in report.origins} == {"whole", "averaged"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"encoder_layers": 9}, "9 layers of a model that has 4"),
        ({"decoder_layers": [0, 7]}, r"layers \[0, 7\] of a model"),
        ({"decoder": stack(2, ffn=99)}, "cannot be cut out of"),
        ({"decoder": stack(2, heads=3, kv_heads=3)}, "3 heads on 3"),
        ({"encoder_from": model_of(vocab=13)}, "an encoder of 13 tokens"),
    ],
)
def test_what_cannot_be_adapted(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        adapt(model_of(), **settings)


def test_arranging_changes_no_answer() -> None:
    model, source, tokens = model_of("encoder-decoder"), torch.tensor([[3, 4, 5]]), torch.tensor([[1, 6]])
    sorted_ = elastic.sorted_model(model)
    assert torch.allclose(sorted_(source, None, tokens), model(source, None, tokens), atol=1e-5)
    down = arranged(model.config, dict(model.named_parameters()))["decoder.layers.0.ffn.down.weight"]
    assert not torch.equal(down, dict(model.named_parameters())["decoder.layers.0.ffn.down.weight"])


# ---- pairs, answers, teaching


def test_batches_are_alike_in_length_and_of_the_seed_alone() -> None:
    lengths = [i % 17 + 1 for i in range(200)]
    one, two = Batches(lengths, 16, 5), Batches(lengths, 16, 5)
    assert two[30] == one[30] and [one[i] for i in range(13)] == [two[i] for i in range(13)]
    assert sorted(r for i in range(one.count) for r in one[i]) == sorted({r for i in range(one.count) for r in one[i]}), (
        "an epoch has each once"
    )
    assert np.mean([np.ptp([lengths[r] for r in one[i]]) for i in range(one.count)]) < 3


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sources": [[3]], "targets": []}, "1 sources for 0 targets"),
        ({"sources": [[]], "targets": [[2]]}, "source 0 is empty"),
        ({"sources": [[3]], "targets": [[4]]}, "ends with token 4"),
    ],
)
def test_pairs_that_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Pairs(start=1, end=2, **fields)


@pytest.mark.parametrize("layout", ["decoder-only", "encoder-decoder"])
@pytest.mark.parametrize("windows", [(), (3, 3, 0, 0)])
def test_answers_are_the_likeliest_tokens(layout: str, windows: tuple[int, ...]) -> None:
    model = model_of(layout)
    model = SequenceModel(model.config.model_copy(update={"decoder": stack(4).model_copy(update={"windows": windows})})).eval()
    pairs = reversals(8)
    found = answers(model, pairs.sources, start=1, end=2, longest=5, batch=3)
    for source, answer in zip(pairs.sources, found, strict=True):
        tokens = [1]
        while len(tokens) <= len(answer):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([source]), None, torch.tensor([tokens]))[0, -1].argmax()))
        assert answer == tokens[1:] and (answer[-1] == 2 or len(answer) == 5)


def _taught(steps: int, step: Any = None, **more: Any) -> SequenceModel:
    model = model_of("encoder-decoder", layers=2)
    teach(model, reversals(160), TeachConfig(steps=steps, batch=16, held=16, **more), teacher=model_of(seed=3, dim=24, layers=2), step=step)
    return model


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "SAVE_S", 0.0)
    whole = _taught(24, features="mse")

    def stop(text: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _taught(24, stop, features="mse")
    assert len(list((tmp_path / "cache" / "training").glob("*.pt"))) == 1
    seen: list[float] = []
    again = _taught(24, lambda text, share: seen.append(share), features="mse")
    assert min(seen) > 0.5, "it went on where it was"
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_what_a_pretrained_decoder_reads_has_no_start_between() -> None:
    model, pairs = model_of(), replace(reversals(6), start=None)
    batch = pairs.batch(range(6))
    whole = [*pairs.sources[0], *pairs.targets[0]]
    with torch.no_grad():
        wanted = model(None, None, torch.tensor([whole]))[0, len(pairs.sources[0]) - 1 : -1]
        assert torch.allclose(forced(model, batch, 0)[0, : len(wanted)], wanted, atol=1e-5)
    first = answers(model, pairs.sources, start=None, end=2, longest=4)[0][0]
    assert first == int(wanted[0].argmax())


def test_a_student_of_another_layout_learns_from_a_teacher() -> None:
    pairs, teacher = reversals(400), model_of(dim=24, layers=2)
    config = TeachConfig(steps=150, batch=32, held=32, rate=0.05)
    outcome = teach(teacher, pairs, config)
    assert outcome.after < 0.5 * outcome.before
    student = model_of("encoder-decoder", seed=1, layers=2)
    own = TeachConfig(steps=60, batch=32, held=32, rate=0.05, labels=0, features="cka")
    outcome = teach(student, pairs, own, teacher=teacher)
    assert outcome.after < 0.75 * outcome.before
    bare = teach(model_of(seed=1, layers=2), pairs, TeachConfig(steps=2, batch=8, held=32, features="mse"), teacher=teacher, bare=True)
    assert np.isfinite(bare.after)
    told = answered(teacher, pairs)
    assert told.sources == pairs.sources and all(t[-1] == 2 and len(t) <= 7 for t in told.targets)
    right = sum(a == list(b) for a, b in zip(told.targets, pairs.targets, strict=True))
    assert right < len(pairs), "the teacher's answers, right or wrong"


def test_a_model_without_decoder_is_taught_by_ctc() -> None:
    model = model_of("encoder-ctc", layers=2)
    rows = [[t for t in r if t != 2] for r in reversals(80).sources]
    same = Pairs([[x for t in r for x in (t, 2)] for r in rows], [[*r, 2] for r in rows], start=1, end=2)
    outcome = teach(model, same, TeachConfig(steps=40, batch=16, held=16))
    assert outcome.after < 0.5 * outcome.before
    with pytest.raises(InputError, match="cannot teach"):
        teach(model, same, TeachConfig(steps=1, held=16), teacher=model_of())


def test_what_cannot_be_taught() -> None:
    with pytest.raises(InputError, match="a teacher of 13 tokens"):
        teach(model_of(), reversals(20), TeachConfig(held=4), teacher=model_of(vocab=13))
    with pytest.raises(InputError, match="held = 64 of 20 pairs"):
        teach(model_of(), reversals(20))
    with pytest.raises(InputError, match="device = 'abacus'"):
        teach(model_of(), reversals(20), TeachConfig(held=4, device="abacus"))


# ---- schedules


def test_schedules_are_static_and_falling() -> None:
    made = exits.unified(12, 2.0, 64)
    assert made.prefill == made.layers(0) == made.layers(63) == (0, 2, 4, 7, 9, 11)
    falling = exits.skip_decode(12, 10, 4, 64, stages=4, first=2)
    assert [len(falling.layers(n)) for n in (0, 16, 17, 40, 64, 99)] == [10, 10, 8, 6, 4, 4]
    assert falling.layers(64) == (0, 1, 10, 11)
    for early, late in zip(falling.stages, falling.stages[1:], strict=False):
        assert set(late.layers) <= set(early.layers), "no key is read that was not made"
    assert falling.share(range(1, 65)) == pytest.approx(28 / 40)
    with pytest.raises(ValueError, match="each stage keeps some of those before"):
        exits.Schedule(name="x", prefill=(0, 1), stages=(exits.Stage(until=8, layers=(0, 2)),))
    with pytest.raises(InputError, match="3 to 5 of 4 layers"):
        exits.skip_decode(4, 3, 5, 64)


def test_voids_are_found_and_skipping_them_changes_nothing() -> None:
    model, pairs = model_of(layers=5), reversals(16)
    for layer in (1, 3):
        for part in ("self_attn.o", "ffn.down"):
            model.get_submodule(f"decoder.layers.{layer}.{part}").weight.data.zero_()  # type: ignore[operator,union-attr]
    found = exits.changes(model, pairs)
    schedule = exits.void(found, 16, prompt=0.01, answer=0.01)
    assert schedule.prefill == schedule.layers(3) == (0, 2, 4)
    assert found.prompt[1] == found.answer[3] == 0
    batch = pairs.batch(range(8))
    with torch.no_grad():
        assert torch.allclose(forced(exits.skipped(model, schedule.prefill), batch, 0), forced(model, batch, 0), atol=1e-6)
    both = exits.void(exits.changes(model_of("encoder-decoder"), pairs), 16, prompt=0.5, answer=0.9)
    assert both.encoder and both.prefill


@pytest.mark.parametrize("layout", ["decoder-only", "encoder-decoder"])
def test_scheduled_programs_compute_what_is_trained(layout: str) -> None:
    from edgesdk.sequence.choose import Settings
    from edgesdk.sequence.generate import generate

    model, schedule = model_of(layout, layers=5), exits.skip_decode(5, 5, 2, 24, stages=3)
    spec = exits.scheduled_spec(model, schedule, name="x", source_lengths=(8,), start=(1,))
    logits: list[torch.Tensor] = []

    def run(name: str, arrays: Any) -> list[Any]:
        with torch.no_grad():
            out = spec.methods[name].module(*(torch.from_numpy(np.array(a)) for a in arrays))
        if name != "encode":
            logits.append(out[0].reshape(-1, VOCAB)[-1])
        return [o.numpy() for o in out]

    source = [3, 4, 5, 6, 7]
    made = generate(run, Card.read(spec.files[NAME]), [source], Settings(max_tokens=16, draft="none"))[0]
    pairs = Pairs([source], [[*made.tokens[:-1], 2]], start=1, end=2)
    with torch.no_grad(), exits.following(model, schedule, pairs.batch([0]), 0):
        wanted = forced(model, pairs.batch([0]), 0)[0]
    assert sum(n.startswith("decode") for n in made.calls) == 3 or layout == "encoder-decoder"
    assert torch.allclose(torch.stack(logits), wanted[: len(logits)], atol=1e-5)


def test_exits_and_schedules_are_trained_together() -> None:
    model, pairs = model_of(layers=3), reversals(200)
    config = TeachConfig(steps=60, batch=32, held=32, rate=0.05)
    early, batch = exits.skipped(model, [0]), pairs.batch(range(32))
    schedule = exits.unified(3, 1.5, 32)

    def loss(m: SequenceModel) -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(forced(m, batch, 0).flatten(0, 1), batch.wanted.flatten()))

    before = loss(early), loss(exits.skipped(model, schedule.prefill))
    teach(model, pairs, config, student=exits.exits_student(model, [1], 0))
    assert loss(exits.skipped(model, [0])) < 0.8 * before[0]
    teach(model, pairs, config, student=exits.student_of(model, [schedule], 0))
    assert loss(exits.skipped(model, schedule.prefill)) < 0.8 * before[1]
    with pytest.raises(InputError, match=r"exits \[3\] of 3"):
        exits.exits_student(model, [3], 0)
    with pytest.raises(InputError, match="layers"):
        exits.skipped(model, [5])


# ---- elastic sub-models


def test_sub_models_share_the_memory_and_learn_with_the_whole() -> None:
    model, pairs = model_of(layers=3), reversals(200)
    cuts = [
        elastic.mixed(model.config, "mix", {"decoder": [1.0, 0.5, 0.25]}),
        elastic.nested(model.config, "small", depth=0.67, ffn=0.5, heads=0.5, dim=0.75),
        elastic.nested(model.config, "whole"),
    ]
    assert cuts[0].config.decoder and cuts[0].config.decoder.ffns == (24, 12, 6)
    small = elastic.sub_model(model, cuts[1])
    assert small.config.parameters < 0.5 * model.config.parameters
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert all(p.untyped_storage().data_ptr() in theirs for p in small.parameters()), "nothing is stored twice"
    batch = pairs.batch(range(4))
    with torch.no_grad():
        assert torch.equal(forced(elastic.sub_model(model, cuts[2]), batch, 0), forced(model, batch, 0))
        before = forced(small, batch, 0)
    rows = {r.name: r.quality for r in elastic.measured(model, cuts, lambda m: -_loss(m, pairs))}
    teach(model, pairs, TeachConfig(steps=80, batch=32, held=32, rate=0.05), student=elastic.elastic_student(model, cuts[:2], 0))
    with torch.no_grad():
        assert not torch.equal(forced(small, batch, 0), before), "it is trained where it lies"
    after = {r.name: r.quality for r in elastic.measured(model, cuts, lambda m: -_loss(m, pairs))}
    assert all(after[n] > 0.8 * rows[n] for n in after)


def _loss(model: SequenceModel, pairs: Pairs) -> float:
    batch = pairs.batch(range(64))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(forced(model, batch, 0).flatten(0, 1), batch.wanted.flatten(), ignore_index=-100))


def test_the_front_and_bad_sub_models() -> None:
    rows = [elastic.Measured(name=n, parameters=p, quality=q) for n, p, q in (("a", 9, 0.9), ("b", 5, 0.8), ("c", 6, 0.7), ("d", 2, 0.1))]
    assert [r.name for r in elastic.front(rows)] == ["a", "b", "d"]
    config = model_of().config
    for made, told in (
        (lambda: elastic.nested(config, "x", ffn=0), "shares are above 0"),
        (lambda: elastic.mixed(config, "x", {"decoder": [1.0]}), "for 4 layers"),
        (lambda: elastic.mixed(config, "x", {"encoder": [1.0]}), "has no encoder"),
    ):
        with pytest.raises(InputError, match=told):
            made()


# ---- files and verbs


def _file(path: Path) -> tuple[SequenceModel, Path]:
    model, pairs = model_of(layers=3), reversals(40)
    cuts = (elastic.nested(model.config, "half", ffn=0.5), elastic.nested(model.config, "third", depth=0.34))
    rows = elastic.measured(model, [*cuts, elastic.nested(model.config, saved.WHOLE)], lambda m: m.config.parameters / 1e6)
    point = saved.checkpoint_for(model, pairs)
    return model, saved.save(path / "m.edgeseq", saved.Saved(point, pairs.split(8)[1], cuts, rows))


def test_a_saved_model_comes_back_and_so_do_its_parts(tmp_path: Path) -> None:
    model, path = _file(tmp_path)
    again = saved.load(path)
    assert again.held and len(again.held) == 8 and [r.name for r in saved.family_of(path)] == ["whole", "half", "third"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.checkpoint.model.parameters(), strict=True))
    spec, part = load_model(str(path)), load_model(f"{path}:half")
    assert spec.layout == "decoder-only" and spec.quality_name == "exact match" and spec.digest != part.digest
    assert set(spec.methods) == {"prefill", "decode"} and spec.calibration is not None
    assert spec.evaluate and 0 <= spec.evaluate(_runner(spec)) <= 1
    core = part.methods["decode"].module.core
    assert core.config.decoder.ffn == 12  # type: ignore[union-attr]
    with pytest.raises(UnknownName, match="did you mean 'half'"):
        load_model(f"{path}:helf")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError):
        saved.load(path)


def test_the_best_sub_model_that_fits_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import edgesdk.plan

    _, path = _file(tmp_path)
    asked: list[str] = []

    def plan(ref: str, device: str, **more: Any) -> Any:
        asked.append(ref.rpartition(":")[2])
        return SimpleNamespace(fits=ref.endswith(more["budget"]), checks=())

    monkeypatch.setattr(edgesdk.plan, "plan", plan)
    assert elastic.choose(str(path), "host", budget="half")[0] == "half" and asked == ["whole", "half"]
    with pytest.raises(DoesNotFit, match="none of 3 sub-models fits host"):
        elastic.choose(str(path), "host", budget="no")


def test_adapt_and_teach_as_verbs(tmp_path: Path) -> None:
    _, path = _file(tmp_path)
    rows = reversals(60)
    lines = [json.dumps({"source": list(s), "target": list(t)}) for s, t in zip(rows.sources, rows.targets, strict=True)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    made, taught = tmp_path / "e.edgeseq", tmp_path / "t.edgeseq"
    told = CliRunner().invoke(app, ["--quiet", "adapt", str(path), "--decoder-layers", "1", "--out", str(made), "--json"])
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert report["kind"] == "adaptation" and report["layers"] == {"encoder": [0, 1, 2], "decoder": [0]} and report["new"] == 0
    ask = ["--quiet", "teach", str(made), "--pairs", str(tmp_path / "p.jsonl"), "--teacher", str(path), "--steps", "6", "--batch", "8"]
    told = CliRunner().invoke(app, [*ask, "--out", str(taught), "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["after"] < json.loads(told.stdout)["before"]
    assert load_model(str(taught)).layout == "encoder-decoder"
    (tmp_path / "p.jsonl").write_text('{"source": [3, 99], "target": [4]}')
    with pytest.raises(InputError, match="line 1: source: a token outside 0 to 11"):
        saved.teach_saved(str(made), str(tmp_path / "p.jsonl"), str(taught))
