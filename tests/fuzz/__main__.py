"""`python -m tests.fuzz TARGET --minutes 10`: coverage-guided fuzzing of one target with atheris. Ends at the first finding, whose input is kept."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from edgesdk.cache import cache_dir


def main() -> None:
    from tests.fuzz.targets import DICTIONARY, TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, epilog="targets: " + ", ".join(TARGETS))
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--input", type=Path, help="run this one input alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgesdk-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as work:
        folder = Path(work)
        os.environ["EDGESDK_KEYS"] = str(folder / "keys")
        if given.input:
            from tests.fuzz.targets import run

            sys.stdout.write(f"taken: {run(given.target, given.input.read_bytes(), folder)}\n")
            return
        _fuzz(given.target, given.minutes, folder, DICTIONARY)


def _fuzz(target: str, minutes: float, folder: Path, words: tuple[bytes, ...]) -> None:
    import atheris

    from tests.fuzz import trees

    with atheris.instrument_imports(include=["edgesdk", "zipfile", "json", "tomllib"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS, run

        seeds = TARGETS[target].seeds(folder)
        for seed in seeds:
            run(target, seed, folder)
    corpus = cache_dir("fuzz") / target
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds):
        (corpus / f"seed-{i}").write_bytes(seed)
    (folder / "words").write_text("".join('"' + "".join(f"\\x{b:02x}" for b in w) + '"\n' for w in words))
    found = cache_dir("fuzz") / "findings"
    found.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        run(target, data, folder)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        made = trees.inside(data, seed) if seed & 1 else None
        return atheris.Mutate(data, most) if made is None or len(made) > most else made

    options = {
        "max_total_time": int(minutes * 60),
        "timeout": 20,  # of one input
        "rss_limit_mb": 2048,
        "max_len": 1 << 16,
        "dict": folder / "words",
        "artifact_prefix": f"{found}/{target}-",
        "print_final_stats": 1,
    }
    atheris.Setup([sys.argv[0], *(f"-{k}={v}" for k, v in options.items()), str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
