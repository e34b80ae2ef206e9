"""`edgesdk run` with a sequence bundle: the loop on the device's side of the wire, streamed, cancelled, cut off; and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from loopback import serve
from sequence_toy import Toy

from edgesdk.agent import client
from edgesdk.agent.client import Agent
from edgesdk.bundle import GoldenCase
from edgesdk.bundles import array_bytes, write_bundle
from edgesdk.errors import InputError
from edgesdk.flash import flash
from edgesdk.measured import _predicted
from edgesdk.plan.types import Estimate
from edgesdk.profile import profile
from edgesdk.run import run
from edgesdk.sequence.choose import Settings
from edgesdk.sequence.generate import generate
from edgesdk.sequence.tokens import tokenizer_of
from edgesdk.transport.local import LocalTransport

ALPHABET = "abcdefghijklmnopqrstuvwxyz "
TOY = {"vocab": 30, "eos": (), "seed": 11, "batches": (1, 2), "max_output": 24}
RUNNER = """
import sys, time
sys.path[:0] = {paths!r}
from sequence_toy import Toy
class RunnerError(Exception):
    pass
class Runner:
    version = "0"
    def __init__(self):
        self.toy = Toy(**{toy!r})
    def run(self, method, arrays):
        time.sleep({pause!r})
        if len(arrays) != len(self.inputs(method)):
            raise RunnerError("takes other inputs")
        return self.toy.run(method, arrays)
    def inputs(self, method):
        return self.toy.inputs(method)
def open_program(path, runtime, threads=1):
    return Runner()
def installed():
    return {{}}
"""


def toy_of():
    return Toy(**TOY, tokenizer={"kind": "characters", "alphabet": ALPHABET, "first": 3})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    toy = toy_of()
    tokens, zero = np.full((1, 4), 5), np.zeros((1, 4), np.float32)
    arrays = [tokens, np.arange(4)[None], np.asarray([3]), zero]
    outputs = toy.run("prefill_0_4_b1", arrays)
    members = {"sequence.json": toy.card.to_bytes(), "model.tflite": b"none"}
    members |= {f"in{i}.npy": array_bytes(a) for i, a in enumerate(arrays)} | {f"out{i}.npy": array_bytes(a) for i, a in enumerate(outputs)}
    ins, outs = ([n for n in members if n.startswith(p)] for p in ("in", "out"))
    case = GoldenCase(method="prefill_0_4_b1", inputs=tuple(ins), outputs=tuple(outs), max_relative_error=1e-3)
    path = tmp_path_factory.mktemp("toy") / "toy.edge"
    write_bundle(
        path, members, model_name="toy", device="host", runtime="litert", runtime_version="2", program="model.tflite",
        methods=tuple(toy.card.methods), threads=1, plan_digest="0" * 64, host_check={}, golden=(case,), memory={}, edgesdk_version="0",
    )  # fmt: skip
    return path


def toy_runner(pause):
    """The agent's files with a runner that answers as the toy does, `pause` seconds a call."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    source = RUNNER.format(paths=paths, toy={**TOY, "tokenizer": toy_of().card.tokenizer}, pause=pause)
    return {**FILES, "runner.py": source.encode()}


FILES = client.agent_sources()


@pytest.fixture
def toy_agent(monkeypatch, request):
    """What is sent to devices runs the toy, `pause` seconds a call (its parameter)."""
    monkeypatch.setattr(client, "agent_sources", lambda: toy_runner(getattr(request, "param", 0.0)))
    client.agent_files.cache_clear()
    yield
    client.agent_files.cache_clear()


@pytest.fixture
def device(toy_agent, tmp_path, bundle):
    """A folder as the device, with the bundle installed."""
    transport = LocalTransport(tmp_path / "root")
    flash(bundle, transport)
    return transport


def test_the_device_writes_what_the_host_writes(device, bundle):
    toy = toy_of()
    tokenizer = tokenizer_of(toy.card, lambda name: b"")
    prompts = ["hello", "a much longer prompt", "x"]
    for settings in (Settings(), Settings(beams=3, best=2), Settings(temperature=0.8, seed=3, stop=("e",), max_tokens=9)):
        events = []
        answer = run(bundle, device, prompt=prompts, settings=settings, hear=events.append)
        wanted = generate(toy.run, toy.card, prompts, settings, tokenizer)
        assert [(r.tokens, r.text, r.stopped, r.calls) for r in answer.results] == [(r.tokens, r.text, r.stopped, r.calls) for r in wanted]
        for i, r in enumerate(answer.results):
            pieces = "".join(e["text"] for e in events if e["prompt"] == i)
            assert pieces == r.text or settings.beams > 1
            assert len(r.token_s) == (0 if settings.beams > 1 else len(r.tokens))
    ids = run(bundle, device, inputs=[np.asarray(tokenizer.encode("hello"))])
    assert ids.text == run(bundle, device, prompt="hello").text == ids.results[0].text != ""


def test_wrong_prompts_and_settings_are_refused(device, bundle):
    for prompt, settings, words in (
        ("HELLO!", None, "'H', which the model does not know"),
        ("", None, "empty"),
        ("a" * 40, None, "the prompt has 40 tokens"),
        ("a", Settings(max_tokens=99), "max_tokens = 99"),
        ([[3, 99]], None, "token 99"),
    ):
        with pytest.raises(InputError, match=words) as error:
            run(bundle, device, prompt=prompt, settings=settings)
        assert error.value.hint
    assert run(bundle, device, prompt="fine").text


@pytest.mark.parametrize("toy_agent", [0.005], indirect=True)
def test_a_profile_measures_answers(device, bundle):
    report = profile(bundle, device, runs=3, warmup=1)
    found = {m.method: m for m in report.methods}
    first, later = found["first of 16 tokens"], found["each later token"]
    assert len(first.samples_s) == len(later.samples_s) == 3 and first.cold_s is None
    assert later.p50_s >= 0.005 and first.p50_s >= 0.005
    with Agent(device) as agent:
        raw = agent.ask("profile", folder=f"{device.root}/current", runs=1, warmup=0)["methods"]
    calls = {m["method"]: m["calls"] for m in raw if "calls" in m}
    assert calls["first of 16 tokens"] == {"prefill_0_4_b1": 1}
    assert calls["each later token"] == pytest.approx(
        {"decode_0_8_x1_b1": 5 / 15, "decode_0_16_x1_b1": 8 / 15, "decode_0_32_x1_b1": 2 / 15}
    )
    assert {m.method for m in profile(bundle, device, runs=1, warmup=0, method="decode_0_8_x1_b1").methods} == {"decode_0_8_x1_b1"}


def test_answers_are_predicted_by_their_calls():
    latency = {"encode": Estimate(value=0.2, low=0.1, high=0.3), "decode": Estimate(value=0.01, low=0.01, high=0.02)}
    plan = SimpleNamespace(method_latency=latency)
    assert _predicted(plan, {"encode": 1, "decode": 2.5}) == Estimate(value=0.225, low=0.125, high=0.35)
    assert _predicted(plan, {"encode": 1, "prefill": 1}) is None


@pytest.mark.parametrize("toy_agent", [0.05], indirect=True)
def test_cancelling_and_caps_end_the_loop_on_the_device(device, bundle):
    seen = []
    answer = run(bundle, device, prompt="hello", hear=seen.append, cancelled=lambda: len(seen) >= 3)
    (result,) = answer.results
    assert result.stopped == "cancelled" and 3 <= len(result.tokens) <= 6
    (result,) = run(bundle, device, prompt="hello", settings=Settings(max_time_s=0.3)).results
    assert result.stopped == "max-time" and 2 <= len(result.tokens) <= 7
    with Agent(device) as agent:  # the same agent goes on answering
        folder = f"{device.root}/current"
        settings = Settings(beams=2).to_dict()
        for cancel in (True, False):
            *_, done = agent.generate(folder, [[3, 4]], settings, lambda cancel=cancel: cancel)
            assert done["result"]["stopped"] == ("cancelled" if cancel else "max-tokens")
        assert agent.ask("health", folder=folder)["bad"] == []


@pytest.mark.parametrize("toy_agent", [0.1], indirect=True)
def test_a_device_ends_when_the_host_is_gone(device, bundle):
    agent = Agent(device)
    events = agent.generate(f"{device.root}/current", [[3, 4]], Settings().to_dict())
    next(events)
    start = time.monotonic()
    agent.close()
    assert time.monotonic() - start < 1.5, "24 tokens would take 2.4 s"


def edgesdk(device, *args, **more):
    """The command line, with the toy in place of the runner."""
    code = (
        "import sys, edgesdk.agent.client as c; sys.path.insert(0, sys.argv[1]); import test_sequence_run as t; "
        "pause = float(sys.argv[2]); c.agent_sources = lambda: t.toy_runner(pause); from edgesdk.cli import main; main(sys.argv[3:])"
    )
    argv = [sys.executable, "-c", code, str(Path(__file__).parent), str(more.pop("pause", 0.0)), *args, "--on", f"local:{device.root}"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, **more)


def test_the_command_line(device, bundle, tmp_path):
    text = run(bundle, device, prompt="hello").text
    file = tmp_path / "prompts.txt"
    file.write_text("hello\n\nother words\nx\n")
    started = [
        edgesdk(device, "run", str(bundle), "--prompt", "hello"),
        edgesdk(device, "run", "--prompts", str(file), "--json", "--max-tokens", "5"),
        edgesdk(device, "run", "--prompts", str(file), "--beams", "2"),
        edgesdk(device, "run", "--prompt", "hello", "--stop", text[4:6], "--no-stream", "--out", str(tmp_path / "tokens.npy")),
        edgesdk(device, "run", "--prompt", "Ä", "--top-k", "2"),
    ]
    plain, as_json, lines, stopped, wrong = (p.communicate(timeout=120) for p in started)
    assert [p.returncode for p in started] == [0, 0, 0, 0, 2], (plain, as_json, lines, stopped, wrong)
    assert plain[0] == text + "\n" and "24 tokens, first after" in plain[1] and "ended by max-tokens" in plain[1]
    answers = json.loads(as_json[0])
    assert answers["kind"] == "answers" and [a["prompt"] for a in answers["answers"]] == ["hello", "other words", "x"]
    assert answers["answers"][0]["text"] == text[:5] and answers["answers"][0]["stopped"] == "max-tokens"
    assert len(lines[0].splitlines()) == 3
    assert stopped[0] == text[: text.index(text[4:6])] + "\n" and "ended by stop" in stopped[1]
    assert "".join(ALPHABET[i - 3] for i in np.load(tmp_path / "tokens0.npy")) == text[: text.index(text[4:6]) + 2]
    assert len(wrong[1].strip().splitlines()) == 2 and "Traceback" not in wrong[1]


def test_ctrl_c_shows_what_there_is(device, bundle):
    process = edgesdk(device, "run", "--prompt", "hello", "--max-tokens", "24", pause=0.3, start_new_session=True)
    assert process.stdout is not None
    first = process.stdout.read(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "ended by cancelled" in err and "Traceback" not in err
    whole = run(bundle, device, prompt="hello").text
    assert whole.startswith((first + out).rstrip("\n")) and len(first + out) < 15


def test_over_ssh(toy_agent, tmp_path, bundle):
    (keys := tmp_path / "keys").mkdir()
    with serve(keys) as server:
        events = []
        answer = run(bundle, server.link(tmp_path / "root"), prompt="hello", hear=events.append)
    assert answer.text == "".join(e["text"] for e in events) and len(answer.text or "") == 24
