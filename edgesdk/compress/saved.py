"""A compressed model in a file, `.edgec`: what was done (compression.json), the codes of its weights, and the other values that changed.

It names the model it was made from and does not hold that model's code: `load` takes the model again, makes the same changes of shape,
and puts the stored values in. A file made of other weights than those it finds is refused.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.bundles import member_names, read_member, write_members
from edgesdk.compress.surgery import apply_edits
from edgesdk.compress.weights import holders, set_weight, weights_of
from edgesdk.errors import EdgeError, InputError
from edgesdk.packed import Code, decode, pack, unpack
from edgesdk.packed.entropy import PackedError, pack_bytes, unpack_bytes

if TYPE_CHECKING:
    from edgesdk.compress.pipeline import Compressed
    from edgesdk.compress.types import Step
    from edgesdk.model import ModelSpec
    from edgesdk.sequence.sizes import Sizes


def save(made: Compressed, base: ModelSpec, path: str | Path) -> Path:
    """Write `made` (compressed from `base`) to `path`. Raises `EdgeError` and leaves no part behind."""
    start = copy.deepcopy(base.methods)
    apply_edits(replace(base, methods=start), made.report.edits)
    names = {f"{m}/{k}": v for m, entry in made.spec.methods.items() for k, v in entry.module.state_dict().items()}
    before = {f"{m}/{k}": v for m, entry in start.items() for k, v in entry.module.state_dict().items()}
    stored = {*made.spec.codes, *made.differences}
    coded = {f"{m}/{p}.weight" if p else f"{m}/weight" for n in stored for m, p, _ in holders(made.spec)[n]}
    changed = {k: v for k, v in names.items() if k not in coded and not _equal(v, before.get(k))}
    members = {"compression.json": made.report.to_json().encode(), "codes": _codes(made.spec.codes), "values": write_values(changed)}
    if made.differences:
        members["differences"] = _codes(made.differences)
    write_members(path, members)
    return Path(path)


def load(path: str | Path, base: ModelSpec | None = None) -> Compressed:
    """The compressed model in a `.edgec`; `base`: the model it was made from, where the reference in the file no longer leads there.

    Raises `InputError`: a damaged file, another base model, a reference that cannot be loaded.
    """
    from edgesdk.compress.pipeline import Compressed, Compression, digest_of

    path = Path(path)
    report = Compression.from_json(read_member(path, "compression.json"), f"{path}: compression.json")
    if base is None:
        base = _base(report.base, path)
    if base.digest != report.base_digest:
        raise InputError(f"{path}: was made from another '{report.model}'", "its code or weights have changed since; compress it again")
    spec = replace(base, methods=copy.deepcopy(base.methods), codes=dict(base.codes), reference=base.reference or base)
    apply_edits(spec, report.edits)
    differences: dict[str, Code] = {}
    try:
        if "differences" in member_names(path):
            differences, now = _read_codes(read_member(path, "differences")), weights_of(spec)
            for name, code in differences.items():
                set_weight(spec, name, _tensor(decode(code, now[name].matrix.numpy())))
        spec.codes.update(_read_codes(read_member(path, "codes")))
        _put(spec, read_values(read_member(path, "values")))
        for name, code in spec.codes.items():
            set_weight(spec, name, _tensor(decode(code)))
    except (PackedError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: does not hold a whole compressed model ({error})", "copy or compress it again") from None
    if digest_of(spec, report.edits) != report.compressed_digest:
        raise InputError(f"{path}: its weights do not come out as they were saved", "copy or compress it again")
    return Compressed(
        replace(spec, name=f"{base.name}-compressed", alternatives={}, digest=report.compressed_digest), report, base, differences
    )


def base_of(path: str | Path) -> str:
    """The reference of the model that a file was made from. Raises `InputError`."""
    from edgesdk.compress.pipeline import Compression

    return Compression.from_json(read_member(Path(path), "compression.json"), f"{path}: compression.json").base


def compressed_model(ref: str, recipe: str, step: Step | None = None, sizes: Sizes | None = None) -> ModelSpec:
    """`ref`, loaded for these sizes (see `load_model`), compressed by a recipe in text, its stages divided by `;`.

    Kept in the cache by content. Raises what `compress` raises.
    """
    from edgesdk import __version__
    from edgesdk.cache import cache_dir
    from edgesdk.compress.pipeline import compress
    from edgesdk.intake import load_model

    base = load_model(ref, sizes)
    key = hashlib.sha256(json.dumps([base.digest, ref, recipe, __version__]).encode()).hexdigest()[:40]
    kept = cache_dir("compressed") / f"{key}.edgec"
    if kept.exists():
        with contextlib.suppress(InputError):
            return load(kept, base).spec
    made = compress(base, [s for s in recipe.split(";") if s.strip()], evaluate=False, step=step)
    with contextlib.suppress(EdgeError, OSError):  # a full disk costs time, not the answer
        made.save(kept)
    return made.spec


def _base(ref: str, path: Path) -> ModelSpec:
    """The model a file was made from: its reference as it stands, or beside the file."""
    from edgesdk.intake import load_model

    if not ref:
        raise InputError(f"{path}: was made from a model object, not from a reference", "load it in Python: saved.load(path, base=spec)")
    try:
        return load_model(ref)
    except InputError as error:
        if "no such file" not in error.what and "cannot be read" not in error.what:
            raise
        return load_model(str(path.parent / ref))


def _tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(array)


def _equal(value: Any, other: Any) -> bool:
    return other is not None and value.shape == other.shape and value.dtype == other.dtype and bool((_raw(value) == _raw(other)).all())


def _raw(value: Any) -> Any:
    """A tensor's bytes; numpy has no bfloat16."""
    import torch

    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _codes(codes: Mapping[str, Code]) -> bytes:
    written = {name: pack(code) for name, code in codes.items()}
    return _with_head([[name, len(content)] for name, content in written.items()], written.values())


def _read_codes(content: bytes) -> dict[str, Code]:
    head, at = _head(content)
    codes = {}
    for name, size in head:
        codes[name] = unpack(content[at : at + size])
        at += size
    return codes


def write_values(values: Mapping[str, Any]) -> bytes:
    """Tensors by name, packed without loss; equal ones are stored once."""
    blobs: dict[str, bytes] = {}
    rows: dict[str, list[Any]] = {}
    for name, value in values.items():
        raw = _raw(value).tobytes()
        key = f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(raw).hexdigest()}"
        if key not in blobs:
            blobs[key] = pack_bytes(raw, value.element_size())
            rows[key] = [[], str(value.dtype).removeprefix("torch."), list(value.shape), len(blobs[key])]
        rows[key][0].append(name)
    return _with_head(list(rows.values()), blobs.values())


def read_values(content: bytes) -> dict[str, Any]:
    """What `write_values` wrote."""
    import torch

    head, at = _head(content)
    values: dict[str, Any] = {}
    for names, dtype, shape, size in head:
        raw = bytearray(unpack_bytes(content[at : at + size]))
        flat = torch.frombuffer(raw, dtype=getattr(torch, dtype)) if raw else torch.zeros(0, dtype=getattr(torch, dtype))
        values |= dict.fromkeys(names, flat.reshape(shape))
        at += size
    return values


def _put(spec: ModelSpec, values: Mapping[str, Any]) -> None:
    import torch

    states = {f"{m}/{k}": v for m, entry in spec.methods.items() for k, v in entry.module.state_dict().items()}
    with torch.no_grad():
        for name, value in values.items():
            states[name].copy_(value)


def _with_head(head: list[Any], parts: Any) -> bytes:
    text = json.dumps(head).encode()
    return len(text).to_bytes(4, "little") + text + b"".join(parts)


def _head(content: bytes) -> tuple[list[Any], int]:
    end = 4 + int.from_bytes(content[:4], "little")
    return json.loads(content[4:end]), end
