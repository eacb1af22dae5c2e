"""Stand-ins for tensors that have not been computed yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from .native import record


@dataclass(frozen=True, slots=True, eq=False)
class Type:
    """What all values of a pool have in common: sizes of one instance, dtype, device. Equal ones are one object."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> Type:
        """The type of a tensor as one instance's value."""
        return _type(tensor.shape, tensor.dtype, tensor.device)

    @property
    def row_bytes(self) -> int:
        """Bytes of one instance's value."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Elements of one instance's value."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@cache
def _type(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Type:
    return Type(shape, dtype, device)


INTEGER = _type((), torch.int64, torch.device("cpu"))
REAL = _type((), torch.float32, torch.device("cpu"))  # as torch.tensor makes of a number: it must not widen what it meets


class Pending(record.Handle):
    """One instance's tensor that is yet to be computed; to the program it looks like a tensor.

    `id` numbers values in the order in which they are recorded, `depth` is one more than the largest depth of what it is
    computed from: equal work at equal depth can run as one batch. No graph is kept; the depth rides here. In eager it shares
    memory with `view_of`; another one shares memory with it where `viewed` is set.
    """

    __slots__ = ()

    @staticmethod
    def of(state: Any, type: Type, id: int, depth: int, ancestors: int = 0) -> Pending:
        """A new one of the call that `state` belongs to; it comes from blocks of these numbers modulo 64."""
        return state.pending(Pending, type, id, depth, ancestors)

    @property
    def __class__(self) -> type:
        """`isinstance(x, torch.Tensor)` holds, as it does where the program runs alone."""
        return torch.Tensor

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a tensor cannot be changed while instances are batched")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_flatten((args, kwargs))[0]
        recorder = next(x.recorder for x in leaves if type(x) is Pending)
        return recorder.apply(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch.Tensor, name)
        if callable(found):
            return lambda *args, **kwargs: self.recorder.call(found, (self, *args), kwargs)
        return self.recorder.call(found.__get__, (self,), {})

    def __bool__(self) -> bool:
        return self._number(bool)

    def __int__(self) -> int:
        return self._number(int)

    def __float__(self) -> float:
        return self._number(float)

    def item(self) -> Any:
        """The number that a tensor of one element holds."""
        return self._number(item)

    def _number(self, convert: Callable[[Any], Any]) -> Any:
        if self.type.numel == 1:
            return self.recorder.demand(self, convert)
        return self.recorder.call(getattr(torch.Tensor, _DEMANDS[convert]), (self,), {})

    def __hash__(self) -> int:
        return id(self)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.recorder.call(torch.Tensor.unbind, (self, 0), {}))

    def __len__(self) -> int:
        if not self.type.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.type.shape[0]


def item(x: Any) -> Any:
    """The number that a tensor of one element holds, or that is one already."""
    return x.item() if isinstance(x, torch.Tensor) else x


_DEMANDS = {bool: "__bool__", int: "__int__", float: "__float__", item: "item"}


def _method(name: str) -> Callable[..., Any]:
    func = getattr(torch.Tensor, name)

    def method(self: Pending, *args: Any) -> Any:
        return self.recorder.call(func, (self, *args), {})

    method.__name__ = name
    return method


for _name in [
    "add",
    "radd",
    "iadd",
    "sub",
    "rsub",
    "isub",
    "mul",
    "rmul",
    "imul",
    "truediv",
    "rtruediv",
    "itruediv",
    "floordiv",
    "rfloordiv",
    "ifloordiv",
    "mod",
    "rmod",
    "imod",
    "pow",
    "rpow",
    "ipow",
    "matmul",
    "rmatmul",
    "neg",
    "pos",
    "abs",
    "invert",
    "and",
    "rand",
    "iand",
    "or",
    "ror",
    "ior",
    "xor",
    "rxor",
    "ixor",
    "lshift",
    "rlshift",
    "rshift",
    "rrshift",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "getitem",
    "setitem",
    "complex",
    "index",
    "contains",
    "repr",
    "format",
]:
    setattr(Pending, f"__{_name}__", _method(f"__{_name}__"))
