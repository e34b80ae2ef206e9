"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.lab.board import Board


@pytest.fixture(scope="session")
def board() -> Iterator[Board]:
    """An emulated arm64 board, booted once for all its tests."""
    from tests.lab import board as lab

    if problem := lab.missing():
        pytest.fail(problem, pytrace=False)
    try:
        started = lab.Board().__enter__()
    except lab.LabError as error:
        pytest.fail(str(error), pytrace=False)
    with contextlib.ExitStack() as stack:
        stack.push(started)
        yield started
