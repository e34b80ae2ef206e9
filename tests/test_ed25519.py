"""The device's own check of signatures: the vectors of RFC 8032, and the same answers as `cryptography` on right and spoiled ones."""

from __future__ import annotations

import random

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edgesdk.agent.ed25519 import L, P, holds

VECTORS = (  # RFC 8032, 7.1: public key, message, signature
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    (
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
)  # fmt: skip


@pytest.mark.parametrize("vector", range(len(VECTORS)))
def test_the_vectors_of_rfc_8032(vector):
    public, message, signature = (bytes.fromhex(text) for text in VECTORS[vector])
    assert holds(public, message, signature)
    assert not holds(public, message + b"x", signature)
    for place in range(0, 512, 37):
        spoiled = bytearray(signature)
        spoiled[place // 8] ^= 1 << place % 8
        assert not holds(public, message, bytes(spoiled))


def other(public: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def test_the_same_answers_as_cryptography():
    dice, answers = random.Random(8032), []
    for number in range(40):
        key = Ed25519PrivateKey.from_private_bytes(dice.randbytes(32))
        public, message = key.public_key().public_bytes_raw(), dice.randbytes(number)
        signature = key.sign(message)
        assert holds(public, message, signature)
        parts = [bytearray(public), bytearray(message), bytearray(signature)]
        part = parts[dice.choice((0, 2))]
        part[dice.randrange(len(part))] ^= 1 << dice.randrange(8)
        spoiled = tuple(bytes(p) for p in parts)
        assert holds(*spoiled) == other(*spoiled)
        answers.append(holds(*spoiled))
    assert not any(answers)


def test_what_can_be_written_in_two_ways_is_refused():
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public, signature = key.public_key().public_bytes_raw(), key.sign(b"m")
    later = int.from_bytes(signature[32:], "little") + L  # the same number modulo the order
    assert not holds(public, b"m", signature[:32] + later.to_bytes(32, "little"))
    for bad in (b"", public[:-1], public + b"\0", (P + 1).to_bytes(32, "little"), ((1 << 255) | 1).to_bytes(32, "little"), b"\xff" * 32):
        assert not holds(bad, b"m", signature)
    for bad in (b"", signature[:-1], signature + b"\0", bytes(64)):
        assert not holds(public, b"m", bad)
