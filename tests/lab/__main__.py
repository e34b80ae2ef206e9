"""`python -m tests.lab` boots a board and prints its address until Ctrl-C: somewhere to try `edgesdk flash … --on ssh://…`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.lab.board import Board, missing
from tests.lab.image import LabError, build


def say(text: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"── {text}\n")
    sys.stdout.flush()


def main() -> None:
    """Build the image, then (without --build) run a board from it until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    parser.add_argument("--build", action="store_true", help="only make its image ready")
    parser.add_argument("--cpu", default="cortex-a76", help="as qemu names it: cortex-a53, cortex-a72, … (default %(default)s)")
    parser.add_argument("--memory-mb", type=int, default=1024, help="(default %(default)s)")
    parser.add_argument("--data", default="256M", help="size of the disk at /data (default %(default)s)")
    options = parser.parse_args()
    if problem := missing():
        raise LabError(problem)
    start = time.monotonic()
    image = build(say)
    say(f"image {image.disk.parent}, {time.monotonic() - start:.0f} s")
    if options.build:
        return
    with Board(options.cpu, options.memory_mb, options.data) as board:
        say(f"up after {board.boot_s:.1f} s (Ctrl-C ends it); timings on it are an emulator's. Try:")
        sys.stdout.write(f"edgesdk flash BUNDLE --on '{board.url}'\n")
        sys.stdout.flush()
        while True:
            time.sleep(1)


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        say("ended")
