"""Changes of a model's shape as plain data: made once by a method, saved as JSON, made again when the compressed model is loaded.

    {"do": "keep", "method": m, "path": p, "tensor": t, "dim": d, "index": [...]}   keep these rows of a parameter or buffer
    {"do": "split", "path": p, "rank": r}                                           a Linear or Conv becomes two: in → r → out
    {"do": "skip", "path": p}                                                       a block becomes the identity of its first input
    {"do": "set", "path": p, "name": n, "value": v}                                 a number that a module keeps for itself (heads, channels)
    {"do": "drop", "path": p, "index": [...]}                                       entries leave a ModuleList or Sequential; those behind move up
    {"do": "layers", "path": p, "index": [...]}                                     layers leave a stack of a sequence model, with their caches
    {"do": "round", "path": p, "bits": b, "share": s}                               a layer's inputs are rounded before it (see `wrapped`); it moves to p.1
    {"do": "flatten", "path": p, "sizes": [a, b]}                                   a layer's inputs are turned before it; it moves to p.1
A path is that of `named_modules`, without the method: an edit is made in every method whose module has it, once for a module that they share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from edgesdk.compress.fewer_layers import leave
from edgesdk.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from edgesdk.model import ModelSpec

Edit = dict[str, Any]


def apply_edits(spec: ModelSpec, edits: Iterable[Edit]) -> None:
    """Make the edits in the modules of `spec`, in place. Raises `InputError` naming an edit that does not fit the model."""
    gone: list[Any] = []  # a layer may have several names, each with an edit of its own
    for edit in edits:
        if edit["do"] == "layers":
            leave(spec, edit["path"], edit["index"])
            continue
        found = _targets(spec, edit["path"])
        if not found:
            raise InputError(f"{spec.name}: no module '{edit['path']}' to {edit['do']}", "the compressed model was made from another model")
        done: set[int] = set()
        for parent, name, module in found:
            if edit["do"] in ("split", "skip", "round", "flatten"):
                setattr(parent, name, _made(module, edit))
            elif id(module) not in done:
                done.add(id(module))
                _edit(module, edit)
        gone += [module for _, _, module in found]
        if edit["do"] in ("round", "flatten"):  # the layer lives on inside of what took its place
            _forget(gone)
    _forget(gone)


def _forget(modules: list[Any]) -> None:
    for module in modules:
        module.__dict__.pop("_replaced_by", None)
    modules.clear()


def _targets(spec: ModelSpec, path: str) -> list[tuple[Any, str, Any]]:
    """(parent, attribute, module) in every method that has the path; a parent shared by methods only once."""
    found, seen = [], set()
    for entry in spec.methods.values():
        modules = dict(entry.module.named_modules(remove_duplicate=False))
        head, _, name = path.rpartition(".")
        if path in modules and (id(modules[head]), name) not in seen:
            seen.add((id(modules[head]), name))
            found.append((modules[head], name, modules[path]))
    return found


def _made(module: Any, edit: Edit) -> nn.Module:
    """The module that takes another's place; the same one wherever the other is shared."""
    kept = getattr(module, "_replaced_by", None)
    if kept is not None:
        return kept[0]  # type: ignore[no-any-return]
    if edit["do"] in ("round", "flatten"):
        from edgesdk.compress.wrapped import wrap

        new = wrap(module, edit)
    else:
        new = split_module(module, edit["rank"]) if edit["do"] == "split" else skip_module()
    object.__setattr__(module, "_replaced_by", (new,))
    return new


def split_module(module: Any, rank: int) -> nn.Module:
    """Two layers in sequence, the first without bias, the second with the old one's; their weights are not set.

    A Linear: in → rank → out. A Conv1d or Conv2d without groups: its kernel and stride to `rank` channels, then 1×1 to all.
    """
    from torch import nn

    dtype = module.weight.dtype
    if isinstance(module, nn.Linear):
        down: Any = nn.Linear(module.in_features, rank, bias=False, dtype=dtype)
        up: Any = nn.Linear(rank, module.out_features, bias=module.bias is not None, dtype=dtype)
    elif isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1:
        kind: Any = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
        down = kind(module.in_channels, rank, module.kernel_size, module.stride, module.padding, module.dilation, bias=False, dtype=dtype)
        up = kind(rank, module.out_channels, 1, bias=module.bias is not None, dtype=dtype)
    else:
        raise InputError(f"{type(module).__name__} cannot be split into two", "only Linear and ungrouped convolutions can")
    if module.bias is not None:
        up.bias = module.bias
    return nn.Sequential(down, up).train(module.training)


def skip_module() -> nn.Module:
    """A block that gives its first input back."""
    from torch import nn

    class Skip(nn.Module):
        def forward(self, x: Any, *rest: Any, **named: Any) -> Any:
            return x

    return Skip()


def _edit(module: Any, edit: Edit) -> None:
    if edit["do"] == "set":
        setattr(module, edit["name"], edit["value"])
    elif edit["do"] == "keep":
        keep(module, edit["tensor"], edit["dim"], edit["index"])
    elif edit["do"] == "drop":
        for i in sorted(edit["index"], reverse=True):
            del module[i]
    else:
        raise InputError(f"unknown edit '{edit['do']}'", "the compressed model was made by a newer edgesdk")


_SIZES = {
    ("Linear", 0): "out_features", ("Linear", 1): "in_features", ("Conv1d", 0): "out_channels", ("Conv2d", 0): "out_channels", ("Conv1d", 1): "in_channels",
    ("Conv2d", 1): "in_channels", ("Embedding", 0): "num_embeddings", ("Embedding", 1): "embedding_dim",
}  # fmt: skip


def keep(module: Any, tensor: str, dim: int, index: Sequence[int]) -> None:
    """Keep only `index` along `dim` of a parameter or buffer; the module's own size follows where it is known."""
    import torch
    from torch import nn

    value = getattr(module, tensor)
    made: dict[Any, Any] = value.__dict__.setdefault("_kept", {})  # another module may hold the same tensor: they stay tied
    key = (dim, tuple(index))
    if key not in made:
        chosen = value.detach().index_select(dim, torch.as_tensor(key[1], dtype=torch.long)).clone()
        made[key] = nn.Parameter(chosen, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else chosen
    setattr(module, tensor, made[key])
    size = _SIZES.get((type(module).__name__, dim))
    if tensor == "weight" and size:
        grouped = getattr(module, "groups", 1)
        if grouped > 1 and dim == 0 and grouped == module.in_channels:  # depthwise: a channel less is a group less
            module.groups = module.in_channels = len(index)
        setattr(module, size, len(index) * (module.groups if size == "in_channels" else 1))
    if hasattr(module, "num_features"):
        module.num_features = len(index)
    if hasattr(module, "normalized_shape") and tensor == "weight":
        module.normalized_shape = (len(index),)
