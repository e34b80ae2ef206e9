"""A board's SMP server over a serial port, through smpclient: requests that survive lost frames and pulled plugs."""

from __future__ import annotations

import asyncio
import logging
import re
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, TypeVar

from pydantic import ValidationError
from smp.error import MGMT_ERR
from smp.exceptions import SMPException
from smpclient import SMPClient
from smpclient.exceptions import SMPBadSequence, SMPUploadError, SMPValidationException
from smpclient.generics import error
from smpclient.requests.image_management import ImageStatesRead, ImageStatesWrite
from smpclient.requests.os_management import ResetWrite
from smpclient.transport import SMPTransportDisconnected
from smpclient.transport.serial import SMPSerialTransport

from edgesdk.errors import DeviceError, LinkError

T = TypeVar("T")
DISTURBED = (
    TimeoutError,
    SMPBadSequence,
    SMPValidationException,
    SMPException,
    SMPTransportDisconnected,
    OSError,
    ValueError,
    ValidationError,
    struct.error,
)
"""What a lost or spoiled frame, or a port that went away, comes out as (ValueError: base64)."""
ANSWER_S = 2.5
ERASE_S = 40.0
"""The first piece of an upload may have the board erase a whole slot."""
AWAY_S = 60.0
"""How long a port that went away is waited for."""
TRIES = 6
"""How often in a row a request may fail."""
_REFUSALS = {
    "NO_FREE_SLOT": "another image is on trial or confirmed there: reset the board, then run the command again",
    "IMAGE_ALREADY_PENDING": "another image waits for its trial: reset the board, then run the command again",
    "INVALID_IMAGE_TOO_LARGE": "the slot is smaller than the image: build a smaller one",
    "CURRENT_VERSION_IS_NEWER": "the board takes no older version: sign it with a higher --version",
    "INVALID_IMAGE_HEADER_MAGIC": "give the file that imgtool signed",
    "FLASH_WRITE_FAILED": "its flash is worn out or protected",
    "IMAGE_CONFIRMATION_DENIED": "the board's own check denies it: see its log",
    "EBUSY": "wait until the board is done with something else, then run the command again",
    "EACCESSDENIED": "its firmware forbids updates over this port",
    "ENOTSUP": "its firmware has no image management (CONFIG_MCUMGR_GRP_IMG)",
}


def refusal(response: Any, doing: str, port: str) -> DeviceError:
    """A server's error as ours."""
    code = getattr(getattr(response, "err", response), "rc", None)
    name = getattr(code, "name", None) or str(response)[:120]
    return DeviceError(
        f"{port}: the board refuses {doing}: {name}",
        _REFUSALS.get(name, "see the board's log; docs/microcontrollers.md has what it must support"),
    )


class Board:
    """`async with Board(port, baud) as board`. Raises `LinkError` where the line stays dead."""

    def __init__(self, port: str, baud: int) -> None:
        self.port, self.baud = port, baud
        self.client: SMPClient | None = None
        logging.getLogger("smpclient").addHandler(logging.NullHandler())  # its own errors are told in our words

    async def __aenter__(self) -> Board:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drop()

    async def drop(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            await client.disconnect()

    async def _there(self, wait_s: float) -> SMPClient:
        if self.client is None:
            client = SMPClient(SMPSerialTransport(baudrate=self.baud, exclusive=True), self.port, ANSWER_S)
            await client.connect(wait_s)
            self.client = client
        return self.client

    async def _try(self, what: Callable[[SMPClient], Awaitable[T]], wait_s: float, until: float | None = None) -> T:
        """Once more after each disturbance, on a fresh line, `TRIES` times or until a moment. Raises `LinkError`."""
        tries = 0
        while True:
            try:
                return await what(await self._there(wait_s))
            except DISTURBED as problem:
                tries += 1
                await self.drop()
                if (tries >= TRIES) if until is None else (time.monotonic() > until):
                    hint = "check cable, ?baud= and that its firmware listens for SMP on this port; the same command resumes"
                    raise LinkError(f"{self.port}: no answer from an SMP server ({type(problem).__name__})", hint) from None
                await asyncio.sleep(0.05)

    async def images(self, within_s: float | None = None) -> list[Any]:
        """What is in the board's slots. `within_s`: keep asking so long, as while it starts."""
        until = None if within_s is None else time.monotonic() + within_s
        response = await self._try(lambda c: c.request(ImageStatesRead()), AWAY_S if until is None else within_s or 1.0, until)
        if error(response):
            raise refusal(response, "to tell its images", self.port)
        return list(response.images)

    async def mark(self, digest: bytes, confirm: bool) -> list[Any]:
        """Set an image for its trial, or confirm it; the slots afterwards."""
        response = await self._try(lambda c: c.request(ImageStatesWrite(hash=digest, confirm=confirm)), AWAY_S)
        if error(response):
            raise refusal(response, "to confirm the image" if confirm else "a trial of the image", self.port)
        return list(response.images)

    async def reset(self) -> None:
        """Ask for a restart; an answer that is lost is none the worse."""
        try:
            client = await self._there(AWAY_S)
            response = await client.request(ResetWrite())
        except DISTURBED:
            response = None
        await self.drop()
        if response is not None and error(response):
            raise refusal(response, "to restart", self.port)

    async def upload(self, content: bytes, image: int) -> AsyncIterator[int]:
        """Bytes that are there, as they arrive; goes on from where the board says, whatever happens to the line."""
        tries, furthest = 0, -1
        while furthest < len(content):
            try:
                client = await self._there(AWAY_S)
                first_s = ERASE_S if furthest <= 0 and tries == 0 else 2 * ANSWER_S
                async for offset in client.upload(content, slot=image, first_timeout_s=first_s, subsequent_timeout_s=ANSWER_S):
                    tries = 0 if offset > furthest else tries
                    furthest = offset
                    yield offset
            except SMPUploadError as problem:
                raise self._refused(problem.args[0] if problem.args else problem) from None
            except DISTURBED as problem:
                tries += 1
                await self.drop()
                if tries >= TRIES:
                    what = f"{self.port}: the line is lost after {max(furthest, 0)} of {len(content)} bytes ({type(problem).__name__})"
                    raise LinkError(what, "check cable and port; the same command goes on from there") from None
                await asyncio.sleep(0.05)

    def _refused(self, reason: Any) -> DeviceError:
        """What an upload ended with: an answer that is an error, or words, of which older servers' hold the code."""
        if not isinstance(reason, str):
            return refusal(reason, "the image", self.port)
        found = re.search(r"\brc=(\d+)", reason)
        if found and int(found[1]) in list(MGMT_ERR):
            return refusal(SimpleNamespace(rc=MGMT_ERR(int(found[1]))), "the image", self.port)
        return DeviceError(f"{self.port}: {reason[:160]}", "run the same command again: it sends the image anew")
