"""From a model to a microcontroller: plan and build for one, then flash with a dry run; what its runtime lacks is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from edgesdk.bundles import read_manifest, read_member
from edgesdk.cli import app
from edgesdk.devices import load_device
from edgesdk.errors import InputError
from edgesdk.lower.litert import convert_float
from edgesdk.lower.micro import refuse
from edgesdk.model import Method, ModelSpec
from edgesdk.plan.options import table

MODEL = """
import torch

def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4))
    return net.eval().requires_grad_(False), (torch.randn(1, 32),)
"""


def test_plan_build_and_a_dry_run_for_each_way_in(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(MODEL)
    bundle = str(tmp_path / "net.edge")
    built = CliRunner().invoke(app, ["build", "--model", f"{tmp_path}/net.py:model", "--device", "esp32-s3", "--out", bundle])
    assert built.exit_code == 0, built.exception
    assert f"next: edgesdk flash {bundle} --to esp32:" in built.stdout
    manifest = read_manifest(bundle)
    assert (manifest.runtime, manifest.device, manifest.program) == ("tflite-micro", "esp32-s3", "model.tflite")
    assert manifest.golden and manifest.host_check and manifest.runtime_version.startswith("not run there")
    assert 4 * (32 + 24) <= manifest.memory["planned:forward:0"] < 2000
    (tmp_path / "INFO_UF2.TXT").write_text("Model: Raspberry Pi RP2350\nBoard-ID: RP2350\n")
    for to in ("esp32:/dev/ttyUSB0?chip=esp32s3", f"uf2:{tmp_path}?address=0x10200000"):
        shown = CliRunner().invoke(app, ["flash", bundle, "--to", to, "--dry-run", "--json"])
        answer = json.loads(shown.stdout)
        assert answer["action"] == "dry-run" and answer["size_bytes"] == len(read_member(bundle, "model.tflite"))


@pytest.mark.parametrize("name", ["esp32s3", "pico", "pico-2", "nrf52840", "ethos-u55-256"])
def test_microcontrollers_take_floats_or_whole_int8(name):
    device = load_device(name)
    runtime = next(r for r in device.runtimes if r.name == "tflite-micro")
    assert device.family == "mcu" and "int8-static" in runtime.precisions
    assert {p for kinds in table("tflite-micro").values() for p in kinds} == {"fp32", "int8-static"}


def test_operators_that_its_runtime_lacks_are_named():
    spec = ModelSpec(name="net", digest="0" * 64, methods={"forward": Method(torch.nn.GELU(), (torch.randn(1, 8),))})
    with pytest.raises(InputError, match="TensorFlow Lite Micro has no GELU"):
        refuse(convert_float(spec), "net")


def test_weights_stay_in_flash_and_take_no_memory(tmp_path):
    (tmp_path / "wide.py").write_text(MODEL.replace("32, 24", "512, 600").replace("24, 4", "600, 4").replace("1, 32", "1, 512"))
    asked = ["plan", "--model", f"{tmp_path}/wide.py:model", "--device", "pico", "--json"]
    plan = json.loads(CliRunner().invoke(app, asked).stdout)
    assert plan["memory"]["weights_bytes"] > 1_200_000 and plan["memory"]["peak_bytes"] < 20_000 and plan["fits"]
    assert [c["limit"] for c in plan["checks"] if c["name"] == "storage"] == [
        2 << 20
    ]  # all of the board's flash, if nothing less is asked for
    small = CliRunner().invoke(app, [*asked, "--storage", "100kB"])
    assert small.exit_code == 1 and not json.loads(small.stdout)["fits"]
