"""The package as users get it: names, wheel contents, import cost, exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from edgesdk import api, errors

ROOT = Path(__file__).parents[1]
FOLDERS = ("edgesdk", "targets", "kernels", "profiles", "examples")


def test_cli_imports_no_heavy_package_and_is_quick():
    code = "import sys, edgesdk.cli; print([m for m in ('torch', 'numba', 'numpy', 'pydantic', 'scipy', 'rich') if m in sys.modules])"
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare = time.perf_counter() - start
        start = time.perf_counter()
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        best = min(best, time.perf_counter() - start - bare)
    assert out.strip() == "[]"
    assert best < 0.5  # the goal is 0.15 s; a busy machine gets room here, the benchmark prints the figure


def test_every_verb_is_in_the_python_api():
    assert sorted(api.__all__) == api.__all__
    for name in api.__all__:
        assert callable(getattr(api, name)), name
    with pytest.raises(AttributeError):
        _ = api.nothing


def test_error_tree_has_the_four_exit_codes():
    assert {e.exit_code for e in (errors.InputError, errors.NoAnswer, errors.DeviceError)} == {1, 2, 3}
    error = errors.UnknownName("device", "raspbery-pi-5", ["raspberry-pi-5", "host"])
    assert error.what == "unknown device 'raspbery-pi-5'"
    assert "did you mean 'raspberry-pi-5'" in error.hint


def _tree_files() -> set[str]:
    """Files of the tree under the names they must have in a wheel."""
    names = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if (
                path.is_file()
                and "__pycache__" not in path.parts
                and path.suffix in {".py", ".toml", ".typed", ".json", ".npz", ".pt", ".csv", ".c", ".cpp", ".h", ".cuh"}
            ):
                inside = path.relative_to(ROOT).as_posix()
                names.add(inside if folder == "edgesdk" else f"edgesdk/{inside}")
    return names


def test_wheel_holds_every_file_of_the_tree(tmp_path):
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert packed == _tree_files()
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import edgesdk.profiles, edgesdk.targets, edgesdk.kernels, edgesdk.examples as e; print(e.__file__)"
    out = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(site)}, cwd=site, check=True, capture_output=True, text=True
    )
    assert out.stdout.startswith(str(site))


def test_every_python_folder_is_packaged():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            name = init.parent.relative_to(ROOT).as_posix().replace("/", ".")
            assert (name if folder == "edgesdk" else f"edgesdk.{name}") in packages


def _cli(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgesdk", *args], capture_output=True, text=True, timeout=120)


def test_doctor_answers_in_json_and_finds_the_core():
    answer = json.loads(_cli("doctor", "--json").stdout)
    assert answer["kind"] == "doctor" and answer["healthy"]
    assert all(f["fix"] for f in answer["findings"] if f["state"] != "ok")


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["plan", "--device", "jetsn"], 2, "did you mean 'jetson"),
        (["plan", "--device", "jetson", "--memory", "lots"], 2, "'lots' is not a size"),
        (["plan", "--device", "jetson", "--model", "nowhere.tflite"], 2, "nowhere.tflite"),
        (["plan", "--device", "jetson", "--model", "example:digit-cnn"], 2, "did you mean 'digits-cnn'"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_bad_input_is_two_lines_and_the_right_code(args, code, text):
    done = _cli(*args)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
