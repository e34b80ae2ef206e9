"""The runner of a native program: `encode`, `prefill` and `decode` as tapes of kernels over inputs that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgesdk.kernels.attention import kernel, room
from edgesdk.kernels.library import Library, args_of, bits_of, library
from edgesdk.kernels.panels import FloatPanels, Panels, read
from edgesdk.kernels.tape import Rows, Tape, panel_sizes, singles

from .masks import Masks
from .parts import Part, Reshaped, Taken, Weights, wide, window
from .program import Program

TURNED = 3
"""Rows of inputs from which single weights meet them as columns."""
LIBRARY = "libedgekernels.so"
"""Beside a program, for a device that compiles nothing."""


class Machine:
    """`run(method, arrays)` as a runtime's runner has it. Raises `ProgramError` for a damaged file and `KeyError` for an unknown method."""

    def __init__(self, path: str, threads: int = 1, kernels: Library | None = None) -> None:
        self.program, self.threads = Program(path), threads
        self.kernels = kernels or library(self.program.target, str(Path(path).with_name(LIBRARY)))
        self.methods = tuple(sorted(self.program.methods))
        self._open: dict[str, Method] = {}
        self._panels: dict[str, Panels] = {}

    def inputs(self, method: str) -> list[tuple[tuple[int, ...], str]]:
        return [(tuple(shape), dtype) for _, shape, dtype in self.program.methods[method]["inputs"]]

    def tape(self, method: str) -> Any:
        """What a method is written on."""
        return Tape(self.kernels, self.threads)

    def run(self, method: str, arrays: Sequence[Any]) -> list[Any]:
        return self._opened(method).run(arrays)

    def steps(self, method: str, arrays: Sequence[Any], runs: int) -> list[tuple[str, str, list[float]]]:
        """(part of the model, kernel, seconds in each of `runs` runs) of every step."""
        return self._opened(method).steps(arrays, runs)

    def _opened(self, method: str) -> Method:
        if method not in self._open:
            self._open[method] = Method(self, method)
        return self._open[method]

    def panels(self, name: str) -> Panels:
        if name not in self._panels:
            self._panels[name] = read(self.program.panels[name], lambda part: self.program.array(f"{name}.{part}"))
        return self._panels[name]

    def weights(self, path: str) -> Weights:
        entry = self.program.linears[path]
        name = entry["panels"]
        bias = self.program.array(f"{name}.bias") if entry["bias"] else None
        return Weights(self.panels(name), bias, entry["first"], entry["rows"], name)


class Method:
    """One program, written as a tape when it is first run."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.program, self.kernels = machine, machine.program, machine.kernels
        self.sizes = self.program.methods[name]
        self.config: dict[str, Any] = self.program.config
        self.number = {n: i for i, (n, _, _) in enumerate(self.sizes["inputs"])}
        self.dtypes = [np.dtype(d) for _, _, d in self.sizes["inputs"]]
        self.shapes = [tuple(s) for _, s, _ in self.sizes["inputs"]]
        self.tape: Tape = machine.tape(name)
        self.patches: list[tuple[Any, int, int]] = []
        self.before: list[Callable[[Sequence[Any]], None]] = []
        self.outputs: list[Any] = []
        self._heads: dict[Any, Any] = {}
        self.batch = int(self.sizes["batch"])
        {"encode": self._encode, "prefill": self._decode, "decode": self._decode, "draft": self._decode}[self.sizes["role"]]()

    @property
    def nbytes(self) -> int:
        """Bytes of what is computed: rooms, heads, scores and masks."""
        return self.tape.nbytes + sum(int(a.nbytes) for a in {id(a): a for a in self._heads.values()}.values())

    # ---- running

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        given = self._given(arrays)
        self.tape.run()
        del given  # its memory was read until here
        return [np.array(o) for o in self.outputs]

    def steps(self, arrays: Sequence[Any], runs: int) -> list[tuple[str, str, list[float]]]:
        """(part of the model, kernel, seconds in each run) of every step, in order."""
        given = self._given(arrays)
        times = [self.tape.timed() for _ in range(runs)]
        del given
        return [(place, name, [t[i] for t in times]) for i, (place, name) in enumerate(self.tape.names)]

    def _given(self, arrays: Sequence[Any]) -> list[Any]:
        """The inputs as the tape reads them: it does as long as they are held."""
        given = [np.ascontiguousarray(a, d) for a, d in zip(arrays, self.dtypes)]  # noqa: B905 (Python 3.9)
        self._check_ids(given)
        for args, place, number in self.patches:
            args[place] = given[number].ctypes.data
        for fill in self.before:
            fill(given)
        return given

    def _check_ids(self, given: Sequence[Any]) -> None:
        """No kernel looks up a row that is not there. Raises `ValueError`."""
        for name in ("source", "tokens"):
            if name in self.number:
                ids = given[self.number[name]]
                if ids.size and (ids.min() < 0 or ids.max() >= self.config["vocab"]):
                    raise ValueError(f"token ids from {ids.min()} to {ids.max()}: the vocabulary has {self.config['vocab']}")

    def patch(self, name: str, args: Any, arg: str, source: int | str) -> None:
        """Before each run, `arg` of a kernel's args is the address of an input."""
        number = self.number[source] if isinstance(source, str) else source
        self.patches.append((args, args_of(name).index(arg), number))

    # ---- parts of a model

    def stack(self, side: str) -> dict[str, Any]:
        found: dict[str, Any] = self.config[side]
        return found

    def norm_of(self, path: str) -> tuple[Any, Any, float]:
        bias = self.program.array(f"{path}.bias") if self.program.has(f"{path}.bias") else None
        return self.program.array(f"{path}.weight"), bias, self.config["norm_eps"]

    @property
    def norm(self) -> str:
        return "rms" if self.config["norm"] == "rms" else "layer"

    def taken(self, x: Rows, *, norm: str = "") -> Taken:
        """x, behind the norm at path `norm`, as products take it."""
        if not norm:
            return Taken(self.tape, x)
        out = self.tape.room(x.rows, x.cols, "normed")
        return Taken(self.tape, out, lambda shift: self.tape.round(x, shift, before=self.norm, norm=self.norm_of(norm), out=out))

    def product(self, panels: Panels, x: Taken, out: Rows, **more: Any) -> None:
        """out = x · Wᵀ, and `more` of what the tape's products take."""
        if isinstance(panels, FloatPanels):
            self.tape.floats(panels, x.floats(), out, **more)
        else:
            self.tape.linear(panels, x.rounded(self.kernels.shift_of(panels.value_bits)), out, **more)

    def apart(self, path: str, x: Taken, out: Rows) -> None:
        """Add what of a matrix is kept apart: products of two thin ones, and single weights."""
        self.tape.place = path
        for i, kind in enumerate(self.program.linears[path].get("plus", ())):
            name = f"{path}.plus{i}"
            if kind == "sparse":
                starts, columns, values = (self.program.array(f"{name}.{part}") for part in ("starts", "columns", "values"))
                turned = x.turned() if out.rows >= TURNED and isinstance(self.tape, Tape) else None
                singles(self.tape, x.rows, turned, (starts, columns, values), out)
                continue
            down, up = (self.machine.panels(f"{name}.{part}") for part in ("down", "up"))
            thin = self.tape.room(out.rows, down.rows, "thin")
            self.product(down, x, thin)
            self.tape.linear(up, self.tape.round(thin, self.kernels.shift_of(up.value_bits), key="thin"), out, residual=out)

    def project(self, paths: Sequence[str], x: Rows, *, norm: str = "", once: bool = True) -> list[Rows]:
        """x, behind the norm at path `norm`, times each matrix. What is used `once`, before the next layer, makes room for the next layer's."""
        taken, made, found = self.taken(x, norm=norm), {}, []
        for path in paths:
            w = self.machine.weights(path)
            self.tape.place = path
            if w.name not in made:
                made[w.name] = self.tape.room(x.rows, w.panels.rows, path.rpartition(".")[2] * once)
                self.product(w.panels, taken, made[w.name], bias=w.bias)
            found.append(made[w.name].part(w.first, w.rows))
        for path, out in zip(paths, found):  # noqa: B905 (Python 3.9)
            self.apart(path, taken, out)
        return found

    def embed(self, path: str, ids: str, side: str, places: Any) -> Rows:
        """Embeddings [B · N, dim]. `places`: the int64 array of positions that are looked up or computed from, where the model has some."""
        entry = self.program.linears[path]
        self.tape.place = path
        rows, cols = int(np.prod(self.shapes[self.number[ids]])), int(entry["cols"])
        out = self.tape.room(rows, cols)
        values: dict[str, Any] = {"factor": bits_of(entry["factor"]), "blocks": out.blocks, "out": out, "stride": out.stride}
        name = "embed"
        if "panels" in entry:
            p = self.machine.panels(entry["panels"])
            name = f"embed_{p.form}"
            values |= {
                "codes": p.codes,
                "scales": p.scales,
                "zeros": p.zeros,
                "row_scale": p.row_scale,
                "tables": p.tables,
                **panel_sizes(p),
            }
        else:
            values["codes"] = wide(self.program.array(f"{path}.table"), out)
        table = self._places(side, cols)
        if table is not None:
            values |= {"places": wide(table, out), "at": places}
            values["offset"] = self.config["position_offset"] if self.config["positions"] == "learned" else 0
        self.patch(name, self.tape.add(name, rows, max(1, 4096 // cols), **values), "ids", ids)
        if self.config["embed_norm"]:
            self.tape.norm(out, self.norm, self.norm_of(f"{side}.embed_norm"), out)
        return out

    def _places(self, side: str, cols: int) -> Any:
        """Rows that positions add to embeddings, float32 [positions, cols], or None."""
        if self.config["positions"] == "learned":
            return self.program.array(f"{side}.position.weight")
        if self.config["positions"] != "sinusoidal":
            return None
        turns = 10000.0 ** (-2.0 * np.arange(cols // 2) / cols)
        most = max(
            int(self.config["max_positions"]), max(m["cache"] + m["source"] + m["tokens"] for m in self.program.methods.values()) + 1
        )
        angles = np.arange(most)[:, None] * turns[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)

    def heads(
        self, x: Rows, n: int, count: int, size: int, *, norm: str = "", turned: Any = None, scale: float = 1.0, key: str = ""
    ) -> Any:
        """[B · N, count · size] → an array [B, count, N, size]; with a `key` the next layer's overwrite it."""
        shape = (x.rows // n, count, n, size)
        out = self._heads.setdefault((key, shape), np.zeros(shape, np.float32)) if key else np.zeros(shape, np.float32)
        self._heads[id(out)] = out
        name = "heads" + "_normed" * bool(norm) + "_turned" * (turned is not None) + f"_{size}"
        more: dict[str, Any] = {"cos": turned[0], "sin": turned[1]} if turned is not None else {}
        more |= {"weight": self.program.array(f"{norm}.weight"), "eps": bits_of(self.config["norm_eps"])} if norm else {}
        least = max(1, 16384 // (count * size))
        self.tape.add(name, x.rows, least, x=x, stride=x.stride, n=n, heads=count, scale=bits_of(scale), out=out, **more)
        return out

    def attend(self, q: Any, parts: Sequence[Part], mask: tuple[Any, int, int, int], stack: dict[str, Any]) -> Rows:
        """q [B, H, N, D] → [B · N, H · D]. `mask`: an array or an input's name, and bytes from a batch, a head and a row to the next."""
        b, h, n, size = q.shape
        out = self.tape.room(b * n, h * size, "attended")
        old, new = (parts[0], parts[1]) if len(parts) == 2 else (parts[0], None)
        slots, tokens = old.tokens, new.tokens if new is not None else 0
        values: dict[str, Any] = {
            "q": q, "slots": slots, "tokens": tokens, "n": n, "heads": h, "shared": h // stack["kv_heads"], "out": out, "stride": out.stride,
            "mask_batch": mask[1], "mask_head": mask[2], "mask_row": mask[3],
        }  # fmt: skip
        later = [] if old.scales is None else list(zip(("key_scales", "value_scales"), old.scales))  # noqa: B905 (Python 3.9)
        for part, (key, value) in ((old, ("keys", "values")), (new, ("new_keys", "new_values"))):
            for arg, what in ((key, part.keys), (value, part.values)) if part is not None else ():
                if isinstance(what, str):
                    later.append((arg, what))
                else:
                    values[arg] = what
        if isinstance(mask[0], str):
            later.append(("mask", mask[0]))
        else:
            values["mask"] = mask[0]
        form = self._form(old)
        name = kernel(form, size)
        values["scores"] = room(form, size, b * h, slots + tokens)
        args = self.tape.add(name, b * h, max(1, 32768 // (n * (slots + tokens) * size)), **values)
        for arg, what in later:
            self.patch(name, args, arg, what)
        return out

    def _form(self, part: Part) -> str:
        """What its keys and values are held in, of `kernels.attention.FORMS`."""
        kind = str(self.dtypes[self.number[part.keys]]) if isinstance(part.keys, str) else "float32"
        return {"float32": "", "float16": "half", "int8": "int8", "uint8": "int4"}[kind]

    # ---- layers

    def self_attention(
        self,
        path: str,
        x: Rows,
        n: int,
        stack: dict[str, Any],
        turned: Any,
        mask: Any,
        cache: Part | None,
        shared: Sequence[Part],
        norm: str,
    ) -> tuple[Rows, Part | None]:
        """Heads side by side [B · N, H · D], and the new keys and values."""
        size, kv = stack["head"], stack["kv_heads"]
        names = [f"{path}.q"] if shared else [f"{path}.{i}" for i in "qkv"]
        found = self.project(names, x, norm=norm)
        made = None
        if not shared:
            made = self.keys_values(path, found[1], found[2], n, kv, size, turned)
        parts = shared or [p for p in (cache, made) if p is not None]
        self.tape.place = path
        q = self.heads(
            found[0],
            n,
            stack["heads"],
            size,
            norm=f"{path}.q_norm" * bool(self.config["qk_norm"]),
            turned=turned,
            scale=self.scale(stack),
            key="q",
        )
        return self.attend(q, parts, mask, stack), made

    def keys_values(self, path: str, k: Rows, v: Rows, n: int, kv: int, size: int, turned: Any) -> Part:
        self.tape.place = path
        norm = f"{path}.k_norm" if self.config["qk_norm"] and self.program.has(f"{path}.k_norm.weight") else ""
        keys = ("", "") if path.startswith("decoder") else ("k", "v")  # a decoder's are outputs
        return Part(self.heads(k, n, kv, size, norm=norm, turned=turned, key=keys[0]), self.heads(v, n, kv, size, key=keys[1]), n)

    def scale(self, stack: dict[str, Any]) -> float:
        given = self.config["attention_scale"]
        return float(given if given is not None else stack["head"] ** -0.5)

    def ahead(self, norm: str) -> str:
        """The norm that a layer's input passes first, or "" where norms come behind."""
        return norm if self.config["norm_place"] == "pre" else ""

    def added(self, x: Rows, inner: Taken, path: str, norm: str) -> Rows:
        """x + W · inner with the matrix at `path`; behind it the norm, where norms come behind."""
        pre = self.config["norm_place"] == "pre"
        after = x if pre else self.tape.room(x.rows, x.cols, "added")
        w = self.machine.weights(path)
        self.tape.place = path
        self.product(w.panels, inner, after, bias=w.bias, residual=x)
        self.apart(path, inner, after)
        if not pre:
            self.tape.norm(after, self.norm, self.norm_of(norm), x)
        return x

    def feed_forward(self, layer: str, x: Rows) -> Rows:
        gated, norm = bool(self.config["gated"]), f"{layer}.ffn_norm"
        found = self.project([f"{layer}.ffn.{n}" for n in (("gate", "up") if gated else ("up",))], x, norm=self.ahead(norm))
        first, other = found[0], found[1] if gated else None
        inner = Taken(
            self.tape, first, lambda shift: self.tape.round(first, shift, before=self.config["activation"], other=other, out=first)
        )
        return self.added(x, inner, f"{layer}.ffn.down", norm)

    # ---- programs

    def _encode(self) -> None:
        stack, n = self.stack("encoder"), int(self.sizes["source"])
        positions = np.tile(np.arange(n, dtype=np.int64), (self.batch, 1))
        path = "source_embed" if "source_embed" in self.program.linears else "embed"
        x = self.embed(path, "source", "encoder", positions)
        masks = Masks(self, "encoder", positions)
        turned = self._turned("encoder", positions)
        for i in range(stack["layers"]):
            layer = f"encoder.layers.{i}"
            mask, norm = masks.of_source(window(stack, i)), f"{layer}.self_norm"
            seen, _ = self.self_attention(f"{layer}.self_attn", x, n, stack, turned, mask, None, (), self.ahead(norm))
            x = self.feed_forward(layer, self.added(x, self.taken(seen), f"{layer}.self_attn.o", norm))
        final = "encoder.final_norm" if self.config["final_norm"] else ""
        if self.config["decoder"] is None:
            self._logits(x, final, (self.batch, n, self.config["vocab"]))
            return
        decoder = self.stack("decoder")
        names = [f"decoder.layers.{i}.cross_attn.{w}" for i in range(decoder["layers"]) for w in "kv"]
        found = self.project(names, x, norm=final, once=False)
        for rows in found:
            self.outputs.append(self.heads(rows, n, decoder["kv_heads"], decoder["head"]))

    def _decode(self) -> None:
        stack, n, prefill = self.stack("decoder"), int(self.sizes["tokens"]), self.sizes["role"] == "prefill"
        layers, shared_from = int(self.sizes.get("layers", stack["layers"])), self.config["shared_from"]
        at = np.zeros((self.batch, n), np.int64)
        self.before.append(lambda given: np.copyto(at, given[self.number["positions"]]))
        x = self.embed("embed", "tokens", "decoder", at)
        masks, turned = Masks(self, "decoder", at), self._turned("decoder", at)
        shared: list[Part] = []
        made: list[Part] = []
        for i in range(layers):
            layer = f"decoder.layers.{i}"
            if i == shared_from:
                new = self._shared(x, n, stack, turned)
                made.append(new)
                shared = [new] if prefill else [self._input("self", i), new]
                if prefill:
                    x, turned = self._alone(x, n, at)
                    masks, n = masks.alone(), 1
            cache = None if prefill or shared else self._input("self", i)
            mask, norm = masks.of_tokens(0 if shared else window(stack, i)), f"{layer}.self_norm"
            seen, pair = self.self_attention(f"{layer}.self_attn", x, n, stack, turned, mask, cache, shared, self.ahead(norm))
            made += [pair] if pair is not None else []
            x = self.added(x, self.taken(seen), f"{layer}.self_attn.o", norm)
            if self.config["encoder"] is not None:
                norm = f"{layer}.cross_norm"
                x = self.added(x, self.taken(self._cross(layer, x, n, i, stack, self.ahead(norm))), f"{layer}.cross_attn.o", norm)
            x = self.feed_forward(layer, x)
        if prefill and shared_from is None:
            x = self._pick(x, n)
        final = "decoder.final_norm" if self.config["final_norm"] else ""
        vocab = self.config["vocab"]
        self._logits(x, final, (self.batch, vocab) if prefill else (self.batch, n, vocab))
        for part in made:
            self.outputs += [part.keys, part.values]

    def _cross(self, layer: str, x: Rows, n: int, i: int, stack: dict[str, Any], norm: str) -> Rows:
        found = self.project([f"{layer}.cross_attn.q"], x, norm=norm)
        self.tape.place = f"{layer}.cross_attn"
        q = self.heads(found[0], n, stack["heads"], stack["head"], scale=self.scale(stack), key="q")
        source = self.shapes[self.number["source_mask"]][1]
        return self.attend(q, [self._input("cross", i)], ("source_mask", 4 * source, 0, 0), stack)

    def _input(self, kind: str, i: int) -> Part:
        """A cache among the inputs: `kind` self or cross."""
        keys, scales = f"{kind}_k_{i}", (f"{kind}_k_scale_{i}", f"{kind}_v_scale_{i}")
        return Part(keys, f"{kind}_v_{i}", self.shapes[self.number[keys]][2], scales if scales[0] in self.number else None)

    def _shared(self, x: Rows, n: int, stack: dict[str, Any], turned: Any) -> Part:
        norm = "decoder.shared.norm" if self.config["norm_place"] == "pre" else ""
        k, v = self.project(["decoder.shared.k", "decoder.shared.v"], x, norm=norm)
        return self.keys_values("decoder.shared", k, v, n, stack["kv_heads"], stack["head"], turned)

    def _pick(self, x: Rows, n: int) -> Rows:
        out = self.tape.room(self.batch, x.cols)
        self.patch("pick", self.tape.add("pick", self.batch, x=x, stride=x.stride, n=n, out=out), "last", "last")
        return out

    def _alone(self, x: Rows, n: int, at: Any) -> tuple[Rows, Any]:
        """The last token of each row, and its turns."""
        alone = np.zeros((self.batch, 1), np.int64)
        self.before.append(lambda given: np.copyto(alone, np.take_along_axis(at, given[self.number["last"]].reshape(-1, 1), 1)))
        return self._pick(x, n), self._turned("decoder", alone)

    def _turned(self, side: str, positions: Any) -> Any:
        """Cosines and sines [B · N, D / 2] of rotary positions, filled before each run, or None."""
        turns = np.array(self.program.header["turns"].get(side, ()), np.float32)
        if not turns.size:
            return None
        cos, sin = (np.zeros((positions.size, turns.size), np.float32) for _ in range(2))

        def fill(_: Sequence[Any]) -> None:
            angles = positions.reshape(-1, 1).astype(np.float32) * turns
            np.cos(angles, out=cos)
            np.sin(angles, out=sin)

        self.before.append(fill)
        return cos, sin

    def _logits(self, x: Rows, norm: str, shape: tuple[int, ...]) -> None:
        w, scale, out = self.machine.weights("head"), np.float32(self.config["logit_scale"]), self.tape.room(x.rows, self.config["vocab"])
        panels = replace(w.panels, row_scale=w.panels.row_scale * scale, sums=w.panels.sums * scale) if scale != 1 else w.panels
        self.tape.place = "head"
        taken = self.taken(x, norm=norm)
        self.product(panels, taken, out, bias=w.bias)
        self.apart("head", taken, out)
        self.outputs.append(Reshaped(out, shape))
