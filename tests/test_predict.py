"""Prediction of published latencies: tables, names, law, rows and the verb."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgesdk import predict
from edgesdk.cli.bench import register
from edgesdk.errors import InputError
from edgesdk.predict import names
from edgesdk.predict.cnn import CLASSIFIERS
from edgesdk.predict.detect import detector
from edgesdk.predict.fit import Point
from edgesdk.predict.machines import find_machine
from edgesdk.predict.physics import Case
from edgesdk.predict.rows import COLUMNS, Row, case_of, read_rows

PUBLISHED = Path(__file__).parents[1].parent / "shared" / "data" / "published_latency.csv"


def _write(path: Path, *rows: tuple[str, ...], header: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return path


def _row(
    device: str, model: str, runtime: str = "ncnn benchncnn", value: str = "46.21", unit: str = "ms", threads: str = "4"
) -> tuple[str, ...]:
    return (device, model, "fp (ncnn default)", runtime, threads, value, unit, "", "a test")


# Multiply-accumulates (1e9) and weights (1e6) as the papers and torchvision's own model tables state them.
@pytest.mark.parametrize(
    ("name", "gmacs", "mparams"),
    [("resnet18", 1.81, 11.7), ("resnet50", 4.09, 25.6), ("vgg16", 15.47, 138.4), ("mobilenetv2", 0.30, 3.5), ("mobilenetv3large", 0.22,
        5.5),
     ("efficientnetb0", 0.39, 5.3), ("inceptionv3", 5.71, 23.8), ("densenet121", 2.83, 8.0), ("googlenet", 1.5, 6.6), ("convnexttiny",
     4.46, 28.6),
     ("mnasnet", 0.31, 4.4), ("shufflenetv2", 0.14, 2.3), ("efficientnetv2s", 8.37, 21.5), ("regnety400m", 0.40, 4.3)],
)  # fmt: skip
def test_classifiers_count_what_their_papers_count(name: str, gmacs: float, mparams: float) -> None:
    layers = CLASSIFIERS[name](None).layers
    assert sum(x.macs for x in layers) / 1e9 == pytest.approx(gmacs, rel=0.06)
    assert sum(x.weights for x in layers) / 1e6 == pytest.approx(mparams, rel=0.07)


# Ultralytics' own tables: FLOPs (halved) at 640 and parameters.
@pytest.mark.parametrize(
    ("name", "gmacs", "mparams"),
    [
        ("yolov8n", 4.35, 3.2),
        ("yolov8s", 14.3, 11.2),
        ("yolov8m", 39.45, 25.9),
        ("yolo11n", 3.25, 2.6),
        ("yolo11m", 34.0, 20.1),
        ("yolo11x", 97.45, 56.9),
    ],
)
def test_detectors_count_what_their_makers_count(name: str, gmacs: float, mparams: float) -> None:
    net = detector(name, None)
    assert net is not None
    assert sum(x.macs for x in net.layers) / 1e9 == pytest.approx(gmacs, rel=0.03)
    assert sum(x.weights for x in net.layers) / 1e6 == pytest.approx(mparams, rel=0.03)


def test_language_models_weigh_what_their_names_say() -> None:
    for name, billions in (
        ("llama3.2:3b", 3.2),
        ("Llama 3.1 8B", 7.5),
        ("tinyllama", 1.03),
        ("qwen2.5:7b", 7.1),
        ("gemma2:2b", 2.6),
        ("Llama 2 7B", 6.6),
    ):
        found = names.language(name)
        assert found is not None, name
        assert found[1].weights / 1e9 == pytest.approx(billions, rel=0.03)


def test_one_model_by_many_names() -> None:
    for spellings in (
        ("resnet50", "ResNet50", "resnet50_int8", "ResNet-50"),
        ("mobilenet_v3", "MobileNet-v3-Large"),
        ("YOLOv8-Detection", "YOLOv8n 640", "yolov8n"),
    ):
        assert len({names.canonical(s) for s in spellings}) == 1, spellings
    assert names.cnn_or_transformer("a model nobody knows") is None


def test_devices_by_their_published_names() -> None:
    for text, name in (
        ("Raspberry Pi 5 2.4GHz (A76x4) CPU", "raspberry-pi-5"), ("Raspberry Pi 4 2GB", "raspberry-pi-4"),
        ("Jetson Orin Nano 8GB Super mode", "jetson-orin-nano-super"),
        ("Samsung Galaxy S24 (Snapdragon 8 Gen 3)", "snapdragon-8-gen3"), ("Snapdragon 8 Elite Gen 5 QRD", "snapdragon-8-elite-gen5"),
    ):  # fmt: skip
        machine = find_machine(text)
        assert machine is not None and machine.name == name
    assert find_machine("abacus") is None


def test_faster_hardware_and_bigger_models_order_the_predictions(tmp_path: Path) -> None:
    devices = ("Raspberry Pi 3 Model B+", "Raspberry Pi 4", "Raspberry Pi 5")
    path = _write(tmp_path / "r.csv", *(_row(d, m) for d in devices for m in ("resnet18", "resnet50", "vgg16")))
    got = [p.predicted for p in predict.predict_rows(path)]
    assert all(x is not None for x in got)
    table = [got[i : i + 3] for i in (0, 3, 6)]
    assert all(r == sorted(r) for r in table)  # type: ignore[type-var]
    assert all(slow > fast for slow, fast in zip(table[0], table[2], strict=True))  # type: ignore[operator]


def test_more_threads_are_never_slower(tmp_path: Path) -> None:
    path = _write(tmp_path / "r.csv", *(_row("Raspberry Pi 5", "resnet50", threads=str(n)) for n in (1, 2, 3, 4)))
    times = [p.predicted or 0 for p in predict.predict_rows(path)]
    assert times == sorted(times, reverse=True) and times[0] < 4 * times[3]


def test_tokens_a_second_are_predicted_as_a_rate(tmp_path: Path) -> None:
    rows = [
        (*_row("Raspberry Pi 5 8GB", m, "Ollama", "5", "tok/s decode", "")[:2], "Q4_K_M", "Ollama", "", "5", "tok/s decode", "", "t")
        for m in ("llama3.2:1b", "llama3.2:3b", "llama3.1:8b")
    ]
    items = predict.predict_rows(_write(tmp_path / "r.csv", *rows))
    rates = [p.predicted or 0 for p in items]
    assert rates == sorted(rates, reverse=True) and 0.5 < rates[2] < rates[0] < 40
    assert all(p.low is not None and p.high is not None and p.low < (p.predicted or 0) < p.high for p in items)


def test_unknown_rows_are_listed_with_the_reason(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "r.csv",
        _row("abacus", "resnet50"),
        _row("Raspberry Pi 5", "net of nets"),
        _row("Raspberry Pi 5", "resnet50", "a runtime"),
        _row("Raspberry Pi 5", "resnet50"),
    )
    items = predict.predict_rows(path)
    assert [p.known for p in items] == [False, False, False, True]
    assert [p.why and p.why.split()[0] for p in items] == ["device", "model", "runtime", None]
    assert predict.summarise(items)["all"]["unknown"] == 3


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        ([_row("Raspberry Pi 5", "resnet50", value="fast")], COLUMNS, "value = 'fast'"),
        ([_row("Raspberry Pi 5", "resnet50", value="-1")], COLUMNS, "not above zero"),
        ([_row("Raspberry Pi 5", "resnet50", value="nan")], COLUMNS, "not above zero"),
        ([_row("Raspberry Pi 5", "resnet50", threads="many")], COLUMNS, "threads = 'many'"),
        ([_row("Raspberry Pi 5", "resnet50", unit="parsec")], COLUMNS, "unit = 'parsec'"),
        ([], COLUMNS, "no rows"),
        ([("a",)], ("device",), "column 'model' is missing"),
    ],
)
def test_bad_rows_are_refused_by_line_and_cell(tmp_path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_rows(_write(tmp_path / "r.csv", *rows, header=header))
    assert says in caught.value.what and caught.value.hint


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")


def test_the_verb_prints_versioned_json(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)
    path = _write(tmp_path / "r.csv", _row("Raspberry Pi 5", "resnet50"), _row("abacus", "resnet50"))
    result = CliRunner().invoke(app, ["bench", "predictions", "--rows", str(path), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["kind"] == "prediction-report" and data["schema_version"] == 1
    assert data["summary"]["all"]["rows"] == 2 and data["summary"]["all"]["unknown"] == 1
    assert data["rows"][0]["low"] < data["rows"][0]["predicted"] < data["rows"][0]["high"]


def test_every_shipped_row_is_known_and_has_a_source() -> None:
    from edgesdk.predict.fit import shipped_rows

    rows = shipped_rows()
    assert len(rows) > 300
    assert all(r.source.startswith("https://") for r in rows)
    assert not [why for r in rows if isinstance(why := case_of(r), str)]


def _case(device: str, model: str, precision: str, runtime: str, note: str = "", threads: int | None = None) -> Case:
    case = case_of(Row(2, device, model, precision, runtime, threads, 1.0, "ms", note, "a test"))
    assert isinstance(case, Case), case
    return case


def test_cores_run_what_they_have_instructions_for() -> None:
    fast = _case("Raspberry Pi 5", "resnet50", "fp (ncnn default)", "ncnn benchncnn", threads=1)
    old = _case("Raspberry Pi 4", "resnet50", "fp (ncnn default)", "ncnn benchncnn", threads=1)
    assert fast.precision == "fp16" and fast.act_bytes == 2.0, "a Cortex-A76 multiplies in fp16"
    assert old.act_bytes == 4.0 and fast.peak / fast.clock == 4 * old.peak / old.clock
    xavier = _case("Jetson AGX Xavier CPU", "resnet50_int8", "int8", "ncnn benchncnn", threads=1)
    assert xavier.peak < 2 * _case("Jetson AGX Xavier CPU", "resnet50", "fp32", "ncnn-2021 benchncnn 2021", threads=1).peak
    assert _case("Rockchip RK3588", "resnet50", "fp", "ncnn benchncnn", threads=1).precision == "fp32", "its published build is plain NEON"


def test_onnx_runtime_runs_what_its_cpu_cannot_quantize_as_floats() -> None:
    board, note = "Dragonwing RB3 Gen 2 (QCS6490)", "primary compute unit CPU"
    assert _case(board, "ResNet50", "w8a8", "onnx", note).precision == "int8"
    assert _case(board, "EfficientNet-B0", "w8a16", "onnx", note).precision == "fp32"
    assert _case(board, "VIT", "w8a8", "onnx", note).precision == "fp32"


def test_parts_of_the_time_add_up_and_effects_act_on_them() -> None:
    from edgesdk.predict.effects import effects, spread, total
    from edgesdk.predict.physics import PARTS, Table, prior

    case = _case("Raspberry Pi 5", "mobilenet_v2", "fp32", "ncnn benchncnn", threads=4)
    law = {name: mean for name, (mean, _) in prior("cpu").items()}
    seconds, shares = Table([case]).parts(law)
    assert shares.shape == (1, len(PARTS)) and shares.sum() == pytest.approx(1.0) and shares.min() >= 0
    found = effects(case, shares[0])
    assert found["device:raspberry-pi-5"] == 1.0 and found["core-threads:a76"] == pytest.approx(math.log(4))
    assert found["program-part:ncnn:dw"] == pytest.approx(float(shares[0, PARTS.index("dw")]))
    assert total(found, {}) == 0.0 and total(found, {"device:raspberry-pi-5": 0.3}) == 0.3
    assert all(spread(name, "cpu") > 0 for name in found) and spread("device:x", "npu") > spread("device:x", "cpu")
    slower = Table([case]).parts({**law, "eff:dw": law["eff:dw"] - 0.01})[0] - seconds
    assert float(slower[0]) == pytest.approx(0.01 * float(shares[0, PARTS.index("dw")]), rel=0.05)


def _made_up(devices: tuple[str, ...], off: dict[str, float]) -> list[Point]:
    """Points that follow the law at its priors, each device off by a factor exp(`off`)."""
    from edgesdk.predict.physics import Table, prior

    law = {name: mean for name, (mean, _) in prior("cpu").items()}
    names_ = ("resnet18", "resnet50", "mobilenet_v2", "vgg16", "squeezenet", "googlenet", "mobilenet_v3", "efficientnet_b0")
    cases = [_case(d, m, "fp32", "ncnn benchncnn", threads=4) for d in devices for m in names_]
    times = Table(cases).parts(law)[0]
    return [Point(c, float(t) + off.get(c.device, 0.0), "a test") for c, t in zip(cases, times, strict=True)]


def test_a_device_that_is_off_is_learnt_from_few_anchors() -> None:
    from edgesdk.predict.check import anchored, left_out
    from edgesdk.predict.fit import Fit

    points = _made_up(("Raspberry Pi 3", "Raspberry Pi 4", "Raspberry Pi 5", "Jetson Nano CPU"), {"raspberry-pi-4": 0.4})
    fit = Fit("cpu", points)
    odd = {j.point.case.model: j.error for j in left_out(fit, "device") if j.fold == "raspberry-pi-4"}
    assert all(-0.6 < e < -0.25 for e in odd.values()), "left out, nothing tells that it is slow"
    by_k = anchored(fit, {id(p) for p in points if p.case.device == "raspberry-pi-4"}, (0, 1, 3, 5))
    means = [sum(map(abs, by_k[k])) / len(by_k[k]) for k in (0, 1, 3, 5)]
    assert means[0] > 1.5 * means[1] > 1.5 * means[3] and means[3] < 0.1
    assert len({len(v) for v in by_k.values()}) == 1, "every K is judged on the same rows"


def test_a_wild_row_moves_the_fit_little() -> None:
    from dataclasses import replace

    from edgesdk.predict.fit import Fit

    points = _made_up(("Raspberry Pi 3", "Raspberry Pi 4", "Raspberry Pi 5"), {})
    wild = [replace(points[0], measured=points[0].measured + 3.0), *points[1:]]
    import numpy as np

    everything = np.arange(len(points))
    plain, moved = (Fit("cpu", p).fold(everything, everything)[0] for p in (points, wild))
    assert float(np.abs(plain - moved)[1:].mean()) < 0.1


def test_intervals_widen_with_what_the_fit_has_not_seen() -> None:
    from edgesdk.predict.fit import row_spread

    found = {"device:a": 1.0, "model:b": 1.0}
    both, none = row_spread(found, {"device:a": 0.02, "model:b": 0.02}, "cpu"), row_spread(found, {}, "cpu")
    assert none > row_spread(found, {"device:a": 0.02}, "cpu") > both


@pytest.mark.skipif(not PUBLISHED.exists(), reason="../shared/data/published_latency.csv is not beside the checkout")
def test_left_out_devices_and_models_stay_where_they_were_reached() -> None:
    """On the GPU rows alone, which take seconds; docs/predictions.md has every engine."""
    from edgesdk.predict.check import check_left_out

    rows = [r for r in read_rows(PUBLISHED) if isinstance(c := case_of(r), Case) and c.engine == "gpu"]
    groups = check_left_out(rows, 3)
    assert groups["whole devices left out"]["rows"] == groups["whole models left out"]["rows"] == len(rows)
    assert groups["whole devices left out"]["median_error"] < 0.3 and groups["whole models left out"]["median_error"] < 0.25
    assert {f"devices left out but for {k} rows" for k in (0, 1, 3)} <= set(groups)


def test_the_conformal_quantile_covers() -> None:
    from edgesdk.predict.check import quantile

    errors = [i / 100 for i in range(1, 100)]
    assert quantile(errors, 0.8) == pytest.approx(0.80)
    assert quantile([0.1, 0.2], 0.8) > 0.2


@pytest.mark.skipif(not PUBLISHED.exists(), reason="../shared/data/published_latency.csv is not beside the checkout")
def test_published_rows_are_predicted(tmp_path: Path) -> None:
    items = predict.predict_rows(PUBLISHED)
    summary = predict.summarise(items)
    assert summary["all"]["unknown"] == 0
    assert summary["all"]["median_error"] < 0.08
    assert summary["all"]["inside_interval"] >= 0.75
    assert all(math.isfinite(p.predicted or math.nan) for p in items)


def test_the_planner_gets_fitted_efficiencies() -> None:
    from edgesdk.device import ComputeUnit, DeviceProfile, Memory, RuntimeSupport
    from edgesdk.errors import UnknownName

    unit = ComputeUnit(name="cpu", kind="cpu", core="cortex-a76", cores=4, clock_hz=2.4e9, peak_ops_per_s={"fp32": 1.536e11})
    device = DeviceProfile(
        name="raspberry-pi-5", title="Raspberry Pi 5", family="raspberry-pi", arch="aarch64", os="linux", units=(unit,),
        memory=Memory(size_bytes=8 << 30, usable_share=0.8, bandwidth_bytes_per_s=17e9),
        runtimes=(RuntimeSupport(name="litert", unit="cpu", precisions=("fp32",)),), sources={"": "a test"},
    )  # fmt: skip
    answer = predict.efficiency_for(device, "litert")
    row = answer.row("conv2d", "fp32")
    assert answer.origin == "fitted" and row is not None and row.share_of_peak is not None
    assert 0.05 < row.share_of_peak < 1 and 0.1 < row.log_sd < 1
    with pytest.raises(UnknownName):
        predict.efficiency_for(device, "tflite-micro")
