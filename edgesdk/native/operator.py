"""`edgesdk::linear`, an operator of PyTorch and of ExecuTorch: a linear layer on our kernels, its weights one tensor of bytes.

The bytes: a head (`_HEAD`), then every array of the panels at a multiple of 64 bytes. The head holds the args of a product, those that are
addresses as offsets into the bytes, so that operator.cpp fills in what a call adds and no more.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesdk.errors import CheckFailed
from edgesdk.kernels.library import LINEAR_ARGS, ROUND_ARGS, Library
from edgesdk.kernels.pack import pack
from edgesdk.kernels.panels import BLOCK, LAYOUT
from edgesdk.kernels.tape import Rows, Tape

if TYPE_CHECKING:
    from edgesdk.packed import Code

OPERATOR = "edgesdk::linear"
_NUMBERS = ("layout", "rows", "cols", "blocks", "padded", "panels", "together", "panel_bytes", "shift")
_HEAD = np.dtype(
    [(name, "<i8") for name in _NUMBERS]
    + [("target", "S32"), ("form", "S32"), ("args", "<i8", len(LINEAR_ARGS)), ("kinds", "<i8", len(LINEAR_ARGS)), ("precision", "S32")]
)
"""As operator.cpp reads it. `kinds`: 1 for an offset; `form`: the end of the kernels' names; `precision`: for readers of programs alone."""
_ALIGNED = 64


class _Names:
    """`library.Library` of a target that writes down which kernels it is asked for."""

    def __init__(self, kernels: Library) -> None:
        self.target, self.lanes, self.together, self.half = kernels.target, kernels.lanes, kernels.together, kernels.half
        self.shift_of = kernels.shift_of
        self.names: list[str] = []

    def address(self, name: str) -> int:
        self.names.append(name)
        return 0

    def run(self, steps: Any, threads: int) -> None:
        raise NotImplementedError("these kernels have no addresses")


def packed(code: Code, kernels: Library, bias: Any = None, precision: str = "native") -> Any:
    """The operator's weights as uint8 [n], for the target of `kernels`. Raises `panels.UnfitWeights`."""
    asked = _Names(kernels)
    p, tape = pack(code, asked.lanes, asked.together, asked.half), Tape(asked)
    padded = len(p.row_scale)
    arrays = [a for a in (getattr(p, f.name) for f in fields(p)) if isinstance(a, np.ndarray) and a.size]
    whole = None
    if bias is not None:
        whole = np.zeros(padded, np.float32)
        whole[: p.rows] = bias
        arrays.append(whole)
    shift = asked.shift_of(p.value_bits)
    args = tape.linear(p, tape.round(tape.room(1, p.cols), shift), Rows(np.zeros((1, padded), np.float32), p.rows), bias=whole)
    places, at = {}, -(-_HEAD.itemsize // _ALIGNED) * _ALIGNED
    for array in arrays:
        places[array.ctypes.data] = at
        at += -(-array.nbytes // _ALIGNED) * _ALIGNED
    out = np.zeros(at, np.uint8)
    for array in arrays:
        first = places[array.ctypes.data]
        out[first : first + array.nbytes] = array.reshape(-1).view(np.uint8)
    head = np.zeros((), _HEAD)
    numbers = (LAYOUT, p.rows, p.cols, p.blocks, padded, p.panels, asked.together, p.nbytes // p.panels, shift)
    for name, value in zip(_NUMBERS, numbers, strict=True):
        head[name] = value
    head["target"], head["form"], head["precision"] = asked.target, asked.names[-1].partition("_")[2], precision
    for i, (name, value) in enumerate(zip(LINEAR_ARGS, args.tolist(), strict=True)):
        number = name.endswith("_bytes") or name == "blocks"  # else an address: of the weights, or what a call brings
        head["kinds"][i], head["args"][i] = int(not number and value in places), value if number else places.get(value, 0)
    out[: _HEAD.itemsize] = np.frombuffer(head.tobytes(), np.uint8)
    return out


def head_of(content: Any) -> Any:
    """The head of an operator's weights. Raises `CheckFailed` where they are none of this layout."""
    content = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else np.asarray(content, np.uint8)
    if content.size >= _HEAD.itemsize:
        head = np.frombuffer(content[: _HEAD.itemsize].tobytes(), _HEAD)[0]
        if head["layout"] == LAYOUT:
            return head
    raise CheckFailed(f"weights of {OPERATOR} that are not in layout {LAYOUT}", "build the program again with this version")


def linear(x: Any, content: Any) -> Any:
    """x float32 [..., cols] → [..., rows], by the kernels of this machine. `content` as `packed` made it, which stays where it is.

    Raises `ImportError` where this CPU has not the instructions that the weights are packed for.
    """
    from edgesdk.kernels.library import library

    head = head_of(content)
    if x.shape[-1:] != (head["cols"],):
        raise ValueError(f"{OPERATOR}: inputs of shape {x.shape} for weights of {head['cols']} columns")
    kernels = library(head["target"].decode())
    m = x.size // int(head["cols"])
    rows, out = (np.zeros((m, n), np.float32) for n in (int(head["blocks"]) * BLOCK, int(head["padded"])))
    rows[:, : head["cols"]] = x.reshape(m, -1)
    tape = Tape(kernels)
    rounded = tape.round(Rows(rows, int(head["cols"])), int(head["shift"]))
    base = content.ctypes.data
    args = np.where(head["kinds"] == 1, head["args"] + base, head["args"])
    given = {"q": rounded.q, "q_sums": rounded.q_sums, "q_scale": rounded.q_scale, "q_zero": rounded.q_zero, "out": out}
    for name, array in given.items():
        args[LINEAR_ARGS.index(name)] = array.ctypes.data
    args[LINEAR_ARGS.index("m")], args[LINEAR_ARGS.index("stride")] = m, out.strides[0]
    parts = int(head["panels"]) // (1 if m == 1 else int(head["together"]))
    tape.add(f"{'gemv' if m == 1 else 'gemm'}_{head['form'].decode()}", parts, **dict(zip(LINEAR_ARGS, args.tolist(), strict=True)))
    if m:
        tape.run()
    return out[:, : head["rows"]].reshape(*x.shape[:-1], int(head["rows"]))


@lru_cache(maxsize=1)
def register() -> Any:
    """The operator, known to PyTorch from now on; `torch.ops.edgesdk.linear(x, packed, rows)`."""
    import torch

    library: Any = torch.library.Library
    made = library("edgesdk", "FRAGMENT")
    made.define("linear(Tensor x, Tensor packed, int rows) -> Tensor")
    made.define("linear.out(Tensor x, Tensor packed, int rows, *, Tensor(a!) out) -> Tensor(a!)")

    def run(x: torch.Tensor, content: torch.Tensor, rows: int) -> torch.Tensor:
        answer = linear(np.ascontiguousarray(x.detach().numpy(), np.float32), content.numpy())
        return torch.from_numpy(np.ascontiguousarray(answer))

    def run_out(x: torch.Tensor, content: torch.Tensor, rows: int, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(run(x, content, rows))

    def shape(x: torch.Tensor, content: torch.Tensor, rows: int) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], rows))

    made.impl("linear", run, "CompositeExplicitAutograd")
    made.impl("linear.out", run_out, "CompositeExplicitAutograd")
    torch.library.register_fake(OPERATOR, shape, lib=made)
    return made


def native_linear(content: Any, rows: int) -> Any:
    """A torch module of `edgesdk::linear` on these bytes."""
    import torch

    register()

    class NativeLinear(torch.nn.Module):
        """A linear layer on our kernels."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.from_numpy(np.array(content)))

        def forward(self, x: torch.Tensor) -> Any:
            return torch.ops.edgesdk.linear(x, self.packed, rows)

    return NativeLinear()


MACROS = {
    "EDGE_LAYOUT": LAYOUT, "EDGE_LINEAR_ARGS": len(LINEAR_ARGS), "EDGE_ROUND_ARGS": len(ROUND_ARGS),
    **{f"EDGE_AT_LINEAR_{name}": i for i, name in enumerate(LINEAR_ARGS)}, **{f"EDGE_AT_ROUND_{name}": i for i, name in enumerate(ROUND_ARGS)},
}  # fmt: skip
"""What operator.cpp is told of the kernels' interface."""
