"""A bundle as a small package over another one: what differs, and names for all that the device or the host has already.

Its program is a difference to the base bundle's program (`packed.difference.pack_difference`), which stays in the bundle as a member of its own. Installs share
members by their sha256, so `edgesdk flash` sends the difference alone to a device that has the base bundle, and both stay whole when the other one goes.
The package itself leaves out every member that the base bundle has; `apply` puts the whole bundle together again, with the very digest it was made with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgesdk.bundle import Manifest
from edgesdk.bundles import (
    BESIDE,
    bundle_digest,
    member_names,
    read_manifest,
    read_member,
    sha256,
    verify_bundle,
    write_bundle,
    write_members,
)
from edgesdk.errors import CheckFailed, InputError
from edgesdk.noun import Noun
from edgesdk.packed import Code
from edgesdk.packed.difference import DIFFERENCE, Place, pack_difference
from edgesdk.packed.entropy import PackedError
from edgesdk.packed.program import Piece, expand_program, is_packed

if TYPE_CHECKING:
    from edgesdk.compress.pipeline import Compressed

ABOUT = "delta.json"


class Delta(Noun):
    """What a package over a base bundle is; sizes in bytes."""

    KIND: ClassVar[str] = "delta"

    model_name: str
    base_model: str
    base_digest: str  # of the base bundle
    bundle_digest: str  # of the bundle that comes out
    whole_bytes: int  # the bundle as it was built, file and all
    package_bytes: int  # the members of the package
    program_bytes: int  # the program's difference alone
    weights: int  # how many weights are stored as their own codes; the rest of the program differs byte by byte


def make(base: str | Path, tuned: str | Path, out: str | Path, model: Compressed | None = None) -> Delta:
    """Write the package that makes `tuned` out of `base`, both built bundles for one runtime; `model`: the tuned model as a `delta` to the base's.

    Raises `InputError` (other runtimes, a base that is a difference itself) and `CheckFailed` where the package would not be smaller.
    """
    first, second = verify_bundle(base), verify_bundle(tuned)
    if first.runtime != second.runtime:
        raise InputError(f"{tuned}: is for {second.runtime}, {base} for {first.runtime}", "build both for one runtime")
    stored, kept = (read_member(p, m.program) for p, m in ((base, first), (tuned, second)))
    if DIFFERENCE in (stored[:8], kept[:8]):
        raise InputError(
            f"{base if stored[:8] == DIFFERENCE else tuned}: is itself a difference to another bundle", "give bundles as built"
        )
    name = second.program.removesuffix(".packed") + ".diff"
    before, after = (expand_program(c) if is_packed(c) else c for c in (stored, kept))
    pieces = list(_pieces(before, after, model)) if model is not None else []
    try:
        program = pack_difference(after, before, first.program, pieces)
    except PackedError as error:
        raise CheckFailed(f"{tuned}: its program cannot be made of {base} ({error})", "build both anew from the same edgesdk") from None
    members = {m.name: read_member(tuned, m.name) for m in second.members if m.name != second.program}
    members |= {name: program, first.program: stored}
    fields = {k: getattr(second, k) for k in Manifest.model_fields if k not in ("members", "program")}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        write_bundle(whole, members, program=name, **fields)
        beside, digest = {n: read_member(whole, n) for n in BESIDE}, bundle_digest(whole)
    known = {m.sha256 for m in first.members}
    package = {n: c for n, c in sorted(members.items()) if sha256(c) not in known}
    size = sum(len(c) for c in package.values()) + sum(len(c) for c in beside.values())
    if size >= Path(tuned).stat().st_size:
        raise CheckFailed(f"the package would be no smaller than {tuned}", "the two programs have too little in common; ship the bundle")
    about = Delta(
        model_name=second.model_name, base_model=first.model_name, base_digest=bundle_digest(base), bundle_digest=digest,
        whole_bytes=Path(tuned).stat().st_size, package_bytes=size, program_bytes=len(program), weights=len({id(p.code) for p, _ in pieces}),
    )  # fmt: skip
    write_members(out, {ABOUT: about.to_json().encode(), **beside, **package})
    return about


def _pieces(before: bytes, after: bytes, model: Compressed) -> Iterator[tuple[Piece, Place]]:
    """Where both programs hold the weights that `model` stores as differences."""
    from edgesdk.compress.weights import weights_of
    from edgesdk.lower.pack import places

    old, new = weights_of(model.base), weights_of(model.spec)
    taken: list[tuple[int, int]] = []
    for name, code in model.differences.items():
        if code.kind == "base" or new[name].matrix.numel() < 16:
            continue
        here, there = (list(places(p, _dense(w[name].matrix), w[name].shape)) for p, w in ((after, new), (before, old)))
        for piece in here:
            twin = next((t for t in there if (t.dtype, t.axes) == (piece.dtype, piece.axes)), None)
            free = all(piece.offset + piece.size <= a or piece.offset >= b for a, b in taken)
            if twin is not None and free and piece.dtype in ("float32", "int8-row"):
                there.remove(twin)
                taken.append((piece.offset, piece.offset + piece.size))
                yield Piece(piece.offset, code, piece.shape, piece.axes, piece.dtype, piece.scales), Place(twin.offset, twin.scales)


def _dense(matrix: object) -> Code:
    values = matrix.numpy()  # type: ignore[attr-defined]
    return Code("dense", tuple(values.shape), (), (values,))


def is_delta(path: str | Path) -> bool:
    """Whether a file is a package over a base bundle. Raises `InputError` where it is no such kind of file at all."""
    return ABOUT in member_names(path)


def read_about(path: str | Path) -> Delta:
    """Raises `InputError`."""
    if not is_delta(path):
        raise InputError(f"{path}: is no package over a base bundle", "give what `edgesdk delta make` wrote")
    return Delta.from_json(read_member(path, ABOUT), f"{path}: {ABOUT}")


def apply(base: str | Path, package: str | Path, out: str | Path) -> Delta:
    """Write the whole bundle. Raises `InputError` where `base` is not the bundle the package was made over, or either is damaged."""
    about, first = read_about(package), verify_bundle(base)
    manifest = read_manifest(package)
    names = set(member_names(package))
    have: Mapping[str, str] = {m.sha256: m.name for m in first.members}
    missing = [m.name for m in manifest.members if m.name not in names and m.sha256 not in have]
    if missing:
        what = f"{base}: lacks '{missing[0]}' of {package}, which was made over {about.base_model} ({about.base_digest[:12]})"
        raise InputError(what, "give the bundle that the package was made over")
    members = {n: read_member(package, n) for n in BESIDE if n in names}
    members |= {m.name: read_member(package, m.name) if m.name in names else read_member(base, have[m.sha256]) for m in manifest.members}
    wrong = next((m.name for m in manifest.members if sha256(members[m.name]) != m.sha256), None)
    if wrong is not None or sha256(members["manifest.json"]) != about.bundle_digest:
        raise InputError(f"{package}: '{wrong or 'manifest.json'}' is damaged", "copy or make the package again")
    write_members(out, members)
    return about
