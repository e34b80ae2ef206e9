"""Who made a bundle: Ed25519 signatures over its manifest, which holds the digest of everything else.

Under `$EDGESDK_KEYS`, else `$XDG_CONFIG_HOME/edgesdk/keys` (`~/.config/edgesdk/keys`):

    NAME.pem        a private key of one's own, readable by its owner alone; `default` is made when it is first needed
    trusted.json    the public keys whose bundles are installed from here: those of one's own, those that were added, those that were revoked

A signature is the member `signature.json` beside the manifest's; several keys may sign. A key is replaced by a statement that the old one signs:
whoever trusts the old one trusts the new one from then on, and the old one no more.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgesdk.errors import CheckFailed, EdgeError, InputError, UnknownName
from edgesdk.noun import Noun, Part

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

DEFAULT = "default"
NAME = "signature.json"
_ABOUT_BUNDLE = b"edgesdk bundle manifest\n"
_ABOUT_ROTATION = b"edgesdk key rotation\n"
_WORD = "edgesdk-ed25519"
"""The first word of a public key's line."""


class PublicKey(Part):
    id: str  # the first 16 hex digits of the sha256 of its 32 bytes
    name: str
    public: str  # base64
    since: str
    revoked: str | None = None  # when

    @property
    def line(self) -> str:
        """As it is handed to others."""
        return f"{_WORD} {self.public} {self.name}"


class TrustedKeys(Noun):
    KIND: ClassVar[str] = "trusted-keys"

    keys: tuple[PublicKey, ...] = ()


class Signature(Part):
    key: str
    signature: str  # base64


class Signatures(Noun):
    KIND: ClassVar[str] = "signatures"

    signatures: tuple[Signature, ...]


class Rotation(Noun):
    """`new` in place of `old`, signed by `old` over both."""

    KIND: ClassVar[str] = "key-rotation"

    old: str
    new: PublicKey
    signature: str


@dataclass(frozen=True)
class Signer:
    """The trusted key behind a bundle."""

    id: str
    name: str


def keys_dir() -> Path:
    given = os.environ.get("EDGESDK_KEYS")
    config = os.environ.get("XDG_CONFIG_HOME")
    return Path(given) if given else (Path(config) if config else Path.home() / ".config") / "edgesdk" / "keys"


# ---- keys


def key_id(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()[:16]


def new_key(name: str) -> PublicKey:
    """A key of one's own, which is trusted here. Raises `InputError` for a name that is taken or no name."""
    path = _private(name)
    with _alone():
        if path.exists():
            raise InputError(f"a key '{name}' is there already: {path}", f"choose another name, or replace it: edgesdk keys rotate {name}")
        return _made(name)


def own_key(name: str = DEFAULT) -> PublicKey:
    """The public half of a key of one's own; `default` is made if it is not there. Raises `UnknownName`."""
    if name == DEFAULT and not _private(name).exists():
        with _alone():
            if not _private(name).exists():
                return _made(name)
    return _public(_load(name), name)


def _made(name: str) -> PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    _save({**trusted(), (public := _public(key, name)).id: public})
    _write_private(_private(name), key)
    return public


def own_keys() -> list[str]:
    return sorted(p.stem for p in keys_dir().glob("*.pem"))


def trusted() -> dict[str, PublicKey]:
    """Id → key, the revoked ones among them. Raises `InputError` for a damaged list."""
    path = keys_dir() / "trusted.json"
    return {k.id: k for k in TrustedKeys.load(path).keys} if path.exists() else {}


def trust(line: str) -> PublicKey:
    """Trust a public key, given as its line or a file that holds it. Raises `InputError`."""
    with contextlib.suppress(OSError):
        if Path(line).is_file():
            line = Path(line).read_text(encoding="utf-8", errors="replace")
    words = line.split()
    try:
        raw = base64.b64decode(words[1], validate=True) if len(words) in (2, 3) and words[0] == _WORD else b""
    except (ValueError, binascii.Error):
        raw = b""
    if len(raw) != 32:
        raise InputError(f"'{line.strip()[:60]}' is no public key", f"a key is one line, `{_WORD} … NAME`: edgesdk keys show prints it")
    name = words[2] if len(words) == 3 else key_id(raw)
    _check_name(name)
    key = PublicKey(id=key_id(raw), name=name, public=words[1], since=_now())
    with _alone():
        _save({**trusted(), key.id: key})
    return key


def revoke(key: str) -> PublicKey:
    """Trust a key no more, by its id or name. Raises `UnknownName`."""
    with _alone():
        known = trusted()
        found = [k for k in known.values() if key in (k.id, k.name) and k.revoked is None]
        if not found:
            raise UnknownName("trusted key", key, [n for k in known.values() if k.revoked is None for n in (k.name, k.id)])
        if len(found) > 1:
            raise InputError(f"several trusted keys are named '{key}'", f"give its id: {', '.join(k.id for k in found)}")
        gone = found[0].model_copy(update={"revoked": _now()})
        _save({**known, gone.id: gone})
    return gone


def rotate(name: str, out: str | Path) -> Rotation:
    """A new key under `name`; the old one is kept as NAME.OLDID, revoked here, and signs the statement at `out`. Raises `UnknownName`."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    old, fresh = _load(name), Ed25519PrivateKey.generate()
    before, after = _public(old, name), _public(fresh, name)
    statement = Rotation(old=before.id, new=after, signature=_text(old.sign(_ABOUT_ROTATION + _rotation_text(before.id, after))))
    try:
        statement.save(out)  # first: what follows is of no use without it
    except OSError as error:
        raise EdgeError(f"{out}: cannot be written ({error.strerror})", "nothing was changed; choose another --out") from None
    with _alone():
        _write_private(_private(f"{name}.{before.id}"), old)
        _write_private(_private(name), fresh)
        _save({**trusted(), before.id: before.model_copy(update={"revoked": _now()}), after.id: after})
    return statement


def accept(statement: Rotation) -> PublicKey:
    """Trust what a trusted key was replaced by, and that key no more. Raises `CheckFailed`."""
    known = trusted()
    old = known.get(statement.old)
    if old is None or old.revoked is not None:
        raise CheckFailed(
            f"the replaced key {statement.old} is {'revoked' if old else 'not trusted'} here", "add the new one: edgesdk keys trust"
        )
    text = _ABOUT_ROTATION + _rotation_text(old.id, statement.new)
    if not _holds(old, text, statement.signature) or key_id(_bytes(statement.new.public)) != statement.new.id:
        raise CheckFailed("the statement's signature is wrong", "have it sent again; if it stays so, do not trust it")
    with _alone():
        _save({**trusted(), old.id: old.model_copy(update={"revoked": _now()}), statement.new.id: statement.new})
    return statement.new


# ---- bundles


def signed(manifest: bytes, name: str = DEFAULT, before: Signatures | None = None) -> bytes:
    """The content of `signature.json` for a manifest, beside what others signed `before`. Raises `UnknownName`."""
    key, signature = signature_of(_ABOUT_BUNDLE + manifest, name)
    one = Signature(key=key, signature=_text(signature))
    others = [s for s in before.signatures if s.key != key] if before else []
    return Signatures(signatures=(*others, one)).to_json().encode()


def signature_of(text: bytes, name: str = DEFAULT) -> tuple[str, bytes]:
    """(id of a key of one's own, its signature of any text). The text begins with what it is about, so that none stands for another. Raises `UnknownName`."""
    return own_key(name).id, _load(name).sign(text)


def sign(path: str | Path, name: str = DEFAULT) -> PublicKey:
    """Sign a bundle in place with a key of one's own. Raises `InputError`, `UnknownName`, `EdgeError`; the bundle is whole in any case."""
    from edgesdk.bundles import copy_members, verify_bundle

    verify_bundle(path)
    content = signed(_manifest(path), name, signatures_of(path))
    copy_members(path, path, {NAME: content})
    return own_key(name)


def signatures_of(path: str | Path) -> Signatures | None:
    """Those that a bundle carries, right or wrong. Raises `InputError` where they cannot be read."""
    from edgesdk.bundles import member_names, read_member

    if NAME not in member_names(path):
        return None
    return Signatures.from_json(read_member(path, NAME), f"{path}: {NAME}")


def signer_of(path: str | Path) -> Signer:
    """The trusted key that signed a bundle. Raises `CheckFailed`: not signed, signed by nobody who is trusted here, changed since."""
    found, known = signatures_of(path), trusted()
    if found is None or not found.signatures:
        hint = "sign it where it was built (edgesdk sign), or if you know where it is from: edgesdk flash --allow-unsigned"
        raise CheckFailed(f"{path}: not signed", hint)
    text = _ABOUT_BUNDLE + _manifest(path)
    here = [(s, known[s.key]) for s in found.signatures if s.key in known]
    for signature, key in here:
        if not _holds(key, text, signature.signature):
            raise CheckFailed(
                f"{path}: changed since {key.name} ({key.id}) signed it", "do not install it; get it again from where it was built"
            )
        if key.revoked is None:
            return Signer(key.id, key.name)
    if here:
        key = here[0][1]
        raise CheckFailed(
            f"{path}: signed by {key.name} ({key.id}), which was revoked on {key.revoked}", "have it signed with a key that is trusted"
        )
    ids = ", ".join(s.key for s in found.signatures)
    raise CheckFailed(f"{path}: signed by {ids}, which is not trusted here", "if you know that key: edgesdk keys trust FILE")


def is_signed_by(manifest: bytes, signatures: bytes, keys: Iterable[PublicKey]) -> bool:
    """Whether one of `keys` signed a manifest, given the content of its `signature.json`."""
    try:
        found = Signatures.from_json(signatures, NAME).signatures
    except InputError:
        return False
    return any(s.key == k.id and _holds(k, _ABOUT_BUNDLE + manifest, s.signature) for s in found for k in keys)


# ---- parts


def _manifest(path: str | Path) -> bytes:
    from edgesdk.bundles import read_member

    return read_member(path, "manifest.json")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return b""


def _rotation_text(old: str, new: PublicKey) -> bytes:
    return json.dumps([old, new.public]).encode()


def _holds(key: PublicKey, text: bytes, signature: str) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(_bytes(key.public)).verify(_bytes(signature), text)
    except (InvalidSignature, ValueError):
        return False
    return True


def _public(key: Ed25519PrivateKey, name: str) -> PublicKey:
    raw = key.public_key().public_bytes_raw()
    return PublicKey(id=key_id(raw), name=name, public=_text(raw), since=_now())


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}", name):
        raise InputError(f"'{name}' cannot be a key's name", "use letters, digits, and . _ - @ inside")


def _private(name: str) -> Path:
    _check_name(name)
    return keys_dir() / f"{name}.pem"


def _load(name: str) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = _private(name)
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        raise UnknownName("key", name, own_keys()) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "give back its permissions: chmod 600") from None
    except (ValueError, TypeError):
        raise InputError(f"{path}: no private key, or one with a passphrase", "make one: edgesdk keys new NAME") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: not an Ed25519 key", "make one: edgesdk keys new NAME")
    return key


def _write_private(path: Path, key: Ed25519PrivateKey) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Nobody else changes the keys meanwhile."""
    try:
        keys_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (keys_dir() / ".lock").open("w")
    except OSError as error:
        raise EdgeError(f"{keys_dir()}: cannot be written ({error.strerror})", "give another folder: EDGESDK_KEYS") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _save(keys: Mapping[str, PublicKey]) -> None:
    _write(keys_dir() / "trusted.json", TrustedKeys(keys=tuple(keys.values())).to_json().encode())


def _write(path: Path, content: bytes) -> None:
    """The whole file or none, readable by its owner alone."""
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise EdgeError(f"{path}: cannot be written ({error.strerror})", "free some space, or give another folder: EDGESDK_KEYS") from None
