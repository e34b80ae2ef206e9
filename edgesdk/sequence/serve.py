"""What an agent does on a device: answer prompts with the bundle that lies in a folder. Stands alone with `generate`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .card import NAME, Card, SequenceError
from .choose import Settings
from .generate import Event, stream
from .programs import Run
from .split import AwayError, Remote, pair_digest
from .tokens import tokenizer_of

__all__ = ["AwayError", "SequenceError", "serve"]


def serve(
    run: Run,
    folder: str,
    prompts: Sequence[Any],
    settings: Mapping[str, Any],
    tell: Callable[[Event], None],
    cancelled: Callable[[], bool] | None = None,
    encoder: Mapping[str, Any] | None = None,
) -> None:
    """Tell the events of answers to `prompts` (token ids, or sound) with `run`, the programs of the bundle in `folder`.

    `encoder`: {"host", "port", "bits"} of a helper that runs the encoder (see `split`); what crossed the link is told as the last event.
    Raises `SequenceError`, which is an `AwayError` where the helper is the cause.
    """

    def read(name: str) -> bytes:
        try:
            with open(os.path.join(folder, name), "rb") as file:
                return file.read()
        except OSError:
            raise SequenceError(f"the bundle in {folder} has no {name}", "it is no sequence model: give it inputs, not a prompt") from None

    card = Card.read(read(NAME))
    remote = Remote((encoder["host"], int(encoder["port"])), pair_digest(read), run, int(encoder["bits"])) if encoder else None
    try:
        for event in stream(remote or run, card, prompts, Settings.of(settings), tokenizer_of(card, read), cancelled):
            tell(event)
        if remote:
            tell({"event": "link", **remote.told})
    finally:
        if remote:
            remote.close()
