"""The agent: its wire, its facts, and that it stands alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_bundle

from edgesdk.agent import client, wire
from edgesdk.agent import facts as on_device
from edgesdk.agent.client import ARCHIVE, Agent, agent_files, agent_sources
from edgesdk.agent.frames import decode, encode, is_frame
from edgesdk.agent.installed import relative_error
from edgesdk.errors import DeviceError, InputError, LinkError
from edgesdk.flash import flash
from edgesdk.transport.local import LocalTransport


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """A folder with a bundle installed."""
    folder = tmp_path_factory.mktemp("device")
    tiny_bundle(folder / "a.edge")
    transport = LocalTransport(folder / "root")
    flash(folder / "a.edge", transport)
    return transport


def test_frames_survive_and_notice_damage():
    message = {"id": 1, "ok": {"text": "ü\n" * 3}}
    line = encode(message)
    assert line.count(b"\n") == 1 and is_frame(line)
    assert decode(line.rstrip(b"\n")) == message == wire.decode(line) == wire.decode(wire.encode(message))
    for bad in (line[:-3], line.replace(b'"id"', b'"ix"').rstrip(b"\n"), b"Welcome to Board", b""):
        with pytest.raises(LinkError, match="damaged"):
            decode(bad)


def _known(name: str) -> set[str]:
    """What a file may import beside the standard library. Kernels that are compiled on the device need a compiler there."""
    if name.startswith(("__main__", "agent/")):
        return set() if "/" in name else {"agent"}
    return (
        {"numpy"}
        | ({"edgesdk"} if name.startswith("edgesdk/") else set())
        | ({"numba", "llvmlite"} if "/kernels/numba/" in name else set())
    )


def test_the_agent_stands_alone_and_is_python_3_9():
    for name, source in agent_sources().items():
        if not name.endswith(".py"):
            continue
        tree = ast.parse(source, feature_version=(3, 9))
        tops = {n.names[0].name.split(".")[0] for n in tree.body if isinstance(n, ast.Import)}
        tops |= {str(n.module).split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level}
        assert tops <= sys.stdlib_module_names | _known(name), name
        beside = {n.module or "__init__" for n in tree.body if isinstance(n, ast.ImportFrom) and n.level == 1}
        assert all(f"{name.rpartition('/')[0]}/{module}.py" in agent_sources() for module in beside), name
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Match)]


def test_facts_and_errors(device):
    with Agent(device) as agent:
        facts = agent.ask("facts")
        assert facts["cores"] >= 1 and facts["memory_bytes"] > 0 and facts["numpy"] and "litert" in facts["runtimes"]
        with pytest.raises(DeviceError, match="no verb 'dance'"):
            agent.ask("dance")
        with pytest.raises(DeviceError, match="no bundle"):
            agent.ask("check", folder="/nowhere")
        with pytest.raises(DeviceError, match="unexpected keyword"):
            agent.ask("health", nonsense=1)
        with pytest.raises(InputError, match="no method 'encode'"):
            agent.ask("profile", folder=f"{device.root}/current", runs=1, warmup=0, method="encode")
        x = np.ones((1, 256), np.float32)
        (y,) = agent.run(f"{device.root}/current", "forward", [x])
        assert y.shape == (1, 4)
        with pytest.raises(InputError, match="has shape"):
            agent.run(f"{device.root}/current", "forward", [x[:, :9]])
        assert agent.ask("health", folder=f"{device.root}/current")["bad"] == []


def test_health_names_what_was_changed(device):
    file = next(Path(device.root).glob("store/*/golden/forward/0/out0.npy"))
    whole = file.read_bytes()
    file.write_bytes(b"x")
    with Agent(device) as agent:
        assert agent.ask("health", folder=f"{device.root}/current")["bad"] == ["golden/forward/0/out0.npy"]
    file.write_bytes(whole)


def test_a_crash_of_the_runtime_is_an_answer(device, monkeypatch, tmp_path):
    """A program that dies of a signal is told as such, and the agent lives on."""
    folder = tmp_path / "agent"
    folder.mkdir()
    for name, source in agent_sources().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(source)
    (folder / "runner.py").write_text("import os\ndef open_program(*a):\n    os.kill(os.getpid(), 4)\n")
    process = subprocess.Popen([sys.executable, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    request = encode({"verb": "check", "id": 1, "folder": f"{device.root}/current"})
    out, _ = process.communicate(request + encode({"verb": "health", "id": 2, "folder": f"{device.root}/current"}), timeout=60)
    hello, crash, health = (decode(line) for line in out.splitlines())
    assert hello["hello"] == "edgesdk-agent"
    assert "crashed on the device (signal 4)" in crash["error"]
    assert health["ok"]["bad"] == []


def test_a_missing_interpreter_is_named(device):
    with pytest.raises(DeviceError, match="no program"):
        Agent(device, "/no/such/python3")
    with pytest.raises(DeviceError, match=r"does not run there|ended"):
        Agent(device, "false")


@pytest.mark.parametrize(
    ("files", "machine", "emulated"),
    [
        ({"/proc/cpuinfo": "model name\t: QEMU TCG CPU version 2.5+"}, "x86_64", True),
        ({"/proc/cpuinfo": "vendor_id\t: GenuineIntel\nflags\t: fpu"}, "aarch64", True),
        ({"/proc/cpuinfo": "CPU part\t: 0xd0b", "/proc/device-tree/compatible": "linux,dummy-virt"}, "aarch64", True),
        ({"/proc/cpuinfo": "CPU part\t: 0xd0b", "/proc/device-tree/compatible": "raspberrypi,5-model-b brcm,bcm2712"}, "aarch64", False),
        ({"/proc/cpuinfo": "model name\t: AMD EPYC\nvendor_id\t: AMD\nflags\t: fpu hypervisor"}, "x86_64", False),
    ],
)
def test_emulators_are_told_from_silicon(files, machine, emulated):
    assert bool(on_device.emulated(lambda path: files.get(path, ""), machine)) is emulated


def test_relative_error_refuses_what_is_no_number():
    one = [np.ones(4)]
    assert relative_error(one, one) == 0
    assert relative_error([np.full(4, 1.1)], one) == pytest.approx(0.1)
    assert relative_error([np.array([1, np.nan, 1, 1])], one) is None
    assert relative_error([np.ones(3)], one) is None
    assert relative_error([], one) is None


def test_what_native_programs_and_rollouts_need_is_sent_whole(tmp_path):
    """Nothing but the archive and numpy: what it leaves out is found on this machine, not on a device."""
    archive = tmp_path / ARCHIVE
    archive.write_bytes(agent_files()[ARCHIVE])
    paths = [str(archive), str(Path(np.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}; import edgesdk.native.machine, edgesdk.kernels.neon.load, edgesdk.fleet.agent"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_agent_of_another_version_is_told(device, monkeypatch):
    monkeypatch.setattr(client, "VERSION", 99)
    with pytest.raises(DeviceError, match=r"the agent there speaks version \d+, this edgesdk 99"):
        Agent(device)
