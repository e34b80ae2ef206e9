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
from edgesdk.lower import lower
from edgesdk.lower.check import relative_error
from edgesdk.plan import plan
from edgesdk.plan.lengths import Lengths
from edgesdk.plan.types import Budget, Plan, Workload
from edgesdk.sequence.caches import Caches, codes, held, small_codes
from edgesdk.sequence.card import NAME, Card, token_bytes
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.costs import decode
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.generate import generate
from edgesdk.sequence.hub import Checkpoint, Specials
from edgesdk.sequence.layers import from_small_codes
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.prefixes import Prefixes
from edgesdk.sequence.saved import Saved, save
from edgesdk.sequence.search import search
from edgesdk.sequence.sizes import Sizes

CACHED = [n for n, c in LAYOUTS.items() if c.decoder]
LENGTHS = {"input_length": Lengths.of([(512, 1.0)]), "output_length": Lengths.of([(64, 1.0)])}
WALK = (1, 3, 1, 3, 3, 1, 3, 3, 1, 1)


def floats(run: Any, spec: Any) -> Any:
    """`run` of programs with float caches, called as those with narrow caches are: what is held becomes the numbers it stands for."""

    def number(name: str, array: Any, given: dict[str, Any]) -> Any:
        kind, _, at = name.rpartition("_")
        beside = given.get(f"{kind}_scale_{at}")
        if array.dtype == np.float16:
            return array.astype(np.float32)
        if array.dtype == np.int8:
            return array.astype(np.float32) * beside[..., None]
        if array.dtype != np.uint8:
            return array
        both = np.concatenate([array & 15, array >> 4], -1).astype(np.float32)
        pairs = beside.astype(np.float32).reshape(*beside.shape[:-1], -1, 2)
        parts = both.reshape(*pairs.shape[:-1], -1)
        return (parts * pairs[..., :1] + pairs[..., 1:]).reshape(both.shape)

    def call(name: str, arrays: Any) -> Any:
        given = dict(zip(spec.methods[name].module.input_names, arrays, strict=True))
        return run(name, [number(n, a, given) for n, a in given.items() if "_scale_" not in n])

    return call


NARROW = {16: 2e-3, 8: 0.03, 4: 0.35}
"""Bits of a cache, and how far logits may be from those of float caches."""


@pytest.mark.parametrize("bits", NARROW)
@pytest.mark.parametrize("layout", CACHED)
def test_narrow_caches_compute_what_float_caches_of_the_same_values_do(layout, bits):
    """Two rows of unequal length, one and three tokens at once, caches that fill up, grow and wrap around."""
    spec, plain = spec_of(layout, cache_bits=bits), spec_of(layout)
    run = Beside(
        run_of(spec), floats(run_of(plain), spec)
    )  # both are given the same codes: on their own a key between two could fall to either
    logits, float_logits, calls = stepped(spec, run, layout, WALK)
    run.check("fp32", False)
    assert any(n.endswith("_x3") for n in calls) and any("_12" in n for n in calls) and any("_32" in n for n in calls)
    assert 0 < relative_error(logits, float_logits) < NARROW[bits]


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


def test_four_bits_are_within_half_a_step_of_each_group():
    given = np.random.default_rng(0).standard_normal((2, 3, 5, 128)).astype(np.float32) * 3 + 1
    given[0, 0, 0], given[0, 0, 1], given[0, 0, 2, 7] = 0, 4.5, 1e9
    found, beside = small_codes(given)
    assert found.shape == (2, 3, 5, 64) and beside.shape == (2, 3, 5, 4) and found.dtype == np.uint8 and beside.dtype == np.float16
    numbers = from_small_codes(torch.from_numpy(found), torch.from_numpy(beside)).numpy()
    low, high = (getattr(np.clip(given, -65504, 65504).reshape(2, 3, 5, 2, 64), f)(-1) for f in ("min", "max"))
    room = 0.51 * (high - low) / 15 + 2e-3 * np.maximum(np.abs(low), np.abs(high))
    assert (np.abs(numbers - np.clip(given, -65504, 65504)).reshape(2, 3, 5, 2, 64) <= room[..., None]).all()
    assert not numbers[0, 0, 0].any() and np.isfinite(numbers).all()
    assert [a.dtype for a in held([given, given], 16)] == [np.float16] * 2 and np.isfinite(held([given], 16)[0]).all()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_planner_s_programs_are_the_traced_ones(bits):
    """Caches by their bytes, what reads them by its elements, whether a model is there or not."""
    spec = spec_of("decoder-only", batch=1, cache_bits=bits)
    traced = trace_method(spec.methods["decode_32"], "decode_32")
    made = decode(LAYOUTS["decoder-only"], 1, 32, cache_bits=bits).graph
    assert [(t.shape, t.dtype) for t in made.inputs if t.name in made.cache_inputs] == [
        (t.shape, t.dtype) for t in traced.inputs if t.name in traced.cache_inputs
    ]
    read = [[(u.in_elements, u.out_elements) for u in g.units if u.op == "quantize"] for g in (made, traced)]
    assert read[0] == read[1] and len(read[0]) == 4
    held = Caches(Card.read(spec.files[NAME]), 1, 32)
    config = LAYOUTS["decoder-only"]
    assert held.nbytes == 2 * config.decoder.layers * config.decoder.kv_heads * 32 * token_bytes(bits, config.decoder.head)


def test_caches_take_a_quarter_and_the_planner_counts_it():
    wide, narrow = (spec_of("decoder-only", batch=1, cache_bits=bits) for bits in (32, 8))
    cards = [Card.read(s.files[NAME]) for s in (wide, narrow)]
    held = [Caches(c, 1, 32).nbytes for c in cards]
    assert held[1] / held[0] == (16 + 4) / (4 * 16)
    assert cards[1].cache_bits == 8 and "cache_bits" not in cards[0].to_bytes().decode() and wide.digest != narrow.digest
    graphs = [trace_method(s.methods["decode_32"], "decode_32") for s in (wide, narrow)]
    assert graphs[1].cache_inputs == tuple(f"self_{x}_{i}" for i in range(2) for x in ("k", "v", "k_scale", "v_scale"))
    assert sum(u.op == "quantize" for u in graphs[1].units) == 4 and not any(u.op == "quantize" for u in graphs[0].units)


@pytest.mark.parametrize(
    ("layout", "bits"), [("encoder-decoder", 8), ("decoder-only", 8), ("windowed", 8), ("decoder-only", 16), ("windowed", 4)]
)
def test_beams_prefixes_and_batches_go_through_narrow_caches(layout, bits):
    spec = spec_of(layout, batch=1, cache_bits=bits)
    card, run, given = Card.read(spec.files[NAME]), run_of(spec), sources(layout)
    alone = [r.tokens for s in given for r in generate(run, card, [s], Settings(max_tokens=12))]
    assert [r.tokens for r in generate(run, card, given, Settings(max_tokens=12))] == alone
    (one,) = generate(run, card, given[:1], Settings(max_tokens=12, beams=1))
    assert one.tokens == alone[0] and generate(run, card, given[:1], Settings(max_tokens=6, beams=3))[0].tokens
    for kept_bits in (32, 8):
        kept = Prefixes(1 << 20, bits=kept_bits)
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
    odd = SequenceModel(
        SequenceConfig(
            layout="decoder-only", vocab=20, decoder=Stack(layers=1, dim=14, heads=2, kv_heads=2, head=7, ffn=8), positions="learned"
        )
    )
    with pytest.raises(InputError, match="heads of 7 columns"):
        sequence_spec(odd, name="odd", start=(1,), cache_bits=4)
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


@pytest.mark.parametrize("bits", [16, 4])
def test_other_runtimes_refuse_what_only_our_kernels_read(saved_model, bits, capsys):
    for runtime in ("executorch", "litert"):
        with pytest.raises(InputError, match=f"{runtime} takes caches of 32 and 8 bits"):
            plan(saved_model, "pi5", runtime=runtime, workload=Workload(cache_bits=bits))
        with pytest.raises(InputError, match=f"{runtime} takes caches of 32 and 8 bits"):
            lower(spec_of("decoder-only", cache_bits=bits), runtime, {}, lambda text: None)
        with pytest.raises(InputError, match=f"{runtime} takes caches of 32 and 8 bits"):
            search("pi5", parameters=20_000_000, vocab=4000, cache_bits=bits, runtime=runtime, **LENGTHS)
    with pytest.raises(InputError, match="has no runtime native"):
        plan(saved_model, "galaxy-s22", workload=Workload(cache_bits=bits))
    found = plan(saved_model, "pi5", workload=Workload(cache_bits=bits))
    assert found.runtime == "native"


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
    rows = [search("pi5", parameters=20_000_000, vocab=4000, cache_bits=bits, **LENGTHS).rows for bits in (32, 8)]
    by = [{r.layout: r.cost for r in found} for found in rows]
    for name, cost in by[0].items():
        if cost and cost.self_cache_bytes:
            assert by[1][name].self_cache_bytes / cost.self_cache_bytes == (64 + 4) / 256
            assert by[1][name].cross_cache_bytes <= cost.cross_cache_bytes * (64 + 4) / 256
    assert by[1]["decoder-only"].memory.peak_bytes < by[0]["decoder-only"].memory.peak_bytes
