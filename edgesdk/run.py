"""One call, or one whole answer, of a bundle on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesdk.errors import InputError, UnknownName
from edgesdk.transport import Transport, parse_link


@dataclass(frozen=True)
class Answer:
    """What came back: numpy arrays, and text where a prompt was given or the bundle has labels."""

    method: str
    outputs: tuple[Any, ...]
    text: str | None = None


def run(
    bundle: str | Path | None = None,
    on: str | Transport = "local",
    *,
    inputs: Sequence[Any] = (),
    prompt: str | None = None,
    method: str | None = None,
    python: str | None = None,
) -> Answer:
    """Run `method` on `inputs` (numpy arrays), or answer `prompt` with a sequence bundle, on the device behind `on`.

    `bundle` None: what is installed there; one that is not there is installed first. Raises `InputError` for the wrong number or
    shape of inputs, `DeviceError` if the program fails, and what `flash` raises.
    """
    from edgesdk.agent.client import Agent
    from edgesdk.profile import installed

    if (prompt is None) == (not inputs):
        raise InputError("run wants inputs or a prompt", "edgesdk run BUNDLE --input x.npy, or --prompt TEXT for a sequence model")
    transport = parse_link(on) if isinstance(on, str) else on
    try:
        here = installed(transport, bundle, python)
        names = {m.name for m in here.manifest.members}
        chosen = method or ("forward" if "forward" in here.manifest.methods else here.manifest.methods[0])
        if chosen not in here.manifest.methods:
            raise UnknownName("method", chosen, here.manifest.methods)
        with Agent(transport, python) as agent:
            if prompt is not None:
                if "tokenizer.json" not in names:
                    raise InputError(f"{here.manifest.model_name} has no tokenizer.json: it takes no prompt", "give --input FILE.npy")
                return _generate(agent, here.folder, here.read("tokenizer.json"), prompt)
            outputs = agent.run(here.folder, chosen, list(inputs))
        labels = here.read("labels.txt").decode().splitlines() if "labels.txt" in names else []
    finally:
        if isinstance(on, str):
            transport.close()
    return Answer(chosen, tuple(outputs), _label(outputs, labels))


def _generate(agent: Any, folder: str, tokenizer: bytes, prompt: str) -> Answer:
    from edgesdk.examples.generate import generate

    text = generate(lambda m, arrays: agent.run(folder, m, list(arrays)), tokenizer, prompt)
    return Answer("generate", (), text)


def _label(outputs: Sequence[Any], labels: list[str]) -> str | None:
    """The most likely label, if the first output is one score a label."""
    if not labels or not outputs or outputs[0].size != len(labels):
        return None
    return labels[int(outputs[0].argmax())]
