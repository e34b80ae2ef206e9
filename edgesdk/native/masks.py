"""Masks as `attend` takes them: an input as it is, or an array filled before each run, with relative biases where a model has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .machine import Method

HIDDEN = np.float32(-1e4)
Mask = tuple[Any, int, int, int]
"""An array or an input's name; bytes from one batch, head and row to the next."""


class Masks:
    """Of one stack of a method. `at` int64 [B, N]: the positions of its tokens, filled before these masks are."""

    def __init__(self, method: Method, side: str, at: Any, *, last: bool = False) -> None:
        self.method, self.side, self.at, self.last = method, side, at, last
        self.config = method.config
        self._made: dict[int, Mask] = {}
        self._relative = method.program.array(f"{side}.relative.weight") if self.config["positions"] == "relative" else None

    def alone(self) -> Masks:
        """Those of the one token behind a prefill that goes on."""
        return Masks(self.method, self.side, self.at, last=True)

    def of_source(self, window: int) -> Mask:
        """Of an encoder, that sees both ways."""
        b, s = self.at.shape
        if not window and self._relative is None:
            return "source_mask", 4 * s, 0, 0
        back = np.abs(self.at[:, :, None] - self.at[:, None, :])
        hidden = np.where(back >= window, HIDDEN, np.float32(0)) if window else np.zeros((b, s, s), np.float32)
        bias = hidden[:, None] + self._bias(self.at, self.at, both_ways=True)
        return self._filled(window, bias.shape, lambda given: bias + given[self.method.number["source_mask"]][:, None, None, :])

    def of_tokens(self, window: int) -> Mask:
        """Of a decoder: in `prefill` what lies ahead is hidden, in `decode` what the inputs say."""
        number, (b, n) = self.method.number, self.at.shape
        if self.method.sizes["role"] == "prefill":
            return self._of_prefill(window)
        name = "window_mask" if window else "mask"
        time = self.method.shapes[number[name]][2]
        if self._relative is None:
            return name, 4 * n * time, 0, 4 * time
        slots = np.broadcast_to(np.arange(time - n), (b, time - n))

        def fill(given: Sequence[Any]) -> Any:
            return given[number[name]][:, None] + self._bias(self.at, np.concatenate([slots, self.at], 1), both_ways=False)

        return self._filled(window, (b, self.method.config[self.side]["heads"], n, time), fill)

    def _of_prefill(self, window: int) -> Mask:
        number, (b, n) = self.method.number, self.at.shape

        def fill(given: Sequence[Any]) -> Any:
            padding = given[number["mask"]]
            if self.last:
                after = np.where(np.arange(n)[None] > given[number["last"]].reshape(-1, 1), HIDDEN, np.float32(0))
                return (padding + after)[:, None, None]
            back = self.at[:, :, None] - self.at[:, None, :]
            hidden = (back < 0) | (back >= window) if window else back < 0
            return (
                np.where(hidden, HIDDEN, np.float32(0))[:, None] + padding[:, None, None, :] + self._bias(self.at, self.at, both_ways=False)
            )

        heads = self.method.config[self.side]["heads"] if self._relative is not None else 1
        return self._filled(window, (b, heads, 1 if self.last else n, n), fill)

    def _filled(self, window: int, shape: tuple[int, ...], fill: Any) -> Mask:
        if window not in self._made:
            array = np.zeros(shape, np.float32)
            self.method.before.append(lambda given: np.copyto(array, fill(given)))
            self._made[window] = (array, array.strides[0], array.strides[1] if shape[1] > 1 else 0, array.strides[2] if shape[2] > 1 else 0)
        return self._made[window]

    def _bias(self, at: Any, seen: Any, both_ways: bool) -> Any:
        """T5's relative bias [B, H, N, time], or 0."""
        if self._relative is None:
            return np.float32(0)
        far = self.config["relative_distance"]
        table = self._relative[self.method.program.header["buckets"][self.side]]
        distance = np.clip(seen[:, None, :] - at[:, :, None], -far, far) + far
        return table[distance].transpose(0, 3, 1, 2)
