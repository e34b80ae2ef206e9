"""MCUboot boards over SMP: upload into the second slot, one trial start, confirmed only if it stays healthy.

    smp:/dev/ttyACM0[?baud=115200&image=0&health=5s&boot=60s&confirm=yes]

The protocol: https://docs.zephyrproject.org/latest/services/device_mgmt/smp_protocol.html; the trial: https://docs.mcuboot.com/design.html, "Image swapping".
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgesdk.bootloaders.mcuboot import Image, read_image
from edgesdk.bootloaders.types import BoardWrite, Payload, Watch, open_port, parse_where
from edgesdk.errors import CheckFailed, InputError, LinkError, MissingTool
from edgesdk.units import parse_seconds, show_bytes

if TYPE_CHECKING:
    from edgesdk.bootloaders.smp_link import Board

OPTIONS = ("baud", "image", "health", "boot", "confirm")
PAUSE_S = 0.5
"""Between two questions to a board that starts or is on trial."""


@dataclass(frozen=True)
class Trial:
    """What is to be written and how it is judged."""

    image: Image
    content: bytes
    number: int
    health_s: float
    boot_s: float
    confirm: bool


def write_smp(to: str, payload: Payload, *, dry_run: bool = False, watch: Watch | None = None) -> BoardWrite:
    """Upload, try, confirm. Raises `InputError`, `DeviceError`, `LinkError` (the same call resumes) or `CheckFailed` (rolled back by MCUboot)."""
    where = parse_where(to, OPTIONS)
    if payload.firmware is None:
        hint = "link the program into the firmware, sign that with imgtool, then: --firmware zephyr.signed.bin"
        raise InputError(f"{to}: MCUboot takes whole firmware images, {payload.name} is a program alone", hint)
    image = read_image(payload.content, payload.name)
    times = {name: parse_seconds(where.options.get(name, default)) for name, default in (("health", "5s"), ("boot", "60s"))}
    trial = Trial(
        image, payload.content[: image.end], where.number("image", 0, 0, 15), times["health"], times["boot"], where.yes("confirm", True)
    )
    baud = where.number("baud", 115200, 1200, 8_000_000)
    note = () if image.signed else ("the image is not signed: most builds of MCUboot will not start it",)
    answer = BoardWrite(
        action="dry-run", to=to, board=f"an MCUboot board behind {where.path}", payload=f"{payload.name}, {image}", size_bytes=len(trial.content),
        sha256=payload.sha256, steps=_steps(where.path, baud, trial), notes=note,
    )  # fmt: skip
    if dry_run:
        return answer
    try:
        from edgesdk.bootloaders.smp_link import Board
    except ImportError:
        raise MissingTool("smpclient is not installed", "pip install -c constraints.txt 'edgesdk[boards]'") from None
    open_port(where.path, baud).close()

    async def run() -> dict[str, Any]:
        async with Board(where.path, baud) as board:
            return await _write(board, trial, watch or (lambda text, share: None))

    done = asyncio.run(run())
    return answer.model_copy(update={**done, "notes": (*note, *done["notes"])})


def _steps(port: str, baud: int, trial: Trial) -> tuple[str, ...]:
    last = (
        f"confirm it, if it answers for {trial.health_s:g} s; else the next start goes back to the old one"
        if trial.confirm
        else "leave it on trial (confirm=no): the next start goes back to the old one unless it confirms itself"
    )
    return (
        f"ask     {port} at {baud} baud what is in its slots; nothing is sent that is there",
        f"upload  {show_bytes(len(trial.content))} into the second slot of image {trial.number}, from where an earlier upload stopped",
        "verify  the sha256 that the board reads from that slot",
        "try     mark it for one start, restart the board",
        last,
    )


async def _write(board: Board, trial: Trial, say: Watch) -> dict[str, Any]:
    say("asking the board for its images", 0.0)
    images = await board.images()
    before = _active(images, trial.number)
    told = f"MCUboot board, image {trial.number} version {before.version if before else 'unknown'} before"
    running = before is not None and before.hash == trial.image.digest
    if running and before.confirmed:
        return {"action": "already-there", "board": told, "verified": "the board runs it and has confirmed it", "notes": ()}
    if not running:
        if not _holds(images, trial):
            async for there in board.upload(trial.content, trial.number):
                say(f"sending {show_bytes(len(trial.content))}", there / len(trial.content))
            images = await board.images()
            if not _holds(images, trial):
                said = ", ".join(i.hash.hex()[:12] if i.hash else "none" for i in images)
                raise CheckFailed(f"{board.port}: the board holds no image with sha256 {trial.image.digest.hex()[:12]}… (it has {said})",
                                  "run the same command again: it sends the image anew")  # fmt: skip
        if not any(i.hash == trial.image.digest and i.pending for i in images):
            await board.mark(trial.image.digest, confirm=False)
        await _start(board, trial, before.version if before else "unknown", say)
    await _healthy(board, trial, before.version if before and not running else "the old image", say)
    if not trial.confirm:
        note = "on trial: the next start goes back to the old image unless this one confirms itself"
        return {"action": "written", "board": told, "verified": "the board runs it and names its sha256", "notes": (note,)}
    say("confirming", 1.0)
    images = await board.mark(trial.image.digest, confirm=True)
    now = _active(images, trial.number)
    if now is None or now.hash != trial.image.digest or not now.confirmed:
        raise CheckFailed(f"{board.port}: the board did not keep the confirmation", "run the same command again")
    verified = f"the board runs it, names its sha256, answered for {trial.health_s:g} s and has confirmed it"
    return {"action": "written", "board": told, "verified": verified, "notes": ()}


def _active(images: list[Any], number: int) -> Any:
    """The running image of a number, or None where the board does not say."""
    mine = [i for i in images if (i.image or 0) == number]
    return next((i for i in mine if i.active), next((i for i in mine if i.slot == 0), None))


def _holds(images: list[Any], trial: Trial) -> bool:
    return any((i.image or 0) == trial.number and i.hash == trial.image.digest for i in images)


async def _start(board: Board, trial: Trial, old: str, say: Watch) -> None:
    """Restart until the image was tried. Raises `CheckFailed` if MCUboot did not take it, or if the board is silent afterwards."""
    end = time.monotonic() + trial.boot_s
    say("restarting the board", 0.0)
    await board.reset()
    asked = 0
    while True:
        await asyncio.sleep(PAUSE_S)
        try:
            images = await board.images(within_s=max(end - time.monotonic(), PAUSE_S))
        except LinkError:
            what = f"{board.port}: the board is silent {trial.boot_s:g} s after its restart: the image on trial does not answer"
            raise CheckFailed(what, f"reset or replug it: MCUboot goes back to version {old}; ?boot=120s waits longer") from None
        now = _active(images, trial.number)
        if now is not None and now.hash == trial.image.digest:
            return
        if not any(i.pending and i.hash == trial.image.digest for i in images):
            version = now.version if now else old
            why = "it fell in its trial" if trial.image.signed else "it is not signed, or it fell in its trial"
            raise CheckFailed(f"{board.port}: rolled back by MCUboot: version {version} runs, not {trial.image.version}",
                              f"{why}, or was not signed with the key that this board's MCUboot was built with: see its console")  # fmt: skip
        asked += 1
        if asked % 6 == 0:  # the request for the restart was lost
            await board.reset()
        if time.monotonic() > end:
            raise CheckFailed(
                f"{board.port}: the board did not restart in {trial.boot_s:g} s", "reset it by hand, then run the same command"
            )


async def _healthy(board: Board, trial: Trial, old: str, say: Watch) -> None:
    """It answers as itself for `health_s`. Raises `CheckFailed`."""
    end = time.monotonic() + trial.health_s
    while (left := end - time.monotonic()) > 0:
        say("the image is on trial", 1 - left / trial.health_s)
        await asyncio.sleep(min(PAUSE_S, left))
        try:
            now = _active(await board.images(within_s=trial.boot_s), trial.number)
        except LinkError:
            what = f"{board.port}: the image on trial stopped answering and was not confirmed"
            raise CheckFailed(what, f"reset or replug the board: MCUboot goes back to version {old}") from None
        if now is None or now.hash != trial.image.digest:
            version = now.version if now else old
            raise CheckFailed(f"{board.port}: rolled back by MCUboot: the image on trial fell before it was confirmed, version {version} runs again",
                              "look at its log; ?health= says how long it must answer")  # fmt: skip
