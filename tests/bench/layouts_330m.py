"""The published comparison in kind: a 330M encoder-decoder and the decoder-only twin of equal size, predicted beside measured on this machine.

    python tests/bench/layouts_330m.py --folder FOLDER [--weights int8,int4] [--runtime executorch] [--source 512] [--out samples.json]
    python tests/bench/layouts_330m.py --folder FOLDER --layers 6,3      # layers of the same width, fewer of them: a trial run
    python tests/bench/layouts_330m.py --folder FOLDER --measured samples.json      # predicted anew, beside what was measured then

Encoder 20 layers, decoder 10, width 1024, 6 heads and 3 of keys and values of 64, feed-forward 4096 without a gate, vocabulary 32128.
Weights are random: speed and memory do not depend on them. Programs are lowered in processes of their own (minutes each; kept in the
folder and used again) and timed in fresh ones that map the file, by turns, so that a busy stretch meets both layouts. All samples go
into the JSON; times shown are of the processor (one thread), which other work on the machine disturbs least. Throughput is of whole
answers: tokens written over the time from the prompt to the last token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgesdk.devices import load_device
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.costs import programs
from edgesdk.sequence.estimate import Where, memory_of, places, program_estimate
from edgesdk.sequence.shapes import sized
from tests.bench.layout_programs import seconds_of

PUBLISHED = {"first token": "47% lower", "throughput": "4.7x", "memory": "11 to 16% less", "FLOPs": "22% fewer"}
SLOTS = 128
WRITTEN = (1, 8, 32, 128)
ROUNDS = 5
CHILD = Path(__file__).with_name("layout_programs.py")


def twins(layers: tuple[int, int]) -> dict[str, SequenceConfig]:
    stack = Stack(layers=layers[0], dim=1024, heads=6, kv_heads=3, head=64, ffn=4096)
    decoder = stack.model_copy(update={"layers": layers[1]})
    first = SequenceConfig(layout="encoder-decoder", vocab=32128, encoder=stack, decoder=decoder, gated=False, activation="relu")
    return {"encoder-decoder": first, "decoder-only": sized("decoder-only", first, first.parameters)}


def child(*words: object) -> dict[str, Any]:
    """The last line that `layout_programs.py` writes, in a process of its own."""
    done = subprocess.run([sys.executable, str(CHILD), *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"layout_programs.py {' '.join(map(str, words))}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(args: argparse.Namespace, weights: str, source: int, configs: dict[str, SequenceConfig]) -> dict[str, Any]:
    """Every layout's samples, in rounds by turns."""
    files, lowered = {}, {}
    for name, config in configs.items():
        stem = f"{name}-{config.parameters // 10**6}M-{args.runtime}-{weights}-{source}"
        files[name], path = args.folder / stem, config.save(args.folder / f"{stem}.json")
        if not files[name].exists():
            sys.stderr.write(f"lowering {stem}\n")
            words = ("--runtime", args.runtime, "--weights", weights, "--source", source, "--slots", SLOTS)
            lowered[name] = child("lower", path, files[name], *words)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    for i in range(args.rounds):
        for name in configs:
            sys.stderr.write(f"timing {files[name].name}, round {i + 1}\n")
            config = files[name].with_name(files[name].name + ".json")
            rounds[name].append(child("time", config, files[name], "--runtime", args.runtime, "--seconds", args.seconds))
    return {"lowered": lowered, "rounds": rounds}


def answer(times: dict[str, float], written: int) -> tuple[float, float]:
    """Seconds to the first token and to the last of `written`."""
    first = times["encode"] + times["decode"] if "encode" in times else times["prefill"]
    return first, first + (written - 1) * times["decode"]


def row(config: SequenceConfig, where: Where, source: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted and measured of one layout."""
    made = {p.graph.name: p for p in programs(config, 1, source, SLOTS, 2)}
    memory = memory_of(config, where, 1, [source], SLOTS)
    grown = [r["peak_bytes"] - r["before"]["VmRSS"] for r in rounds]
    return {
        "parameters": config.parameters, "predicted_s": {n: program_estimate(p, where).value for n, p in made.items()},
        "interval_s": {n: [(e := program_estimate(p, where)).low, e.high] for n, p in made.items()},
        "measured_s": seconds_of(rounds), "clock_s": {m: min(statistics.median(r["samples_s"][m]) for r in rounds) for m in rounds[0]["samples_s"]},
        "macs": {n: p.macs for n, p in made.items()},
        "predicted_peak_bytes": memory.peak_bytes, "runtime_bytes": memory.runtime_bytes or 0,
        "weight_bytes": memory.weights_bytes, "packed_bytes": memory.packed_bytes,
        "measured_peak_bytes": statistics.median(r["peak_bytes"] for r in rounds), "measured_growth_bytes": statistics.median(grown),
        "file_bytes": rounds[0]["file_bytes"],
    }  # fmt: skip


def flops(r: dict[str, Any], written: int) -> float:
    calls = written if "encode" in r["macs"] else written - 1
    return 2.0 * (sum(v for k, v in r["macs"].items() if k != "decode") + calls * r["macs"]["decode"])


def report(weights: str, source: int, rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"\n{weights}, {source} tokens read, caches for {SLOTS} written; predicted | measured"]
    for name, r in rows.items():
        calls = ", ".join(f"{m} {r['predicted_s'][m] * 1e3:.1f} | {r['measured_s'][m] * 1e3:.1f} ms" for m in r["predicted_s"])
        memory = f"growth in memory {r['predicted_peak_bytes'] / 1e6:.0f} | {r['measured_growth_bytes'] / 1e6:.0f} MB"
        peak = f"whole process {r['measured_peak_bytes'] / 1e6:.0f} MB"
        lines.append(f"  {name:16} {r['parameters'] / 1e6:.1f}M  {calls}  {memory} ({peak}, file {r['file_bytes'] / 1e6:.0f} MB)")
    one, two = rows["encoder-decoder"], rows["decoder-only"]
    for written in WRITTEN:
        parts = []
        for kind in ("predicted_s", "measured_s"):
            (first, whole), (plain_first, plain_whole) = (answer(r[kind], written) for r in (one, two))
            parts.append((1 - first / plain_first, plain_whole / whole))
        spared = 1 - flops(one, written) / flops(two, written)
        lines.append(
            f"  {written:4} written: first token {parts[0][0]:.0%} | {parts[1][0]:.0%} lower, throughput {parts[0][1]:.2f}x | {parts[1][1]:.2f}x, "
            f"{spared:.0%} fewer FLOPs"
        )
    token = [two[k]["decode"] / one[k]["decode"] for k in ("predicted_s", "measured_s")]
    kinds = ("predicted_peak_bytes", "measured_growth_bytes")
    room = [1 - one[k] / two[k] for k in kinds]
    model = [1 - (one[k] - one["runtime_bytes"]) / (two[k] - two["runtime_bytes"]) for k in kinds]
    lines.append(f"  each further token {token[0]:.2f}x | {token[1]:.2f}x as fast")
    lines.append(f"  memory {room[0]:.1%} | {room[1]:.1%} less, without the runtime's own {model[0]:.1%} | {model[1]:.1%} less")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="programs are kept here (2 GB for all)")
    parser.add_argument("--weights", default="int8,int4")
    parser.add_argument("--runtime", default="executorch")
    parser.add_argument("--source", default="512", help="tokens read: 512 or 128,512; programs for each")
    parser.add_argument("--layers", default="20,10")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each program in a round")
    parser.add_argument("--measured", type=Path, help="samples of an earlier run: nothing is lowered or timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    known = {(c["weights"], c["source"]): c for c in json.loads(args.measured.read_text())["cases"]} if args.measured else None
    encoder, decoder = (int(n) for n in args.layers.split(","))
    configs = twins((encoder, decoder))
    found = []
    for weights in args.weights.split(","):
        where = places(load_device("host"), weights, args.runtime, 1)[0]  # type: ignore[arg-type]
        for source in (int(n) for n in args.source.split(",")):
            if known is not None and (weights, source) not in known:
                continue
            samples = {k: known[weights, source][k] for k in ("lowered", "rounds")} if known else measured(args, weights, source, configs)
            rows = {name: row(config, where, source, samples["rounds"][name]) for name, config in configs.items()}
            found.append({"weights": weights, "source": source, "rows": rows, **samples})
            sys.stdout.write("\n".join(report(weights, source, rows)) + "\n")
            sys.stdout.flush()
            if args.out:  # after every case: the next one takes minutes
                kept = {"kind": "layouts-330m", "schema_version": 1, "runtime": args.runtime, "layers": [encoder, decoder], "cases": found}
                args.out.write_text(json.dumps(kept, indent=1))
    sys.stdout.write("\npublished (other devices and runtimes): " + ", ".join(f"{k} {v}" for k, v in PUBLISHED.items()) + "\n")


if __name__ == "__main__":
    main()
