"""Files and tables of bootloaders with spoiled bytes: read, or refused in two lines; never anything else."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from edgesdk.bootloaders import uf2
from edgesdk.bootloaders.mcuboot import read_image
from edgesdk.bootloaders.partitions import parse_table
from edgesdk.errors import EdgeError
from tests.lab.esp_rom import partition_table
from tests.lab.smp_board import signed_image

TABLE = partition_table(("nvs", 1, 2, 0x9000, 0x6000), ("factory", 0, 0, 0x10000, 0x100000), ("model", 1, 0x40, 0x110000, 0x20000))
READERS: dict[str, tuple[bytes, Callable[[bytes, str], object]]] = {
    "uf2": (uf2.make(bytes(range(256)) * 4, 0x10000000, 0xE48BFF56), uf2.read),
    "mcuboot": (signed_image(bytes(range(200)), protected=bytes([0x50, 0, 4, 0, 7, 0, 0, 0])), read_image),
    "partitions": (TABLE[:160], parse_table),
}


def spoiled(content: bytes, rng: random.Random) -> bytes:
    """Some bytes replaced, cut off, doubled or taken out."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(4)
        if kind == 0 and data:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(64)]
        else:
            del data[at : at + rng.randrange(64)]
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_spoiled_bytes_are_read_or_refused(name):
    content, reader = READERS[name]
    rng, refused = random.Random(name), 0
    reader(content, name)
    for _ in range(1500):
        try:
            reader(spoiled(content, rng), name)
        except EdgeError as error:
            refused += 1
            assert error.what and error.hint and "\n" not in error.what + error.hint
    assert refused > 500
