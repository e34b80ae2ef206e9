"""The verb `run`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgesdk.cli.common import Json, console, emit_json, read_address, say
from edgesdk.cli.flash import On, PythonPath
from edgesdk.cli.many import Jobs, on_each

if TYPE_CHECKING:
    from edgesdk.cli.common import Step
    from edgesdk.inventory import Entry
    from edgesdk.run import Answer, Encoder
    from edgesdk.sequence.generate import Event

STOPPED = 130
"""Exit code of an answer that Ctrl-C ended."""


def run(
    bundle: Annotated[str | None, typer.Argument(help="What `edgesdk build` wrote; without it, what is installed there.")] = None,
    inputs: Annotated[list[Path] | None, typer.Option("--input", help="A .npy file; once for each input, in order.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text, for a sequence model.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A text file with one prompt a line; - is stdin.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Which method.", show_default="forward, or the first")] = None,
    on: On = "local",
    python: PythonPath = None,
    jobs: Jobs = 8,
    out: Annotated[
        Path | None, typer.Option("--out", help="Save the outputs (of answers the tokens): OUT0.npy, OUT1.npy … beside this name.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to write at most.", show_default="the model's")] = None,
    max_time: Annotated[float | None, typer.Option(help="Seconds to write at most, all prompts together.")] = None,
    temperature: Annotated[float, typer.Option(help="Draw tokens; 0 takes the likeliest.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what was there.")] = 1.0,
    beams: Annotated[int, typer.Option(help="Carry on so many answers and take the likeliest.")] = 1,
    best: Annotated[int, typer.Option(help="Show so many of the beams.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Above 0 favours long beams.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    draft: Annotated[str, typer.Option(help="Guess tokens: copy, count, exit, none; auto: as built.")] = "auto",
    encoder: Annotated[str | None, typer.Option(help="HOST:PORT of a helper that runs the encoder (`edgesdk serve`).")] = None,
    encoder_bits: Annotated[int, typer.Option(help="Bits of a value on the way from there: 2 to 8, or 32.")] = 8,
    stream: Annotated[bool, typer.Option(help="Show text as it comes.")] = True,
    as_json: Json = False,
) -> None:
    """Run a bundle on a device once, or let a sequence model answer."""
    from edgesdk import run as verb
    from edgesdk.errors import InputError
    from edgesdk.sequence.choose import Settings

    if prompt is not None and prompts is not None:
        raise InputError("--prompt and --prompts", "give one of the two")
    asked = [prompt] if prompt is not None else _lines(prompts) if prompts is not None else None
    settings = Settings(
        max_tokens=max_tokens, max_time_s=max_time, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, beams=beams, best=best,
        repetition_penalty=repetition_penalty, length_penalty=length_penalty, stop=tuple(stop or ()), draft=draft,
    )  # fmt: skip
    show = _Shown(len(asked or inputs or ()), live=stream and beams == 1)
    arrays, helper = [_load(p) for p in inputs or ()], _encoder(encoder, encoder_bits)

    def one(link: str, hear: Callable[[Event], None] | None = None, cancelled: Callable[[], bool] | None = None) -> Answer:
        return verb.run(
            bundle, link, inputs=arrays, prompt=asked, method=method, settings=settings, hear=hear, cancelled=cancelled, encoder=helper, python=python
        )  # fmt: skip

    def of_many(link: str, entry: Entry, step: Step) -> dict[str, Any]:
        answer = one(link, hear=lambda event: step(event["event"], 0.0))
        if out:
            _save(answer, out.with_name(f"{entry.name}-{out.name}"))
        return _as_json(answer, asked)

    if on_each("run", on, of_many, _brief, jobs=jobs, as_json=as_json):
        return
    with _ctrl_c() as cancelled:
        answer = one(on, None if as_json else show.hear, cancelled)
    if out:
        _save(answer, out)
    if answer.results:
        _answered(answer, asked, as_json)
    elif as_json:
        emit_json(_as_json(answer, asked))
    else:
        _show(answer)


def _as_json(answer: Answer, prompts: list[str] | None) -> dict[str, Any]:
    if answer.results:
        rows = [{"prompt": prompts[i] if prompts else None, **r.to_dict()} for i, r in enumerate(answer.results)]
        return {"kind": "answers", "schema_version": 1, "answers": rows, "link": answer.link}
    outputs = [{"shape": list(o.shape), "dtype": str(o.dtype), "values": o.tolist()} for o in answer.outputs]
    return {"kind": "answer", "schema_version": 1, "method": answer.method, "text": answer.text, "outputs": outputs}


def _brief(answer: dict[str, Any]) -> str:
    """One device's answer in a line."""
    if answer["kind"] == "answers":
        return " | ".join(a["text"] for a in answer["answers"])
    return answer["text"] or ", ".join(f"{o['dtype']}{o['shape']}" for o in answer["outputs"])


def _save(answer: Answer, out: Path) -> None:
    import numpy as np

    tokens = [np.asarray(r.tokens, np.int64) for r in answer.results]
    for i, array in enumerate(tokens or answer.outputs):
        path = out.with_name(f"{out.stem}{i}.npy")
        np.save(path, array)
        say(f"wrote {path}")


def _load(path: Path) -> Any:
    import numpy as np

    from edgesdk.errors import InputError

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as .npy ({error})", "save it with numpy.save") from None


def _encoder(where: str | None, bits: int) -> Encoder | None:
    from edgesdk.run import Encoder

    if where is None:
        return None
    return Encoder(*read_address(where.removeprefix("tcp://"), "--encoder", "192.168.1.5:7070"), bits)


def _lines(path: Path) -> list[str]:
    from edgesdk.errors import InputError

    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})", "give a file in UTF-8 with one prompt a line") from None
    if not (found := [line for line in text.splitlines() if line.strip()]):
        raise InputError(f"{path}: holds no prompt", "write one prompt a line")
    return found


@contextmanager
def _ctrl_c() -> Iterator[Any]:
    """What says whether Ctrl-C was pressed. Before it is asked for the first time, and the second time, Ctrl-C ends the command."""
    state = {"asked": False, "pressed": False}

    def pressed(*_: object) -> None:
        if state["pressed"] or not state["asked"]:
            raise KeyboardInterrupt
        state["pressed"] = True

    def cancelled() -> bool:
        state["asked"] = True
        return state["pressed"]

    if threading.current_thread() is not threading.main_thread():
        yield cancelled
        return
    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGINT, before)


class _Shown:
    """Writes answers to stdout: one that streams piece by piece, others whole, in the order of their prompts, several with a line for each."""

    def __init__(self, prompts: int, live: bool) -> None:
        self.several, self.live = prompts > 1, live and prompts == 1
        self._whole: dict[int, dict[str, Any]] = {}
        self._next = 0

    def hear(self, event: Event) -> None:
        if self.live:
            self._write(event["text"] + ("\n" if event["event"] == "done" else ""))
        elif event["event"] == "done":
            self._whole[event["prompt"]] = event["result"]
        while self._next in self._whole:
            result = self._whole.pop(self._next)
            self._write((result["text"].replace("\n", "\\n") if self.several else result["text"]) + "\n")
            for other in result["alternatives"][1:]:
                self._write(f"{other['text']}\n")
            self._next += 1

    def _write(self, text: str) -> None:
        if sys.stdout.isatty():  # a model's text must not steer the terminal
            text = "".join(c for c in text if c in "\n\t" or c.isprintable())
        sys.stdout.write(text)
        sys.stdout.flush()


def _answered(answer: Answer, prompts: list[str] | None, as_json: bool) -> None:
    """How it went; Ctrl-C makes the exit code."""
    if as_json:
        emit_json(_as_json(answer, prompts))
    else:
        say(_told(answer))
    if any(r.stopped == "cancelled" for r in answer.results):
        raise typer.Exit(STOPPED)


def _told(answer: Answer) -> str:
    from edgesdk.units import show_bytes, show_seconds

    results = answer.results
    tokens = sum(len(r.tokens) for r in results)
    first = results[0].first_token_s
    parts = [f"{len(results)} prompts" if len(results) > 1 else "", f"{tokens} tokens"]
    parts.append(f"first after {show_seconds(first)}" if first is not None else "")
    if len(results) == 1 and results[0].tokens_per_s:
        parts.append(f"then {results[0].tokens_per_s:.3g} tokens/s")
    if answer.link:
        parts.append(f"{show_bytes(answer.link['received_bytes'])} from the encoder in {show_seconds(answer.link['wait_s'])}")
    stopped = sorted({r.stopped for r in results})
    return ", ".join(p for p in parts if p) + f"; ended by {', '.join(stopped)}"


def _show(answer: Answer) -> None:
    out = console()
    if answer.text is not None:
        out.print(answer.text, markup=False)
    for i, o in enumerate(answer.outputs):
        flat = o.ravel()
        values = " ".join(f"{v:.4g}" for v in flat[:10]) + (" …" if flat.size > 10 else "")
        out.print(f"output {i}: {o.dtype}{list(o.shape)}  {values}", markup=False)


def register(app: typer.Typer) -> None:
    app.command("run")(run)
