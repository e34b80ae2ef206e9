"""Compression: one registry of methods, each with settings, a source and a way to a real artifact. `edgesdk.compress(model, recipe)`."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgesdk.compress.pipeline import Compressed, Compression, Stage, compress

__all__ = ["Compressed", "Compression", "Stage", "compress"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edgesdk.compress' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module("edgesdk.compress.pipeline"), name)


class _Verb(types.ModuleType):
    """The package is the verb as well: `edgesdk.compress(model, "gptq:bits=4")`."""

    def __call__(self, *args: Any, **named: Any) -> Compressed:
        from edgesdk.compress.pipeline import compress as verb

        return verb(*args, **named)


sys.modules[__name__].__class__ = _Verb
