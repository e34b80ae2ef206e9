"""Signatures of bundles: who may install what, keys that are replaced or revoked, and everything that somebody may have changed."""

from __future__ import annotations

import json
import os
import stat
import threading
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgesdk import signing
from edgesdk.bundles import copy_members, member_names, read_manifest, read_member, verify_bundle
from edgesdk.cli import app
from edgesdk.errors import CheckFailed, EdgeError, InputError, UnknownName
from edgesdk.flash import flash, status
from edgesdk.signing import Rotation, accept, new_key, own_key, revoke, rotate, sign, signer_of, trust, trusted
from edgesdk.transport.fake import FakeTransport
from tests.tiny import tiny_bundle


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESDK_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    tiny_bundle(tmp_path / "tiny.edge")
    return tmp_path / "tiny.edge"


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "other") -> None:
    """Another machine, with keys of its own."""
    monkeypatch.setenv("EDGESDK_KEYS", str(tmp_path / name))


def test_what_is_built_here_is_signed_and_installed_here(bundle, home):
    key = own_key()
    assert signer_of(bundle).id == key.id
    device = FakeTransport()
    deployment = flash(bundle, device)
    assert deployment.good and deployment.signer == f"default ({key.id})"
    assert any(path.endswith("/signature.json") for path in device.files)
    assert stat.S_IMODE((home / "default.pem").stat().st_mode) == 0o600


def test_what_nobody_signed_is_refused_unless_asked_for(bundle, tmp_path):
    plain = tmp_path / "plain.edge"
    with zipfile.ZipFile(bundle) as source, zipfile.ZipFile(plain, "w") as target:
        for name in source.namelist():
            if name != signing.NAME:
                target.writestr(name, source.read(name))
    device = FakeTransport()
    with pytest.raises(CheckFailed, match="not signed") as caught:
        flash(plain, device)
    assert caught.value.exit_code == 1 and not device.files
    deployment = flash(plain, device, allow_unsigned=True)
    assert deployment.good and deployment.signer is None
    sign(plain)
    assert flash(plain, device).signer and verify_bundle(plain) == read_manifest(bundle)


def test_a_bundle_from_elsewhere_needs_trust(bundle, tmp_path, monkeypatch):
    line = own_key().line
    elsewhere(monkeypatch, tmp_path)
    with pytest.raises(CheckFailed, match="not trusted here"):
        signer_of(bundle)
    (tmp_path / "key.pub").write_text(line + "\n")
    trust(str(tmp_path / "key.pub"))
    assert signer_of(bundle).name == "default"
    revoke("default")
    with pytest.raises(CheckFailed, match="revoked"):
        signer_of(bundle)
    assert trust(line).revoked is None  # trusted anew, on purpose
    assert signer_of(bundle).name == "default"


def test_a_second_signature_stands_beside_the_first(bundle, tmp_path, monkeypatch):
    first = own_key().line
    elsewhere(monkeypatch, tmp_path)
    new_key("release")
    sign(bundle, "release")
    assert len(signing.signatures_of(bundle).signatures) == 2 and signer_of(bundle).name == "release"
    sign(bundle, "release")
    assert len(signing.signatures_of(bundle).signatures) == 2
    revoke("release")
    with pytest.raises(CheckFailed, match="revoked"):
        signer_of(bundle)
    trust(first)
    assert signer_of(bundle).name == "default"


def test_a_replaced_key_is_followed(bundle, tmp_path, monkeypatch):
    line, old = own_key().line, own_key()
    before = bundle.read_bytes()
    statement = rotate("default", tmp_path / "rotation.json")
    assert own_key().id == statement.new.id != old.id
    with pytest.raises(CheckFailed, match="revoked"):
        signer_of(bundle)
    sign(bundle)
    elsewhere(monkeypatch, tmp_path)
    with pytest.raises(CheckFailed, match="not trusted here"):
        accept(Rotation.load(tmp_path / "rotation.json"))
    trust(line)
    accept(Rotation.load(tmp_path / "rotation.json"))
    assert signer_of(bundle).id == statement.new.id
    (tmp_path / "old.edge").write_bytes(before)
    with pytest.raises(CheckFailed, match="revoked"):
        signer_of(tmp_path / "old.edge")
    with pytest.raises(CheckFailed, match="revoked here"):
        accept(Rotation.load(tmp_path / "rotation.json"))


@pytest.mark.parametrize("field", ["new", "signature"])
def test_a_statement_that_was_changed_is_refused(tmp_path, field):
    own_key()
    new_key("mine")
    statement = rotate("mine", tmp_path / "rotation.json")
    other = new_key("other")
    trust(signing._public(signing._load(f"mine.{statement.old}"), "mine").line)
    changed = {"new": other} if field == "new" else {"signature": "AAAA"}
    with pytest.raises(CheckFailed, match="signature is wrong"):
        accept(statement.model_copy(update=changed))


def rewritten(path: Path, out: Path, **changed: bytes) -> Path:
    copy_members(path, out, {name.replace("__", "."): content for name, content in changed.items()})
    return out


def test_whatever_is_changed_is_noticed(bundle, tmp_path):
    manifest = json.loads(read_member(bundle, "manifest.json"))
    name = manifest["program"]
    program = bytearray(read_member(bundle, name))
    program[-1] ^= 1
    with pytest.raises(CheckFailed, match="wrong digest"):
        flash(rewritten(bundle, tmp_path / "a.edge", **{name: bytes(program)}), FakeTransport())
    manifest["threads"] = 7
    changed = rewritten(bundle, tmp_path / "b.edge", manifest__json=json.dumps(manifest).encode())
    with pytest.raises(CheckFailed, match="changed since default"):
        flash(changed, FakeTransport())
    with pytest.raises(CheckFailed, match="not in the manifest"):
        flash(rewritten(bundle, tmp_path / "c.edge", extra=b"x"), FakeTransport())
    with pytest.raises(InputError):
        flash(rewritten(bundle, tmp_path / "d.edge", signature__json=b"{"), FakeTransport())
    forged = json.loads(read_member(bundle, signing.NAME))
    forged["signatures"][0]["signature"] = "not base64"
    with pytest.raises(CheckFailed, match="changed since"):
        flash(rewritten(bundle, tmp_path / "e.edge", signature__json=json.dumps(forged).encode()), FakeTransport())


def craft(path: Path, members: list[tuple[zipfile.ZipInfo | str, bytes]], compress: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_files_made_to_do_harm_are_refused(tmp_path, bundle):
    link = zipfile.ZipInfo("model.tflite")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    manifest = read_member(bundle, "manifest.json")
    cases = {
        "is compressed": craft(tmp_path / "1", [("manifest.json", manifest), ("x", bytes(10_000_000))], zipfile.ZIP_DEFLATED),
        "is a link": craft(tmp_path / "2", [("manifest.json", manifest), (link, b"/etc/passwd")]),
        "is there twice": craft(tmp_path / "3", [("manifest.json", manifest), ("x", b""), ("x", b"")]),
        "members": craft(tmp_path / "4", [(f"{i}", b"") for i in range(10_001)]),
        "at most": craft(tmp_path / "5", [("manifest.json", b" " * ((1 << 24) + 1))]),
    }
    for words, path in cases.items():
        with pytest.raises(InputError, match=words):
            verify_bundle(path)


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle, monkeypatch):
    before = bundle.read_bytes()
    new_key("second")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(EdgeError, match="cannot be written"):
        sign(bundle, "second")
    assert bundle.read_bytes() == before and os.listdir(bundle.parent).count("tiny.edge.part") == 0


def test_keys_that_are_none_are_named(home, tmp_path):
    for wrong in ("", "ssh-ed25519 AAAA me", "edgesdk-ed25519 AAAA me", "edgesdk-ed25519 " + "A" * 43 + "= ../me"):
        with pytest.raises(InputError):
            trust(wrong)
    for name in ("../x", "", "a/b", "-x"):
        with pytest.raises(InputError):
            new_key(name)
    with pytest.raises(UnknownName):
        own_key("nobody")
    with pytest.raises(UnknownName):
        revoke("nobody")
    new_key("mine")
    with pytest.raises(InputError, match="is there already"):
        new_key("mine")
    (home / "mine.pem").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(InputError, match="no private key"):
        own_key("mine")
    (home / "trusted.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        trusted()
    with pytest.raises(EdgeError, match="nothing was changed"):
        (home / "trusted.json").unlink()
        own_key()
        rotate("default", tmp_path / "no" / "folder" / "rotation.json")


def test_two_at_once_make_one_key(home):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(own_key().id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and list(trusted()) == [found[0]]


def test_the_verbs(bundle, tmp_path, monkeypatch):
    def call(*argv: str) -> str:
        result = CliRunner().invoke(app, argv)
        assert result.exit_code == 0, result.output
        return result.output

    line = call("keys", "show").strip()
    assert line.startswith("edgesdk-ed25519 ") and "yours" in call("keys", "list")
    call("keys", "new", "release")
    assert "signed by release" in call("sign", str(bundle), "--key", "release")
    call("keys", "rotate", "release", "--out", str(tmp_path / "r.json"))
    assert json.loads(call("keys", "list", "--json"))["kind"] == "keys"
    elsewhere(monkeypatch, tmp_path)
    call("keys", "trust", line)
    call("keys", "revoke", "default")
    root = tmp_path / "device"
    result = CliRunner().invoke(app, ["flash", str(bundle), "--on", f"local:{root}"])
    assert isinstance(result.exception, CheckFailed) and status(f"local:{root}").current is None
    assert member_names(bundle)[:2] == ["manifest.json", "signature.json"]
