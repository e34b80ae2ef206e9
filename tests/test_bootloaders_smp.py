"""MCUboot over SMP: the real smpclient against a board of our own on a pseudo-terminal; lost frames, pulled plugs, trials that fall."""

from __future__ import annotations

import hashlib
import os
import random
import struct

import pytest
from tiny import tiny_bundle

from edgesdk.bootloaders import smp, smp_link
from edgesdk.bootloaders.board import write_board
from edgesdk.bootloaders.mcuboot import read_image
from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError
from tests.lab.smp_board import Faults, Slot, SmpBoard, signed_image

BODY = random.Random(3).randbytes(6000)
IMAGE = signed_image(BODY, (1, 2, 3))
DIGEST = hashlib.sha256(IMAGE[: 32 + len(BODY)]).digest()


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    monkeypatch.setattr(smp_link, "ANSWER_S", 0.15)
    monkeypatch.setattr(smp_link, "ERASE_S", 0.3)
    monkeypatch.setattr(smp_link, "AWAY_S", 3.0)
    monkeypatch.setattr(smp, "PAUSE_S", 0.02)
    from smpclient.transport.serial.common import _SerialTransportBase

    monkeypatch.setattr(_SerialTransportBase, "_CONNECTION_RETRY_INTERVAL_S", 0.05)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "zephyr.signed.bin"
    path.write_bytes(IMAGE)
    return str(path)


def write(board: SmpBoard, file: str, options: str = "health=100ms&boot=2s", **more: object):
    return write_board(f"smp:{board.port}?{options}", firmware=file, **more)  # type: ignore[arg-type]


def test_an_image_is_sent_tried_and_confirmed_and_is_there_the_next_time(tmp_path, file):
    seen: list[tuple[str, float]] = []
    with SmpBoard(tmp_path) as board:
        answer = write(board, file, watch=lambda text, share: seen.append((text.split()[0], share)))
        assert board.slots[0] == Slot("1.2.3", DIGEST) and board.confirmed and board.starts == 1
        received = board.received
        again = write(board, file)
        assert board.received == received == len(IMAGE) and board.starts == 1
    assert (answer.action, again.action) == ("written", "already-there")
    assert "version 0.9.0 before" in answer.board and "has confirmed it" in answer.verified and "1.2.3, signed with ECDSA" in answer.payload
    sent = [share for text, share in seen if text == "sending"]
    assert (
        sent == sorted(sent)
        and sent[-1] == 1.0
        and len(sent) > 10
        and {t for t, _ in seen} >= {"asking", "restarting", "the", "confirming"}
    )


def test_lost_and_spoiled_frames_cost_time_and_nothing_else(tmp_path, file):
    faults = Faults(lose_requests={4, 9, 31}, lose_answers={12, 20, 33}, spoil_answers={15, 25})
    with SmpBoard(tmp_path, faults) as board:
        assert write(board, file).action == "written"
        assert board.slots[0] and board.slots[0].digest == DIGEST and board.confirmed
        assert board.received < 1.2 * len(IMAGE)


@pytest.mark.parametrize("at", [0, 1500, len(IMAGE) - 400])
def test_a_pulled_plug_is_waited_for_and_the_upload_goes_on(tmp_path, file, at):
    with SmpBoard(tmp_path, Faults(unplug_at=at)) as board:
        assert write(board, file).action == "written"
        assert board.received == len(IMAGE) and board.slots[0] and board.slots[0].digest == DIGEST


def test_a_plug_that_stays_away_is_told_and_the_same_command_goes_on(tmp_path, file, monkeypatch):
    monkeypatch.setattr(smp_link, "AWAY_S", 0.1)
    with SmpBoard(tmp_path, Faults(unplug_at=3000, away_s=1.5)) as board:
        with pytest.raises(LinkError, match=r"the line is lost after \d{4} of 60\d\d bytes") as caught:
            write(board, file)
        assert "goes on" in caught.value.hint
        monkeypatch.setattr(smp_link, "AWAY_S", 3.0)
        while not os.path.exists(board.port):
            pass
        assert write(board, file).action == "written"
        assert board.received == len(IMAGE)


@pytest.mark.parametrize(
    ("faults", "message", "runs"),
    [
        (Faults(falls_after=0.05), "rolled back by MCUboot: the image on trial fell", "0.9.0"),
        (Faults(falls_after=0.0), "rolled back by MCUboot", "0.9.0"),
        (Faults(mute=True), "silent 0.5 s after its restart", "1.2.3"),
        (Faults(writes_wrong=True), "the board holds no image with sha256", "0.9.0"),
    ],
)
def test_trials_that_fail_are_told_and_the_old_image_comes_back(tmp_path, file, faults, message, runs):
    with SmpBoard(tmp_path, faults) as board:
        with pytest.raises(CheckFailed, match=message):
            write(board, file, "health=400ms&boot=500ms")
        assert board.slots[0] and board.slots[0].version == runs
        board.restart() if faults.mute else None  # somebody presses reset
        assert board.slots[0] and board.slots[0].version == "0.9.0" and board.confirmed


def test_unsigned_images_are_noted_and_their_refusal_is_told(tmp_path):
    (tmp_path / "plain.bin").write_bytes(signed_image(BODY, signature=None))
    with SmpBoard(tmp_path) as board:
        shown = write(board, str(tmp_path / "plain.bin"), dry_run=True)
        assert "not signed" in shown.notes[0] and len(shown.steps) == 5 and board.frames == 0
        with pytest.raises(CheckFailed, match=r"rolled back by MCUboot: version 0.9.0 runs, not 1.0.0") as caught:
            write(board, str(tmp_path / "plain.bin"))
        assert "not signed" in caught.value.hint and board.slots[0] and board.slots[0].version == "0.9.0"


def test_a_trial_may_be_left_to_itself_and_taken_up_again(tmp_path, file):
    with SmpBoard(tmp_path) as board:
        answer = write(board, file, "health=50ms&boot=2s&confirm=no")
        assert answer.action == "written" and "on trial" in answer.notes[0] and not board.confirmed
        received = board.received
        assert write(board, file).action == "written" and board.confirmed and board.received == received and board.starts == 1


def test_what_the_board_refuses_is_told_with_a_way_out(tmp_path, file):
    for key, body, message, hint in [
        ((1, 1), {"err": {"group": 1, "rc": 30}}, "refuses the image: INVALID_IMAGE_TOO_LARGE", "smaller"),
        ((1, 1), {"rc": 10}, "refuses the image: EBUSY", "wait"),
        ((1, 0), {"rc": 8}, "refuses to tell its images: ENOTSUP", "CONFIG_MCUMGR"),
        ((0, 5), {"rc": 11}, "refuses to restart: EACCESSDENIED", "forbids"),
    ]:
        with SmpBoard(tmp_path, Faults(error={key: body})) as board, pytest.raises(DeviceError, match=message) as caught:
            write(board, file)
        assert hint in caught.value.hint
    with SmpBoard(tmp_path, Faults(deaf=True)) as board, pytest.raises(LinkError, match="no answer from an SMP server"):
        write(board, file)
    with pytest.raises(DeviceError, match="no such port"):
        write_board(f"smp:{tmp_path}/ttyNONE", firmware=file)
    tiny_bundle(tmp_path / "b.edge", runtime="tflite-micro")
    with pytest.raises(InputError, match="whole firmware images"):
        write_board("smp:/dev/ttyACM0", str(tmp_path / "b.edge"))


def test_images_are_checked_before_anything_is_sent():
    image = read_image(IMAGE, "a.bin")
    assert (image.version, image.digest, image.signed, image.end) == ("1.2.3", DIGEST, "ECDSA", len(IMAGE))
    kept = struct.pack("<HHI", 0x50, 4, 7)
    guarded = signed_image(BODY, protected=kept)
    assert read_image(guarded, "a.bin").digest == hashlib.sha256(guarded[: 32 + len(BODY) + 4 + len(kept)]).digest()
    assert read_image(signed_image(BODY, flags=4)[:100] + b"x" + signed_image(BODY, flags=4)[101:], "a.bin").encrypted
    assert read_image(IMAGE + b"\xff" * 500, "a.bin").end == len(IMAGE)
    for spoiled, error, message in [
        (b"\x7fELF" + IMAGE[4:], InputError, "not an MCUboot image"), (IMAGE[:20], InputError, "not an MCUboot image"),
        (IMAGE[:3000], InputError, "says 6000 bytes behind a head of 32"), (IMAGE[:-3], InputError, "cut off or spoiled"),
        (IMAGE[:6032], InputError, "cut off or spoiled"), (IMAGE[:50] + b"x" + IMAGE[51:], CheckFailed, "is not that of its content"),
        (IMAGE + b"\xff" * 100 + b"\x77\xc2\x95\xf3", InputError, "--pad"),
        (IMAGE.replace(struct.pack("<HH", 0x10, 32), struct.pack("<HH", 0x11, 32)), InputError, "holds sha384"),
        (guarded[:10] + b"\x63\0" + guarded[12:], InputError, "protected fields"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            read_image(spoiled, "a.bin")
