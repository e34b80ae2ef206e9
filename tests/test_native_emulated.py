"""A model of 330M parameters in int4 on an emulated Cortex-A76, a token after the other, beside its twin for this machine. Minutes: `-m wide`.

qemu-user runs the emulated board's own Python and numpy on what a device is sent: the agent's modules, the program and its library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.emulated import emulator

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(not (emulator() and shutil.which("debugfs")), reason="qemu-user-static or debugfs is not installed (.ci/board-packages)"),
]  # fmt: skip
PROMPT, WRITTEN = (5, 900, 12, 31000), 4
LOOP = """
import sys
import numpy as np
from pathlib import Path
from edgesdk.native.machine import LIBRARY, Machine

path, out, target = sys.argv[1:4]
written, prompt = int(sys.argv[4]), [int(t) for t in sys.argv[5:]]
kernels = None
if target.startswith("arm"):
    from edgesdk.kernels.neon.load import Neon
    kernels = Neon(Path(path).with_name(LIBRARY), target)
machine = Machine(path, 1, kernels)
arrays = [np.zeros(shape, dtype) for shape, dtype in machine.inputs("decode")]
slots, logits = arrays[2].shape[2] - 1, []
arrays[2][..., :slots] = -1e4
for at in range(len(prompt) + written - 1):
    token = prompt[at] if at < len(prompt) else int(logits[-1].argmax())
    arrays[0][:], arrays[1][:] = token, at
    values, *new = machine.run("decode", arrays)
    logits.append(values[0, 0])
    for cache, part in zip(arrays[3:], new):
        cache[:, :, at] = part[:, :, 0]
    arrays[2][..., at] = 0
np.save(out, np.array(logits))
"""


def root() -> Path:
    """The emulated board's file system, unpacked once."""
    from tests.lab.image import build

    image = build()
    there = image.disk.with_name("root")
    if not there.exists():
        part = image.disk.with_name("root.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        subprocess.run(["debugfs", "-R", f"rdump / {part}", str(image.disk)], check=True, capture_output=True, timeout=300)
        part.rename(there)
    return there


def spec():
    """The decoder-only model of `tests/bench/native_330m.py` with seeded noise as weights, for answers within 16 slots."""
    import torch

    from edgesdk.sequence.export import sequence_spec
    from edgesdk.sequence.model import SequenceModel
    from tests.bench.native_330m import configs

    torch.manual_seed(0)
    return sequence_spec(
        SequenceModel(configs()["decoder-only"]), name="large", source_lengths=(8,), cache_lengths=(16,), start=(2,), eos=(1,)
    )


def test_a_model_of_330m_on_a_cortex_a76_gives_what_its_twin_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgesdk.agent.client import ARCHIVE, agent_files
    from edgesdk.graph import trace
    from edgesdk.kernels.cpu import host_targets
    from edgesdk.kernels.nearest import nearest
    from edgesdk.native.lower import lower_native
    from edgesdk.native.shared import LIBRARY, shared_library

    # int4 has an offset a block where the kernels are not in C; here both have the same weights
    monkeypatch.setattr("edgesdk.kernels.superblocks.super_blocks", lambda weight, half: nearest(weight, 4, 32, half))
    model = spec()
    choice = {(m.name, u.name): "int4-g32" for m in trace(model).methods for u in m.units if u.op == "linear"}
    targets = {"here": host_targets()[0], "there": "arm-dotprod"}
    for name, target in targets.items():
        (tmp_path / name).mkdir()
        content = lower_native(model, f"native-{target}", choice)
        (tmp_path / name / "model.native").write_bytes(content)
        if target.startswith("arm"):
            (tmp_path / name / LIBRARY).write_bytes(shared_library(content))
        del content
    del model
    (tmp_path / ARCHIVE).write_bytes(agent_files()[ARCHIVE])
    (tmp_path / "loop.py").write_text(LOOP)
    board = root()
    pythons = {
        "here": [sys.executable],
        "there": [emulator() or "", "-cpu", "cortex-a76", "-L", str(board), "-E", f"PYTHONHOME={board}/usr", str(next((board / "usr/bin").glob("python3.1?")))],
    }  # fmt: skip
    packages = ":".join([str(tmp_path / ARCHIVE), *(str(p.parents[1]) for p in board.glob("usr/*/*/*/numpy/__init__.py"))])
    answers = {}
    for name, python in pythons.items():
        path, out = tmp_path / name / "model.native", tmp_path / f"{name}.npy"
        environment = {**os.environ, "PYTHONPATH": packages} if name == "there" else dict(os.environ)
        words = [str(tmp_path / "loop.py"), str(path), str(out), targets[name], str(WRITTEN), *map(str, PROMPT)]
        done = subprocess.run([*python, *words], capture_output=True, text=True, timeout=1200, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        answers[name] = np.load(out)
        assert answers[name].shape == (len(PROMPT) + WRITTEN - 1, 32128) and np.isfinite(answers[name]).all()
    apart = np.abs(answers["there"] - answers["here"]).max(1) / np.abs(answers["here"]).max(1)
    assert (answers["there"].argmax(1) == answers["here"].argmax(1)).all(), apart
    assert apart.max() < 0.1, apart  # an input between two codes goes the other way, and 29 layers of noise make more of it
