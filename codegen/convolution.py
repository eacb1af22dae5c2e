"""Convolutions on the matmul template: a product of the weight with windows of the image, in the layout that the result has.

A channels-last result has a row for each pixel and a column for each channel, any other a row for each channel and a column
for each pixel; the weight is then the operand that is read as it lies in memory. Neither images nor weights are copied into
another layout first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import Builder, Dim, Match, Node, Reason, Symbols, TensorType, Value, dim, op, seen
from ..ir.strides import channels_last_strides, lies_channels_last
from ..ir.types import contiguous_strides, product
from ..runtime.reordered import Reordered
from .templates.matmul import WINDOW
from .views import unravel

NAME = "aten.convolution.default"
_DTYPES = (torch.float32, torch.float64)
_REGISTER = 8  # pixels


@dataclass(frozen=True)
class Window:
    """What a product reads of images. `pixels` names the operand that they are: "a" (rows) or "b" (columns). `sizes` are
    the values of the template's WINDOW."""

    pixels: str
    sizes: tuple[Dim, ...]


@dataclass(frozen=True)
class Convolution:
    """The product that a convolution is: `m` x `k` by `k` x `n`."""

    x: Value
    weight: Value
    bias: Value | None
    window: Window
    m: Dim
    n: Dim
    k: Dim


def convolution_of(node: Node) -> Convolution | str:
    """The product that a convolution node is; a reason where it is none."""
    x, weight, bias = node.args[:3]
    why = _refusal(node, x, weight)
    if why is not None:
        return why
    image, kernel, out = x.tensor, weight.tensor, node.out.tensor
    last = _is_channels_last(out)
    each = [spread(node[n], image.rank - 2) for n in ("stride", "padding", "dilation")]
    taps, shape, result, steps = kernel.shape[2:], image.shape[2:], out.shape[2:], image.strides[2:]
    single = all(n == 1 for n in taps)
    taps_first = single or not _lies(kernel, contiguous_strides(kernel.shape))
    if image.rank == 3:
        taps, shape, result, steps = (1, *taps), (1, *shape), (1, *result), (0, *steps)
        each = [(1, *each[0]), (0, *each[1]), (1, *each[2])]
    elif single and each[:2] == [(1, 1), (0, 0)] and steps[0] == dim(shape[1] * steps[1]):
        # every pixel is a window of its own, so that the ends of the image's rows need no care
        shape, result, steps = (1, product(shape)), (1, product(result)), (0, steps[1])
    sizes = (image.shape[1], *taps, *shape, *result, *each[0], *each[1], *each[2], *image.strides[:2], *steps)
    window = Window("a" if last else "b", (*sizes, int(taps_first)))
    channels, pixels = out.shape[1], product((out.shape[0], *out.shape[2:]))
    m, n = (pixels, channels) if last else (channels, pixels)
    return Convolution(x, weight, bias, window, m, n, product(kernel.shape[1:]))


def pad_first(m: Match, b: Builder) -> Value:
    """The convolution of an image that was padded by an op of its own, once instead of for every tap."""
    node = m.node
    around = tuple(n for p in reversed(spread(node["padding"], node["input"].tensor.rank - 2)) for n in (p, p))
    x = b.call("aten.constant_pad_nd.default", node["input"], around, 0.0)
    args = {"input": x, "padding": (0,) * len(node["padding"])}
    out = Value(node.out.type, node.out.hint)
    new = tuple(args.get(p.name, a) for p, a in zip(node.op.params, node.args, strict=True))
    b.append(Node(node.op, new, (out,), loc=b.loc))
    return out


def check_pad_first(m: Match) -> Reason | None:
    """Refuses where the template could not read a padded image where it lies, a register of pixels at a time."""
    node = m.node
    if not any(node["padding"]):
        return Reason("no padding")
    if torch.device(node.out.tensor.device).type != "cpu":
        return Reason("not on a CPU")
    made = convolution_of(node)
    why = made if isinstance(made, str) else faster_library(made)
    if why is None and not isinstance(made, str) and (made.window.pixels == "a" or not _is_direct(made.window)):
        why = "windows that are packed, with their padding"
    return None if why is None else Reason(why)


def reordered_weight(node: Node, name: str, symbols: Symbols) -> Reordered | None:
    """How oneDNN is to lay out a convolution's weight, the constant `name`; None for convolutions that it does not take, or
    whose images it would copy."""
    x, weight = node["input"].tensor, node["weight"].tensor
    if x.rank != 4 or node["transposed"] or x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype is not x.dtype:
        return None
    if torch.device(x.device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if x.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    image = [seen(n, symbols) for n in x.shape]
    if not lies_channels_last(x) or None in image or 0 in (*image, *weight.shape) or not weight.is_static:
        return None
    if min(node["padding"]) < 0:
        return None
    stride, padding, dilation = (spread(node[n], 2) for n in ("stride", "padding", "dilation"))
    return Reordered(name, tuple(n for n in image if n is not None), stride, padding, dilation, node["groups"])


def reordered_call(node: Node, weight: Value) -> Node:
    """A convolution as a call of oneDNN with a weight that `Reordered` has laid out."""
    each = (spread(node[n], 2) for n in ("padding", "stride", "dilation"))
    args = (node["input"], weight, node["bias"], *each, node["groups"], "none", (), "")
    return Node(op("mkldnn._convolution_pointwise.default"), args, node.outputs, (), node.loc)


def faster_library(made: Convolution) -> str | None:
    """Why a convolution that nobody measured is left to oneDNN; None where the template takes it (docs/design.md).

    oneDNN computes float32; float64 would go to a convolution of torch's own.
    """
    if made.x.tensor.dtype is not torch.float32:
        return None
    return "the template takes float32 only where mode='max-autotune' measures it to be faster"


def _is_direct(window: Window) -> bool:
    """Whether the template reads the windows of a padded image where they lie: `is_direct` of matmul_window.h, for every
    instruction set whose registers hold no more than _REGISTER numbers."""
    size: dict[str, Any] = window_sizes(window)
    alone = size["window_KH"] == size["window_KW"] == 1
    touching = size["window_stride_w"] == size["window_x_w"] == 1
    return bool(not alone and touching and size["window_OW"] % _REGISTER == 0)


def _refusal(node: Node, x: Value, weight: Value) -> str | None:
    """Why a convolution is no product here."""
    dtype = x.tensor.dtype
    if dtype not in _DTYPES:
        return f"the template computes float32 and float64, not {str(dtype).removeprefix('torch.')}"
    if node["transposed"]:
        return "it is transposed"
    if x.tensor.rank > 4:
        return "its windows have three dimensions"
    if node["groups"] != 1:
        return "its channels are in groups"
    numbers = (*node["stride"], *node["padding"], *node["dilation"], *weight.tensor.shape)
    if not all(isinstance(n, int) for n in numbers):
        return "a kernel, stride or padding whose size is known only at run time"
    if min(node["padding"]) < 0 or 0 in weight.tensor.shape:
        return "negative padding, or a kernel without elements"
    for what, kind in (("result", node.out.tensor), ("weight", weight.tensor)):
        if not any(_lies(kind, strides(kind.shape)) for strides in (contiguous_strides, channels_last_strides)):
            return f"a {what} that is neither channels-first nor channels-last"
    return None


def _is_channels_last(out: TensorType) -> bool:
    """Whether a result has its channels side by side; where both forms hold, whichever has the longer rows."""
    if not _lies(out, contiguous_strides(out.shape)):
        return True
    return all(n == 1 for n in out.shape[2:]) and out.shape[1] != 1


def _lies(kind: TensorType, strides: Sequence[Dim]) -> bool:
    """Whether a tensor has these strides, but for sizes of 1, whose strides do not matter."""
    return all(n == 1 or a == b for n, a, b in zip(kind.shape, kind.strides, strides, strict=True))


def spread(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """A size for each of `count` axes, where one may stand for all."""
    return tuple(sizes) if len(sizes) == count else tuple(sizes) * count


def rows_and_columns(window: Window, shape: Sequence[Dim], row: Any, column: Any, image: Any) -> list[Any]:
    """The index of a result of `shape` in terms of the template's axes."""
    if window.pixels == "a":
        first, *rest = unravel(row, (shape[0], *shape[2:]))
        return [first, column, *rest]
    return [image, row, *unravel(column, shape[2:])]


def window_sizes(window: Window) -> dict[str, Dim]:
    """Values of the template's WINDOW by name."""
    return dict(zip(WINDOW, window.sizes, strict=True))
