"""Power sensors and what a device says of itself at a moment, on folders of files that stand for machines; energy out of watts over time."""

from __future__ import annotations

import math
import os
import stat
import time
from pathlib import Path

import pytest

from edgesdk.agent import sensors
from edgesdk.agent.moments import Tree, Watcher, span
from edgesdk.agent.sensors import BadSensorError, Sampler, Sensor, find, parse_pmic, parse_tegrastats
from edgesdk.energy import energies, interval, joules, power_of
from edgesdk.report import Chunk
from edgesdk.trust import method_samples

HWMON = "/sys/class/hwmon/hwmon1/"
INA = {
    HWMON + "name": "ina3221", HWMON + "in1_label": "VDD_IN", HWMON + "in2_label": "VDD_CPU_GPU_CV", HWMON + "in3_label": "VDD_SOC",
    HWMON + "in1_input": "5000", HWMON + "in2_input": "5000", HWMON + "in3_input": "5000",
    HWMON + "curr1_input": "968", HWMON + "curr2_input": "240", HWMON + "curr3_input": "300",
    HWMON + "in4_input": "12", HWMON + "curr4_input": "1508", HWMON + "in7_label": "sum of shunt voltages",
}  # fmt: skip
OLD_INA = "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/"
RAPL = "/sys/class/powercap/intel-rapl:"
BATTERY = "/sys/class/power_supply/battery/"
ORIN = (
    "11-21-2026 10:00:00 RAM 2462/7620MB (lfb 6x4MB) SWAP 0/3810MB (cached 0MB) CPU [3%@729,0%@729,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305] "
    "cpu@47.5C gpu@46.2C tj@47.5C VDD_IN 4832mW/4900mW VDD_CPU_GPU_CV 679mW/680mW VDD_SOC 1479mW/1480mW"
)
NANO = (
    "RAM 1541/3964MB (lfb 2x2MB) CPU [6%@102,0%@102] EMC_FREQ 0%@204 GR3D_FREQ 0%@76 PLL@27C CPU@30C POM_5V_IN 2190/2190 POM_5V_GPU 40/40"
)
PMIC = """     3V7_WL_SW_A current(0)=0.10000000A
        VDD_CORE_A current(7)=1.51000000A
     3V7_WL_SW_V volt(8)=3.70000000V
        VDD_CORE_V volt(15)=0.72000000V
           EXT5V_V volt(24)=5.15398000V
"""


def tree(folder: Path, files: dict[str, str], programs: dict[str, str] | None = None) -> Tree:
    """Files, and programs as shell scripts."""
    for path, text in files.items():
        (folder / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (folder / path[1:]).write_text(text + "\n")
    for name, script in (programs or {}).items():
        place = folder / "usr/bin" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"#!/bin/sh\n{script}\n")
        place.chmod(place.stat().st_mode | stat.S_IXUSR)
    return Tree(str(folder))


def found(folder: Path, files: dict[str, str], programs: dict[str, str] | None = None) -> Sensor:
    sensor, reasons = find(tree(folder, files, programs))
    assert sensor is not None, reasons
    return sensor


# ---- each sensor


def test_the_boards_own_rail_is_taken_and_shunt_voltages_are_no_rails(tmp_path):
    sensor = found(tmp_path, INA)
    assert (sensor.name, sensor.covers) == ("ina3221 VDD_IN", "the whole board")
    assert sensor.watts() == pytest.approx(4.84)
    (tmp_path / HWMON[1:] / "curr1_input").write_text("2000\n")
    assert sensor.watts() == pytest.approx(10.0), "values move"


def test_rails_without_a_whole_are_added_up(tmp_path):
    files = {k: v for k, v in INA.items() if not k.endswith(("in1_label", "in1_input", "curr1_input"))}
    sensor = found(tmp_path, files)
    assert sensor.covers == "the rails VDD_CPU_GPU_CV, VDD_SOC" and sensor.watts() == pytest.approx(2.7)


def test_an_old_jetson_kernels_rails(tmp_path):
    sensor = found(tmp_path, {OLD_INA + "rail_name_0": "POM_5V_IN", OLD_INA + "in_power0_input": "2190", OLD_INA + "rail_name_1": "POM_5V_GPU",
                              OLD_INA + "in_power1_input": "40"})  # fmt: skip
    assert sensor.name == "ina3221 POM_5V_IN" and sensor.watts() == pytest.approx(2.19)


def test_a_chip_that_tells_power_itself(tmp_path):
    sensor = found(
        tmp_path, {HWMON + "name": "ina226", HWMON + "power1_input": "3250000", HWMON + "curr1_input": "1", HWMON + "in1_input": "1"}
    )
    assert sensor.watts() == pytest.approx(3.25)


def test_tegrastats_lines():
    assert parse_tegrastats(ORIN) == ({"VDD_IN": 4.832, "VDD_CPU_GPU_CV": 0.679, "VDD_SOC": 1.479}, 2462 << 20)
    assert parse_tegrastats(NANO) == ({"POM_5V_IN": 2.19, "POM_5V_GPU": 0.04}, 1541 << 20)
    assert parse_tegrastats("tegrastats: unknown option") == ({}, None)


def test_tegrastats_runs_where_its_files_may_not_be_read(tmp_path):
    sensor = found(tmp_path, {}, {"tegrastats": f"while :; do echo '{ORIN}'; sleep 0.05; done"})
    try:
        assert sensor.name == "tegrastats VDD_IN" and sensor.watts() == pytest.approx(4.832)
    finally:
        sensor.close()
    with pytest.raises(BadSensorError, match="ended"):
        time.sleep(0.1)
        sensor.watts()


def test_tegrastats_that_says_nothing_of_power(tmp_path):
    sensor, reasons = find(tree(tmp_path, {}, {"tegrastats": "echo RAM 1/2MB"}))
    assert sensor is None and reasons[0].startswith("no working sensor: tegrastats: no rail in")


def test_a_raspberry_pi_5(tmp_path):
    sensor = found(tmp_path, {}, {"vcgencmd": f"cat <<'X'\n{PMIC}X"})
    assert sensor.watts() == pytest.approx(0.1 * 3.7 + 1.51 * 0.72) and "not USB" in sensor.covers
    assert parse_pmic(PMIC) == pytest.approx(1.4572)


@pytest.mark.parametrize(("script", "words"), [("exit 1", "says nothing"), ("echo error=1 error_msg=nope", "no rail in")])
def test_a_raspberry_pi_4_has_no_such_chip(tmp_path, script, words):
    sensor, reasons = find(tree(tmp_path, {}, {"vcgencmd": script}))
    assert sensor is None and words in reasons[0]


def _rapl(folder: Path, energy: str, **more: str) -> Tree:
    files = {RAPL + "0/name": "package-0", RAPL + "0/energy_uj": energy, RAPL + "0/max_energy_range_uj": "1000000"}
    return tree(folder, {**files, RAPL + "0:0/name": "core", RAPL + "0:0/energy_uj": "7", **more})


def test_rapl_counts_and_begins_anew(tmp_path):
    now = iter([0.0, 2.0, 3.0, 4.0])
    made = _rapl(tmp_path, "900000")
    (sensor,) = sensors.rapl(made, lambda: next(now))
    assert sensor.name == "RAPL package-0" and sensor.covers == "the CPU package" and sensor.counts
    assert sensor.watts() is None, "a counter alone is no power"
    (tmp_path / RAPL[1:-1]).parent.joinpath("intel-rapl:0/energy_uj").write_text("980000")
    assert sensor.watts() == pytest.approx(0.04)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("30000")
    assert sensor.watts() == pytest.approx(0.05), "over its limit: 20000 + 30000 µJ in a second"
    (tmp_path / "sys/class/powercap/intel-rapl:0/max_energy_range_uj").unlink()


def test_rapl_prefers_the_platform_and_adds_memory(tmp_path):
    both = _rapl(tmp_path / "a", "1", **{RAPL + "0:1/name": "dram", RAPL + "0:1/energy_uj": "5"})
    assert sensors.rapl(both)[0].covers == "the CPU package and memory"
    psys = _rapl(tmp_path / "b", "1", **{RAPL + "1/name": "psys", RAPL + "1/energy_uj": "5"})
    assert sensors.rapl(psys)[0].name == "RAPL psys"


def test_a_counter_that_falls_without_a_limit(tmp_path):
    now = iter([0.0, 1.0])
    made = tree(tmp_path, {RAPL + "0/name": "package-0", RAPL + "0/energy_uj": "900"})
    (sensor,) = sensors.rapl(made, lambda: next(now))
    sensor.watts()
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("5")
    with pytest.raises(BadSensorError, match="fell"):
        sensor.watts()


@pytest.mark.parametrize(
    ("more", "watts"),
    [
        ({"current_now": "-450000", "voltage_now": "3900000"}, 1.755),  # µA, negative as phones have it
        ({"current_now": "450", "voltage_now": "3900000"}, 1.755),  # mA
        ({"current_now": "450000", "voltage_now": "3900"}, 1.755),  # mV
        ({"power_now": "9100000"}, 9.1),
    ],
)
def test_a_battery_that_discharges(tmp_path, more, watts):
    sensor = found(tmp_path, {BATTERY + "type": "Battery", BATTERY + "status": "Discharging", **{BATTERY + k: v for k, v in more.items()}})
    assert sensor.watts() == pytest.approx(watts) and "battery" in sensor.covers


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging", ""])
def test_a_battery_on_a_charger_says_nothing_of_the_device(tmp_path, status):
    sensor, reasons = find(
        tree(
            tmp_path, {BATTERY + "type": "Battery", BATTERY + "status": status, BATTERY + "current_now": "1", BATTERY + "voltage_now": "1"}
        )
    )
    assert sensor is None and "unplug the charger" in reasons[0]


# ---- sensors that do not work are told, never 0


def test_nothing_there(tmp_path):
    assert find(Tree(str(tmp_path)))[1] == ["no working sensor: no metered rail, power chip, battery gauge or RAPL counter is here"]


@pytest.mark.parametrize(("value", "words"), [("0", "says 0 W"), ("garbage", "says 'garbage'"), ("999999999", "W")])
def test_nonsense(tmp_path, value, words):
    sensor, reasons = find(tree(tmp_path, {**INA, HWMON + "curr1_input": value}))
    assert sensor is None and reasons[0].startswith("no working sensor: ina3221") and words in reasons[0]


def test_not_permitted(tmp_path, monkeypatch):
    made = _rapl(tmp_path, "5")
    must = Tree.must

    def denied(self: Tree, path: str) -> str:
        if path.endswith("energy_uj"):
            raise PermissionError(13, "Permission denied", path)
        return must(self, path)

    monkeypatch.setattr(Tree, "must", denied)
    sensor, reasons = find(made)
    assert sensor is None and "may be read by root only" in reasons[0]


def test_the_next_sensor_is_taken_and_the_first_ones_reason_kept(tmp_path):
    made = _rapl(tmp_path, "5", **{**INA, HWMON + "in1_input": "0"})
    sensor, reasons = find(made)
    assert sensor is not None and sensor.name.startswith("RAPL") and len(reasons) == 1


def _sampled(watts: object, seconds: float = 0.1, counts: bool = False) -> dict[str, object]:
    sampler = Sampler(Sensor("s", "c", watts, 0.002, counts), time.monotonic)  # type: ignore[arg-type]
    sampler.start()
    time.sleep(seconds)
    return sampler.end()


def test_a_sensor_that_stands_still_is_none():
    assert "it stands still" in str(_sampled(lambda: 4.2)["reason"])


def test_a_sensor_that_breaks_later():
    values = iter([4.0, 4.1])

    def read() -> float:
        for value in values:
            return value
        raise BadSensorError("s: gone")

    assert _sampled(read)["reason"] == "no working sensor: s: gone"


def test_a_sampler_tells_how_much_it_took():
    ticks = iter(range(1, 100_000))
    answer = _sampled(lambda: 1.0 + next(ticks) % 3)
    assert len(answer["times_s"]) == len(answer["watts"]) > 5  # type: ignore[arg-type]
    assert 0 < answer["sampler_share"] < 0.5  # type: ignore[operator]


# ---- energy


def test_the_trapezoid_rule_between_readings():
    times, watts = [0.0, 1.0, 2.0, 3.0], [2.0, 2.0, 4.0, 4.0]
    assert joules(times, watts, 0.0, 3.0) == pytest.approx(2 + 3 + 4)
    assert joules(times, watts, 0.5, 1.5) == pytest.approx(0.5 * 2 + 0.5 * 2.5)
    assert joules(times, watts, 1.25, 1.5) == pytest.approx(0.25 * 2.75), "no reading within"
    assert joules(times, watts, 2.5, 5.0) == pytest.approx(10.0), "beyond the last one its value holds"


def _measured(h: float, busy: float = 5.0) -> tuple[object, object]:
    """Idle at 2 W for 3 s, then two chunks of 100 calls in 2 s at `busy`, a pause between."""
    chunks = (Chunk(first=0, count=100, start_s=4.0, end_s=6.0, calls=100), Chunk(first=100, count=100, start_s=7.0, end_s=9.0, calls=100))
    times = [i * h for i in range(int(10 / h))]
    watts = [busy if any(c.start_s <= t <= c.end_s for c in chunks) else 2.0 + 0.001 * (i % 2) for i, t in enumerate(times)]
    power = power_of({"sensor": "s", "covers": "c", "times_s": times, "watts": watts, "idle": [0.0, 3.0], "sampler_share": 0.01})
    return power, method_samples("forward", None, [0.02] * 200, chunks=chunks)


def test_gross_and_net_are_apart_and_within_their_uncertainty():
    for h in (0.01, 0.1, 0.4):
        power, method = _measured(h)
        ((e,), reasons) = energies(power, [method])
        assert not reasons and e.calls == 200 and e.seconds == pytest.approx(4.0)
        assert abs(e.gross_j - 0.1) <= 3 * e.uncertainty_j + 1e-9, h
        assert e.gross_j - e.net_j == pytest.approx(2.0005 * 4 / 200, rel=1e-3)
        assert e.uncertainty_j > 0
    assert energies(_measured(0.4)[0], [method])[0][0].uncertainty_j > energies(_measured(0.01)[0], [method])[0][0].uncertainty_j


def test_too_few_readings_make_no_energy():
    power, _ = _measured(0.5)
    short = method_samples("forward", None, [0.02], chunks=(Chunk(first=0, count=1, start_s=4.0, end_s=4.02, calls=1),))
    found_, reasons = energies(power, [short])
    assert found_ == [] and "--duration" in reasons[0]
    assert energies(None, [short]) == ([], [])


def test_a_gauge_that_is_read_more_often_than_it_has_news():
    times = [i * 0.1 for i in range(100)]
    assert interval(times, [float(i // 10) for i in range(100)]) == pytest.approx(1.0)
    assert math.isclose(interval(times, [float(i) for i in range(100)]), 0.1)


# ---- moments


CPU = "/sys/devices/system/cpu/cpufreq/policy"
ZONE = "/sys/class/thermal/thermal_zone"
COOLER = "/sys/class/thermal/cooling_device"


def test_clusters_governors_zones(tmp_path):
    files = {
        CPU + "0/related_cpus": "0 1 2 3", CPU + "0/scaling_cur_freq": "1800000", CPU + "0/scaling_governor": "schedutil",
        CPU + "4/related_cpus": "4 5 7", CPU + "4/scaling_cur_freq": "2400000", CPU + "4/scaling_governor": "performance",
        "/sys/class/devfreq/17000000.gpu/cur_freq": "306000000", "/sys/class/devfreq/bus_mif/cur_freq": "5",
        ZONE + "0/type": "cpu-thermal", ZONE + "0/temp": "61500", ZONE + "1/type": "cpu-thermal", ZONE + "1/temp": "50000",
        ZONE + "2/type": "broken", ZONE + "2/temp": "-273000", ZONE + "3/type": "gpu-thermal",
    }  # fmt: skip
    moment = Watcher(tree(tmp_path, files)).moment()
    assert moment["clocks_hz"] == {"cpu0-3": 1.8e9, "cpu4,5,7": 2.4e9, "gpu": 306e6}
    assert moment["governors"] == {"cpu0-3": "schedutil", "cpu4,5,7": "performance"}
    assert moment["temperatures_c"] == {"cpu-thermal": 61.5, "cpu-thermal thermal_zone1": 50.0}
    assert moment["throttle"] is None and moment["others"] is None


def test_a_pc_tells_what_it_can(tmp_path):
    files = {
        "/proc/cpuinfo": "cpu MHz\t: 1200.5\ncpu MHz\t: 3100.0",
        HWMON + "name": "k10temp",
        HWMON + "temp1_input": "45000",
        HWMON + "temp1_label": "Tctl",
    }
    moment = Watcher(tree(tmp_path, files)).moment()
    assert moment["clocks_hz"] == {"cpu0-1": 3.1e9} and moment["temperatures_c"] == {"Tctl": 45.0}


def test_a_raspberry_pis_flags_of_now_not_of_the_past(tmp_path):
    path = "/sys/devices/platform/soc/soc:firmware/get_throttled"
    assert Watcher(tree(tmp_path / "a", {path: "50000"})).throttle() == []
    assert Watcher(tree(tmp_path / "b", {path: "50005"})).throttle() == ["under-voltage", "throttled"]
    assert Watcher(tree(tmp_path / "c", {}, {"vcgencmd": "echo throttled=0x8"})).throttle() == ["soft temperature limit"]


def test_counters_tell_what_they_rose_by(tmp_path):
    core, oc = "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "/sys/class/hwmon/hwmon0/oc1_event_cnt"
    watcher = Watcher(tree(tmp_path, {core: "41", oc: "0"}))
    assert watcher.throttle() == [], "what was before is not of now"
    (tmp_path / core[1:]).write_text("44")
    (tmp_path / oc[1:]).write_text("2")
    assert watcher.throttle() == ["core too hot (3 times)", "over-current (2 times)"]
    assert watcher.throttle() == []


def test_cooling_by_speed_counts_and_by_air_does_not(tmp_path):
    files = {COOLER + "0/type": "pwm-fan", COOLER + "0/cur_state": "4", COOLER + "1/type": "cpufreq-cpu0", COOLER + "1/cur_state": "2",
             COOLER + "1/max_state": "15", COOLER + "2/type": "gpu-balanced", COOLER + "2/cur_state": "0"}  # fmt: skip
    assert Watcher(tree(tmp_path, files)).throttle() == ["cpufreq-cpu0 2/15"]
    assert Watcher(tree(tmp_path / "fan", {COOLER + "0/type": "pwm-fan", COOLER + "0/cur_state": "4"})).throttle() is None


def test_androids_thermal_service(tmp_path):
    says = "printf 'IsStatusOverride: false\\nThermal Status: %s\\nCached temperatures:\\n'"
    assert Watcher(tree(tmp_path / "a", {}, {"dumpsys": says % 0})).throttle() == []
    assert Watcher(tree(tmp_path / "b", {}, {"dumpsys": says % 3})).throttle() == ["thermal status severe"]
    assert Watcher(tree(tmp_path / "c", {}, {"dumpsys": "echo Can\\'t find service: thermalservice"})).throttle() is None


def test_others_and_the_hypervisor(tmp_path):
    watcher = Watcher(tree(tmp_path, {"/proc/stat": "cpu  100 0 0 1000 0 0 0 0 0 0"}))
    assert watcher.moment()["others"] is None
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "proc/stat").write_text(f"cpu  {100 + 50 * ticks} 0 0 {1000 + 40 * ticks} 0 0 0 {10 * ticks} 0 0\n")
    moment = watcher.moment()
    assert 0.45 < moment["others"] <= 0.5 and moment["steal"] == pytest.approx(0.1)


def test_spans():
    assert span("0 1 2 3") == "0-3" and span("4") == "4" and span("0,2") == "0,2"
