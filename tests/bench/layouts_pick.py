"""Does the cost model pick the layout that measures best here? Held-out cases: sizes and lengths that nothing was tuned on.

    python tests/bench/layouts_pick.py --folder FOLDER [--runtime litert] [--sizes small,narrow,wide] [--out samples.json]
    python tests/bench/layouts_pick.py --folder FOLDER --measured samples.json     # predicted anew, beside what was measured then

For each size, every layout is lowered once (kept in the folder) with caches for the longest answer; each program is timed in fresh
processes by turns (processor time, one thread), and an answer's time is that of its programs as often as they run. A case is a budget of parameters, a length read
and a length written. The regret is how much longer the picked layout takes than the best one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgesdk.devices import load_device
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.estimate import Where, parts_of, places
from edgesdk.sequence.shapes import LAYOUTS, sized
from tests.bench.layout_programs import seconds_of

CHILD = Path(__file__).with_name("layout_programs.py")
SLOTS = 48
BASES = {
    "small": Stack(layers=6, dim=128, heads=4, kv_heads=2, head=32, ffn=512),
    "narrow": Stack(layers=4, dim=256, heads=4, kv_heads=2, head=64, ffn=1024),
    "wide": Stack(layers=4, dim=640, heads=8, kv_heads=4, head=64, ffn=1920),
}
VOCAB = {"small": 2000, "narrow": 4000, "wide": 8000}
NAMES = ("decoder-only", "encoder-decoder 1/2", "encoder-decoder, one-layer decoder", "decoder-decoder")
READ = {"small": (16, 64), "narrow": (24, 96), "wide": (48,)}
WRITTEN = (2, 4, 8, 16, 32, 48)


def config_of(size: str, name: str) -> SequenceConfig:
    """A layout of a size: as many parameters as a decoder-only model with the base's layers."""
    base = SequenceConfig(layout="decoder-only", vocab=VOCAB[size], decoder=BASES[size])
    return sized(name, base, base.parameters)


def child(*words: object) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(CHILD), *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"layout_programs.py {' '.join(map(str, words))}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Model:
    """A layout of a size for one length read, with what was measured of it."""

    def __init__(self, size: str, name: str, read: int, args: argparse.Namespace) -> None:
        self.size, self.name, self.read, self.args = size, name, read, args
        self.config = config_of(size, name)
        stem = f"{size}-{name.replace(' ', '_').replace('/', '-')}-{args.runtime}-{read}"
        self.file, self.json = args.folder / stem, args.folder / f"{stem}.json"
        self.rounds: list[dict[str, Any]] = []

    def lower(self) -> None:
        if not self.file.exists():
            sys.stderr.write(f"lowering {self.file.name}\n")
            self.config.save(self.json)
            child("lower", self.json, self.file, "--runtime", self.args.runtime, "--source", self.read, "--slots", SLOTS)

    def time(self) -> None:
        sys.stderr.write(f"timing {self.file.name}\n")
        self.rounds.append(child("time", self.json, self.file, "--runtime", self.args.runtime, "--seconds", self.args.seconds))

    def can(self, written: int) -> bool:
        return self.config.decoder is not None or written <= self.read

    def measured(self, written: int) -> float:
        times = seconds_of(self.rounds)
        if self.config.decoder is None:
            return times["encode"]
        first = times["encode"] + times["decode"] if self.config.encoder else times["prefill"]
        return first + (written - 1) * times["decode"]

    def predicted(self, where: Where, written: int) -> float:
        return parts_of(self.config, where, 1, self.read, SLOTS).answer(written).value


def cases(models: list[Model], where: Where) -> list[dict[str, Any]]:
    """Every size, lengths read and written; the pick against the best."""
    found = []
    for size in BASES:
        for read in READ[size]:
            own = [m for m in models if (m.size, m.read) == (size, read)]
            for written in WRITTEN if own else ():
                able = [m for m in own if m.can(written)]
                times = {m.name: {"predicted_s": m.predicted(where, written), "measured_s": m.measured(written)} for m in able}
                pick = min(times, key=lambda n: times[n]["predicted_s"])
                best = min(times, key=lambda n: times[n]["measured_s"])
                regret = times[pick]["measured_s"] / times[best]["measured_s"] - 1
                found.append(
                    {"size": size, "read": read, "written": written, "pick": pick, "best": best, "regret": regret, "layouts": times}
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runtime", default="litert")
    parser.add_argument("--sizes", default=",".join(BASES))
    parser.add_argument("--names", default="|".join(NAMES), help=f"of {', '.join(LAYOUTS)}; | between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--measured", type=Path, help="samples of an earlier run: nothing is lowered or timed")
    parser.add_argument("--lower-only", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    where = places(load_device("host"), "int8", args.runtime, 1)[0]
    models = [Model(size, name, read, args) for size in args.sizes.split(",") for read in READ[size] for name in args.names.split("|")]
    if args.measured:
        known = json.loads(args.measured.read_text())["rounds"]
        models = [m for m in models if m.file.name in known]
        for model in models:
            model.rounds = known[model.file.name]
    else:
        for model in models:
            model.lower()
        for _ in range(0 if args.lower_only else args.rounds):
            for model in models:
                model.time()
    if args.lower_only:
        return
    found = cases(models, where)
    for c in found:
        shown = ", ".join(f"{n} {t['predicted_s'] * 1e3:.2f} | {t['measured_s'] * 1e3:.2f}" for n, t in c["layouts"].items())
        verdict = "best" if c["pick"] == c["best"] else f"best is {c['best']}, regret {c['regret']:.1%}"
        sys.stdout.write(f"{c['size']}, {c['read']} read, {c['written']} written: picks {c['pick']}: {verdict}  (ms: {shown})\n")
    right = sum(c["pick"] == c["best"] for c in found)
    worst = max(c["regret"] for c in found)
    sys.stdout.write(f"the pick is best in {right} of {len(found)} cases; largest regret {worst:.1%}\n")
    if args.out:
        rounds = {m.file.name: m.rounds for m in models}
        args.out.write_text(json.dumps({"kind": "layouts-pick", "schema_version": 1, "cases": found, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
