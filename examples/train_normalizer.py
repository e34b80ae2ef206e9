"""Train the normalizers on one CPU core and write their weights: `python -m edgesdk.examples.train_normalizer [NAME …]`.

NAME is normalizer (about 3.5 minutes), normalizer-deep-encoder (the same) or normalizer-decoder-only (about 6); without a name, all three.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from torch import nn

from edgesdk.errors import select_by_name
from edgesdk.examples import normalizer_data as data
from edgesdk.examples.normalizer import HERE, LAYOUTS, Normalizer, exact_match


def _batches(steps: int, size: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of similar length, so that little is padding."""
    cases = sorted(data.cases(steps * size, seed, False), key=lambda c: len(c[0]))
    batches = []
    for i in range(0, len(cases), size):
        group = cases[i : i + size]
        length = max(len(said) for said, _ in group) + 1
        src = torch.tensor([data.encode(said, length) for said, _ in group])
        batches.append((src, torch.tensor([data.encode(wanted, data.MAX_OUTPUT) for _, wanted in group])))
    return [batches[int(i)] for i in np.random.default_rng(seed).permutation(len(batches))]


def train(name: str, steps: int = 2500, size: int = 64) -> float:
    """Train `name`, write its weights (float16) beside this file; returns exact match on 1000 held-out cases."""
    torch.manual_seed(0)
    model = Normalizer(*LAYOUTS[name])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    start = time.time()
    for i, (src, out) in enumerate(_batches(steps, size, 1)):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(src, out).flatten(0, 1), out.flatten(), ignore_index=data.PAD)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if i % 100 == 0:
            sys.stderr.write(f"{name}: step {i} of {steps}, loss {loss.item():.3f}, {time.time() - start:.0f} s\n")
    path = HERE / f"{name.replace('-', '_')}.npz"
    np.savez_compressed(path, **{k: v.numpy().astype(np.float16) for k, v in model.state_dict().items()})
    return quality(name, 1000)


def quality(name: str, n: int) -> float:
    """Exact match of the shipped weights on `n` held-out cases."""
    from edgesdk.intake import load_model

    spec = load_model(f"example:{name}")

    def run(method: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [o.numpy() for o in spec.methods[method].module(*(torch.from_numpy(np.asarray(i)) for i in inputs))]

    return exact_match(LAYOUTS[name][0] > 0, n)(run)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:] or list(LAYOUTS):
        select_by_name("normalizer", wanted, LAYOUTS)
        sys.stdout.write(f"{wanted}: {train(wanted):.1%} exact match on 1000 held-out cases\n")
