"""Answers kept on disk by content: graphs, sensitivities, calibrations, lowered programs.

Under `$EDGESDK_CACHE`, else `~/.cache/edgesdk`. Deleting it costs time only.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from edgesdk.noun import Noun

    N = TypeVar("N", bound=Noun)


def cache_dir(kind: str) -> Path:
    """The folder for answers of `kind`, made if absent; a temporary one where the cache cannot be written."""
    root = os.environ.get("EDGESDK_CACHE")
    path = (Path(root) if root else Path.home() / ".cache" / "edgesdk") / kind
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        path = Path(tempfile.gettempdir()) / f"edgesdk-{os.getuid()}" / kind
        path.mkdir(parents=True, exist_ok=True)
    return path


def cached(kind: str, key: str, cls: type[N], make: Callable[[], N]) -> N:
    """The saved noun `kind/key.json`, or `make()` saved there. A file that cannot be read is made again."""
    from edgesdk.errors import InputError

    path = cache_dir(kind) / f"{key}.json"
    if path.exists():
        with contextlib.suppress(InputError):
            return cls.load(path)
    answer = make()
    with contextlib.suppress(OSError):  # a full disk costs time, not the answer
        answer.save(path)
    return answer
