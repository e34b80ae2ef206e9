"""Serve a bundle's encoder to devices that decode (see `edgesdk.sequence.split`)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgesdk.errors import EdgeError, InputError
from edgesdk.sequence.split import Helper


@contextmanager
def serve(bundle: str | Path, host: str = "127.0.0.1", port: int = 7070) -> Iterator[Helper]:
    """Answers for the encoder of `bundle` on this machine, as long as the block runs. `port` 0: any free one, see `Helper.address`.

    Raises `InputError` for a bundle without an encoder and `EdgeError` where it cannot listen there.
    """
    from edgesdk.bundles import read_manifest, read_member
    from edgesdk.runner import RunnerError, open_program
    from edgesdk.sequence.card import NAME, Card
    from edgesdk.sequence.split import away, pair_digest

    manifest = read_manifest(bundle)
    card = Card.read(read_member(bundle, NAME)) if any(m.name == NAME for m in manifest.members) else None
    methods = away(card) if card else []
    if not methods:
        raise InputError(f"{bundle}: {manifest.model_name} has no encoder beside a decoder", "give a bundle of an encoder-decoder")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / manifest.program
        program.write_bytes(read_member(bundle, manifest.program))
        try:
            runner = open_program(str(program), manifest.runtime, manifest.threads)
        except RunnerError as error:
            raise EdgeError(str(error), "build the bundle for this machine: edgesdk plan --device host") from None
        try:
            helper = Helper(runner.run, methods, pair_digest(lambda name: read_member(bundle, name)), host, port)
        except OSError as error:
            raise EdgeError(f"cannot listen at {host}:{port} ({error.strerror})", "choose another with --listen HOST:PORT") from None
        with helper:
            yield helper
