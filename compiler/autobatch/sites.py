"""Sites: what cut code calls to run a block."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from ...errors import DataDependentShape
from .record import current

# data that may decide what a block computes: a block is made for each value of it
PLAIN = (bool, int, float, complex, str, type(None), type(Ellipsis), slice, torch.dtype, torch.device, torch.Size, nn.Module,
         types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)  # fmt: skip
VERSIONS = 64  # values of plain data for which a place gets blocks of its own
LIFTED_AFTER = 4  # such values after which numbers become tensors, which all instances may have of their own


class Site:
    """One place of a program that runs a block. `why` says why it does not, where it runs op by op instead."""

    def __init__(self, fn: types.FunctionType, line: str) -> None:
        self.fn = fn
        self.line = line
        self.why = ""
        self.keys: set[Any] = set()
        self.lifts = True

    def __call__(self, *args: Any) -> Any:
        if not self.why:
            with torch._C.DisableTorchFunction():
                leaves = tree_flatten(args)[0]
                strange = next((x for x in leaves if not isinstance(x, torch.Tensor) and not isinstance(x, PLAIN)), None)
                if strange is None:
                    try:
                        return self.recorded(args, leaves)
                    except DataDependentShape:
                        self.why = "it asks for values"
                else:
                    self.why = f"it reads a {type(strange).__name__}"
        return self.fn(*args)

    def recorded(self, args: tuple[Any, ...], leaves: list[Any]) -> Any:
        """Record one line. Raises DataDependentShape."""
        key = tuple(x for x in leaves if not isinstance(x, torch.Tensor))
        self.keys.add(key)
        recorder = current()
        alone = not any(isinstance(x, torch.Tensor) and not recorder.is_shared(x) for x in leaves)
        many = len(self.keys) > LIFTED_AFTER or alone  # with numbers alone, they are what differs between instances
        if many and self.lifts and any(type(a) in (int, float) for a in args):
            try:
                return recorder.apply(self.fn, tuple(torch.tensor(a) if type(a) in (int, float) else a for a in args), {})
            except Exception:  # a number decides about shapes, or the program's own error: which, shows without lifting
                self.lifts = False
        if len(self.keys) > VERSIONS:
            self.why = "too many values of plain data"
        return recorder.apply(self.fn, args, {})
