"""Disk images: what is in one, copies from compressed files and by block map, which disks may be written to, and writing with a second look."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import struct
import uuid
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesdk.errors import CheckFailed, DeviceError, InputError, MissingTool
from edgesdk.image import blockmap, disk, files, source, write
from edgesdk.image.partitions import partitions, pick
from tests.image_small import MIB, block_map, machine, mbr, superblock


def image(path, parts=((0x0C, 2048, 2048), (0x83, 4096, 4096)), size=4 * MIB, table=None):
    with path.open("wb") as file:
        file.write(mbr(list(parts)) if table is None else table)
        file.seek(2048 * 512)
        file.write(b"\xeb\x3c\x90MSDOS5.0".ljust(43, b"\0") + b"BOOTFS     FAT16   ".ljust(467, b"\0") + b"\x55\xaa")
        file.seek(4096 * 512 + 1024)
        file.write(superblock(2048))
        file.truncate(size)
    return path


def gpt(parts, damage=False):
    entries = b""
    for first, last in parts:
        entries += uuid.uuid4().bytes_le + uuid.uuid4().bytes_le + struct.pack("<QQQ", first, last, 0) + bytes(72)
    entries = entries.ljust(128 * 128, b"\0")
    head = b"EFI PART" + struct.pack("<IIIIQQQQ", 0x10000, 92, 0, 0, 1, 8191, 34, 8158) + uuid.uuid4().bytes_le
    head += struct.pack("<QIII", 2, 128, 128, zlib.crc32(entries) ^ damage)
    head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
    return mbr([(0xEE, 1, 8191)]) + head.ljust(512, b"\0") + entries


def test_partitions_of_an_mbr_and_a_gpt(tmp_path):
    for table in (None, gpt([(2048, 4095), (4096, 8191)])):
        found = partitions(image(tmp_path / "os.img", table=table))
        assert [(p.number, p.kind, p.label, p.start_bytes, p.size_bytes) for p in found] == [
            (1, "fat", "BOOTFS", MIB, MIB),
            (2, "ext4", "rootfs", 2 * MIB, 2 * MIB),
        ]
    assert pick(found, "ext4", None, tmp_path).number == 2
    with pytest.raises(InputError, match=r"no partition 1 of kind ext4 found, there is: partition 1 \(fat"):
        pick(found, "ext4", 1, tmp_path)


def test_logical_partitions_and_a_bare_file_system(tmp_path):
    path = image(tmp_path / "os.img", parts=[(0x0C, 2048, 1024), (0x05, 3072, 5120)])
    with path.open("r+b") as file:
        file.seek(3072 * 512)
        file.write(mbr([(0x83, 1024, 4096)]))
    assert [(p.number, p.kind, p.start_bytes) for p in partitions(path)] == [(1, "fat", MIB), (5, "ext4", 2 * MIB)]
    bare = tmp_path / "root.ext4"
    bare.write_bytes(bytes(1024) + superblock(2048) + bytes(2 * MIB - 2048))
    assert [(p.number, p.kind, p.size_bytes) for p in partitions(bare)] == [(0, "ext4", 2 * MIB)]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda p: p.write_bytes(bytes(4096)), InputError, "neither a partition table nor a file system"),
        (lambda p: p.write_bytes(b"hello"), InputError, "neither a partition table"),
        (lambda p: p.write_bytes(mbr([]) + bytes(4096)), InputError, "its partition table is empty"),
        (lambda p: image(p, size=3 * MIB), CheckFailed, r"cut off: partition 2 .* ends at 4.19 MB, the image at 3.15 MB"),
        (lambda p: image(p, table=gpt([(2048, 4095)], damage=True)), CheckFailed, "its GPT is damaged"),
        (lambda p: image(p, parts=[(0x05, 3072, 1024)]), CheckFailed, "its extended partition is damaged at sector 3072"),
    ],
)
def test_what_is_no_whole_image_is_refused(tmp_path, make, error, said):
    make(path := tmp_path / "os.img")
    with pytest.raises(error, match=said):
        partitions(path)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 16 * 512 - 1), st.binary(min_size=1, max_size=8)), max_size=6), st.booleans(), st.integers(0, 4 * MIB)
)
def test_spoiled_tables_end_in_an_error_or_in_partitions_inside(tmp_path_factory, changes, is_gpt, size):
    path = tmp_path_factory.getbasetemp() / "spoiled.img"
    image(path, table=gpt([(2048, 4095), (4096, 8191)]) if is_gpt else None)
    with path.open("r+b") as file:
        for at, data in changes:
            file.seek(at)
            file.write(data)
        if is_gpt and size % 2:  # a table whose checksums are right all the same
            file.seek(1024)
            table = file.read(128 * 128)
            file.seek(512)
            head = file.read(92)
            head = head[:88] + struct.pack("<I", zlib.crc32(table))
            file.seek(512)
            file.write(head[:16] + struct.pack("<I", zlib.crc32(head[:16] + bytes(4) + head[20:])) + head[20:])
        file.truncate(size)
    with contextlib.suppress(CheckFailed, InputError):
        assert all(p.size_bytes > 0 and p.start_bytes + p.size_bytes <= size for p in partitions(path))


@pytest.mark.parametrize("kind", ["img", "img.xz", "img.gz", "img.bz2", "zip"])
def test_a_copy_is_sparse_and_the_source_is_left_alone(tmp_path, kind):
    data = os.urandom(70_000) + bytes(4 * MIB) + os.urandom(5000)
    path = tmp_path / f"os.{kind}"
    packed = {"img": bytes, "img.xz": lzma.compress, "img.gz": gzip.compress, "img.bz2": bz2.compress, "zip": bytes}[kind](data)
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("readme.txt", "hello")
            archive.writestr("os.img", data)
    else:
        path.write_bytes(packed)
    before = path.read_bytes()
    assert source.copy(path, tmp_path / "copy") == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "copy").read_bytes() == data and path.read_bytes() == before
    assert (tmp_path / "copy").stat().st_blocks * 512 < MIB
    path.write_bytes(before[: len(before) // 2])
    if kind != "img":
        with pytest.raises(CheckFailed, match="cut off or damaged"):
            source.copy(path, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


def test_an_archive_with_two_images_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.img", b"a")
        archive.writestr("b.img", b"b")
    with pytest.raises(InputError, match="2 images in it, wanted one"):
        source.copy(tmp_path / "two.zip", tmp_path / "copy")


def test_a_full_disk_while_copying(tmp_path, monkeypatch):
    (tmp_path / "os.img").write_bytes(os.urandom(MIB))
    monkeypatch.setattr(source, "_sparse", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DeviceError, match="cannot be written \\(No space left on device\\)"):
        source.copy(tmp_path / "os.img", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_only_mapped_blocks_are_taken(tmp_path):
    data = bytearray(os.urandom(40 * 4096 + 100))
    data[8 * 4096 : 12 * 4096] = bytes(4 * 4096)  # mapped zeros are written as such
    path = tmp_path / "os.img"
    path.write_bytes(data)
    (tmp_path / "os.img.bmap").write_text(block_map(path, [(0, 1), (8, 11), (40, 40)]))
    found = blockmap.find(path)
    assert found and blockmap.find(path.with_suffix(".img.xz")) == found
    blocks = blockmap.read(found)
    assert blocks.mapped_bytes == 6 * 4096 + 100
    wanted = data[: 2 * 4096] + bytes(38 * 4096) + data[40 * 4096 :]
    packed = tmp_path / "os.img.gz"
    packed.write_bytes(gzip.compress(data))
    for origin in (path, packed):
        source.copy(origin, tmp_path / "copy", blocks)
        assert (tmp_path / "copy").read_bytes() == bytes(wanted)
    assert list(disk.extents(tmp_path / "copy", everything=False)) == [(0, 8192), (8 * 4096, 12 * 4096), (40 * 4096, len(data))]
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckFailed, match=r"blocks 0-1 have sha256 .* the block map wants"):
        source.copy(path, tmp_path / "copy", blocks)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t.replace("<BlockSize> 4096", "<BlockSize> 4097"), CheckFailed, "BmapFileChecksum is wrong"),
        (lambda t: "<bmap", InputError, "not a block map"),
        (lambda t: t.replace("?>", "?><!DOCTYPE x>"), InputError, "document type"),
        (lambda t: t.replace("sha256 </Ch", "crc32 </Ch"), InputError, "ChecksumType = 'crc32'"),
        ({"version": "1.3"}, InputError, "bmap of version 1.3, wanted bmap 2.x"),
        ({"count": "7"}, CheckFailed, "MappedBlocksCount = 7"),
        ({"size": "4096"}, InputError, "do not fit 1 blocks"),
    ],
)
def test_block_maps_that_are_wrong(tmp_path, change, error, said):
    (tmp_path / "os.img").write_bytes(bytes(10 * 4096))
    text = (
        block_map(tmp_path / "os.img", [(0, 3)], **change) if isinstance(change, dict) else change(block_map(tmp_path / "os.img", [(0, 3)]))
    )
    (tmp_path / "os.bmap").write_text(text)
    with pytest.raises(error, match=said):
        blockmap.read(tmp_path / "os.bmap")


def test_removable_disks_may_be_written_to(tmp_path):
    made = machine(tmp_path)
    assert str(disk.safe_disk(made.dev / "sdb", 1000, made)).endswith("sdb (Card sdb, 33.6 MB)")
    assert disk.safe_disk(made.dev / "mmcblk0", 1000, made).size_bytes == 65536 * 512  # soldered readers say removable = 0
    (made.dev / "by-id").symlink_to(made.dev / "sdb")
    assert disk.safe_disk(made.dev / "by-id", 1000, made).name == "sdb"


@pytest.mark.parametrize(
    ("name", "prepare", "said"),
    [
        ("sdx", None, r"sdx: no such disk\nthose that may be written to: .*mmcblk0 .*sdb"),
        ("sda", None, "sda: not removable, and not on USB or MMC"),
        ("mmcblk0p1", None, r"a partition, an image wants the whole disk\ngive the disk it is on: --to .*mmcblk0$"),
        ("sdc", None, "no medium in it"),
        ("sdb", ("mountinfo", "40 22 8:16 / /media/my\\040stick rw - vfat /dev/sdb rw\n"), "sdb is mounted on /media/my stick"),
        ("mmcblk0", ("mountinfo", "40 22 179:2 / / rw - ext4 /dev/root rw\n"), "the disk of the running system .mmcblk0p2 is /"),
        ("mmcblk0", ("swaps", "DEV/mmcblk0p1 partition 1 0 -2\n"), "mmcblk0p1 is used as swap"),
        ("mmcblk0", ("holder", "mmcblk0p2"), r"mmcblk0p2 is held by dm-0 \(LVM"),
        ("sdb", ("ro", "1"), "write-protected"),
        ("sdb", ("size", "8"), r"4.1 kB, the image has 5 kB"),
    ],
)
def test_disks_that_must_not_be_written_to(tmp_path, name, prepare, said):
    made = machine(tmp_path)
    what, text = prepare or ("", "")
    if what in ("mountinfo", "swaps"):
        path = made.proc / ("self/mountinfo" if what == "mountinfo" else "swaps")
        path.write_text(path.read_text() + text.replace("DEV", str(made.dev)))
    elif what == "holder":
        (made.sys / "class/block" / text / "holders" / "dm-0").mkdir()
    elif what:
        (made.sys / "class/block" / name / what).write_text(text)
    with pytest.raises(InputError, match=f"(?s){said}"):
        disk.safe_disk(made.dev / name, 5000, made)


def test_writing_a_disk_reads_it_back(tmp_path, monkeypatch):
    made, path = machine(tmp_path / "machine"), image(tmp_path / "os.img")
    device = made.dev / "sdb"
    device.write_bytes(b"\xff" * (32 * MIB))
    seen = []
    with pytest.raises(InputError, match="everything on it would be lost\nlook at it with --dry-run, then give --yes"):
        write.write_image(path, device, machine=made)
    report = write.write_image(path, device, dry_run=True, machine=made)
    assert device.read_bytes() == b"\xff" * (32 * MIB) and report.written_bytes == 0 and report.sha256 is None
    assert [s.split()[0] for s in report.steps] == ["copy", "write", "verify"]
    report = write.write_image(path, device, yes=True, machine=made, watch=lambda *a: seen.append(a))
    assert device.read_bytes()[: 4 * MIB] == path.read_bytes() and report.written_bytes == 4 * MIB
    assert ("write", 4 * MIB, 4 * MIB) in seen and seen[-1] == ("verify", 4 * MIB, 4 * MIB)
    (tmp_path / "os.img.bmap").write_text(block_map(path, [(0, 0), (256, 256), (512, 512)]))
    device.write_bytes(b"\xff" * (32 * MIB))
    assert write.write_image(path, device, yes=True, machine=made).written_bytes == 3 * 4096
    assert device.read_bytes()[4096:MIB] == b"\xff" * (MIB - 4096), "what the map does not name is left as it is"
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data[:-1]) + b"!", at))
    with pytest.raises(CheckFailed, match="bytes 0-4096 read back are not what was written"):
        write.write_image(path, device, yes=True, machine=made)
    monkeypatch.setattr(os, "pwrite", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DeviceError, match=r"the disk is full after 0 B of 12.3 kB"):
        write.write_image(path, device, yes=True, machine=made)


def test_targets_that_are_refused(tmp_path):
    path, made = image(tmp_path / "os.img"), machine(tmp_path / "machine")
    for to, said in (
        (path, "is the image itself"),
        (tmp_path, "a folder"),
        (tmp_path / "there", "is there already"),
        (made.dev / "sdb1", "no such disk"),
    ):
        (tmp_path / "there").touch()
        with pytest.raises(InputError, match=said):
            write.write_image(path, to, machine=made)
    with pytest.raises(InputError, match="no such file"):
        write.write_image(tmp_path / "none.img", tmp_path / "out", machine=made)
    with pytest.raises(InputError, match="larger card"):
        disk_size = made.sys / "class/block/sdb/size"
        disk_size.write_text("4096\n")
        write.write_image(path, made.dev / "sdb", yes=True, machine=made)
    assert write.write_image(path, tmp_path / "there", yes=True, machine=made).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".edgesdk")]


def test_a_missing_tool_names_its_package(monkeypatch):
    monkeypatch.setattr(files.shutil, "which", lambda *a, **k: None)
    with pytest.raises(MissingTool, match="the program 'debugfs' is not installed\napt install e2fsprogs"):
        files.tool("debugfs")
