"""A SequenceModel as a ModelSpec: its programs with static sizes, as the package's contract has them, and the card that tells of them."""

from __future__ import annotations

import copy
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from edgesdk.errors import InputError
from edgesdk.model import Layout, Method, ModelSpec
from edgesdk.plan.fake_quant import run
from edgesdk.plan.harm import one_thread
from edgesdk.sequence import caches, layers, positions
from edgesdk.sequence import card as cards
from edgesdk.sequence import model as model_code
from edgesdk.sequence.card import Card
from edgesdk.sequence.config import SequenceConfig
from edgesdk.sequence.layers import Held, Norm, Pair
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.positions import HIDDEN

Calibration: TypeAlias = Callable[[str], Sequence[tuple[Any, ...]]]
Evaluate: TypeAlias = Callable[[Callable[[str, Sequence[Any]], list[Any]]], float]


def _flat(pairs: Sequence[Pair]) -> list[Tensor]:
    return [t for pair in pairs for t in pair]


class Program(nn.Module):
    """One method: the model's weights, `core.…` in every method, and the names of its inputs."""

    def __init__(self, core: SequenceModel, input_names: Sequence[str]) -> None:
        super().__init__()
        self.core, self.input_names = core, tuple(input_names)

    def named(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.input_names, inputs, strict=True))


def _starting(given: Mapping[str, Tensor], prefix: str) -> list[Held]:
    """The caches whose inputs' names begin so, in order."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in given.items():
        if name.startswith(prefix):
            found.setdefault(name.rpartition("_")[2], []).append(tensor)
    return [tuple(tensors) for tensors in found.values()]


class Encode(Program):
    def forward(self, source: Tensor, source_mask: Tensor) -> Any:
        memory = self.core.encode(source, source_mask)
        return self.core.logits(memory) if self.core.decoder is None else tuple(_flat(self.core.cross(memory)))


class Prefill(Program):
    def forward(self, tokens: Tensor, positions: Tensor, last: Tensor, mask: Tensor, *rest: Tensor) -> Any:
        given = self.named((tokens, positions, last, mask, *rest))
        logits, new = self.core.prefill(tokens, positions, last, mask, _starting(given, "cross_"), given.get("source_mask"))
        return logits, *_flat(new)


class Decode(Program):
    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, *rest: Tensor) -> Any:
        given = self.named((tokens, positions, mask, *rest))
        logits, new = self.core.decode(
            tokens,
            positions,
            mask,
            _starting(given, "self_"),
            given.get("window_mask"),
            _starting(given, "cross_"),
            given.get("source_mask"),
        )
        return logits, *_flat(new)


def exportable(model: SequenceModel) -> SequenceModel:
    """The model as programs hold it, sharing its weights: means as products, and a tied head as a matrix of its own, since a runtime looks
    tokens up in one table and multiplies with another, in another precision and layout. The first is kept at twice its size: where both are
    equal to the bit, LiteRT's quantizer stores them anew for every method (ai-edge-quantizer 0.10).
    """
    weights: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    core = copy.deepcopy(model, weights).eval()
    for module in core.modules():
        if isinstance(module, Norm):
            module.by_product()
    if core.head is None and core.embed is not None:
        weight = core.embed.weight
        core.head = nn.Linear(weight.shape[1], weight.shape[0], bias=core.head_bias is not None, device="meta")
        core.head.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if core.head_bias is not None:
            core.head.bias, core.head_bias = core.head_bias, None
        for table in (core.embed, core.source_embed):
            if table is not None:
                table.weight = nn.Parameter(2 * table.weight.detach(), requires_grad=False)
        core.config = core.config.model_copy(update={"embed_scale": core.config.embed_scale / 2})
    return core


def caches_of(config: SequenceConfig) -> list[dict[str, int]]:
    """The self-attention caches as the card has them; the decoder-decoder layout's last one serves all its readers."""
    stack = config.decoder
    if stack is None:
        return []
    count = stack.layers if config.shared_from is None else config.shared_from + 1
    return [{"heads": stack.kv_heads, "head": stack.head, "window": stack.window(i)} for i in range(count)]


def cross_of(config: SequenceConfig) -> list[dict[str, int]]:
    stack = config.decoder
    return [{"heads": stack.kv_heads, "head": stack.head}] * stack.layers if stack and config.encoder else []


@dataclass(frozen=True)
class Lengths:
    """What programs there are: sizes in tokens, ascending. `start`: how many tokens an answer begins with."""

    config: SequenceConfig
    sources: tuple[int, ...]
    caches: tuple[int, ...]
    batch: int
    several: tuple[int, ...]
    start: int
    exit: int = 0  # layers of a further decode, which guesses; 0: there is none

    def check(self, name: str) -> None:
        """Raises `InputError`."""
        c, most = self.config, max((1, *self.several))
        if self.exit and not (c.decoder and 0 < self.exit < c.decoder.layers and self.several and c.shared_from is None):
            raise InputError(
                f"{name}: an exit behind {self.exit} layers", "give fewer than the decoder has, and `several`, which checks its guesses"
            )
        if not self.sources or not self.caches or min(*self.sources, *self.caches, self.batch) < 1 or min(self.several, default=2) < 2:
            raise InputError(
                f"{name}: sources {self.sources}, caches {self.caches}, several {self.several}",
                "give lengths of 1 and more, several of 2 and more",
            )
        if c.decoder and c.encoder and not self.start:
            raise InputError(f"{name}: start = ()", "behind an encoder an answer begins with a token at least")
        if c.encoder is None and self.caches[-1] < self.sources[-1]:
            raise InputError(
                f"{name}: caches of {self.caches[-1]} slots for prompts of {self.sources[-1]}", "a cache holds the prompt and the answer"
            )
        if c.sound and self.sources[-1] > c.sound.frames // 2:
            raise InputError(f"{name}: a source of {self.sources[-1]} halved frames", f"the model hears {c.sound.frames // 2}")
        if c.positions == "learned":
            tables = {"source": self.sources[-1] if c.encoder and not c.sound else 0, "cache": self.caches[-1] + most if c.decoder else 0}
            for what, rows in tables.items():
                if rows > c.max_positions:
                    hint = "take shorter ones; behind a full cache there is a token more"
                    raise InputError(f"{name}: {what} lengths need {rows} positions, the model has {c.max_positions}", hint)

    def programs(self) -> dict[str, dict[str, Any]]:
        """Method → its entry of the card."""
        found: dict[str, dict[str, Any]] = {}
        encoder, decoder = self.config.encoder is not None, self.config.decoder is not None

        def add(role: str, source: int, cache: int, tokens: int) -> None:
            sizes = [source or tokens] if len(self.sources) > 1 and (encoder or role != "decode") else []
            sizes += [cache] if len(self.caches) > 1 and role == "decode" else []
            name = "_".join([role, *map(str, sizes)]) + (f"_x{tokens}" if role == "decode" and tokens > 1 else "")
            found[name] = {"role": role, "batch": self.batch, "source": source, "cache": cache, "tokens": tokens}

        for size in self.sources if encoder else ():
            add("encode", size, 0, 0)
        for size in self.sources if decoder else ():
            if not encoder:
                add("prefill", 0, 0, size)
            elif self.start > 1:
                add("prefill", size, 0, self.start)
        for size in (self.sources if encoder else (0,)) if decoder else ():
            for slots in self.caches:
                for tokens in (1, *self.several):
                    add("decode", size, slots, tokens)
        if self.exit:
            plain = {n: m for n, m in found.items() if m["role"] == "decode" and m["tokens"] == 1}
            found |= {n.replace("decode", "draft"): {**m, "role": "draft", "layers": self.exit} for n, m in plain.items()}
        return found

    def uses(self, source: int, output: int) -> dict[str, int]:
        """How often each program runs for one answer of `output` tokens to a source of `source`; those left out do not run."""
        size = next((s for s in self.sources if s >= source), self.sources[-1])
        found: dict[str, int] = {}
        before, programs = 0 if self.config.encoder else source, self.programs()
        first = any(m["role"] == "prefill" for m in programs.values())  # gives the first token
        for name, m in programs.items():
            if m["role"] == "draft":
                continue
            if m["role"] != "decode":
                found[name] = int(size == (m["source"] or m["tokens"]))
            elif m["source"] in (0, size) and m["tokens"] == 1:
                at = self.caches.index(m["cache"])
                fewer = self.caches[at - 1] if at else -1
                steps = range(before, before + output - first)
                found[name] = sum(fewer < p and (p <= m["cache"] or m["cache"] == self.caches[-1]) for p in steps)
        return found


def _build(core: SequenceModel, sizes: Mapping[str, Any], cache_bits: int) -> tuple[Program, tuple[Tensor, ...]]:
    """The program of a card's entry, and inputs for it: random tokens and caches, everything seen."""
    config, b, s, t = core.config, sizes["batch"], sizes["source"], sizes["cache"]
    n, role = sizes["tokens"], sizes["role"]
    random = torch.Generator().manual_seed(0)

    def seen(*shape: int) -> Tensor:
        return torch.zeros(shape)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(0, config.vocab, shape, generator=random)

    def held(kind: str, i: int, *shape: int) -> dict[str, Tensor]:
        """One cache: keys and values, or their codes and what stands beside them."""
        names = [f"{kind}_{x}_{i}" for x in ("k", "v", "k_scale", "v_scale")]
        arrays = caches.held([some(*shape).numpy() for _ in "kv"], cache_bits)
        return {name: torch.from_numpy(a) for name, a in zip(names, arrays, strict=False)}

    if role == "encode":
        source = some(b, config.sound.features, 2 * s) if config.sound else tokens(b, s)
        return Encode(core, ("source", "source_mask")), (source, seen(b, s))
    inputs = {"tokens": tokens(b, n), "positions": torch.arange(t, t + n).expand(b, n).clone()}
    if role == "prefill":
        inputs |= {"last": torch.full((b,), n - 1), "mask": seen(b, n)}
    else:
        ahead = torch.full((n, n), HIDDEN).triu(1)
        inputs["mask"] = torch.cat([seen(b, n, t), ahead.expand(b, n, n)], 2)
        if window := max((c["window"] for c in caches_of(config)), default=0):
            inputs["window_mask"] = torch.cat([seen(b, n, window), ahead.expand(b, n, n)], 2)
    if s:
        inputs["source_mask"] = seen(b, s)
        for i, c in enumerate(cross_of(config)):
            inputs |= held("cross", i, b, c["heads"], s, c["head"])
    if role == "prefill":
        return Prefill(core, tuple(inputs)), tuple(inputs.values())
    for i, c in enumerate(caches_of(config)):
        inputs |= held("self", i, b, c["heads"], c["window"] or t, c["head"])
    return Decode(core, tuple(inputs)), tuple(inputs.values())


def _exit(model: SequenceModel, layers: int) -> SequenceModel:
    """The model's first decoder layers with its head, for programs; the weights are shared."""
    from edgesdk.sequence.exits import skipped

    return exportable(skipped(model, range(layers)))


def recorded(spec: ModelSpec, card: Card) -> Calibration:
    """Calibration inputs: what each method is called with while the model answers its prompts greedily, up to `card.max_output` tokens. A method
    that is not called has its example."""
    from edgesdk.sequence.generate import generate

    @cache
    def met() -> dict[str, list[tuple[Tensor, ...]]]:
        seen: dict[str, list[tuple[Tensor, ...]]] = {n: [] for n in spec.methods}
        compute = run(spec)

        def record(name: str, arrays: Sequence[Any]) -> list[Any]:
            seen[name].append(tuple(torch.from_numpy(np.array(a)) for a in arrays))  # copies: caches are written in place
            return compute(name, arrays)  # type: ignore[no-any-return]

        with one_thread():
            generate(record, card, spec.prompts)
        return {n: found or [spec.methods[n].example_inputs] for n, found in seen.items()}

    return lambda method: met()[method]


def _digest(core: SequenceModel, card: bytes) -> str:
    """sha256 over the configuration, the code that computes it, the card and the weights."""
    total = hashlib.sha256(core.config.to_json().encode() + card)
    for module in (model_code, layers, positions, sys.modules[__name__]):
        total.update(inspect.getsource(module).encode())
    for key, value in sorted(core.state_dict().items()):
        total.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        total.update(memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def sequence_spec(
    model: SequenceModel, *, name: str, source_lengths: Sequence[int] = (64,), cache_lengths: Sequence[int] = (64,), batch: int = 1,
    several: Sequence[int] = (), exit: int = 0, cache_bits: int = 32, tokenizer: Mapping[str, Any] | None = None, start: Sequence[int] = (), eos: Sequence[int] = (), pad: int = 0,
    suppress: Sequence[int] = (), suppress_first: Sequence[int] = (),
    max_output: int | None = None, typical_source: int | None = None, typical_output: int = 16, prompts: Sequence[Any] = (),
    calibration: Calibration | None = None, evaluate: Evaluate | None = None, quality_name: str = "quality", layout: Layout | None = None,
    alternatives: Mapping[Layout, str] | None = None, files: Mapping[str, bytes] | None = None,
) -> ModelSpec:  # fmt: skip
    """The programs of `model` for sources of `source_lengths` tokens (behind sound, halved frames) and caches of `cache_lengths` slots.

    Without an encoder `source_lengths` are those of a prompt with `start` behind it, and a cache holds prompt and answer. An answer that
    begins with one token needs no `prefill` behind an encoder: `decode` takes it. `several`: further `decode` programs that take so many
    tokens at once. `exit`: behind so many of the decoder's layers a program guesses (see `drafts`).
    `cache_bits`: of `card.CACHE_BITS`, what the programs' caches, of self- and of cross-attention, are held in; what a call attends to of its own
    tokens is not rounded.
    `typical_source` and `typical_output` (tokens) say which programs a usual answer calls, and how often: `Method.unroll`.
    `prompts`: what to take calibration inputs from (see `recorded`) where `calibration` is not given.
    The other arguments are the fields of `ModelSpec` and `Card` of their names.

    Raises `InputError` for lengths that the model, or one another, do not allow, and for other bits.
    """
    config = model.config
    if cache_bits not in cards.CACHE_BITS:
        raise InputError(f"{name}: caches of {cache_bits} bits", f"known: {', '.join(map(str, cards.CACHE_BITS))}")
    if cache_bits != 32 and config.decoder is None:
        raise InputError(f"{name}: caches of {cache_bits} bits, but layout {config.layout} has none", "leave them out")
    if cache_bits == 4 and config.decoder is not None and config.decoder.head % 2:
        raise InputError(f"{name}: caches of 4 bits for heads of {config.decoder.head} columns", "a byte holds two: choose 8 bits")
    lengths = Lengths(config, tuple(sorted(source_lengths)), tuple(sorted(cache_lengths)), batch, tuple(sorted(several)), len(start), exit)
    lengths.check(name)
    core, programs = exportable(model), lengths.programs()
    uses = lengths.uses(typical_source or lengths.sources[len(lengths.sources) // 2], typical_output)
    methods = {}
    first = _exit(model, exit) if exit else core
    for method, sizes in programs.items():
        module, inputs = _build(first if sizes["role"] == "draft" else core, sizes, cache_bits)
        methods[method] = Method(module, inputs, unroll=uses.get(method, 0))
    longest = lengths.caches[-1] if config.decoder else lengths.sources[-1]
    card = Card(
        {
            "layout": config.layout, "vocab": config.vocab, "methods": programs, "caches": caches_of(config), "cross": cross_of(config),
            "start": start, "eos": eos, "pad": pad, "max_output": max_output or longest, "tokenizer": tokenizer or {"kind": "none"},
            "suppress": suppress, "suppress_first": suppress_first, "cache_bits": cache_bits,
        }
    )  # fmt: skip
    content = card.to_bytes()
    spec = ModelSpec(
        name=name, digest=_digest(core, content), methods=methods, layout=layout or config.layout, calibration=calibration,
        evaluate=evaluate, quality_name=quality_name, prompts=tuple(prompts), files={**(files or {}), cards.NAME: content},
        alternatives={str(k): v for k, v in (alternatives or {}).items()},
    )  # fmt: skip
    return replace(spec, calibration=recorded(spec, card)) if calibration is None and prompts else spec
