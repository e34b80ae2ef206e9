"""Inputs for training, made from calibration inputs or by the model itself, and the answers of sequence models to them.

Sources: LLM-QAT, Data-Free Quantization Aware Training (arXiv:2305.17888): a first token at random, the next few greedy, then sampled from what the
model itself gives. A model that answers sequences with sequences says nothing about its sources: those are drawn from a Markov chain
over the calibration inputs, or, without any, at random, and only the answers are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgesdk.errors import InputError

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
    """`encode` (if there is one), `prefill`, then a `decode` a token, as in `edgesdk.examples.generate`; caches are handed on.

    `offset` positions come before the first answered token; an answer ends with `end` (None: at `longest`)."""

    encoder: bool
    offset: int
    longest: int
    end: int | None

    @property
    def first(self) -> str:
        return "encode" if self.encoder else "prefill"

    def answer(
        self, calls: Calls, sources: Sequence[torch.Tensor], values: Values | None = None, forced: Answers | None = None, keep: Any = None
    ) -> Answers:
        """Greedy, or fed with the tokens of `forced`; `keep(cache) → cache` stands for a cache that is stored in fewer bits."""
        first, further = self._begin(calls, sources, values, keep or (lambda x: x))
        all_logits, tokens, valid = [first], [], []
        steps = self.longest if forced is None else int(forced.valid.sum(1).max())
        done = torch.zeros(len(first), dtype=torch.bool)
        for t in range(1, steps + 1):
            tokens.append(all_logits[-1].detach().argmax(-1) if forced is None else forced.tokens[:, t - 1])
            valid.append(~done)
            done = done | (tokens[-1] == self.end) if self.end is not None else done
            if t == steps or bool(done.all()):
                break
            all_logits.append(further(tokens[-1]))
        return Answers(
            torch.stack(tokens, 1), torch.stack(all_logits, 1), torch.stack(valid, 1) if forced is None else forced.valid[:, :steps]
        )

    def _begin(self, calls: Calls, sources: Sequence[torch.Tensor], values: Values | None, keep: Any) -> tuple[torch.Tensor, Further]:
        """The first token's logits [count, vocabulary], and what gives those behind each further one."""
        if self.encoder:
            rest = [keep(x) if x.dim() > 3 else x for x in calls("encode", sources, values)]
            logits, k, v = calls("prefill", rest, values)[:3]
        else:
            logits, k, v, *rest = calls("prefill", sources, values)
        place = torch.full((len(logits), 1), self.offset)

        def further(token: torch.Tensor) -> torch.Tensor:
            nonlocal k, v, place
            place = place + 1
            logits, k, v = calls("decode", [token[:, None], place, keep(k), keep(v), *rest], values)[:3]
            return logits.reshape(len(logits), -1)

        return logits.reshape(len(logits), -1), further


@dataclass(frozen=True)
class FamilyChain(Chain):
    """The same for programs by the contract of `edgesdk.sequence`: caches are inputs only, and each call gives the new keys and values."""

    start: int = 0
    decode: str = "decode"
    begin: str = "encode"
    caches: tuple[tuple[int, int, int], ...] = ()  # heads, slots, size of each cache, twice: keys and values

    @property
    def first(self) -> str:
        return self.begin

    def inputs(self, rows: torch.Tensor) -> list[Row]:
        """What the first method takes for rows of tokens [count, length], all of them seen."""
        length = rows.shape[1]
        seen = torch.zeros(1, length)
        if self.encoder:
            return [(r[None], seen) for r in rows]
        return [(r[None], torch.arange(length)[None], torch.tensor([length - 1]), seen) for r in rows]

    def _begin(self, calls: Calls, sources: Sequence[torch.Tensor], values: Values | None, keep: Any) -> tuple[torch.Tensor, Further]:
        count, slots = len(sources[0]), torch.arange(self.caches[0][1])
        held = [torch.zeros(count, 1, *shape) for shape in self.caches]
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
            behind = [sources[1], *(keep(x) for x in calls(self.begin, sources, values))]
            return further(torch.full((count,), self.start)), further
        logits, *new = calls(self.begin, sources, values)
        length = sources[2].reshape(count) + 1
        for i, x in enumerate(new):
            held[i] = torch.cat([keep(x), held[i][..., x.shape[-2] :, :]], -2)
        return logits.reshape(count, -1), further


def _family_chain(spec: ModelSpec) -> FamilyChain | None:
    """None for programs of several lengths or batches, for windows and for answers that begin with several tokens."""
    from edgesdk.sequence.card import NAME, Card

    card = Card.read(spec.files[NAME])
    plain = {n: m for n, m in card.methods.items() if m["role"] != "draft" and not (m["role"] == "decode" and m["tokens"] > 1)}
    roles = {m["role"]: n for n, m in plain.items()}
    encoder = "encode" in roles
    if (
        len(roles) != len(plain)
        or set(roles) != {"encode" if encoder else "prefill", "decode"}
        or any(m["batch"] > 1 for m in plain.values())
    ):
        return None
    if any(c.get("window") for c in card.caches) or (encoder and len(card.start) != 1) or spec.layout == "encoder-ctc":
        return None
    slots = int(plain[roles["decode"]]["cache"])
    shapes = tuple((int(c["heads"]), slots, int(c["head"])) for c in card.caches for _ in "kv")
    read = 0 if encoder else int(plain[roles["prefill"]]["tokens"])
    longest = max(1, min(card.max_output, slots - read))
    first = roles["encode" if encoder else "prefill"]
    return FamilyChain(
        encoder, read, longest, card.eos[0] if card.eos else None, card.start[0] if card.start else 0, roles["decode"], first, shapes
    )


def chain_of(spec: ModelSpec) -> Chain | None:
    """How the methods of a sequence model hang together, checked against its inputs of `decode`; None where they are called otherwise."""
    import json

    if "sequence.json" in spec.files:
        return _family_chain(spec)
    names = set(spec.methods)
    if names not in ({"encode", "prefill", "decode"}, {"prefill", "decode"}):
        return None
    known = json.loads(spec.files["tokenizer.json"]) if "tokenizer.json" in spec.files else {}
    end = known.get("eos")
    encoder = "encode" in names
    first = "encode" if encoder else "prefill"
    sources = [next(iter(spec.calibration(first)))] if spec.calibration else [spec.methods[first].example_inputs]
    wanted = next(iter(spec.calibration("decode"))) if spec.calibration else spec.methods["decode"].example_inputs
    calls = Calls(spec)
    if len(wanted) < 4:
        return None
    try:
        with torch.no_grad():
            offset = 0 if encoder else int(sources[0][0].shape[-1])
            chain = Chain(encoder, offset, 2, None)
            given = chain.answer(calls, [torch.stack([x]) for x in sources[0]])
        room = int(wanted[2].shape[-2]) - offset
        same = spec.calibration is None or int(given.tokens[0, 0]) == int(wanted[0])
        if not same or int(wanted[1]) != offset + 1 or room < 1:
            return None
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    return Chain(encoder, offset, min(room, int(known.get("max_output", room))), end)


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


def random_rows(example: torch.Tensor, vocabulary: int, count: int, seed: int = 0) -> torch.Tensor:
    """Rows like `example` [1, length]: random tokens of any number, then its ending (the run of equal tokens, and what comes before it)."""
    generator = np.random.default_rng(seed)
    row = example.reshape(-1).numpy()
    run = len(row) - int(np.argmax(row[::-1] != row[-1])) if bool((row != row[-1]).any()) else len(row)
    stop = [int(row[run - 1])] if run < len(row) else []
    made = np.full((count, len(row)), int(row[-1]))
    for line in made:
        size = int(generator.integers(1, len(row) - len(stop) + 1)) if run < len(row) else len(row)
        line[:size] = generator.integers(0, vocabulary, size)
        line[size : size + len(stop)] = stop
    return torch.from_numpy(made)


def self_generated(spec: ModelSpec, count: int = 256, *, seed: int = 0) -> dict[str, list[Row]]:
    """`count` inputs a method that the model makes itself, without any data. For a language model whose `forward` gives logits for every position
    the tokens are its own; for `prefill`/`decode` models the sources are random and the answers its own. Raises `InputError` for others."""
    chain = chain_of(replace(spec, calibration=None))
    if chain is not None:
        example = spec.methods[chain.first].example_inputs[0]
        rows = random_rows(example, vocabulary_of(spec, chain.first), count, seed)
        if isinstance(chain, FamilyChain):
            return {chain.first: chain.inputs(rows)}
        return {chain.first: [(r.reshape(example.shape),) for r in rows]}
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
