"""How fast memory, arithmetic and the disk are, and how long a call takes. Goes to the device as it is; numpy is used where there is one.

Each measurement is bounded: half a minute in all, a quarter of the free memory, 64 MB of the disk for a moment.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from .facts import memory_bytes
from .look import read

LEVELS = ("L1", "L2", "L3", "memory")
ALL_S = 0.5
FILE_BYTES = 64 << 20
BLOCK_BYTES = 1 << 20
READ_S = 8.0
NO_DISK = ("tmpfs", "ramfs", "devtmpfs", "rootfs")


def time_call(call: Callable[[], Any], threads: int = 1, *, rounds: int = 3, seconds: float = 0.012, least: int = 7) -> float:
    """The least of `rounds` medians, in seconds: the median ignores single disturbances, the least of them a busy stretch.

    Of one thread the time of the processor, which is the clock's where nothing else runs; of several that of the clock. Calls that take longer than
    a tenth of a second are made fewer times.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    start = time.perf_counter()
    call()
    if time.perf_counter() - start > 0.1:
        rounds, least = 1, 3
    else:
        call()
        call()
    medians = []
    for _ in range(rounds):
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < least or time.perf_counter() < end:
            start = clock()
            call()
            times.append(clock() - start)
        medians.append(sorted(times)[len(times) // 2])
    return min(medians)


def read_rates(sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes a second that one thread reads, by level: maxima of arrays of so many bytes. Needs numpy.

    In time of the processor, and not by a BLAS, which takes more threads for large arrays and waits for them where others work.
    """
    import numpy as np

    found = {}
    for level, size in sizes.items():
        a = np.ones(max(size // 8, 64), np.int64)
        calls = max(1, int((4 << 20) // a.nbytes))
        best = math.inf
        for _ in range(12):
            start = time.process_time()
            for _ in range(calls):
                a.max()  # reads the array once from this level
            best = min(best, time.process_time() - start)
        found[level] = a.nbytes * calls / max(best, 1e-9)
    order = [k for k in LEVELS if k in found]
    for near, far in zip(order[-2::-1], order[:0:-1]):  # noqa: B905 (3.9 has no strict)
        found[near] = max(found[near], found[far])  # a nearer level is never slower: short calls hide it
    return found


def speed(root: str, last_cache_bytes: int = 8 << 20) -> dict[str, Any]:
    """What `edgesdk devices probe --measure` asks for; in a process of its own, whose numpy then takes one thread."""
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spare = (memory_bytes("MemAvailable") or 256 << 20) // 4
    one, how = scanner(min(4 * last_cache_bytes, spare))
    found: dict[str, Any] = {"one_thread_bytes_per_s": rate_of(one, 8), "how": how, "processes": cores}
    found["all_threads_bytes_per_s"] = max(found["one_thread_bytes_per_s"], side_by_side(cores, min(4 * last_cache_bytes, spare // cores)))
    found["fp32_ops_per_s"] = matrix_rate()
    found["storage_bytes_per_s"], found["storage_how"] = disk_rate(root)
    return found


def scanner(size: int) -> tuple[Callable[[], int], str]:
    """(a call that reads so many bytes of memory and answers their number, how)."""
    try:
        import numpy as np

        a = np.ones(max(size // 8, 64), np.int64)
        return lambda: a.nbytes if a.max() else 0, "maxima of an array by numpy"
    except ImportError:
        b = bytearray(b"\1") * max(size, 64)
        return lambda: len(b) if b.find(0) < 0 else 0, "a search of bytes that are not there by Python"


def rate_of(call: Callable[[], int], times: int) -> float:
    """Bytes a second of the processor's time, the best of so many calls."""
    best = 0.0
    for _ in range(times):
        start = time.process_time()
        size = call()
        best = max(best, size / max(time.process_time() - start, 1e-9))
    return best


def side_by_side(processes: int, size: int) -> float:
    """Bytes a second that so many processes read together."""
    start, pipes = time.perf_counter() + 0.5, []
    for _ in range(processes):
        ours, theirs = os.pipe()
        if os.fork() == 0:
            try:
                os.close(ours)
                call, _ = scanner(size)
                call()
                time.sleep(max(0.0, start - time.perf_counter()))
                begun, done = time.perf_counter(), 0
                while time.perf_counter() - begun < ALL_S:
                    done += call()
                os.write(theirs, b"%d" % (done / (time.perf_counter() - begun)))
            finally:
                os._exit(0)
        os.close(theirs)
        pipes.append(ours)
    total = 0.0
    for pipe in pipes:
        told = os.read(pipe, 64)
        total += float(told or 0)
        os.close(pipe)
        os.wait()
    return total


def matrix_rate() -> float | None:
    """float32 operations a second of one core, two a multiply-add, by numpy's matrix product; None without numpy."""
    try:
        import numpy as np
    except ImportError:
        return None
    a = np.ones((384, 384), np.float32)
    return 2 * 384.0**3 / max(time_call(lambda: a @ a), 1e-9)


def disk_rate(root: str) -> tuple[float | None, str]:
    """(bytes a second read past the page cache, how); None with the reason where that cannot be had."""
    if kind_of(root) in NO_DISK:
        return None, "edgesdk's folder is in memory"
    path = os.path.join(root, f"speed-{os.getpid()}")
    try:
        os.makedirs(root, exist_ok=True)
        place = os.statvfs(root)
        size = min(FILE_BYTES, place.f_bavail * place.f_frsize // 8) // BLOCK_BYTES * BLOCK_BYTES
        if size < 8 * BLOCK_BYTES:
            return None, "the disk has too little room"
        block = os.urandom(BLOCK_BYTES)
        with open(path, "wb") as file:
            for _ in range(size // BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return read_past_cache(path), f"{size >> 20} MiB read with O_DIRECT"
    except OSError as error:
        return None, f"the disk cannot be read past its cache ({error.strerror})"
    finally:
        if os.path.exists(path):
            os.unlink(path)


def read_past_cache(path: str) -> float:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, BLOCK_BYTES)  # aligned, as O_DIRECT wants it
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < READ_S and (got := os.readv(fd, [buffer])):
            done += got
        return done / max(time.perf_counter() - start, 1e-9)
    finally:
        os.close(fd)


def kind_of(folder: str) -> str:
    """The kind of file system that holds a folder, by its longest mount point."""
    folder, best, kind = os.path.realpath(folder) + "/", "", ""
    for line in read("/proc/mounts").splitlines():
        words = line.split()
        if len(words) > 2 and folder.startswith(words[1].rstrip("/") + "/") and len(words[1]) >= len(best):
            best, kind = words[1], words[2]
    return kind
