"""From a compressed model to a file, a plan and a program: the same values everywhere, and the bytes that were promised."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from edgesdk.bundles import read_manifest, read_member
from edgesdk.compress import Compressed, compress
from edgesdk.compress.pipeline import digest_of
from edgesdk.compress.saved import load
from edgesdk.compress.weights import weights_of
from edgesdk.errors import CheckFailed, InputError
from edgesdk.intake import load_model
from edgesdk.lower import build
from edgesdk.packed.program import expand_program, is_packed
from edgesdk.plan import plan
from edgesdk.plan.types import Budget
from edgesdk.runner import open_program

DIGITS = "example:digits-cnn"


@pytest.fixture(scope="module")
def made() -> Compressed:
    return compress(DIGITS, ["rtn:bits=3,group=0", "rtn@hidden:bits=4,group=32"], evaluate=False)


@pytest.fixture(scope="module")
def saved(made: Compressed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save(tmp_path_factory.mktemp("saved") / "digits.edgec")


def test_a_saved_model_comes_back_the_same(made: Compressed, saved: Path) -> None:
    back = load(saved)
    assert back.report == made.report
    assert digest_of(back.spec, back.report.edits) == digest_of(made.spec, made.report.edits)
    for name, weight in weights_of(made.spec).items():
        assert torch.equal(weights_of(back.spec)[name].matrix, weight.matrix)
    assert saved.stat().st_size < made.report.weight_bytes + 6000
    assert load_model(str(saved)).digest == made.spec.digest


def test_a_model_object_must_be_given_again(tmp_path: Path, made: Compressed) -> None:
    spec = load_model(DIGITS)
    path = compress(spec, "rtn:bits=4", evaluate=False).save(tmp_path / "object.edgec")
    with pytest.raises(InputError, match="made from a model object"):
        load(path)
    assert load(path, spec).report.base == ""


def test_another_base_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match="made from another"):
        load(saved, load_model("example:normalizer"))


def test_damaged_files_are_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    short = tmp_path / "short.edgec"
    short.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"short\.edgec"):
        load(short)
    for member, damaged in (("codes", b"\x02\x00\x00\x00[]"), ("values", b"\xff\xff\xff\xff"), ("compression.json", b"{}")):
        path = tmp_path / f"{member}.edgec"
        with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
            for info in old.infolist():
                new.writestr(info.filename, damaged if info.filename == member else old.read(info))
        with pytest.raises(InputError):
            load(path)
    with pytest.raises(InputError):
        load(tmp_path / "absent.edgec")


def test_a_recipe_behind_a_model_is_that_model_compressed(made: Compressed) -> None:
    spec = load_model(f"{DIGITS}::rtn:bits=3,group=0;rtn@hidden:bits=4,group=32")
    assert {n: w.matrix.sum().item() for n, w in weights_of(spec).items()} == {
        n: w.matrix.sum().item() for n, w in weights_of(made.spec).items()
    }
    again = load_model(f"{DIGITS}::rtn:bits=3,group=0;rtn@hidden:bits=4,group=32")
    assert again.digest == spec.digest
    with pytest.raises(InputError, match="compression method"):
        load_model(f"{DIGITS}::nope:bits=3")


@pytest.mark.parametrize("runtime", ["executorch", "litert"])
@pytest.mark.parametrize("recipe", ["rtn:bits=4,group=32", "rtn:bits=8,group=0", "rtn:bits=3,group=0"])
def test_the_built_program_is_the_packed_one_expanded(runtime: str, recipe: str, tmp_path: Path) -> None:
    """What is stored is smaller, expands to a program that computes as the compressed model does, and holds all coded weights."""
    ref = f"{DIGITS}::{recipe}"
    chosen = plan(ref, "host", runtime=runtime)
    bundle = build(chosen, load_model(ref), tmp_path / "d.edge")
    manifest = read_manifest(bundle)
    stored = read_member(bundle, manifest.program)
    assert is_packed(stored)
    program = expand_program(stored)
    assert len(stored) == manifest.memory["packed"] < len(program) == manifest.memory["program"]
    assert manifest.memory["codes"] <= chosen.storage_bytes * 1.02 + 256
    assert manifest.quality is not None and manifest.quality > 0.97
    plain, packed = tmp_path / f"plain{Path(manifest.program.removesuffix('.packed')).suffix}", tmp_path / manifest.program
    plain.write_bytes(program)
    packed.write_bytes(stored)
    x = [np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32)]
    answers = [open_program(str(p), runtime, 1).run("forward", x)[0] for p in (plain, packed)]
    assert np.array_equal(*answers)


def test_a_storage_budget_that_precisions_cannot_meet_is_met_by_codes() -> None:
    """`plan --storage` compresses when nothing else fits, and counts what it stores."""
    answer = plan(DIGITS, "host", budget=Budget(storage_bytes=70_000), runtime="executorch")
    assert answer.fits
    assert answer.storage_bytes <= 70_000
    assert "::auto:bytes=" in answer.model
    assert answer.quality_drop is not None and answer.quality_drop <= 0.01


def test_a_storage_budget_under_every_code_says_so() -> None:
    answer = plan(DIGITS, "host", budget=Budget(storage_bytes=9_000), runtime="executorch")
    assert not answer.fits
    assert any("does not help" in r for r in answer.reasons) or answer.checks[0].name in ("storage", "harm")


def test_pruned_factorised_and_quantized_in_one_recipe_reaches_a_program(tmp_path: Path) -> None:
    """Shapes, ranks and codes of one recipe: what was planned in bytes and quality is what the program has."""
    stages = ["structured:ratio=0.3", "lord@hidden:energy=0.95", "gptq:bits=4,group=0"]
    done = compress(DIGITS, stages)
    assert {e["do"] for e in done.report.edits} == {"keep", "split"}
    assert done.report.weight_bytes < done.report.float_bytes / 20
    path = done.save(tmp_path / "all.edgec")
    chosen = plan(str(path), "host", runtime="litert")
    manifest = read_manifest(build(chosen, load_model(str(path)), tmp_path / "all.edge"))
    assert manifest.quality == pytest.approx(done.report.quality, abs=0.01)
    assert manifest.memory["codes"] <= chosen.storage_bytes <= manifest.memory["packed"]


def test_a_stage_for_some_weights_is_so_for_model_methods_too() -> None:
    done = compress(DIGITS, "lord@hidden:energy=0.9", evaluate=False)
    assert {e["path"] for e in done.report.edits} == {"hidden"}
    with pytest.raises(InputError, match="works on the whole model"):
        compress(DIGITS, "auto@hidden:bits=3", evaluate=False)


def test_a_program_that_loses_more_than_allowed_is_refused(tmp_path: Path) -> None:
    spec = load_model(DIGITS)
    allowed = plan(DIGITS, "host", budget=Budget(quality_drop=0.01), runtime="litert")
    better = allowed.model_copy(update={"quality": 1.0})
    with pytest.raises(CheckFailed, match="are allowed"):
        build(better, spec, tmp_path / "lost.edge")
    assert not (tmp_path / "lost.edge").exists()
    assert read_manifest(build(allowed, spec, tmp_path / "kept.edge")).quality
