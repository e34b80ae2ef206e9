"""CPU cores by the numbers that they give: names, and what they compute in a cycle.

Names: Arm's reference manuals (MIDR_EL1 of each core), as util-linux lists them in sys-utils/lscpu-arm.c. Rates are as in the shipped profiles, which
have their sources; of cores that no shipped profile has, as of the core they come from: a profile made of them says "not confirmed".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Core:
    """`fp32`: operations a cycle, two a multiply-add. `in_order`: reads memory at about 2 bytes a cycle, others at about 5."""

    name: str
    fp32: int
    in_order: bool = False

    def int8(self, dotprod: bool) -> int:
        """Operations a cycle in int8: four times as many with dot products of 128 bits, else twice."""
        return self.fp32 * (4 if dotprod else 2)

    @property
    def bytes_per_cycle(self) -> float:
        """What one core reads from memory a cycle, roughly (a Pi 4: 2.7, a Pi 5: 5.2, by the copies quoted in their profiles)."""
        return 2.0 if self.in_order else 4.0


_A53, _A72, _A76, _X = 8, 8, 16, 32
CORES: dict[tuple[int, int], Core] = {
    (0x41, part): Core(name, fp32, in_order)
    for part, name, fp32, in_order in (
        (0xC07, "cortex-a7", 4, True), (0xC08, "cortex-a8", 4, True), (0xC09, "cortex-a9", 4, False), (0xC0E, "cortex-a17", 8, False),
        (0xC0F, "cortex-a15", 8, False), (0xD01, "cortex-a32", _A53, True), (0xD02, "cortex-a34", _A53, True), (0xD03, "cortex-a53", _A53, True),
        (0xD04, "cortex-a35", _A53, True), (0xD05, "cortex-a55", _A53, True), (0xD06, "cortex-a65", _A53, False), (0xD07, "cortex-a57", _A72, False),
        (0xD08, "cortex-a72", _A72, False), (0xD09, "cortex-a73", _A72, False), (0xD0A, "cortex-a75", _A76, False), (0xD0B, "cortex-a76", _A76, False),
        (0xD0C, "neoverse-n1", _A76, False), (0xD0D, "cortex-a77", _A76, False), (0xD0E, "cortex-a76ae", _A76, False),
        (0xD40, "neoverse-v1", _X, False), (0xD41, "cortex-a78", _A76, False), (0xD42, "cortex-a78ae", _A76, False), (0xD44, "cortex-x1", _X, False),
        (0xD46, "cortex-a510", _A53, True), (0xD47, "cortex-a710", _A76, False), (0xD48, "cortex-x2", _X, False), (0xD49, "neoverse-n2", _A76, False),
        (0xD4B, "cortex-a78c", _A76, False), (0xD4C, "cortex-x1c", _X, False), (0xD4D, "cortex-a715", _A76, False), (0xD4E, "cortex-x3", _X, False),
        (0xD4F, "neoverse-v2", _X, False), (0xD80, "cortex-a520", _A53, True), (0xD81, "cortex-a720", _A76, False), (0xD82, "cortex-x4", _X, False),
        (0xD83, "neoverse-v3ae", _X, False), (0xD84, "neoverse-v3", _X, False), (0xD85, "cortex-x925", 48, False), (0xD87, "cortex-a725", _A76, False),
        (0xD88, "cortex-a520ae", _A53, True), (0xD89, "cortex-a720ae", _A76, False), (0xD8E, "neoverse-n3", _A76, False), (0xD8F, "cortex-a320", _A53, True),
    )
}  # fmt: skip
CORES |= {
    (0x51, 0x800): Core("kryo-2xx-gold", _A72), (0x51, 0x801): Core("kryo-2xx-silver", _A53, True), (0x51, 0x802): Core("kryo-3xx-gold", _A76),
    (0x51, 0x803): Core("kryo-3xx-silver", _A53, True), (0x51, 0x804): Core("kryo-4xx-gold", _A76), (0x51, 0x805): Core("kryo-4xx-silver", _A53, True),
    (0x51, 0x001): Core("oryon", _X), (0x51, 0x002): Core("oryon-3", _X), (0x4E, 0x003): Core("denver-2", _A72), (0x4E, 0x004): Core("carmel", _A76),
    (0x61, 0x022): Core("apple-icestorm-m1", 16), (0x61, 0x023): Core("apple-firestorm-m1", _X), (0x48, 0xD01): Core("taishan-v110", _A76),
    (0xC0, 0xAC3): Core("ampere-1", _A76), (0xC0, 0xAC4): Core("ampere-1a", _A76),
}  # fmt: skip
"""By implementer and part. The X925 has six 128-bit vector pipes."""


def core_of(implementer: int, part: int, isa: tuple[str, ...]) -> Core:
    """The core. One that the table does not have is named by its numbers and taken for a plain one of its instruction set."""
    plain = Core(f"arm-0x{implementer:02x}-0x{part:03x}", _A76 if "dotprod" in isa else _A53)
    return CORES.get((implementer, part), plain)
