"""Where each target begins: good inputs, and bad ones that were found."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

from tests.fuzz import made

FORMS = Path(__file__).parents[1] / "plain_outputs"


PROFILES = Path(__file__).parents[2] / "profiles"


_KEPT: dict[str, bytes] = {}


def good(folder: Path) -> bytes:
    if "good" not in _KEPT:
        _KEPT["good"] = made.seed_bundle(folder)
    return _KEPT["good"]


def bundle(folder: Path) -> list[bytes]:
    fields = json.loads(manifest(folder)[0])
    del fields["members"]
    names = (b"a/b.bin", b"../../up", b"/etc/x", b"a\\b", b"a/../b", b".", b"manifest.json", b"store/\xc3\xa4")
    return [
        b"\0" + good(folder),
        b"\1" + json.dumps(fields).encode() + b"\xff\xff",
        b'\1{"model_name":"x"}\xff\xff' + b"\xff".join(n + b"\xffcontent" for n in names[:1]),
        *(b"\1\xff\xff" + n + b"\xffcontent" for n in names),
        b'\1{"golden":[{"method":"../x","inputs":["a"],"outputs":["b"],"max_relative_error":1}]}\xff{"kind":"signatures"}\xffa\xff\x80../../link',
    ]


def manifest(folder: Path) -> list[bytes]:
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(good(folder))) as archive:
        return [
            archive.read("manifest.json"),
            b"[" * 2000,
            b'{"kind":"bundle","schema_version":1}',
            b'{"kind":"bundle","schema_version":1e400}',
        ]


def profile(folder: Path) -> list[bytes]:
    deep = [b"a = " + b"[" * 2000, b"a = " + b"{a=" * 2000, b"a = " + b"9" * 5000]
    return deep + [p.read_bytes() for p in sorted(PROFILES.glob("*.toml"))[:6]]


def inventory(folder: Path) -> list[bytes]:
    return [
        b'[devices.pi5-01]\nlink = "ssh://pi@10.0.0.11"\ndevice = "raspberry-pi-5"\ntags = ["lab"]\n[groups]\npi5 = ["pi5-01", "tag:lab", "group:all"]\nall = ["group:pi5"]\n'
    ]


def frames(folder: Path) -> list[bytes]:
    return [
        b'{"verb":"facts","id":1}',
        made.framed(b'{"ok":{}}'),
        b"[1,2]",
        b"[" * 5000,
        b'{"a":NaN}',
        b'{"a":"\\ud800"}',
        b"9" * 5000 + b" 00000000 {",
    ]


def wire(folder: Path) -> list[bytes]:
    return [b"\x05one\ntwo\n\nrest", b"\x00\n\n\n", b"\xff" + made.framed(b"{}") + b"\n"]


def serial(folder: Path) -> list[bytes]:
    from edgesdk.transport.serial_line import ACK, DATA, DEVICE, frame

    return [
        frame(DATA | DEVICE, 7, 0, 0, b"hello") + frame(ACK | DEVICE, 7, 0, 50, struct.pack(">HH", 10, 20)),
        bytes(range(240)),
        b"~" * 50,
    ]


def uf2(folder: Path) -> list[bytes]:
    from edgesdk.bootloaders.uf2 import make

    return [make(bytes(600), 0x10000000, 0xE48BFF56), make(b"x", 0, 1), bytes(512)]


def disk(folder: Path) -> list[bytes]:
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


def bmap(folder: Path) -> list[bytes]:
    import hashlib

    text = (
        '<?xml version="1.0" ?>\n<bmap version="2.0">\n<ImageSize> 8192 </ImageSize>\n<BlockSize> 4096 </BlockSize>\n<BlocksCount> 2 </BlocksCount>\n'
        "<MappedBlocksCount> 1 </MappedBlocksCount>\n<ChecksumType> sha256 </ChecksumType>\n<BmapFileChecksum> {} </BmapFileChecksum>\n"
        f'<BlockMap>\n<Range chksum="{"0" * 64}"> 0 </Range>\n</BlockMap>\n</bmap>\n'
    )
    digest = hashlib.sha256(text.format("0" * 64).encode()).hexdigest()
    return [text.format(digest).encode(), b"<bmap/>", b"<!DOCTYPE x>"]


def esp(folder: Path) -> list[bytes]:
    import hashlib

    rows = b"".join(struct.pack("<HBBII16sI", 0x50AA, 1, 2, 0x9000 + i * 0x1000, 0x1000, b"nvs%d" % i, 0) for i in range(3))
    return [rows + b"\xeb\xeb" + b"\xff" * 14 + hashlib.md5(rows).digest() + b"\xff" * 64, b"\xff" * 3072]


def mcuboot(folder: Path) -> list[bytes]:
    import hashlib

    head = struct.pack("<IIHHIIBBHII", 0x96F3B83D, 0, 32, 0, 16, 0, 1, 2, 3, 4, 0)
    body = head + bytes(16)
    hashed = struct.pack("<HH", 0x10, 32) + hashlib.sha256(body).digest()
    return [body + struct.pack("<HH", 0x6907, 4 + len(hashed)) + hashed]


def uboot(folder: Path) -> list[bytes]:
    from edgesdk.image.uboot import encode

    return [
        encode({"bootcmd": "run x", "slot": "a"}, 512),
        b"/dev/mmcblk0 0x400000 0x4000\n/dev/mmcblk0 0x404000 0x4000\n",
        b"a=b\0c=d\0\0",
    ]


def tools(folder: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted(FORMS.glob("*.txt"))]


def order(folder: Path) -> list[bytes]:
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
    return [pack(install), signatures, manifest(folder)[0]]


def facts(folder: Path) -> list[bytes]:
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


def links(folder: Path) -> list[bytes]:
    texts = (
        "ssh://pi@[::1]:22?root=/x",
        "ssh://[[x",
        "adb://10.0.0.1:5555",
        "serial:/dev/ttyUSB0?baud=115200",
        "serial:/dev/x?baud=\u00b2",
        "local:/x",
    )
    return [t.encode() for t in (*texts, "esp32:/dev/ttyUSB0?baud=9", "mqtts://user@host:8883", "mqtt://[x", "uf2:/media/x")]
