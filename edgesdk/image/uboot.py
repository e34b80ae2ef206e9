"""U-Boot's environment on a disk, as `fw_printenv` and `fw_setenv` read and write it, and a boot script for two slots.

Format (U-Boot, include/env_internal.h and tools/env/fw_env.c): CRC-32, little-endian, of the data behind the header; with two copies one more byte
of header, a counter: the copy whose counter is higher counts (0 comes behind 255). Data: `name=value`, each ended by a zero byte, then another.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from edgesdk.errors import CheckFailed, InputError

SLOTS = ("A", "B")


@dataclass(frozen=True)
class Place:
    """Where one copy is: a device or file on the board, offset and size in bytes."""

    device: str
    offset: int
    size: int


@dataclass(frozen=True)
class Env:
    """The variables, and what the next write needs to know."""

    variables: dict[str, str]
    newest: int = 0  # which copy they are from
    counter: int = 0


def places(text: str, where: str = "/etc/fw_env.config") -> list[Place]:
    """The copies that a fw_env.config names: `device offset size …` a line. Raises `InputError`."""
    found = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            place = Place(words[0], int(words[1], 0), int(words[2], 0))
        except (IndexError, ValueError):
            raise InputError(f"{where}: '{line.strip()}': not DEVICE OFFSET SIZE", "write it as U-Boot's tools/env/README says") from None
        if place.device.startswith("/dev/mtd") or place.device.startswith("/dev/ubi"):
            raise InputError(
                f"{where}: {place.device}: flash without a block layer", "edgesdk edits environments on disks and in files only"
            )
        if place.size < 64 or place.offset < 0 or place.offset % 512 or place.size % 512:
            raise InputError(f"{where}: '{line.strip()}': not whole sectors of 512 bytes", "place the environment on such a border")
        found.append(place)
    if not 1 <= len(found) <= 2:
        raise InputError(
            f"{where}: {len(found)} copies of the environment, wanted one or two", "write it as U-Boot's tools/env/README says"
        )
    return found


def decode(copies: list[bytes]) -> Env:
    """The variables of the newest whole copy. Raises `CheckFailed` if none is whole."""
    header = 4 if len(copies) == 1 else 5
    whole = [i for i, c in enumerate(copies) if len(c) > header and zlib.crc32(c[header:]) == struct.unpack_from("<I", c)[0]]
    if not whole:
        raise CheckFailed(
            "no copy of U-Boot's environment has the right checksum", "is fw_env.config right? else `fw_setenv` writes it anew"
        )
    if len(copies) == 1:
        return Env(_variables(copies[0][4:]))
    first, second = (c[4] for c in copies)
    later = 1 if (second > first and (first, second) != (0, 255)) or (first, second) == (255, 0) else 0
    newest = later if later in whole else whole[0]
    return Env(_variables(copies[newest][5:]), newest, copies[newest][4])


def _variables(data: bytes) -> dict[str, str]:
    lines = data.split(b"\0\0", 1)[0].split(b"\0")
    pairs = (line.decode("utf-8", "replace").partition("=") for line in lines if line and b"=" in line)
    return {name: value for name, _, value in pairs}


def encode(variables: Mapping[str, str], size: int, counter: int | None = None) -> bytes:
    """One copy; `counter` where there are two. Raises `InputError` if they do not fit."""
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name + value:
            raise InputError(f"U-Boot variable '{name}': not a name and a text", "use names without '='")
    data = b"".join(f"{n}={v}".encode() + b"\0" for n, v in variables.items()) + b"\0"
    room = size - (4 if counter is None else 5)
    if len(data) > room:
        raise InputError(f"U-Boot's environment has room for {room} bytes, {len(data)} needed", "delete variables with `fw_setenv NAME`")
    data = data.ljust(room, b"\0")
    return struct.pack("<I", zlib.crc32(data)) + (b"" if counter is None else bytes([counter])) + data


def update(env: Env, changes: Mapping[str, str], count: int, size: int) -> tuple[int, bytes]:
    """(which of `count` copies to write, its bytes): with two, the older one, so that a power cut leaves the other."""
    variables = {**env.variables, **changes}
    if count == 1:
        return 0, encode(variables, size)
    return 1 - env.newest, encode(variables, size, (env.counter + 1) % 256)


_NAMES = "boot_slot upgrade_available bootcount bootlimit slot_failed slot_A slot_B slot_disk slot_args"
_REGION = """
${{devtype}} dev ${{devnum}}
setenv ea ${{ramdisk_addr_r}}
setexpr eb ${{ea}} + {size:x}
setexpr s0 ${{eb}} + {size:x}
setexpr s1 ${{s0}} + 1
setexpr s2 ${{s0}} + 2
setexpr s3 ${{s0}} + 3
setexpr g0 ${{s0}} + 4
setexpr g1 ${{s0}} + 5
setexpr g2 ${{s0}} + 6
setexpr g3 ${{s0}} + 7
# the command crc32 writes the highest byte first, the environment holds the lowest first
setenv slot_sum 'setexpr d ${{c}} + 5; crc32 ${{d}} {room:x} ${{s0}}; cp.b ${{s0}} ${{g3}} 1; cp.b ${{s1}} ${{g2}} 1; cp.b ${{s2}} ${{g1}} 1; cp.b ${{s3}} ${{g0}} 1'
${{devtype}} read ${{ea}} {first:x} {blocks:x}
${{devtype}} read ${{eb}} {second:x} {blocks:x}
setenv c ${{ea}}; run slot_sum; if cmp.b ${{c}} ${{g0}} 4; then setenv oka 1; else setenv oka 0; fi
setenv c ${{eb}}; run slot_sum; if cmp.b ${{c}} ${{g0}} 4; then setenv okb 1; else setenv okb 0; fi
setexpr fa ${{ea}} + 4; setexpr.b fa *${{fa}}
setexpr fb ${{eb}} + 4; setexpr.b fb *${{fb}}
setenv new A
if itest ${{fb}} -gt ${{fa}}; then setenv new B; fi
if test ${{fa}} = ff && test ${{fb}} = 0; then setenv new B; fi
if test ${{fa}} = 0 && test ${{fb}} = ff; then setenv new A; fi
if test ${{oka}} = 0; then setenv new B; fi
if test ${{okb}} = 0; then setenv new A; fi
if test ${{new}} = A; then setenv c ${{ea}}; setenv n ${{fa}}; else setenv c ${{eb}}; setenv n ${{fb}}; fi
if test ${{oka}}${{okb}} = 00; then echo no environment for slots, using what the script has; else setexpr d ${{c}} + 5; env import -b ${{d}} {room:x} {names}; fi
setenv slot_other 'if test ${{new}} = A; then setenv new B; setenv c ${{eb}}; setenv blk {second:x}; else setenv new A; setenv c ${{ea}}; setenv blk {first:x}; fi'
setenv slot_fill 'mw.b ${{c}} 0 {size:x}; setexpr d ${{c}} + 5; env export -b -s {room:x} ${{d}} {names}; run slot_head'
setenv slot_head 'run slot_sum; cp.b ${{g0}} ${{c}} 4; setexpr d ${{c}} + 4; mw.b ${{d}} ${{n}} 1'
setenv slot_save 'setexpr n ${{n}} + 1; if test ${{n}} = 100; then setenv n 0; fi; run slot_other; run slot_fill; ${{devtype}} write ${{c}} ${{blk}} {blocks:x}'
"""
_LOGIC = """
setenv slot_swap 'if test ${{boot_slot}} = A; then setenv boot_slot B; else setenv boot_slot A; fi'
setenv slot_back 'setenv slot_failed ${{boot_slot}}; run slot_swap; setenv upgrade_available 0; setenv bootcount 0; run slot_save'
setenv slot_part 'if test ${{boot_slot}} = A; then setenv part ${{slot_A}}; else setenv part ${{slot_B}}; fi'
setenv slot_args2 'setenv bootargs ${{slot_args}} root=${{slot_disk}}${{part}} edgesdk.slot=${{boot_slot}}'
setenv slot_initrd 'load ${{devtype}} ${{devnum}}:${{part}} ${{ramdisk_addr_r}} {initrd}'
setenv slot_start 'if run slot_initrd; then setenv rd ${{ramdisk_addr_r}}:${{filesize}}; else setenv rd -; fi; booti ${{kernel_addr_r}} ${{rd}} ${{fdtcontroladdr}}'
setenv slot_boot 'run slot_part; run slot_args2; echo SLOT ${{boot_slot}} tries ${{bootcount}}; run slot_kernel'
setenv slot_kernel 'if load ${{devtype}} ${{devnum}}:${{part}} ${{kernel_addr_r}} {kernel}; then run slot_start; fi'
if test ${{upgrade_available}} = 1; then
  if itest ${{bootcount}} -ge ${{bootlimit}}; then
    echo SLOT ${{boot_slot}} was not confirmed
    run slot_back
  else
    setexpr bootcount ${{bootcount}} + 1
    run slot_save
  fi
fi
run slot_boot
echo SLOT ${{boot_slot}} does not start
run slot_back
run slot_boot
echo no slot starts
sleep 5
reset
"""


def boot_script(
    disk: str = "/dev/mmcblk0p",
    slots: tuple[int, int] = (2, 3),
    arguments: str = "panic=1",
    env: tuple[Place, Place] | None = None,
    kernel: str = "/boot/vmlinuz",
    initrd: str = "/boot/initrd.gz",
) -> str:
    """A boot script (arm64, `booti`) that boots slot A or B, gives a new one `bootlimit` tries, and goes back by itself.

    `disk`: what the system calls the disk up to the partition's number. `env`: two copies of an environment on the disk that U-Boot boots from, for
    a U-Boot whose own is elsewhere; None: U-Boot's own, written with `saveenv`.
    """
    start = {
        "boot_slot": "A",
        "upgrade_available": "0",
        "bootcount": "0",
        "bootlimit": "1",
        "slot_A": str(slots[0]),
        "slot_B": str(slots[1]),
    }
    start |= {"slot_disk": disk, "slot_args": arguments}
    lines = [f"test -n \"${{{name}}}\" || setenv {name} '{value}'" for name, value in start.items()]
    text = "# Two slots: written by edgesdk.\n" + "\n".join(lines)
    if env:
        size = env[0].size
        text += _REGION.format(
            size=size, room=size - 5, blocks=size // 512, first=env[0].offset // 512, second=env[1].offset // 512, names=_NAMES
        )
    else:
        text += "\nsetenv slot_save saveenv"
    return text + _LOGIC.format(kernel=kernel, initrd=initrd)


def script_image(text: str, time: int = 0) -> bytes:
    """The text as a `boot.scr`: U-Boot's legacy image header (include/image.h), type script; what `mkimage -T script` makes."""
    body = struct.pack(">II", len(text.encode()), 0) + text.encode()
    fields = (time, len(body), 0, 0, zlib.crc32(body), 5, 22, 6, 0, b"edgesdk slots")  # Linux, arm64, script, not compressed

    def header(crc: int) -> bytes:
        return struct.pack(">IIIIIIIBBBB32s", 0x27051956, crc, *fields)

    return header(zlib.crc32(header(0))) + body
