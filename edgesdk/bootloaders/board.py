"""`edgesdk flash … --to BOARD`: one door to every bootloader."""

from __future__ import annotations

from edgesdk.bootloaders.types import FORMS, BoardWrite, Watch, read_payload
from edgesdk.errors import UnknownName


def write_board(
    to: str,
    bundle: str | None = None,
    *,
    firmware: str | None = None,
    allow_unsigned: bool = False,
    dry_run: bool = False,
    watch: Watch | None = None,
) -> BoardWrite:
    """Write a bundle's program, or a firmware's file, through the bootloader that `to` names (see `types.FORMS`).

    Raises `InputError` (what was given), `CheckFailed` (signature, digest, the board did not take it), `DeviceError` and `LinkError`.
    """
    kind = to.partition(":")[0]
    payload = read_payload(bundle, firmware, allow_unsigned, micro=kind != "jetson")
    if kind == "uf2":
        from edgesdk.bootloaders.uf2 import write_uf2

        return write_uf2(to, payload, dry_run=dry_run, watch=watch)
    if kind == "esp32":
        from edgesdk.bootloaders.esp import write_esp32

        return write_esp32(to, payload, dry_run=dry_run, watch=watch)
    if kind == "smp":
        from edgesdk.bootloaders.smp import write_smp

        return write_smp(to, payload, dry_run=dry_run, watch=watch)
    if kind == "jetson":
        from edgesdk.bootloaders.jetson import write_jetson

        return write_jetson(to, payload, dry_run=dry_run, watch=watch)
    raise UnknownName("board", to, FORMS.values())
