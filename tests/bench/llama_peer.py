"""llama.cpp as a peer of whole models: a model of ours with its own weights as a GGUF file, and its times. Called by `layout_programs.py`.

Decoder-only models alone, as its `llama` architecture has them: RMS norms before the layers, no biases, a gated SiLU feed-forward, rotary
positions, a tied head. (Its `t5` computes keys and values of the source anew for every token.)
The libraries are those that `kernels_x86 --install` builds; the bindings and the writer come from the same source package.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgesdk.sequence.config import SequenceConfig, Stack
from tests.bench.kernels_x86_peers import ggml_path

KINDS = {"Q4_0": 2, "Q4_K": 14, "Q8_0": 7}
"""Weights → llama.cpp's number of the kind of file; every matrix is of it, the embedding, which is the head, too."""


def _source() -> Path:
    """The source package of llama-cpp-python beside what was built of it. Raises `ImportError`."""
    built = ggml_path()
    found = next((p.parent for folder in (built.parents if built else ()) for p in folder.glob("*/llama_cpp")), None)
    if found is None or built is None or not (built / "libllama.so").exists():
        raise ImportError("llama.cpp is not built: python -m tests.bench.kernels_x86 --install")
    return found


def bindings() -> Any:
    """llama-cpp-python's ctypes declarations over the library; its package, which wants more, is left out."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(ggml_path())
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(_source() / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as lib

    _KEPT.append(lib.llama_log_callback(lambda level, text, data: None))
    lib.llama_log_set(_KEPT[-1], None)
    lib.llama_backend_init()
    return lib


_KEPT: list[Any] = []


# ---- a model as a file


def write(config: SequenceConfig, state: dict[str, Any], path: Path, kind: str) -> None:
    """`state`: a `SequenceModel`'s, float32 arrays. Written in float16 first, then rounded by llama.cpp."""
    sys.path.append(str(_source() / "vendor" / "llama.cpp" / "gguf-py"))
    import gguf

    stack = config.decoder
    assert stack is not None and config.tied and config.norm == "rms" and config.norm_place == "pre"
    assert config.encoder is None and config.positions == "rope" and config.gated and config.activation == "silu"
    whole = path.with_suffix(".f16")
    out = gguf.GGUFWriter(str(whole), "llama")
    out.add_vocab_size(config.vocab)
    out.add_tokenizer_model("none")
    out.add_context_length(config.max_positions)
    out.add_embedding_length(stack.dim)
    out.add_feed_forward_length(stack.ffn)
    out.add_head_count(stack.heads)
    out.add_head_count_kv(stack.kv_heads)
    out.add_key_length(stack.head)
    out.add_value_length(stack.head)
    out.add_layer_norm_rms_eps(config.norm_eps)
    out.add_block_count(stack.layers)
    out.add_rope_dimension_count(stack.head)
    out.add_rope_freq_base(config.rope_theta)
    for name, value in tensors(config, state):
        out.add_tensor(name, value.astype(np.float16 if value.ndim == 2 else np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    lib = bindings()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = KINDS[kind], True, 1
    failed = lib.llama_model_quantize(str(whole).encode(), str(path).encode(), ctypes.byref(params))
    whole.unlink()
    if failed:
        raise RuntimeError(f"llama.cpp cannot round {whole} to {kind}")


def tensors(config: SequenceConfig, state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    stack = config.decoder
    assert stack is not None
    yield "token_embd.weight", state["embed.weight"]
    yield "output_norm.weight", state["decoder.final_norm.weight"]
    names = [("self_norm", "attn_norm"), ("ffn_norm", "ffn_norm"), *((f"ffn.{n}", f"ffn_{n}") for n in ("gate", "up", "down"))]
    names += [(f"self_attn.{a}", f"attn_{b}") for a, b in zip("qkvo", ("q", "k", "v", "output"), strict=True)]
    for i in range(stack.layers):
        for ours, theirs in names:
            value = state[f"decoder.layers.{i}.{ours}.weight"]
            yield f"blk.{i}.{theirs}.weight", _paired(value, stack) if ours in ("self_attn.q", "self_attn.k") else value


def _paired(weight: Any, stack: Stack) -> Any:
    """Rotary channels that are turned together side by side; ours lie half a head apart."""
    return weight.reshape(-1, 2, stack.head // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


# ---- running


class Llama:
    """A file opened by llama.cpp for `source` tokens and `slots` more."""

    def __init__(self, path: Path, config: SequenceConfig, threads: int, source: int, slots: int) -> None:
        self.lib, self.config = bindings(), config
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = source + slots, source, source
        params.n_threads = params.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp refuses {path}")
        self.memory = self.lib.llama_get_memory(self.context)

    def call(self, tokens: Any, first: int) -> None:
        """Tokens from position `first` on, the last one's logits wanted."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), first + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
        failed = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp: {failed}")

    def forget(self, first: int) -> None:
        self.lib.llama_memory_seq_rm(self.memory, 0, first, -1)

    def logits(self) -> Any:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.config.vocab,)).copy()


def timed(path: Path, config: SequenceConfig, threads: int, seconds: float, tokens: Any, slots: int, status: Any) -> dict[str, Any]:
    """As `layout_programs.timed`: `tokens` read, then a token behind a full cache, again and again."""
    before, start = status(), time.perf_counter()
    llama = Llama(path, config, threads, len(tokens), slots)
    llama.call(tokens, 0)
    found: dict[str, Any] = {
        "samples_s": {},
        "cpu_samples_s": {},
        "logits": llama.logits().tolist(),
        "opened_s": time.perf_counter() - start,
    }
    filled = len(tokens) + slots - 1
    for method in ("prefill", "decode"):
        if method == "decode":  # up to where the last token goes
            llama.forget(len(tokens))
            for first in range(len(tokens), filled, len(tokens)):
                llama.call(np.resize(tokens, min(len(tokens), filled - first)), first)
        wall: list[float] = []
        cpu: list[float] = []
        end = time.perf_counter() + seconds
        while len(wall) < 3 or time.perf_counter() < end:
            at = filled if method == "decode" else 0
            llama.forget(at)
            clock, used = time.perf_counter(), time.process_time()
            llama.call(tokens if method == "prefill" else [1], at)
            cpu.append(time.process_time() - used)
            wall.append(time.perf_counter() - clock)
        found["samples_s"][method], found["cpu_samples_s"][method] = wall, cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"before": before, "after": status(), "peak_bytes": peak, "file_bytes": path.stat().st_size}
