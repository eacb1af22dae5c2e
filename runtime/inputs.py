"""Checks the inputs of a call against the plan's `InputSpec`s: fully once per signature, by comparison afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import (
    WrongInputCount,
    WrongInputDevice,
    WrongInputDtype,
    WrongInputRank,
    WrongInputShape,
    WrongInputStrides,
    WrongInputType,
    WrongInputValue,
)
from . import sizes
from .plan import InputSpec, Plan, SizeExpr

Same = Callable[..., bool]

REMEMBERED = 256
# What Dynamo compares tensors with: a sixth of the time that reading their attributes takes.
_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)  # type: ignore[attr-defined]
_NUMBERS = {"int": int, "float": (int, float), "bool": bool}


def _signature(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        # requires_grad and the like do not matter; a lazily negated or conjugated tensor has other bits in memory
        return (
            x.dtype,
            x.device,
            x.layout,
            x.shape,
            x.stride() if x.layout is torch.strided else None,
            x.is_neg(),
            x.is_conj(),
        )
    return type(x), x


def _never(*args: Any) -> bool:
    return False


def _comparison(args: list[Any]) -> Same:
    """A function that says True only of tensors with the signatures of these, and keeps none of them alive.

    It compares their exact type, dtype, device, sizes, strides and dispatch keys, which hold layout, lazy negation and
    conjugation and what overrides dispatch; also requires_grad, so that it may say False where the signature is the same.
    """
    if _TensorGuards is None or not args or not all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in args):
        return _never
    sizes_of, strides_of = [list(x.shape) for x in args], [list(x.stride()) for x in args]
    return _TensorGuards(*args, dynamic_dims_sizes=sizes_of, dynamic_dims_strides=strides_of).check


class InputCheck:
    """Raises the WrongInput* error of the first input that does not fit; remembers signatures that do.

    Inputs like those of the last call are recognised by one native comparison, where they are tensors.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._arity = len(plan.inputs)
        self._good: dict[Any, Same] = {}
        self._same: Same = _never

    def __call__(self, args: list[Any]) -> None:
        if len(args) == self._arity and self._same(*args):
            return
        signature = tuple(map(_signature, args))
        try:
            known = self._good.get(signature)
        except TypeError:  # an unhashable argument cannot be right: the full check names it
            self._full(args)
            raise
        if known is None:
            self._full(args)
            if len(self._good) >= REMEMBERED:
                self._good.clear()
            self._good[signature] = known = _comparison(args)
        self._same = known

    def _full(self, args: list[Any]) -> None:
        specs = self._plan.inputs
        if len(args) != len(specs):
            raise WrongInputCount(expected=len(specs), got=len(args), names=", ".join(s.name for s in specs))
        for spec, x in zip(specs, args, strict=True):
            _check_kind(spec, x)
        env = self._bind(args)
        for spec, x in zip(specs, args, strict=True):
            if spec.kind == "tensor":
                _check_geometry(spec, x, env)
            elif spec.expr is not None:
                _check_number(spec, x, env)

    def _bind(self, args: list[Any]) -> dict[str, int]:
        env = {}
        for s in self._plan.symbols:
            if s.input < 0:
                continue
            x, spec = args[s.input], self._plan.inputs[s.input]
            value = x if s.dim is None else x.shape[s.dim]
            if value < s.low or (s.high is not None and value > s.high):
                name = spec.name if s.dim is None else f"dimension {s.dim} of {spec.name}"
                limit = f"at least {s.low}" if s.high is None else f"between {s.low} and {s.high}"
                raise WrongInputValue(name=name, expected=limit, got=value)
            env[s.name] = int(value)
        return env


def _check_kind(spec: InputSpec, x: Any) -> None:
    if spec.kind == "none":
        if x is not None:
            raise WrongInputType(name=spec.name, expected="None", got=type(x).__name__)
        return
    if spec.kind != "tensor":
        if not isinstance(x, _NUMBERS[spec.kind]) or (spec.kind != "bool" and isinstance(x, bool)):
            raise WrongInputType(name=spec.name, expected=f"a {spec.kind}", got=type(x).__name__)
        return
    if not isinstance(x, torch.Tensor):
        raise WrongInputType(name=spec.name, expected="a tensor", got=type(x).__name__)
    kind: Any = type(x)
    if kind is not torch.Tensor and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise WrongInputType(name=spec.name, expected="a plain tensor", got=f"the tensor subclass {type(x).__name__}")
    if x.layout is not torch.strided:
        raise WrongInputType(name=spec.name, expected="a dense tensor", got=f"one of layout {x.layout}")
    if x.is_neg() or x.is_conj():
        raise WrongInputType(
            name=spec.name, expected="a plain tensor", got="a lazy conjugate (use resolve_conj/resolve_neg)"
        )
    if str(x.dtype) != f"torch.{spec.dtype}":
        raise WrongInputDtype(name=spec.name, expected=spec.dtype, got=str(x.dtype).removeprefix("torch."))
    expected = torch.device(spec.device)
    if x.device.type != expected.type or (expected.index is not None and x.device.index != expected.index):
        raise WrongInputDevice(name=spec.name, expected=spec.device, got=str(x.device))
    if x.dim() != len(spec.shape):
        shape = _shape_text(spec)
        raise WrongInputRank(name=spec.name, expected=len(spec.shape), got=x.dim(), shape=tuple(x.shape), spec=shape)


def _shape_text(spec: InputSpec) -> str:
    return f"({', '.join(map(sizes.text, spec.shape))})"


def _expected(expr: SizeExpr, value: int) -> str:
    return str(value) if isinstance(expr, int) else f"{sizes.text(expr)} = {value}"


def _check_geometry(spec: InputSpec, x: torch.Tensor, env: dict[str, int]) -> None:
    for dim, expr in enumerate(spec.shape):
        size = sizes.evaluate(expr, env)
        if x.shape[dim] != size:
            raise WrongInputShape(
                name=spec.name,
                dim=dim,
                expected=_expected(expr, size),
                got=x.shape[dim],
                shape=tuple(x.shape),
                spec=_shape_text(spec),
            )
    if spec.strides is None or x.numel() == 0:
        return
    for dim, expr in enumerate(spec.strides):
        stride = sizes.evaluate(expr, env)
        if x.shape[dim] > 1 and x.stride(dim) != stride:
            raise WrongInputStrides(
                name=spec.name, dim=dim, expected=_expected(expr, stride), got=x.stride(dim), strides=x.stride()
            )


def _check_number(spec: InputSpec, x: float, env: dict[str, int]) -> None:
    expected = spec.expr if isinstance(spec.expr, float) else sizes.evaluate(spec.expr, env)  # type: ignore[arg-type]
    if x != expected and not (x != x and expected != expected):
        raise WrongInputValue(name=spec.name, expected=sizes.text(spec.expr), got=x)  # type: ignore[arg-type]
