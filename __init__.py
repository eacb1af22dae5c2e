"""plait: a compiler for PyTorch models. The public face is loaded lazily, so that `plait.load` never imports the compiler."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FACE = {
    "compile": "compiler.api",
    "CompiledModel": "compiler.api",
    "explain": "compiler.api",
    "load": "runtime.artifact",
    "LoadedModel": "runtime.artifact",
    "config": "",
    "errors": "",
    "ir": "",
    "PlaitError": "errors",
}

__all__ = sorted(_FACE)


def __getattr__(name: str) -> Any:
    where = _FACE.get(name)
    if where is None:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    if where == "":
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(f".{where}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
