"""Programs of a layout with random weights: lowered into a file, and timed in a fresh process that maps the file.

    python tests/bench/layout_programs.py lower CONFIG.json FILE --runtime executorch --weights int8 --source 512 --slots 128
    python tests/bench/layout_programs.py time CONFIG.json FILE --runtime executorch --seconds 4

Both are called by `layouts_330m.py`, `layouts_pick.py` and `native_330m.py`: one model at a time is in memory. For `llama.cpp` see `llama_peer.py`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgesdk.sequence.config import SequenceConfig

START = (0,)


def spec_of(config: SequenceConfig, source: int, slots: int, batch: int) -> Any:
    """The model's programs for `source` tokens read and `slots` written, with seeded noise as weights."""
    import torch

    from edgesdk.sequence.export import sequence_spec
    from edgesdk.sequence.model import SequenceModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cache = slots if config.encoder else source + slots
    return sequence_spec(
        SequenceModel(config), name=config.layout, source_lengths=(source,), cache_lengths=(cache,), batch=batch, start=START
    )


def prompt(config: SequenceConfig, source: int) -> Any:
    """Token ids int64 [source], always the same."""
    import numpy as np

    return np.random.default_rng(1).integers(1, config.vocab, source)


def lower_llama(config: SequenceConfig, path: Path, kind: str, source: int) -> float:
    """The weights of `spec_of` as llama.cpp reads them; beside them what the model in float32 says to the prompt."""
    import numpy as np
    import torch

    from edgesdk.sequence.model import SequenceModel
    from tests.bench.llama_peer import write

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokens, start = SequenceModel(config).eval(), torch.from_numpy(prompt(config, source))[None], time.process_time()
    wanted = path.with_name(f"{config.layout}-{config.parameters // 10**6}M-{source}.npy")
    if not wanted.exists():
        with torch.no_grad():
            np.save(wanted, model(None, None, tokens)[0, -1].numpy())
    write(config, {k: v.numpy() for k, v in model.state_dict().items()}, path, kind)
    return time.process_time() - start


def logits_of(runner: Any, config: SequenceConfig, source: int) -> list[float]:
    """What a decoder-only program of ours says to the prompt: its last token's logits."""
    import numpy as np

    arrays = [prompt(config, source)[None], np.arange(source)[None], np.array([source - 1]), np.zeros((1, source), np.float32)]
    return list(map(float, runner.run("prefill", arrays)[0][0]))


def lower_to(config: SequenceConfig, path: Path, runtime: str, weights: str, source: int, slots: int, batch: int = 1) -> float:
    """Lower into `path`; seconds of CPU it took. Each weight is held as the layout search says, but LiteRT's embeddings in float: it leaves
    them so where one program has them as its head, too, and no time depends on it."""
    from edgesdk.devices import load_device
    from edgesdk.graph import trace
    from edgesdk.lower import lower
    from edgesdk.sequence.estimate import places

    spec, where = spec_of(config, source, slots, batch), places(load_device("host"), weights, runtime, 1)[0]  # type: ignore[arg-type]
    choice: dict[tuple[str, str], str] = {}
    for method in trace(spec).methods:
        choice |= {
            (method.name, u.name): p
            for u in method.units
            if (u.op == "linear" or runtime == "executorch") and u.weight_elements and (p := where.precision(u)) != "fp32"
        }
    start = time.process_time()
    path.write_bytes(lower(spec, runtime, choice, lambda text: None))
    return time.process_time() - start


def status_bytes() -> dict[str, int]:
    """Resident bytes of this process by kind, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        k: int(v.split()[0]) * 1024 for k, _, v in (line.partition(":") for line in lines) if k in ("VmRSS", "RssAnon", "RssFile", "VmHWM")
    }


def arrays_of(runner: Any, method: str) -> list[Any]:
    """Inputs of a program: token 1 everywhere, everything seen, small noise in the caches."""
    import numpy as np

    rng = np.random.default_rng(0)
    kinds = runner.inputs(method)
    return [
        np.ones(shape, dtype) if np.issubdtype(np.dtype(dtype), np.integer) else rng.standard_normal(shape).astype(np.float32) * 0.02
        for shape, dtype in kinds
    ]


def timed(path: Path, runtime: str, threads: int, seconds: float, config: SequenceConfig | None = None, source: int = 0) -> dict[str, Any]:
    """Raw times of every program's calls, by the clock and of the processor, and the process's memory before and after; with a `config`
    what the model says to the prompt."""
    from edgesdk.runner import open_program

    before = status_bytes()
    start = time.perf_counter()
    runner = open_program(str(path), runtime, threads)
    found: dict[str, Any] = {"samples_s": {}, "cpu_samples_s": {}}
    for method in runner.methods:
        arrays = arrays_of(runner, method)
        runner.run(method, arrays)
        if "opened_s" not in found:
            found["opened_s"] = time.perf_counter() - start
        times: list[float] = []
        cpu: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            at, used = time.perf_counter(), time.process_time()
            runner.run(method, arrays)
            cpu.append(time.process_time() - used)
            times.append(time.perf_counter() - at)
        found["samples_s"][method], found["cpu_samples_s"][method] = times, cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if config is not None:
        found["logits"] = logits_of(runner, config, source)
    return found | {"before": before, "after": status_bytes(), "peak_bytes": peak, "file_bytes": path.stat().st_size}


def seconds_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Each program's least median of a round, of the processor's time: with one thread that is the clock's on a machine that does nothing else."""
    return {m: min(statistics.median(r["cpu_samples_s"][m]) for r in rounds) for m in rounds[0]["cpu_samples_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lower", "time"))
    parser.add_argument("config", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--runtime", default="executorch")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--source", type=int, default=512)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--answer", action="store_true", help="time: what the model says to the prompt, too")
    args = parser.parse_args()
    config = SequenceConfig.load(args.config)
    if args.what == "lower":
        part = args.file.with_suffix(".part")
        if args.runtime == "llama.cpp":
            cpu = lower_llama(config, part, args.weights, args.source)
        else:
            cpu = lower_to(config, part, args.runtime, args.weights, args.source, args.slots, args.batch)
        part.replace(args.file)
        sys.stdout.write(json.dumps({"cpu_s": cpu}) + "\n")
    elif args.runtime == "llama.cpp":
        from tests.bench.llama_peer import timed as timed_llama

        tokens = prompt(config, args.source)
        sys.stdout.write(json.dumps(timed_llama(args.file, config, args.threads, args.seconds, tokens, args.slots, status_bytes)) + "\n")
    else:
        answer = (config, args.source) if args.answer else ()
        sys.stdout.write(json.dumps(timed(args.file, args.runtime, args.threads, args.seconds, *answer)) + "\n")


if __name__ == "__main__":
    main()
