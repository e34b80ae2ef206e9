"""One call of a bundle on a device, or answers to prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError, UnknownName
from edgesdk.transport import Transport, parse_link

if TYPE_CHECKING:
    from edgesdk.agent.client import Agent
    from edgesdk.installed import Here
    from edgesdk.sequence.choose import Settings
    from edgesdk.sequence.generate import Event, Result


@dataclass(frozen=True)
class Answer:
    """What came back: numpy arrays, with a text if the bundle has labels; or one result for each prompt of a sequence model."""

    method: str
    outputs: tuple[Any, ...]
    text: str | None = None
    results: tuple[Result, ...] = ()
    link: dict[str, Any] | None = None  # with a helper: bytes sent and received, seconds waited, of these its own


@dataclass(frozen=True)
class Encoder:
    """A helper as the device reaches it, and the bits of a value on the wire (2 to 8, or 32)."""

    host: str
    port: int
    bits: int = 8


def run(
    bundle: str | Path | None = None,
    on: str | Transport = "local",
    *,
    inputs: Sequence[Any] = (),
    prompt: str | Sequence[Any] | None = None,
    method: str | None = None,
    settings: Settings | None = None,
    hear: Callable[[Event], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    encoder: Encoder | None = None,
    python: str | None = None,
) -> Answer:
    """Run `method` on `inputs` (numpy arrays), or answer prompts with a sequence bundle, on the device behind `on`.

    `prompt`: a text, or several: texts, lists of token ids, or float32 [F, frames] of sound; a sequence bundle also takes `inputs` as prompts if no
    `method` is named. The whole loop runs on the device, by `settings`; `hear` is told each event (see `edgesdk.sequence.generate`) as it
    comes. `encoder`: a helper that runs the encoder (`edgesdk serve`). Once `cancelled()` is true, each answer ends with what there is.
    `bundle` None: what is installed there; one that is not there is installed first. Raises `InputError` for the wrong number or
    shape of inputs and for prompts that the model does not take, `DeviceError` if the program fails, and what `flash` raises.
    """
    from edgesdk.agent.client import Agent
    from edgesdk.installed import installed
    from edgesdk.sequence.choose import Settings

    if (prompt is None) == (not len(inputs)):
        raise InputError("run wants inputs or a prompt", "edgesdk run BUNDLE --input x.npy, or --prompt TEXT for a sequence model")
    settings = settings or Settings()
    transport = parse_link(on) if isinstance(on, str) else on
    try:
        here = installed(transport, bundle, python)
        names = {m.name for m in here.manifest.members}
        chosen = method or ("forward" if "forward" in here.manifest.methods else here.manifest.methods[0])
        if chosen not in here.manifest.methods:
            raise UnknownName("method", chosen, here.manifest.methods)
        with Agent(transport, python) as agent:
            if "sequence.json" in names and (prompt is not None or method is None):
                prompts = [prompt] if isinstance(prompt, str) else list(inputs if prompt is None else prompt)
                return _generate(agent, here, prompts, settings, hear, cancelled, encoder)
            if prompt is not None:
                raise InputError(f"{here.manifest.model_name} is no sequence model: it takes no prompt", "give --input FILE.npy")
            outputs = agent.run(here.folder, chosen, list(inputs))
        labels = here.read("labels.txt").decode().splitlines() if "labels.txt" in names else []
    finally:
        if isinstance(on, str):
            transport.close()
    return Answer(chosen, tuple(outputs), _label(outputs, labels))


def _generate(
    agent: Agent,
    here: Here,
    prompts: Sequence[Any],
    settings: Settings,
    hear: Callable[[Event], None] | None,
    cancelled: Callable[[], bool] | None,
    encoder: Encoder | None,
) -> Answer:
    """Text becomes token ids here; what is written becomes text on the device, where stop strings are looked for."""
    from edgesdk.sequence.card import NAME, Card
    from edgesdk.sequence.generate import Result
    from edgesdk.sequence.split import away
    from edgesdk.sequence.tokens import tokenizer_of

    with _wrong_input():
        card = Card.read(here.read(NAME))
        settings.check(card)
        tokenizer = tokenizer_of(card, here.read)
        ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    if encoder and not away(card):
        raise InputError(f"{here.manifest.model_name} (layout {card.layout}) has no encoder to run elsewhere", "leave --encoder out")
    results, link = {}, None
    for event in agent.generate(here.folder, ids, settings.to_dict(), cancelled or (lambda: False), asdict(encoder) if encoder else None):
        if event["event"] == "link":
            link = {k: v for k, v in event.items() if k != "event"}
            continue
        if hear:
            hear(event)
        if event["event"] == "done":
            results[event["prompt"]] = Result(**event["result"])
    found = tuple(results[i] for i in range(len(prompts)))
    return Answer("generate", (), found[0].text if len(found) == 1 else None, found, link)


@contextmanager
def _wrong_input() -> Iterator[None]:
    from edgesdk.sequence.card import SequenceError

    try:
        yield
    except SequenceError as error:
        raise InputError(error.what, error.hint) from None


def _label(outputs: Sequence[Any], labels: list[str]) -> str | None:
    """The most likely label, if the first output is one score a label."""
    if not labels or not outputs or outputs[0].size != len(labels):
        return None
    return labels[int(outputs[0].argmax())]
