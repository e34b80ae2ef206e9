"""`flash … --to BOARD`: its answer on the screen."""

from __future__ import annotations

from edgesdk.cli.common import console, emit_json, progress, show_steps


def flash_board(to: str, bundle: str | None, firmware: str | None, *, allow_unsigned: bool, dry_run: bool, as_json: bool) -> None:
    """Write to a board through its bootloader and show what came of it."""
    from edgesdk.bootloaders.board import write_board
    from edgesdk.units import show_bytes

    with progress("flash") as step:
        answer = write_board(to, bundle, firmware=firmware, allow_unsigned=allow_unsigned, dry_run=dry_run, watch=step)
    if as_json:
        emit_json(answer)
        return
    out = console()
    words = {"written": "written and verified", "already-there": "already there", "dry-run": "would be written"}
    out.print(f"[bold]{to.partition('?')[0]}[/bold]: {answer.board}")
    where = "" if answer.address is None else f" at 0x{answer.address:08x}"
    line = f"  {words[answer.action]}: {answer.payload}, {show_bytes(answer.size_bytes)}{where}, sha256 {answer.sha256[:12]}…"
    out.print(line, markup=False)
    if answer.signer:
        out.print(f"  signed    by {answer.signer}", markup=False)
    if answer.verified:
        out.print(f"  verified  {answer.verified}", markup=False)
    for note in answer.notes:
        out.print(f"  note      {note}", markup=False)
    if answer.action == "dry-run":
        show_steps([f"  {number}. {text}" for number, text in enumerate(answer.steps, 1)])
