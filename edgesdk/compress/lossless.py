"""Weights without loss: every byte as it was, in fewer bytes for storage and transfer, expanded in chunks on load.

Exponents of trained weights repeat and mantissas do not. DFloat11 ("70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via
Dynamic-Length Float", arXiv:2504.11651) codes the exponents of bfloat16, ZipNN ("Lossless Compression for AI Models", arXiv:2411.05239) every byte plane
apart. Both are `packed.entropy.pack_bytes`: numbers are turned left by one bit, so that the exponent fills one plane, and each plane is coded by rANS, within a
few thousandths of its entropy (their Huffman codes take whole bits), or kept as it is. A weight is stored in the narrowest of bfloat16, float16 and
float32 that holds all its values: what was trained or shipped in 16 bits and loaded as float32 has 16 bits again.

`unpack_chunks` and `expand_to` (packed/program.py) expand from a stream into a file with the memory of a few chunks of 4 MiB and of one weight; a packed
program carries a sha256 over all its bytes. Nothing here runs on coded weights: in memory they have their full size.

Measured (x86, one core, the three built-in normalizers, 3.6 MB in 16 bits; bytes left and decoding speed of the 16-bit numbers):
bfloat16 66.5% at 70 MB/s (zlib -9: 79.2% at 220, zstd -19: 76.9% at 800), float16 84.9% at 135 MB/s (92.1% at 260, 91.8% at 1300);
float32 of the built-in CNN 83.3% at 40 MB/s (92.8% at 280, 92.8% at 1400). It is smaller than both and, being numpy, slower to decode than both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from edgesdk.compress.types import Config, Family, Need, Stats, Weight
from edgesdk.packed import Code, pack


class LosslessConfig(Config):
    """There is nothing to set."""


class Lossless:
    level: ClassVar[Literal["weight"]] = "weight"
    name: ClassVar[str] = "lossless"
    family: ClassVar[Family] = "lossless"
    source: ClassVar[str] = "DFloat11 (arXiv:2504.11651), ZipNN (arXiv:2411.05239); ours: rANS, widths by value"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[LosslessConfig]] = LosslessConfig

    def why_not(self, weight: Weight, config: LosslessConfig) -> str | None:
        return None

    def options(self, weight: Weight) -> Sequence[LosslessConfig]:
        return [LosslessConfig()]

    def apply(self, weight: Weight, stats: Stats | None, config: LosslessConfig) -> Code:
        """An earlier stage's code stays: it decodes to just these values, in fewer bytes."""
        if weight.coded is not None:
            return weight.coded
        values = np.ascontiguousarray(weight.matrix.numpy(), np.float32)
        return exact(values)


def exact(values: np.ndarray) -> Code:
    """The dense code of float32 [rows, cols] whose bytes come back as they were, in the fewest bytes."""
    raw, shape = values.view(np.uint32), (int(values.shape[0]), int(values.shape[1]))
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    forms = [half] if np.array_equal(half.astype(np.float32).view(np.uint32), raw) else []
    if not (raw & 0xFFFF).any():
        forms.append((raw >> 16).astype(np.uint16))
    codes = [Code("dense", shape, (), (form,)) for form in forms or [values]]
    return min(codes, key=lambda c: len(pack(c))) if len(codes) > 1 else codes[0]


METHOD = Lossless()
