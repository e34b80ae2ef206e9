"""`edgesdk devices ports`: what is plugged in, and what to type for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from typer.testing import CliRunner

from edgesdk.bootloaders.ports import Here, Ports, list_ports
from edgesdk.bootloaders.types import is_board
from edgesdk.cli import app


def port(device: str, vid: int | None = None, pid: int | None = None, product: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(device=device, vid=vid, pid=pid, manufacturer=None, product=product, serial_number="7" if vid else None)


def here(tmp_path: Path) -> Here:
    volume = tmp_path / "media/RPI RP2"
    volume.mkdir(parents=True)
    (volume / "INFO_UF2.TXT").write_text("UF2 Bootloader v3.0\nModel: Raspberry Pi RP2\nBoard-ID: RPI-RP2\n")
    (tmp_path / "sdb1").write_text("")
    (tmp_path / "sdc1").write_text("")
    mounts = f"/dev/sda2 / ext4 rw 0 0\n{tmp_path}/sdb1 {str(volume).replace(' ', chr(92) + '040')} vfat rw 0 0\n{tmp_path}/none {tmp_path}/x vfat rw 0 0\n"
    (tmp_path / "mounts").write_text(mounts)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/RPI-RP2").symlink_to(tmp_path / "sdb1")
    (tmp_path / "labels/RP2350").symlink_to(tmp_path / "sdc1")
    for name, vendor, product in (("1-6", "0955", "7323"), ("1-7", "0955", "7020"), ("2-1", "1d6b", "0003")):
        place = tmp_path / "sys/bus/usb/devices" / name
        place.mkdir(parents=True)
        (place / "idVendor").write_text(vendor)
        (place / "idProduct").write_text(product)
    (tmp_path / "adb").write_text(
        "#!/bin/sh\nprintf '* daemon started\\nList of devices attached\\nR5CT10 device product:r0 model:SM_S901B\\nQQ1 unauthorized usb:1-2\\n\\n'\n"
    )
    (tmp_path / "adb").chmod(0o755)
    ports = [
        port("/dev/ttyUSB0", 0x10C4, 0xEA60),
        port("/dev/ttyACM1", 0x303A, 0x1001, "USB JTAG"),
        port("/dev/ttyACM0", 0x2FE3, 4, "Zephyr"),
        port("/dev/ttyS0"),
    ]
    return Here(tmp_path / "sys", tmp_path / "mounts", tmp_path / "labels", lambda: ports, str(tmp_path / "adb"))


def test_everything_that_is_plugged_in_is_told_with_what_to_type(tmp_path):
    place = here(tmp_path)
    found = {p.name.removeprefix(f"{tmp_path}/"): p for p in list_ports(place).ports}
    assert [p.kind for p in found.values()] == ["serial"] * 4 + ["uf2"] * 2 + ["jetson"] + ["adb"] * 2
    assert found["/dev/ttyUSB0"].usb == "10c4:ea60" and found["/dev/ttyUSB0"].use == ("--to esp32:/dev/ttyUSB0", "--on serial:/dev/ttyUSB0")
    assert found["/dev/ttyACM1"].use == ("--to esp32:/dev/ttyACM1",) and found["/dev/ttyACM0"].use[0] == "--to smp:/dev/ttyACM0"
    assert found["/dev/ttyS0"].usb is None and "CP210x" in found["/dev/ttyUSB0"].what
    assert found["media/RPI RP2"].what == "Raspberry Pi RP2 (RPI-RP2)" and found["media/RPI RP2"].use[0].startswith("--to uf2:")
    assert found["labels/RP2350"].use == (f"udisksctl mount -b {tmp_path}/sdc1",) and "labels/RPI-RP2" not in found
    assert "Orin NX 16GB in recovery mode" in found["1-6"].what and found["1-6"].usb == "0955:7323"
    assert found["R5CT10"].use == ("--on adb://R5CT10",) and "screen" in found["QQ1"].what
    assert all(is_board(u.split()[1]) for p in found.values() for u in p.use if u.startswith("--to") and "'" not in u)


def test_nothing_there_is_no_error(tmp_path):
    nothing = Here(tmp_path, tmp_path / "mounts", tmp_path / "labels", list, str(tmp_path / "adb"))
    assert list_ports(nothing).ports == ()


def test_the_command_line_answers_in_both_forms(monkeypatch, tmp_path):
    place = here(tmp_path)
    monkeypatch.setattr("edgesdk.bootloaders.ports.list_ports", lambda here=place: Ports.from_json(list_ports(place).to_json()))
    shown = CliRunner().invoke(app, ["devices", "ports"])
    assert shown.exit_code == 0 and "  --to esp32:/dev/ttyUSB0\n" in shown.stdout
    answer = json.loads(CliRunner().invoke(app, ["devices", "ports", "--json"]).stdout)
    assert answer["kind"] == "ports" and len(answer["ports"]) == 9
