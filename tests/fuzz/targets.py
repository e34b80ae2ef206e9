"""What is fuzzed: each target takes bytes and a folder of its own, and may raise `EdgeError` and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgesdk.errors import EdgeError
from tests.fuzz import made

FORMS = Path(__file__).parents[1] / "plain_outputs"
PROFILES = Path(__file__).parents[2] / "profiles"
DICTIONARY = (
    b"\xc2\xb2",  # a digit to `isdigit`, none to `int`
    b"9" * 5000,
    b"..",
    b"../",
    b"/etc/",
    b"\\",
    b"\x00",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"members",
    b"golden",
    b"1e999",
    b"NaN",
    b"{",
    b"[[",
    b"\xff",
)


@dataclass(frozen=True)
class Target:
    one: Callable[[bytes, Path], None]
    seeds: Callable[[Path], list[bytes]]


def _written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def bundle(data: bytes, folder: Path) -> None:
    """The bytes as they are, or (first byte odd) a bundle made of them: verified, signed or not, unpacked, installed on a device in memory."""
    from edgesdk.bundles import extract, member_names
    from edgesdk.flash import flash
    from edgesdk.signing import signer_of
    from edgesdk.transport.fake import FakeTransport

    good = _good(folder)
    content = made.bundle(data[1:], good) if data[:1] and data[0] & 1 else data[1:]
    path = _written(folder, "in.edge", content)
    with contextlib.suppress(EdgeError):
        signer_of(path)
    member_names(path)
    store = folder / "store"
    extract(path, store / "unpacked")
    device = FakeTransport(root="/device")
    flash(path, device, allow_unsigned=True)
    for there in (*device.files, *device.links):
        assert posixpath.normpath(there).startswith("/device/"), there


_KEPT: dict[str, bytes] = {}


def _good(folder: Path) -> bytes:
    if "good" not in _KEPT:
        _KEPT["good"] = made.seed_bundle(folder)
    return _KEPT["good"]


def bundle_seeds(folder: Path) -> list[bytes]:
    good = _good(folder)
    fields = json.loads(manifest_seeds(folder)[0])
    del fields["members"]
    names = (b"a/b.bin", b"../../up", b"/etc/x", b"a\\b", b"a/../b", b".", b"manifest.json", b"store/\xc3\xa4")
    return [
        b"\0" + good,
        b"\1" + json.dumps(fields).encode() + b"\xff\xff",
        b'\1{"model_name":"x"}\xff\xff' + b"\xff".join(n + b"\xffcontent" for n in names[:1]),
        *(b"\1\xff\xff" + n + b"\xffcontent" for n in names),
        b'\1{"golden":[{"method":"../x","inputs":["a"],"outputs":["b"],"max_relative_error":1}]}\xff{"kind":"signatures"}\xffa\xff\x80../../link',
    ]


def manifest(data: bytes, folder: Path) -> None:
    from edgesdk.bundle import Manifest

    found = Manifest.from_json(data, "manifest.json")
    assert Manifest.from_json(found.to_json(), "again") == found


def manifest_seeds(folder: Path) -> list[bytes]:
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(_good(folder))) as archive:
        return [
            archive.read("manifest.json"),
            b"[" * 2000,
            b'{"kind":"bundle","schema_version":1}',
            b'{"kind":"bundle","schema_version":1e400}',
        ]


def profile(data: bytes, folder: Path) -> None:
    """A user's own device profile."""
    from edgesdk.devices import check_profile

    check_profile(_written(folder, "own.toml", data))


def profile_seeds(folder: Path) -> list[bytes]:
    deep = [b"a = " + b"[" * 2000, b"a = " + b"{a=" * 2000, b"a = " + b"9" * 5000]
    return deep + [p.read_bytes() for p in sorted(PROFILES.glob("*.toml"))[:6]]


def inventory(data: bytes, folder: Path) -> None:
    from edgesdk.inventory import load_inventory

    tempfile.tempdir = str(folder)  # links to boards make folders for what they share
    _written(folder, "inventory.toml", data)
    load_inventory(folder / "inventory.toml")


def inventory_seeds(folder: Path) -> list[bytes]:
    return [
        b'[devices.pi5-01]\nlink = "ssh://pi@10.0.0.11"\ndevice = "raspberry-pi-5"\ntags = ["lab"]\n[groups]\npi5 = ["pi5-01", "tag:lab", "group:all"]\nall = ["group:pi5"]\n'
    ]


def frames(data: bytes, folder: Path) -> None:
    """The host's side and the device's side of the agent's wire: lines as they are, and around any body."""
    from edgesdk.agent import frames as host
    from edgesdk.agent import wire as device

    for line in (data, made.framed(data)):
        if b"\n" in line:
            continue
        host.is_frame(line)
        with contextlib.suppress(EdgeError):
            assert isinstance(host.decode(line), dict)
        with contextlib.suppress(device.Refused):
            request = device.decode(line + b"\n")
            assert isinstance(request, dict)
            again = device.encode(request)
            assert device.encode(host.decode(again.rstrip(b"\n"))) == again  # NaN is not itself


def frames_seeds(folder: Path) -> list[bytes]:
    return [
        b'{"verb":"facts","id":1}',
        made.framed(b'{"ok":{}}'),
        b"[1,2]",
        b"[" * 5000,
        b'{"a":NaN}',
        b'{"a":"\\ud800"}',
        b"9" * 5000 + b" 00000000 {",
    ]


def wire(data: bytes, folder: Path) -> None:
    """Lines that come in any pieces through a pipe: none lost, none made up."""
    from edgesdk.agent.wire import Lines

    size = 1 + (data[0] if data else 0)
    reading, writing = os.pipe()
    try:
        lines, found = Lines(reading), []
        for i in range(1, min(len(data), 4096), size):
            os.write(writing, data[i : min(i + size, 4096)])
            while lines.cancelled():
                found.append(lines.next())
        os.close(writing)
        while line := lines.next():
            found.append(line)
    finally:
        os.close(reading)
    whole = data[1:4096]
    assert b"".join(found) == whole[: whole.rfind(b"\n") + 1]


def wire_seeds(folder: Path) -> list[bytes]:
    return [b"\x05one\ntwo\n\nrest", b"\x00\n\n\n", b"\xff" + made.framed(b"{}") + b"\n"]


def serial(data: bytes, folder: Path) -> None:
    """What a spoiled line brings: bytes as they are, then frames with right checksums made of them. What arrives is of what was sent."""
    from edgesdk.transport.serial_line import ACK, DATA, DEVICE, Line, frame, parse

    line = Line(7)
    line.write(b"x" * 100)
    line.frames(0.0)
    line.feed(data, 0.1)
    now, fed = 0.1, 0
    for i in range(0, min(len(data), 4000) - 12, 12):
        kind, session, offset, wanted, _ = struct.unpack_from(">BBIIH", data, i)
        made_frame = frame(
            [DATA, ACK, kind][kind % 3] | DEVICE, 7 if session & 1 else session, offset % (1 << 18), wanted % 300, data[i : i + kind % 40]
        )
        assert parse(made_frame.rstrip(b"\n")) is not None
        now += kind / 100
        line.feed(made_frame, now)
        fed += kind % 40
        sent = line.frames(now)
        assert len(sent) < 1 << 16
    assert len(line.take()) <= fed + len(data) and 0 <= line.acknowledged <= 100
    assert line.pending == 100 - line.acknowledged


def serial_seeds(folder: Path) -> list[bytes]:
    from edgesdk.transport.serial_line import ACK, DATA, DEVICE, frame

    return [
        frame(DATA | DEVICE, 7, 0, 0, b"hello") + frame(ACK | DEVICE, 7, 0, 50, struct.pack(">HH", 10, 20)),
        bytes(range(240)),
        b"~" * 50,
    ]


def uf2(data: bytes, folder: Path) -> None:
    from edgesdk.bootloaders.uf2 import read

    read(data, "x.uf2")


def uf2_seeds(folder: Path) -> list[bytes]:
    from edgesdk.bootloaders.uf2 import make

    return [make(bytes(600), 0x10000000, 0xE48BFF56), make(b"x", 0, 1), bytes(512)]


def disk(data: bytes, folder: Path) -> None:
    """The partition table and file systems of an image of up to 64 KiB, grown with zeros to 4 MiB."""
    from edgesdk.image.partitions import ext4, partitions

    path = folder / "disk.img"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(4 << 20)
    for part in partitions(path):
        if part.kind == "ext4":
            ext4(path, part)


def disk_seeds(folder: Path) -> list[bytes]:
    entry = struct.pack("<B3sB3sII", 0, bytes(3), 0x83, bytes(3), 8, 100)
    extended = struct.pack("<B3sB3sII", 0, bytes(3), 5, bytes(3), 16, 100)
    mbr = bytes(446) + entry + extended + bytes(32) + b"\x55\xaa"
    logical = bytes(446) + entry + extended + bytes(32) + b"\x55\xaa"
    table = struct.pack("<16s16sQQQ72s", b"\x0f" * 16, b"\1" * 16, 40, 60, 0, "root".encode("utf-16-le").ljust(72, b"\0")) + bytes(
        127 * 128
    )
    head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, 8191, 34, 8150, b"\2" * 16, 2, 128, 128, zlib.crc32(table))
    head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
    protective = bytes(446) + struct.pack("<B3sB3sII", 0, bytes(3), 0xEE, bytes(3), 1, 8191) + bytes(48) + b"\x55\xaa"
    block = bytearray(1024)
    struct.pack_into("<IIIIII", block, 0, 16, 1024, 0, 900, 10, 1)
    struct.pack_into("<H", block, 56, 0xEF53)
    return [mbr + bytes(16 * 512 - 512) + logical, protective + head.ljust(512, b"\0") + table, bytes(1024) + bytes(block)]


def bmap(data: bytes, folder: Path) -> None:
    from edgesdk.image.blockmap import read

    found = read(_written(folder, "x.bmap", data))
    assert found.mapped_bytes <= found.image_bytes


def bmap_seeds(folder: Path) -> list[bytes]:
    import hashlib

    text = (
        '<?xml version="1.0" ?>\n<bmap version="2.0">\n<ImageSize> 8192 </ImageSize>\n<BlockSize> 4096 </BlockSize>\n<BlocksCount> 2 </BlocksCount>\n'
        "<MappedBlocksCount> 1 </MappedBlocksCount>\n<ChecksumType> sha256 </ChecksumType>\n<BmapFileChecksum> {} </BmapFileChecksum>\n"
        f'<BlockMap>\n<Range chksum="{"0" * 64}"> 0 </Range>\n</BlockMap>\n</bmap>\n'
    )
    digest = hashlib.sha256(text.format("0" * 64).encode()).hexdigest()
    return [text.format(digest).encode(), b"<bmap/>", b"<!DOCTYPE x>"]


def esp(data: bytes, folder: Path) -> None:
    from edgesdk.bootloaders.partitions import parse_table

    parse_table(data, "the table")


def esp_seeds(folder: Path) -> list[bytes]:
    import hashlib

    rows = b"".join(struct.pack("<HBBII16sI", 0x50AA, 1, 2, 0x9000 + i * 0x1000, 0x1000, b"nvs%d" % i, 0) for i in range(3))
    return [rows + b"\xeb\xeb" + b"\xff" * 14 + hashlib.md5(rows).digest() + b"\xff" * 64, b"\xff" * 3072]


def mcuboot(data: bytes, folder: Path) -> None:
    from edgesdk.bootloaders.mcuboot import read_image

    read_image(data, "x.bin")


def mcuboot_seeds(folder: Path) -> list[bytes]:
    import hashlib

    head = struct.pack("<IIHHIIBBHII", 0x96F3B83D, 0, 32, 0, 16, 0, 1, 2, 3, 4, 0)
    body = head + bytes(16)
    hashed = struct.pack("<HH", 0x10, 32) + hashlib.sha256(body).digest()
    return [body + struct.pack("<HH", 0x6907, 4 + len(hashed)) + hashed]


def uboot(data: bytes, folder: Path) -> None:
    """U-Boot's environment and where it is said to be."""
    from edgesdk.image.uboot import decode, encode, places

    with contextlib.suppress(EdgeError):
        places(data.decode("utf-8", "replace"))
    half = len(data) // 2
    for copies in ([data], [data[:half], data[half:]]):
        with contextlib.suppress(EdgeError):
            decode(copies)
    body = data[:500]
    whole = struct.pack("<I", zlib.crc32(body)) + body
    with contextlib.suppress(EdgeError):
        found = decode([whole])
        if all(name and "\0" not in name + value for name, value in found.variables.items()):
            assert decode([encode(found.variables, 4096)]).variables == found.variables


def uboot_seeds(folder: Path) -> list[bytes]:
    from edgesdk.image.uboot import encode

    return [
        encode({"bootcmd": "run x", "slot": "a"}, 512),
        b"/dev/mmcblk0 0x400000 0x4000\n/dev/mmcblk0 0x404000 0x4000\n",
        b"a=b\0c=d\0\0",
    ]


def tools(data: bytes, folder: Path) -> None:
    """What native runners print: any text gives figures or none."""
    from edgesdk.history import read_history, unfinished
    from edgesdk.plain import output
    from edgesdk.plain.facts import read_facts
    from edgesdk.plain.tools import identify

    text = data.decode("utf-8", "replace")
    for read in (output.executor_runner, output.benchmark_model, output.run_model):
        read(text)
    read_facts(text)
    unfinished(read_history(text.splitlines()))
    with contextlib.suppress(EdgeError):
        identify("/x", text)


def tools_seeds(folder: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted(FORMS.glob("*.txt"))]


def order(data: bytes, folder: Path) -> None:
    """What a device takes from a broker: an order in an envelope, a bundle's signatures and manifest; every signature holds here."""
    from edgesdk.fleet import store
    from edgesdk.fleet.wire import Refused, bundle_signer, opened, pack

    keys = {"k": b"public"}
    envelopes = [data]
    with contextlib.suppress(UnicodeDecodeError):
        envelopes.append(pack({"order": data.decode(), "key": "k", "signature": "AA=="}))
    for payload in envelopes:
        with contextlib.suppress(Refused):
            found = opened(payload, "fleet", "device", keys, lambda key, text, signature: True)
            assert found["device"] == "device" and found["counter"] >= 1
    with contextlib.suppress(Refused):
        assert bundle_signer(b"", data, keys, lambda key, text, signature: True) == "k"
    with contextlib.suppress(Refused):
        for name, _, size in store.members_of(data):
            assert ".." not in name.split("/") and not name.startswith("/") and size >= 0


def order_seeds(folder: Path) -> list[bytes]:
    from edgesdk.fleet.wire import pack

    part = {"sha256": "0" * 64, "size": 10}
    install = {
        "fleet": "fleet",
        "device": "device",
        "counter": 3,
        "bundle": "a" * 64,
        "step": "install",
        "rollout": "r",
        "manifest": part,
        "signature": part,
    }
    signatures = json.dumps({"signatures": [{"key": "k", "signature": "AA=="}]}).encode()
    return [pack(install), signatures, manifest_seeds(folder)[0]]


def facts(data: bytes, folder: Path) -> None:
    """What a board told of itself: a JSON object of texts."""
    from edgesdk.probe.facts import read_facts

    try:
        texts = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(texts, dict):
        read_facts({str(k): v for k, v in texts.items() if isinstance(v, str)}, "fuzz", "agent")


def facts_seeds(folder: Path) -> list[bytes]:
    cpu = "/sys/devices/system/cpu/cpu0/"
    texts = {
        "!uname": "Linux 6.6 aarch64", "/proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\nFeatures\t: asimd asimddp\n",
        "/proc/meminfo": "MemTotal:  8000000 kB\nMemAvailable:  7000000 kB\n", cpu + "cpufreq/cpuinfo_max_freq": "2400000",
        cpu + "cache/index0/level": "1", cpu + "cache/index0/type": "Data", cpu + "cache/index0/size": "64K",
        cpu + "cache/index0/shared_cpu_list": "0-3,6", "!df": "a b c d e f\n/dev/x 100 50 50 50% /", "!python": "3.11",
        "/sys/class/thermal/thermal_zone0/type": "cpu", "/sys/class/thermal/thermal_zone0/temp": "41000", "/sys/class/hwmon/hwmon0/name": "ina3221",
        "/sys/class/hwmon/hwmon0/in1_label": "VDD_IN", "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID",
        "!pmic": " VDD_CORE_A current(7)=1.0A", "/proc/device-tree/model": "Raspberry Pi 5", "!getprop": "[ro.soc.model]: [x]",
    }  # fmt: skip
    return [json.dumps(texts).encode()]


def links(data: bytes, folder: Path) -> None:
    """What stands behind --on, --to and --broker."""
    from edgesdk.bootloaders.types import parse_where
    from edgesdk.fleet.broker import Broker
    from edgesdk.transport import parse_link

    tempfile.tempdir = str(folder)
    text = data.decode("utf-8", "replace")
    for read in (lambda: parse_link(text).close(), lambda: parse_where(text, ("baud", "address")), lambda: Broker(text)):
        with contextlib.suppress(EdgeError):
            read()


def links_seeds(folder: Path) -> list[bytes]:
    texts = (
        "ssh://pi@[::1]:22?root=/x",
        "ssh://[[x",
        "adb://10.0.0.1:5555",
        "serial:/dev/ttyUSB0?baud=115200",
        "serial:/dev/x?baud=\u00b2",
        "local:/x",
    )
    return [t.encode() for t in (*texts, "esp32:/dev/ttyUSB0?baud=9", "mqtts://user@host:8883", "mqtt://[x", "uf2:/media/x")]


TARGETS = {
    "bundle": Target(bundle, bundle_seeds),
    "manifest": Target(manifest, manifest_seeds),
    "profile": Target(profile, profile_seeds),
    "frames": Target(frames, frames_seeds),
    "wire": Target(wire, wire_seeds),
    "serial": Target(serial, serial_seeds),
    "uf2": Target(uf2, uf2_seeds),
    "disk": Target(disk, disk_seeds),
    "bmap": Target(bmap, bmap_seeds),
    "esp": Target(esp, esp_seeds),
    "mcuboot": Target(mcuboot, mcuboot_seeds),
    "uboot": Target(uboot, uboot_seeds),
    "inventory": Target(inventory, inventory_seeds),
    "links": Target(links, links_seeds),
    "tools": Target(tools, tools_seeds),
    "order": Target(order, order_seeds),
    "facts": Target(facts, facts_seeds),
}


def run(name: str, data: bytes, folder: Path) -> bool:
    """One input; whether it was taken. Raises whatever is no `EdgeError`, and `AssertionError` for a write outside `folder`."""
    from tests.fuzz.guard import confined

    with confined(folder):
        try:
            TARGETS[name].one(data, folder)
        except EdgeError as error:
            assert error.what and isinstance(error.hint, str)
            return False
    return True
