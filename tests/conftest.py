"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.lab.board import Board
    from tests.lab.phone import Phone


@pytest.fixture(scope="session", autouse=True)
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys and devices of the tests' own, never the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESDK_DEVICES", str(tmp_path_factory.mktemp("devices")))
        patch.setenv("EDGESDK_KEYS", str(tmp_path_factory.mktemp("keys")))
        yield


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


@pytest.fixture(scope="session")
def phone() -> Iterator[Phone]:
    """A real adbd in a namespace of its own, its `adb` first on PATH while it runs."""
    from tests.lab import phone as lab

    if problem := lab.missing():
        pytest.fail(problem, pytrace=False)
    try:
        started = lab.Phone().__enter__()
    except lab.LabError as error:
        pytest.fail(str(error), pytrace=False)
    with contextlib.ExitStack() as stack:
        stack.push(started)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(started.folder), prepend=os.pathsep)
            yield started
