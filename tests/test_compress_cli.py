"""`edgesdk compress` as people type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgesdk.cli import main

DIGITS = ["--model", "example:digits-cnn"]


def _run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["--quiet", "compress", *args])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_a_recipe_in_json_and_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = _run(capsys, *DIGITS, "-r", "rtn:bits=4,group=0", "--out", str(tmp_path / "d.edgec"), "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["kind"] == "compression"
    assert answer["weight_bytes"] == sum(w["bytes"] for w in answer["weights"])
    assert (tmp_path / "d.edgec").stat().st_size > answer["weight_bytes"]
    assert answer["quality"] > 0.97


def test_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, *DIGITS, "-r", "rtn:bits=3,group=0", "-r", "rtn@hidden:bits=8", "--no-evaluate")
    assert code == 0
    assert "bits=8" in out
    assert "bits each" in out
    assert "quality" not in out
    assert "nothing was written" in out


def test_the_list_names_every_method_and_weight(capsys: pytest.CaptureFixture[str]) -> None:
    from edgesdk.compress.registry import METHODS

    code, out, _ = _run(capsys, "--list", *DIGITS, "--json")
    answer = json.loads(out)
    assert code == 0
    assert [m["name"] for m in answer["methods"]] == sorted(METHODS)
    assert all(m["source"] and m["family"] for m in answer["methods"])
    assert "hidden.weight" in [w["name"] for w in answer["weights"]]
    code, out, _ = _run(capsys, "--list")
    assert code == 0
    assert "squeezellm" in out


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ([], 2, "no --model"),
        (DIGITS, 2, "nothing says how to compress"),
        ([*DIGITS, "--method", "rtn:bits=4"], 2, "nothing is to be chosen"),
        ([*DIGITS, "--bits", "3", "--storage", "9kB"], 2, "give one of bits and bytes"),
        ([*DIGITS, "-r", "nope"], 2, "unknown compression method 'nope'"),
        ([*DIGITS, "-r", "gptq:bitz=4"], 2, "bitz"),
        ([*DIGITS, "-r", "gptq:bits"], 2, "has no '='"),
        ([*DIGITS, "-r", "rtn@nothing:bits=4"], 2, "no weight"),
        ([*DIGITS, "--bits", "0.01", "--method", "rtn:bits=8", "--generations", "0"], 1, "smallest options take"),
    ],
)
def test_bad_input_is_two_lines(capsys: pytest.CaptureFixture[str], args: list[str], code: int, text: str) -> None:
    got, out, err = _run(capsys, *args)
    assert got == code
    assert out == ""
    assert text in err
    assert err.count("\n") == 2
