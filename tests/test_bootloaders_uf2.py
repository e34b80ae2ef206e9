"""UF2: files made and checked block by block, volumes that leave as real boards' do, and those that do not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import threading
import time
from pathlib import Path

import pytest
from tiny import tiny_bundle
from typer.testing import CliRunner

from edgesdk.bootloaders import uf2
from edgesdk.bootloaders.board import write_board
from edgesdk.bootloaders.types import read_payload
from edgesdk.bundles import read_member
from edgesdk.cli import app
from edgesdk.errors import CheckFailed, DeviceError, InputError, LinkError, UnknownName

RP2040 = "UF2 Bootloader v3.0\nModel: Raspberry Pi RP2\nBoard-ID: RPI-RP2\n"
RP2350 = "UF2 Bootloader v1.0\nModel: Raspberry Pi RP2350\nBoard-ID: RP2350\n"
MODEL_AT = 0x10100000


class Volume:
    """A bootloader's volume: it takes blocks as they are written and goes once it has them all."""

    def __init__(self, folder: Path, info: str, blocks: int | None = None) -> None:
        self.folder, self.taken, self.blocks = folder, b"", blocks
        folder.mkdir()
        (folder / "INFO_UF2.TXT").write_text(info)
        (folder / "INDEX.HTM").write_text("")
        self._over = False
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Volume:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._over:
            file = self.folder / "EDGESDK.UF2"
            content = file.read_bytes() if file.exists() else b""
            if content and len(content) == 512 * struct.unpack_from("<I", content, 24)[0]:
                self.taken = content
                shutil.rmtree(self.folder)
                return
            time.sleep(0.005)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("uf2") / "tiny.edge"
    tiny_bundle(path, cols=4000, runtime="tflite-micro")
    return str(path)


def flash_of(content: bytes) -> dict[int, bytes]:
    """What a board does with a file, from the published form alone: address → data."""
    found = {}
    for at in range(0, len(content), 512):
        magic0, magic1, _, address, size, _, _, _ = struct.unpack_from("<8I", content, at)
        assert (magic0, magic1, content[at + 508 : at + 512]) == (0x0A324655, 0x9E5D5157, bytes.fromhex("306fb10a"))
        found[address] = content[at + 32 : at + 32 + size]
    return found


@pytest.mark.parametrize(("info", "family"), [(RP2040, 0xE48BFF56), (RP2350, 0xE48BFF57)])
def test_a_model_is_copied_to_its_address_and_the_board_leaves(tmp_path, bundle, info, family):
    with Volume(tmp_path / "RPI-RP2", info) as volume:
        answer = write_board(f"uf2:{volume.folder}?address=0x{MODEL_AT:x}", bundle)
    model = read_member(bundle, "model.tflite")
    assert answer.action == "written" and answer.address == MODEL_AT and answer.size_bytes == len(model)
    assert "Raspberry Pi" in answer.board and answer.signer and "started anew" in answer.verified
    written = flash_of(volume.taken)
    assert b"".join(written[a] for a in sorted(written))[: len(model)] == model and min(written) == MODEL_AT
    assert {struct.unpack_from("<I", volume.taken, at + 28)[0] for at in range(0, len(volume.taken), 512)} == {family}


def test_a_firmware_file_is_copied_as_it_is(tmp_path):
    content = uf2.make(os.urandom(3000), 0x10000000, 0xE48BFF56)
    (tmp_path / "app.uf2").write_bytes(content)
    with Volume(tmp_path / "V", RP2040) as volume:
        answer = write_board(f"uf2:{volume.folder}", firmware=str(tmp_path / "app.uf2"))
    assert volume.taken == content and answer.address == 0x10000000
    (tmp_path / "app.bin").write_bytes(b"\x01" * 700)
    with Volume(tmp_path / "W", RP2350) as volume:
        write_board(f"uf2:{volume.folder}", firmware=str(tmp_path / "app.bin"))
    assert sorted(flash_of(volume.taken)) == [0x10000000, 0x10000100, 0x10000200]
    assert struct.unpack_from("<I", volume.taken, 28)[0] == 0xE48BFF59


def test_an_rp2350s_extra_first_block_is_let_be(tmp_path):
    spare = struct.pack("<8I", 0x0A324655, 0x9E5D5157, 0xA000, 0x10FFFF00, 256, 0, 2, 0xE48BFF57) + b"\xef" * 256
    content = (
        spare + bytes.fromhex("04e35799").ljust(220, b"\0") + struct.pack("<I", 0x0AB16F30) + uf2.make(bytes(900), 0x10000000, 0xE48BFF59)
    )
    (tmp_path / "app.uf2").write_bytes(content)
    (tmp_path / "INFO_UF2.TXT").write_text(RP2350)
    answer = write_board(f"uf2:{tmp_path}", firmware=str(tmp_path / "app.uf2"), dry_run=True)
    assert answer.address == 0x10000000 and "0x10000000 to 0x10000400, families 0xe48bff59" in answer.steps[0]


def test_a_dry_run_touches_nothing_and_the_command_line_says_so(tmp_path, bundle):
    folder = tmp_path / "V"
    folder.mkdir()
    (folder / "INFO_UF2.TXT").write_text(RP2040)
    arguments = ["flash", bundle, "--to", f"uf2:{folder}?address=0x{MODEL_AT:x}", "--dry-run"]
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    answer = json.loads(shown.stdout)
    assert shown.exit_code == 0 and (answer["kind"], answer["action"], answer["verified"]) == ("board-write", "dry-run", "")
    assert [p.name for p in folder.iterdir()] == ["INFO_UF2.TXT"]
    assert "3. wait" in CliRunner().invoke(app, arguments).stdout
    refused = CliRunner().invoke(app, ["flash", "--firmware", "x.uf2"])
    assert isinstance(refused.exception, InputError) and "--to" in str(refused.exception)


def test_what_does_not_belong_on_this_board_is_refused(tmp_path, bundle):
    folder = tmp_path / "V"
    folder.mkdir()
    with pytest.raises(DeviceError, match="no UF2 volume there") as caught:
        write_board(f"uf2:{folder}?address={MODEL_AT}", bundle)
    assert "BOOT" in caught.value.hint
    (folder / "INFO_UF2.TXT").write_text(RP2040)
    (tmp_path / "other.uf2").write_bytes(uf2.make(b"x" * 600, 0x10000000, 0xE48BFF59))
    with pytest.raises(InputError, match=r"made for rp2350-arm, the board is Raspberry Pi RP2 \(RPI-RP2\)"):
        write_board(f"uf2:{folder}", firmware=str(tmp_path / "other.uf2"))
    (tmp_path / "low.uf2").write_bytes(uf2.make(b"x" * 600, 0x08000000, 0xE48BFF56))
    with pytest.raises(InputError, match="outside RP2040's flash"):
        write_board(f"uf2:{folder}", firmware=str(tmp_path / "low.uf2"))
    for options, message in [
        ("", "where in flash"), ("?address=0x10100100", "not a sector"), ("?address=0x101ff000", "are there"),
        ("?address=0x10100000&flash=64MB", "reaches"), ("?address=twelve", "not a number"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            write_board(f"uf2:{folder}{options}", bundle)
    with pytest.raises(UnknownName, match="adress"):
        write_board(f"uf2:{folder}?adress=1", bundle)
    (folder / "INFO_UF2.TXT").write_text("UF2 Bootloader 0.2\nModel: Board of one's own\nBoard-ID: MINE-1\n")
    (tmp_path / "mine.uf2").write_bytes(uf2.make(b"x" * 600, 0x26000, 0x12345678))
    with pytest.raises(InputError, match="none of RP2350"):
        write_board(f"uf2:{folder}", firmware=str(tmp_path / "mine.uf2"))
    assert write_board(f"uf2:{folder}?family=0x12345678", firmware=str(tmp_path / "mine.uf2"), dry_run=True).address == 0x26000
    assert not (folder / "EDGESDK.UF2").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c[:-1], "not whole blocks"),
        (lambda c: c[:-512], "ends after block 3 of 4"),
        (lambda c: c[:512] + c[1024:], "says 2 of 4, wanted 1 of 4"),
        (lambda c: b"XXXX" + c[4:], "block 0 is not UF2"),
        (lambda c: c[:1536] + c[1536 : 1536 + 508] + b"XXXX", "block 3 is not UF2"),
        (lambda c: c[:16] + b"\xff\xff" + c[18:], "block 0 holds 65535 bytes"),
        (lambda c: c[: 512 + 12] + struct.pack("<I", 0x10000000) + c[512 + 16 :], "before the end of another"),
        (
            lambda c: b"".join(c[i : i + 8] + struct.pack("<I", 1) + c[i + 12 : i + 512] for i in range(0, len(c), 512)),
            "nothing into flash",
        ),
    ],
)
def test_spoiled_files_are_told_block_by_block(spoil, message):
    with pytest.raises(InputError, match=message):
        uf2.read(spoil(uf2.make(bytes(1000), 0x10000000, 0xE48BFF56)), "app.uf2")


def _failing(monkeypatch, target: Path, after: int, code: int, leave: bool) -> None:
    """Writes to the volume fail once `after` bytes are there; with `leave` it is gone then."""
    real = os.write

    def write(handle: int, data: bytes) -> int:
        if target.exists() and target.stat().st_size + len(data) > after:
            if leave:
                shutil.rmtree(target.parent)
            raise OSError(code, os.strerror(code))
        return real(handle, data)

    monkeypatch.setattr(uf2.os, "write", write)


def test_a_board_that_leaves_with_its_last_block_has_everything_and_one_that_leaves_before_has_not(tmp_path, bundle, monkeypatch):
    payload = read_payload(bundle, None)
    size = 512 * -(-len(payload.content) // 256)
    for name, after, code, leave in [("last", size - 512, errno.EIO, True), ("early", size - 513, errno.EIO, True)]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "INFO_UF2.TXT").write_text(RP2040)
        with monkeypatch.context() as patch:
            _failing(patch, folder / "EDGESDK.UF2", after, code, leave)
            if name == "last":
                assert uf2.write_uf2(f"uf2:{folder}?address={MODEL_AT}", payload).action == "written"
            else:
                with pytest.raises(LinkError, match="the volume failed after"):
                    uf2.write_uf2(f"uf2:{folder}?address={MODEL_AT}", payload)


def test_a_full_volume_one_that_errs_and_one_that_stays(tmp_path, bundle, monkeypatch):
    folder = tmp_path / "V"
    folder.mkdir()
    (folder / "INFO_UF2.TXT").write_text(RP2040)
    to = f"uf2:{folder}?address={MODEL_AT}"
    monkeypatch.setattr(uf2, "LEAVES_S", 0.1)
    with pytest.raises(CheckFailed, match="the board did not take the file"):
        write_board(to, bundle)
    for after, code, error, message in [
        (70000, errno.ENOSPC, DeviceError, "full"),
        (len(read_payload(bundle, None).content) * 2, errno.EIO, LinkError, "failed"),
    ]:
        with monkeypatch.context() as patch:
            _failing(patch, folder / "EDGESDK.UF2", after, code, leave=False)
            with pytest.raises(error, match=message):
                write_board(to, bundle)
