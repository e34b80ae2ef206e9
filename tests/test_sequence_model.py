"""Sequence models: every layout's programs, run token by token, answer what the model trained by teacher forcing answers; and so do built ones."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from edgesdk.devices import load_device
from edgesdk.errors import InputError
from edgesdk.graph import trace
from edgesdk.graph.torch_trace import trace_method
from edgesdk.lower.check import relative_error
from edgesdk.lower.executorch import lower_executorch, quantized_modules
from edgesdk.lower.held import pte_operators
from edgesdk.lower.litert import lower_litert
from edgesdk.model import Method, ModelSpec
from edgesdk.plan.fake_quant import quantized
from edgesdk.plan.options import SMALL_TABLE, options
from edgesdk.runner import open_program
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.config import SequenceConfig, Sound, Stack
from edgesdk.sequence.export import Lengths, sequence_spec
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.programs import Programs
from edgesdk.sequence.session import Session, encode

VOCAB, WINDOW, LONGEST = 64, 4, 16


def stack(layers: int = 2, dim: int = 32, windows: tuple[int, ...] = ()) -> Stack:
    return Stack(layers=layers, dim=dim, heads=4, kv_heads=2, head=16, ffn=64, windows=windows)


def config(layout: str, **more: Any) -> SequenceConfig:
    fields: dict[str, Any] = {"encoder": stack()} if layout in ("encoder-decoder", "encoder-ctc") else {}
    fields |= {"decoder": stack()} if layout != "encoder-ctc" else {}
    return SequenceConfig(**{"layout": layout, "vocab": VOCAB, "max_positions": 64, **fields, **more})


BIASED = {"norm": "layer", "qkv_bias": True, "out_bias": True, "ffn_bias": True, "gated": False, "positions": "learned"}
LAYOUTS = {
    "encoder-decoder": config("encoder-decoder", decoder=stack(1, 64)),
    "relative": config("encoder-decoder", positions="relative", relative_buckets=8, relative_distance=12, attention_scale=1.0, logit_scale=0.2),
    "post-norm": config("encoder-decoder", **{**BIASED, "positions": "sinusoidal"}, norm_place="post", final_norm=False, head_bias=True, embed_norm=True),
    "sound": config("encoder-decoder", **BIASED, k_bias=False, activation="gelu", sound=Sound(features=6, frames=32), position_offset=2),
    "ctc": config("encoder-ctc", encoder=stack(windows=(0, WINDOW)), tied=False, head_bias=True),
    "decoder-only": config("decoder-only", qk_norm=True, embed_scale=4.0),
    "windowed": config("decoder-only", decoder=stack(windows=(WINDOW, 0))),
    "decoder-decoder": config("decoder-decoder", decoder=stack(4, windows=(WINDOW, WINDOW, 0, 0)), shared_from=2),
}  # fmt: skip


@cache
def model_of(layout: str) -> SequenceModel:
    torch.manual_seed(0)
    model = SequenceModel(LAYOUTS[layout]).eval()
    for parameter in model.parameters():  # norms and biases that do something
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def start_of(layout: str) -> tuple[int, ...]:
    return (1, 2, 3) if layout == "sound" else (1,)


def spec_of(layout: str, **more: Any) -> ModelSpec:
    fields = {"source_lengths": (8, LONGEST), "cache_lengths": (12, 32), "batch": 2, "several": (3,)}
    return sequence_spec(model_of(layout), name=layout, start=start_of(layout), eos=(2,), **{**fields, **more})


def run_of(spec: ModelSpec) -> Any:
    def run(name: str, arrays: Any) -> list[Any]:
        assert [a.shape for a in arrays] == [tuple(t.shape) for t in spec.methods[name].example_inputs]
        assert [str(torch.from_numpy(a).dtype) for a in arrays] == [str(t.dtype) for t in spec.methods[name].example_inputs]
        with torch.no_grad():
            out = spec.methods[name].module(*(torch.from_numpy(np.array(a)) for a in arrays))
        return [o.numpy() for o in (out if isinstance(out, tuple) else (out,))]

    return run


def sources(layout: str, lengths: tuple[int, int] = (5, 8)) -> list[Any]:
    """Two of unequal length, one of which fills the shorter bucket; behind no encoder, with the start token."""
    rng = np.random.default_rng(0)
    lengths = lengths if LAYOUTS[layout].encoder else (lengths[0] - 2, lengths[1] - 1)
    if LAYOUTS[layout].sound:
        return [rng.standard_normal((6, 2 * n)).astype(np.float32) for n in lengths]
    return [[int(t) for t in rng.integers(4, VOCAB, n)] for n in lengths]


def forced(layout: str, source: Any, tokens: list[int]) -> Any:
    """Logits [len(tokens), V] of one unpadded answer, all at once."""
    given = torch.tensor(source)[None]
    with torch.no_grad():
        return model_of(layout)(given, None, torch.tensor(tokens)[None])[0].numpy()


def stepped(
    spec: ModelSpec, run: Any, layout: str, widths: tuple[int, ...], lengths: tuple[int, int] = (5, 8)
) -> tuple[Any, Any, dict[str, int]]:
    """Logits [rows, 1 + tokens, V] of an answer fed `widths` tokens at a time, those of teacher forcing, and what was called."""
    card = Card.read(spec.files[NAME])
    rows, total, start = next(iter(card.methods.values()))["batch"], sum(widths), start_of(layout)
    given = sources(layout, lengths)[-rows:]
    answer = np.random.default_rng(1).integers(4, VOCAB, (rows, total))
    wanted = np.stack([forced(layout, s, [*start, *a]) for s, a in zip(given, answer.tolist(), strict=True)])[:, len(start) - 1 :]
    programs = Programs(card, run)
    session, at = Session(programs, given), 0
    logits = [session.logits[:, None]]
    for width in widths:
        logits.append(session.feed(answer[:, at : at + width]))
        session.keep(np.full(rows, width))
        at += width
    return np.concatenate(logits, 1), wanted, programs.calls


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "ctc"])
def test_programs_token_by_token_equal_teacher_forcing(layout):
    """Two rows of unequal length in one batch; caches that fill up, move to the next bucket and wrap around; one and three tokens at once."""
    spec = spec_of(layout)
    logits, wanted, calls = stepped(spec, run_of(spec), layout, (1, 3, 1, 3, 3, 1, 3, 3, 1, 1))
    np.testing.assert_allclose(logits, wanted, atol=2e-5)
    assert any(n.endswith("_x3") for n in calls)
    assert {Card.read(spec.files[NAME]).methods[n]["cache"] for n in calls if n.startswith("decode")} == {12, 32}


def test_encoder_only_is_the_model_itself_whatever_is_padded():
    spec, given = spec_of("ctc"), sources("ctc")
    (logits,), mask, size = encode(Programs(Card.read(spec.files[NAME]), run_of(spec)), given)
    assert size == 8 and list(spec.methods) == ["encode_8", "encode_16"]
    for b, source in enumerate(given):
        with torch.no_grad():
            alone = model_of("ctc")(torch.tensor(source)[None])[0].numpy()
        np.testing.assert_allclose(logits[b][mask[b] == 0], alone, atol=2e-5)


def test_training_on_a_padded_batch_is_training_on_each_row():
    for layout in ("encoder-decoder", "windowed", "decoder-decoder", "relative"):
        given = sources(layout)
        longest = max(map(len, given))
        source = torch.zeros(2, longest, dtype=torch.int64)
        mask = torch.full((2, longest), -1e4)
        for b, s in enumerate(given):
            source[b, : len(s)], mask[b, : len(s)] = torch.tensor(s), 0
        tokens = torch.arange(4, 24).reshape(2, 10)
        with torch.no_grad():
            together = model_of(layout)(source, mask, tokens)
        for b, s in enumerate(given):
            np.testing.assert_allclose(together[b].numpy(), forced(layout, s, tokens[b].tolist()), atol=2e-5)


def test_prefill_of_one_shared_cache_leaves_out_what_only_the_last_token_needs():
    model, calls = model_of("decoder-decoder"), []
    hooks = [layer.register_forward_hook(lambda m, i, o: calls.append(i[0].shape[1])) for layer in model.decoder.layers]
    tokens, positions = torch.arange(6)[None], torch.arange(6)[None]
    with torch.no_grad():
        early, caches = model.prefill(tokens, positions, torch.tensor([5]), torch.zeros(1, 6))
        whole = model(None, None, tokens)
        _, full = model.decoder(model.tokens(tokens), positions, model.decoder.masks(torch.zeros(1, 6), positions))
    [h.remove() for h in hooks]
    assert calls[:4] == [6, 6, 1, 1]
    assert all(torch.equal(a, b) for pair, other in zip(caches, full, strict=True) for a, b in zip(pair, other, strict=True))
    torch.testing.assert_close(early[0], whole[0, -1], atol=1e-5, rtol=0)


# ---- what the spec says


def test_methods_are_named_by_the_lengths_that_differ():
    names = list(spec_of("encoder-decoder").methods)
    assert names[:2] == ["encode_8", "encode_16"] and "decode_8_12" in names and "decode_16_32_x3" in names and len(names) == 10
    assert list(spec_of("encoder-decoder", source_lengths=(8,), cache_lengths=(12,), several=()).methods) == ["encode", "decode"]
    assert list(spec_of("sound", source_lengths=(8,), cache_lengths=(12,), several=()).methods) == ["encode", "prefill", "decode"]
    assert list(spec_of("decoder-only", source_lengths=(8,), several=()).methods) == ["prefill", "decode_12", "decode_32"]


def test_unroll_counts_what_a_usual_answer_calls():
    unrolls = {n: m.unroll for n, m in spec_of("encoder-decoder", typical_source=6, typical_output=20).methods.items()}
    assert unrolls["encode_8"] == 1 and unrolls["encode_16"] == 0
    assert (unrolls["decode_8_12"], unrolls["decode_8_32"], unrolls["decode_16_12"], unrolls["decode_8_12_x3"]) == (13, 7, 0, 0)
    unrolls = {n: m.unroll for n, m in spec_of("decoder-only", typical_source=10, typical_output=5).methods.items()}
    assert unrolls["prefill_16"] == 1 and (unrolls["decode_12"], unrolls["decode_32"]) == (3, 1)


def test_the_graph_knows_caches_by_name_and_shares_weights_over_methods():
    spec = spec_of("decoder-decoder", batch=1)
    graph = trace_method(spec.methods["decode_12"], "decode_12")
    assert graph.cache_inputs == tuple(f"self_{x}_{i}" for i in range(3) for x in "kv") and not graph.cross_cache_inputs
    assert [i.name for i in graph.inputs][:4] == ["tokens", "positions", "mask", "window_mask"]
    other = trace_method(spec.methods["prefill_8"], "prefill_8")
    matrices = [{u.weight for u in g.units if u.op == "linear"} for g in (graph, other)]
    assert matrices[0] == matrices[1] and "core.head.weight" in matrices[0] and "core.decoder.shared.k.weight" in matrices[0]
    cross = trace_method(spec_of("encoder-decoder").methods["decode_8_12"], "decode")
    assert cross.cross_cache_inputs == ("cross_k_0", "cross_v_0") and cross.cache_inputs == ("self_k_0", "self_v_0")


def test_the_digest_follows_weights_and_lengths():
    one, two = spec_of("windowed"), spec_of("windowed", cache_lengths=(12, 24))
    assert one.digest == spec_of("windowed").digest != two.digest
    before = model_of("windowed").head
    with torch.no_grad():
        model_of("windowed").embed.weight[0, 0] += 1
        changed = spec_of("windowed").digest
        model_of("windowed").embed.weight[0, 0] -= 1
    assert changed != one.digest and model_of("windowed").head is before is None


def test_calibration_is_what_the_programs_meet():
    spec = spec_of("encoder-decoder", batch=1, max_output=5, prompts=sources("encoder-decoder"))
    assert len(spec.calibration("encode_8")) == 2 and len(spec.calibration("encode_16")) == 1
    step = spec.calibration("decode_8_12")[1]
    assert [t.shape for t in step] == [t.shape for t in spec.methods["decode_8_12"].example_inputs] and int(step[1]) == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"cache_lengths": (12, 64)}, "cache lengths need 67 positions, the model has 64"),
        ({"source_lengths": ()}, "sources ()"),
        ({"several": (1,)}, "several (1,)"),
        ({"start": ()}, "start = ()"),
        ({"source_lengths": (20,)}, "a source of 20 halved frames"),
    ],
)
def test_lengths_that_cannot_be(fields, text):
    with pytest.raises(InputError) as error:
        sequence_spec(
            model_of("sound"), name="x", **{"source_lengths": (8,), "cache_lengths": (8,), "several": (3,), "start": (1,), **fields}
        )
    assert text in error.value.what


def test_a_prompt_longer_than_the_cache():
    with pytest.raises(InputError, match="caches of 8 slots for prompts of 16"):
        Lengths(LAYOUTS["decoder-only"], (16,), (8,), 1, (), 1).check("x")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"layout": "decoder-only", "sound": Sound(features=4, frames=8)}, "sound goes with an encoder"),
        ({"layout": "encoder-ctc", "sound": Sound(features=4, frames=8)}, "has no embedding"),
        ({"layout": "decoder-only", "decoder": stack(windows=(2, 4))}, "of one size"),
        ({"layout": "decoder-only", "decoder": stack(windows=(2, 2)), "positions": "relative"}, "relative positions go with"),
        ({"layout": "decoder-decoder", "decoder": stack(windows=(2, 2)), "shared_from": 1}, "see all"),
        ({"layout": "decoder-decoder", "shared_from": 2}, "shared_from = 2 of 2 layers"),
    ],
)
def test_configurations_that_cannot_be(fields, text):
    with pytest.raises(ValidationError, match=text):
        config(**fields)


# ---- built programs

TIGHT, APPROXIMATED, TURNED = 1e-5, 2e-3, 0.05
"""Largest relative errors of a call against eager PyTorch with the same weights and the same rounding of activations; where XNNPACK approximates
GELU; and where an activation that lies between two codes fell to the other side, which sums in another order let happen now and then."""


class Beside:
    """`run`, each of whose calls is given to `other` as well: `errors` has the worst of each call's outputs."""

    def __init__(self, run: Any, other: Any) -> None:
        self.run, self.other, self.errors = run, other, []

    def __call__(self, name: str, arrays: Any) -> Any:
        out, refs = self.run(name, arrays), self.other(name, arrays)
        assert [o.shape for o in out] == [r.shape for r in refs], name
        self.errors.append(max(relative_error(o, r) for o, r in zip(out, refs, strict=True)))
        return out

    def check(self, precision: str, approximated: bool) -> None:
        rounds, limit = precision in ("int8-dynamic", "int4-g32"), APPROXIMATED if approximated else TIGHT
        assert max(self.errors) <= (TURNED if rounds else limit), self.errors
        assert (rounds and approximated) or sum(e > limit for e in self.errors) <= rounds * max(1, len(self.errors) // 4), self.errors


def quantized_alike(spec: ModelSpec, choice: dict[tuple[str, str], str], runtime: str, undo: ExitStack) -> Any:
    """`run` of eager PyTorch that rounds weights and activations as the runtime's program does."""
    if runtime == "executorch":
        modules = quantized_modules(spec, choice)
        return run_of(replace(spec, methods={n: replace(m, module=modules[n]) for n, m in spec.methods.items()}))
    graph = trace(spec)
    undo.enter_context(
        quantized(spec, graph, {u.weight: choice[m.name, u.name] for m in graph.methods for u in m.units if (m.name, u.name) in choice}, {})
    )
    return run_of(spec)


def filling(layout: str, slots: int, wide: bool) -> tuple[int, ...]:
    """Widths of calls that fill caches of `slots` to the last."""
    left, widths = slots - len(start_of(layout)) - (0 if LAYOUTS[layout].encoder else 7), []
    while left:
        widths.append(3 if wide and left >= 3 and widths[-1:] != [3] else 1)
        left -= widths[-1]
    return tuple(widths)


def lowered(spec: ModelSpec, runtime: str, precision: str, tmp_path: Any) -> tuple[Any, dict[tuple[str, str], str]]:
    """The runner of a built program, and what each of its units is held in."""
    choice = {} if precision == "fp32" else {
        (n, u.name): precision for n, m in spec.methods.items() for u in trace_method(m, n).units
        if u.op == "linear" and u.weight == f"{u.name.split('#')[0]}.weight"
    }  # fmt: skip
    path = tmp_path / ("m.pte" if runtime == "executorch" else "m.tflite")
    path.write_bytes((lower_executorch if runtime == "executorch" else lower_litert)(spec, choice, lambda text: None))
    return open_program(str(path), runtime), choice


def built(layout: str, runtime: str, precision: str, tmp_path: Any, **more: Any) -> None:
    """Lower; compare every output on the example inputs, and every step's logits until the caches are full, with eager PyTorch that has the
    same weights. The distance to the float model is that of the precision, which few bits of random weights let grow large."""
    spec = spec_of(layout, **{"source_lengths": (8,), "cache_lengths": (12,), "batch": 1, "several": (), **more})
    runner, choice = lowered(spec, runtime, precision, tmp_path)
    with ExitStack() as undo:
        run = Beside(runner.run, quantized_alike(spec, choice, runtime, undo))
        for name, method in spec.methods.items():
            run(name, [t.numpy() for t in method.example_inputs])
        if LAYOUTS[layout].decoder:
            logits, wanted, _ = stepped(spec, run, layout, filling(layout, 12, "several" in more))
            assert relative_error(logits, wanted) <= (APPROXIMATED if precision == "fp32" else 0.9), "from the float model"
    run.check(precision, LAYOUTS[layout].activation == "gelu" and runtime == "executorch")


class Looked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = torch.nn.Embedding(SMALL_TABLE // 64, 64), torch.nn.Linear(64, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids))


def test_a_large_table_can_be_int8_in_a_pte(tmp_path):
    """It is offered, stored as such, what the check of held precisions sees, and right."""
    torch.manual_seed(0)
    spec = ModelSpec("looked", "looked-1", {"forward": Method(Looked().eval().requires_grad_(False), (torch.tensor([[3, 9, 4000]]),))})
    table = trace_method(spec.methods["forward"], "forward").units[0]
    assert options(table, "forward", "executorch", load_device("host")) == ["fp32", "int8-weight-only"]
    assert options(table.model_copy(update={"rows": 64}), "forward", "executorch", load_device("host")) == ["fp32"]
    choice = {("forward", "table"): "int8-weight-only"}
    content = lower_executorch(spec, choice, lambda text: None)
    assert SMALL_TABLE <= len(content) < 1.2 * SMALL_TABLE
    held = [h.precision for h in pte_operators(content) or () if h.embedding]
    assert held == ["int8-weight-only"]
    path = tmp_path / "m.pte"
    path.write_bytes(content)
    inputs = spec.methods["forward"].example_inputs
    (out,) = open_program(str(path), "executorch").run("forward", [inputs[0].numpy()])
    assert relative_error(out, spec.methods["forward"].module(*inputs).numpy()) < 0.02


SMALL = [("encoder-decoder", "executorch", "int4-g32"), ("encoder-decoder", "litert", "int8-dynamic")]
PRECISIONS = {"executorch": ("fp32", "int8-dynamic", "int4-g32"), "litert": ("fp32", "int8-dynamic", "int8-weight-only")}
ALL = [(layout, runtime, p) for layout in LAYOUTS for runtime, kinds in PRECISIONS.items() for p in kinds]
BUCKETS = [(layout, runtime) for layout in ("encoder-decoder", "windowed", "decoder-decoder") for runtime in PRECISIONS]


@pytest.mark.parametrize(("layout", "runtime", "precision"), SMALL)
def test_built_programs_equal_eager(layout, runtime, precision, tmp_path):
    built(layout, runtime, precision, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("layout", "runtime", "precision"), [c for c in ALL if c not in SMALL])
def test_all_built_programs_equal_eager(layout, runtime, precision, batch, tmp_path):
    """Sources that fill their bucket (batch 1), and one of them padded beside it (batch 2)."""
    built(layout, runtime, precision, tmp_path, batch=batch, **({"several": (3,)} if LAYOUTS[layout].decoder else {}))


@pytest.mark.wide
@pytest.mark.parametrize(("layout", "runtime"), BUCKETS)
def test_built_programs_at_the_edges_of_buckets(layout, runtime, tmp_path):
    """A source that just fits a bucket and one that is a token too long for it; answers that move to the larger cache and fill it."""
    spec = spec_of(layout, source_lengths=(8, 12), cache_lengths=(12, 16), batch=2, several=())
    runner, choice = lowered(spec, runtime, "int8-dynamic", tmp_path)
    with ExitStack() as undo:
        run = Beside(runner.run, quantized_alike(spec, choice, runtime, undo))
        for lengths, bucket in (((5, 8), 8), ((5, 9), 12)):
            widths = (1,) * (16 - (1 if LAYOUTS[layout].encoder else lengths[1]))
            _, _, calls = stepped(spec, run, layout, widths, lengths)
            assert {n for n in calls if n.startswith(("encode", "prefill"))} == {
                f"{'encode' if LAYOUTS[layout].encoder else 'prefill'}_{bucket}"
            }
            assert {Card.read(spec.files[NAME]).methods[n]["cache"] for n in calls if n.startswith("decode")} == {12, 16}
    run.check("int8-dynamic", False)
