"""`load_model`: every way people have a model becomes a ModelSpec. The forms are those of `MODEL_HELP`."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.errors import EdgeError, InputError, UnknownName, select_by_name
from edgesdk.model import SEPARATOR, Method, ModelSpec
from edgesdk.model_help import MODEL_HELP, OTHER_FILES
from edgesdk.sequence import card
from edgesdk.sequence.sizes import Sizes

if TYPE_CHECKING:
    from torch import nn

METHOD_SETS = ({"forward"}, {"encode", "prefill", "decode"}, {"prefill", "decode"})
"""The methods a model may have, unless it brings a card that tells of others (see `sequence.card`)."""


def load_model(ref: str, sizes: Sizes | None = None) -> ModelSpec:
    """The model that `ref` names (see `MODEL_HELP`), a sequence model with programs of these sizes; by default, of its own.

    Models that have programs already take no sizes. Raises `InputError`, `UnknownName` or `MissingTool`.
    """
    path, sizes = Path(ref), sizes or Sizes()
    if SEPARATOR in ref:
        from edgesdk.compress.saved import compressed_model

        base, _, recipe = ref.rpartition(SEPARATOR)
        return compressed_model(base, recipe, sizes=sizes)
    if ".edgeseq" in (path.suffix, Path(ref.rpartition(":")[0]).suffix):
        from edgesdk.sequence.saved import load_saved

        return load_saved(ref, sizes)
    if _is_hub(ref):
        from edgesdk.intake_hub import load_hugging_face

        return load_hugging_face(ref, sizes)
    if ref.startswith("example:"):
        return _example(ref.removeprefix("example:"), sizes)
    _refuse(ref, sizes)
    if path.suffix == ".tflite":
        return _tflite(path)
    if path.suffix == ".pt2":
        return _pt2(path)
    if path.suffix == ".edgec":
        from edgesdk.compress.saved import load

        return load(path).spec
    if ":" in ref:
        return _factory(*ref.rsplit(":", 1))
    if path.suffix in OTHER_FILES:
        raise InputError(f"--model {ref}: a {path.suffix} file is not a form it takes", OTHER_FILES[path.suffix])
    raise InputError(f"--model {ref}: {'not a form it takes' if path.exists() else 'no such file, folder or model'}", _near_example(ref))


def _is_hub(ref: str) -> bool:
    """Whether it is a folder, or looks like the id `owner/name`."""
    path = Path(ref)
    if path.is_dir():
        return True
    other = ":" in ref or path.suffix in OTHER_FILES or path.suffix in (".tflite", ".pt2", ".edgec")
    return ref.count("/") == 1 and not other and not ref.startswith((".", "/", "~")) and not path.exists()


def _example(name: str, sizes: Sizes) -> ModelSpec:
    from edgesdk.examples import EXAMPLES

    module, function = select_by_name("example", name, EXAMPLES).split(":")
    make: Callable[..., ModelSpec] = getattr(importlib.import_module(module), function)
    if "sizes" in inspect.signature(make).parameters:
        return make(sizes=sizes)
    _refuse(f"example:{name}", sizes)
    return make()


def _refuse(ref: str, sizes: Sizes) -> None:
    """For models whose programs are as they are. Raises `InputError`."""
    goes = "it goes with a sequence model: a Hugging Face folder or id, a .edgeseq, example:normalizer"
    sizes.refuse_inputs(f"{ref} has programs of fixed lengths", goes)
    sizes.refuse_draft(f"{ref} has its programs already", goes)
    sizes.refuse_cache_bits(f"{ref} has its programs already", goes)


def _near_example(ref: str) -> str:
    """A hint that offers the example whose name is near, else the forms."""
    from edgesdk.examples import EXAMPLES

    near = difflib.get_close_matches(ref.lower(), EXAMPLES, n=1)
    return f"did you mean 'example:{near[0]}'?" if near else MODEL_HELP


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", MODEL_HELP) from None


def _tflite(path: Path) -> ModelSpec:
    content = _read(path)
    if content[4:8] != b"TFL3":
        raise InputError(f"{path}: not a TFLite flatbuffer (no TFL3 mark)", "give a .tflite file as a converter wrote it")
    from edgesdk.graph.tflite_read import read_tflite

    read_tflite(path)  # a damaged or cut file is refused here, not in the middle of a plan
    return ModelSpec(name=path.stem, digest=hashlib.sha256(content).hexdigest(), flatbuffer=path.resolve())


def _pt2(path: Path) -> ModelSpec:
    content = _read(path)
    import logging

    import torch

    from edgesdk.intake_pt2 import layered

    logger = logging.getLogger("torch.export")
    was = logger.level
    logger.setLevel(logging.CRITICAL)  # torch logs a damaged file's traceback before it raises
    try:
        program = torch.export.load(path)
        module = layered(program.module(check_guards=False))
    except Exception as error:
        hint = f"write it with torch.export.save and torch {torch.__version__.split('+')[0]}"
        raise InputError(f"{path}: not a program that torch.export.save wrote ({type(error).__name__})", hint) from None
    finally:
        logger.setLevel(was)
    args, kwargs = program.example_inputs or ((), {})
    if kwargs or not args:
        raise InputError(f"{path}: has no positional example inputs", "export with positional tensor inputs")
    spec = ModelSpec(name=path.stem, digest=hashlib.sha256(content).hexdigest(), methods={"forward": Method(module, tuple(args))})
    return checked(spec, str(path))


@contextmanager
def _seeded() -> Iterator[None]:
    """Random weights come out the same every time, so that a plan made before still holds; the caller's random state is kept."""
    import torch

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


def _factory(where: str, function: str) -> ModelSpec:
    with _seeded():
        return _from_python(where, function)


def _from_python(where: str, function: str) -> ModelSpec:
    if where.endswith(".py"):
        source = _read(Path(where))
        module = _load_file(Path(where), source)
    else:
        module = _load_module(where)
        file = inspect.getsourcefile(module)
        source = Path(file).read_bytes() if file else b""
    names = {n: v for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__}
    if function not in vars(module):
        raise UnknownName("function", function, [n for n in names if not n.startswith("_")])
    made = vars(module)[function]
    return _spec_of(made, f"{where}:{function}", function.replace("_", "-"), source)


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Modules in `folder` can be imported inside the block."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _load_file(path: Path, source: bytes) -> Any:
    """The module in `path`, run afresh when the file changed; files beside it can be imported by it."""
    name = f"edgesdk_model_{path.stem}_{hashlib.sha256(str(path.resolve()).encode() + source).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InputError(f"{path}: cannot be imported", "give a Python source file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        with _on_path(path.resolve().parent):
            attempt(str(path), lambda: found.loader.exec_module(module))  # type: ignore[union-attr]
    except EdgeError:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> Any:
    with _on_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(error.name + ".")):
                raise InputError(f"--model {name}: no such module", "name an installed module, or a file: path/file.py:function") from None
            raise InputError(f"{name}: ModuleNotFoundError: {error}", f"pip install {error.name}") from None
        except (ValueError, TypeError):
            raise InputError(f"--model {name}: not a module's name", MODEL_HELP) from None
        except (Exception, SystemExit) as error:
            raise _their_fault(name, error) from None


def _their_fault(where: str, error: BaseException) -> InputError:
    lines = str(error).strip().splitlines()
    return InputError(
        f"{where}: {type(error).__name__}: {lines[0][:200] if lines else ''}", "the model's own code failed; run it alone to see where"
    )


def attempt(where: str, call: Callable[[], Any]) -> Any:
    """`call()`; what it raises becomes an `InputError` that names `where`."""
    try:
        return call()
    except EdgeError:
        raise
    except (Exception, SystemExit) as error:
        raise _their_fault(where, error) from None


def _make(made: Any, where: str) -> Any:
    """What a factory that takes no arguments gives."""
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        raise InputError(f"{where}: {error}", "it is called without arguments: give a function that takes none") from None
    except ValueError:
        pass  # a builtin without a signature
    import torch

    torch.manual_seed(0)  # inside `_seeded`; the file may have drawn numbers when it was imported
    return attempt(where, made)


def _spec_of(made: Any, where: str, name: str, source: bytes) -> ModelSpec:
    """A factory, or what stands under its name, as a ModelSpec."""
    import torch
    from torch import nn

    if not isinstance(made, nn.Module | ModelSpec | tuple):
        if not callable(made):
            raise InputError(f"{where}: is {type(made).__name__}, not a function", "name a function that returns (module, example_inputs)")
        made = _make(made, where)
    if isinstance(made, ModelSpec):
        spec = checked(made, where)
        parts = [_digest(m.module, n.encode(), m.example_inputs) for n, m in spec.methods.items()]
        parts += [hashlib.sha256(_read(spec.flatbuffer)).hexdigest()] if spec.flatbuffer else []
        return spec if spec.digest else dataclasses.replace(spec, digest=hashlib.sha256(source + "".join(parts).encode()).hexdigest())
    if isinstance(made, nn.Module):
        if not hasattr(made, "example_inputs"):
            raise InputError(f"{where}: returned {type(made).__name__} without example_inputs", "return (module, example_inputs)")
        made = (made, made.example_inputs)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InputError(f"{where}: returned {_told(made)}", "return a ModelSpec, or (module, example_inputs)")
    module, inputs = made
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    if not isinstance(inputs, tuple | list):
        raise InputError(f"{where}: example_inputs is {type(inputs).__name__}", "give a tuple of tensors")
    spec = ModelSpec(name=name, digest="", methods={"forward": Method(module.eval(), tuple(inputs))})
    return dataclasses.replace(checked(spec, where), digest=_digest(module, source, tuple(inputs)))


def _told(made: Any) -> str:
    return f"a tuple of {', '.join(type(m).__name__ for m in made)}" if isinstance(made, tuple) else type(made).__name__


def checked(spec: ModelSpec, where: str) -> ModelSpec:
    """`spec`, if every method runs on its example inputs and answers in tensors. Raises `InputError`."""
    if bool(spec.methods) == (spec.flatbuffer is not None):
        raise InputError(f"{where}: a ModelSpec has methods or a flatbuffer, exactly one of them", "set one")
    if spec.methods and set(spec.methods) not in METHOD_SETS and card.NAME not in spec.files:
        known = " or ".join("/".join(sorted(s, key=["forward", "encode", "prefill", "decode"].index)) for s in METHOD_SETS)
        raise InputError(f"{where}: methods {', '.join(spec.methods)}", f"a model has {known}")
    for name, method in spec.methods.items():
        _check_method(method, f"{where}: {name}" if name != "forward" else where, caches=card.NAME in spec.files)
    return spec


def _check_method(method: Method, where: str, caches: bool) -> None:
    """`caches`: there may be some of few bits."""
    import torch

    taken = (torch.float32, torch.int64, torch.int32, torch.bool, *([torch.float16, torch.int8, torch.uint8] if caches else []))
    for i, value in enumerate(method.example_inputs):
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{where}: example input {i} is {type(value).__name__}", "example inputs are tensors")
        if value.dtype not in taken:
            raise InputError(f"{where}: example input {i} is {value.dtype}", f"give one of {', '.join(map(str, taken))}")
    shapes = ", ".join(str(list(v.shape)) for v in method.example_inputs)
    with torch.no_grad():
        out = attempt(f"{where} on example inputs of shape {shapes}", lambda: method.module(*method.example_inputs))
    outputs = out if isinstance(out, tuple | list) else (out,)
    if not outputs or not all(isinstance(o, torch.Tensor) for o in outputs):
        raise InputError(f"{where}: its forward answers with {_told(out)}", "answer with a tensor or a tuple of tensors")


def _digest(module: nn.Module, source: bytes, inputs: tuple[Any, ...]) -> str:
    """sha256 (hex) over the source of the model, its classes' files, its weights' bytes and its inputs' shapes."""
    total = hashlib.sha256(source)
    for path in sorted({f for m in module.modules() if (f := _source_file(type(m)))}):
        total.update(Path(path).read_bytes())
    for key, value in sorted(module.state_dict().items()):
        total.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        total.update(memoryview(_bytes(value)))
    for value in inputs:
        total.update(f"{value.dtype} {list(value.shape)}".encode())
    return total.hexdigest()


def _bytes(value: Any) -> Any:
    """A tensor's bytes as a numpy array; numpy has no bfloat16."""
    import torch

    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _source_file(kind: type) -> str | None:
    """The file of a module's class, if it is the user's own (not torch's, not an installed package's)."""
    if kind.__module__.startswith(("torch.", "edgesdk.")):
        return None
    try:
        file = inspect.getsourcefile(kind)
    except (TypeError, OSError):
        return None
    return None if file is None or "site-packages" in file or not Path(file).is_file() else file
