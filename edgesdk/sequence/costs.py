"""What the programs of a sequence model do, without tracing them: units with MACs, weights and traffic for any lengths and batch.

Shapes are static, as they are exported: a call works on all slots of its bucket, whether they hold tokens or not. Units are named after the
modules of `edgesdk.sequence.model`, whose operators these are. No framework is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgesdk.graph.types import MethodGraph, Op, TensorInfo, Unit
from edgesdk.sequence.card import layout_of

if TYPE_CHECKING:
    from edgesdk.sequence.config import SequenceConfig, Stack


@dataclass(frozen=True)
class Call:
    """What one call works on: `batch` texts of `tokens` each, `cache` slots before them, `source` tokens of the encoder."""

    batch: int
    tokens: int
    cache: int = 0
    source: int = 0

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


@dataclass
class Tape:
    """Units in the order they run."""

    config: SequenceConfig
    call: Call
    units: list[Unit] = field(default_factory=list)
    times: list[int] = field(default_factory=list)  # how often each unit stands for one
    taken: dict[str, int] = field(default_factory=dict)
    alike: bool = False  # equal layers are written once
    layers: int = 1  # those that are being written
    alive: int = 0  # most elements alive between two operators
    cache_bits: int = 32

    def add(self, name: str, op: Op, into: int, out: int, **fields: Any) -> None:
        n = self.taken[name] = self.taken.get(name, 0) + 1
        self.units.append(Unit.model_construct(name=name if n == 1 else f"{name}#{n}", op=op, in_elements=into, out_elements=out, **fields))
        self.times.append(self.layers)

    def linear(self, name: str, width: int, out: int, bias: bool = False, *, rows: int | None = None, weight: str = "") -> None:
        """`rows` vectors (all of the call's tokens) of `width` to `out`."""
        n = self.call.rows if rows is None else rows
        self.add(
            name, "linear", n * width, n * out, weight=weight or f"{name}.weight", weight_shape=(out, width), rows=out, cols=width,
            bias_elements=out if bias else 0, macs=n * width * out,
        )  # fmt: skip

    def matmul(self, batch: int, rows: int, inner: int, cols: int) -> None:
        """`batch` products of [rows, inner] and [inner, cols]."""
        self.add("matmul", "matmul", batch * inner * (rows + cols), batch * rows * cols, macs=batch * rows * inner * cols)

    def plain(self, op: Op, *sizes: tuple[int, int]) -> None:
        """Operators without weights, by elements (read, written)."""
        for into, out in sizes:
            self.add(op, op, into, out)

    def norm(self, name: str, dim: int, rows: int | None = None) -> None:
        """Means are products with a vector, which is how programs are exported."""
        n = self.call.rows if rows is None else rows
        every = n * dim
        if self.config.norm == "layer":
            self.add(f"{name}.mean", "matmul", every, n, macs=every)
            self.plain("elementwise", (every + n, every))
        self.plain("elementwise", (every, every))
        self.add(f"{name}.mean", "matmul", every, n, macs=every)
        self.plain("elementwise", (n, n), (n, n), (every + n, every))
        self.add(name, "elementwise", every, every, weight=f"{name}.weight", bias_elements=dim)
        if self.config.norm == "layer":
            self.add(name, "elementwise", every, every, weight=f"{name}.bias", bias_elements=dim)

    def rotate(self, heads: int, size: int) -> None:
        """Rotary positions, half of each head against the other."""
        if self.config.positions == "rope":
            half = self.call.rows * heads * size // 2
            turned = half + self.call.rows * size // 2
            self.plain("elementwise", *[(turned, half)] * 4, *[(2 * half, half)] * 2, (2 * half, 2 * half))

    def keys_values(self, name: str, stack: Stack, width: int, places: bool, rows: int | None = None) -> None:
        narrow = stack.kv_heads * stack.head
        self.linear(f"{name}.k", width, narrow, self.config.qkv_bias and self.config.k_bias, rows=rows)
        self.linear(f"{name}.v", width, narrow, self.config.qkv_bias, rows=rows)
        if places:
            self.rotate(stack.kv_heads, stack.head)

    def queries(self, name: str, stack: Stack, parts: tuple[int, ...], places: bool, cached: bool) -> None:
        """Attention over `parts`, each so many slots, which stay where they are. `cached`: the first of them is a cache."""
        wide, seen = stack.heads * stack.head, sum(parts)
        self.linear(f"{name}.q", stack.dim, wide, self.config.qkv_bias)
        if places:
            self.rotate(stack.heads, stack.head)
        self.plain("elementwise", (self.call.rows * wide, self.call.rows * wide))
        groups, rows = self.call.batch * stack.kv_heads, self.call.tokens * (stack.heads // stack.kv_heads)
        codes = groups * stack.head * parts[0] if cached and self.cache_bits != 32 else 0  # of keys, and again of values
        read = groups * parts[0] * sum(n for _, n in layout_of(4, stack.head)) if codes and self.cache_bits == 4 else codes
        scales = codes if self.cache_bits == 8 else 0  # which go to the scores and the weights
        scaled = groups * rows * parts[0]
        for i, slots in enumerate(parts):
            if codes and not i:
                self.plain("quantize", (read, codes))
            self.matmul(groups, rows, stack.head, slots)
            if scales and not i:
                self.plain("elementwise", (scaled + groups * slots, scaled))
        scores = groups * rows * seen
        self.alive = max(self.alive, 2 * self.call.rows * stack.dim + 2 * scores + codes)
        if len(parts) > 1:
            self.plain("elementwise", (scores, scores))
        self.plain("elementwise", (scores + self.call.rows * seen, scores))
        self.plain("softmax", (scores, scores))
        for i, slots in enumerate(parts):
            if scales and not i:
                self.plain("elementwise", (scaled + groups * slots, scaled))
            if codes and not i:
                self.plain("quantize", (read, codes))
            self.matmul(groups, rows, slots, stack.head)
        out = self.call.rows * wide
        self.plain("elementwise", *[(2 * out, out)] * (len(parts) - 1))
        self.linear(f"{name}.o", wide, stack.dim, self.config.out_bias)

    def add_to(self, dim: int) -> None:
        """The sum with what went around."""
        self.plain("elementwise", (2 * self.call.rows * dim, self.call.rows * dim))

    def feed_forward(self, name: str, stack: Stack) -> None:
        inner = self.call.rows * stack.ffn
        self.alive = max(self.alive, 2 * self.call.rows * stack.dim + (3 if self.config.gated else 2) * inner)
        if self.config.gated:
            self.linear(f"{name}.gate", stack.dim, stack.ffn, self.config.ffn_bias)
            self.add(self.config.activation, "activation", inner, inner)
        self.linear(f"{name}.up", stack.dim, stack.ffn, self.config.ffn_bias)
        if self.config.gated:
            self.plain("elementwise", (2 * inner, inner))
        else:
            self.add(self.config.activation, "activation", inner, inner)
        self.linear(f"{name}.down", stack.ffn, stack.dim, self.config.ffn_bias)

    def embed(self, name: str, dim: int) -> None:
        n = self.call.rows * dim
        self.add(name, "embedding", n, n, weight=f"{name}.weight", weight_shape=(self.config.vocab, dim), rows=self.config.vocab, cols=dim)

    def head(self, dim: int, rows: int) -> None:
        """A matrix of its own in every program, even where the model ties it to the embedding: the two are stored differently."""
        self.linear("head", dim, self.config.vocab, self.config.head_bias, rows=rows)


@dataclass(frozen=True)
class Program:
    """A method's units; where equal layers were written once, `times` says how many each unit stands for."""

    graph: MethodGraph
    times: tuple[int, ...]

    @property
    def macs(self) -> int:
        return sum(u.macs * n for u, n in zip(self.graph.units, self.times, strict=True))


def _runs(tape: Tape, kinds: list[tuple[int, ...]]) -> Iterator[int]:
    """The layers to write: every one, or the first of each run of equal `kinds`."""
    for i, kind in enumerate(kinds):
        if tape.alike and i and kinds[i - 1] == kind:
            continue
        tape.layers = next((j for j in range(i, len(kinds)) if kinds[j] != kind), len(kinds)) - i if tape.alike else 1
        yield i
    tape.layers = 1


def _layer(tape: Tape, name: str, stack: Stack, self_parts: tuple[int, ...], reads: bool, source: int, cached: bool = False) -> None:
    """Self-attention over `self_parts`, cross-attention where there is a source, feed-forward. `reads`: keys and values are given."""
    rope = tape.config.positions == "rope"
    tape.norm(f"{name}.self_norm", stack.dim)
    if not reads:
        tape.keys_values(f"{name}.self_attn", stack, stack.dim, rope)
    tape.queries(f"{name}.self_attn", stack, self_parts, rope, cached)
    tape.add_to(stack.dim)
    if source:
        tape.norm(f"{name}.cross_norm", stack.dim)
        tape.queries(f"{name}.cross_attn", stack, (source,), False, True)
        tape.add_to(stack.dim)
    tape.norm(f"{name}.ffn_norm", stack.dim)
    tape.feed_forward(f"{name}.ffn", stack)
    tape.add_to(stack.dim)


def _info(name: str, *shape: int, dtype: str = "float32") -> TensorInfo:
    return TensorInfo.model_construct(name=name, shape=shape, dtype=dtype)


def _pairs(kind: str, count: int, *shape: int) -> list[TensorInfo]:
    return [t for i in range(count) for t in _held(kind, i, *shape)]


def _held(kind: str, i: int, *shape: int, bits: int = 32) -> list[TensorInfo]:
    """One cache as inputs, as `caches.held` gives it."""
    kinds = layout_of(bits, shape[-1])
    names = [f"{kind}_{part}_{i}" for part in ("k", "v", "k_scale", "v_scale")]
    found = [(dtype, width) for dtype, width in kinds for _ in "kv"]
    return [_info(n, *shape[:-1], *([w] if w else []), dtype=d) for n, (d, w) in zip(names, found, strict=False)]


def _method(name: str, tape: Tape, inputs: list[TensorInfo], outputs: list[TensorInfo], calls: int = 1) -> Program:
    graph = MethodGraph.model_construct(
        name=name, units=tuple(tape.units), inputs=tuple(inputs), outputs=tuple(outputs), peak_activation_bytes=4 * tape.alive, unroll=calls,
        cache_inputs=tuple(t.name for t in inputs if t.name.startswith("self_")), cross_cache_inputs=tuple(t.name for t in inputs if t.name.startswith("cross_")),
    )  # fmt: skip
    return Program(graph, tuple(tape.times))


def encode(config: SequenceConfig, batch: int, source: int, *, alike: bool = False) -> Program:
    """The encoder over `source` tokens, with the decoder's keys and values of its output; the logits of every token in the CTC layout."""
    stack, call = config.encoder, Call(batch, source)
    assert stack is not None
    tape = Tape(config, call, alike=alike)
    tape.embed("embed" if config.decoder is None or config.decoder.dim == stack.dim else "source_embed", stack.dim)
    for i in _runs(tape, [(stack.of(i).ffn,) for i in range(stack.layers)]):
        _layer(tape, f"encoder.layers.{i}", stack.of(i), (source,), False, 0)
    if config.final_norm:
        tape.norm("encoder.final_norm", stack.dim)
    inputs = [_info("source", batch, source, dtype="int64"), _info("source_mask", batch, source)]
    if config.decoder is None:
        tape.head(stack.dim, call.rows)
        return _method("encode", tape, inputs, [_info("logits", batch, source, config.vocab)])
    for i in _runs(tape, [()] * config.decoder.layers):
        tape.keys_values(f"decoder.layers.{i}.cross_attn", config.decoder, stack.dim, False)
    shape = (batch, config.decoder.kv_heads, source, config.decoder.head)
    return _method("encode", tape, inputs, _pairs("cross", config.decoder.layers, *shape))


def _decoder(tape: Tape, stack: Stack, slots: int, source: int, last: bool = False) -> None:
    """All layers over the call's tokens, with `slots` cached ones where there are any.

    `last`: only one token's logits are wanted: readers of a shared cache, and the final norm, see that token alone.
    """
    config, made = tape.config, tape.call.tokens
    tape.embed("embed", stack.dim)
    spans = [stack.window(i) or slots for i in range(stack.layers)]
    reading = [config.shared_from is not None and i >= config.shared_from for i in range(stack.layers)]
    widths = [stack.of(i).ffn for i in range(stack.layers)]
    for i in _runs(tape, list(zip(spans, reading, widths, strict=True))):
        if i == config.shared_from:
            layers, tape.layers = tape.layers, 1
            tape.norm("decoder.shared.norm", stack.dim)
            tape.keys_values("decoder.shared", stack, stack.dim, config.positions == "rope")
            tape.call = replace(tape.call, tokens=1) if last else tape.call
            tape.layers = layers
        parts = (spans[i], made) if slots else (made,)
        _layer(tape, f"decoder.layers.{i}", stack.of(i), parts, reading[i], source, bool(slots))
    if config.final_norm:
        tape.norm("decoder.final_norm", stack.dim, rows=tape.call.batch if last else None)


def cache_slots(config: SequenceConfig, slots: int) -> list[int]:
    """The slots of each self-attention cache, in the order of the inputs."""
    stack = config.decoder
    if stack is None:
        return []
    own = stack.layers if config.shared_from is None else config.shared_from
    held = [stack.window(i) or slots for i in range(own)]
    return held if config.shared_from is None else [*held, slots]


def prefill(config: SequenceConfig, batch: int, tokens: int, *, alike: bool = False) -> Program:
    """The prompt at once: logits of its last token, and keys and values of all."""
    stack = config.decoder
    assert stack is not None
    tape = Tape(config, Call(batch, tokens), alike=alike)
    _decoder(tape, stack, 0, 0, last=True)
    tape.head(stack.dim, batch)
    inputs = [_info("tokens", batch, tokens, dtype="int64"), _info("positions", batch, tokens, dtype="int64")]
    inputs += [_info("last", batch, dtype="int64"), _info("mask", batch, tokens)]
    made = _pairs("new", len(cache_slots(config, tokens)), batch, stack.kv_heads, tokens, stack.head)
    return _method("prefill", tape, inputs, [_info("logits", batch, config.vocab), *made])


def decode(
    config: SequenceConfig, batch: int, slots: int, source: int = 0, *, tokens: int = 1, calls: int = 1, alike: bool = False, cache_bits: int = 32
) -> Program:  # fmt: skip
    """`tokens` more tokens, over caches of `slots` and the encoder's `source`, held in `cache_bits`."""
    stack = config.decoder
    assert stack is not None
    tape = Tape(config, Call(batch, tokens, slots, source), alike=alike, cache_bits=cache_bits)
    _decoder(tape, stack, slots, source)
    tape.head(stack.dim, tape.call.rows)
    inputs = [
        _info("tokens", batch, tokens, dtype="int64"),
        _info("positions", batch, tokens, dtype="int64"),
        _info("mask", batch, tokens, slots + tokens),
    ]
    if window := max(stack.windows, default=0):
        inputs.append(_info("window_mask", batch, tokens, window + tokens))
    if source:
        inputs.append(_info("source_mask", batch, source))
        inputs += [t for i in range(stack.layers) for t in _held("cross", i, batch, stack.kv_heads, source, stack.head, bits=cache_bits)]
    held = cache_slots(config, slots)
    inputs += [t for i, n in enumerate(held) for t in _held("self", i, batch, stack.kv_heads, n, stack.head, bits=cache_bits)]
    outputs = [_info("logits", batch, tokens, config.vocab), *_pairs("new", len(held), batch, stack.kv_heads, tokens, stack.head)]
    return _method("decode", tape, inputs, outputs, calls)


def programs(
    config: SequenceConfig, batch: int, source: int, slots: int, output: int, *, alike: bool = False, cache_bits: int = 32
) -> tuple[Program, ...]:  # fmt: skip
    """What answers `output` tokens to a bucket of `source`; `slots` are what the answer's caches hold at most.

    Programs are in the order they run, `unroll` is how often; the first token is there when each has run once, where there is an encoder,
    and after `prefill` where there is none. `alike`: equal layers are written once.
    """
    if config.decoder is None:
        return (encode(config, batch, source, alike=alike),)
    if config.encoder is not None:
        return encode(config, batch, source, alike=alike), decode(
            config, batch, slots, source, calls=output, alike=alike, cache_bits=cache_bits
        )  # fmt: skip
    return prefill(config, batch, source, alike=alike), decode(
        config, batch, source + slots, calls=max(output - 1, 0), alike=alike, cache_bits=cache_bits
    )  # fmt: skip
