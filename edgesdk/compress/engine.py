"""Where candidates are worked out: here, in processes of this machine, or on a Dask cluster. The answers are the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgesdk.errors import DeviceError, InputError, MissingTool


@dataclass(frozen=True)
class Engine:
    """`""`: this process. `processes:N`: N processes of this machine. `dask`: a local Dask cluster; `tcp://host:port`: that scheduler's."""

    name: str = ""

    def map(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """`work(item)` of every item, in order, as they are done. Raises `MissingTool`, `InputError` or `DeviceError`."""
        if not self.name or len(items) < 2:
            yield from (work(item) for item in items)
        elif self.name.startswith("processes"):
            yield from self._processes(work, items)
        else:
            yield from self._dask(work, items)

    def _processes(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        _, _, count = self.name.partition(":")
        if not count.isdecimal() or int(count) < 1:
            raise InputError(f"engine '{self.name}': no number of processes", "write processes:4")
        with ProcessPoolExecutor(int(count), mp_context=get_context("spawn"), initializer=_alone) as pool:
            yield from pool.map(work, items)

    def _dask(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        try:
            from distributed import Client
        except ImportError:
            raise MissingTool("the package 'distributed' (Dask) is not installed", "pip install 'edgesdk[cluster]'") from None
        try:
            if self.name == "dask":
                client = Client(dashboard_address=None, set_as_default=False)  # type: ignore[no-untyped-call]
            else:
                client = Client(self.name, timeout="10s", set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise DeviceError(
                f"no Dask scheduler at {self.name} ({error})", "start one with `dask scheduler`, or leave --engine out"
            ) from None
        with client:
            futures = client.map(work, list(items), pure=False)
            for future in futures:
                yield future.result()


def _alone() -> None:
    """A worker process uses one thread: the processes share the cores."""
    import torch

    torch.set_num_threads(1)
