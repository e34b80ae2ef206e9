"""Built-in example models: trained weights are shipped, nothing is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = {
    "digits-cnn": "edgesdk.examples.digits:digits_cnn",
    "normalizer": "edgesdk.examples.normalizer:encoder_decoder",
    "normalizer-deep-encoder": "edgesdk.examples.normalizer:deep_encoder",
    "normalizer-decoder-only": "edgesdk.examples.normalizer:decoder_only",
}
"""Name → the factory that makes its ModelSpec."""


def digest_files(*paths: str | Path) -> str:
    """sha256 (hex) over the files' bytes."""
    total = hashlib.sha256()
    for path in paths:
        total.update(Path(path).read_bytes())
    return total.hexdigest()


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """`model` in eval mode with the arrays of an .npz (stored as float16 or float32). Raises `InputError` when it is not there."""
    import numpy as np
    import torch

    from edgesdk.errors import InputError

    if not path.exists():
        raise InputError(f"{path.name}: the trained weights are not there", "python -m edgesdk.examples.train_normalizer writes them")
    state = {k: torch.from_numpy(v.astype(np.float32)) for k, v in np.load(path).items()}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
