"""The model as the planner needs it: facts and graph from the cache when nothing changed, so that planning again imports no framework."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgesdk.graph.types import ModelGraph
from edgesdk.model import SEPARATOR
from edgesdk.noun import Noun
from edgesdk.plan.types import Workload

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec


class Facts(Noun):
    KIND: ClassVar[str] = "model-facts"

    name: str
    model_digest: str
    layout: str
    alternatives: dict[str, str] = Field(default_factory=dict)
    quality_name: str
    has_calibration: bool
    has_evaluate: bool
    coded: dict[str, int] = Field(default_factory=dict)  # weights that are stored compressed → their bytes
    native: bool = False  # whether our own kernels run it whole
    int4: tuple[str, ...] = ()  # those of them that int4-g32 holds as they are
    formats: dict[str, str] = Field(default_factory=dict)  # those of them that our kernels read as they are → the precision that it is


def _content_key(ref: str) -> str | None:
    """A digest of everything the reference loads, or None where that cannot be told without loading (a Python factory, a hub id)."""
    total = hashlib.sha256(ref.encode())
    if ref.startswith("example:"):
        from edgesdk import examples, sequence  # what the examples are made of

        folders = (Path(str(m.__file__)).parent for m in (examples, sequence))
        paths = sorted(p for folder in folders for p in folder.iterdir() if p.suffix in (".py", ".npz"))
    elif SEPARATOR in ref or Path(ref).suffix == ".edgec":
        return _compressed_key(ref)
    else:
        paths = [Path(ref)]
        if paths[0].suffix not in (".tflite", ".pt2") or not paths[0].is_file():
            return None
    for path in paths:
        total.update(path.name.encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:40]


def _native(spec: ModelSpec) -> bool:
    from edgesdk.errors import InputError
    from edgesdk.native.lower import sequence_of

    try:
        sequence_of(spec)
    except InputError:
        return False
    return True


def _compressed_key(ref: str) -> str | None:
    """Of the model it was made from, and the recipe or the file."""
    from edgesdk.compress.saved import base_of
    from edgesdk.errors import EdgeError

    base, _, recipe = ref.rpartition(SEPARATOR)
    try:
        content = recipe.encode() if base else Path(ref).read_bytes()
        key = _content_key(base or base_of(ref))
    except (OSError, EdgeError):  # loading it says what is wrong
        return None
    return hashlib.sha256(key.encode() + content).hexdigest()[:40] if key else None


class Subject:
    """`facts`, `graph` and, loaded only when something new must be measured, `spec`."""

    def __init__(self, ref: str, workload: Workload | None = None) -> None:
        """`workload` says for which lengths a sequence model is loaded."""
        from edgesdk import __version__
        from edgesdk.cache import cache_dir, cached

        self.ref, self._sizes = ref, (workload or Workload()).sizes
        key = _content_key(ref)
        self.facts = cached("facts", f"{key}-{self._sizes}-{__version__}-formats", Facts, self._facts) if key else self._facts()
        saved = cache_dir("graphs") / f"{self.facts.model_digest[:32]}-{__version__}.json"
        self._saved_graph = saved if saved.exists() else None

    def _facts(self) -> Facts:
        from edgesdk.lower.inject import is_grid
        from edgesdk.native.formats import name_of
        from edgesdk.packed import pack

        spec = self.spec
        formats = {n: name for n, c in spec.codes.items() if (name := name_of(c))}
        return Facts(
            name=spec.name, model_digest=spec.digest, layout=spec.layout, alternatives=spec.alternatives, quality_name=spec.quality_name,
            has_calibration=spec.calibration is not None, has_evaluate=spec.evaluate is not None,
            native=_native(spec), coded={n: len(pack(c)) for n, c in spec.codes.items()}, int4=tuple(n for n, c in spec.codes.items() if is_grid(c, 4, 32)),
            formats=formats,
        )  # fmt: skip

    @cached_property
    def spec(self) -> ModelSpec:
        """The loaded model. Raises what `load_model` raises."""
        from edgesdk.intake import load_model

        return load_model(self.ref, self._sizes)

    @cached_property
    def graph(self) -> ModelGraph:
        from edgesdk.errors import InputError
        from edgesdk.graph import trace

        if self._saved_graph:
            try:
                return ModelGraph.load(self._saved_graph)
            except InputError:
                self._saved_graph.unlink(missing_ok=True)
        return trace(self.spec)
