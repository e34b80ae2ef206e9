"""ESP32: the real esptool against a loader of our own on a pseudo-terminal; where things go, what is refused, and what fails on the way."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from tiny import tiny_bundle
from typer.testing import CliRunner

from edgesdk.bootloaders import esp
from edgesdk.bootloaders.board import write_board
from edgesdk.bootloaders.partitions import parse_table, place_app, place_model
from edgesdk.bundles import read_member
from edgesdk.cli import app
from edgesdk.errors import CheckFailed, DeviceError, EdgeError, InputError, LinkError, UnknownName
from tests.lab.esp_rom import EspRom, Faults, partition_table

ROWS = (
    ("nvs", 1, 2, 0x9000, 0x6000), ("phy_init", 1, 1, 0xF000, 0x1000), ("factory", 0, 0, 0x10000, 0x100000),
    ("model", 1, 0x40, 0x110000, 0x20000), ("storage", 1, 0x82, 0x130000, 0x40000),
)  # fmt: skip
TABLE = partition_table(*ROWS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("esp") / "tiny.edge"
    tiny_bundle(path, cols=512, runtime="tflite-micro")
    return str(path)


@pytest.fixture(autouse=True)
def fewer_attempts(monkeypatch):
    """esptool calls a silent chip often and waits long."""
    import esptool.cmds
    import esptool.loader

    monkeypatch.setattr(esp, "ATTEMPTS", 2)
    monkeypatch.setattr(esp, "ANSWER_S", 0.3)
    monkeypatch.setattr(esptool.cmds, "DEFAULT_CONNECT_ATTEMPTS", 1)
    monkeypatch.setattr(esptool.cmds, "DEFAULT_TIMEOUT", 0.3)
    monkeypatch.setattr(esptool.loader, "DEFAULT_TIMEOUT", 0.3)


def board(chip: str = "esp32", table: bytes = TABLE, **options: object) -> EspRom:
    rom = EspRom(chip, **options)  # type: ignore[arg-type]
    rom.flash[0x8000 : 0x8000 + len(table)] = table
    return rom


@pytest.mark.parametrize(("chip", "stub"), [("esp32", "no"), ("esp32", "yes"), ("esp32s3", "yes")])
def test_a_model_goes_into_its_partition_and_is_there_the_next_time(bundle, chip, stub):
    model = read_member(bundle, "model.tflite")
    seen: list[float] = []
    with board(chip) as rom:
        rom.flash[0x110000:0x120000] = b"\0" * 0x10000  # an older model
        around = bytes(rom.flash[:0x110000]), bytes(rom.flash[0x130000:])
        first = write_board(f"esp32:{rom.port}?stub={stub}", bundle, watch=lambda text, share: seen.append(share))
        assert rom.flash[0x110000 : 0x110000 + len(model)] == model
        assert around == (bytes(rom.flash[:0x110000]), bytes(rom.flash[0x130000:]))
        assert rom.stub == (stub == "yes") and (0x11 if rom.stub else 0x03) in rom.log
        before = len(rom.log)
        again = write_board(f"esp32:{rom.port}?stub={stub}&chip={chip}", bundle)
        assert not {0x02, 0x03, 0x10, 0x11} & set(rom.log[before:])
    assert (first.action, again.action, first.address) == ("written", "already-there", 0x110000)
    assert "MD5" in first.verified and "in partition model" in first.notes[0]
    assert first.board.upper().replace("-", "").startswith(chip.upper()) and "4.19 MB" in first.board
    assert seen and seen == sorted(seen)


def firmware(chip_id: int, size: int = 5000) -> bytes:
    """The header of a program for a chip, and noise."""
    return struct.pack("<BBBBIB3sHB8sB", 0xE9, 1, 0, 0, 0x40080000, 0, bytes(3), chip_id, 0, bytes(8), 0) + os.urandom(size)


def test_firmware_goes_into_the_app_partition_or_over_all_of_flash(tmp_path):
    file = tmp_path / "app.bin"
    file.write_bytes(firmware(0))
    with board() as rom:
        answer = write_board(f"esp32:{rom.port}", firmware=str(file))
        assert answer.address == 0x10000 and rom.flash[0x10000 : 0x10000 + 5024] == file.read_bytes()
        merged = tmp_path / "merged.bin"
        whole = bytearray(b"\xff" * 0x11000)
        whole[0x1000:0x1020], whole[0x8000:0x8C00], whole[0x10000:0x10100] = firmware(0)[:32], TABLE, firmware(0)[:0x100]
        merged.write_bytes(whole)
        answer = write_board(f"esp32:{rom.port}", firmware=str(merged))
        assert answer.address == 0 and rom.flash[:0x11000] == whole
        other = tmp_path / "s3.bin"
        other.write_bytes(firmware(9))
        with pytest.raises(InputError, match="made for ESP32-S3, the board is an ESP32"):
            write_board(f"esp32:{rom.port}", firmware=str(other))
        (tmp_path / "noise.bin").write_bytes(b"\x01" * 100)
        with pytest.raises(InputError, match="not a program for an ESP32"):
            write_board(f"esp32:{rom.port}", firmware=str(tmp_path / "noise.bin"))
        assert write_board(f"esp32:{rom.port}?offset=0x200000", firmware=str(tmp_path / "noise.bin")).address == 0x200000
        with pytest.raises(InputError, match="ends at 0x4003a0, the board's flash at 0x400000"):
            write_board(f"esp32:{rom.port}?offset=0x3ff000", firmware=str(file))


def test_nothing_is_written_in_plain_where_the_chip_decrypts(bundle):
    for encrypted in ("", "model"):
        with board(table=partition_table(*ROWS, encrypted=encrypted)) as rom:
            rom.regs[rom.cls.EFUSE_SPI_BOOT_CRYPT_CNT_REG] = 1 << 20
            if encrypted:
                with pytest.raises(DeviceError, match="the board's flash is encrypted"):
                    write_board(f"esp32:{rom.port}?stub=no", bundle)
                assert not {0x02, 0x03} & set(rom.log)
            else:
                assert write_board(f"esp32:{rom.port}?stub=no", bundle).action == "written"


def test_the_wrong_chip_a_taken_port_a_missing_one_and_no_answer_are_told(bundle):
    with board("esp32s3") as rom:
        with pytest.raises(InputError, match=r"the chip is an ESP32-S3, not an ESP32\n"):
            write_board(f"esp32:{rom.port}?chip=esp32", bundle)
        import serial

        with serial.Serial(rom.port, exclusive=True), pytest.raises(DeviceError, match="another program has it open"):
            write_board(f"esp32:{rom.port}", bundle)
    with pytest.raises(DeviceError, match="no such port") as caught:
        write_board("esp32:/dev/ttyNONE9", bundle)
    assert "devices ports" in caught.value.hint
    with board(faults=Faults(silent=True)) as rom, pytest.raises(DeviceError, match="no answer from an ESP32's loader") as caught:
        write_board(f"esp32:{rom.port}", bundle)
    assert "BOOT" in caught.value.hint and caught.value.exit_code == 3
    with board("esp32s3", secure=True) as rom, pytest.raises(DeviceError, match="secure download mode"):
        write_board(f"esp32:{rom.port}", bundle)
    with board(table=b"") as rom, pytest.raises(DeviceError, match="no partition table there"):
        write_board(f"esp32:{rom.port}?stub=no", bundle)
    for option, error in [
        ("chip=esp99", UnknownName),
        ("after=reboot", UnknownName),
        ("stub=maybe", InputError),
        ("baud=fast", InputError),
        ("port=1", UnknownName),
    ]:
        with pytest.raises(error):
            write_board(f"esp32:/dev/ttyUSB0?{option}", bundle, dry_run=True)


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        (Faults(noise=0.05), LinkError, "the line is disturbed"),
        (Faults(unplug_at_block=2), LinkError, "the port went away"),
        (Faults(worn=True), CheckFailed, "what lies in flash is not what was sent"),
        (Faults(no_flasher=True), DeviceError, "does not start on the chip"),
    ],
)
def test_what_fails_on_the_way_is_told_and_the_next_run_ends_well(bundle, faults, error, message, monkeypatch):
    import esptool.cmds

    monkeypatch.setattr(esptool.cmds.time, "sleep", lambda s: None)  # it waits for a plug that does not come back
    stub = "yes" if faults.no_flasher else "no"
    with board(faults=faults) as rom:
        with pytest.raises(error, match=message):
            write_board(f"esp32:{rom.port}?stub={stub}", bundle)
        flash = rom.flash
    model = read_member(bundle, "model.tflite")
    with EspRom() as rom:
        rom.flash = flash
        write_board(f"esp32:{rom.port}?stub=no", bundle)
        assert rom.flash[0x110000 : 0x110000 + len(model)] == model and rom.flash[0x10000:0x110000] == b"\xff" * 0x100000


def test_models_never_lie_over_what_is_not_theirs():
    table = parse_table(TABLE, "flash")
    assert [p.label for p in table] == [r[0] for r in ROWS]
    assert place_model(table, 0x20000, None, None, "m")[0] == 0x110000
    assert place_model(table, 100, "storage", None, "m")[0] == 0x130000
    assert place_model(table, 100, None, 0x131000, "m")[1] == table[4]
    assert place_model(table, 100, None, 0x170000, "m")[1] is None
    for options, message in [
        ((0x20001, None, None), "do not fit in partition model"), ((9, "nvs", None), "not for data"), ((9, "factory", None), "not for data"),
        ((9, None, 0x20000), "would lie over partition factory"), ((0x2000, None, 0x12F000), "would lie over partition"),
        ((9, None, 0x9000), "over partition nvs"), ((9, None, 0x8000), "bootloader and partition table"), ((9, None, 0x110010), "start of a sector"),
        ((0x41000, None, 0x130000), "over partition storage"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            place_model(table, *options, "model.tflite")
    with pytest.raises(UnknownName, match="modle"):
        place_model(table, 9, "modle", None, "m")
    plain = parse_table(partition_table(*ROWS[:3]), "flash")
    with pytest.raises(InputError, match="no partition labelled model or edgesdk") as caught:
        place_model(plain, 9, None, None, "m")
    assert "partitions.csv" in caught.value.hint
    two = parse_table(partition_table(("ota_0", 0, 0x10, 0x10000, 0x1000), ("ota_1", 0, 0x11, 0x20000, 0x1000)), "flash")
    assert place_app(two, 9, "ota_1", "a").offset == 0x20000
    for size, name, error in [(9, None, InputError), (0x1001, "ota_0", InputError), (9, "model", UnknownName)]:
        with pytest.raises(error):
            place_app(two, size, name, "a")
    for spoiled, error in [
        (TABLE[:40] + b"x" + TABLE[41:], CheckFailed),
        (TABLE[:32] + b"\0" + TABLE[33:], CheckFailed),
        (b"\xff" * 3072, DeviceError),
        (b"", DeviceError),
    ]:
        with pytest.raises(error):
            parse_table(spoiled, "flash")


def test_a_dry_run_needs_no_board(bundle, tmp_path):
    shown = CliRunner().invoke(app, ["flash", bundle, "--to", "esp32:/dev/ttyNONE9?chip=esp32s3", "--dry-run", "--json"])
    answer = json.loads(shown.stdout)
    assert shown.exit_code == 0 and answer["action"] == "dry-run" and len(answer["steps"]) == 5 and "no /dev/ttyNONE9" in answer["notes"][0]
    other = tmp_path / "linux.edge"
    tiny_bundle(other)
    with pytest.raises(InputError, match="built for host with litert, which reads no program out of"):
        write_board("esp32:/dev/ttyUSB0", str(other), dry_run=True)


def test_every_error_of_esptool_has_words_and_a_way_out():
    where = esp.parse_where("esp32:/dev/ttyUSB0", esp.OPTIONS)
    said = [
        "Failed to connect to ESP32: Wrong boot mode detected (0x13)! The chip needs to be in download mode.",
        "Input image (length 9) at offset 0x00000010 will not fit in 8 bytes of flash. Change the flash_size argument or flashing address.",
        "Something that nobody has seen.",
    ]
    errors = [esp._in_our_words(where, text) for text in said]
    assert [type(e) for e in errors] == [DeviceError, InputError, DeviceError]
    assert all(isinstance(e, EdgeError) and e.hint and "\n" not in e.what for e in errors)
    assert Path(where.path) == Path("/dev/ttyUSB0")
