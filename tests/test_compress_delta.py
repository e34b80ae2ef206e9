"""Fine-tuned models as small differences: low rank within a budget, DARE, masks; as files, programs and bundles over one base."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_tflite
from torch import nn

from edgesdk.bundle import GoldenCase
from edgesdk.bundles import array_bytes, bundle_digest, extract, read_array, read_member, verify_bundle, write_bundle
from edgesdk.compress import delta_bundle
from edgesdk.compress.delta import DeltaConfig, delta, dropped, learn_masks, merge, ranks_within, spread_of, uniform_rank
from edgesdk.compress.pipeline import Compressed
from edgesdk.compress.saved import load
from edgesdk.compress.svd import factor_code, spectrum_of
from edgesdk.compress.weights import weights_of
from edgesdk.errors import CheckFailed, InputError
from edgesdk.flash import flash
from edgesdk.model import Method, ModelSpec
from edgesdk.packed import Code, decode, pack
from edgesdk.packed.difference import Place, expand_difference, load_program, pack_difference
from edgesdk.packed.entropy import PackedError
from edgesdk.packed.program import Piece, pack_program
from edgesdk.plan.harm import one_thread
from edgesdk.runner import open_program
from edgesdk.transport.local import LocalTransport


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def points(task: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around 8 centres, which each task turns a bit further, and their classes; every task but the first swaps two."""
    g, centres = torch.Generator().manual_seed(seed), torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    turn = torch.linalg.matrix_exp(0.35 * task * torch.randn(24, 24, generator=torch.Generator().manual_seed(2)).triu(1) * 0.3)
    y = torch.randint(0, 8, (count,), generator=g)
    x = (centres[y] + 0.8 * torch.randn(count, 24, generator=g)) @ turn
    return x, (torch.where(y // 2 == task - 1, y ^ 1, y) if task else y)


def spec_of(module: nn.Module, task: int, name: str) -> ModelSpec:
    x, y = points(task, 400, 77)

    def evaluate(run: Any) -> float:
        return float((np.array(run("forward", [x.numpy()])[0]).argmax(1) == y.numpy()).mean())

    return ModelSpec(
        name, f"digest of {name}", {"forward": Method(module.eval(), (x[:1],))}, calibration=lambda _: [(x[i : i + 20],) for i in range(0, 200, 20)],
        evaluate=evaluate, quality_name="accuracy",
    )  # fmt: skip


def train(module: nn.Module, task: int, steps: int, rate: float) -> nn.Module:
    optimiser = torch.optim.Adam(module.parameters(), lr=rate)
    for i in range(steps):
        x, y = points(task, 64, 1000 * task + i)
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimiser.step()
    return module


@pytest.fixture(scope="module")
def models() -> list[ModelSpec]:
    """The base model and three fine-tuned ones."""
    with one_thread():
        torch.manual_seed(0)
        base = train(
            nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.LayerNorm(96), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)), 0, 300, 3e-3
        )
        tuned = [train(copy.deepcopy(base), task, 150, 5e-4) for task in (1, 2, 3)]
        return [spec_of(m, task, f"task{task}") for task, m in enumerate([base, *tuned])]


def quality(spec: ModelSpec, task: ModelSpec) -> float:
    from edgesdk.plan.fake_quant import run

    assert task.evaluate is not None
    return task.evaluate(run(spec))


def test_low_rank_differences_keep_the_tasks(models: list[ModelSpec], tmp_path: Path) -> None:
    base = models[0]
    for tuned in models[1:]:
        assert quality(tuned, tuned) > quality(base, tuned) + 0.03
        made = delta(base, tuned, DeltaConfig(bits=1.0))
        assert made.report.quality is not None and made.report.quality > quality(tuned, tuned) - 0.02
        assert made.report.weight_bytes <= made.report.weight_elements / 8 + 40 < 0.04 * made.report.float_bytes
        assert made.report.weight_bytes == sum(len(pack(c)) for c in made.differences.values())
        again = load(made.save(tmp_path / f"{tuned.name}.edgec"), base)
        assert again.spec.digest == made.spec.digest and again.spec.codes == {}
        for name, w in weights_of(made.spec).items():
            assert torch.equal(weights_of(again.spec)[name].matrix, w.matrix)
        whole = sum(4 * v.numel() for v in tuned.methods["forward"].module.state_dict().values())
        assert (tmp_path / f"{tuned.name}.edgec").stat().st_size < 0.25 * whole  # most of it is what names the weights
    assert quality(base, base) == quality(replace(base, codes={}), base)


def test_more_bytes_keep_more_and_full_rank_keeps_all(models: list[ModelSpec]) -> None:
    base, tuned = models[0], models[3]
    made = [delta(base, tuned, DeltaConfig(bits=b, data=False), evaluate=False) for b in (0.2, 0.6, 2.0)]
    errors = [sum(float((weights_of(m.spec)[n].matrix - w.matrix).norm() ** 2) for n, w in weights_of(tuned).items()) for m in made]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[2]
    whole = delta(base, tuned, DeltaConfig(bits=32, factors=16, data=False), evaluate=False)
    for name, w in weights_of(tuned).items():
        got = weights_of(whole.spec)[name].matrix
        moved = w.matrix - weights_of(base)[name].matrix
        assert float((got - w.matrix).norm() / moved.norm()) < 2e-3


def test_an_own_rank_for_each_layer_beats_one_for_all(models: list[ModelSpec]) -> None:
    before, after = weights_of(models[0]), weights_of(models[3])
    from edgesdk.compress.delta import _tasks

    tasks = _tasks(models[3], after, DeltaConfig(), lambda text, share: None)
    moved = {n: after[n].matrix - before[n].matrix for n in after}
    spectra = {n: spectrum_of(moved[n], tasks[n].space) for n in after}
    for room in (800, 1600, 3200):
        lost = []
        for ranks in (ranks_within(spectra, room, 8), uniform_rank(spectra, room, 8)):
            codes = {n: factor_code(*spectra[n].factors(r), spectra[n].space, 8) for n, r in ranks.items() if r}
            left = {n: m - torch.from_numpy(decode(codes[n])) if n in codes else m for n, m in moved.items()}
            lost.append(sum(float((tasks[n].space.into(m) ** 2).sum()) for n, m in left.items()))
        assert lost[0] < lost[1]


def test_dropped_differences_keep_their_expectation() -> None:
    moved = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert torch.equal(dropped(moved, 0, 3), moved)
    for drop in (0.5, 0.9):
        mean = torch.stack([dropped(moved, drop, seed) for seed in range(3000)]).mean(0)
        assert float((mean - moved).norm() / moved.norm()) < 1.2 * (drop / (1 - drop) / 3000) ** 0.5
        assert abs(float((dropped(moved, drop, 1) == 0).float().mean()) - drop) < 0.03


def test_dare_drops_much_and_refuses_what_moved_far(models: list[ModelSpec]) -> None:
    base, tuned = models[:2]
    sizes, kept = [], []
    for drop in (0.0, 0.5, 0.9, 0.99):
        made = delta(base, tuned, DeltaConfig(how="dare", drop=drop, limit=2.0))
        sizes.append(made.report.weight_bytes)
        kept.append(made.report.quality or 0.0)
    assert sizes == sorted(sizes, reverse=True) and sizes[3] < 0.2 * sizes[1] < sizes[1] < 0.1 * made.report.float_bytes
    assert kept[0] > quality(tuned, tuned) - 0.02 and kept[1] > quality(tuned, tuned) - 0.04
    far = spec_of(train(copy.deepcopy(base.methods["forward"].module), 3, 300, 2e-2), 3, "far")
    widest = max(spread_of(w.matrix, weights_of(far)[n].matrix) for n, w in weights_of(base).items())
    assert widest > 2.0
    with pytest.raises(InputError, match="too large to be dropped"):
        delta(base, far, DeltaConfig(how="dare", limit=2.0))


def test_one_model_of_two(models: list[ModelSpec]) -> None:
    base, first = models[:2]
    alone = merge(base, [first], drop=0.0)
    for name, w in weights_of(first).items():
        assert torch.allclose(weights_of(alone)[name].matrix, w.matrix, atol=1e-6)
    both = merge(base, [models[2], models[3]], drop=0.5, share=0.5)
    assert min(quality(both, m) for m in models[2:]) > min(quality(base, m) for m in models[2:])


def test_masks_switch_tasks_bit_for_bit(models: list[ModelSpec]) -> None:
    base, task = models[0], models[2]

    def loss(spec: ModelSpec, step: int) -> torch.Tensor:
        x, y = points(2, 64, step)
        return nn.functional.cross_entropy(spec.methods["forward"].module(x), y)

    masked = learn_masks(base, loss, 60)
    assert quality(masked, task) > quality(base, task) + 0.05
    made = delta(base, masked, DeltaConfig(how="mask"))
    for name, w in weights_of(masked).items():
        assert torch.equal(weights_of(made.spec)[name].matrix, w.matrix)
    assert made.report.weight_bytes < made.report.weight_elements / 8 + 80  # a bit a weight
    with pytest.raises(InputError, match="some of it cut"):
        delta(base, task, DeltaConfig(how="mask"))


def test_bad_pairs_are_named(models: list[ModelSpec]) -> None:
    other = spec_of(nn.Sequential(nn.Linear(24, 8)), 0, "other")
    with pytest.raises(InputError, match="is no fine-tuned"):
        delta(models[0], other)
    with pytest.raises(InputError, match="has the weights of"):
        delta(models[0], models[0])


class Words(nn.Module):
    """An embedding with a head tied to it, a convolution in groups, and a linear that stays as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.same, self.head = (
            nn.Embedding(50, 12),
            nn.Conv1d(12, 12, 3, groups=3),
            nn.Linear(12, 12),
            nn.Linear(12, 50),
        )
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.same(self.mix(self.embed(ids).transpose(1, 2)).transpose(1, 2)))
        return y


@pytest.mark.parametrize("config", [DeltaConfig(bits=4.0, factors=8), DeltaConfig(how="dare", drop=0.5, values=8)])
def test_tied_weights_embeddings_and_groups(config: DeltaConfig, tmp_path: Path) -> None:
    torch.manual_seed(1)
    start, ids = Words(), torch.arange(9)[None]
    moved = copy.deepcopy(start)
    with torch.no_grad():
        moved.embed.weight += 0.02 * torch.randn(50, 1) @ torch.randn(1, 12)
        moved.mix.weight += 0.01 * torch.randn(12, 4, 3)
    base, tuned = (
        ModelSpec(n, n, {"forward": Method(m.eval(), (ids,))}, calibration=lambda _: [(ids + i,) for i in range(40)])
        for n, m in (("base", start), ("tuned", moved))
    )
    made = delta(base, tuned, config)
    module: Any = made.spec.methods["forward"].module
    assert module.head.weight is module.embed.weight and made.differences["same.weight"].kind == "base"
    before, after, got = (weights_of(m) for m in (base, tuned, made.spec))
    for name in ("head.weight", "mix.weight") if config.how == "lowrank" else ():
        left, moves = got[name].matrix - after[name].matrix, after[name].matrix - before[name].matrix
        assert float(left.norm()) < 0.05 * float(moves.norm())
    again = load(made.save(tmp_path / "d.edgec"), base)
    assert torch.equal(again.spec.methods["forward"].module(ids), made.spec.methods["forward"].module(ids))
    assert delta(base, tuned, config).spec.digest == made.spec.digest


# ---- programs and bundles


def tiny(path: Path, weights: np.ndarray, packed_by: Any = None) -> Path:
    """A bundle of one linear layer; with `packed_by` its program holds that code."""
    program, name = tiny_tflite(weights), "model.tflite"
    if packed_by is not None:
        at = program.index(weights.astype("<f4").tobytes())
        program, name = pack_program(program, [Piece(at, packed_by, weights.shape, (0, 1))]), "model.tflite.packed"
    x = np.random.default_rng(9).standard_normal((1, weights.shape[1])).astype(np.float32)
    files = {"golden/in.npy": array_bytes(x), "golden/out.npy": array_bytes(x @ weights.T)}
    case = GoldenCase(method="forward", inputs=("golden/in.npy",), outputs=("golden/out.npy",), max_relative_error=1e-3)
    write_bundle(
        path, {name: program, **files}, model_name=path.stem, device="host", runtime="litert", runtime_version="2", program=name, methods=("forward",),
        threads=1, plan_digest="", host_check={"forward": 0.0}, golden=(case,), memory={}, edgesdk_version="0",
    )  # fmt: skip
    return path


@pytest.fixture
def tuned(tmp_path: Path) -> tuple[Path, Path, Compressed]:
    """Bundles of a layer and of the same one with a difference of rank 2, and the difference."""
    g = torch.Generator().manual_seed(4)
    specs = []
    for name in ("base", "tuned"):
        layer = nn.Linear(256, 64, bias=False)
        layer.weight.data = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
        if specs:
            layer.weight.data += 0.02 * torch.randn(64, 2, generator=g) @ torch.randn(2, 256, generator=g)
        specs.append(ModelSpec(name, name, {"forward": Method(layer, (torch.zeros(1, 256),))}))
    made = delta(*specs, DeltaConfig(bits=0.5, factors=8))
    base = tiny(tmp_path / "base.edge", weights_of(specs[0])["weight"].matrix.numpy())
    return base, tiny(tmp_path / "tuned.edge", weights_of(made.spec)["weight"].matrix.numpy()), made


def test_a_package_is_small_and_gives_the_bundle_back(tuned: tuple[Path, Path, Compressed], tmp_path: Path) -> None:
    base, whole, made = tuned
    about = delta_bundle.make(base, whole, tmp_path / "small.edged", made)
    assert about.weights == 1 and about.program_bytes < 1_000 + made.report.weight_bytes < 0.05 * about.whole_bytes
    assert (tmp_path / "small.edged").stat().st_size < 0.1 * about.whole_bytes
    delta_bundle.apply(base, tmp_path / "small.edged", tmp_path / "again.edge")
    manifest = verify_bundle(tmp_path / "again.edge")
    assert bundle_digest(tmp_path / "again.edge") == about.bundle_digest and manifest.program == "model.tflite.diff"
    extract(tmp_path / "again.edge", tmp_path / "there")
    assert load_program(str(tmp_path / "there" / manifest.program)) == read_member(whole, "model.tflite")
    x = read_array(read_member(whole, "golden/in.npy"))
    got = open_program(str(tmp_path / "there" / manifest.program), "litert").run("forward", [x])[0]
    assert np.allclose(got, read_array(read_member(whole, "golden/out.npy")), atol=1e-3)
    plain = delta_bundle.make(base, whole, tmp_path / "plain.edged")
    assert plain.weights == 0 and about.program_bytes < 0.1 * plain.program_bytes < plain.whole_bytes


def test_a_device_with_the_base_is_sent_the_difference_alone(tuned: tuple[Path, Path, Compressed], tmp_path: Path) -> None:
    base, whole, made = tuned
    delta_bundle.make(base, whole, tmp_path / "small.edged", made)
    delta_bundle.apply(base, tmp_path / "small.edged", tmp_path / "again.edge")
    device = LocalTransport(tmp_path / "root")
    flash(base, device)
    done = flash(tmp_path / "again.edge", device)
    assert done.good and done.golden[0].relative_error is not None and done.golden[0].relative_error < 1e-3
    assert done.sent_bytes < 8_000 < whole.stat().st_size / 8


def test_packages_over_packed_programs(tmp_path: Path, tuned: tuple[Path, Path, Compressed]) -> None:
    _, whole, made = tuned
    weights = weights_of(made.base)["weight"].matrix.numpy()
    code = Code("dense", weights.shape, (), (weights,))
    base = tiny(tmp_path / "packed.edge", weights, code)
    about = delta_bundle.make(base, whole, tmp_path / "small.edged", made)
    delta_bundle.apply(base, tmp_path / "small.edged", tmp_path / "again.edge")
    extract(tmp_path / "again.edge", tmp_path / "there")
    assert about.weights == 1 and load_program(str(tmp_path / "there/model.tflite.diff")) == read_member(whole, "model.tflite")


def test_int8_programs_follow_the_difference() -> None:
    rng, rows, cols = np.random.default_rng(5), 64, 512
    base, left, right = (rng.standard_normal(s).astype(np.float32) for s in ((rows, cols), (rows, 2), (2, cols)))
    factors = tuple(Code("dense", a.shape, (), ((a * 0.5).astype(np.float16),)) for a in (left, right))
    parts = (Code("base", (rows, cols)), Code("lowrank", (rows, cols), (), (), factors))
    code, start, programs = Code("sum", (rows, cols), (), (), parts), 100, []
    for w in (base, decode(code, base)):
        scales = (np.abs(w).max(1) / np.float32(127)).astype("<f4")
        programs.append(bytes(start) + np.rint(w / scales[:, None]).astype(np.int8).tobytes() + scales.tobytes() + b"end")
    end = start + rows * cols
    pieces = [(Piece(start, code, (rows, cols), (0, 1), "int8-row", end), Place(start, end))]
    with_code, without = (pack_difference(programs[1], programs[0], "b", p) for p in (pieces, []))
    assert expand_difference(with_code, programs[0]) == programs[1] == expand_difference(without, programs[0])
    assert len(with_code) < 0.6 * len(without) < 0.6 * len(programs[1])  # about a bit a weight: what the base's rounding hides


def test_damaged_and_mismatched_packages_are_refused(tuned: tuple[Path, Path, Compressed], tmp_path: Path) -> None:
    base, whole, made = tuned
    first, second = read_member(base, "model.tflite"), read_member(whole, "model.tflite")
    stored = pack_difference(second, first, "model.tflite", [])
    for cut in range(0, len(stored), len(stored) // 60):
        with pytest.raises(PackedError):
            expand_difference(stored[:cut], first)
    for at in range(0, len(stored), len(stored) // 60):
        with contextlib.suppress(PackedError):
            assert expand_difference(stored[:at] + bytes([stored[at] ^ 5]) + stored[at + 1 :], first) == second
    with pytest.raises(PackedError, match="another base"):
        expand_difference(stored, second)
    (tmp_path / "p").write_bytes(pack_difference(second, first, "p", []))
    with pytest.raises(PackedError, match="names itself"):
        load_program(str(tmp_path / "p"))
    package = tmp_path / "small.edged"
    delta_bundle.make(base, whole, package, made)
    with pytest.raises(InputError, match=r"lacks 'model\.tflite'"):
        delta_bundle.apply(whole, package, tmp_path / "x.edge")
    with pytest.raises(InputError, match="no package"):
        delta_bundle.apply(base, whole, tmp_path / "x.edge")
    delta_bundle.apply(base, package, tmp_path / "again.edge")
    with pytest.raises(InputError, match="itself a difference"):
        delta_bundle.make(tmp_path / "again.edge", whole, tmp_path / "x.edged")
    q = np.random.default_rng(1).integers(1, 4, (64, 256)).astype(np.uint8)
    grid = Code("grid", (64, 256), (2, 0), (q, np.ones((64, 1), np.float16), np.zeros(0, np.uint8)))
    small = tiny(tmp_path / "other.edge", decode(grid), grid)  # a bundle that is smaller by itself
    with pytest.raises(CheckFailed, match="no smaller"):
        delta_bundle.make(base, small, tmp_path / "x")
    assert not (tmp_path / "x.edge").exists() and not (tmp_path / "x").exists()


def test_command_line(tuned: tuple[Path, Path, Compressed], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgesdk.cli import main

    base, whole, _ = tuned

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        code, said = stop.value.code, capsys.readouterr()
        return (code if isinstance(code, int) else 0), said.out, said.err

    code, out, _ = call("delta", "make", base, whole, "--out", tmp_path / "d.edged", "--json")
    assert code == 0 and json.loads(out)["kind"] == "delta" and json.loads(out)["weights"] == 0
    code, out, _ = call("delta", "apply", base, tmp_path / "d.edged", "--out", tmp_path / "a.edge")
    assert code == 0 and verify_bundle(tmp_path / "a.edge").program == "model.tflite.diff" and "next: edgesdk flash" in out
    assert call("delta", "make", base, "example:normalizer")[0] == 2
    assert call("delta", "make", base, whole, "--bits", "1")[0] == 2
    code, _, err = call("delta", "apply", base, tmp_path / "missing.edged")
    assert code == 2 and "no such file" in err and "hint" in err
    code, _, err = call("delta", "make", "example:digits-cnn", "example:normalizer")
    assert code == 2 and "is no fine-tuned" in err
    code, _, err = call("delta", "make", "example:digits-cnn", "example:digits-cnn", "--how", "magic")
    assert code == 2 and "how" in err
