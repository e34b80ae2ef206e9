"""Programs whose caches are int8 codes with scales: they compute what float caches of the same values give, before and after lowering."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from test_sequence_model import (
    LAYOUTS,
    Beside,
    config,
    filling,
    lowered,
    quantized_alike,
    run_of,
    sources,
    spec_of,
    stepped,
)

from edgesdk.cli import main
from edgesdk.errors import InputError
from edgesdk.graph.torch_trace import trace_method
from edgesdk.intake import load_model
from edgesdk.lower.check import relative_error
from edgesdk.plan import plan
from edgesdk.plan.lengths import Lengths
from edgesdk.plan.types import Budget, Plan, Workload
from edgesdk.sequence.caches import Caches, codes
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.generate import generate
from edgesdk.sequence.hub import Checkpoint, Specials
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.prefixes import Prefixes
from edgesdk.sequence.saved import Saved, save
from edgesdk.sequence.search import search
from edgesdk.sequence.sizes import Sizes

CACHED = [n for n, c in LAYOUTS.items() if c.decoder]
WALK = (1, 3, 1, 3, 3, 1, 3, 3, 1, 1)


def floats(run: Any, spec: Any) -> Any:
    """`run` of programs with float caches, called as those with int8 caches are: codes and scales become the numbers they stand for."""

    def call(name: str, arrays: Any) -> Any:
        names = spec.methods[name].module.input_names
        given = dict(zip(names, arrays, strict=True))
        wide = {
            n: a.astype(np.float32) * given[n[: n.rindex("_")] + "_scale" + n[n.rindex("_") :]][..., None] if a.dtype == np.int8 else a
            for n, a in given.items()
        }
        return run(name, [a for n, a in wide.items() if "_scale_" not in n])

    return call


@pytest.mark.parametrize("layout", CACHED)
def test_int8_caches_compute_what_float_caches_of_the_same_values_do(layout):
    """Two rows of unequal length, one and three tokens at once, caches that fill up, grow and wrap around."""
    spec, plain = spec_of(layout, cache_bits=8), spec_of(layout)
    run = Beside(
        run_of(spec), floats(run_of(plain), spec)
    )  # both are given the same codes: on their own a key between two could fall to either
    logits, float_logits, calls = stepped(spec, run, layout, WALK)
    run.check("fp32", False)
    assert any(n.endswith("_x3") for n in calls) and any("_12" in n for n in calls) and any("_32" in n for n in calls)
    assert 0 < relative_error(logits, float_logits) < 0.03


def built(layout: str, runtime: str, precision: str, tmp_path: Any, batch: int) -> None:
    """Every call, until the caches are full, beside eager PyTorch with the same weights and the same codes."""
    spec = spec_of(layout, source_lengths=(8,), cache_lengths=(12,), batch=batch, several=(3,) if batch == 2 else (), cache_bits=8)
    runner, choice = lowered(spec, runtime, precision, tmp_path)
    assert "int8" in {dtype for _, dtype in runner.inputs("decode")}
    with ExitStack() as undo:
        run = Beside(runner.run, quantized_alike(spec, choice, runtime, undo))
        stepped(spec, run, layout, filling(layout, 12, batch == 2))
    run.check(precision, LAYOUTS[layout].activation == "gelu" and runtime == "executorch")


SMALL = [("encoder-decoder", "litert", "int8-dynamic"), ("encoder-decoder", "executorch", "int8-dynamic")]


@pytest.mark.parametrize(("layout", "runtime", "precision"), SMALL)
def test_built_programs_with_int8_caches_equal_eager(layout, runtime, precision, tmp_path):
    built(layout, runtime, precision, tmp_path, 1)


@pytest.mark.wide
@pytest.mark.parametrize("runtime", ["executorch", "litert"])
@pytest.mark.parametrize("layout", CACHED)
def test_every_layout_with_int8_caches_equals_eager(layout, runtime, tmp_path):
    built(layout, runtime, "fp32", tmp_path, 2)


def test_codes_are_within_half_a_step_and_nothing_stays_nothing():
    given = np.random.default_rng(0).standard_normal((2, 3, 5, 16)).astype(np.float32)
    given[0, 0, 0] = 0
    found, scale = codes(given)
    assert found.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (2, 3, 5) and found.max() == 127
    assert (np.abs(found * scale[..., None] - given) <= 0.5001 * scale[..., None]).all() and not found[0, 0, 0].any()


def test_caches_take_a_quarter_and_the_planner_counts_it():
    wide, narrow = (spec_of("decoder-only", batch=1, cache_bits=bits) for bits in (32, 8))
    cards = [Card.read(s.files[NAME]) for s in (wide, narrow)]
    held = [Caches(c, 1, 32).nbytes for c in cards]
    assert held[1] / held[0] == (16 + 4) / (4 * 16)
    assert cards[1].cache_bits == 8 and "cache_bits" not in cards[0].to_bytes().decode() and wide.digest != narrow.digest
    graphs = [trace_method(s.methods["decode_32"], "decode_32") for s in (wide, narrow)]
    assert graphs[1].cache_inputs == tuple(f"self_{x}_{i}" for i in range(2) for x in ("k", "v", "k_scale", "v_scale"))
    assert sum(u.op == "quantize" for u in graphs[1].units) == 4 and not any(u.op == "quantize" for u in graphs[0].units)


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only", "windowed"])
def test_beams_prefixes_and_batches_go_through_int8_caches(layout):
    spec = spec_of(layout, batch=1, cache_bits=8)
    card, run, given = Card.read(spec.files[NAME]), run_of(spec), sources(layout)
    alone = [r.tokens for s in given for r in generate(run, card, [s], Settings(max_tokens=12))]
    assert [r.tokens for r in generate(run, card, given, Settings(max_tokens=12))] == alone
    (one,) = generate(run, card, given[:1], Settings(max_tokens=12, beams=1))
    assert one.tokens == alone[0] and generate(run, card, given[:1], Settings(max_tokens=6, beams=3))[0].tokens
    for bits in (32, 8):
        kept = Prefixes(1 << 20, bits=bits)
        for more in ([], [1, 5]):  # a ring serves a kept prompt as a whole, another cache what both begin with
            source = given[1] if layout == "encoder-decoder" else given[1] + more
            (found,) = generate(run, card, [source], Settings(max_tokens=12), prefixes=kept)
            assert found.tokens == alone[1] or more, "what was kept are the codes, where prefill sees the prompt's own keys as they are"
        assert kept.hits


def test_what_cannot_be():
    with pytest.raises(InputError, match="caches of 5 bits"):
        spec_of("decoder-only", cache_bits=5)
    with pytest.raises(InputError, match="layout encoder-ctc has none"):
        spec_of("ctc", cache_bits=8)
    with pytest.raises(InputError, match="--cache-bits 3"):
        Sizes(cache_bits=3)
    assert str(Sizes((8,), (4,), 4, 8)) == "in8-out4-draft4-cache8"
    with pytest.raises(ValueError, match="caches of 6 bits"):
        Card(
            {
                **dict.fromkeys(Card.FIELDS, 0),
                "methods": {},
                "caches": (),
                "cross": (),
                "start": (),
                "eos": (),
                "tokenizer": {},
                "cache_bits": 6,
            }
        )


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "small.edgeseq"
    torch.manual_seed(0)
    model = SequenceModel(config("decoder-only", max_positions=4096)).eval()
    return str(save(path, Saved(Checkpoint(model, model.config, Specials((1,), (2,), 0), {"kind": "none"}, {}))))


def test_memory_forces_int8_caches(saved_model):
    """Asked for nothing, the planner takes them where float ones do not fit; `build` then makes the same programs."""
    lengths = {"input_length": 16, "output_length": 3000}
    needed = {bits: plan(saved_model, "pi5", workload=Workload(**lengths, cache_bits=bits)).memory for bits in (32, 8)}
    assert needed[8].cache_bytes / needed[32].cache_bytes == pytest.approx((16 + 4) / 64, rel=0.01)
    spared = needed[32].cache_bytes - needed[8].cache_bytes
    between = Budget(memory_bytes=needed[8].peak_bytes + spared // 10)  # weights of fewer bits spare less than the rest
    found = plan(saved_model, "pi5", budget=between, workload=Workload(**lengths))
    assert found.fits and found.workload.cache_bits == 8 and any("as memory forces" in r for r in found.reasons)
    assert not plan(saved_model, "pi5", budget=between, workload=Workload(**lengths, cache_bits=32)).fits
    wide = plan(saved_model, "pi5", workload=Workload(**lengths))
    assert wide.workload.cache_bits is None
    assert Card.read(load_model(saved_model, found.workload.sizes).files[NAME]).cache_bits == 8


def test_the_command_line_takes_cache_bits(saved_model, tmp_path):
    out = tmp_path / "p.json"
    with pytest.raises(SystemExit) as done:
        main(["plan", "--model", saved_model, "--device", "pi5", "--cache-bits", "8", "--out", str(out)])
    assert done.value.code == 0 and Plan.load(out).workload.cache_bits == 8
    for model, bits in ((saved_model, "5"), ("example:digits-cnn", "8")):
        with pytest.raises(SystemExit) as done:
            main(["plan", "--model", model, "--cache-bits", bits])
        assert done.value.code == 2


def test_layouts_count_int8_caches():
    lengths = {"input_length": Lengths.of([(512, 1.0)]), "output_length": Lengths.of([(64, 1.0)])}
    rows = [search("pi5", parameters=20_000_000, vocab=4000, cache_bits=bits, **lengths).rows for bits in (32, 8)]
    by = [{r.layout: r.cost for r in found} for found in rows]
    for name, cost in by[0].items():
        if cost and cost.self_cache_bytes:
            assert by[1][name].self_cache_bytes / cost.self_cache_bytes == (64 + 4) / 256
            assert by[1][name].cross_cache_bytes <= cost.cross_cache_bytes * (64 + 4) / 256
    assert by[1]["decoder-only"].memory.peak_bytes < by[0]["decoder-only"].memory.peak_bytes
