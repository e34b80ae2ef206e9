"""Low rank and residual methods: factors in the space of the inputs, layers split in two, compensation, low rank with integers."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesdk.compress import lossless, lqlora
from edgesdk.compress.pipeline import Stage, compress, parse_stage
from edgesdk.compress.registry import configured
from edgesdk.compress.saved import load
from edgesdk.compress.svd import even_rank, factor_code, space_of, spectrum_of
from edgesdk.compress.types import Stats, Weight
from edgesdk.compress.weights import output_error, weights_of
from edgesdk.errors import DoesNotFit, InputError
from edgesdk.graph import trace
from edgesdk.intake import load_model
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import Code, decode, pack, unpack
from edgesdk.plan.harm import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def stats(cols: int, seed: int = 0, groups: int = 1) -> Stats:
    """Inputs that are correlated, of very different sizes, and off zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, cols, generator=g) @ torch.randn(cols, cols, generator=g) * torch.logspace(0, -2, cols) + 0.3
    gram = (x.double().T @ x.double() / len(x)).expand(groups, cols, cols)
    return Stats(len(x), gram, x.mean(0), x.abs().amax(0))


def weight(rows: int = 24, cols: int = 40, seed: int = 1, **fields: Any) -> Weight:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return Weight("w", "linear", (rows, cols), matrix, **fields)


def spec_of(module: nn.Module, *inputs: torch.Tensor, calibrated: bool = True) -> ModelSpec:
    g = torch.Generator().manual_seed(5)

    def calibration(_: str) -> list[tuple[torch.Tensor, ...]]:
        return [tuple(torch.randn(i.shape, generator=g) if i.is_floating_point() else i for i in inputs) for _ in range(12)]

    return ModelSpec("small", "d", {"forward": Method(module.eval(), inputs)}, calibration=calibration if calibrated else None)


def out(spec: ModelSpec, method: str = "forward") -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = spec.methods[method].module(*spec.methods[method].example_inputs)
    return answer


def macs(spec: ModelSpec) -> int:
    return sum(u.macs for m in trace(spec).methods for u in m.units)


# ---- svd


def test_even_rank_is_the_greatest_that_saves() -> None:
    for rows, cols in ((1, 5), (2, 2), (9, 32), (96, 96), (192, 384), (7, 3)):
        r = even_rank(rows, cols)
        assert r * (rows + cols) < rows * cols <= (r + 1) * (rows + cols)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_factors_in_the_inputs_space_lose_least_there(rank: int) -> None:
    w, s = weight(), stats(40)
    plain, whitened = (left @ right for left, right in (spectrum_of(w.matrix, space_of(t)).factors(rank) for t in (None, s)))
    assert output_error(w, whitened, s) < output_error(w, plain, s)
    assert output_error(w, whitened, None) > output_error(w, plain, None)


def test_full_rank_is_exact_and_the_lost_energy_is_the_error() -> None:
    w, s = weight(), stats(40)
    space = space_of(s, rows=torch.linspace(0.1, 3, 24))
    spectrum = spectrum_of(w.matrix, space)
    left, right = spectrum.factors(24)
    assert torch.allclose(left @ right, w.matrix.double(), atol=1e-8)
    left, right = spectrum.factors(5)
    error = space.into(w.matrix.double() - left @ right)
    assert float((error**2).sum()) == pytest.approx(float(spectrum.lost()[5]), rel=1e-6)
    assert spectrum.rank_for(1.0) == 24 and spectrum.rank_for(0.5) < spectrum.rank_for(0.9)


def test_inputs_that_never_move_and_singular_grams_are_taken() -> None:
    still = Stats(4, torch.zeros(1, 6, 6), torch.zeros(6), torch.zeros(6))
    one = torch.zeros(1, 6, 6)
    one[0, 2, 2] = 1.0
    for s in (still, Stats(4, one, torch.zeros(6), torch.zeros(6)), Stats(4, torch.ones(1, 6, 6), torch.ones(6), torch.ones(6))):
        left, right = spectrum_of(weight(8, 6).matrix, space_of(s, centred=True)).factors(3)
        assert bool(torch.isfinite(left @ right).all())


@pytest.mark.parametrize("bits, allowed", [(4, 0.2), (6, 0.05), (8, 0.013), (16, 1e-3)])
def test_factors_are_stored_in_few_bits(bits: int, allowed: float) -> None:
    w, space = weight(64, 80), space_of(stats(80))
    left, right = spectrum_of(w.matrix, space).factors(10)
    code = factor_code(left, right, space, bits)
    exact = space.into(left @ right)
    assert float((space.into(torch.from_numpy(decode(code))) - exact).norm() / exact.norm()) < allowed
    assert len(pack(code)) < 10 * (64 + 80) * bits / 8 + 90
    assert np.array_equal(decode(unpack(pack(code))), decode(code))


def test_svd_keeps_what_the_outputs_need() -> None:
    made = compress("example:digits-cnn", "svd:energy=0.99")
    assert made.report.quality is not None and made.report.quality > 0.95 and made.report.bits < 1.5
    assert made.report.kept["depthwise.weight"] == "svd: its channels are in groups"
    again = compress("example:digits-cnn", "svd:energy=0.99", evaluate=False)
    assert again.spec.digest == made.spec.digest


def test_svd_of_zero_rows_and_odd_shapes() -> None:
    method, config = configured("svd", {"rank": 1})
    w = weight(5, 3)
    w.matrix[2] = 0
    code = method.apply(w, stats(3), config)  # type: ignore[union-attr,call-arg,arg-type]
    assert decode(code).shape == (5, 3) and not decode(code)[2].any()
    assert "not smaller" in (method.why_not(weight(5, 3), configured("svd", {"rank": 3})[1]) or "")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one of rank, energy and size"):
        configured("svd", {"rank": 3, "size": 0.5})


# ---- lord


def test_lord_splits_where_that_is_less_work(tmp_path: Any) -> None:
    base = load_model("example:digits-cnn")
    made = compress(base, "lord:size=0.2")
    assert made.report.quality is not None and made.report.quality > 0.97
    assert macs(made.spec) < 0.45 * macs(base)
    assert made.report.weight_bytes < 0.22 * made.report.float_bytes
    assert {type(made.spec.methods["forward"].module.get_submodule(n)) for n in ("down", "hidden")} == {nn.Sequential}
    again = load(made.save(tmp_path / "m.edgec"), base)
    assert torch.equal(out(again.spec), out(made.spec)) and again.spec.digest == made.spec.digest
    assert isinstance(base.methods["forward"].module.down, nn.Conv2d)  # the given model stays as it was


def test_lord_then_integers() -> None:
    made = compress("example:digits-cnn", ["lord:energy=0.99", "rtn:bits=4,group=32"])
    assert made.report.quality is not None and made.report.quality > 0.93
    assert 8 * made.report.weight_bytes / (made.report.float_bytes / 4) < 1.0  # bits for each weight of the base model


def test_lord_splits_once_for_all_methods() -> None:
    made = compress("example:normalizer", "lord:size=0.8", evaluate=False)
    cores = [m.module.core for m in made.spec.methods.values()]
    assert cores[0] is cores[1] and any(isinstance(m, nn.Sequential) for m in cores[0].modules())
    assert made.report.weight_elements < 0.82 * made.report.float_bytes / 4


class Tied(nn.Module):
    """A linear tied to an embedding, one that is used under two names, one read without being called, one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight
        self.first = nn.Linear(16, 16)
        self.again, self.read, self.conv = self.first, nn.Linear(16, 16), nn.Conv1d(16, 12, 3, padding="same")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.relu(self.first(self.embed(ids))))
        x = nn.functional.linear(x, self.read.weight)
        return torch.cat([self.head(x), self.conv(x.transpose(1, 2)).transpose(1, 2)], 2)


def test_lord_leaves_tied_and_uncalled_weights_and_follows_every_name() -> None:
    torch.manual_seed(0)
    base = spec_of(Tied(), torch.arange(10)[None])
    made = compress(base, "lord:rank=4", evaluate=False)
    module: Any = made.spec.methods["forward"].module
    assert module.first is module.again and isinstance(module.first, nn.Sequential) and isinstance(module.conv, nn.Sequential)
    assert isinstance(module.head, nn.Linear) and module.head.weight is module.embed.weight and isinstance(module.read, nn.Linear)
    assert any("read.weight: left as it is, it is never called" in n for n in made.report.notes)
    assert out(made.spec).shape == out(base).shape


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 10, 3, 2, 1), nn.Conv2d(6, 10, (3, 1), dilation=2, padding="same", bias=False), nn.Conv2d(6, 10, 5)]
)
def test_split_convolutions_of_full_rank_compute_the_same(layer: nn.Conv2d) -> None:
    from edgesdk.compress import lord

    spec = spec_of(nn.Sequential(copy.deepcopy(layer), nn.ReLU()), torch.randn(1, 6, 9, 9, generator=torch.Generator().manual_seed(0)))
    before = out(spec)
    layers, _ = lord.layers_of(spec, "", True, lambda text, share: None)
    lord.split(spec, layers, {"0.weight": 10})
    assert torch.allclose(out(spec), before, atol=1e-5)


def test_bias_takes_up_the_mean_error() -> None:
    torch.manual_seed(0)
    base = spec_of(nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20)), torch.zeros(1, 20))
    samples = [s[0] for s in base.calibration("forward")] if base.calibration else []
    made = compress(ModelSpec("m", "d", base.methods, calibration=lambda _: [(s,) for s in samples]), "lord:rank=3,only=^0", evaluate=False)
    first, split = (s.methods["forward"].module[0] for s in (base, made.spec))
    with torch.no_grad():
        error = torch.cat([split(s) - first(s) for s in samples])
    assert float(error.mean(0).abs().max()) < 1e-5 < float(error.abs().mean())


def test_lord_says_no_clearly() -> None:
    small = spec_of(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
    with pytest.raises(InputError, match="none of its layers"):
        compress(spec_of(nn.Linear(30, 30), torch.zeros(1, 30)), "lord:rank=2")
    with pytest.raises(InputError, match="no layer gets smaller"):
        compress(small, "lord:rank=2", evaluate=False)
    with pytest.raises(InputError, match="no calibration data"):
        compress(spec_of(nn.Sequential(nn.Linear(30, 30)), torch.zeros(1, 30), calibrated=False), "lord:rank=2")
    made = compress(spec_of(nn.Sequential(nn.Linear(30, 30)), torch.zeros(1, 30), calibrated=False), "lord:rank=2,data=false")
    assert made.report.weight_elements == 120
    with pytest.raises(InputError, match="one of rank, energy and size"):
        compress(small, "lord")
    broken = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        broken[0].weight[1, 1] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        compress(spec_of(broken, torch.zeros(1, 8)), "lord:rank=2")


def test_embeddings_are_named_as_left() -> None:
    made = compress("example:normalizer", "lord:size=0.9,only=embed|head", evaluate=False)
    assert any("core.embed.weight: left as it is, an embedding" in n for n in made.report.notes)
    assert set(weights_of(made.spec)) > {"core.head.0.weight", "core.head.1.weight"}


# ---- welore


def falling(rows: int, cols: int, fall: float, seed: int) -> torch.Tensor:
    """A matrix whose singular values fall by `fall` from one to the next."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=g)).Q for n in (rows, cols))
    k = min(rows, cols)
    return (left[:, :k] * fall ** torch.arange(k)) @ right[:k]


def known_spectra() -> ModelSpec:
    """Three layers: one of nearly full rank, one between, one of very low rank."""
    module = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(3)))
    with torch.no_grad():
        for i, fall in enumerate((0.98, 0.85, 0.5)):
            module[i].weight.copy_(falling(32, 32, fall, i))
    return spec_of(module, torch.zeros(4, 32))


def parameters(spec: ModelSpec) -> int:
    return sum(w.matrix.numel() for w in weights_of(spec).values())


@pytest.mark.parametrize("by", ["spectra", "outputs", "gradients"])
def test_welore_meets_the_size_and_its_ranks_follow_the_spectra(by: str) -> None:
    base = known_spectra()
    made = compress(base, f"welore:size=0.5,by={by}", evaluate=False)
    assert 0.45 * parameters(base) < parameters(made.spec) <= 0.5 * parameters(base)
    ranks = [int(m[0].weight.shape[0]) if isinstance(m, nn.Sequential) else 32 for m in made.spec.methods["forward"].module]
    assert ranks[0] > ranks[1] > ranks[2]


def test_welore_beats_one_rank_for_all_at_equal_size() -> None:
    base = known_spectra()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(9))

    def error(made: Any) -> float:
        module = made.spec.methods["forward"].module
        with torch.no_grad():
            return float((module(x) - base.methods["forward"].module(x)).norm() / base.methods["forward"].module(x).norm())

    uniform = compress(base, "lord:rank=8", evaluate=False)
    own = compress(base, "welore:size=0.5", evaluate=False)
    assert parameters(own.spec) <= parameters(uniform.spec)
    assert error(own) < 0.6 * error(uniform)


def test_welore_keeps_the_model_and_trains_only_its_factors() -> None:
    from edgesdk.compress.lord import low_rank_parameters

    made = compress("example:digits-cnn", "welore:size=0.15")
    assert made.report.quality is not None and made.report.quality > 0.95
    trained = sum(p.numel() for p in low_rank_parameters(made))
    assert 0 < trained < 0.2 * made.report.float_bytes / 4  # of which an optimizer keeps its state


def test_welore_without_data_takes_the_spectra_and_says_no_clearly() -> None:
    base = known_spectra()
    blind = ModelSpec("m", "d", base.methods)
    made = compress(blind, "welore:size=0.5,data=false", evaluate=False)
    assert parameters(made.spec) <= 0.5 * parameters(base)
    with pytest.raises(InputError, match="no calibration data"):
        compress(blind, "welore:size=0.5", evaluate=False)
    with pytest.raises(DoesNotFit, match=r"smallest ranks leave 6\.2%"):
        compress(base, "welore:size=0.005", evaluate=False)
    with pytest.raises(InputError, match="size"):
        compress(base, "welore:size=2", evaluate=False)


# ---- eora


def coded(stage: str, w: Weight, s: Stats | None) -> Weight:
    """A weight as a later stage sees it once `stage` coded it."""
    found = parse_stage(stage)
    method, config = configured(found.method, found.settings)
    code = method.apply(w, s, config)  # type: ignore[union-attr,call-arg,arg-type]
    return dataclasses.replace(w, matrix=torch.from_numpy(decode(code)), coded=code, original=w.matrix)


def two_of_four(w: Weight) -> Weight:
    """The two smaller of every four columns cut."""
    order = w.matrix.abs().reshape(w.rows, -1, 4).argsort(-1).argsort(-1)
    mask = (order >= 2).reshape(w.rows, w.cols)
    values = Code("dense", (1, int(mask.sum())), (), (w.matrix[mask][None].numpy(),))
    code = Code("sparse", (w.rows, w.cols), (), (mask.to(torch.uint8).numpy(),), (values,))
    return dataclasses.replace(w, matrix=w.matrix * mask, coded=code, original=w.matrix)


def eora(w: Weight, s: Stats | None, **settings: Any) -> Code:
    method, config = configured("eora", settings)
    code: Code = method.apply(w, s, config)  # type: ignore[union-attr,call-arg,arg-type]
    return code


@pytest.mark.parametrize("earlier", ["rtn:bits=3", "rtn:bits=2,group=0", "2:4"])
def test_eora_loses_less_than_plain_vectors_at_every_rank_and_nothing_at_full_rank(earlier: str) -> None:
    s = stats(40)
    w = two_of_four(weight()) if earlier == "2:4" else coded(earlier, weight(), s)
    last = output_error(weight(), w.matrix, s)
    for rank in (1, 2, 4, 8, 16, 24):
        ours, plain = (output_error(weight(), torch.from_numpy(decode(eora(w, s, rank=rank, bits=16, data=d))), s) for d in (True, False))
        assert ours <= plain * 1.001 + 1e-7 and ours < last
        last = ours
    assert last < 1e-6


def test_eora_spends_its_bytes_where_they_count() -> None:
    s, w = stats(80), coded("gptq:bits=3", weight(64, 80), stats(80))
    before, errors = len(pack(w.coded)), []  # type: ignore[arg-type]
    for extra in (0.25, 0.5, 1.0, 2.0):
        code = eora(w, s, extra=extra)
        assert code.kind == "sum" and code.parts[0] is w.coded
        assert before < len(pack(code)) <= before + extra * 64 * 80 / 8 + 12
        errors.append(output_error(weight(64, 80), torch.from_numpy(decode(code)), s))
    assert errors == sorted(errors, reverse=True)
    sixteen = output_error(weight(64, 80), torch.from_numpy(decode(eora(w, s, extra=1.0, bits=16))), s)
    assert errors[2] < 0.8 * sixteen


def test_eora_leaves_what_needs_nothing_and_says_no_clearly() -> None:
    s, w = stats(40), weight()
    exact = dataclasses.replace(w, coded=Code("dense", (24, 40), (), (w.matrix.numpy(),)), original=w.matrix)
    assert eora(exact, s) is exact.coded
    assert eora(coded("rtn:bits=2", w, s), s, extra=0.01).kind == "grid"  # not one rank is that small
    with pytest.raises(InputError, match="no earlier stage coded w"):
        eora(w, s)
    with pytest.raises(InputError, match="one of rank and extra"):
        configured("eora", {"rank": 3, "extra": 1})
    assert "more than 24x40" in (configured("eora")[0].why_not(exact, configured("eora", {"rank": 30})[1]) or "")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no earlier stage"):
        compress("example:digits-cnn", "eora")


def test_eora_after_a_quantizer() -> None:
    plain = compress("example:digits-cnn", "rtn:bits=2,group=0")
    made = compress("example:digits-cnn", ["rtn:bits=2,group=0", "eora:extra=0.5"])
    assert plain.report.quality is not None and made.report.quality is not None
    assert made.report.quality > plain.report.quality + 0.05 and made.report.bits < plain.report.bits + 0.51
    assert made.spec.codes["hidden.weight"].kind == "sum" and made.spec.codes["depthwise.weight"].kind == "grid"
    assert made.report.kept == {}
    part = compress("example:digits-cnn", ["rtn@hidden:bits=2,group=0", "eora:extra=0.5"], evaluate=False)
    assert set(part.spec.codes) == {"hidden.weight"} and part.report.kept["stem.weight"] == "eora: no earlier stage coded it"


# ---- lqlora


def with_few_strong_directions(rows: int = 48, cols: int = 64, rank: int = 3) -> Weight:
    g = torch.Generator().manual_seed(3)
    strong = torch.randn(rows, rank, generator=g) @ torch.randn(rank, cols, generator=g) * 2
    return dataclasses.replace(weight(rows, cols), matrix=strong + 0.3 * weight(rows, cols).matrix)


@pytest.mark.parametrize("rows", [None, torch.linspace(0.01, 4, 48)])
def test_turns_of_integers_and_low_rank_only_lower_the_error(rows: torch.Tensor | None) -> None:
    task = lqlora.Task(with_few_strong_directions(), stats(64), rows)
    code, errors = task.split(lqlora.Setting(4, 0, 3), 4)
    assert len(errors) > 1 and errors == sorted(errors, reverse=True) and code.kind == "sum"
    assert task.error(torch.from_numpy(decode(code))) == pytest.approx(errors[-1])
    plain = [task.split(lqlora.Setting(levels, 0, 0), 8) for levels in (6, 8)]
    equal = [e[-1] for c, e in plain if len(pack(c)) <= 1.02 * len(pack(code))]
    assert errors[-1] < 0.6 * min(equal)


def test_integer_program_is_brute_force() -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        loss, use = rng.random((5, 4)) ** 3, rng.integers(1, 30, (5, 4)).astype(float)
        loss[2, 3] = np.inf
        limit = float(rng.integers(25, 80))
        every = list(itertools.product(range(4), repeat=5))
        sums = [sum(loss[u, i] for u, i in enumerate(p)) for p in every if sum(use[u, i] for u, i in enumerate(p)) <= limit]
        if not sums or min(sums) == np.inf:
            with pytest.raises(DoesNotFit, match="smallest options need"):
                lqlora.program(loss, use, limit)
            continue
        picked = lqlora.program(loss, use, limit)
        assert sum(use[u, i] for u, i in enumerate(picked)) <= limit
        assert sum(loss[u, i] for u, i in enumerate(picked)) == pytest.approx(min(sums), rel=1e-4)


def strong_layers() -> ModelSpec:
    """Layers with few strong directions, and one without."""
    module = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 64, bias=False), nn.Linear(64, 48, bias=False))
    with torch.no_grad():
        module[3].weight.copy_(with_few_strong_directions().matrix)
    return spec_of(module, torch.zeros(2, 40))


@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_lqlora_meets_its_bytes_by_an_own_choice_for_each(bits: float) -> None:
    made = compress(strong_layers(), Stage(method="lqlora", settings={"bits": bits, "rounds": 1, "low_rank": [0.3, 1.2]}), evaluate=False)
    assert 0.85 * bits < made.report.bits <= bits
    assert made.report.weight_bytes == sum(len(pack(c)) for c in made.spec.codes.values())
    assert len({n.partition(": ")[2] for n in made.report.notes[1:]}) > 1
    assert bits < 4 or made.spec.codes["3.weight"].kind == "sum"
    assert all(0 < row.error < 0.2 and row.settings["rank"] >= 0 for row in made.report.weights)


class Words(nn.Module):
    """An embedding whose entries are mostly unseen, and a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.mix, self.out = nn.Embedding(50, 12), nn.Conv1d(12, 18, 3, groups=3), nn.Linear(18, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(torch.relu(self.mix(self.embed(ids).transpose(1, 2)).transpose(1, 2)))
        return y


def test_lqlora_takes_embeddings_and_groups_and_says_no_clearly() -> None:
    base = spec_of(Words(), torch.arange(9)[None])
    made = compress(base, "lqlora:bits=6", evaluate=False)
    assert set(made.spec.codes) == {"mix.weight", "out.weight", "embed.weight"} and made.report.bits <= 6
    embed = weights_of(made.spec)["embed.weight"].matrix - weights_of(base)["embed.weight"].matrix
    assert float(embed[9:].norm() / weights_of(base)["embed.weight"].matrix[9:].norm()) < 0.5  # unseen entries are kept as well
    again = compress(base, "lqlora:bits=6", evaluate=False)
    assert again.spec.digest == made.spec.digest
    with pytest.raises(DoesNotFit, match="too few"):
        compress(base, "lqlora:bits=1", evaluate=False)
    with pytest.raises(InputError, match="no calibration data"):
        compress(spec_of(nn.Sequential(nn.Linear(30, 30)), torch.zeros(1, 30), calibrated=False), "lqlora")
    with pytest.raises(InputError, match="no weight has such a name"):
        compress(base, "lqlora:only=nothing")


# ---- lossless


def test_lossless_keeps_every_byte_in_fewer() -> None:
    base = load_model("example:digits-cnn")
    made = compress(base, "lossless", evaluate=False)
    for name, w in weights_of(base).items():
        assert weights_of(made.spec)[name].matrix.numpy().tobytes() == w.matrix.numpy().tobytes()
        assert decode(unpack(pack(made.spec.codes[name]))).tobytes() == w.matrix.numpy().tobytes()
    assert made.report.weight_bytes < 0.86 * made.report.float_bytes
    assert all(row.error == 0 for row in made.report.weights)


def test_lossless_finds_the_width_that_values_have() -> None:
    w = weight(64, 200).matrix * 0.02
    for values, dtype, bits in ((w, "float32", 27), (w.half().float(), "float16", 14.5), (w.bfloat16().float(), "uint16", 11.2)):
        code = lossless.exact(values.numpy())
        assert code.arrays[0].dtype == dtype and decode(code).tobytes() == values.numpy().tobytes()
        assert 8 * len(pack(code)) < bits * w.numel()
    odd = torch.tensor([[0.0, -0.0, 1e-45, 6e-8, 65504.0, 1e38, float("inf"), 1.0]]).numpy()
    assert decode(unpack(pack(lossless.exact(odd)))).tobytes() == odd.tobytes()


def test_lossless_leaves_the_codes_of_earlier_stages() -> None:
    made = compress("example:digits-cnn", ["rtn@hidden:bits=4", "lossless"], evaluate=False)
    assert made.spec.codes["hidden.weight"].kind == "grid" and made.spec.codes["down.weight"].kind == "dense"
    assert made.report.kept == {}
