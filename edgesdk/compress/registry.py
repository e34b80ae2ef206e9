"""The one table of compression methods. A new method is one file in this folder and one row here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from edgesdk.compress.types import Config, Method
from edgesdk.errors import InputError, UnknownName
from edgesdk.noun import describe

METHODS = {
    "auto": "edgesdk.compress.auto",
    "rtn": "edgesdk.compress.rtn",
    "structured": "edgesdk.compress.structured",
    "magnitude": "edgesdk.compress.magnitude",
    "ecoflap": "edgesdk.compress.ecoflap",
    "nm": "edgesdk.compress.nm",
    "neurons": "edgesdk.compress.neurons",
    "synthetic": "edgesdk.compress.synthetic",
    "udfc": "edgesdk.compress.udfc",
    "depth": "edgesdk.compress.depth",
    "gptq": "edgesdk.compress.gptq",
    "hadamard": "edgesdk.compress.hadamard",
    "smooth": "edgesdk.compress.smooth",
    "flatten": "edgesdk.compress.flatten",
    "activations": "edgesdk.compress.activations",
    "easyquant": "edgesdk.compress.easyquant",
    "finequant": "edgesdk.compress.finequant",
    "any4": "edgesdk.compress.any4",
    "squeezellm": "edgesdk.compress.squeezellm",
    "vptq": "edgesdk.compress.vptq",
    "ternary": "edgesdk.compress.ternary",
    "ternary-qat": "edgesdk.compress.ternary_qat",
    "lora": "edgesdk.compress.lora",
    "distill": "edgesdk.compress.distill",
    "qat": "edgesdk.compress.qat",
    "svd": "edgesdk.compress.svd",
    "lord": "edgesdk.compress.lord",
    "welore": "edgesdk.compress.welore",
    "eora": "edgesdk.compress.eora",
    "lqlora": "edgesdk.compress.lqlora",
    "lossless": "edgesdk.compress.lossless",
}
"""Name → the module whose `METHOD` it is. Nothing is imported before a method is asked for."""


def method(name: str) -> Method:
    """Raises `UnknownName` (near misses named)."""
    if name not in METHODS:
        raise UnknownName("compression method", name, METHODS)
    found: Method = importlib.import_module(METHODS[name]).METHOD
    return found


def configured(name: str, settings: Mapping[str, Any] | None = None) -> tuple[Method, Config]:
    """A method and its checked settings. Raises `UnknownName` or `InputError` naming the setting."""
    found = method(name)
    try:
        return found, found.config.model_validate(dict(settings or {}))
    except ValidationError as error:
        raise InputError(*describe(error, name)) from None
