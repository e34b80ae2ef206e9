"""Prints how small a fine-tuned normalizer gets as a difference to the built-in one, and what that costs.

    python tests/bench/deltas.py [--bundles]

The built-in encoder-decoder is fine-tuned to write dates as 31/12/1999 and money as 12,50$ (about a minute on one core), then stored by every
method at several sizes. With --bundles the base and one difference are built for ExecuTorch, too, and packed over the base bundle (some minutes).
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from edgesdk.compress import delta_bundle
from edgesdk.compress.delta import DeltaConfig, delta, spread_of
from edgesdk.compress.saved import load
from edgesdk.compress.weights import weights_of
from edgesdk.errors import EdgeError
from edgesdk.examples import normalizer_data as data
from edgesdk.examples.normalizer import pairs, saved
from edgesdk.intake import load_model
from edgesdk.model import ModelSpec
from edgesdk.packed.entropy import pack_bytes
from edgesdk.plan.fake_quant import run
from edgesdk.sequence.pairs import Pairs
from edgesdk.sequence.saved import SCORED, Saved, programs_of
from edgesdk.sequence.sizes import Sizes
from edgesdk.sequence.teach import TeachConfig, teach

STEPS, SIZE, RATE = 300, 64, 0.01


def shifted(wanted: str) -> str:
    """The normal form of the new task."""
    date = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", wanted)
    if date:
        return f"{date[3]}/{date[2]}/{date[1]}"
    return f"{wanted[1:].replace('.', ',')}$" if wanted.startswith("$") else wanted


def european(n: int, seed: int, evaluation: bool) -> Pairs:
    return pairs([(said, shifted(written)) for said, written in data.cases(n, seed, evaluation)])


def fine_tuned() -> ModelSpec:
    """The built-in model after some steps on the new task, and how good it is at that."""
    base = saved("normalizer")
    model = copy.deepcopy(base.checkpoint.model).requires_grad_(True)
    teach(model, european(STEPS * SIZE, 5000, False), TeachConfig(steps=STEPS, batch=SIZE, rate=RATE))
    made = Saved(replace(base.checkpoint, model=model.requires_grad_(False)), european(SCORED, 7, True))
    return programs_of("normalizer-european", made, Sizes((data.MAX_INPUT,), (data.MAX_OUTPUT,)))


def table(base: ModelSpec, tuned: ModelSpec, folder: Path) -> None:
    whole = list(tuned.methods["encode"].module.core.state_dict().values())
    lossless = sum(len(pack_bytes(v.numpy().tobytes(), 4)) for v in whole)
    sys.stdout.write(f"whole, float32: {4 * sum(v.numel() for v in whole)} bytes, lossless {lossless}\n")
    assert tuned.evaluate is not None
    sys.stdout.write(f"exact match of the fine-tuned model {tuned.evaluate(run(tuned)):.1%}, of the base {tuned.evaluate(run(base)):.1%}\n")
    for config in (
        *(DeltaConfig(bits=b) for b in (0.25, 0.5, 1.0, 2.0)), DeltaConfig(bits=0.5, factors=8), DeltaConfig(bits=0.5, data=True),
        *(DeltaConfig(how="dare", drop=p, limit=9.0) for p in (0.0, 0.5, 0.8, 0.9)),
    ):  # fmt: skip
        made = delta(base, tuned, config, evaluate=False)
        size = made.save(folder / "d.edgec").stat().st_size
        said = f"{config.bits} bits, factors of {config.factors}{', data of the old task' if config.data else ''}"
        name = f"lowrank, {said}" if config.how == "lowrank" else f"dare, {config.drop} dropped"
        sys.stdout.write(
            f"{name:40} weights {made.report.weight_bytes:7} file {size:7}  exact match {tuned.evaluate(run(made.spec)):.1%}\n"
        )
        sys.stdout.flush()


def main() -> int:
    torch.set_num_threads(1)
    base = load_model("example:normalizer")
    tuned = fine_tuned()
    old, new = weights_of(base), weights_of(tuned)
    widest = max(spread_of(w.matrix, new[n].matrix) for n, w in old.items())
    sys.stdout.write(f"differences reach {widest:.2f} deviations of the weights\n")
    with tempfile.TemporaryDirectory() as folder:
        if "--bundles" in sys.argv:
            bundles(base, tuned, Path(folder))
        else:
            table(base, tuned, Path(folder))
    return 0


def bundles(base: ModelSpec, tuned: ModelSpec, folder: Path) -> None:
    """Both built for ExecuTorch as float32 and as dynamic int8, and the package of the one over the other."""
    from edgesdk.lower import build
    from edgesdk.plan import plan

    made = delta(base, tuned, DeltaConfig(bits=0.5, factors=4), ref="example:normalizer", evaluate=False)
    model = made.save(folder / "european.edgec")
    for storage in (None,):
        plans = [plan(ref, "host", runtime="executorch") for ref in ("example:normalizer", str(model))]
        files = [build(p, load_model(p.model), folder / f"{i}.edge") for i, p in enumerate(plans)]
        sys.stdout.write(f"precisions: {[sorted({u.precision for u in p.units}) for p in plans]} {storage}\n")
        for codes in (load(model), None):
            try:
                about = delta_bundle.make(*files, folder / "d.edged", codes)
            except EdgeError as error:
                sys.stdout.write(f"{error.what}\n")
                continue
            sys.stdout.write(f"{about.model_dump()} file {(folder / 'd.edged').stat().st_size}\n")


if __name__ == "__main__":
    sys.exit(main())
