"""ModelSpec: a model as edgesdk takes it, and `load_model`, the door for every way people have one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from edgesdk.packed import Code

SEPARATOR = "::"
"""Between a model's reference and a recipe: `example:normalizer::gptq:bits=4` is that model, compressed."""
Layout = Literal["plain", "encoder-decoder", "deep-encoder", "decoder-only", "encoder-ctc", "decoder-decoder"]


@dataclass(frozen=True)
class Method:
    """One entry point: a module and the inputs it is exported with.

    `example_inputs` are positional tensors (float32 or int64). `unroll` is how often one whole answer calls the method
    (1 for `encode` and `prefill`, the typical output length for `decode`).
    """

    module: torch.nn.Module
    example_inputs: tuple[Any, ...]
    unroll: int = 1


@dataclass(frozen=True)
class ModelSpec:
    """A PyTorch model (`methods`) or a `.tflite` file (`flatbuffer`); exactly one of them is set.

    `calibration` yields positional input tuples for a method name. `evaluate` takes `run(method, inputs) -> outputs`
    (numpy arrays in, a list of numpy arrays out) and returns a quality in 0..1, higher is better, on held-out data:
    it is called with the reference, with the compressed module and with the built artifact alike.
    """

    name: str
    digest: str  # sha256 of what was loaded (source and weights)
    methods: dict[str, Method] = field(default_factory=dict)  # "forward", or "encode"/"prefill"/"decode"
    flatbuffer: Path | None = None
    layout: Layout = "plain"
    calibration: Callable[[str], Sequence[tuple[Any, ...]]] | None = None
    evaluate: Callable[[Callable[[str, Sequence[Any]], list[Any]]], float] | None = None
    quality_name: str = "quality"  # "accuracy", "exact match"
    alternatives: dict[str, str] = field(default_factory=dict)  # other layouts of the same task: layout → model ref
    codes: dict[str, Code] = field(default_factory=dict)  # how compressed weights are stored (the modules hold the decoded values)
    reference: ModelSpec | None = None  # the uncompressed model that this one was made from: what recovery trains towards
    prompts: tuple[Any, ...] = ()  # of a sequence model: token ids, or features of sound, that calibration answered
    files: dict[str, bytes] = field(default_factory=dict)  # labels, tokenizer: go into the bundle under this name
