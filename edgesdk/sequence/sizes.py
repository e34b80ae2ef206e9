"""What a sequence model's programs are made for: lengths read and written, in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from edgesdk.errors import InputError
from edgesdk.sequence.card import CACHE_BITS


@dataclass(frozen=True)
class Sizes:
    """Lengths that programs hold, rising; of several, a text takes the smallest program that holds it (a bucket). What is empty is the model's own.

    Raises `InputError` for lengths that are none, and for a draft that checks no guess.
    """

    inputs: tuple[int, ...] = ()  # of source or prompt; behind sound, positions of the encoder
    outputs: tuple[int, ...] = ()  # of one answer: what the caches hold
    draft: int | None = None  # tokens that a further `decode` takes at once, to check guesses (see `drafts`)
    cache_bits: int = 32  # of `card.CACHE_BITS`

    def __post_init__(self) -> None:
        for option, lengths in (("--input-length", self.inputs), ("--output-length", self.outputs)):
            if any(n < 1 for n in lengths) or list(lengths) != sorted(set(lengths)):
                raise InputError(f"{option} {_listed(lengths)}: lengths are 1 or more and rise", "write them like 64,128,256")
        if self.draft is not None and self.draft < 2:
            raise InputError(f"--draft {self.draft}: a guess is checked beside the token before it", "give 2 or more")
        if self.cache_bits not in CACHE_BITS:
            raise InputError(f"--cache-bits {self.cache_bits}", f"known: {', '.join(map(str, CACHE_BITS))}")

    def __str__(self) -> str:
        """A name for what was made with them: `in64,128-out32-draft4`, empty where nothing is given."""
        draft = f"draft{self.draft}" if self.draft else ""
        parts = [kind + _listed(lengths) for kind, lengths in (("in", self.inputs), ("out", self.outputs)) if lengths]
        caches = f"cache{self.cache_bits}" if self.cache_bits != 32 else ""
        return "-".join([*parts, *(p for p in (draft, caches) if p)])

    def refuse_inputs(self, why: str, hint: str) -> None:
        """For models whose inputs are as they are. Raises `InputError` where lengths of them are asked for."""
        if self.inputs:
            raise InputError(f"--input-length {_listed(self.inputs)}: {why}", hint)

    def refuse_draft(self, why: str, hint: str) -> None:
        """For models that check no guesses. Raises `InputError` where that is asked for."""
        if self.draft is not None:
            raise InputError(f"--draft {self.draft}: {why}", hint)

    def refuse_cache_bits(self, why: str, hint: str) -> None:
        """For models whose caches, if any, are as they are. Raises `InputError` where others are asked for."""
        if self.cache_bits != 32:
            raise InputError(f"--cache-bits {self.cache_bits}: {why}", hint)


def refuse_narrow(bits: int, runtime: str, device: str, native: bool) -> None:
    """Of caches of `card.NATIVE_BITS`. Raises `InputError` on another runtime than our own kernels, or on a device without it (`native`)."""
    if not runtime.startswith("native"):
        raise InputError(f"--cache-bits {bits}: {runtime} takes caches of 32 and 8 bits", "choose one of these, or --runtime native")
    if not native:
        raise InputError(f"--cache-bits {bits}: {device} has no runtime native, the only one that takes them", "choose 32 or 8")


def _listed(lengths: tuple[int, ...]) -> str:
    return ",".join(map(str, lengths))
