"""Serial links: the line that survives noise, and the whole way from a login prompt to an installed bundle, over pseudo-terminals."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesdk.bundles import bundle_digest
from edgesdk.errors import DeviceError, InputError, LinkError
from edgesdk.flash import flash, status
from edgesdk.transport import parse_link, serial_login
from edgesdk.transport import serial as serial_link
from edgesdk.transport.serial_device import HEAD, messages
from edgesdk.transport.serial_line import DEVICE, Line, frame, parse
from tests.consoles import Console
from tests.tiny import tiny_bundle


def url(console: Console, **query: str) -> str:
    given = {"python": sys.executable, "root": str(console.path.parent / "data")} | query
    return f"serial:{console.path}?" + "&".join(f"{k}={v}" for k, v in given.items())


# ---- the line


def exchange(here: bytes, there: bytes, noise: float, lost: float, seed: int) -> tuple[int, float]:
    """Both ways at once over a line that spoils bytes and drops whole stretches; bytes sent and seconds at 115200 baud."""
    rng, ends, now, sent = random.Random(seed), (Line(7), Line(7, DEVICE)), 0.0, 0
    ends[0].write(here)
    ends[1].write(there)
    got: list[bytearray] = [bytearray(), bytearray()]
    for _ in range(100_000):
        for i, end in enumerate(ends):
            out = bytearray(end.frames(now))
            sent += len(out)
            now += max(0.005, len(out) / 11520)
            for k in range(len(out)):
                if rng.random() < noise:
                    out[k] = rng.randrange(256)
            if rng.random() >= lost:
                ends[1 - i].feed(bytes(out), now)
                got[1 - i] += ends[1 - i].take()
        if got[1] == here and got[0] == there and not ends[0].pending:
            return sent, now
    raise AssertionError(f"{len(got[1])} of {len(here)}, {len(got[0])} of {len(there)} bytes came")


@settings(max_examples=25, deadline=None)
@given(
    st.binary(max_size=5000), st.binary(max_size=500), st.sampled_from([0.0, 1e-3, 1e-2]), st.sampled_from([0.0, 0.2]), st.integers(0, 99)
)
def test_everything_arrives_once_and_in_order(here: bytes, there: bytes, noise: float, lost: float, seed: int) -> None:
    exchange(here, there, noise, lost, seed)


def test_a_clean_line_costs_a_third_more_and_a_noisy_one_still_moves() -> None:
    data = random.Random(0).randbytes(50_000)
    assert exchange(data, b"", 0.0, 0.0, 0)[0] < 1.5 * len(data)
    assert exchange(data, b"", 0.01, 0.0, 0)[0] < 9 * len(data)


@given(st.binary(max_size=200), st.integers(0, 199))
@settings(max_examples=200, deadline=None)
def test_no_spoiled_frame_is_taken(noise: bytes, place: int) -> None:
    good = frame(0, 7, 5, 6, b"what it holds")
    assert parse(good.rstrip(b"\n")) == (0, 7, 5, 6, b"what it holds")
    spoiled = good[:place] + noise + good[place + 1 :]
    found = parse(spoiled.rstrip(b"\n"))
    assert found is None or found == (0, 7, 5, 6, b"what it holds")
    line = Line(7)
    line.feed(noise, 0.0)  # nothing is raised, whatever comes
    assert not line.take()


def test_the_echo_of_a_frame_is_not_taken_for_an_answer() -> None:
    line = Line(7)
    line.write(b"x")
    line.feed(line.frames(0.0), 0.0)
    assert not line.heard and not line.take()


def test_messages_are_cut_where_they_end() -> None:
    held = bytearray(HEAD.pack(2, 5, 3) + b"abc" + HEAD.pack(3, 5, 0) + HEAD.pack(2, 5, 9) + b"only")
    assert messages(held) == [(2, 5, b"abc"), (3, 5, b"")]
    assert held == HEAD.pack(2, 5, 9) + b"only"


# ---- the console


@pytest.fixture
def console(tmp_path):
    with Console(tmp_path) as made:
        yield made


def test_commands_files_and_programs_over_a_console(console: Console, tmp_path: Path) -> None:
    data, seen = os.urandom(200_000), []
    with parse_link(url(console)) as device:
        result = device.run(("sh", "-c", 'echo "$1"; echo gone >&2; exit 3', "x", "it's $HOME `a`"))
        assert (result.code, result.text, result.complaint) == (3, "it's $HOME `a`", "gone")
        assert device.run(("cat",), stdin=data).out == data
        assert device.run(("no-such-program",)).code == 127
        target = f"{device.root}/a folder/it's"
        assert device.put(data, target, progress=lambda done, whole: seen.append((done, whole))) == 0
        assert Path(target).read_bytes() == data and device.get(target) == data
        assert seen[-1] == (len(data), len(data)) and seen == sorted(seen)
        Path(target + ".part").write_bytes(data[:100_000])
        assert device.put(data, target) == 100_000
        stream = device.open((sys.executable, "-u", "-c", "import sys\nfor l in sys.stdin: print(l.strip()[::-1])"))
        stream.send(b"abc\n")
        assert stream.readline(20) == b"cba" and not stream.ready(0.05)
        stream.close()
        with pytest.raises(LinkError, match="no answer in 1 s"):
            device.run(("sleep", "30"), timeout=1)
        assert device.run(("true",)).code == 0
    with parse_link(url(console)) as device:  # the console was given back
        assert device.run(("echo", "again")).text == "again"


def test_install_and_run_over_a_console(console: Console, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "a.edge", seed=1)
    assert flash(tmp_path / "a.edge", url(console)).good
    assert status(url(console)).current == bundle_digest(tmp_path / "a.edge")


def test_what_a_cut_session_left_is_taken_over(console: Console) -> None:
    device = parse_link(url(console))
    assert device.run(("true",)).code == 0
    device._link._over = True  # the host's program is killed: no goodbye
    device._link._thread.join()
    device._link.port.close()
    began = time.monotonic()
    with parse_link(url(console)) as other:
        assert other.run(("echo", "mine")).text == "mine"
    assert time.monotonic() - began < 10  # no login, no program sent again


def test_a_pulled_plug_is_waited_for(console: Console) -> None:
    data = os.urandom(300_000)
    pulled: list[int] = []

    def progress(done: int, whole: int) -> None:
        if done > whole // 3 and not pulled:
            pulled.append(done)
            console.unplug()
            threading.Timer(0.5, console.plug).start()

    with parse_link(url(console)) as device:
        assert device.put(data, f"{device.root}/x", progress=progress) == 0
        assert device.get(f"{device.root}/x") == data
    assert pulled


def test_a_plug_that_stays_out_ends_with_a_word(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_link, "AWAY_S", 0.5)
    with parse_link(url(console)) as device:
        device.run(("true",))
        console.unplug()
        with pytest.raises(LinkError, match="has been away") as caught:
            device.run(("true",))
        assert caught.value.exit_code == 3 and "resumes" in caught.value.hint


def test_a_board_that_falls_silent_ends_with_a_word(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    with parse_link(url(console)) as device:
        device.run(("true",))
        monkeypatch.setattr(serial_link, "SILENT_S", 1.0)
        console.noise = 1.0
        with pytest.raises(LinkError, match="no word from the device"):
            device.run(("true",))
        console.noise = 0.0


def test_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Console(tmp_path, login=True) as console:
        with pytest.raises(LinkError, match="asks for a login"):
            parse_link(url(console)).run(("true",))
        monkeypatch.setenv("EDGESDK_SERIAL_PASSWORD", "wrong")
        with pytest.raises(DeviceError, match="does not let pi in"):
            parse_link(url(console, user="pi")).run(("true",))
        (tmp_path / "word").write_text("berry\n")
        with parse_link(url(console, user="pi", password_file=str(tmp_path / "word"))) as device:
            assert device.run(("echo", "in")).text == "in"


def test_what_stands_in_the_way_is_named(console: Console, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="interpreter '/nowhere/python'"):
        parse_link(url(console, python="/nowhere/python")).run(("true",))
    with parse_link(url(console)) as device:
        device.run(("true",))
        with pytest.raises(LinkError, match="another program has the port"):
            parse_link(url(console)).run(("true",))
    for link, words in (
        ("serial:ttyUSB0", "not a serial link"),
        ("serial:/dev/ttyUSB0?baud=fast", "not a serial link"),
        ("serial:/dev/ttyUSB0?speed=1", "unknown serial option"),
        ("serial:/dev/ttyUSB0?password_file=/nowhere/word", "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            parse_link(link)
    with pytest.raises(LinkError, match="no such port"):
        parse_link(f"serial:{tmp_path}/ttyUSB9").run(("true",))


def test_a_silent_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_login, "TRIES", 2)
    with Console(tmp_path) as console:
        console._process.kill()
        console._process.wait()
        with pytest.raises(LinkError, match="nothing answers"):
            parse_link(url(console)).run(("true",))


@pytest.mark.board
def test_an_install_survives_noise_and_three_pulled_plugs(tmp_path: Path) -> None:
    """1% of all bytes spoiled, in both directions, from the login on."""
    tiny_bundle(tmp_path / "a.edge", seed=1)
    left = [3]

    with Console(tmp_path, noise=0.01, seed=1) as console:

        def pull() -> None:
            last = console.passed
            while left[0]:
                time.sleep(0.2)
                if console.passed - last > 150_000:
                    left[0] -= 1
                    console.unplug()
                    time.sleep(1.0)
                    console.plug()
                    last = console.passed

        threading.Thread(target=pull, daemon=True).start()
        for _ in range(8):  # a plug that is pulled while logging in is a failure to begin: the same command again
            try:
                deployment = flash(tmp_path / "a.edge", url(console))
                break
            except LinkError:
                continue
        console.noise = 0.0
        assert deployment.good and deployment.current == bundle_digest(tmp_path / "a.edge") and left == [0]
