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
from tests.fuzz import made, seeds

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

    good = seeds.good(folder)
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


def manifest(data: bytes, folder: Path) -> None:
    from edgesdk.bundle import Manifest

    found = Manifest.from_json(data, "manifest.json")
    assert Manifest.from_json(found.to_json(), "again") == found


def profile(data: bytes, folder: Path) -> None:
    """A user's own device profile."""
    from edgesdk.devices import check_profile

    check_profile(_written(folder, "own.toml", data))


def inventory(data: bytes, folder: Path) -> None:
    from edgesdk.inventory import load_inventory

    tempfile.tempdir = str(folder)  # links to boards make folders for what they share
    _written(folder, "inventory.toml", data)
    load_inventory(folder / "inventory.toml")


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


def uf2(data: bytes, folder: Path) -> None:
    from edgesdk.bootloaders.uf2 import read

    read(data, "x.uf2")


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


def bmap(data: bytes, folder: Path) -> None:
    from edgesdk.image.blockmap import read

    found = read(_written(folder, "x.bmap", data))
    assert found.mapped_bytes <= found.image_bytes


def esp(data: bytes, folder: Path) -> None:
    from edgesdk.bootloaders.partitions import parse_table

    parse_table(data, "the table")


def mcuboot(data: bytes, folder: Path) -> None:
    from edgesdk.bootloaders.mcuboot import read_image

    read_image(data, "x.bin")


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


def facts(data: bytes, folder: Path) -> None:
    """What a board told of itself: a JSON object of texts."""
    from edgesdk.probe.facts import read_facts

    try:
        texts = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(texts, dict):
        read_facts({str(k): v for k, v in texts.items() if isinstance(v, str)}, "fuzz", "agent")


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


TARGETS = {
    "bundle": Target(bundle, seeds.bundle),
    "manifest": Target(manifest, seeds.manifest),
    "profile": Target(profile, seeds.profile),
    "frames": Target(frames, seeds.frames),
    "wire": Target(wire, seeds.wire),
    "serial": Target(serial, seeds.serial),
    "uf2": Target(uf2, seeds.uf2),
    "disk": Target(disk, seeds.disk),
    "bmap": Target(bmap, seeds.bmap),
    "esp": Target(esp, seeds.esp),
    "mcuboot": Target(mcuboot, seeds.mcuboot),
    "uboot": Target(uboot, seeds.uboot),
    "inventory": Target(inventory, seeds.inventory),
    "links": Target(links, seeds.links),
    "tools": Target(tools, seeds.tools),
    "order": Target(order, seeds.order),
    "facts": Target(facts, seeds.facts),
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
