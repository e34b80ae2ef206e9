"""The fault table of docs/devices.md: what an emulated arm64 board is like behind each fault, and that the good bundle still runs then.

Its disk (`tests.lab.powered`) loses in a power cut what it was not told to keep. `-m board` does a part, `-m wide` the rest: every step and every tenth.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgesdk.bundles import bundle_digest, read_array, read_manifest, read_member
from edgesdk.deployment import Deployment
from edgesdk.device_keys import give_keys, take_keys
from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError
from edgesdk.flash import clean, flash, roll_back, status
from edgesdk.lease import lease
from edgesdk.run import run
from edgesdk.signing import new_key, own_key, revoke, sign, trust
from edgesdk.transport import parse_link
from edgesdk.transport.steps import Put, Step
from tests.lab import board as lab
from tests.lab.lossy import LossyBoard
from tests.tiny import tiny_bundle

PROGRAM_BYTES = 640_000
Cut = Callable[[], None]


class Bundles:
    """Ever another bundle, and what each of them must answer."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._seeds = folder, itertools.count(100)
        self.by_digest: dict[str, Path] = {}

    def new(self, **options: object) -> Path:
        seed = next(self._seeds)
        path = self._folder / f"{seed}.edge"
        tiny_bundle(path, seed=seed, cols=PROGRAM_BYTES // 16, **options)  # type: ignore[arg-type]
        self.by_digest[bundle_digest(path)] = path
        return path

    def runs(self, board: lab.Board) -> Deployment:
        """What is current there is good and whole, and answers rightly in a fresh process."""
        state = status(board.url)
        assert state.current and state.good and not state.damaged, state
        path = self.by_digest[state.current]
        (case,) = read_manifest(path).golden
        given, wanted = (read_array(read_member(path, names[0])) for names in (case.inputs, case.outputs))
        np.testing.assert_allclose(run(None, board.url, inputs=[given]).outputs[0], wanted, rtol=1e-3, atol=1e-2)
        return state


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def board(bundles) -> Iterator[lab.Board]:
    """With a disk that is there again behind a power cut, and two good bundles on it."""
    if problem := lab.missing():
        pytest.fail(problem, pytrace=False)
    with lab.Board(data="64M", keeps=True) as started:
        for _ in range(2):
            flash(bundles.new(), started.url)
        yield started


class At:
    """A watcher that does something at a moment of an install, given by its number or name: before each step, and in the middle of each larger file."""

    def __init__(self, moment: int | str, act: Cut, delay_s: float = 0.0) -> None:
        self._moment, self._act, self._delay_s = moment, act, delay_s
        self.seen: list[str] = []
        self.where = ""
        self._timer: threading.Timer | None = None

    def __call__(self, step: Step, done: int, total: int) -> None:
        if isinstance(step, Put):
            part = "half of" if done > total / 2 else "begin of"
            name = f"{part} {step.remote.rpartition('/')[2]}"
        else:
            words = str(step).split()
            name = " ".join(words[:4] if words[1] == "record" else words[:2])
        if name in self.seen:
            return
        self.seen.append(name)
        if not self.where and (self._moment == len(self.seen) - 1 if isinstance(self._moment, int) else self._moment in name):
            self.where = name
            if self._delay_s:
                self._timer = threading.Timer(self._delay_s, self._act)
                self._timer.start()
            else:
                self._act()

    def wait(self) -> None:
        if self._timer:
            self._timer.join()


# ---- power cuts


def power_cut_at(board: lab.Board, bundles: Bundles, moment: int | str, delay_s: float = 0.0) -> str | None:
    """Cut the power at a moment of an install of something new; what was seen, or None if there is no such moment."""
    before, path = status(board.url), bundles.new()
    new = bundle_digest(path)
    at = At(moment, board.power_cut, delay_s)
    try:
        flash(path, board.url, watch=at)
        ended = True
    except DeviceError:  # the link broke; or the device answered that it was about to
        ended = False
    at.wait()
    if not at.where:
        return None
    board.power_on()
    state = bundles.runs(board)
    assert state.current in (before.current, new), at.where
    again = flash(path, board.url)
    assert again.current == new and again.good and not again.interrupted
    assert again.previous == before.current
    numbers = [e.number for e in again.history]
    assert numbers == sorted(set(numbers))
    recovered = [e.action for e in again.history if e.number > max((b.number for b in before.history), default=0)]
    was = "the old one" if state.current == before.current else "the new one"
    return f"{at.where}{' +' + str(delay_s) if delay_s else ''}: {was} ran; then {', '.join(recovered)}; ended: {ended}; resumed {again.resumed_bytes}"


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("half of model.tflite", marks=pytest.mark.wide),
        pytest.param("link /data/edgesdk/current", marks=pytest.mark.board),
    ],
)
def test_power_cut_while_a_file_arrives_and_between_the_links(board, bundles, moment):
    seen = power_cut_at(board, bundles, moment)
    assert seen and "the old one ran" in seen and ("undone" in seen) == ("link" in seen), seen


@pytest.mark.wide
@pytest.mark.parametrize("delay_s", [0.0, 0.08])
def test_power_cut_at_every_step(board, bundles, delay_s):
    for number in itertools.count():
        seen = power_cut_at(board, bundles, number, delay_s)
        print(number, seen, f"{board.disk.lost} sectors lost", flush=True)  # noqa: T201
        if seen is None:
            break
    assert number > 12 and board.disk.lost


# ---- the link


@pytest.mark.wide
def test_link_cut_ten_times_in_one_transfer(board, bundles):
    before, path = bundles.runs(board), bundles.new()
    whole = path.stat().st_size
    resumed = []
    for _ in range(9):
        board.link.cut_after(whole // 10)
        with pytest.raises(LinkError):
            flash(path, board.cuttable_url)
        board.link.restore()
    done = flash(path, board.cuttable_url)
    resumed.append(done.resumed_bytes)
    assert done.good and done.previous == before.current
    bundles.runs(board)


@pytest.mark.wide
def test_link_cut_at_every_tenth(board, bundles):
    for tenth in range(10):
        before, path = status(board.url), bundles.new()
        board.link.cut_after(path.stat().st_size * tenth // 10)
        with pytest.raises(LinkError):
            flash(path, board.cuttable_url)
        board.link.restore()
        assert bundles.runs(board).current == before.current
        done = flash(path, board.cuttable_url)
        assert done.good and done.previous == before.current
        print(tenth, done.resumed_bytes, done.sent_bytes)  # noqa: T201


@pytest.mark.wide
def test_slow_link(board, bundles):
    path, start = bundles.new(), time.monotonic()
    board.link.bytes_per_s = 100_000
    try:
        assert flash(path, board.cuttable_url).good
    finally:
        board.link.bytes_per_s = None
    assert time.monotonic() - start > PROGRAM_BYTES / 100_000
    bundles.runs(board)


@pytest.mark.wide
def test_five_percent_of_all_packets_lost(bundles):
    with LossyBoard(0.05) as board:
        assert flash(bundles.new(), board.url).good
        lost, total = board.lost
        assert 0.03 < lost / total < 0.07 and lost > 20
        bundles.runs(board)


# ---- the disk


@pytest.mark.board
def test_disk_full_in_a_transfer_and_read_only(board, bundles):
    before, path = status(board.url), bundles.new()
    full = At("begin of model.tflite", lambda: board.fill_disk(0))
    try:
        with pytest.raises(DeviceError, match="full") as caught:
            flash(path, board.url, watch=full)
        assert not isinstance(caught.value, LinkError) and full.where
        assert roll_back(board.url).current == before.previous, "on a full disk"
        assert roll_back(board.url).current == before.current
    finally:
        board.free_disk()
    board.ssh("mount -o remount,ro /data")
    try:
        for act in (lambda: flash(path, board.url), lambda: roll_back(board.url), lambda: clean(board.url)):
            with pytest.raises(DeviceError, match="read-only"):
                act()
        assert bundles.runs(board).current == before.current, "from a read-only disk"
    finally:
        board.ssh("mount -o remount,rw /data")
    assert flash(path, board.url).good


@pytest.mark.board
def test_corrupt_slot(board, bundles):
    good = status(board.url)
    assert good.current and good.previous
    for digest in (good.current, good.previous):
        spoil = f"printf xyz | dd of=/data/edgesdk/store/{digest}/model.tflite bs=1 seek=5000 conv=notrunc"
        assert board.ssh(spoil).returncode == 0
    assert status(board.url).damaged == ("model.tflite",)
    with pytest.raises(CheckFailed, match="damaged on the device"):
        roll_back(board.url)
    mended = flash(bundles.by_digest[good.current], board.url)
    assert mended.sent_bytes < 700_000 and bundles.runs(board).current == good.current
    assert flash(bundles.by_digest[good.previous], board.url).good


# ---- what is no good


@pytest.mark.wide
def test_bundles_that_are_refused(board, bundles, tmp_path, monkeypatch):
    before = status(board.url)
    tampered = tmp_path / "tampered.edge"
    content = bytearray(bundles.new().read_bytes())
    content[len(content) // 2] ^= 1
    tampered.write_bytes(content)
    with pytest.raises((CheckFailed, InputError), match=r"model\.tflite"):
        flash(tampered, board.url)
    x86 = b"\x7fELF\x02\x01\x01" + bytes(11) + (62).to_bytes(2, "little")
    with pytest.raises(DeviceError, match=r"is for x86-64, the device's Python is for arm64"):
        flash(bundles.new(library=x86), board.url)
    with pytest.raises(DeviceError, match="executorch not found for"):
        flash(bundles.new(runtime="executorch"), board.url)
    new_key("team")
    by_team = bundles.new()
    sign(by_team, "team")
    gone = revoke("default")
    try:
        with pytest.raises(CheckFailed, match="was revoked on"):
            flash(bundles.new(), board.url)
        with pytest.raises(CheckFailed, match="signed by none of them"):
            give_keys(board.url)
        give_keys(board.url, regardless=True)
        with pytest.raises(DeviceError, match=f"signed by {gone.id}: this device trusts none of them"):
            bundles.runs(board)
        with pytest.raises(CheckFailed, match="this device trusts none of them"):
            flash(bundles.new(), board.url, allow_unsigned=True)
        with pytest.raises(DeviceError, match="trusts none"):
            roll_back(board.url)
        assert status(board.url).current == before.current
        assert flash(by_team, board.url).good and bundles.runs(board).trusted_keys
    finally:
        take_keys(board.url)
        trust(own_key("default").line)
    assert roll_back(board.url).current == before.current


# ---- others, the clock, the agent


@pytest.mark.wide
def test_two_installers(board, bundles):
    first, second = bundles.new(), bundles.new()
    with parse_link(board.url) as transport, lease(transport, "install"):
        with pytest.raises(DeviceError, match="in use by"):
            flash(second, board.url)
        assert flash(first, transport).good
    assert bundles.runs(board).current == bundle_digest(first)


@pytest.mark.wide
def test_two_installers_at_once(board, bundles):
    done: list[object] = []

    def install(path: Path) -> None:
        try:
            done.append(flash(path, board.url).current)
        except DeviceError as error:
            done.append(error)

    threads = [threading.Thread(target=install, args=(bundles.new(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([d for d in done if isinstance(d, DeviceError) and "in use by" in str(d)]) == 1
    assert bundles.runs(board).current in done


@pytest.mark.wide
def test_the_clock_jumps(board, bundles):
    before, path = status(board.url), bundles.new()
    jumps = iter(["1990-01-01 00:00:00", "2099-12-31 23:59:00", "2001-01-01 00:00:00"])

    def watch(step: Step, done: int, total: int) -> None:
        if not isinstance(step, Put) and (when := next(jumps, None)):
            assert board.ssh(f"date -s '{when}'").returncode == 0

    try:
        done = flash(path, board.url, watch=watch)
    finally:
        board.ssh(f"date -s @{int(time.time())}")
    assert done.good and done.previous == before.current and next(jumps, None) is None
    numbers = [e.number for e in done.history]
    assert numbers == sorted(numbers) and done.history[-1].when < "2002"
    bundles.runs(board)


@pytest.mark.parametrize(
    "which",
    [pytest.param("agent[.]zip", marks=pytest.mark.wide), pytest.param("[-]-one", marks=pytest.mark.board)],
)
def test_the_agent_is_killed_in_the_middle_of_the_check(board, bundles, which):
    before, path = status(board.url), bundles.new()
    kill = f"for p in /proc/[0-9]*; do grep -q '{which}' $p/cmdline 2>/dev/null && kill -9 ${{p#/proc/}} && echo killed; done"
    killed: list[str] = []

    def later() -> None:
        for _ in range(40):
            time.sleep(0.3)
            if "killed" in (said := board.ssh(kill).stdout):
                killed.append(said)
                return

    killer = threading.Thread(target=later)

    def watch(step: Step, done: int, total: int) -> None:
        if str(step).startswith("ask   check"):
            killer.start()

    with pytest.raises(CheckFailed if which == "[-]-one" else (CheckFailed, LinkError)):  # ssh tells no killed program from a broken link
        flash(path, board.url, watch=watch)
    killer.join()
    assert killed
    assert bundles.runs(board).current == before.current
    if which == "agent[.]zip":
        done = flash(path, board.url)
        assert done.good and done.sent_bytes < 1000, "what had arrived is there"
