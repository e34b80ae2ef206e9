"""Reading what a device is: four boards' texts, one script and one agent that say the same, profiles of very boards, and what goes wrong."""

from __future__ import annotations

import json
import os
import tomllib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgesdk import devices
from edgesdk.agent.facts import facts as own_facts
from edgesdk.cli import app
from edgesdk.errors import DeviceError, EdgeError, InputError, LinkError, UnknownName
from edgesdk.probe import facts_of, probe, profiles_of
from edgesdk.probe.compose import compose, recognise
from edgesdk.probe.facts import read_facts
from edgesdk.probe.gather import by_shell, split, texts_of
from edgesdk.probe.toml import toml
from edgesdk.profile import profile
from edgesdk.transport.fake import FakeTransport
from edgesdk.transport.local import LocalTransport
from tests import boards
from tests.tiny import tiny_bundle

BOARDS = {"pi4": boards.pi4, "pi5": boards.pi5, "orin": boards.orin_nano, "phone": boards.snapdragon}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESDK_DEVICES", str(tmp_path / "devices"))
    return tmp_path / "devices"


def fake(name="pi5", **texts):
    return FakeTransport(texts={k: v for k, v in {**BOARDS[name](), **texts}.items() if v})


@pytest.mark.parametrize(
    ("name", "cores", "based_on", "family", "identified_by"),
    [
        ("pi4", {"cpu": ("cortex-a72", 4, 1.8e9)}, "raspberry-pi-4b", "raspberry-pi", "/proc/device-tree/serial-number"),
        ("pi5", {"cpu": ("cortex-a76", 4, 2.4e9)}, "raspberry-pi-5", "raspberry-pi", "/proc/device-tree/serial-number"),
        ("orin", {"cpu": ("cortex-a78ae", 6, 1.728e9)}, "jetson-orin-nano", "jetson", "/proc/device-tree/serial-number"),
        (
            "phone",
            {
                "cpu": ("cortex-x3", 1, 3.36e9),
                "performance": ("cortex-a715", 2, 2.8032e9),
                "performance-1": ("cortex-a710", 2, 2.8032e9),
                "efficiency": ("cortex-a510", 3, 2.016e9),
            },
            "galaxy-s23",
            "phone",
            "getprop ro.serialno",
        ),
    ],
)
def test_a_board_becomes_its_own_profile(name, cores, based_on, family, identified_by):
    found = probe(fake(name))
    profile = devices.load_device(found.profile.name)
    assert profile == found.profile and found.written and profile.name.startswith(based_on + "-")
    assert {u.name: (u.core, u.cores, u.clock_hz) for u in profile.units if u.kind == "cpu"} == cores
    assert profile.family == family and profile.board.based_on == based_on and profile.board.identified_by == identified_by
    assert len(profile.board.id) == 16 and not profile.board.emulated
    assert profile.memory.size_bytes < devices.load_device(based_on).memory.size_bytes, "what the system sees, not what is soldered on"
    assert all(devices.source_of(profile.sources, f) for f in devices.figures(profile))
    assert profile.sources["units.cpu.clock_hz"].startswith("probed ") and "/cpufreq/" in profile.sources["units.cpu.clock_hz"]
    for unit in profile.units:
        if unit.kind == "cpu":
            assert unit.peak_ops_per_s["fp32"] / (unit.cores * unit.clock_hz) in (8, 16, 32)


def test_what_only_a_jetson_and_a_phone_tell():
    orin, phone = facts_of(fake("orin")), facts_of(fake("phone"))
    assert orin.nvidia == {"l4t": "36.4.3", "cuda": "12.6.11", "power_mode": "15W"}
    assert [(r.name, r.answers) for r in orin.rails] == [("VDD_IN", True), ("VDD_CPU_GPU_CV", True), ("VDD_SOC", False)]
    assert [z.temperature_c for z in orin.zones] == [49.5, None, 50.1], "a zone that does not answer is no zero"
    assert phone.system == "Android 14 (API 34)" and phone.android and phone.python is None and phone.via == "shell"
    assert [(r.name, r.kind) for r in phone.rails] == [("battery", "battery")]
    assert phone.programs == {"benchmark_model": "/data/local/tmp/benchmark_model"}
    profile = probe(fake("orin")).profile
    assert profile.default_power_mode == "15W" and {u.name for u in profile.units} == {"cpu", "gpu"}
    assert profile.unit("gpu") == devices.load_device("jetson-orin-nano").unit("gpu"), "what cannot be read is the shipped profile's"
    assert [r.name for r in facts_of(fake("pi5")).rails] == ["3V7_WL_SW", "VDD_CORE"]


def test_variants_by_memory_and_by_clock():
    small = fake("pi5", **{"/proc/meminfo": boards.meminfo(4147000, 3700000)})
    assert probe(small).profile.board.based_on == "raspberry-pi-5-4gb"
    older = {k: "1510400" for k in boards.orin_nano() if k.endswith("cpuinfo_max_freq")}
    older["/proc/device-tree/model"] = "NVIDIA Jetson Orin Nano Developer Kit"
    assert probe(fake("orin", **older)).profile.memory.bandwidth_bytes_per_s == 6.8e10


def test_an_unknown_board_gets_derived_figures_that_say_so():
    texts = {
        "/proc/device-tree/model": "Acme Gadget",
        "/proc/device-tree/compatible": "acme,gadget",
        "/proc/device-tree/serial-number": "77",
    }
    texts["/proc/cpuinfo"] = boards.cpuinfo([boards.core(0x41, 0xD05, boards.ARMV82)] * 4)
    profile = probe(fake("pi4", **texts)).profile
    assert profile.family == "linux" and profile.unit("cpu").core == "cortex-a55" and profile.board.based_on is None
    assert (
        profile.sources["memory.bandwidth_bytes_per_s"].startswith("not confirmed")
        and "GHz" in profile.sources["memory.bandwidth_bytes_per_s"]
    )
    strange = {**texts, "/proc/cpuinfo": boards.cpuinfo([boards.core(0x7A, 0xABC, boards.ARMV8)] * 2)}
    core = facts_of(fake("pi4", **strange)).clusters
    assert core[0].core == "arm-0x7a-0xabc"


def test_a_core_by_its_register_where_cpuinfo_hides_it():
    texts = {f"/sys/devices/system/cpu/cpu{i}/regs/identification/midr_el1": "0x00000000414fd0b1" for i in range(4)}
    texts["/proc/cpuinfo"] = "Processor\t: AArch64 Processor rev 1\nFeatures\t: fp asimd asimddp"
    (cluster,) = facts_of(fake("pi5", **texts)).clusters
    assert (cluster.core, cluster.cores) == ("cortex-a76", 4)


def test_probing_again_says_what_changed_and_keeps_what_was_measured(folder):
    first = probe(fake("pi5"), name="kitchen")
    path = folder / "kitchen.toml"
    assert first.path == path and not first.again
    assert probe(fake("pi5")).changes == [], "the name it has already, and nothing new"
    text = path.read_text().replace("one_thread_bytes_per_s = 12600000000.0", "one_thread_bytes_per_s = 11e9")
    text += '"memory.one_thread_bytes_per_s" = "measured 2026-01-01: here"\n'
    source = tomllib.loads(first.text)["sources"]["memory.one_thread_bytes_per_s"]
    path.write_text(text.replace(f'"memory.one_thread_bytes_per_s" = {json.dumps(source, ensure_ascii=False)}\n', "", 1))
    assert devices.load_device("kitchen").memory.one_thread_bytes_per_s == 11e9
    changed = probe(fake("pi5", **{"!package litert": "2.3.0"}))
    assert changed.changes == [{"field": "board.runtimes.litert", "before": "2.1.0", "after": "2.3.0"}]
    assert devices.load_device("kitchen").memory.one_thread_bytes_per_s == 11e9


def test_a_board_without_an_id_has_a_profile_and_is_never_taken_for_itself():
    nameless = {k: v for k, v in boards.pi5().items() if k != "/proc/device-tree/serial-number"}
    nameless["/proc/cpuinfo"] = nameless["/proc/cpuinfo"].replace("Serial", "Other")
    profile = probe(FakeTransport(texts=nameless)).profile
    assert profile.name == "raspberry-pi-5-board" and profile.board.id == "unknown"
    assert probe(FakeTransport(texts=nameless)).again
    assert "cannot be told" in devices.bound_to(profile, facts_of(FakeTransport(texts=nameless)).model_dump())


def test_a_name_that_is_taken_is_refused(folder):
    for name in ("pi5", "raspberry-pi-5-4gb", "host", "Jetson"):
        with pytest.raises(InputError, match="a shipped device is called so"):
            probe(fake(), name=name)
    with pytest.raises(InputError, match="not a name"):
        probe(fake(), name="../x")
    probe(fake("pi5"), name="mine")
    with pytest.raises(InputError, match="bound to another board"):
        probe(fake("pi4"), name="mine")
    (folder / "hand.toml").write_text('name = "hand"\n')
    with pytest.raises(InputError, match="not read from a board"):
        probe(fake("pi4"), name="hand")
    assert not list(folder.glob("*.part"))


def test_the_one_door_sees_user_profiles_and_no_more_than_that(folder):
    profile = probe(fake("pi5"), name="mine").profile
    assert profile in devices.list_devices() and profile not in devices.shipped_devices()
    with pytest.raises(UnknownName) as error:
        devices.load_device("mime")
    assert error.value.fields["nearest"] == "mine"
    text = (folder / "mine.toml").read_text()
    (folder / "pi5.toml").write_text(text.replace('name = "mine"', 'name = "pi5"'))
    with pytest.raises(InputError, match="the name of a shipped device"):
        devices.load_device("pi5")
    (folder / "other.toml").write_text(text)
    with pytest.raises(InputError, match="name = 'mine', wanted 'other'"):
        devices.load_device("other")
    (folder / "broken.toml").write_text("[")
    assert [p.name for p in devices.user_devices()] == ["mine"], "a broken one never blocks the others"


def test_another_board_behind_the_link_is_told():
    mine, facts = probe(fake("pi5"), name="mine").profile, facts_of(fake("pi4"))
    assert devices.bound_to(mine, facts_of(fake("pi5")).model_dump()) is None
    said = devices.bound_to(mine, facts.model_dump(), "ssh://there")
    assert mine.board.id in said and facts.board_id in said and "ssh://there" in said and "Raspberry Pi 4" in said
    assert "cannot be told" in devices.bound_to(mine, {"board_id": None})
    assert devices.bound_to(devices.load_device("pi5"), facts.model_dump()) is None, "a shipped profile is of no single board"
    assert profiles_of(mine.board.id) == [mine] and profiles_of(None) == []


def test_agent_and_shell_say_the_same_of_this_machine(tmp_path):
    link = LocalTransport(tmp_path / "root")
    shell = by_shell(link)
    agent, via = texts_of(link)
    assert via == "agent"
    sway = ("/proc/meminfo", "/proc/cpuinfo", "!df", "/proc/mounts")
    same = {k for k in shell if not k.endswith(("/temp", "_input", "_now", "_uj"))} - set(sway)
    assert {k: agent.get(k) for k in same} == {k: shell[k] for k in same}
    assert set(agent) - set(shell) <= {k for k in agent if k.startswith(("!package", "!python", "!program"))}
    facts = read_facts(agent, "local", via)
    assert facts.board_id == own_facts()["board_id"] and facts.memory_bytes > 1e8 and facts.clusters[0].cores >= 1
    assert facts.runtimes["litert"] and facts.disk.writable


def test_odd_texts_are_no_crash():
    assert split(b"") == {}
    assert split(b"banner\n@edgesdk@ a\nx\0y\n\n@edgesdk@ b\n") == {"a": "x y"}
    texts = boards.pi5() | {"/proc/device-tree/serial-number": "0000000000000000", "!df": "nonsense", "!pmic": "error", "!nvpmodel": "?"}
    texts |= {"/sys/devices/system/cpu/cpu0/cache/index0/size": "many", "/usr/local/cuda/version.json": "{", "/etc/nv_tegra_release": "?"}
    facts = read_facts(texts, "x", "shell")
    assert facts.identified_by == "/proc/cpuinfo: Serial" and facts.disk.size_bytes is None and facts.nvidia == {} and facts.rails == ()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_a_device_says_is_a_profile_or_two_lines(data):
    texts = data.draw(st.sampled_from([boards.pi4(), boards.orin_nano(), boards.snapdragon()]))
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(texts)))
        strange = st.one_of(st.text(max_size=60), st.from_regex(r"-?[0-9]{1,25}[KM%]?", fullmatch=True), st.just("9" * 5000))
        texts[name] = data.draw(st.one_of(strange, strange.map(lambda s, name=name: texts[name].replace("0", s)[:10000])))
    try:
        facts = read_facts(texts, "x", "shell")
        made = toml(compose(facts, "x", recognise(facts)))
        assert devices.check_text(made, "x").board.model == facts.model
    except EdgeError as error:
        assert error.what and error.hint


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"/proc/cpuinfo": "\x01\x02 garbage : : :", "cores": "none"}, "tells of no cores"),
        ({"/proc/meminfo": "MemTotal: lots"}, "/proc/meminfo tells no size"),
        ({"!uname": "Plan9 4 mips"}, "'mips' is no machine"),
        ({"!uname": ""}, "'' is no machine"),
    ],
)
def test_a_device_that_tells_nonsense_is_told_in_two_lines(texts, said):
    every = {**boards.pi5(), **texts}
    if "cores" in texts:
        every = {k: v for k, v in every.items() if not k.startswith("/sys/devices/system/cpu/")}
    with pytest.raises(DeviceError, match=said) as error:
        probe(FakeTransport(texts={k: v for k, v in every.items() if v}))
    assert error.value.exit_code == 3 and error.value.hint


def test_a_dead_link_and_a_folder_that_cannot_be_written(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGESDK_SSH_OPTIONS", "-o StrictHostKeyChecking=no")
    with pytest.raises(LinkError):
        probe("ssh://nobody@127.0.0.1:1")
    with pytest.raises(DeviceError, match="no program"):
        probe(LocalTransport(tmp_path), python="/no/such/python")
    with pytest.raises(InputError, match="needs Python on the device"):
        probe(fake(), measure=True)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGESDK_DEVICES", str(tmp_path / "file"))
    with pytest.raises(EdgeError, match="cannot be written") as error:
        probe(fake(), name="x")
    assert "EDGESDK_DEVICES" in error.value.hint and error.value.exit_code == 2
    if os.geteuid():
        folder.mkdir(mode=0o500)
        monkeypatch.setenv("EDGESDK_DEVICES", str(folder))
        with pytest.raises(EdgeError, match="cannot be written"):
            probe(fake(), name="x")


def test_toml_comes_back_as_it_was():
    raw = {
        "a": 'q"\\\n\x7f',
        "n": 1,
        "f": 2.5e9,
        "none": None,
        "on": True,
        "l": [1, "x"],
        "t": {"b": {"c d": 1}},
        "us": [{"x": 1}, {"x": []}],
    }
    back = tomllib.loads(toml(raw))
    assert back == {k: v for k, v in raw.items() if v is not None}


def test_the_command_line(folder, tmp_path):
    link = f"local:{tmp_path}/root"
    done = CliRunner().invoke(app, ["devices", "probe", link, "--name", "here", "--dry-run"])
    assert done.exit_code == 0 and 'name = "here"' in done.stdout and not folder.exists()
    done = CliRunner().invoke(app, ["devices", "probe", link, "--name", "here", "--measure", "--json"])
    answer = json.loads(done.stdout)
    assert answer["kind"] == "probe" and answer["written"] and answer["facts"]["kind"] == "device-facts"
    here = devices.load_device("here")
    assert here.sources["memory.one_thread_bytes_per_s"].startswith("measured ") and here.memory.one_thread_bytes_per_s > 1e8
    done = CliRunner().invoke(app, ["devices", "show", "here"])
    assert here.board.id in done.stdout
    done = CliRunner().invoke(app, ["devices", "check", str(folder / "here.toml")])
    assert done.exit_code == 0


def test_peaks_on_a_clock_that_nobody_tells_are_not_confirmed():
    texts = {k: v for k, v in boards.pi5().items() if "cpufreq" not in k} | {"/proc/device-tree/model": "linux,dummy-virt"}
    profile = probe(FakeTransport(texts=texts)).profile
    assert profile.unit("cpu").clock_hz == 1e9 and "units.cpu.clock_hz" in devices.not_confirmed(profile)
    assert profile.sources["units.cpu.peak_ops_per_s"].startswith("not confirmed: 4 cores x 1 GHz")


def test_a_measurement_says_that_it_is_of_another_board(tmp_path):
    probe(fake("pi5"), name="mine")
    tiny_bundle(tmp_path / "a.edge", seed=1)
    report = profile(tmp_path / "a.edge", LocalTransport(tmp_path / "root"), runs=3, device="mine", energy=False)
    assert any("mine is the profile of board" in reason for reason in report.trust.reasons)
