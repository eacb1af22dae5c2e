"""plait: a compiler for PyTorch models. The public face is lazy, so that `plait.load` never imports the compiler."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FACE = {
    "all_to_all_capacity": "runtime.exchange",
    "autobatch": "compiler.autobatch",
    "compile": "compiler.api",
    "CompiledModel": "compiler.api",
    "explain": "compiler.api",
    "debug": "compiler.debugging.front",
    "bisect": "compiler.debugging.front",
    "first_bad_node": "compiler.debugging.front",
    "stage_loss": "compiler.stages.under_torch",
    "staged_step": "compiler.stages",
    "torch_stages": "compiler.stages.under_torch",
    "train_step": "compiler.training",
    "TrainStep": "compiler.training",
    "quantize": "compiler.quantize.api",
    "what_if": "compiler.quantize.api",
    "QuantizedModel": "compiler.quantize.result",
    "QuantizedLinear": "compiler.quantize.modules",
    "load_quantized": "compiler.quantize.loading",
    "observe": "compiler.observe",
    "wait": "compiler.background",
    "load": "runtime.artifact",
    "LoadedModel": "runtime.artifact",
    "PlaitError": "errors",
}
_MODULES = {"config": "config", "debugging": "compiler.debugging", "errors": "errors", "ir": "ir", "moe": "compiler.moe"}

__all__ = sorted([*_FACE, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    if name in _FACE:
        return getattr(importlib.import_module(f".{_FACE[name]}", __name__), name)
    raise AttributeError(f"module 'plait' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
