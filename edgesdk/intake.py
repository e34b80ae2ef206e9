"""`load_model`: every way people have a model becomes a ModelSpec."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgesdk.errors import EdgeError, InputError, MissingTool, select_by_name
from edgesdk.model import Method, ModelSpec
from edgesdk.model_help import MODEL_HELP


def load_model(ref: str) -> ModelSpec:
    """The model that `ref` names (see `MODEL_HELP`). Raises `InputError`, `UnknownName` or `MissingTool`."""
    if ref.startswith("example:"):
        return _example(ref.removeprefix("example:"))
    path = Path(ref)
    if path.suffix == ".tflite":
        return _tflite(path)
    if path.suffix == ".pt2":
        return _pt2(path)
    if ":" in ref:
        return _factory(*ref.rsplit(":", 1))
    if path.suffix in (".py", ".pt", ".pth", ".onnx", ".bin"):
        raise InputError(f"{ref}: not a form --model takes", MODEL_HELP)
    return _hugging_face(ref)


def _example(name: str) -> ModelSpec:
    from edgesdk.examples import EXAMPLES

    where = select_by_name("example", name, EXAMPLES)
    module, function = where.split(":")
    spec: ModelSpec = getattr(importlib.import_module(module), function)()
    return spec


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", MODEL_HELP) from None


def _tflite(path: Path) -> ModelSpec:
    content = _read(path)
    if content[4:8] != b"TFL3":
        raise InputError(f"{path}: not a TFLite flatbuffer (no TFL3 mark)", "give a .tflite file as a converter wrote it")
    return ModelSpec(name=path.stem, digest=hashlib.sha256(content).hexdigest(), flatbuffer=path.resolve())


def _pt2(path: Path) -> ModelSpec:
    content = _read(path)
    import torch

    try:
        program = torch.export.load(path)
        module = program.module(check_guards=False)
    except Exception as error:
        raise InputError(f"{path}: not a program torch.export.save wrote ({type(error).__name__})", "save it with torch.export.save, same torch") from None
    args, kwargs = program.example_inputs or ((), {})
    if kwargs or not args:
        raise InputError(f"{path}: has no positional example inputs", "export with positional tensor inputs")
    return ModelSpec(name=path.stem, digest=hashlib.sha256(content).hexdigest(), methods={"forward": Method(module, tuple(args))})


def _factory(where: str, function: str) -> ModelSpec:
    if where.endswith(".py"):
        path = Path(where)
        source = _read(path)
        loaded = importlib.util.spec_from_file_location(path.stem, path)
        assert loaded is not None and loaded.loader is not None
        module = importlib.util.module_from_spec(loaded)
        sys.modules.setdefault(path.stem, module)
        _run(f"{where}", lambda: loaded.loader.exec_module(module))  # type: ignore[union-attr]
    else:
        module = _run(where, lambda: importlib.import_module(where))
        source = Path(inspect.getsourcefile(module) or "").read_bytes()
    make = select_by_name("function", function, {n: f for n, f in vars(module).items() if callable(f) and not n.startswith("_")})
    return _spec_of(_run(f"{where}:{function}", make), f"{where}:{function}", function, source)


def _run(where: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except EdgeError:
        raise
    except Exception as error:
        raise InputError(f"{where}: {type(error).__name__}: {error}", "the model's own code failed; run it alone to see where") from None


def _spec_of(made: Any, where: str, name: str, source: bytes) -> ModelSpec:
    """A factory's answer as a ModelSpec."""
    from torch import nn

    if isinstance(made, ModelSpec):
        return made
    if isinstance(made, nn.Module) and hasattr(made, "example_inputs"):
        made = (made, made.example_inputs)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and isinstance(made[1], tuple | list)):
        raise InputError(f"{where}: returned {type(made).__name__}", "return a ModelSpec, or (module, example_inputs)")
    module, inputs = made[0].eval(), tuple(made[1])
    _run(f"{where}: forward on its example inputs", lambda: module(*inputs))
    return ModelSpec(name=name.replace("_", "-"), digest=_digest(module, source), methods={"forward": Method(module, inputs)})


def _digest(module: Any, source: bytes) -> str:
    total = hashlib.sha256(source)
    for key, value in sorted(module.state_dict().items()):
        total.update(key.encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _hugging_face(ref: str) -> ModelSpec:
    """A local folder, or an id through the hub's cache or network; `forward(input_ids [1, 64]) → logits or hidden states`."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingTool(f"--model {ref}: transformers is not installed", "pip install 'edgesdk[hub]'; or give another form: " + MODEL_HELP)
    local = Path(ref).is_dir()
    if not local and ("/" not in ref or ref.count("/") > 1 or ref.startswith((".", "/"))):
        raise InputError(f"--model {ref}: no such file or folder", MODEL_HELP)
    if local and not (Path(ref) / "config.json").exists():
        raise InputError(f"{ref}: has no config.json", "give a folder that save_pretrained wrote")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(ref)
        kind = transformers.AutoModelForCausalLM if "CausalLM" in str(config.architectures) else transformers.AutoModel
        inner = kind.from_pretrained(ref, dtype=torch.float32, attn_implementation="eager").eval().requires_grad_(False)
    except Exception as error:
        hint = "the folder is not complete" if local else "no network, or no such model: download it where there is a network, then give the folder"
        raise InputError(f"--model {ref}: {str(error).splitlines()[0][:200]}", hint) from None

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, use_cache=False, return_dict=False)[0]

    length = min(64, int(getattr(config, "max_position_embeddings", 64)))
    inputs = (torch.randint(0, int(config.vocab_size), (1, length), generator=torch.Generator().manual_seed(0)),)
    module = Plain().eval()
    _run(f"--model {ref}", lambda: module(*inputs))
    return ModelSpec(name=Path(ref).name, digest=_digest(module, str(config).encode()), methods={"forward": Method(module, inputs)})
