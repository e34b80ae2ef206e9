"""Several lengths from the command line: planned, built and run, each text by the smallest programs that hold it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sequence_small import CHARACTERS, STACK, small_model

from edgesdk.bundles import read_member
from edgesdk.cli import main
from edgesdk.errors import InputError
from edgesdk.intake import load_model
from edgesdk.plan import Workload
from edgesdk.plan.fake_quant import run as modules
from edgesdk.plan.lengths import Lengths, parse_lengths
from edgesdk.sequence.card import Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.generate import generate
from edgesdk.sequence.hub import Checkpoint, Specials
from edgesdk.sequence.saved import Saved, save
from edgesdk.sequence.sizes import Sizes

SHORT, LONG = "hello", "a much longer prompt"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for layout in ("encoder-decoder", "decoder-only"):
        encoder = Stack(layers=1, **STACK) if layout == "encoder-decoder" else None
        config = SequenceConfig(layout=layout, vocab=30, encoder=encoder, decoder=Stack(layers=1, **STACK), tied=False)
        save(folder / f"{layout}.edgeseq", Saved(Checkpoint(small_model(config), config, Specials((2,), (1,), 0), CHARACTERS, {})))
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("EDGESDK_CACHE", str(tmp_path_factory.getbasetemp() / "bucket-cache"))


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


@pytest.mark.parametrize(
    ("layout", "runtime", "methods"),
    [
        ("encoder-decoder", "litert", {"encode_8", "encode_24", "decode_8", "decode_24"}),
        pytest.param("decoder-only", "executorch", {"prefill_8", "prefill_24", "decode_16", "decode_32"}, marks=pytest.mark.wide),
        pytest.param("decoder-only", "litert", {"prefill_8", "prefill_24", "decode_16", "decode_32"}, marks=pytest.mark.wide),
        pytest.param("encoder-decoder", "executorch", {"encode_8", "encode_24", "decode_8", "decode_24"}, marks=pytest.mark.wide),
    ],
)
def test_two_buckets_are_planned_built_and_run(layout, runtime, methods, models, tmp_path, capsys):
    pytest.importorskip("executorch" if runtime == "executorch" else "ai_edge_litert")
    ref, plan, bundle = str(models / f"{layout}.edgeseq"), tmp_path / "plan.json", tmp_path / "model.edge"
    sizes = ("--input-length", "8,24", "--output-length", "8")
    code, out, _ = ran(capsys, "plan", "--model", ref, "--runtime", runtime, *sizes, "--out", str(plan), "--json")
    answers = json.loads(out)["answers"]
    assert code == 0 and answers["inputs"] == [8, 24] and answers["caches"] == ([9] if layout == "encoder-decoder" else [16, 32])
    assert 0 < answers["first_token"]["p50"] <= answers["first_token"]["p90"] < answers["whole"]["p90"]
    as_floats(plan)
    code, out, _ = ran(capsys, "build", str(plan), "--out", str(bundle))
    assert code == 0 and "inputs of 8, 24 tokens" in out
    card = Card.read(read_member(bundle, "sequence.json"))
    assert set(card.methods) == methods
    # the link's folder is the device: what is installed there answers
    where = f"local:{tmp_path / 'root'}"
    wide = load_model(ref, Sizes((24,), (8,)))
    for text, bucket in ((SHORT, "8"), (LONG, "24")):
        code, out, err = ran(capsys, "run", str(bundle), "--on", where, "--prompt", text, "--json")
        assert code == 0, err
        (found,) = json.loads(out)["answers"]
        (wanted,) = generate(modules(wide), Card.read(wide.files["sequence.json"]), [prompt_of(text)], Settings())
        assert found["tokens"] == wanted.tokens
        assert sum(name.endswith(f"code_{bucket}") or name == f"prefill_{bucket}" for name in found["calls"]) >= 1
    code, _, err = ran(capsys, "run", str(bundle), "--on", where, "--prompt", "x" * 60)
    assert code == 2 and "the prompt has 6" in err and ("takes 24" if layout == "encoder-decoder" else "holds 32") in err


def prompt_of(text: str) -> list[int]:
    first, alphabet = CHARACTERS["first"], CHARACTERS["alphabet"]
    return [*(first + alphabet.index(c) for c in text), *CHARACTERS["after"]]


def as_floats(path: Path) -> None:
    """The plan with its weights in float32, so that every runtime writes the same."""
    plan = json.loads(path.read_text())
    for unit in plan["units"]:
        unit["precision"] = "fp32"
    path.write_text(json.dumps(plan))


def test_sizes_of_a_workload():
    assert Workload(input_length=512).sizes == Sizes((512,))
    assert Workload(input_length=parse_lengths("64,128"), output_length=parse_lengths("4-9"), draft=4).sizes == Sizes((64, 128), (9,), 4)
    assert Workload(input_length=parse_lengths("20-100")).sizes == Sizes((16, 32, 64, 100))
    assert str(Sizes((8, 24), (6,), 4)) == "in8,24-out6-draft4" and str(Sizes()) == ""
    saved = Workload(input_length=parse_lengths("20-100", buckets="50,100"))
    assert Workload.model_validate_json(saved.model_dump_json()).sizes == Sizes((50, 100))
    with pytest.raises(ValueError, match="the last of which holds 100"):
        Lengths(values=(100,), shares=(1.0,), buckets=(50,))


@pytest.mark.parametrize("sizes", [((0,),), ((24, 8),), ((), (4, 4)), ((), (), 1)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(InputError, match=r"--(input-length|output-length|draft) "):
        Sizes(*sizes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--input-length", "8,x"), "not lengths"),
        (("--input-length", "8,0"), "not lengths"),
        (("--output-length", "24-8"), "lengths are 1 or more and rise"),
        (("--buckets", "8,24"), "no lengths to put in them"),
        (("--input-length", "8-24", "--buckets", "16"), "none holds 24 tokens"),
        (("--input-length", "no-such-file"), "neither a length nor a file"),
        (("--input-length", "8,4096"), "want more positions than the model's 4096"),
    ],
)
def test_lengths_that_cannot_be_planned(words, message, models, capsys):
    code, _, err = ran(capsys, "plan", "--model", str(models / "decoder-only.edgeseq"), *words)
    assert code == 2 and message in " ".join(err.split())


def test_a_budget_that_many_texts_exceed_is_warned_of(models, capsys):
    words = ("--model", str(models / "decoder-only.edgeseq"), "--runtime", "litert", "--input-length", "8", "--output-length", "2,24")
    whole = json.loads(ran(capsys, "plan", *words, "--json")[1])["answers"]["whole"]
    between = (whole["mean"]["value"] + whole["p90"]) / 2
    code, out, _ = ran(capsys, "plan", *words, "--latency", f"{between * 1e3:.6f}ms")
    assert code == 0 and "holds on average: more than one text in ten takes longer" in " ".join(out.split())
    assert "caches of 10, 32; planned for 8 tokens read, 2, 24 (mean 13) tokens written" in " ".join(out.split())


def test_a_distribution_is_planned_for_its_mean_and_percentiles(models, tmp_path, capsys):
    """Answers cost what each length's cost, weighed by how often it occurs."""
    lengths = tmp_path / "read.txt"
    lengths.write_text("6 3\n20 1\n")
    words = ("plan", "--model", str(models / "decoder-only.edgeseq"), "--runtime", "litert", "--output-length", "5", "--json")
    mixed = json.loads(ran(capsys, *words, "--input-length", str(lengths), "--buckets", "8,24")[1])["answers"]
    short, long = (json.loads(ran(capsys, *words, "--input-length", n, "--buckets", "8,24")[1])["answers"] for n in ("6", "20"))
    for name in ("first_token", "whole"):
        mean = 0.75 * short[name]["mean"]["value"] + 0.25 * long[name]["mean"]["value"]
        assert mixed[name]["mean"]["value"] == pytest.approx(mean)
        assert (mixed[name]["p50"], mixed[name]["p90"]) == pytest.approx((short[name]["mean"]["value"], long[name]["mean"]["value"]))
