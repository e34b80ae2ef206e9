"""Transports: the same acts over a folder, a real sshd and the fake; cut lines, wrong digests, full disks, link errors."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from pathlib import Path

import pytest
from loopback import Server, cutting_proxy, free_port, serve

from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError, MissingTool
from edgesdk.transport import Blob, Transport, parse_link
from edgesdk.transport.fake import Failures, FakeTransport
from edgesdk.transport.local import LocalTransport

DATA = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("sshd")) as server:
        yield server


ADB = r"""
import os, subprocess, sys
said, argv = os.environ.get("ADB_SAYS", ""), sys.argv[1:]
if said:
    sys.exit(sys.stderr.write(said + chr(10)) and 1)
argv = argv[2:] if argv[0] == "-s" else argv
if argv[0] == "shell":
    code = subprocess.run(["sh", "-c", argv[2]], check=False, stderr=subprocess.PIPE if "ADB_CUT" in os.environ else None).returncode
    sys.exit(0 if "ADB_CUT" in os.environ else code)
print({"features": os.environ.get("ADB_FEATURES", "shell_v2,cmd"), "get-state": "device", "connect": "connected to " + argv[-1]}[argv[0]])
"""
"""What adb 29 answers, as recorded: errors on stderr with code 1, and a link that is cut in a command ends it with code 0 and no word."""


@pytest.fixture
def adb(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("adb")
    (folder / "adb").write_text(f"#!{sys.executable}\n{ADB}")
    (folder / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return monkeypatch


@pytest.fixture(params=["local", "ssh", "adb", "fake"])
def device(request, tmp_path):
    if request.param == "adb":
        request.getfixturevalue("adb")
    link = {"local": f"local:{tmp_path}", "adb": f"adb://R58N?root={tmp_path}", "fake": "fake"}.get(request.param)
    with parse_link(link or request.getfixturevalue("sshd").link(tmp_path)) as transport:
        yield transport


def test_put_get_and_resume(device: Transport):
    path = f"{device.root}/a folder/it's $HOME"
    seen: list[tuple[int, int]] = []
    assert device.put(DATA, path, progress=lambda done, total: seen.append((done, total))) == 0
    assert device.get(path) == DATA
    assert seen[-1] == (len(DATA), len(DATA)) and seen == sorted(seen)
    if isinstance(device, FakeTransport):
        device.files[path + ".part"] = DATA[:300000]
    else:
        Path(path + ".part").write_bytes(DATA[:300000])
    assert device.put(DATA, path) == 300000
    assert device.get(path) == DATA


def test_a_part_that_is_of_another_file_is_not_kept(tmp_path):
    device = LocalTransport(tmp_path)
    (tmp_path / "x.part").write_bytes(b"?" * 300000)
    assert device.put(DATA, f"{tmp_path}/x") == 0
    assert (tmp_path / "x").read_bytes() == DATA
    assert not (tmp_path / "x.part").exists()


@pytest.mark.parametrize("size", [10, 200_000])
def test_a_wrong_digest_is_refused_and_removed(tmp_path, size):
    device = LocalTransport(tmp_path)
    blob = Blob(size, hashlib.sha256(b"something else").hexdigest(), lambda: io.BytesIO(b"x" * size))
    (tmp_path / "x").write_bytes(b"what was there")
    with pytest.raises(CheckFailed, match="sha256"):
        device.put(blob, f"{tmp_path}/x")
    assert (tmp_path / "x").read_bytes() == b"what was there"
    assert not (tmp_path / "x.part").exists()


def test_ssh_cut_in_the_middle_keeps_what_arrived_and_resumes(sshd: Server, tmp_path):
    with cutting_proxy(sshd.port, 400_000) as port, parse_link(sshd.link(tmp_path, port)) as device, pytest.raises(LinkError) as caught:
        device.put(DATA, f"{tmp_path}/x")
    assert caught.value.exit_code == 3 and "resumes" in caught.value.hint
    assert not (tmp_path / "x").exists()
    with parse_link(sshd.link(tmp_path)) as device:
        there = device.put(DATA, f"{tmp_path}/x")
    assert 0 < there < len(DATA)
    assert (tmp_path / "x").read_bytes() == DATA


def test_fake_cut_disk_full_and_corruption():
    device = FakeTransport(failures=Failures(cut_after_bytes=200_000))
    with pytest.raises(LinkError):
        device.put(DATA, "r/x")
    assert "r/x" not in device.files
    assert device.put(DATA, "r/x") == 200_000
    device = FakeTransport(failures=Failures(disk_bytes=500_000))
    with pytest.raises(DeviceError, match="disk is full") as caught:
        device.put(DATA, "r/x")
    assert caught.value.exit_code == 3 and not device.files
    with pytest.raises(CheckFailed):
        FakeTransport(failures=Failures(corrupt=True)).put(DATA, "r/x")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        LocalTransport(tmp_path / "file")
    with pytest.raises(DeviceError) as caught:
        LocalTransport(tmp_path).put(b"x", f"{tmp_path}/file/x")
    assert caught.value.exit_code == 3


def test_ssh_runs_argument_tuples_and_leaves_quotes_alone(sshd: Server, tmp_path):
    with parse_link(sshd.link(tmp_path)) as device:
        result = device.run(("printf", "%s|", "a b", "$HOME; echo", "it's", "*"))
        assert result.out == b"a b|$HOME; echo|it's|*|"
        assert device.run(("sh", "-c", "exit 7")).code == 7
        assert device.run(("cat",), stdin=b"in").out == b"in"
        stream = device.open(("cat",))
        stream.send(b"one line\n")
        assert stream.readline(10) == b"one line"
        stream.close()


def test_ssh_link_errors_are_two_lines_with_exit_code_3(sshd: Server, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESDK_SSH_OPTIONS", "-o ConnectTimeout=3")
    (tmp_path / "client").write_bytes((sshd.keys / "host").read_bytes())
    (tmp_path / "client").chmod(0o600)
    (tmp_path / "changed").write_text(f"[127.0.0.1]:{sshd.port} {(sshd.keys / 'client.pub').read_text()}")
    cases = {
        f"ssh://u@127.0.0.1:{free_port()}": "nothing listens",
        "ssh://u@no-such-host.invalid": "no such host",
        sshd.link(tmp_path, identity=str(tmp_path / "client")): "does not let this user in",
        sshd.link(tmp_path, known_hosts=str(tmp_path / "changed")): "host key has changed",
    }
    for link, words in cases.items():
        with parse_link(link) as device, pytest.raises(LinkError, match=words) as caught:
            device.run(("true",))
        assert caught.value.exit_code == 3 and caught.value.hint


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("error: no devices/emulators found", "no device is attached"),
        ("error: more than one device/emulator", "several devices"),
        ("error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set", "has not allowed this computer"),
        ("error: device offline", "does not answer"),
        ("error: device 'R58N' not found", "no such device"),
        ("error: insufficient permissions for device: user in plugdev group; are your udev rules wrong?", "insufficient permissions"),
        ("* cannot start server on remote host\nerror: cannot connect to daemon at tcp:10.0.0.1:5037", "server does not start"),
    ],
)
def test_adb_errors_are_two_lines_with_exit_code_3(adb, said, words):
    adb.setenv("ADB_SAYS", said)
    with pytest.raises(LinkError, match=words) as caught, parse_link("adb://R58N") as device:
        device.run(("true",))
    assert caught.value.exit_code == 3 and caught.value.hint and "\n" not in caught.value.what


def test_an_adb_command_that_never_said_its_end_is_no_success(adb, tmp_path):
    with parse_link(f"adb:?root={tmp_path}") as device:
        assert device.run(("sh", "-c", "echo error: device offline >&2; exit 3")).code == 3  # the command's own words
        adb.setenv("ADB_CUT", "1")
        with pytest.raises(LinkError, match="the link broke"):
            device.run(("true",))
        with pytest.raises(LinkError):
            device.put(DATA, f"{tmp_path}/x")
        adb.setenv("ADB_FEATURES", "cmd")
        with pytest.raises(DeviceError, match="Android 6"):
            device.run(("true",))


def test_adb_is_named_when_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingTool, match="adb"):
        parse_link("adb:")


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("adb://1234/x", "not an adb link"),
        ("adb://1234?port=1", "unknown adb option"),
        ("sssh://x", "unknown link"),
        ("local:", "folder is missing"),
        ("local:/folder?pyton=x", "unknown local option 'pyton'"),
        ("ssh://", "not an ssh link"),
        ("ssh://-oProxyCommand=x", "may not begin with"),
        ("ssh://h:port", "port is not a number"),
        ("ssh://h?idenity=x", "unknown ssh option"),
        ("ssh://h?identity=/nowhere/key", "no such identity file"),
    ],
)
def test_bad_links_are_refused(link, words):
    with pytest.raises(InputError, match=words):
        parse_link(link)


def test_local_python_is_this_one(tmp_path):
    assert LocalTransport(tmp_path).python == sys.executable
    with pytest.raises(DeviceError, match="no program"):
        LocalTransport(tmp_path).run(("no-such-program-here",))
    with pytest.raises(LinkError, match="no answer"):
        LocalTransport(tmp_path).run(("sleep", "5"), timeout=0.1)


def test_a_local_link_names_its_interpreter(tmp_path):
    with parse_link(f"local:{tmp_path}?python=/usr/bin/python3.9") as here, parse_link(f"local:{tmp_path}") as plain:
        assert (here.root, here.python, plain.python) == (str(tmp_path), "/usr/bin/python3.9", sys.executable)
