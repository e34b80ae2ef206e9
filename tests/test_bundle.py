"""A bundle is written whole or not at all, the same each time, and damage to any byte is found and named."""

from __future__ import annotations

import resource
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgesdk.bundles import array_bytes, bundle_digest, extract, read_array, read_manifest, read_member, verify_bundle, write_bundle
from edgesdk.errors import CheckFailed, EdgeError, InputError
from tests.tiny import tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.edge"
    tiny_bundle(path)
    return path


def two_lines(error: pytest.ExceptionInfo[EdgeError]) -> str:
    assert len(str(error.value).splitlines()) == 2, str(error.value)
    return str(error.value)


def test_same_content_same_bytes(bundle: Path, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "again.edge")
    assert (tmp_path / "again.edge").read_bytes() == bundle.read_bytes()
    assert bundle_digest(bundle) == bundle_digest(tmp_path / "again.edge")


def test_other_content_other_digest(bundle: Path, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "other.edge", seed=1)
    assert bundle_digest(tmp_path / "other.edge") != bundle_digest(bundle)


def test_verify_and_read_back(bundle: Path, tmp_path: Path) -> None:
    manifest = verify_bundle(bundle)
    assert manifest == read_manifest(bundle)
    extract(bundle, tmp_path / "out")
    for member in manifest.members:
        assert (tmp_path / "out" / member.name).read_bytes() == read_member(bundle, member.name)
        assert member.size_bytes == len(read_member(bundle, member.name))


def test_arrays_round_trip() -> None:
    for array in (np.arange(6, dtype=np.int64).reshape(2, 3), np.float32(3.5), np.zeros((0, 4), np.int8)):
        back = read_array(array_bytes(array))
        assert back.dtype == np.asarray(array).dtype
        assert np.array_equal(np.ravel(back), np.ravel(array))


def test_every_flipped_byte_of_a_member_is_found(bundle: Path, tmp_path: Path) -> None:
    """One byte in each member's content, one at a time: refused, and the member is named."""
    content = bundle.read_bytes()
    with zipfile.ZipFile(bundle) as archive:
        infos = archive.infolist()
    for info in infos:
        if info.filename == "manifest.json":
            continue
        start = info.header_offset + 30 + len(info.filename.encode())
        spoiled = bytearray(content)
        spoiled[start + info.file_size // 2] ^= 0x40
        damaged = tmp_path / "damaged.edge"
        damaged.write_bytes(spoiled)
        with pytest.raises(EdgeError) as error:
            verify_bundle(damaged)
        assert info.filename in two_lines(error)


def test_any_flipped_byte_never_gives_a_traceback(bundle: Path, tmp_path: Path) -> None:
    """Headers, names, the central directory: a flipped byte is either harmless to the content or an EdgeError."""
    content, good = bundle.read_bytes(), read_manifest(bundle)
    damaged = tmp_path / "damaged.edge"
    rng = np.random.default_rng(0)
    refused = 0
    tail = range(max(0, len(content) - 700), len(content))
    for at in [*tail, *range(120), *rng.integers(0, len(content), 200).tolist()]:
        spoiled = bytearray(content)
        spoiled[at] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(spoiled)
        try:
            manifest = verify_bundle(damaged)
        except EdgeError as error:
            refused += 1
            assert len(str(error).splitlines()) == 2
        else:
            assert manifest == good
    assert refused > 300


@pytest.mark.parametrize("keep", [0, 1, 30, 500, -1, -30])
def test_cut_off(bundle: Path, keep: int) -> None:
    content = bundle.read_bytes()
    bundle.write_bytes(content[:keep])
    with pytest.raises(InputError) as error:
        verify_bundle(bundle)
    assert str(bundle) in two_lines(error)


def test_swapped_member_is_refused(bundle: Path) -> None:
    """A valid zip whose member is another one (its own CRC is right): only the sha256 can tell."""
    members = {n: read_member(bundle, n) for n in zipfile.ZipFile(bundle).namelist()}
    members["model.tflite"] = b"x" * len(members["model.tflite"])
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckFailed) as error:
        verify_bundle(bundle)
    assert "model.tflite" in two_lines(error)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        verify_bundle(tmp_path / "absent.edge")
    with pytest.raises(InputError):
        verify_bundle(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_manifest(tmp_path / "other.zip")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "manifest.json", ""])
def test_members_stay_inside(tmp_path: Path, name: str) -> None:
    """A member's name cannot leave the folder it is unpacked in, nor replace the manifest."""
    with pytest.raises(InputError):
        write_bundle(tmp_path / "x.edge", {name: b""})
    assert list(tmp_path.iterdir()) == []


def test_extract_refuses_a_damaged_bundle(bundle: Path, tmp_path: Path) -> None:
    content = bytearray(bundle.read_bytes())
    content[content.index(b"TFL3") + 40] ^= 1
    bundle.write_bytes(content)
    with pytest.raises(EdgeError):
        extract(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_disk_full_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit stands for a full disk: the write fails in the middle, an older bundle stays as it was."""
    path = tmp_path / "big.edge"
    tiny_bundle(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(EdgeError) as error:
            tiny_bundle(path, cols=40000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be written" in two_lines(error)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["big.edge"]
