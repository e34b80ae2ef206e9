"""An encoder on the other side of a link: what crosses it, how long the first token takes, and what was predicted.

    python tests/bench/split_link.py --out FOLDER [--source 256] [--dim 384] [--repeats 5]

The encoder runs in a process of its own behind a proxy on loopback that lets so many bytes a second through and holds each byte back for the link's
delay, both ways; the decoder runs here. Predicted: the encoder and the decoder as they take alone, and the bytes by the rate, and twice the delay.
"""

from __future__ import annotations

import argparse
import json
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from edgesdk.bundles import read_manifest, read_member
from edgesdk.lower import build
from edgesdk.plan.planner import make_plan
from edgesdk.plan.types import Budget, Workload
from edgesdk.runner import open_program
from edgesdk.sequence.card import NAME, Card
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.export import sequence_spec
from edgesdk.sequence.generate import generate
from edgesdk.sequence.model import SequenceModel
from edgesdk.sequence.placement import crossing
from edgesdk.sequence.split import Remote, pair_digest

LINKS = {"100 Mbit, 2 ms": (12.5e6, 0.002), "20 Mbit, 10 ms": (2.5e6, 0.010), "2 Mbit, 40 ms": (2.5e5, 0.040)}
MODEL = """
import sys
def model():
    return sys.modules['__main__'].SPEC
"""


class Shaped:
    """A TCP proxy: `rate` bytes a second and `delay` seconds, in each direction."""

    def __init__(self, target: tuple[str, int], rate: float, delay: float) -> None:
        self.target, self.rate, self.delay = target, rate, delay
        self.listen = socket.create_server(("127.0.0.1", 0))
        self.address = self.listen.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            while True:
                near, _ = self.listen.accept()
                far = socket.create_connection(self.target)
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()
        except OSError:
            return

    def _pump(self, a: socket.socket, b: socket.socket) -> None:
        """What is read goes into a queue with the time it may leave at."""
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()
        threading.Thread(target=self._deliver, args=(waiting, b), daemon=True).start()
        free = 0.0  # when the link is free again
        try:
            while data := a.recv(4096):
                free = max(free, time.monotonic()) + len(data) / self.rate
                waiting.put((free + self.delay, data))
        except OSError:
            pass
        waiting.put((0.0, b""))

    def _deliver(self, waiting: queue.Queue[tuple[float, bytes]], b: socket.socket) -> None:
        with b:
            try:
                while (item := waiting.get())[1]:
                    time.sleep(max(0.0, item[0] - time.monotonic()))
                    b.sendall(item[1])
            except OSError:
                pass

    def close(self) -> None:
        self.listen.close()


def made(source: int, dim: int, folder: Path) -> Path:
    """A random encoder-decoder, two thirds of its depth in the encoder, built for this host in float32."""

    def stack(layers: int) -> Stack:
        return Stack(layers=layers, dim=dim, heads=6, kv_heads=3, head=64, ffn=4 * dim)

    torch.manual_seed(0)
    config = SequenceConfig(layout="encoder-decoder", vocab=4000, gated=False, encoder=stack(8), decoder=stack(4))
    prompts = [[int(t) for t in np.random.default_rng(0).integers(3, 4000, source)]]
    global SPEC
    SPEC = sequence_spec(
        SequenceModel(config),
        name="split",
        source_lengths=(source,),
        cache_lengths=(32,),
        start=(1,),
        eos=(),
        max_output=16,
        prompts=prompts,
    )
    (folder / "split.py").write_text(MODEL, encoding="utf-8")
    plan = make_plan(f"{folder / 'split.py'}:model", "host", Budget(), Workload(), "litert", 1, None, lambda text, share: None)
    floats = tuple(u.model_copy(update={"precision": "fp32"}) for u in plan.units)
    return build(plan.model_copy(update={"units": floats}), SPEC, folder / "split.edge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = made(asked.source, asked.dim, folder)
        manifest = read_manifest(bundle)
        (folder / manifest.program).write_bytes(read_member(bundle, manifest.program))
        here = open_program(str(folder / manifest.program), manifest.runtime, 1).run
        serving = subprocess.Popen(
            [sys.executable, "-m", "edgesdk", "serve", str(bundle), "--listen", "127.0.0.1:0", "--json"], stdout=subprocess.PIPE, text=True
        )
        try:
            rows = measured(asked, bundle, here, serving)
        finally:
            serving.terminate()
            serving.wait()
    (asked.out / "split_link.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def measured(asked: argparse.Namespace, bundle: Path, here: object, serving: subprocess.Popen[str]) -> list[dict[str, object]]:
    said, depth = "", 0
    assert serving.stdout is not None
    while not said or depth:  # one JSON object
        line = serving.stdout.readline()
        said, depth = said + line, depth + line.count("{") - line.count("}")
    host, _, port = json.loads(said)["address"].rpartition(":")
    card = Card.read(read_member(bundle, NAME))
    digest = pair_digest(lambda n: read_member(bundle, n))
    prompts = [[int(t) for t in np.random.default_rng(i).integers(3, 4000, asked.source)] for i in range(1, asked.repeats + 1)]
    alone = [generate(here, card, [p], Settings(max_tokens=8))[0] for p in prompts]  # type: ignore[arg-type]
    decode = statistics.median(r.call_s["decode"] / r.calls["decode"] for r in alone)
    rows: list[dict[str, object]] = []
    for name, (rate, delay) in LINKS.items():
        for bits in (32, 8, 4):
            proxy = Shaped((host, int(port)), rate, delay)
            remote = Remote(proxy.address, digest, here, bits)  # type: ignore[arg-type]
            got, firsts, sent, received, runs = [], [], [], [], []
            for p in prompts:
                before = dict(remote.told)
                got.append(generate(remote, card, [p], Settings(max_tokens=8))[0])
                firsts.append(got[-1].first_token_s)
                sent.append(remote.sent_bytes - before["sent_bytes"])
                received.append(remote.received_bytes - before["received_bytes"])
                runs.append(remote.run_s - before["run_s"])
            remote.close()
            proxy.close()
            over = statistics.median(sent) + statistics.median(received)
            predicted = statistics.median(runs) + decode + over / rate + 2 * delay
            row = {
                "link": name, "bits": bits, "received_bytes": statistics.median(received), "uncoded_bytes": crossing(card_config(), asked.source, 1, bits),
                "first_token_s": statistics.median(firsts), "predicted_s": predicted, "alone_s": statistics.median(r.first_token_s for r in alone),
                "same_first": sum(a.tokens[:1] == b.tokens[:1] for a, b in zip(got, alone, strict=True)),
                "same_all": sum(a.tokens == b.tokens for a, b in zip(got, alone, strict=True)), "of": len(prompts), "samples_s": firsts,
            }  # fmt: skip
            rows.append(row)
            sys.stdout.write(
                " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "samples_s") + "\n"
            )
            sys.stdout.flush()
    return rows


def card_config() -> SequenceConfig:
    from edgesdk.sequence.export import Program

    module = SPEC.methods["encode"].module
    assert isinstance(module, Program)
    return module.core.config


SPEC = None

if __name__ == "__main__":
    main()
