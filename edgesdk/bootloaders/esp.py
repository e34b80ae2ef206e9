"""ESP32 boards through esptool as a library: into a data partition (a model) or the chip's flash (a firmware), verified by MD5.

    esp32:/dev/ttyUSB0[?baud=460800&chip=auto&offset=0x110000&partition=model&table=0x8000&stub=yes&before=default-reset&after=hard-reset]

The serial protocol behind it: https://docs.espressif.com/projects/esptool, "Serial Protocol".
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgesdk.bootloaders.partitions import TABLE_AT, TABLE_BYTES, Partition, parse_table, place_app, place_model
from edgesdk.bootloaders.types import BoardWrite, Payload, Watch, Where, note_on_board, open_port, parse_where
from edgesdk.errors import CheckFailed, DeviceError, EdgeError, InputError, LinkError, MissingTool, UnknownName
from edgesdk.units import show_bytes

OPTIONS = ("baud", "chip", "offset", "partition", "table", "stub", "before", "after")
RESETS = {"before": ("default-reset", "usb-reset", "no-reset"), "after": ("hard-reset", "watchdog-reset", "no-reset")}
ROM_BAUD = 115200
ATTEMPTS = 7
"""How often the chip is reset and called."""
ANSWER_S = 3.0
IMAGE = 0xE9
"""First byte of a program for the chip."""


def write_esp32(to: str, payload: Payload, *, dry_run: bool = False, watch: Watch | None = None) -> BoardWrite:
    """Write a model into its partition, or a firmware, and verify it. Raises `InputError`, `DeviceError`, `LinkError` or `CheckFailed`."""
    where = parse_where(to, OPTIONS)
    baud, chip = where.number("baud", 460800, 9600, 8_000_000), _chip(where)
    for name, known in RESETS.items():
        if where.options.get(name, known[0]) not in known:
            raise UnknownName(f"{name}=", where.options[name], known)
    for name in ("offset", "table"):
        where.number(name, TABLE_AT, 0)
    steps = _steps(where, payload, baud, chip)
    answer = BoardWrite(
        action="dry-run", to=to, board=f"{chip if chip != 'auto' else 'ESP32, which one is asked'} behind {where.path}", payload=payload.name,
        size_bytes=len(payload.content), sha256=payload.sha256, address=where.number("offset", 0, 0) if "offset" in where.options else None,
        signer=payload.signed_by, steps=steps,
        notes=() if Path(where.path).exists() or not where.path.startswith("/") else (f"there is no {where.path} now",),
    )  # fmt: skip
    if dry_run:
        return answer
    with _session(where, watch):
        done = _write(where, payload, baud, chip, watch)
    return answer.model_copy(update={"notes": (), **done})


def _chip(where: Where) -> str:
    """The chip as esptool calls it, or `auto`. Raises `MissingTool` or `UnknownName`."""
    try:
        from esptool.targets import CHIP_DEFS
    except ImportError:
        raise MissingTool("esptool is not installed", "pip install -c constraints.txt 'edgesdk[boards]'") from None
    given = where.options.get("chip", "auto").lower().replace("-", "")
    known = ["auto", *(c for c in CHIP_DEFS if c.startswith("esp32"))]
    if given not in known:
        raise UnknownName("chip", given, known)
    return given


def _steps(where: Where, payload: Payload, baud: int, chip: str) -> tuple[str, ...]:
    table = where.number("table", TABLE_AT)
    size = show_bytes(len(payload.content))
    if "offset" in where.options:
        place = f"at 0x{where.number('offset', 0, 0):x}, unless that lies over a partition that is not its own"
    elif payload.firmware is None:
        place = f"into partition {where.options.get('partition', 'model (or edgesdk)')} of the table at 0x{table:x}, if it fits"
    elif _is_merged(payload.content, table):
        place = "at 0x0: it holds bootloader, partition table and program"
    else:
        place = (
            f"into the app partition {where.options.get('partition', 'factory, or the only one,')} of the table at 0x{table:x}, if it fits"
        )
    return (
        f"open   {where.path}, reset the chip into its loader ({where.options.get('before', 'default-reset')}), "
        + ("ask which chip it is" if chip == "auto" else f"see that it is an {chip}"),
        f"start  esptool's flasher there, at {baud} baud" if where.yes("stub", True) else f"use    the chip's own loader, at {baud} baud",
        f"write  {payload.name} ({size}) {place}; nothing if the same is there",
        "verify the MD5 of what lies in flash",
        f"leave  the loader ({where.options.get('after', 'hard-reset')})",
    )


def _write(where: Where, payload: Payload, baud: int, chip: str, watch: Watch | None) -> dict[str, Any]:
    from esptool import cmds

    say = watch or (lambda text, share: None)
    say("calling the chip", 0.0)
    before, content = where.options.get("before", "default-reset"), payload.content
    port = open_port(where.path)
    try:
        esp = cmds.connect_esp(port, chip, ROM_BAUD, before=before, connect_attempts=ATTEMPTS)
        port.timeout = ANSWER_S  # else esptool waits forever for a flasher that does not start
        if not esp.CHIP_NAME.startswith("ESP32"):
            raise InputError(f"{where.path}: the chip is an {esp.CHIP_NAME}", "boards of the ESP32 family have partitions for a model")
        if esp.secure_download_mode:
            raise DeviceError(f"{where.path}: {esp.CHIP_NAME} is in secure download mode: it tells neither its partitions nor what it holds",
                              "update it over the air, as its firmware does")  # fmt: skip
        board = f"{esp.get_chip_description()}, {':'.join(f'{b:02x}' for b in esp.read_mac('BASE_MAC'))}"
        if where.yes("stub", True):
            esp = cmds.run_stub(esp)
        if baud != ROM_BAUD:
            esp.change_baud(baud)
        cmds.attach_flash(esp)
        flash_bytes = cmds.flash_size_bytes(cmds.detect_flash_size(esp))
        board += f", flash {show_bytes(flash_bytes)}" if flash_bytes else ", flash of unknown size"
        address, part = _place(esp, where, payload, flash_bytes)
        notes = _protected(esp, part, payload)
        end = address + len(content)
        if flash_bytes and end > flash_bytes:
            raise InputError(
                f"{payload.name}: ends at 0x{end:x}, the board's flash at 0x{flash_bytes:x}", "build a smaller plan (--storage)"
            )
        padded = content + b"\xff" * (-len(content) % 4)
        same = esp.flash_md5sum(address, len(padded)) == hashlib.md5(padded, usedforsecurity=False).hexdigest()
        if not same:
            say(f"writing {show_bytes(len(content))}", 0.0)
            cmds.write_flash(esp, [(address, content)])
        say("verifying", 1.0)
        cmds.verify_flash(esp, [(address, content)])
        cmds.reset_chip(esp, where.options.get("after", "hard-reset"))
    finally:
        with contextlib.suppress(Exception):
            port.close()
    verified = f"the chip's own MD5 of {show_bytes(len(padded))} from 0x{address:x} on is that of the file"
    if part is not None:
        notes = (f"in partition {part}", *notes)
    action = "already-there" if same else "written"
    return {"action": action, "board": board, "address": address, "verified": verified, "notes": notes}


def _place(esp: Any, where: Where, payload: Payload, flash_bytes: int | None) -> tuple[int, Partition | None]:
    """Where it goes, and into which partition. Raises `InputError` and what reading the table raises."""
    from esptool import cmds

    at, content = where.number("table", TABLE_AT), payload.content
    firmware, offset = payload.firmware is not None, where.number("offset", 0, 0) if "offset" in where.options else None
    if firmware:
        _is_for(esp, payload, at if _is_merged(content, at) else None)
        if offset is None and _is_merged(content, at):
            return 0, None
        if offset is None and content[0] != IMAGE:
            raise InputError(
                f"{payload.name}: not a program for an ESP32 (its first byte is 0x{content[0]:02x})", "give the .bin file, or ?offset=0x…"
            )
        if offset is not None:
            if offset % 0x1000:
                raise InputError(f"offset=0x{offset:x} is not at the start of a sector", "flash is erased in steps of 0x1000")
            return offset, None
    if flash_bytes and at + TABLE_BYTES > flash_bytes:
        raise InputError(f"{where.text}: table=0x{at:x} is behind the board's flash", "leave ?table= out: it is at 0x8000")
    table = parse_table(cmds.read_flash(esp, at, TABLE_BYTES, no_progress=True) or b"", f"{where.path}, flash at 0x{at:x}")
    if firmware:
        part = place_app(table, len(content), where.options.get("partition"), payload.name)
        return part.offset, part
    return place_model(table, len(content), where.options.get("partition"), offset, payload.name)


def _is_merged(content: bytes, table: int) -> bool:
    """Whether a file is a whole flash: with a partition table where that belongs."""
    return content[table : table + 2] == b"\xaa\x50"


def _is_for(esp: Any, payload: Payload, table: int | None) -> None:
    """Raises `InputError` if a program was made for another chip: its header says which."""
    at = esp.BOOTLOADER_FLASH_OFFSET if table is not None else 0
    head = payload.content[at : at + 24]
    if len(head) < 24 or head[0] != IMAGE:
        return
    chip_id = struct.unpack_from("<H", head, 12)[0]
    if chip_id != esp.IMAGE_CHIP_ID:
        from esptool.targets import ROM_LIST

        other = next((c.CHIP_NAME for c in ROM_LIST if chip_id == c.IMAGE_CHIP_ID), f"chip {chip_id}")
        raise InputError(
            f"{payload.name}: made for {other}, the board is an {esp.CHIP_NAME}", "build the firmware for this chip (idf.py set-target)"
        )


def _protected(esp: Any, part: Partition | None, payload: Payload) -> tuple[str, ...]:
    """Raises `DeviceError` if the chip would take what is written for encrypted; else notes on what it was built for."""
    if esp.get_flash_encryption_enabled() and (part is None or part.encrypted or part.kind == "app"):
        what = f"the board's flash is encrypted: {payload.name} would be written in plain and read as noise"
        raise DeviceError(what, "give the model a partition without the flag `encrypted`; flash firmware as the board's maker does")
    return note_on_board(payload, esp.CHIP_NAME.lower())


@contextlib.contextmanager
def _session(where: Where, watch: Watch | None) -> Iterator[None]:
    """esptool's messages kept off the screen, its progress passed on, its errors in our words."""
    import serial
    from esp_pylib.logger import EspLog, EspLogBase
    from esptool.reset import ResetStrategy
    from esptool.util import FatalError

    class Quiet(EspLogBase):
        def print(self, *args: Any, **kwargs: Any) -> None: ...
        def err(self, *args: Any, suggestion: str | None = None) -> None: ...
        def warn(self, *args: Any, suggestion: str | None = None) -> None: ...
        def note(self, *args: Any) -> None: ...
        def hint(self, *args: Any) -> None: ...
        def debug(self, *args: Any) -> None: ...
        def set_verbosity(self, mode: int | str) -> None: ...
        def progress_bar(self, cur_iter: int, total_iters: int, prefix: str = "", suffix: str = "", bar_length: int = 30) -> None:
            if watch:
                watch("writing", cur_iter / max(total_iters, 1))

    before, EspLog.instance = EspLog.instance, Quiet()
    ResetStrategy.print_once = EspLog.instance.warn  # it keeps the one of its import
    try:
        yield
    except EdgeError:
        raise
    except FatalError as error:
        raise _in_our_words(where, str(error)) from None
    except (serial.SerialException, OSError) as error:
        raise _lost(where, str(error)) from None
    finally:
        EspLog.instance = before


def _lost(where: Where, text: str) -> LinkError:
    hint = "plug the board in again and run the same command: what is half written is written anew"
    return LinkError(
        f"{where.path}: the port went away while the board was written to ({text.splitlines()[0] if text else 'no reason'})", hint
    )


def _in_our_words(where: Where, text: str) -> EdgeError:
    """esptool's error as ours: what and what to do."""
    line = " ".join(text.split())
    if found := re.search(r"This chip is (\S+), not (\S+)\.", line):
        return InputError(f"{where.path}: the chip is an {found[1]}, not an {found[2]}", "leave ?chip= out, or give the right one")
    if "Wrong boot mode" in line:
        return DeviceError(
            f"{where.path}: the chip runs its program, not its loader",
            "hold BOOT, press RESET, then run the command again with ?before=no-reset",
        )
    if line.startswith("Failed to connect"):
        hint = "hold BOOT while you run it again; a cable for charging alone carries no data; `edgesdk devices ports` lists the ports"
        return DeviceError(f"{where.path}: no answer from an ESP32's loader", hint)
    if "Failed to start stub" in line:
        return DeviceError(f"{where.path}: esptool's flasher does not start on the chip", "use the chip's own loader: ?stub=no")
    if "MD5 of file" in line or "Verification failed" in line or "region is empty" in line:
        return CheckFailed(
            f"{where.path}: what lies in flash is not what was sent",
            "run it again with a lower ?baud=115200; if it stays, the flash is worn out",
        )
    if "will not fit" in line:
        return InputError(f"{where.path}: {line.split('. Change')[0]}", "build a smaller plan (--storage)")
    if re.search(
        r"stopped|Invalid head|Invalid SLIP|No serial data|doesn't match|byte status response|Corrupt data|Digest mismatch|Failed to", line
    ):
        return LinkError(
            f"{where.path}: the line is disturbed ({line[:120]})", "run the same command again, with a lower ?baud=115200 or a better cable"
        )
    return DeviceError(f"{where.path}: esptool: {line[:200]}", "the troubleshooting page of esptool's documentation explains it")
