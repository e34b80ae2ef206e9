"""Short training towards what the uncompressed model gives, from unlabeled calibration inputs: what the pruning methods recover with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgesdk.compress.types import Step
from edgesdk.plan.fake_quant import samples

if TYPE_CHECKING:
    import torch

    from edgesdk.model import ModelSpec


def _floats(out: Any) -> list[torch.Tensor]:
    return [o for o in (out if isinstance(out, tuple | list) else (out,)) if o.is_floating_point()]


def batched(inputs: Sequence[tuple[Any, ...]], module: Any, size: int) -> list[tuple[Any, ...]]:
    """Samples put together along their first dimension where the module takes that and answers each as it did alone; else as they are."""
    import torch

    inputs = list(inputs)
    if len(inputs) < 2 or any(x.dim() == 0 or x.shape[0] != 1 for x in inputs[0]):
        return inputs
    pair = tuple(torch.cat(xs) for xs in zip(*inputs[:2], strict=True))
    try:
        with torch.no_grad():
            both, one = _floats(module(*pair)), _floats(module(*inputs[1]))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return inputs
    if any(
        b.shape[:1] != (2,) or b[1:].shape != o.shape or not torch.allclose(b[1:], o, atol=1e-4) for b, o in zip(both, one, strict=True)
    ):
        return inputs
    return [tuple(torch.cat(xs) for xs in zip(*inputs[i : i + size], strict=True)) for i in range(0, len(inputs), size)]


class Tuner:
    """Adam over the weights of `spec` (in place) against the outputs of `teacher`, a step at a time.

    The loss of an output is its squared error over its variance; the last dimension of a method's first output is also compared as
    log-probabilities where it looks like logits (`soft`). Needs calibration data. Modules stay in eval mode: norms keep their statistics.
    """

    def __init__(self, spec: ModelSpec, teacher: ModelSpec, *, steps: int, rate: float = 1e-3, most: int = 64, batch: int = 16) -> None:
        import torch

        self.spec, self.steps, self.done = spec, max(1, steps), 0
        self.work: list[tuple[Any, tuple[Any, ...], list[torch.Tensor], list[float]]] = []
        for method, entry in spec.methods.items():
            whole = batched(samples(spec, method, most), teacher.methods[method].module, batch)
            for sample in whole:
                with torch.no_grad():
                    wanted = _floats(teacher.methods[method].module(*sample))
                self.work.append((entry.module, sample, wanted, [float(w.var(unbiased=False)) + 1e-6 for w in wanted]))
        self.generator = torch.Generator().manual_seed(0)
        self.order: list[int] = []
        held = {id(p): p for e in spec.methods.values() for p in e.module.parameters() if p.is_floating_point()}
        self.parameters = list(held.values())
        self.before = [p.requires_grad for p in self.parameters]
        for p in self.parameters:
            p.requires_grad_(True)
        self.optimiser = torch.optim.Adam(self.parameters, lr=rate)
        self.rate = rate

    def step(self, change: Callable[[], None] | None = None) -> float:
        """One step; `change` may alter the gradients before they are used. Returns the loss."""
        import torch

        if not self.order:
            self.order = torch.randperm(len(self.work), generator=self.generator).tolist()
        module, sample, wanted, scales = self.work[self.order.pop()]
        for group in self.optimiser.param_groups:  # a short warm-up, then down to nothing
            share = self.done / self.steps
            group["lr"] = self.rate * min(1.0, (self.done + 1) / max(1, self.steps // 10)) * (1 - share)
        self.optimiser.zero_grad()
        with torch.enable_grad():
            got = _floats(module(*sample))
            loss = torch.stack([((g - w) ** 2).mean() / s for g, w, s in zip(got, wanted, scales, strict=True)]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        if change:
            change()
        self.optimiser.step()
        self.done += 1
        return float(loss.detach())

    def close(self) -> None:
        for p, before in zip(self.parameters, self.before, strict=True):
            p.grad = None
            p.requires_grad_(before)


def tune(spec: ModelSpec, teacher: ModelSpec, steps: int, *, rate: float = 1e-3, step: Step | None = None) -> None:
    """`steps` steps of `Tuner`, in place."""
    if steps <= 0:
        return
    tuner = Tuner(spec, teacher, steps=steps, rate=rate)
    try:
        for i in range(steps):
            if step and i % 10 == 0:
                step("tuning", i / steps)
            tuner.step()
    finally:
        tuner.close()
