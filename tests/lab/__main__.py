"""`python -m tests.lab` boots a board and prints its address until Ctrl-C: somewhere to try `edgesdk flash … --on ssh://…`."""

from __future__ import annotations

import sys
import time

from tests.lab.board import Board

with Board() as board:
    sys.stdout.write(f"up after {board.boot_s:.1f} s; --on '{board.url}'   (Ctrl-C ends it)\n")
    sys.stdout.flush()
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        pass
