"""The file of a native program: a header in JSON, then arrays, each at a multiple of 64 bytes. Numpy and the kernels alone; goes to the device as it is.

    "EDGENATV", length of the header (8 bytes, little-endian), header, padding, arrays

The header: `target`, `config` (a `SequenceConfig`), `methods` (name → its entry of the card, and `inputs`: name, shape, dtype),
`arrays` (name → dtype, shape, offset behind the header), `panels` (name → sizes; its arrays are `name.codes` and so on), and `linears`
(a module's path → panels, first row, rows, and whether they have a bias).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgesdk.kernels.panels import LAYOUT

MAGIC = b"EDGENATV"
_ALIGNED = 64


class ProgramError(ValueError):
    """This is no native program, or a damaged one."""


def write(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> bytes:
    """The file's bytes."""
    places, at = {}, 0
    for name, array in arrays.items():
        places[name] = {"dtype": str(array.dtype), "shape": list(array.shape), "at": at}
        at += -(-array.nbytes // _ALIGNED) * _ALIGNED
    text = json.dumps({**header, "arrays": places, "bytes": at}, sort_keys=True).encode()
    head = MAGIC + len(text).to_bytes(8, "little") + text
    out = bytearray(-(-len(head) // _ALIGNED) * _ALIGNED + at)
    out[: len(head)] = head
    start = len(out) - at
    for name, array in arrays.items():
        first = start + int(places[name]["at"])  # type: ignore[call-overload]
        out[first : first + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return bytes(out)


class Program:
    """A file, its arrays where they lie in it: nothing is read before it is used. Raises `ProgramError`."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            head = file.read(16)
            if head[:8] != MAGIC or len(head) < 16:
                raise ProgramError(f"{path} is no native program")
            file.seek(0)
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ProgramError(f"{path}: {error}") from None
        size = int.from_bytes(head[8:], "little")
        try:
            self.header: dict[str, Any] = json.loads(self._map[16 : 16 + size])
            self.target, self.config, self.methods = (self.header[k] for k in ("target", "config", "methods"))
            self.linears, self.panels = self.header["linears"], self.header["panels"]
            if self.header["layout"] != LAYOUT:
                raise ProgramError(f"{path} has weights in layout {self.header['layout']}, these kernels read {LAYOUT}: build it again")
            self._start = -(-(16 + size) // _ALIGNED) * _ALIGNED
            if self._start + self.header["bytes"] != len(self._map):
                raise ProgramError(f"{path} has {len(self._map)} bytes, its header says {self._start + self.header['bytes']}")
        except (ValueError, KeyError, TypeError) as error:
            raise error if isinstance(error, ProgramError) else ProgramError(f"{path}: its header is damaged: {error}") from None

    def array(self, name: str) -> Any:
        """An array, read only. Raises `KeyError`."""
        place = self.header["arrays"][name]
        count = int(np.prod(place["shape"], dtype=np.int64))
        if not count:
            return np.zeros(place["shape"], place["dtype"])
        return np.frombuffer(self._map, place["dtype"], count, self._start + place["at"]).reshape(place["shape"])

    def first(self, count: int) -> Any:
        """The first `count` bytes of all arrays, uint8, read only."""
        return np.frombuffer(self._map, np.uint8, count, self._start)

    def has(self, name: str) -> bool:
        return name in self.header["arrays"]
