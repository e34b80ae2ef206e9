"""Inputs for training, made from calibration inputs or by the model itself, and the answers of sequence models to them.

Sources: LLM-QAT, Data-Free Quantization Aware Training (arXiv:2305.17888): a first token at random, the next few greedy, then sampled from what the
model itself gives. A model that answers sequences with sequences says nothing about its sources: those are drawn from a Markov chain
over the calibration inputs, or, without any, at random, and only the answers are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgesdk.errors import InputError
from edgesdk.sequence.card import NAME, Card

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

Values = Mapping[str, Mapping[str, torch.Tensor]]
"""Method → parameter name in its module → what it is computed with instead."""
GREEDY = 3  # tokens after the first that are not sampled
Row = tuple[Any, ...]
Further = Callable[[torch.Tensor], torch.Tensor]
"""Token [count] → the logits [count, vocabulary] behind it."""


class Calls:
    """The methods of a model over stacks of samples [count, *shape]: all at once where PyTorch can (`vmap`), else one after the other."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.alone: dict[str, bool] = {}

    def __call__(
        self, method: str, inputs: Sequence[torch.Tensor], values: Values | None = None, taps: Sequence[str] = ()
    ) -> list[torch.Tensor]:
        """The outputs, each [count, *shape]; behind them what the modules `taps` gave."""
        module, own = self.spec.methods[method].module, dict((values or {}).get(method, {}))
        found = {path: m for path, m in module.named_modules(remove_duplicate=False) if path in taps} if taps else {}

        def one(*sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen: dict[str, torch.Tensor] = {}
            hooks = [m.register_forward_hook(_note(seen, path)) for path, m in found.items()]
            try:
                out = torch.func.functional_call(module, own, sample)
            finally:
                for hook in hooks:
                    hook.remove()
            return (*(out if isinstance(out, tuple | list) else (out,)), *(seen[p] for p in taps))

        if method not in self.alone:
            self.alone[method] = not _alike(one, inputs)
        if self.alone[method]:
            return [torch.stack(o) for o in zip(*(one(*x) for x in zip(*inputs, strict=True)), strict=True)]
        return list(together(one, inputs))


def together(one: Any, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """`one` of every sample of the stacks at once. Attention is taken apart: what torch runs as one operator has no form for stacks."""
    with sdpa_kernel(SDPBackend.MATH):
        made: tuple[torch.Tensor, ...] = torch.vmap(one)(*inputs)
    return made


def _note(seen: dict[str, torch.Tensor], path: str) -> Any:
    def hook(_: Any, inputs: Any, out: Any) -> None:
        seen[path] = out[0] if isinstance(out, tuple | list) else out

    return hook


def _alike(one: Any, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether two samples at once give what they give alone."""
    try:
        with torch.no_grad():
            pair = together(one, [x[:2] for x in inputs])
            last = one(*(x[:2][-1] for x in inputs))
        return all(
            a[-1].shape == b.shape and torch.allclose(a[-1].float(), b.float(), atol=1e-3, rtol=1e-3)
            for a, b in zip(pair, last, strict=True)
        )
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return False


def stacked(rows: Sequence[Row]) -> list[list[torch.Tensor]]:
    """Input tuples put together by their shapes, in order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple((tuple(x.shape), x.dtype) for x in row), []).append(row)
    return [[torch.stack(x) for x in zip(*group, strict=True)] for group in groups.values()]


# ---- sequence models


@dataclass(frozen=True)
class Answers:
    """What a model answers to a stack of sources: greedy tokens [count, time], their logits, and which of them count (up to the end token)."""

    tokens: torch.Tensor
    logits: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True)
class Chain:
    """How the programs of a sequence model (see `edgesdk.sequence`) hang together, for stacks of samples: `encode` or `prefill`, then a `decode` a token.

    Caches are inputs only, and each call gives the new keys and values.
    """

    card: Card
    first: str  # the method that takes the source or the prompt
    decode: str

    @property
    def encoder(self) -> bool:
        return bool(self.card.methods[self.first]["role"] == "encode")

    @property
    def size(self) -> int:
        """Tokens that the first method takes."""
        return int(self.card.methods[self.first]["source" if self.encoder else "tokens"])

    @property
    def reads(self) -> tuple[Any, ...]:
        """What inputs of the first method depend on."""
        return self.encoder, self.size, self.card.start, self.card.pad

    @property
    def slots(self) -> int:
        return int(self.card.methods[self.decode]["cache"])

    @property
    def longest(self) -> int:
        return max(1, min(self.card.max_output, self.slots - (0 if self.encoder else self.size)))

    def texts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The prompts in inputs of the first method, without padding."""
        if self.encoder:
            return [r[0][r[1] == 0].tolist() for r in rows]
        return [r[0][0, : int(r[2]) + 1 - len(self.card.start)].tolist() for r in rows]

    def samples(self, spec: ModelSpec) -> list[Row]:
        """Calibration inputs of the first method: the prompts of `spec`, where it has some."""
        texts = [[int(t) for t in p] for p in spec.prompts if np.ndim(p) == 1]
        most = self.size - (0 if self.encoder else len(self.card.start))
        found = self.inputs([t for t in texts if len(t) <= most])
        return found or (list(spec.calibration(self.first)) if spec.calibration else [])

    def inputs(self, texts: Sequence[Sequence[int]]) -> list[Row]:
        """What the first method takes for prompts, as the runtime gives it."""
        rows, at = [], torch.arange(self.size)[None]
        for text in texts:
            tokens = [*text, *(() if self.encoder else self.card.start)]
            ids = torch.tensor([tokens + [self.card.pad] * (self.size - len(tokens))])
            mask = (at >= len(tokens)).to(torch.float32) * -1e4
            last = len(tokens) - 1
            rows.append((ids, mask) if self.encoder else (ids, at.clamp(max=last), torch.tensor([last]), mask))
        return rows

    def answer(
        self, calls: Calls, sources: Sequence[torch.Tensor], values: Values | None = None, forced: Answers | None = None, keep: Any = None
    ) -> Answers:
        """To stacks of inputs of the first method: greedy, or fed with the tokens of `forced`. `keep(cache) → cache` stands for a cache that is
        stored in fewer bits."""
        first, further = self._begin(calls, sources, values, keep or (lambda x: x))
        all_logits, tokens, valid = [first], [], []
        steps = self.longest if forced is None else int(forced.valid.sum(1).max())
        done = torch.zeros(len(first), dtype=torch.bool)
        for t in range(1, steps + 1):
            tokens.append(all_logits[-1].detach().argmax(-1) if forced is None else forced.tokens[:, t - 1])
            valid.append(~done)
            for end in self.card.eos:
                done = done | (tokens[-1] == end)
            if t == steps or bool(done.all()):
                break
            all_logits.append(further(tokens[-1]))
        return Answers(
            torch.stack(tokens, 1), torch.stack(all_logits, 1), torch.stack(valid, 1) if forced is None else forced.valid[:, :steps]
        )

    def _begin(self, calls: Calls, sources: Sequence[torch.Tensor], values: Values | None, keep: Any) -> tuple[torch.Tensor, Further]:
        """The first token's logits [count, vocabulary], and what gives those behind each further one."""
        count, slots = len(sources[0]), torch.arange(self.slots)
        held = [torch.zeros(count, 1, c["heads"], self.slots, c["head"]) for c in self.card.caches for _ in "kv"]
        length = torch.zeros(count, dtype=torch.int64)
        behind: list[torch.Tensor] = []

        def further(token: torch.Tensor) -> torch.Tensor:
            nonlocal length
            mask = torch.cat([(slots >= length[:, None]).to(torch.float32) * -1e4, torch.zeros(count, 1)], 1)
            inputs = [token.reshape(count, 1, 1), length.reshape(count, 1, 1), mask.reshape(count, 1, 1, -1), *behind, *held]
            logits, *new = calls(self.decode, inputs, values)
            here = (slots == length[:, None]).reshape(count, 1, 1, -1, 1)
            for i, x in enumerate(new):
                held[i] = torch.where(here, keep(x), held[i])
            length = length + 1
            return logits.reshape(count, -1)

        if self.encoder:
            behind = [sources[1], *(keep(x) for x in calls(self.first, sources, values))]
            return further(torch.full((count,), self.card.start[0])), further
        logits, *new = calls(self.first, sources, values)
        length = sources[2].reshape(count) + 1
        for i, x in enumerate(new):
            held[i] = torch.cat([keep(x), held[i][..., x.shape[-2] :, :]], -2)
        return logits.reshape(count, -1), further


def chain_of(spec: ModelSpec) -> Chain | None:
    """None for models that are no sequence models, for batches, windows and int8 caches, and where an answer begins with several tokens.

    Of programs of several lengths the longest are taken: all have the same weights.
    """
    if NAME not in spec.files:
        return None
    card = Card.read(spec.files[NAME])
    methods = {n: m for n, m in card.methods.items() if m["role"] != "draft" and not (m["role"] == "decode" and m["tokens"] > 1)}
    roles: dict[str, str] = {}
    for name in sorted(methods, key=lambda n: (methods[n]["source"], methods[n]["cache"], methods[n]["tokens"])):
        roles[methods[name]["role"]] = name
    first = "encode" if "encode" in roles else "prefill"
    if set(roles) != {first, "decode"} or any(m["batch"] > 1 for m in methods.values()):
        return None
    if card.cache_bits != 32 or any(c.get("window") for c in card.caches) or (first == "encode" and len(card.start) != 1):
        return None
    return Chain(card, roles[first], roles["decode"])


# ---- more inputs


def more_rows(rows: torch.Tensor, count: int, *, order: int = 3, seed: int = 0) -> torch.Tensor:
    """`count` further rows of token ids [count, length] from a Markov chain of `order` over `rows` [n, length]; none that ends otherwise
    than one of them."""
    generator = np.random.default_rng(seed)
    given = rows.numpy()
    n, length = given.shape
    follows: dict[tuple[int, ...], list[int]] = {}
    for row in given:
        for at in range(length):
            for back in range(1, order + 1):
                if at >= back:
                    follows.setdefault(tuple(row[at - back : at]), []).append(int(row[at]))
    endings, seen = {int(r[-1]) for r in given}, {tuple(r) for r in given}
    made: list[list[int]] = []
    for _ in range(20 * count):
        row = [int(t) for t in given[generator.integers(n)][: min(order, length)]]
        while len(row) < length:
            back = next(b for b in range(min(order, len(row)), -1, -1) if b == 0 or tuple(row[-b:]) in follows)
            choices = follows[tuple(row[-back:])] if back else given[:, 0].tolist()
            row.append(int(choices[generator.integers(len(choices))]))
        if row[-1] in endings and tuple(row) not in seen:
            seen.add(tuple(row))
            made.append(row)
        if len(made) == count:
            break
    return torch.tensor(made, dtype=rows.dtype).reshape(-1, length)


def vocabulary_of(spec: ModelSpec, method: str) -> int:
    """How many token ids a method takes: the entries of its first embedding. Raises `InputError`."""
    for module in spec.methods[method].module.modules():
        if isinstance(module, torch.nn.Embedding):
            return module.num_embeddings
    raise InputError(f"{spec.name}: {method} has no embedding, so it takes no tokens", "give the model calibration inputs")


def more_texts(texts: Sequence[Sequence[int]], count: int, *, seed: int = 0) -> list[list[int]]:
    """At most `count` further texts from `more_rows`, of lengths that are there."""
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True, padding_value=-1)
    return [r[r >= 0].tolist() for r in more_rows(rows, count, seed=seed)]


def random_texts(chain: Chain, count: int, seed: int = 0) -> list[list[int]]:
    """Random tokens of any number, then what a tokenizer puts behind a text."""
    generator = np.random.default_rng(seed)
    ending = [int(t) for t in chain.card.tokenizer.get("after", ())]
    room = max(1, chain.size - len(ending) - (0 if chain.encoder else len(chain.card.start)))
    sizes = generator.integers(1, room + 1, count)
    return [[*generator.integers(0, chain.card.vocab, size).tolist(), *ending] for size in sizes]


def self_generated(spec: ModelSpec, count: int = 256, *, seed: int = 0) -> dict[str, list[Row]]:
    """`count` inputs a method that the model makes itself, without any data. For a language model whose `forward` gives logits for every position
    the tokens are its own; for sequence models the prompts are random and the answers its own. Raises `InputError` for others."""
    chain = chain_of(spec)
    if chain is not None:
        return {chain.first: chain.inputs(random_texts(chain, count, seed))}
    if set(spec.methods) == {"forward"}:
        return {"forward": [(r,) for r in _own_text(spec, count, seed)]}
    raise InputError(
        f"{spec.name} cannot make inputs for itself: it is no language model", "give it calibration inputs (ModelSpec.calibration)"
    )


def _own_text(spec: ModelSpec, count: int, seed: int) -> list[torch.Tensor]:
    example = spec.methods["forward"].example_inputs
    if len(example) != 1 or example[0].is_floating_point() or example[0].dim() != 2 or example[0].shape[0] != 1:
        raise InputError(f"{spec.name}: forward does not take one row of tokens", "give it calibration inputs (ModelSpec.calibration)")
    length, vocabulary = int(example[0].shape[1]), vocabulary_of(spec, "forward")
    generator, calls = torch.Generator().manual_seed(seed), Calls(spec)
    ids = torch.zeros(count, 1, length, dtype=example[0].dtype)
    ids[:, 0, 0] = torch.randint(0, vocabulary, (count,), generator=generator)
    for start in range(0, count, 64):
        part = ids[start : start + 64]
        for t in range(1, length):
            with torch.no_grad():
                logits = calls("forward", [part])[0]
            if logits.dim() != 4 or logits.shape[2] != length:
                raise InputError(f"{spec.name}: forward gives no logits for every position", "give it calibration inputs")
            last = logits[:, 0, t - 1]
            part[:, 0, t] = last.argmax(-1) if t <= GREEDY else torch.multinomial(torch.softmax(last, -1), 1, generator=generator)[:, 0]
    return list(ids)
