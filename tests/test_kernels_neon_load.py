"""The library's Python side and its pool of threads, on this machine: the real runner beside small kernels in plain C."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edgesdk.kernels.neon import build
from edgesdk.kernels.neon.load import Neon

KERNELS = """
#include <stdint.h>
void arm_neon_round(const int64_t *a, int64_t first, int64_t last) { for (int64_t i = first; i < last; i++) ((int64_t *)a[0])[i] += a[1] + i; }
void arm_neon_gemv_4_block(const int64_t *a, int64_t first, int64_t last) { for (int64_t i = first; i < last; i++) ((int64_t *)a[0])[i] *= 3; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for this machine: apt-get install gcc")
    folder = tmp_path_factory.mktemp("library")
    (folder / "kernels.c").write_text(KERNELS)
    out = folder / "libedgekernels.so"
    run = str(build.SOURCES / "run.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(out), str(folder / "kernels.c"), run], check=True)
    return out


def steps_of(kernels: Neon, values: np.ndarray, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    args = np.array([values.ctypes.data, 5], np.int64)
    rows = [
        [kernels.address("round"), args.ctypes.data, len(values), 2],
        [kernels.address("gemv_4_block"), args.ctypes.data, len(values), 50],
    ]
    return np.array(rows * repeats, np.int64), args


@pytest.mark.parametrize("threads", [1, 2, 7, 100])
def test_steps_give_the_same_over_any_number_of_threads(library: Path, threads: int) -> None:
    kernels = Neon(library, "arm-neon")
    values, wanted = np.arange(101), np.arange(101)
    for _ in range(3):
        wanted = (wanted + 5 + np.arange(101)) * 3
    steps, _args = steps_of(kernels, values, 3)
    kernels.run(steps, threads)
    assert np.array_equal(values, wanted)


def test_two_callers_at_once_each_get_their_own(library: Path) -> None:
    kernels = Neon(library, "arm-neon")
    rooms = [np.zeros(64, np.int64) for _ in range(3)]
    held = [steps_of(kernels, v, 1)[0:2] for v in rooms]

    def work(i: int) -> None:
        for _ in range(200):
            rooms[i][:] = 1
            kernels.run(held[i][0], 2)
            assert np.array_equal(rooms[i], (6 + np.arange(64)) * 3)

    failed = []
    threading.excepthook, kept = lambda a: failed.append(a), threading.excepthook
    callers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for c in callers:
        c.start()
    for c in callers:
        c.join()
    threading.excepthook = kept
    assert not failed


def test_a_forked_process_has_threads_of_its_own(library: Path) -> None:
    code = (
        "import os, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from edgesdk.kernels.neon.load import Neon\n"
        "k = Neon(Path(sys.argv[1]), 'arm-neon'); v = np.zeros(64, np.int64); a = np.array([v.ctypes.data, 5], np.int64)\n"
        "s = np.array([[k.address('round'), a.ctypes.data, 64, 2]], np.int64)\n"
        "k.run(s, 3)\n"
        "if os.fork() == 0: k.run(s, 3); os._exit(int(not np.array_equal(v, 2 * (5 + np.arange(64)))))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(library)], timeout=60, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0


def test_what_is_not_there_is_said_so(library: Path, tmp_path: Path) -> None:
    kernels = Neon(library, "arm-neon")
    with pytest.raises(KeyError, match="gemm_9"):
        kernels.address("gemm_9")
    with pytest.raises(KeyError):
        Neon(library, "arm-dotprod").address("round")
    with pytest.raises(ImportError, match="arm-sve9"):
        Neon(library, "arm-sve9")
    (tmp_path / "lib.so").write_bytes(b"no library")
    with pytest.raises(ImportError, match="cannot be loaded"):
        Neon(tmp_path / "lib.so", "arm-neon")
