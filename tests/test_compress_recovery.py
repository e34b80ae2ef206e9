"""Ternary weights, quantization-aware training, distillation and low-rank recovery."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgesdk.compress as compress
from edgesdk.compress import distill, training
from edgesdk.compress.distill import DistillConfig
from edgesdk.compress.features import cka, enhanced, information
from edgesdk.compress.generated import Calls, chain_of, more_rows, random_texts, self_generated, stacked
from edgesdk.compress.learned import learn
from edgesdk.compress.lessons import Lessons, gap, stored_cache
from edgesdk.compress.registry import configured
from edgesdk.compress.saved import load
from edgesdk.compress.types import Weight
from edgesdk.compress.weights import weights_of
from edgesdk.errors import InputError
from edgesdk.intake import load_model
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import Code, decode, pack, unpack
from edgesdk.plan.fake_quant import run
from edgesdk.sequence.card import Card
from edgesdk.sequence.generate import generate
from edgesdk.sequence.tokens import tokenizer_of

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESDK_CACHE", str(tmp_path / "cache"))


def holds_its_codes(spec: ModelSpec) -> bool:
    """Whether every module computes with just what its code decodes to, also after the code was written and read."""
    now = weights_of(spec)
    return all(np.array_equal(decode(unpack(pack(code))), now[name].matrix.numpy()) for name, code in spec.codes.items())


def weight(rows: int = 40, cols: int = 70, seed: int = 0) -> Weight:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return Weight("layer.weight", "linear", (rows, cols), matrix)


def ternary(given: Weight, **settings: object) -> Code:
    method, config = configured("ternary", settings)
    code = method.apply(given, None, config)  # type: ignore[call-arg, arg-type]
    assert isinstance(code, Code) and np.array_equal(decode(unpack(pack(code))), decode(code))
    return code


def error(code: Code, given: Weight) -> float:
    return float(((torch.from_numpy(decode(code)) - given.matrix) ** 2).sum())


# ---- ternary without training


@pytest.mark.parametrize("fit", ["search", "mean", "median"])
@pytest.mark.parametrize(("per", "group"), [("tensor", 0), ("row", 0), ("row", 32), ("row", 7)])
def test_ternary_weights_take_three_values_a_scale_in_less_than_two_bits(fit: str, per: str, group: int) -> None:
    given = weight(64, 160)
    code = ternary(given, fit=fit, per=per, group=group)
    q, scale, _ = code.arrays
    assert set(np.unique(q)) <= {0, 1, 2} and np.array_equal(decode(ternary(given, fit=fit, per=per, group=group)), decode(code))
    digits = -(-q.size // 5)
    assert digits + scale.size * 2 <= len(pack(code, entropy=False)) <= digits + scale.size * 2 + 40


def test_the_searched_scale_has_the_least_error_of_all_scales() -> None:
    given = weight(6, 50)
    best = error(ternary(given), given)
    for fit in ("mean", "median"):
        assert best <= error(ternary(given, fit=fit), given)
    for row in given.matrix:
        found = ternary(Weight("w", "linear", (1, 50), row[None]))
        tried = [float(((torch.clamp(torch.round(row / s), -1, 1) * s - row) ** 2).sum()) for s in torch.linspace(0.05, 3, 600)]
        assert error(found, Weight("w", "linear", (1, 50), row[None])) <= min(tried) * 1.001


def test_bitnet_scale_and_sane_zero_rows() -> None:
    given = weight()
    code = ternary(given, fit="mean", per="tensor")
    assert code.arrays[1].shape == (1, 1) and abs(float(code.arrays[1][0, 0]) - float(given.matrix.abs().mean())) < 1e-3
    matrix = given.matrix.clone()
    matrix[3] = 0
    values = decode(ternary(Weight("w", "linear", (40, 70), matrix)))
    assert np.all(values[3] == 0) and np.isfinite(values).all()
    again = ternary(Weight("w", "linear", (40, 70), torch.from_numpy(values)))
    assert np.array_equal(decode(again), values)  # ternary weights stay as they are


# ---- codes that can be trained


@functools.cache
def codes() -> dict[str, Code]:
    given = weight(12, 32)
    answer: dict[str, Code] = {}
    for name, recipe in {
        "grid": ("rtn", {"bits": 3, "group": 8}), "asymmetric": ("rtn", {"bits": 4, "group": 0, "symmetric": False}),
        "short group": ("rtn", {"bits": 4, "group": 5}), "ternary": ("ternary", {"group": 16}), "tensor": ("ternary", {"per": "tensor"}),
        "table": ("any4", {"bits": 3}), "lowrank": ("svd", {"rank": 4, "bits": 8, "data": False}), "half": ("svd", {"rank": 4, "bits": 16, "data": False}),
    }.items():  # fmt: skip
        method, config = configured(*recipe)
        answer[name] = method.apply(given, None, config)  # type: ignore[call-arg, arg-type]
    grid, shape = answer["grid"], (12, 32)
    generator = np.random.default_rng(0)
    mask = (generator.random(shape) < 0.5).astype(np.uint8)
    values = Code("dense", (1, int(mask.sum())), (), (generator.normal(size=(1, int(mask.sum()))).astype(np.float32),))
    vector = (
        generator.integers(0, 6, (12, 8)).astype(np.uint8),
        generator.normal(size=(6, 4)).astype(np.float16),
        np.ones((12, 1), np.float16),
    )
    return answer | {
        "sum": Code("sum", shape, (), (), (grid, answer["lowrank"])),
        "sparse": Code("sparse", shape, (), (mask,), (values,)),
        "masked": Code("masked", shape, (), (mask,), (grid,)),
        "vector": Code("vector", shape, (4, 0), vector),
        "scaled": Code("scaled", shape, (), (np.zeros(0, np.float32), np.linspace(1, 2, 32, dtype=np.float32)), (grid,)),
        "hadamard": Code("hadamard", shape, (3, 16), (), (grid,)),
        "pick": Code("pick", shape, (1,), (generator.permutation(32).astype(np.uint16),), (grid,)),
        "stack": Code("stack", (24, 32), (0,), (), (grid, answer["table"])),
    }


@pytest.mark.parametrize("kind", list(codes()))
def test_a_trained_code_decodes_to_what_was_trained(kind: str) -> None:
    code = codes()[kind]
    made = learn(code)
    assert np.allclose(made.weight(1.0).detach().numpy(), decode(code), atol=1e-6)
    assert np.array_equal(decode(made.code()), decode(code)) and len(pack(made.code())) <= len(pack(code)) + 8
    wanted = made.weight(1.0).detach() * 1.2
    adam = torch.optim.Adam([{"params": [t], "lr": 0.02 * size} for t, size in made.parameters], eps=1e-12)
    errors = []
    for _ in range(40):
        adam.zero_grad()
        loss = ((made.weight(1.0) - wanted) ** 2).sum()
        loss.backward()
        adam.step()
        errors.append(float(loss.detach()))
    assert min(errors) < 0.6 * errors[0]
    after = made.code()
    assert np.allclose(made.weight(1.0).detach().numpy(), decode(after), atol=1e-5) and after.kind == code.kind
    assert np.array_equal(decode(unpack(pack(after))), decode(after))
    if kind in ("sparse", "masked"):
        assert not decode(after)[code.arrays[0] == 0].any()  # what was pruned stays away
    if code.kind == "grid":
        assert int(after.arrays[0].max()) < 2 ** code.numbers[0]


def test_learning_starts_at_the_rounding_it_is_given_with_the_float_weight_behind_it() -> None:
    given = weight(8, 16)
    code = codes()["grid"]
    code = Code("grid", (12, 32), code.numbers, (np.roll(code.arrays[0], 1, 1), *code.arrays[1:]))  # far from the nearest rounding
    made = learn(code, weight(12, 32).matrix)
    assert np.array_equal(decode(made.code()), decode(code))
    near = learn(ternary(given, fit="mean"), given.matrix)
    behind, rounded = near.weight(0.0).detach(), near.weight(1.0).detach()
    assert float((behind - given.matrix).abs().mean()) < 0.5 * float((rounded - given.matrix).abs().mean())


# ---- inputs and lessons


def test_several_samples_at_once_give_what_they_give_alone() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x  # no `vmap` over this

    for module, shape in ((nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), (1, 2, 3)), (Odd(), (1, 4))):
        spec = ModelSpec(name="m", digest="0" * 64, methods={"forward": Method(module, (torch.zeros(shape),))})
        x = torch.randn(5, *shape)
        out = Calls(spec)("forward", [x])[0]
        assert torch.allclose(out, torch.stack([module(row) for row in x]), atol=1e-6)


@pytest.mark.parametrize("name", ["normalizer", "normalizer-decoder-only"])
def test_a_chain_answers_as_generation_does_and_is_nought_from_itself(name: str) -> None:
    spec = load_model(f"example:{name}")
    chain, card = chain_of(spec), Card.read(spec.files["sequence.json"])
    assert chain is not None
    texts = [tokenizer_of(card, spec.files.__getitem__).encode(t) for t in ("half past nine am", "twelve dollars")]
    rows = chain.inputs(texts)
    assert chain.texts(rows) == texts
    with torch.no_grad():
        answers = chain.answer(Calls(spec), stacked(rows)[0])
    for result, ids, valid in zip(generate(run(spec), card, texts), answers.tokens, answers.valid, strict=True):
        assert [i for i in ids[valid].tolist() if i not in card.eos] == result.tokens
    drawn = random_texts(chain, 50)
    assert all(t[-1] == card.eos[0] and len(t) <= 56 for t in drawn) and max(map(max, drawn)) < card.vocab
    assert chain.texts(chain.inputs(drawn)) == drawn
    lessons = Lessons(spec, spec, pool=24, batch=4)
    assert lessons.sets[0].count == 24 and lessons.held_out() == pytest.approx(0, abs=1e-6)
    coarse = [Lessons(spec, spec, pool=8, batch=4, data="calibration", cache_bits=b).held_out() for b in (8, 4)]
    assert 0 < coarse[0] < coarse[1]  # caches in few bits are felt
    if name == "normalizer-decoder-only":  # a student of another layout gives the same answers in its own way
        other = Lessons(load_model("example:normalizer"), spec, pool=16, batch=4, data="calibration")
        assert other.chain is not None and other.chain.encoder and 0.001 < other.held_out() < 1


def test_chains_that_fit_no_protocol_are_trained_method_by_method() -> None:
    line = nn.Linear(4, 4)
    spec = ModelSpec(
        name="m", digest="0" * 64, layout="decoder-only", calibration=lambda _: [(torch.randn(1, 4),) for _ in range(8)],
        methods={m: Method(line, (torch.zeros(1, 4),)) for m in ("prefill", "decode")},
    )  # fmt: skip
    assert chain_of(spec) is None and {s.method for s in Lessons(spec, spec).sets} == {"prefill", "decode"}


def test_further_rows_follow_the_given_ones_and_end_like_them() -> None:
    rows = torch.tensor([[5, 6, 7, 5, 6, 8, 0, 0], [6, 7, 5, 6, 7, 8, 0, 0], [7, 5, 6, 8, 0, 0, 0, 0]])
    more = more_rows(rows, 20, order=2)
    assert 0 < len(more) <= 20 and bool((more[:, -1] == 0).all()) and torch.equal(more, more_rows(rows, 20, order=2))
    pairs = {tuple(r[i : i + 2].tolist()) for r in rows for i in range(7)}
    assert {tuple(r[i : i + 2].tolist()) for r in more for i in range(7)} <= pairs


# ---- training with rounded weights


def mlp(seed: int = 0, **more: Any) -> ModelSpec:
    """A small network with a tied embedding, ordinary and grouped convolutions, over 24 unlabeled inputs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.conv = nn.Conv1d(16, 24, 3, padding=1)
            self.grouped = nn.Conv1d(24, 24, 3, padding=1, groups=4)
            self.hidden = nn.Linear(24, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.grouped(torch.relu(self.conv(self.embed(ids).transpose(1, 2)))))
            out: torch.Tensor = self.head(self.hidden(x.transpose(1, 2)))
            return out

    torch.manual_seed(seed)
    rows = [(torch.randint(0, 20, (1, 9)),) for _ in range(24)]
    return ModelSpec(
        name="net",
        digest="1" * 64,
        methods={"forward": Method(Net().eval(), rows[0])},
        calibration=lambda _: rows,
        quality_name="accuracy",
        **more,
    )


@pytest.mark.parametrize("recipe", [
    ["rtn:bits=3,group=7", "qat:steps=12,batch=8"], ["any4:bits=3", "qat:steps=12,batch=8"], ["ternary-qat:steps=12,batch=8,least=4"],
    ["rtn@conv|grouped:bits=2", "ternary-qat:steps=12,batch=8,only=hidden"], ["gptq:bits=2", "lora:rank=2,steps=12,batch=8"],
])  # fmt: skip
def test_recovery_leaves_codes_that_are_what_the_modules_compute_with(recipe: list[str], tmp_path: Path) -> None:
    made = compress.compress(mlp(), recipe)
    assert holds_its_codes(made.spec) and all(r.bytes == len(pack(made.spec.codes[r.weight])) for r in made.report.weights)
    net = made.spec.methods["forward"].module
    assert net.head.weight is net.embed.weight
    again = compress.compress(mlp(), recipe)
    assert again.report.compressed_digest == made.report.compressed_digest  # the seed decides everything
    read = load(made.save(tmp_path / "m.edgec"), mlp())
    assert read.report.compressed_digest == made.report.compressed_digest and read.spec.reference is not None


def test_ternary_training_on_digits_is_near_float_where_plain_ternary_is_not() -> None:
    spec = load_model("example:digits-cnn")
    plain = compress.compress(spec, "ternary:fit=mean,per=tensor")
    for fit in ("mean", "median"):
        made = compress.compress(spec, f"ternary-qat:steps=80,fit={fit},per=tensor,batch=24")
        assert made.report.quality is not None and plain.report.quality is not None
        assert made.report.quality > max(0.95, plain.report.quality + 0.1) and made.report.bits < 1.75
        for name in ("hidden.weight", "down.weight"):
            code = made.spec.codes[name]
            scale = float(code.arrays[1][0, 0])
            assert set(np.unique(decode(code))) <= {np.float32(-scale), np.float32(0), np.float32(scale)}
            assert len(pack(code, entropy=False)) <= -(-code.arrays[0].size // 5) + 40
        assert holds_its_codes(made.spec)


@pytest.mark.parametrize("last", ["qat:steps=6,batch=8", "ternary-qat:steps=6,batch=8,least=4"])
def test_what_was_pruned_stays_away(last: str) -> None:
    pruned = compress.compress(mlp(), "nm:n=2,m=4,only=conv|hidden")
    made = compress.compress(mlp(), ["nm:n=2,m=4,only=conv|hidden", last])
    for name in ("conv.weight", "hidden.weight"):
        empty = decode(pruned.spec.codes[name]) == 0
        assert (
            empty.mean() >= 0.5
            and made.spec.codes[name].kind == pruned.spec.codes[name].kind
            and not decode(made.spec.codes[name])[empty].any()
        )
    assert holds_its_codes(made.spec)


@pytest.mark.parametrize("last", ["qat:steps=30,batch=8", "nm:n=1,m=4,only=hidden,recipe=flow,every=3,steps=30,batch=8"])
def test_training_goes_on_where_it_was_cut_off(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ["rtn:bits=2", last]
    whole = compress.compress(mlp(), recipe).report.compressed_digest
    monkeypatch.setattr(training, "SAVE_S", -1.0)
    seen: list[str] = []

    def cut(text: str, share: float) -> None:
        seen.append(text)
        if "step 20" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.compress(mlp(), recipe, step=cut)
    states = list(training.cache_dir("training").glob("*.pt"))
    assert len(states) == 1 and ": step 0 of 30" in " ".join(seen)
    seen.clear()
    resumed = compress.compress(mlp(), recipe, step=lambda text, share: seen.append(text))
    assert resumed.report.compressed_digest == whole and not any("step 0 of" in s or "step 10 of" in s for s in seen)
    assert not list(training.cache_dir("training").glob("*"))


def test_qat_never_ends_with_more_loss_than_it_began_with() -> None:
    before = compress.compress(mlp(), "rtn:bits=4")
    made = compress.compress(mlp(), ["rtn:bits=4", "qat:steps=3,rate=1.0"])  # a rate that breaks everything
    assert "is kept" in made.report.notes[0]
    assert {n: pack(c) for n, c in made.spec.codes.items()} == {n: pack(c) for n, c in before.spec.codes.items()}


def test_lora_stores_a_sum_and_counts_it() -> None:
    base = mlp()
    bare = compress.compress(base, "rtn:bits=2")
    made = compress.compress(base, ["rtn:bits=2", "lora:rank=2,steps=30,batch=8"])
    assert made.report.weight_bytes > bare.report.weight_bytes
    sums = {n: c for n, c in made.spec.codes.items() if c.kind == "sum"}
    assert {"conv.weight", "hidden.weight"} <= set(sums) and "grouped.weight" not in sums
    for name, code in sums.items():
        assert pack(code.parts[0]) == pack(bare.spec.codes[name]) and code.parts[1].kind == "lowrank"
    lessons = Lessons(made.spec, base, batch=8)
    assert lessons.held_out() < 0.8 * Lessons(bare.spec, base, batch=8).held_out()
    zero = compress.compress(base, ["rtn:bits=2", 'lora:rank=2,steps=30,batch=8,start="zero"'])
    assert zero.report.notes != made.report.notes


@pytest.mark.parametrize(("recipe", "word"), [
    ("qat", "none of its weights is stored as a code"), ("lora", "none of its weights is stored as a code"), ("ternary-qat:only=nothing", "no weight"),
    ("ternary:fit=mode", "fit"), ("qat:steps=0", "steps"), (["rtn", "lora:rank=40"], "no smaller"), (["rtn", "distill:steps=2,features=odd"], "features"),
])  # fmt: skip
def test_bad_requests_are_answered_clearly(recipe: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        compress.compress(mlp(), recipe)


def test_models_without_data() -> None:
    for recipe in (["rtn", "qat"], ["ternary-qat"], ["distill"]):
        with pytest.raises(InputError, match="no calibration data"):
            compress.compress(replace(mlp(), calibration=None), recipe)
    image = ModelSpec(name="i", digest="2" * 64, methods={"forward": Method(nn.Linear(4, 4), (torch.zeros(1, 4),))})
    with pytest.raises(InputError, match=r"no language model|one row of tokens"):
        compress.compress(image, ["rtn", 'qat:data="self"'])
    one = replace(mlp(), calibration=lambda _: [(torch.zeros(1, 9, dtype=torch.int64),)])
    with pytest.raises(InputError, match="one calibration input"):
        compress.compress(one, ["rtn", "qat:steps=2"])


# ---- data-free: a language model teaches itself


class Lm(nn.Module):
    """ids int64 [1, 16] → logits [1, 16, 12]; causal convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 24)
        self.first, self.second = nn.Conv1d(24, 48, 3), nn.Conv1d(48, 24, 3)
        self.head = nn.Linear(24, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).transpose(1, 2)
        y = torch.relu(self.second(nn.functional.pad(torch.relu(self.first(nn.functional.pad(x, (2, 0)))), (2, 0))))
        out: torch.Tensor = self.head((x + y).transpose(1, 2))
        return out


def corpus(count: int, seed: int) -> torch.Tensor:
    """Sequences of a fixed second-order process."""
    generator = np.random.default_rng(seed)
    table = np.random.default_rng(5).dirichlet(np.full(12, 0.08), (12, 12))
    rows = generator.integers(0, 12, (count, 16))
    for t in range(2, 16):
        rows[:, t] = [generator.choice(12, p=table[a, b]) for a, b in rows[:, t - 2 : t]]
    return torch.from_numpy(rows)


def lm_loss(module: nn.Module, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(rows)[:, 1:-1].flatten(0, 1), rows[:, 2:].flatten()))


def test_a_language_model_is_recovered_on_text_it_writes_itself() -> None:
    torch.manual_seed(0)
    module, rows = Lm(), corpus(400, 1)
    adam = torch.optim.Adam(module.parameters(), lr=5e-3)
    for i in range(150):
        batch = rows[torch.arange(64 * i, 64 * (i + 1)) % 400]
        adam.zero_grad()
        nn.functional.cross_entropy(module(batch)[:, 1:-1].flatten(0, 1), batch[:, 2:].flatten()).backward()
        adam.step()
    module.eval().requires_grad_(False)
    real = [(r[None],) for r in rows[:96]]
    spec = ModelSpec(
        name="lm", digest="3" * 64, methods={"forward": Method(module, real[0])}, layout="decoder-only", calibration=lambda _: real
    )
    own = self_generated(spec, 8, seed=3)["forward"]
    assert own[0][0].shape == (1, 16) and all(
        torch.equal(a[0], b[0]) for a, b in zip(own, self_generated(spec, 8, seed=3)["forward"], strict=True)
    )
    unseen = corpus(200, 2)
    bare = replace(spec, calibration=None)  # the corpus is thrown away
    losses = {
        name: lm_loss(compress.compress(given, recipe).spec.methods["forward"].module, unseen)
        for name, given, recipe in (
            ("rtn", bare, ["rtn:bits=2,group=0"]),
            ("self", bare, ["rtn:bits=2,group=0", 'qat:steps=60,pool=96,batch=32,data="self",activations=8']),
            ("real", spec, ["rtn:bits=2,group=0", 'qat:steps=60,pool=96,batch=32,data="calibration",activations=8']),
        )
    }
    gap_before = losses["rtn"] - lm_loss(module, unseen)
    assert losses["self"] - lm_loss(module, unseen) < 0.4 * gap_before, losses
    assert losses["self"] < losses["real"] + 0.25 * gap_before, losses


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_cache_is_what_a_stored_one_comes_back_as(bits: int) -> None:
    cache = torch.randn(2, 4, 6, 24)
    flat = cache.reshape(-1, 24)
    method, config = configured("rtn", {"bits": bits, "group": 0})
    code = method.apply(Weight("cache", "linear", tuple(flat.shape), flat), None, config)  # type: ignore[call-arg, arg-type]
    rounded = stored_cache(cache, bits)
    top = 2 ** (bits - 1) - 1
    scale = (flat.abs().amax(-1, keepdim=True) / top).to(torch.float16)
    q = torch.clamp(torch.round(flat / scale.float()), -top, top) + top + 1
    stored = Code("grid", tuple(flat.shape), (bits, 0), (q.to(torch.uint8).numpy(), scale.numpy(), np.zeros(0, np.uint8)))
    assert np.array_equal(decode(unpack(pack(stored))), rounded.reshape(-1, 24).numpy())
    assert len(pack(stored, entropy=False)) < flat.numel() * bits / 8 + 2 * len(flat) + 40 and code.shape == stored.shape


def test_factors_of_many_values_are_packed_without_end() -> None:
    q = np.random.default_rng(0).normal(128, 25, (16, 384)).clip(1, 255).astype(np.uint8)
    code = Code("grid", q.shape, (8, 0), (q, np.zeros(0, np.float16), np.zeros(0, np.uint8)))
    assert len(pack(code)) <= q.size + 40 and np.array_equal(decode(unpack(pack(code))), decode(code))


# ---- distillation


def test_distillation_recovers_a_pruned_model_and_keeps_its_shape() -> None:
    spec = load_model("example:digits-cnn")
    cut = ["structured:ratio=0.9,refit=false"]
    pruned = compress.compress(spec, cut)
    made = compress.compress(spec, [*cut, "distill:steps=80,features=mse,perturb=0.02,batch=24"])
    assert made.report.quality is not None and pruned.report.quality is not None and made.report.quality > pruned.report.quality
    shapes = [{k: v.shape for k, v in s.methods["forward"].module.state_dict().items()} for s in (made.spec, pruned.spec)]
    assert shapes[0] == shapes[1]  # nothing that was learned along is left
    with pytest.raises(InputError, match="no module"):
        compress.compress(spec, [*cut, "distill:steps=2,features=mse,stages=nothing"])


def test_a_student_of_another_kind_learns_with_stage_projectors_and_they_are_gone() -> None:
    teacher = load_model("example:digits-cnn")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    small = replace(teacher, name="mlp", digest="4" * 64, methods={"forward": Method(net, teacher.methods["forward"].example_inputs)})
    keys = set(net.state_dict())
    found = {}
    for kind in ("none", "mse", "stages"):
        config = DistillConfig(steps=100, rate=0.2, features=kind, weight=0.3, batch=24)
        spec, outcome = distill.student(small, teacher, config, stages=[("1", "pointwise"), ("3", "hidden")])
        assert set(spec.methods["forward"].module.state_dict()) == keys and outcome.after < outcome.before
        assert teacher.evaluate is not None
        found[kind] = teacher.evaluate(run(spec))
    assert (
        min(found.values()) > 0.5 and max(found.values()) > 0.7 and torch.equal(net[1].weight, small.methods["forward"].module[1].weight)
    ), found
    with pytest.raises(InputError, match="no stages"):
        distill.student(small, teacher, DistillConfig(features="cka"))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(InputError, match="differ"):
        distill.student(
            replace(small, methods={"forward": Method(wide, small.methods["forward"].example_inputs)}), teacher, DistillConfig(steps=2)
        )


def test_the_recommended_pipeline_is_no_worse_than_the_average_one() -> None:
    spec = load_model("example:digits-cnn")
    pruned = compress.compress(spec, "structured:ratio=0.9,refit=false", evaluate=False).spec
    pairs = tuple((p, p) for p in distill.common_stages(pruned, spec))
    assert pairs == (("stem", "stem"), ("pointwise", "pointwise"), ("hidden", "hidden"))
    ranking = distill.recommend(distill.Pupil(pruned, spec, pairs), DistillConfig(steps=60, batch=24), share=0.2)
    assert {k for k, _ in ranking} == {"none", "mse", "cka", "mi", "stages"} and ranking == sorted(ranking, key=lambda r: r[1])
    finals = {}
    for kind, _ in ranking:
        tried = distill.Pupil(replace(pruned, methods=copy.deepcopy(pruned.methods)), spec, pairs)
        finals[kind] = distill.teach(tried, DistillConfig(steps=60, batch=24, features=kind), lambda text, share: None).after
    assert finals[ranking[0][0]] <= sum(finals.values()) / len(finals) * 1.02


def test_comparisons_of_values() -> None:
    torch.manual_seed(0)
    x, turn = torch.randn(64, 8), torch.linalg.qr(torch.randn(8, 8)).Q
    assert float(cka(x, x @ turn * 3)) == pytest.approx(1, abs=1e-4) and float(cka(x, torch.randn(64, 8))) < 0.5
    assert float(information(4 * x, x)) > float(information(4 * torch.randn(64, 8), x)) + 0.5
    logits, own = torch.randn(5, 4), torch.randn(5, 4)
    plain = -(torch.softmax(logits, -1) * torch.log_softmax(own, -1)).sum(-1).mean()
    assert float(enhanced(own, logits, gamma=1.0)) == pytest.approx(float(plain), abs=1e-5)
    assert float(gap(own, own, True)) == 0 and float(gap(own + 3, own, True)) == pytest.approx(0, abs=1e-6)


def test_one_part_of_a_model_made_ternary_keeps_its_answers_with_the_float_part_as_teacher() -> None:
    """An encoder and a head: only the encoder becomes ternary; aligned values against plain ternary weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.Linear(32, 5)).eval()
    rows = [(torch.randn(1, 24),) for _ in range(64)]
    spec = ModelSpec(name="two parts", digest="5" * 64, methods={"forward": Method(net, rows[0])}, calibration=lambda _: rows)
    plain = compress.compress(spec, "ternary@^[02]")
    made = compress.compress(spec, 'ternary-qat:steps=60,batch=32,only="^[02]",least=1,others=false')
    assert set(made.spec.codes) == {"0.weight", "2.weight"} == set(plain.spec.codes)
    assert Lessons(made.spec, spec).held_out() < 0.7 * Lessons(plain.spec, spec).held_out()
    for row in made.report.weights:
        assert row.bytes == len(pack(made.spec.codes[row.weight]))
