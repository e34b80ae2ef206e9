"""Whole models of 330M parameters on our own kernels, ExecuTorch and llama.cpp: the same weights, 4 bits each, in fresh processes by turns.

    python -m tests.bench.kernels_x86 --install        # llama.cpp, once
    python tests/bench/native_330m.py --folder FOLDER [--threads 1,2] [--rounds 5] [--only decoder-only] [--out samples.json]
    python tests/bench/native_330m.py --folder FOLDER --measured samples.json      # the tables of an earlier run

Shapes are those that all three have. Decoder-only, as llama.cpp's `llama`: 29 layers, width 1024, 8 heads and 4 of keys and values of 64, a gated
feed-forward of 2816, rotary positions, vocabulary 32128, tied. Encoder-decoder, without llama.cpp: 18 and 9 layers, 8 heads, a feed-forward of 4096
with ReLU, relative positions. Seeded noise as weights: speed does not depend on them, and the error, of the logits behind the prompt against
the float32 model, says that all compute the same. Ours and ExecuTorch: int4 in groups of 32, inputs rounded to int8, the looked-up table in int8;
llama.cpp: every matrix Q4_0 or Q4_K. 512 tokens are read, then one token at a time with 128 more behind them, all of them seen. At last the
built-in normalizer, planned for each of the two runtimes it has.
`--clock cpu`: the processor's time of all threads, for one thread on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from edgesdk.sequence.config import SequenceConfig, Stack
from tests.bench.layouts_330m import child

SOURCE, SLOTS = 512, 128
PEERS = {
    "native": ("native", "int4"), "ExecuTorch 8da4w": ("executorch", "int4"), "llama.cpp Q4_0": ("llama.cpp", "Q4_0"),
    "llama.cpp Q4_K": ("llama.cpp", "Q4_K"),
}  # fmt: skip


def configs() -> dict[str, SequenceConfig]:
    one = Stack(layers=29, dim=1024, heads=8, kv_heads=4, head=64, ffn=2816)
    two = Stack(layers=18, dim=1024, heads=8, kv_heads=8, head=64, ffn=4096)
    return {
        "decoder-only": SequenceConfig(layout="decoder-only", vocab=32128, decoder=one),
        "encoder-decoder": SequenceConfig(
            layout="encoder-decoder", vocab=32128, encoder=two, decoder=two.model_copy(update={"layers": 9}), gated=False, activation="relu",
            positions="relative", attention_scale=1.0,
        ),
    }  # fmt: skip


def lowered(args: argparse.Namespace, layout: str, config: SequenceConfig) -> dict[str, Path]:
    """Peer → its program, with its configuration beside it."""
    files = {}
    for name, (runtime, weights) in PEERS.items():
        if (args.peers and not any(w in name for w in args.peers.split(","))) or (runtime == "llama.cpp" and config.encoder):
            continue
        stem = f"{layout}-{config.parameters // 10**6}M-{runtime}-{weights}-{SOURCE}"
        files[name], path = args.folder / stem, config.save(args.folder / f"{stem}.json")
        if not files[name].exists():
            sys.stderr.write(f"lowering {stem}\n")
            child("lower", path, files[name], "--runtime", runtime, "--weights", weights, "--source", SOURCE, "--slots", SLOTS)
    return files


def example(args: argparse.Namespace) -> dict[str, Path]:
    """The built-in normalizer (0.6M parameters) as plans for this machine have it, in int8."""
    from edgesdk.intake import load_model
    from edgesdk.lower import choice_of, lower
    from edgesdk.plan import plan

    spec, files = load_model("example:normalizer"), {}
    core: Any = spec.methods["encode"].module
    for name, runtime in (("native", "native"), ("ExecuTorch", "executorch")):
        files[name] = args.folder / f"normalizer-{runtime}"
        core.core.config.save(args.folder / f"normalizer-{runtime}.json")
        made = plan("example:normalizer", "host", runtime=runtime, layout="encoder-decoder")
        files[name].write_bytes(lower(spec, runtime, choice_of(made)))
    return files


def measured(args: argparse.Namespace, layout: str, files: dict[str, Path], wanted: Path | None) -> list[dict[str, Any]]:
    """Every peer's rounds at every number of threads, by turns. `wanted`: what the float32 model says."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for i in range(args.rounds):
        for threads in (int(t) for t in args.threads.split(",")):
            for name in list(files) if i % 2 == 0 else list(files)[::-1]:
                runtime = PEERS[name][0] if name in PEERS else name.lower()
                words = ["--runtime", runtime, "--threads", threads, "--seconds", args.seconds, "--source", SOURCE, "--slots", SLOTS]
                sys.stderr.write(f"timing {name}, {threads} thread{'s' * (threads > 1)}, round {i + 1}\n")
                path, load = files[name].with_name(files[name].name + ".json"), os.getloadavg()[0]
                once = child("time", path, files[name], *words, *(["--answer"] if i == 0 and wanted else []))
                logits = once.pop("logits", None)
                entry = found.setdefault((name, threads), {"layout": layout, "name": name, "threads": threads, "rounds": []})
                entry["rounds"].append(once | {"load": load})
                if logits is not None and wanted:
                    entry.setdefault("error", error(np.load(wanted), np.array(logits)))
    return list(found.values())


def error(wanted: Any, got: Any) -> float:
    """Relative, root mean square."""
    return float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))


def table(runs: list[dict[str, Any]], clock: str) -> str:
    key = "cpu_samples_s" if clock == "cpu" else "samples_s"
    lines = []
    for layout, threads in dict.fromkeys((r["layout"], r["threads"]) for r in runs):
        here = [r for r in runs if (r["layout"], r["threads"]) == (layout, threads)]
        loads = [x["load"] for r in here for x in r["rounds"]]
        first = "prefill" if layout == "decoder-only" else "encode"
        lines += [
            f"\n### {layout}, {threads} thread{'s' * (threads > 1)}, {clock} time (load {min(loads):.1f} to {max(loads):.1f})\n",
            f"| | a token, ms | from … to | tokens/s | {first}, ms | from … to | opened and called once, s | memory of the process, MB | file, MB | error |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in here:
            each = {m: sorted(statistics.median(x[key][m]) * 1e3 for x in r["rounds"]) for m in (first, "decode")}
            middle = {m: statistics.median(v) for m, v in each.items()}
            peak = statistics.median(x["after"]["VmHWM"] for x in r["rounds"]) / 1e6
            grown = statistics.median(x["after"]["VmHWM"] - x["before"]["VmRSS"] for x in r["rounds"]) / 1e6
            opened = statistics.median(x["opened_s"] for x in r["rounds"])
            lines.append(
                f"| {r['name']} | {middle['decode']:.3g} | {each['decode'][0]:.3g} … {each['decode'][-1]:.3g} | {1e3 / middle['decode']:.0f} | "
                f"{middle[first]:.3g} | {each[first][0]:.3g} … {each[first][-1]:.3g} | {opened:.1f} | {peak:.0f} (grown by {grown:.0f}) | "
                f"{r['rounds'][0]['file_bytes'] / 1e6:.0f} | {r.get('error', float('nan')):.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="programs are kept here (2 GB for all)")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each program in a round")
    parser.add_argument("--only", default="", help="decoder-only, encoder-decoder or normalizer")
    parser.add_argument("--peers", default="", help="words of which a peer's name must hold one, parted by commas")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--measured", type=Path, help="samples of an earlier run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = json.loads(args.measured.read_text())["runs"] if args.measured else []
    for layout, config in {**configs(), "normalizer": None}.items():
        if args.measured or (args.only and args.only != layout):
            continue
        wanted = args.folder / f"{layout}-{config.parameters // 10**6}M-{SOURCE}.npy" if config and not config.encoder else None
        runs += measured(args, layout, lowered(args, layout, config) if config else example(args), wanted)
        sys.stdout.write(table([r for r in runs if r["layout"] == layout], args.clock))
        sys.stdout.flush()
        if args.out:
            args.out.write_text(json.dumps({"kind": "native-330m", "schema_version": 1, "runs": runs}))
    if args.measured:
        sys.stdout.write(table(runs, args.clock))


if __name__ == "__main__":
    main()
