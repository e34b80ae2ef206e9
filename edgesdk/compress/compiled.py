"""Loops over single numbers, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numba


def compiled(function: Any, **options: Any) -> Any:
    """Compiled once and kept beside the package or in the user's cache; anew each time where neither can be written."""
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)
