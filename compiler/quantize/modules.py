"""Linear layers with quantized weights, and putting them into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import BadQuantizedType, CannotReplace
from ...formats import Quantized, QuantizedType, quantize
from ...formats import ops as registered  # importing registers the ops

assert registered is not None
Activations = Literal["float", "int8"]
"""How a layer reads its input: as it is, or with each row rounded to int8 at each call."""


class QuantizedLinear(nn.Module):
    """A linear layer x [.., K] -> [.., N] whose weight is quantized.

    The parts of the weight are buffers `codes`, `scales` and `zeros` (None where the type is symmetric); `bias` [N] is a
    parameter or None. `input_scale` [K], where there is one, multiplies x first. Casts such as `model.half()` leave the
    parts as they are. Gradients reach the input and the bias, as the dequantized weight gives them. With activations of
    "int8" the type has the layout "bytes" and one scale a row.

    Raises BadQuantizedType for parts, a bias or an input scale that are not those of the type.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    input_scale: Tensor | None
    type: QuantizedType
    activations: Activations

    def __init__(
        self,
        parts: Quantized,
        bias: Tensor | None = None,
        activations: Activations = "float",
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        kind = parts.type
        kind.check(parts.codes, parts.scales, parts.zeros)
        _check(kind, bias, activations, input_scale)
        self.type = kind  # pyright: ignore[reportIncompatibleMethodOverride]
        self.activations = activations
        self._text = str(kind)
        self.register_buffer("codes", parts.codes)
        self.register_buffer("scales", parts.scales)
        self.register_buffer("zeros", parts.zeros)
        self.register_buffer("input_scale", input_scale)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, type: QuantizedType, activations: Activations = "float") -> QuantizedLinear:
        """A layer whose weight is the linear's, rounded to nearest; the bias is the same parameter.

        Raises BadQuantizedType, also for a weight with NaN or infinite elements.
        """
        if not bool(linear.weight.isfinite().all()):
            raise BadQuantizedType(what=str(type), why="the weight has NaN or infinite elements")
        made = cls(quantize(linear.weight, type), linear.bias, activations)
        return made.train(linear.training)

    @classmethod
    def from_parts(
        cls,
        quantized: Quantized,
        bias: Tensor | None = None,
        activations: Activations = "float",
        input_scale: Tensor | None = None,
    ) -> QuantizedLinear:
        """A layer of parts that somebody else has made. Raises BadQuantizedType."""
        return cls(quantized, bias, activations, input_scale)

    @property
    def in_features(self) -> int:
        """K."""
        return self.type.columns

    @property
    def out_features(self) -> int:
        """N."""
        return self.type.rows

    @property
    def parts(self) -> Quantized:
        """The weight: its type, codes, scales and zeros."""
        return Quantized(self.type, self.codes, self.scales, self.zeros)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N], in the dtype of x."""
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        if self.activations == "int8":
            return torch.ops.plait.dynamic_linear(x, self.codes, self.scales, self.bias)
        return torch.ops.plait.quantized_linear(x, self.codes, self.scales, self.zeros, self.bias, self._text)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The float layer that this one stands for, with the input scale folded in and a copy of the bias."""
        weight = self.parts.dequantize(torch.float64 if dtype == torch.float64 else torch.float32)
        if self.input_scale is not None:
            weight = weight * self.input_scale
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(weight.to(dtype))
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return made.train(self.training)

    def extra_repr(self) -> str:
        rest = "" if self.activations == "float" else f", activations={self.activations}"
        rest += "" if self.input_scale is None else ", input_scale=True"
        return f"{self._text}, bias={self.bias is not None}{rest}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Scales move with the module, but a cast of the module is not one of the type."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Codes of another dtype are codes of another type, which a copy would silently convert."""
        for name in ("codes", "scales", "zeros"):
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and given is not None and own.dtype != given.dtype:
                error_msgs.append(f"{prefix}{name} of {self._text} is {own.dtype}, and what is loaded is {given.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _check(kind: QuantizedType, bias: Tensor | None, activations: str, input_scale: Tensor | None) -> None:
    def refuse(why: str) -> None:
        raise BadQuantizedType(what=str(kind), why=why)

    if len(kind.shape) != 2:
        refuse("a linear layer has one weight [N, K]")
    if activations not in ("float", "int8"):
        refuse(f"activations are 'float' or 'int8', not {activations!r}")
    if activations == "int8" and (kind.layout != "bytes" or kind.groups != 1):
        refuse(f"activations of int8 take the layout 'bytes' and one scale a row, such as i8g{kind.columns}:bytes")
    if bias is not None and tuple(bias.shape) != (kind.rows,):
        refuse(f"the bias is {list(bias.shape)}, not [{kind.rows}]")
    if input_scale is not None and tuple(input_scale.shape) != (kind.columns,):
        refuse(f"the input scale is {list(input_scale.shape)}, not [{kind.columns}]")


def why_not_replaced(model: nn.Module, name: str, kind: QuantizedType) -> str | None:
    """Why a module of a model cannot become a quantized linear layer of a type; None where it can."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = modules.get(name)
    if found is None:
        return "the model has no such module"
    if found is model:
        return "it is the whole model, which cannot be replaced in itself"
    if not isinstance(found, nn.Linear):
        return f"it is a {type(found).__name__}, no torch.nn.Linear"
    if type(found).forward is not nn.Linear.forward:
        return f"{type(found).__name__} computes something else than a torch.nn.Linear"
    if isinstance(found, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its parent reads the weight itself"
    if (found.out_features, found.in_features) != kind.shape:
        return f"it is [{found.out_features}, {found.in_features}], and the weight is {list(kind.shape)}"
    return None


def replace_linears(model: nn.Module, replacements: Mapping[str, QuantizedLinear]) -> None:
    """Put quantized layers where a model has these linear layers, in place.

    A module that the model holds under several names is replaced under all of them. Nothing is replaced where an error is
    raised. Raises CannotReplace.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen: dict[int, QuantizedLinear] = {}
    for name, new in replacements.items():
        why = why_not_replaced(model, name, new.type)
        if why is None and chosen.setdefault(id(modules[name]), new) is not new:
            why = "it is also to become another layer, under another name of the same module"
        if why is not None:
            raise CannotReplace(name=name, why=why)
    for name, old in modules.items():
        if id(old) in chosen:
            parent, _, last = name.rpartition(".")
            setattr(modules[parent], last, chosen[id(old)])
