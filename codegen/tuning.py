"""Which implementation runs a matmul: by what the processor has for its dtype, or measured, now or before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..cost.device import cpu_flags
from ..cost.profile import open_table, user_path
from ..ir import Node, Symbols, Value, op, seen
from .convolution import Window, convolution_of, faster_library, spread
from .kernels import current_cache
from .matmul import Chooser, Matmul
from .templates.convolution_choice import ONEDNN_CONVOLUTION, ConvolutionProblem, choose_convolution
from .templates.matmul_choice import MKL, ONEDNN, TEMPLATE, MatmulProblem, candidate_names, choose_matmul

_MEASURABLE = 1 << 28  # elements of an operand; larger ones are not made just to time them
_FEW_ROWS = 16  # products of fewer read the weight and do little else: there the template is as fast, and fuses
_WIDE = {  # instructions that multiply more than the template's do, and that oneDNN uses, by dtype of A
    torch.bfloat16: ("amx_bf16",),
    torch.float16: ("amx_fp16", "avx512_fp16"),
    torch.int8: ("amx_int8",),
    torch.uint8: ("amx_int8",),
}


def instructions() -> tuple[str, ...]:
    """Those of this processor that `default_choice` decides by."""
    return tuple(sorted({flag for flags in _WIDE.values() for flag in flags} & cpu_flags()))


def default_choice(symbols: Symbols) -> Chooser:
    """A function that leaves products of halves and bytes to oneDNN where the processor has instructions for them that the
    template does not use, and the product has more than a few rows, and float32 convolutions (docs/design.md). All others
    go to the template."""

    def choose(node: Node, made: Matmul) -> tuple[str, str] | None:
        if made.window is not None:
            return _unmeasured_convolution(node)
        if made.quantized is not None:
            return None  # no library reads its codes
        has = next((flag for flag in _WIDE.get(made.a.tensor.dtype, ()) if flag in cpu_flags()), None)
        rows = seen(made.m, symbols)
        if has is None or rows is None or rows < _FEW_ROWS or made.scale is not None:
            return None
        dtype = str(made.a.tensor.dtype).removeprefix("torch.")
        return MKL, f"oneDNN's matmul: this CPU has {has} for {dtype}, which the template does not use"

    return choose


def measured_choice(symbols: Symbols, producers: dict[Value, Node]) -> Chooser:
    """A function that names the library which runs a matmul faster than plait's template, and says by how much.

    It gives None where the template is the fastest, and for sizes that are only hints the sizes seen at capture decide.
    Timings come from the user's profile table and are kept there.
    """
    table = open_table(user_path())
    threads = torch.get_num_threads()
    folder = current_cache().root / "tuning"

    def choose(node: Node, made: Matmul) -> tuple[str, str] | None:
        if made.window is not None:
            return measured_convolution(node, made.window)
        if made.quantized is not None:
            return None  # no library reads its codes
        sizes = [seen(d, symbols) for d in (made.m, made.n, made.k, made.batch[0] if made.batch else 1)]
        if any(s is None or s == 0 for s in sizes):
            return None
        m, n, k, batch = (int(s) for s in sizes if s is not None)
        if max(m * k, k * n, m * n) * batch > _MEASURABLE:
            return None
        dtype = str(made.a.tensor.dtype).removeprefix("torch.")
        if made.scale is not None or (made.sums == "int32" and made.b.tensor.dtype is not torch.int8):
            return None  # no library multiplies them otherwise than torch's own call
        problem = MatmulProblem(m, n, k, batch, dtype, made.a_layout, made.b_layout)
        best = choose_matmul(problem, table, threads, folder)
        table.save()
        timings = table.get(problem.key(threads))
        ranked = sorted((timings[name].median, name) for name in candidate_names(problem) if name in timings)
        name = best.name
        if name == ONEDNN and linear_call(node, made, producers) is None:
            name = next(other for _, other in ranked if other != ONEDNN)
        if name not in (MKL, ONEDNN):
            return None
        mine = timings["template"].median * 1e6
        return name, f"{name}, measured: {timings[name].median * 1e6:.0f} µs against {mine:.0f} µs of the template"

    def measured_convolution(node: Node, window: Window) -> tuple[str, str] | None:
        problem = _convolution_problem(node, window, symbols)
        if problem is None:
            return _unmeasured_convolution(node)
        best = choose_convolution(problem, table, threads, folder)
        table.save()
        if best.name == TEMPLATE:
            return None
        timings = table.get(problem.key(threads))
        mine, theirs = (timings[name].median * 1e6 for name in (TEMPLATE, ONEDNN_CONVOLUTION))
        return best.name, f"oneDNN's convolution, measured: {theirs:.0f} µs against {mine:.0f} µs of the template"

    return choose


def _unmeasured_convolution(node: Node) -> tuple[str, str] | None:
    made = convolution_of(node)
    why = None if isinstance(made, str) else faster_library(made)
    return None if why is None else (ONEDNN_CONVOLUTION, f"oneDNN's convolution: {why}")


def _convolution_problem(node: Node, window: Window, symbols: Symbols) -> ConvolutionProblem | None:
    """A convolution's sizes as numbers; None where they are unknown, or too large or small to be measured."""
    made = convolution_of(node)
    assert not isinstance(made, str), "a product with a window is a convolution"

    def numbers(sizes: Sequence[Any]) -> tuple[int, ...] | None:
        found = [seen(n, symbols) for n in sizes]
        return None if None in found else tuple(n for n in found if n is not None)

    kinds = [(numbers(v.tensor.shape), numbers(v.tensor.strides)) for v in (made.x, made.weight)]
    sizes, product = numbers(window.sizes), numbers((made.m, made.n, made.k))
    image, weight = ((shape, strides) if shape and strides else None for shape, strides in kinds)
    if image is None or weight is None or sizes is None or product is None or 0 in product:
        return None
    m, n, k = product
    if max(m * n, math.prod(image[0]), math.prod(weight[0])) > _MEASURABLE:
        return None
    dtype = str(made.x.tensor.dtype).removeprefix("torch.")
    stride, padding, dilation = (spread(node[name], made.x.tensor.rank - 2) for name in ("stride", "padding", "dilation"))
    return ConvolutionProblem(dtype, image, weight, stride, padding, dilation, window.pixels, m, n, k, sizes)


def linear_call(node: Node, made: Matmul, producers: dict[Value, Node]) -> Node | None:
    """The same product as a call of oneDNN, where its weight is there as [N, K]; None where it is not."""
    if made.batch is not None or made.alpha != 1 or made.beta != 1 or made.b_layout != "k":
        return None
    if made.bias is not None and made.bias.tensor.rank != 1:
        return None
    weight = made.b
    if node.op.name != "aten.linear.default":
        source = producers.get(made.b)
        if source is None or source.op.name not in ("aten.permute.default", "aten.t.default", "aten.transpose.int"):
            return None
        weight = source.args[0]
    origin = producers.get(weight)
    if origin is not None and origin.op.name != "plait.constant":
        return None  # it would have to be put into memory first
    if not weight.tensor.is_contiguous or not made.a.tensor.is_contiguous:
        return None
    target = op("mkldnn._linear_pointwise.default")
    return Node(target, (made.a, weight, made.bias, "none", (), ""), node.outputs, (), node.loc)
