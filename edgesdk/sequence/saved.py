"""A model of the family in a file, `.edgeseq`: configuration, weights, special tokens, tokenizer, pairs held out to score it, and its sub-models.

`FILE.edgeseq` is the whole model for every `--model`, `FILE.edgeseq:NAME` one of its sub-models. Weights are stored once, for all of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from edgesdk.bundles import member_names, read_member, write_members
from edgesdk.errors import InputError, select_by_name
from edgesdk.noun import describe
from edgesdk.packed.entropy import PackedError
from edgesdk.sequence.config import SequenceConfig
from edgesdk.sequence.hub import Checkpoint, Specials, spec_of
from edgesdk.sequence.pairs import Pairs
from edgesdk.sequence.sizes import Sizes

if TYPE_CHECKING:
    from edgesdk.compress.types import Step
    from edgesdk.model import ModelSpec
    from edgesdk.sequence.adapt import Adaptation
    from edgesdk.sequence.elastic import Cut, Measured

SUFFIX = ".edgeseq"
WHOLE = "whole"
SCORED = 200  # pairs that quality is measured on
CALIBRATION = 32  # of their sources, whose answers calibration inputs are taken from


@dataclass(frozen=True)
class Saved:
    """What a file holds. `held`: pairs for quality and calibration; `cuts` and `measured`: its sub-models and how good they were."""

    checkpoint: Checkpoint
    held: Pairs | None = None
    cuts: tuple[Cut, ...] = ()
    measured: tuple[Measured, ...] = ()
    adaptation: Adaptation | None = None


def checkpoint_for(
    model: Any, pairs: Pairs, *, tokenizer: dict[str, Any] | None = None, files: dict[str, bytes] | None = None
) -> Checkpoint:
    """A model and the tokens of the pairs it was trained on, as a checkpoint."""
    return Checkpoint(
        model,
        model.config,
        Specials(() if pairs.start is None else (pairs.start,), (pairs.end,), pairs.pad),
        tokenizer or {"kind": "none"},
        files or {},
    )


def save(path: str | Path, made: Saved) -> Path:
    """Write it. Raises `EdgeError` and leaves no part behind."""
    from edgesdk.compress.saved import write_values

    point = made.checkpoint
    about = {
        "kind": "sequence-model", "schema_version": 1, "specials": dataclasses.asdict(point.specials), "tokenizer": point.tokenizer,
        "cuts": [c.model_dump(mode="json") for c in made.cuts], "measured": [m.model_dump(mode="json") for m in made.measured],
        "held": dataclasses.asdict(made.held) if made.held else None,
    }  # fmt: skip
    members = {"config.json": point.config.to_json().encode(), "model.json": json.dumps(about).encode()}
    if made.adaptation:
        members["adaptation.json"] = made.adaptation.to_json().encode()
    members |= {f"files/{name}": content for name, content in point.files.items()}
    members["values"] = write_values(dict(point.model.state_dict()))
    write_members(path, members)
    return Path(path)


def load(path: str | Path) -> Saved:
    """What `save` wrote. Raises `InputError`: a file that is damaged, or none of these."""
    import torch

    from edgesdk.compress.saved import read_values
    from edgesdk.sequence.adapt import Adaptation
    from edgesdk.sequence.elastic import Cut, Measured
    from edgesdk.sequence.model import SequenceModel

    path = Path(path)
    config = SequenceConfig.from_json(read_member(path, "config.json"), f"{path}: config.json")
    about = _about(path)
    names = member_names(path)
    try:
        with torch.device("meta"):
            model = SequenceModel(config)
        model.load_state_dict(read_values(read_member(path, "values")), assign=True)
        files = {n.removeprefix("files/"): read_member(path, n) for n in names if n.startswith("files/")}
        told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["specials"].items()}
        specials = Specials(**told)
        checkpoint = Checkpoint(model.eval().requires_grad_(False), config, specials, about["tokenizer"], files)
        held = Pairs(**about["held"]) if about["held"] else None
    except (PackedError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: does not hold a whole model ({str(error).splitlines()[0]})", "copy or make it again") from None
    cuts = tuple(Cut.model_validate(c) for c in about["cuts"])
    measured = tuple(Measured.model_validate(m) for m in about["measured"])
    made = Adaptation.from_json(read_member(path, "adaptation.json"), f"{path}: adaptation.json") if "adaptation.json" in names else None
    return Saved(checkpoint, held, cuts, measured, made)


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(read_member(path, "model.json"))
    except ValueError as error:
        raise InputError(f"{path}: model.json is not JSON ({error})", "copy or make it again") from None
    if not isinstance(about, dict) or about.get("kind") != "sequence-model" or about.get("schema_version") != 1:
        raise InputError(f"{path}: model.json is not of a sequence-model of schema_version 1", "make it again with this edgesdk")
    return about


def family_of(path: str | Path) -> tuple[Measured, ...]:
    """The sub-models of a file with their measured quality, as it was when they were saved. Raises `InputError` where it has none."""
    from edgesdk.sequence.elastic import Measured

    rows = tuple(Measured.model_validate(m) for m in _about(Path(path))["measured"])
    if not rows:
        raise InputError(f"{path}: has no sub-models", "train some: edgesdk.sequence.elastic")
    return rows


def is_saved(ref: str) -> bool:
    """`FILE.edgeseq` or `FILE.edgeseq:NAME`."""
    return ref.endswith(SUFFIX) or f"{SUFFIX}:" in ref


def load_saved(ref: str, sizes: Sizes) -> ModelSpec:
    """The programs of a saved model, or of one of its sub-models, of these sizes; by default, those of its held-out pairs.

    Raises `InputError`, `UnknownName`.
    """
    from edgesdk.sequence.elastic import sub_model

    start, _, part = ref.rpartition(f"{SUFFIX}:")
    path = Path(start + SUFFIX if start else ref)
    made = load(path)
    if part and part != WHOLE and start:
        model = sub_model(made.checkpoint.model, select_by_name("sub-model", part, {c.name: c for c in made.cuts}))
        made = dataclasses.replace(made, checkpoint=dataclasses.replace(made.checkpoint, model=model, config=model.config))
    return programs_of(path.stem + (f"-{part}" if start else ""), made, sizes)


def programs_of(name: str, made: Saved, sizes: Sizes, **more: Any) -> ModelSpec:
    """The same of a model in memory. It is scored on those held-out pairs that its programs can read; `more` goes to `spec_of`."""
    point, held = made.checkpoint, made.held
    if held is None:
        return spec_of(name, point, sizes, **more)
    behind = 0 if point.config.encoder else len(point.specials.start)  # a prompt has the start token behind it
    inputs = sizes.inputs or (max(len(s) for s in held.sources) + behind,)
    sizes = dataclasses.replace(sizes, inputs=inputs, outputs=sizes.outputs or (max(len(t) for t in held.targets) + 1,))
    read = [(s, t) for s, t in zip(held.sources, held.targets, strict=True) if len(s) + behind <= inputs[-1]]
    more["prompts"] = [s for s in more.get("prompts", [s for s, _ in read[:CALIBRATION]]) if len(s) + behind <= inputs[-1]]
    spec = spec_of(name, point, sizes, **more)
    if not read:
        return spec
    scored = dataclasses.replace(held, sources=[s for s, _ in read], targets=[t for _, t in read])
    return dataclasses.replace(spec, evaluate=exact_match(spec, scored), quality_name="exact match")


def exact_match(spec: ModelSpec, held: Pairs) -> Callable[[Callable[[str, Sequence[Any]], list[Any]]], float]:
    """The share of the first `SCORED` held-out pairs that programs answer exactly."""
    from edgesdk.sequence.card import NAME, Card
    from edgesdk.sequence.choose import Settings
    from edgesdk.sequence.generate import generate

    card = Card.read(spec.files[NAME])
    sources, targets = held.sources[:SCORED], held.targets[:SCORED]

    def evaluate(run: Callable[[str, Sequence[Any]], list[Any]]) -> float:
        found = generate(
            lambda name, arrays: [np.asarray(a) for a in run(name, arrays)], card, [list(s) for s in sources], Settings(draft="none")
        )
        return sum(_told(f.tokens, held.end) == _told(t, held.end) for f, t in zip(found, targets, strict=True)) / len(targets)

    return evaluate


def _told(tokens: Sequence[int], end: int) -> list[int]:
    return [int(t) for t in tokens if t != end]


# ---- the verbs


def checkpoint_of(ref: str) -> Saved:
    """A `.edgeseq`, a built-in example, or a Hugging Face folder or id. Raises `InputError`, `UnknownName` or `MissingTool`."""
    from edgesdk.sequence.hub import load_checkpoint

    if ref.startswith("example:"):
        from edgesdk.examples.normalizer import LAYOUTS, saved

        name = ref.removeprefix("example:")
        return saved(select_by_name("sequence model among the examples", name, {n: n for n in LAYOUTS}))
    return load(ref) if is_saved(ref) else Saved(load_checkpoint(ref))


def adapt_saved(
    ref: str, out: str | None, *, cross: str = "self", encoder_from: str | None = None, step: Step | None = None, **sizes: Any
) -> Adaptation:
    """`adapt` between files; `sizes` are its arguments. What begins an answer is, where the model names nothing, its end token, else its padding."""
    from edgesdk.sequence.adapt import adapt

    step = step or (lambda text, share: None)
    step("loading", 0.0)
    given = checkpoint_of(ref)
    if cross not in ("self", "new"):
        raise InputError(f"cross = '{cross}'", "give self or new")
    other = checkpoint_of(encoder_from).checkpoint.model if encoder_from else None
    step("copying weights", 0.5)
    model, report = adapt(given.checkpoint.model, cross=cross, encoder_from=other, **sizes)  # type: ignore[arg-type]
    if out:
        old = given.checkpoint.specials
        specials = old if old.start else dataclasses.replace(old, start=old.eos[:1] or (old.pad,))
        point = dataclasses.replace(given.checkpoint, model=model, config=model.config, specials=specials)
        step(f"writing {out}", 0.9)
        save(out, Saved(point, given.held, adaptation=report))
    return report


def read_pairs(path: str | Path, checkpoint: Checkpoint) -> Pairs:
    """Lines of {"source", "target"}, each text (which the checkpoint's tokenizer reads) or token ids. Raises `InputError` naming the line."""
    from edgesdk.sequence.card import SequenceError
    from edgesdk.sequence.tokens import Tokenizer

    tokenizer: Tokenizer = _tokenizer(checkpoint)
    end, start = checkpoint.specials.eos[:1] or (checkpoint.specials.pad,), checkpoint.specials.start
    rows: dict[str, list[list[int]]] = {"source": [], "target": []}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})", 'give a file of lines of {"source": …, "target": …}') from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            for key, found in rows.items():
                value = given[key]
                ids = tokenizer.encode(value) if isinstance(value, str) else [int(t) for t in value]
                if key == "target":
                    if isinstance(value, str):
                        ids = ids[len(tokenizer.before) : len(ids) - len(tokenizer.after)]
                    ids = ids if ids and ids[-1] == end[0] else [*ids, end[0]]
                if any(not 0 <= t < checkpoint.config.vocab for t in ids):
                    raise ValueError(f"{key}: a token outside 0 to {checkpoint.config.vocab - 1}")
                found.append(ids)
        except (ValueError, KeyError, TypeError, SequenceError) as error:
            raise InputError(
                f"{path}, line {number}: {str(error).splitlines()[0]}", 'write {"source": …, "target": …}, text or token ids'
            ) from None
    return Pairs(rows["source"], rows["target"], start[0] if start else None, end[0], checkpoint.specials.pad)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    from types import SimpleNamespace

    from edgesdk.sequence.tokens import tokenizer_of

    return tokenizer_of(SimpleNamespace(tokenizer=checkpoint.tokenizer), checkpoint.files.__getitem__)  # type: ignore[arg-type]


def teach_saved(
    ref: str,
    pairs: str,
    out: str,
    *,
    teacher: str | None = None,
    answers: bool = False,
    settings: dict[str, Any] | None = None,
    step: Step | None = None,
) -> dict[str, Any]:
    """`teach` between files; the last pairs, held out, go into the file. Raises `InputError`."""
    from edgesdk.sequence.teach import TeachConfig, answered, teach

    given = checkpoint_of(ref)
    found = read_pairs(pairs, given.checkpoint)
    try:
        config = TeachConfig(**{"held": max(1, min(SCORED, len(found) // 10)), **(settings or {})})
    except ValidationError as error:
        raise InputError(*describe(error, "teach")) from None
    master = checkpoint_of(teacher).checkpoint if teacher else None
    right, bare = (master.model, not master.specials.start) if master else (None, False)
    if answers and right is None:
        raise InputError("--answers without --teacher", "name the model that answers")
    work = found
    if answers and right is not None:
        work, right = answered(right, found, bare=bare, step=step), None
    model = given.checkpoint.model.requires_grad_(True)
    outcome = teach(model, work, config, teacher=right, bare=bare, step=step)
    model.requires_grad_(False)
    held = found.split(config.held)[1]
    save(out, Saved(given.checkpoint, held, given.cuts, (), given.adaptation))
    return {
        "kind": "teaching", "schema_version": 1, "model": ref, "out": out, "before": outcome.before, "after": outcome.after,
        "kept_before": outcome.back, "held": config.held, "settings": config.model_dump(mode="json"),
    }  # fmt: skip
