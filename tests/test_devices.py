"""Profiles: all are right, every number has a source, names lead where they should, mistakes are told by file and field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgesdk import devices
from edgesdk.errors import InputError, UnknownName
from edgesdk.host import detect_host
from edgesdk.target import target_for

FOLDER = Path(devices.__file__).parents[1] / "profiles"
FILES = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_profile_is_right(path):
    device = devices.check_profile(path)
    assert device.name == path.stem
    assert target_for(device).runtimes
    for variant in device.variants:
        assert devices.load_device(f"{device.name}-{variant.suffix}").name == f"{device.name}-{variant.suffix}"


def test_there_are_enough_and_no_alias_is_taken_twice():
    found = devices.list_devices()
    assert len(found) == len(FILES) >= 16
    names = [n for d in found for n in (d.name, *d.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("jetson", "jetson-orin-nano"),
        ("pi5", "raspberry-pi-5"),
        ("phone", "galaxy-s24"),
        ("PI5-4GB", "raspberry-pi-5-4gb"),
        ("pi-zero-2w", "raspberry-pi-zero-2-w"),
    ],
)
def test_aliases_and_variants(given, name):
    assert devices.load_device(given).name == name


def test_a_variant_changes_only_what_it_says():
    whole, small = devices.load_device("pi5"), devices.load_device("pi5-4gb")
    assert small.memory.size_bytes == 4 * 1024**3 and whole.memory.size_bytes == 8 * 1024**3
    assert small.units == whole.units


def test_near_miss_is_named():
    with pytest.raises(UnknownName) as error:
        devices.load_device("raspbery-pi-5")
    assert error.value.fields["nearest"] == "raspberry-pi-5"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('isa = ["neon", "fp16", "dotprod"]', 'isa = ["nein"]', "units.cpu.isa"),
        ("size_bytes = 8589934592", 'size_bytes = "8GB"', "memory.size_bytes = '8GB'"),
        ("usable_share = 0.95", "usable_share = 1.5", "memory.usable_share = 1.5"),
        ("usable_share = 0.95", "usable_share = 0.95\nspeed = 3", "memory.speed"),
        ('"memory.bandwidth_bytes_per_s" = ', '"memory.other" = ', "memory.bandwidth_bytes_per_s: no source"),
        ('unit = "cpu"', 'unit = "gpu"', "runs on unit 'gpu'"),
        ("[memory]", "[memory", "not TOML"),
    ],
)
def test_mistakes_are_told_by_file_and_field(tmp_path, old, new, said):
    text = (FOLDER / "raspberry-pi-5.toml").read_text()
    assert old in text
    mine = tmp_path / "mine.toml"
    mine.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        devices.check_profile(mine)
    assert "mine.toml" in error.value.what and said in error.value.what
    assert error.value.hint
    done = subprocess.run([sys.executable, "-m", "edgesdk", "devices", "check", str(mine)], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 2


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_unconfirmed_figures_are_counted(path):
    device = devices.check_profile(path)
    every, open_ones = devices.figures(device), devices.not_confirmed(device)
    assert len(every) == len(set(every)) and set(open_ones) <= set(every)
    assert {f"units.{u.name}.{part}" for u in device.units for part in ("cores", "clock_hz")} <= set(every)
    assert not any("not yet checked" in s for s in device.sources.values())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_cpu_peaks_are_cores_times_clock_times_whole_operations(path):
    """A peak that does not follow its own cores and clock has been changed without them."""
    for unit in devices.check_profile(path).units:
        if unit.kind == "cpu":
            a_cycle = {d: v / (unit.cores * unit.clock_hz) for d, v in unit.peak_ops_per_s.items()}
            assert all(abs(v - round(v)) < 1e-3 and v >= 1 for v in a_cycle.values()), (unit.name, a_cycle)
            assert a_cycle.get("int8", 1e9) >= a_cycle.get("fp32", 0)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_cores_of_one_chip_share_their_instruction_set(path):
    """Linux and Android run a program on any core, so one cluster cannot have what another lacks."""
    device = devices.check_profile(path)
    assert len({unit.isa for unit in device.units if unit.kind == "cpu"}) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_source_says_where_from(path):
    """A page, a document, a formula, a measurement or an honest "not confirmed"; never a note to look it up later."""
    sources = devices.check_profile(path).sources
    assert not any("to be checked" in s for s in sources.values())
    assert all(len(s) > 20 for s in sources.values())


def test_the_longest_key_is_a_figures_source():
    device = devices.load_device("pi5")
    sources = {"units": "not confirmed: here", "units.cpu.clock_hz": "a page", "memory": "a page"}
    open_ones = devices.not_confirmed(device.model_copy(update={"sources": sources}))
    assert "units.cpu.cores" in open_ones and "units.cpu.clock_hz" not in open_ones
    nothing = device.model_copy(update={"sources": {}})
    assert devices.not_confirmed(nothing) == devices.figures(nothing)


@pytest.mark.parametrize("name", ["pi5", "pi5-2gb", "galaxy-s24", "host"])
def test_show_tells_how_many_figures_are_not_confirmed(name):
    run = [sys.executable, "-m", "edgesdk", "devices", "show", name]
    told = json.loads(subprocess.run([*run, "--json"], capture_output=True, text=True, check=True).stdout)
    total, open_ones = told["figures"]["total"], told["figures"]["not_confirmed"]
    assert told["kind"] == "device-profile" and total > len(open_ones)
    page = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert f"{len(open_ones)} of {total} figures not confirmed" in page


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        devices.load_device(str(tmp_path / "none.toml"))


def test_host_is_detected():
    host = detect_host()
    assert host.name == "host" and host.units[0].peak_ops_per_s["fp32"] > 1e9
    assert {r.name for r in host.runtimes} >= {"litert", "executorch"}
    assert devices.load_device("host").memory.size_bytes == host.memory.size_bytes
