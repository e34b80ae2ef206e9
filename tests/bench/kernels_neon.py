"""What the arm64 kernels cost: exact instructions (counted in an emulator), static cycles, bytes, and what that means on a Pi 4 and a Pi 5.

    python -m tests.bench.kernels_neon [--ours] > table.md

Peers are the machine code that others ship: XNNPACK's kernels out of LiteRT's aarch64 wheel, and ggml's, compiled from the sources of
llama-cpp-python's source package; both are fetched by pip into the cache. Needs: apt-get install qemu-user gcc llvm-19.
Counts are exact. Cycles are llvm-mca's, loop by loop, times how often each ran, and at least what the decoder takes (A72 3 instructions a
cycle, A76 4): they know of no cache miss and no mispredicted branch, and are no measurement. Nothing here has run on a board.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgesdk.cache import cache_dir
from edgesdk.kernels.neon import build
from edgesdk.kernels.sparse import packed
from tests import emulated
from tests.emulated import Case
from tests.test_kernels_neon import bytes_of, grid
from tests.test_kernels_sparse import grid as sparse_grid

ROWS, COLS, MANY = 64, 1024, 128
IMAGE = 0x6000000000
NATIVE = Path(__file__).parents[1] / "native"
CORES: dict[str, tuple[str, dict[str, tuple[str, int]]]] = {
    "arm-neon": ("cortex-a72", {"A72": ("cortex-a72", 3), "A53": ("cortex-a53", 2)}),
    "arm-dotprod": ("cortex-a76", {"A76": ("neoverse-n1", 4)}),
    "arm-i8mm": ("max", {"A710": ("neoverse-n2", 5)}),
}
"""Target → emulated core, and for each core llvm-mca's model and the instructions it decodes a cycle. The Neoverse N1 is a Cortex-A76, the N2
a Cortex-A710."""
BOARDS = {"Pi 4": ("arm-neon", "A72", 1.8e9, 3.7e9), "Pi 5": ("arm-dotprod", "A76", 2.4e9, 13.8e9)}
"""Board → target, core, clock, bytes a second that one thread reads (published; four threads read hardly more)."""


@dataclass(frozen=True)
class Job:
    """A call to count: what it is, whose, on which target, weight bits, MACs and bytes of weights a MAC row, and the case."""

    what: str
    whose: str
    target: str
    macs: int
    bits: float  # of a weight as stored, scales included
    case: Case
    start: int = 0  # address and length of the function where no symbol tells
    size: int = 0


FORMS = ((8, 0, ""), (4, 32, ""), (4, 0, ""), (3, 32, ""), (2, 32, ""), (2, 0, ""))
SPARSE = ((8, 0, "2of4"), (8, 0, "1of4"), (4, 32, "2of4"), (4, 32, "1of4"), (8, 0, "blocks"), (4, 32, "blocks"))
"""Bits, columns of a group, which weights are left out; those without some of them LLVM has alone."""


def ours(prefix: str, whose: str, target: str) -> list[Job]:
    made = []
    rng = np.random.default_rng(0)
    for bits, group, pattern in (*FORMS, *(SPARSE if prefix else ())):
        code = sparse_grid(0, ROWS, COLS, bits, group, pattern) if pattern else grid(0, ROWS, COLS, bits, group, False)
        panels = packed(code, pattern, 4, 2)
        for how, m in (("gemv", 1), ("gemm", MANY)):
            q = bytes_of(rng.standard_normal((m, COLS)).astype(np.float32))
            case = emulated.product(f"{prefix}{build.symbol(target, '')}{how}_{panels.form}", panels, q, {})
            what = f"{how} {bits} bits, {f'g{group}' if group else 'row'}{f', {pattern}' * bool(pattern)}"
            made.append(Job(what, whose, target, ROWS * COLS * m, panels.nbytes * 8 / (ROWS * COLS), case))
    return made


# ---- peers


def fetched(package: str, *args: str) -> Path:
    """A package's file, by pip, into the cache."""
    folder = cache_dir("kernels") / "peers" / package
    if not (folder.exists() and any(folder.iterdir())):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *args, package], check=True)
    return next(folder.iterdir())


def symbols(path: Path) -> dict[str, tuple[int, int]]:
    """Function → address and size."""
    done = subprocess.run(["llvm-readelf-19", "-sW", str(path)], capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) >= 8 and words[3] == "FUNC" and int(words[1], 16):
            found[words[7].split("@")[0]] = (int(words[1], 16), int(words[2], 0))
    return found


def xnnpack() -> list[Job]:
    platform = ("--only-binary=:all:", "--platform", "manylinux_2_27_aarch64", "--python-version", "3.11", "--implementation", "cp")
    wheel = fetched("ai-edge-litert", *platform)
    path = cache_dir("kernels") / "peers" / "libpywrap_litert_common.so"
    if not path.exists():
        with zipfile.ZipFile(wheel) as z:
            path.write_bytes(z.read("ai_edge_litert/libpywrap_litert_common.so"))
    at = symbols(path)
    made = []
    for target, kernel, form, bits, rows in (
        ("arm-neon", "qd8_f32_qc8w_gemm_minmax_ukernel_1x8c2s4__neon_mlal", "gemv 8 bits, row", 8, 1),
        ("arm-neon", "qd8_f32_qc8w_gemm_minmax_ukernel_1x16__neon_mlal_lane_prfm", "gemv 8 bits, row", 8, 1),
        ("arm-neon", "qd8_f32_qb4w_gemm_minmax_ukernel_1x16__neon_mlal_lane", "gemv 4 bits, g32", 4.5, 1),
        ("arm-neon", "qd8_f32_qc4w_gemm_minmax_ukernel_1x16__neon_mlal_lane", "gemv 4 bits, row", 4, 1),
        ("arm-neon", "qd8_f32_qc8w_gemm_minmax_ukernel_2x8c2s4__neon_mlal", "gemm 8 bits, row", 8, 2),
        ("arm-neon", "qd8_f32_qc8w_gemm_minmax_ukernel_4x16__neon_mlal_lane_prfm", "gemm 8 bits, row", 8, 4),
        ("arm-neon", "qd8_f32_qb4w_gemm_minmax_ukernel_6x16__neon_mlal_lane", "gemm 4 bits, g32", 4.5, 6),
        ("arm-neon", "qd8_f32_qc4w_gemm_minmax_ukernel_6x16__neon_mlal_lane", "gemm 4 bits, row", 4, 6),
        ("arm-dotprod", "qd8_f32_qc8w_gemm_minmax_ukernel_1x16c4__neondot", "gemv 8 bits, row", 8, 1),
        ("arm-dotprod", "qd8_f32_qb4w_gemm_minmax_ukernel_1x16c4__neondot", "gemv 4 bits, g32", 4.5, 1),
        ("arm-dotprod", "qd8_f32_qc4w_gemm_minmax_ukernel_1x16c4__neondot", "gemv 4 bits, row", 4, 1),
        ("arm-dotprod", "qd8_f32_qc2w_gemm_minmax_ukernel_1x8c4__neondot", "gemv 2 bits, row", 2, 1),
        ("arm-dotprod", "qd8_f32_qc8w_gemm_minmax_ukernel_4x16c4__asm_aarch64_neondot_ld128", "gemm 8 bits, row", 8, 4),
        ("arm-dotprod", "qd8_f32_qb4w_gemm_minmax_ukernel_4x16c4__neondot", "gemm 4 bits, g32", 4.5, 4),
        ("arm-dotprod", "qd8_f32_qc4w_gemm_minmax_ukernel_4x16c4__neondot", "gemm 4 bits, row", 4, 4),
        ("arm-i8mm", "qd8_f32_qc8w_gemm_minmax_ukernel_4x16c8__neoni8mm", "gemm 8 bits, row", 8, 4),
        ("arm-i8mm", "qd8_f32_qb4w_gemm_minmax_ukernel_4x16c8__neoni8mm", "gemm 4 bits, g32", 4.5, 4),
        ("arm-i8mm", "qd8_f32_qc4w_gemm_minmax_ukernel_4x16c8__neoni8mm", "gemm 4 bits, row", 4, 4),
    ):  # fmt: skip
        start, size = at["xnn_" + kernel]
        case = Case()
        case.add("path", np.frombuffer(str(path).encode() + b"\0", np.uint8))
        case.tables.append([(0, 0)])
        case.steps.append(("peer_image", 0, (0, 1), 1))
        for name, length in (("a", 8 * COLS), ("w", 2 * ROWS * COLS), ("c", 8 * 4 * ROWS)):
            case.add(name, np.zeros(length, np.uint8))
        case.add("params", np.full(64, 32, np.int64))  # minmax and, for groups, their size
        # mr, nc, kc, a, a_stride, w, c, cm_stride, cn_stride, params, then what newer kernels take: sums and quantization
        args = [rows, ROWS, COLS, "a", COLS, "w", "c", 4 * ROWS, 64 if "x16" in kernel else 32, "params", "params", "params"]
        case.tables.append([IMAGE + start, *((case.places[v], 0) if isinstance(v, str) else v for v in args)])
        case.steps.append(("peer_call", 1, (0, 1), 1))
        made.append(Job(form, f"XNNPACK {kernel.split('ukernel_')[1]}", target, ROWS * COLS * rows, bits, case, IMAGE + start, size))
    return made


GGML = (
    ("arm-neon", "ggml_vec_dot_q8_0_q8_0", "gemv 8 bits, g32", 8.5, 1), ("arm-neon", "ggml_vec_dot_q4_0_q8_0", "gemv 4 bits, g32", 4.5, 1),
    ("arm-dotprod", "ggml_gemv_q8_0_4x4_q8_0", "gemv 8 bits, g32", 8.5, 1), ("arm-dotprod", "ggml_gemv_q4_0_4x4_q8_0", "gemv 4 bits, g32", 4.5, 1),
    ("arm-dotprod", "ggml_gemv_q4_K_8x4_q8_K", "gemv 4 bits, g32", 4.5, 1),
    ("arm-dotprod", "ggml_gemm_q8_0_4x4_q8_0", "gemm 8 bits, g32", 8.5, MANY), ("arm-dotprod", "ggml_gemm_q4_0_4x4_q8_0", "gemm 4 bits, g32", 4.5, MANY),
    ("arm-i8mm", "ggml_gemm_q8_0_4x8_q8_0", "gemm 8 bits, g32", 8.5, MANY), ("arm-i8mm", "ggml_gemm_q4_0_4x8_q8_0", "gemm 4 bits, g32", 4.5, MANY),
)  # fmt: skip


def ggml_objects() -> list[Path]:
    """ggml's arm64 kernels, compiled as its own build does (-O3), with the instructions that each needs."""
    archive = fetched("llama-cpp-python", "--no-binary=llama-cpp-python")
    folder = cache_dir("kernels") / "peers" / "ggml"
    if not folder.exists():
        with tarfile.open(archive) as t:
            t.extractall(folder, [m for m in t.getmembers() if "/vendor/llama.cpp/ggml/" in m.name], filter="data")
    root = next(folder.glob("*/vendor/llama.cpp/ggml"))
    out = []
    zig = [sys.executable, "-m", "ziglang"]
    for source, compiler, cpu in (("arch/arm/repack.cpp", "c++", "generic+dotprod+i8mm"), ("arch/arm/quants.c", "cc", "generic")):
        out.append(folder / (Path(source).stem + ".o"))
        flags = [
            "-O3",
            "-DNDEBUG",
            "-D_GNU_SOURCE",
            "-fno-sanitize=undefined",
            *(f"-I{root / d}" for d in ("include", "src", "src/ggml-cpu")),
        ]
        if not out[-1].exists():
            name = str(root / "src/ggml-cpu" / source)
            subprocess.run(
                [*zig, compiler, "-target", "aarch64-linux-musl", f"-mcpu={cpu}", *flags, "-c", name, "-o", str(out[-1])], check=True
            )
    return out


def missing(objects: Sequence[Path]) -> Path:
    """A C file of what ggml's kernels call on other machines and never here."""
    done = subprocess.run(["llvm-nm-19", "-g", *map(str, objects)], capture_output=True, text=True, check=True)
    wanted = set(re.findall(r"^ +U ((?:ggml|quantize|iq|kmask|ksigns)\w*)", done.stdout, re.M)) - set(
        re.findall(r" [TDRBWV] (\w+)", done.stdout)
    )
    path = cache_dir("kernels") / "peers" / "missing.c"
    path.write_text("".join(f"char {name}[1 << 18];\n" if "table" in name else f"void {name}(void) {{}}\n" for name in sorted(wanted)))
    return path


def ggml(at: dict[str, tuple[int, int]]) -> list[Job]:
    made = []
    for target, name, form, bits, rows in GGML:
        case = Case()
        for buffer, length in (("s", 4 * ROWS * MANY), ("x", 2 * ROWS * COLS), ("y", 4 * MANY * COLS)):
            case.add(buffer, np.zeros(length, np.uint8))
        s, x, y = ((case.places[b], 0) for b in "sxy")
        dot = "vec_dot" in name  # n, s, bs, vx, bx, vy, by, rows: one row of weights a call; else n, s, bs, vx, vy, rows, columns
        args = [COLS, s, 0, x, 0, y, 0, 1, 0, 0, 0, 0] if dot else [COLS, s, ROWS, x, y, rows, ROWS, 0, 0, 0, 0, 0]
        case.tables.append([at[name][0], *args])
        case.steps.append(("peer_call", 0, (0, 1), 1))
        made.append(Job(form, f"ggml {name[5:]}", target, COLS * rows * (1 if dot else ROWS), bits, case, *at[name]))
    return made


# ---- counting


def plugin() -> Path:
    out = cache_dir("kernels") / "libcount.so"
    subprocess.run(
        [shutil.which("gcc") or "cc", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(out), str(NATIVE / "count.c")], check=True
    )
    return out


def counted(harness: Path, names: Sequence[str], job: Job, counter: Path) -> dict[int, int]:
    """Address → times, of all instructions that ran."""
    folder = cache_dir("kernels") / "counting"
    folder.mkdir(exist_ok=True)
    listing = folder / "counts"
    qemu = shutil.which("qemu-aarch64") or sys.exit("the dynamic qemu-user is needed: apt-get install qemu-user")
    emulated.run(
        harness, names, [job.case], CORES[job.target][0], folder, (qemu, "-plugin", str(counter), "-d", "plugin", "-D", str(listing))
    )
    return {int(a, 16): int(n) for a, n in (line.split() for line in listing.read_text().splitlines())}


@dataclass(frozen=True)
class Cost:
    instructions: int
    cycles: dict[str, float]  # by core


def blocks_of(times: dict[int, int], text: dict[int, str]) -> list[tuple[int, list[str]]]:
    """Straight pieces of code that ran: how often, and their instructions."""
    out: list[tuple[int, list[str]]] = []
    before, branched = -1, True
    for address in sorted(times):
        words = text[address]
        if branched or address != before + 4 or out[-1][0] != times[address]:
            out.append((times[address], []))
        out[-1][1].append(words)
        before, branched = address, bool(re.match(r"(b|b\..*|bl|br|ret|cbn?z|tbn?z)\b", words.split()[0]))
    return out


def cycles_of(blocks: Sequence[tuple[int, list[str]]], model: str, width: int) -> float:
    """Σ over pieces: times they ran · cycles a round, as if each were a loop of its own."""
    lines = []
    for i, (_, code) in enumerate(blocks):
        lines += [f"# LLVM-MCA-BEGIN b{i}", *code, "# LLVM-MCA-END"]
    command = [
        "llvm-mca-19",
        "-mtriple=aarch64",
        "-mattr=+v8.6a,+fullfp16",
        f"-mcpu={model}",
        "-iterations=100",
        "-summary-view",
        "-instruction-info=false",
        "-resource-pressure=false",
    ]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True)
    found = {int(n): int(c) / 100 for n, c in re.findall(r"Code Region - b(\d+)\n(?:.*\n)*?Total Cycles:\s+(\d+)", done.stdout)}
    if len(found) != len(blocks):
        sys.exit(f"llvm-mca: {done.stderr[:500]}")
    return sum(n * max(found[i], len(code) / width) for i, (n, code) in enumerate(blocks))


def disassembled(path: Path, start: int, size: int, base: int = 0) -> dict[int, str]:
    """Address → instruction, branch targets made harmless."""
    command = [
        "llvm-objdump-19",
        "-d",
        "--no-show-raw-insn",
        "--mattr=+v8.6a,+fullfp16",
        f"--start-address={start - base}",
        f"--stop-address={start - base + size}",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    out = {}
    for line in done.stdout.splitlines():
        if found := re.match(r"\s*([0-9a-f]+):\s+(\S.*)", line):
            words = re.sub(r"\s*(<.*|//.*)$", "", found[2].replace("\t", " "))
            if re.match(r"(b|bl|b\.\w+|cbn?z|tbn?z) ", words):
                words = re.sub(r"0x[0-9a-f]+$", "#8", words)
            out[int(found[1], 16) + base] = re.sub(r"^(adrp?) (x\d+), .*", r"\1 \2, #0", words)
    return out


def cost(job: Job, times: dict[int, int], harness: Path, at: dict[str, tuple[int, int]]) -> Cost:
    start, size = (job.start, job.size) if job.start else at[job.case.steps[0][0]]
    inside = {a: n for a, n in times.items() if start <= a < start + size}
    path, base = (harness, 0) if start < IMAGE else (cache_dir("kernels") / "peers" / "libpywrap_litert_common.so", IMAGE)
    blocks = blocks_of(inside, disassembled(path, start, size, base))
    return Cost(sum(inside.values()), {core: cycles_of(blocks, *model) for core, model in CORES[job.target][1].items()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", action="store_true", help="without peers")
    parser.add_argument("--compiler", choices=["zig", "gcc"], default="zig")
    given = parser.parse_args()
    by = next(c for c in build.compilers() if c.kind == given.compiler)
    jobs = [j for t in CORES for j in ours("", "edgesdk C", t)] + [j for t in CORES for j in ours("llvm_", "edgesdk LLVM", t)]
    names = [j.case.steps[0][0] for j in jobs] + ["peer_image", "peer_call"]
    objects = emulated.emitted(list(CORES), sorted({n.split("_", 3)[3] for n in names if n.startswith("llvm_")}))
    if not given.ours:
        jobs += xnnpack()
        objects += ggml_objects()
        names += [name for _, name, *_ in GGML]
    harness = emulated.program(names, objects, by, [NATIVE / "peer.c", *([] if given.ours else [missing(objects)])])
    at = symbols(harness)
    if not given.ours:
        jobs += ggml(at)
    counter = plugin()
    table: dict[tuple[str, str], list[tuple[Job, Cost]]] = defaultdict(list)
    for job in jobs:
        table[job.target, job.what].append((job, cost(job, counted(harness, names, job, counter), harness, at)))
    report(table)


def report(table: dict[tuple[str, str], list[tuple[Job, Cost]]]) -> None:
    """A table a target. On a board: what computing takes on one core, what reading the weights takes, and the larger of the two on four."""
    write = sys.stdout.write
    for target, (_, cores) in CORES.items():
        boards = {n: b for n, b in BOARDS.items() if b[0] == target}
        heads = ["operation", "whose", "instructions", *(f"cycles, {c}" for c in cores), "bytes"]
        heads += [h for n in boards for h in (f"{n}: ns of one core", "ns to read", "ns of four cores")]
        write(f"\n### {target}, for 128 multiply-adds\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
        for (here, what), rows in sorted(table.items(), key=lambda e: (e[0][1][:4], -int(e[0][1][5]), e[0][1])):
            for job, c in rows if here == target else []:
                each, size = 128 / job.macs, 16 * job.bits
                vector = what.startswith("gemv")
                shown = [
                    what,
                    job.whose,
                    f"{c.instructions * each:.1f}",
                    *(f"{v * each:.1f}" for v in c.cycles.values()),
                    f"{size:.0f}" if vector else "-",
                ]
                for _, core, clock, rate in boards.values():
                    compute, read = c.cycles[core] * each / clock * 1e9, size / rate * 1e9 if vector else 0
                    shown += [f"{compute:.1f}", f"{read:.1f}" if vector else "-", f"{max(compute / 4, read):.1f}"]
                write(f"| {' | '.join(shown)} |\n")


if __name__ == "__main__":
    main()
