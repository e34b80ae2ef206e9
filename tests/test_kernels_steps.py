"""Steps over several threads: every part done once, in order, whoever is late, forks or calls at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from llvmlite import ir

from edgesdk.kernels.numba import steps
from edgesdk.kernels.numba.compiled import loaded, object_code
from edgesdk.kernels.numba.emitter import Emitter
from edgesdk.kernels.numba.simd import I64

pytestmark = pytest.mark.skipif(not steps.FUTEX, reason="threads wait for each other by a system call of Linux")


@pytest.fixture(scope="module")
def kernels():
    """`grow`: out[i] = out[i] · 3 + i, so that the order of steps shows. `crawl`: the same, after so many rounds of nothing a part."""
    module = ir.Module("steps-test")
    for name in ("grow", "crawl"):
        e = Emitter(module, name, "plain", ("out", "rounds", "idle"))
        with e.loop(e.first, e.last) as i:
            if name == "crawl":
                with e.loop(e.number(0), e.a["rounds"]):
                    place = e.s.at(e.a["idle"], 0, I64)
                    e.b.load_atomic(place, "seq_cst", 8)
            at = e.s.at(e.a["out"], e.times(i, 8), I64)
            e.b.store(e.b.add(e.times(e.b.load(at), 3), i), at)
        e.b.ret_void()
    return loaded(object_code(module, "plain"), ["grow", "crawl"], "plain")


class Work:
    """Steps of different sizes over one array, and what must come out."""

    def __init__(self, kernels, parts=(1000, 1, 37, 500, 2, 999), least=1, name="grow", rounds=0):
        self.out, self.idle = np.zeros(max(parts), np.int64), np.zeros(1, np.int64)
        self.args = np.array([self.out.ctypes.data, rounds, self.idle.ctypes.data])
        self.steps = np.concatenate([steps.step(kernels[name], self.args, n, least) for n in parts])
        self.wanted = np.zeros(max(parts), np.int64)
        for n in parts:
            self.wanted[:n] = self.wanted[:n] * 3 + np.arange(n)

    def check(self, run):
        self.out[:] = 0
        run(self.steps)
        np.testing.assert_array_equal(self.out, self.wanted)


@pytest.fixture
def pool():
    made = steps.Pool()
    yield made
    made.close()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("least", [0, 1, 100, 600])
def test_every_part_is_done_once_and_steps_keep_their_order(kernels, pool, threads, least):
    work = Work(kernels, least=least)
    for _ in range(50):
        work.check(lambda s: pool.run(s, threads))


def test_after_a_pause_in_which_threads_fall_asleep(kernels, pool):
    work = Work(kernels)
    for seconds in (0, 0.05, 0.001, 0.05):
        time.sleep(seconds)
        work.check(lambda s: pool.run(s, 3))


def test_more_threads_later_and_fewer_again(kernels, pool):
    work = Work(kernels)
    for threads in (2, 5, 3, 1, 4, 2):
        work.check(lambda s, threads=threads: pool.run(s, threads))


def test_no_steps_and_no_parts(kernels, pool):
    pool.run(np.zeros((0, 4), np.int64), 3)
    Work(kernels, parts=(0, 5, 0)).check(lambda s: pool.run(s, 3))


def test_callers_at_the_same_time(kernels, pool):
    """One has the threads, the others run alone; nobody waits for ever or does another's work."""
    works, failed = [Work(kernels, parts=(300 + i, 200, 77)) for i in range(4)], []

    def go(work):
        try:
            for _ in range(200):
                work.check(lambda s: pool.run(s, 2))
        except BaseException as error:
            failed.append(error)

    callers = [threading.Thread(target=go, args=(w,)) for w in works]
    for c in callers:
        c.start()
    for c in callers:
        c.join()
    assert not failed


def test_a_system_that_grants_no_threads(kernels, pool, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    work = Work(kernels)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    work.check(lambda s: pool.run(s, 3))
    monkeypatch.undo()
    work.check(lambda s: pool.run(s, 3))


def test_the_caller_does_what_a_late_thread_has_not_begun(kernels, pool, monkeypatch):
    """Two threads' work, of which one never comes."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    Work(kernels).check(lambda s: pool.run(s, 2))
    pool._workers.clear()  # they cannot be joined


def test_a_closed_pool_runs_alone(kernels):
    pool, work = steps.Pool(), Work(kernels)
    work.check(lambda s: pool.run(s, 2))
    workers = list(pool._workers)
    pool.close()
    assert workers and not any(w.is_alive() for w in workers)
    work.check(lambda s: pool.run(s, 2))


def test_threads_are_at_most_the_cores(kernels, monkeypatch):
    asked = []
    monkeypatch.setattr(steps._pool, "run", lambda s, threads: asked.append(threads))
    monkeypatch.setattr(steps, "cores", lambda: 2)
    for threads in (1, 2, 8):
        steps.run(np.zeros((0, 4), np.int64), threads)
    assert asked == [1, 2, 2]


FORKED = """
import os, sys, warnings
import numpy as np
from edgesdk.kernels.cpu import host_targets
from edgesdk.kernels.library import library
from edgesdk.kernels.numba import steps
from edgesdk.kernels.tape import Tape

steps.cores = lambda: 2
lib = library(host_targets()[-1])
tape = Tape(lib, 2)
x = tape.room(4096, 32)
x.values[:] = np.random.default_rng(0).standard_normal(x.values.shape)
r = tape.round(x, 0)
tape._rows[0] = (*tape._rows[0][:3], 1)
tape.run()
first = r.q.copy()
warnings.simplefilter("ignore")  # Python 3.12's, of threads and forks
child = os.fork()
r.q[:] = 0
tape.run()
assert np.array_equal(first, r.q) and len(steps._pool._workers) == 1
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print("both")
"""


def test_a_fork_after_threads_ran_has_its_own(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0 and done.stdout.strip() == "both", done.stderr


def test_a_slow_step_is_divided(kernels, pool):
    """Both threads take part: the worker's chunks are done by it, unless it had no core all the while."""
    work = Work(kernels, parts=(64,), name="crawl", rounds=500_000)
    before = time.process_time(), time.thread_time()
    for _ in range(5):
        work.check(lambda s: pool.run(s, 2))
    process, own = (now - then for now, then in zip((time.process_time(), time.thread_time()), before, strict=True))
    assert process > 1.1 * own, f"{process:.3f} s in all, {own:.3f} s of them the caller's"
