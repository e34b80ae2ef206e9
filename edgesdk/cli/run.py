"""The verb `run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgesdk.cli.common import Json, console, emit_json, say
from edgesdk.cli.flash import On, PythonPath

if TYPE_CHECKING:
    from edgesdk.run import Answer


def run(
    bundle: Annotated[str | None, typer.Argument(help="What `edgesdk build` wrote; without it, what is installed there.")] = None,
    inputs: Annotated[list[Path] | None, typer.Option("--input", help="A .npy file; once for each input, in order.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text, for a sequence model.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Which method.", show_default="forward, or the first")] = None,
    on: On = "local",
    python: PythonPath = None,
    out: Annotated[Path | None, typer.Option("--out", help="Save the outputs: OUT0.npy, OUT1.npy … beside this name.")] = None,
    as_json: Json = False,
) -> None:
    """Run a bundle on a device once."""
    from edgesdk import run as verb

    answer = verb.run(bundle, on, inputs=[_load(p) for p in inputs or ()], prompt=prompt, method=method, python=python)
    if out:
        import numpy as np

        for i, array in enumerate(answer.outputs):
            path = out.with_name(f"{out.stem}{i}.npy")
            np.save(path, array)
            say(f"wrote {path}")
    if as_json:
        outputs = [{"shape": list(o.shape), "dtype": str(o.dtype), "values": o.tolist()} for o in answer.outputs]
        emit_json({"kind": "answer", "schema_version": 1, "method": answer.method, "text": answer.text, "outputs": outputs})
    else:
        _show(answer)


def _load(path: Path) -> Any:
    import numpy as np

    from edgesdk.errors import InputError

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as .npy ({error})", "save it with numpy.save") from None


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
