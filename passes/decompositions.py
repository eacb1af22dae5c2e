"""The decomposition policy: which ATen ops AOTAutograd breaks into simpler ones, and which it leaves whole.

The start is torch's own table of core ATen decompositions. An op stays whole where plait has something better for it
than the fused sum of its parts (a template, a two-pass kernel) or where its parts would be slower or different from the
library's kernel; it is decomposed further where its parts are elementwise, views or reductions, which fuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table, get_decompositions
from torch._ops import OpOverload

from . import foreach
from .quantize import decompositions as quantize

aten: Any = torch.ops.aten

Table = dict[OpOverload, Callable[..., Any]]

#: Ops that core ATen would decompose and plait keeps, by reason. Names of packets; every overload is kept.
WHOLE: dict[str, tuple[str, ...]] = {
    # matmul with its bias is one kernel: the template adds it in the epilogue
    "matmul template": ("linear", "addmm", "mm", "bmm", "baddbmm", "matmul"),
    # never materialise the score matrix
    "attention template": (
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    # one kernel with a two-pass variance in registers
    "norm kernels": ("native_layer_norm", "_fused_rms_norm"),
    # elementwise already; their one expression is better known to the printer than its parts (torch's form of addcmul
    # refuses a fractional factor of integers, which eager truncates)
    "elementwise": ("silu", "gelu", "addcmul"),
    # one store of the changed part into a copy; as index arithmetic it would touch every element with a branch
    "partial writes": ("select_scatter", "slice_scatter"),
    # interpolation and pooling: gathers with several taps, which the library vectorises over channels (torch itself opens
    # interpolation by scale factors into gathers before this table is asked)
    "sampling": (
        "upsample_linear1d", "upsample_bilinear2d",
        "upsample_trilinear3d", "upsample_bicubic2d",
        "adaptive_max_pool1d", "adaptive_max_pool2d", "im2col", "col2im", "grid_sampler_2d",
    ),
    # their parts would draw other numbers than eager does for the same seed
    "random": ("bernoulli", "rrelu_with_noise", "rrelu_with_noise_functional", "native_dropout", "normal", "uniform"),
}  # fmt: skip

#: Ops outside core ATen's table that decompose into elementwise ops, views and reductions, from torch's full table.
FURTHER: tuple[str, ...] = (
    # activations with a plain formula
    "elu", "hardtanh", "leaky_relu",
    # training-mode norms: a reduction and an elementwise part, which fuse with what surrounds them
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_with_update_functional",
    "_batch_norm_no_update", "batch_norm_backward", "native_group_norm",
    # norms of vectors: pow, sum, root
    "linalg_vector_norm", "dist",
    # matrix times vector through the matmul family
    "addmv",
    # views
    "permute_copy", "unbind_copy.int",
)  # fmt: skip


def nll_loss_backward(
    grad_output: Tensor, self: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
    total_weight: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of the negative log likelihood, (N, C) or (C,), as a comparison instead of a scatter into zeros.

    Elementwise, so that it fuses into the gradient of log-softmax and the (N, C) zeros are never stored.
    """
    classes = torch.arange(self.shape[-1], device=target.device)
    chosen = target.unsqueeze(-1)
    hit = (classes == chosen) & (chosen != ignore_index)
    grad = grad_output / total_weight if reduction == 1 else grad_output
    if reduction == 0 and self.dim() == 2:
        grad = grad.unsqueeze(-1)
    value = -grad if weight is None else -grad * weight
    return torch.where(hit, value, torch.zeros((), dtype=self.dtype, device=self.device)).to(self.dtype)


def repeat(self: Tensor, repeats: list[int]) -> Tensor:
    """Tiles of a tensor: broadcast along new dimensions, then one copy."""
    sizes = [1] * (len(repeats) - self.dim()) + list(self.shape)
    x = self
    for _ in range(len(repeats) - self.dim()):
        x = x.unsqueeze(0)
    for i in range(len(repeats)):
        x = x.unsqueeze(2 * i)
    tiled = [d for count, size in zip(repeats, sizes, strict=True) for d in (count, size)]
    x = x.expand(tiled).clone(memory_format=torch.contiguous_format)
    return x.view([count * size for count, size in zip(repeats, sizes, strict=True)])


def split_with_sizes(self: Tensor, split_sizes: list[int], dim: int = 0) -> list[Tensor]:
    """Pieces as slices. torch's own goes through as_strided, whose index arithmetic fuses with nothing."""
    out: list[Tensor] = []
    start = 0
    for size in split_sizes:
        out.append(aten.slice.Tensor(self, dim, start, start + size))
        start += size
    return out


def take(self: Tensor, index: Tensor) -> Tensor:
    """Elements by their position in row-major order. torch's own asks an index without dimensions for its number."""
    return aten.index.Tensor(self.reshape(-1), [index])


def unbind(self: Tensor, dim: int = 0) -> list[Tensor]:
    """Rows as selects."""
    return [aten.select.int(self, dim, i) for i in range(self.shape[dim])]


def empty_permuted(size: list[int], physical_layout: list[int], **options: Any) -> Tensor:
    """Memory in another order of dimensions: empty in that order, seen through a permutation."""
    place = [physical_layout.index(d) for d in range(len(size))]
    return torch.empty([size[d] for d in physical_layout], **options).permute(place)


def narrow_copy(self: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A slice, copied."""
    return self.narrow(dim, start, length).clone(memory_format=torch.contiguous_format)


def view_copy(self: Tensor, size: list[int]) -> Tensor:
    """A view, copied."""
    return self.view(size).clone(memory_format=torch.contiguous_format)


def angle(self: Tensor) -> Tensor:
    """Of real numbers: pi where negative, else 0."""
    if self.is_complex():
        return NotImplemented
    x = self if self.is_floating_point() else self.to(torch.get_default_dtype())
    zero, half_turn = (torch.full((), v, dtype=x.dtype, device=x.device) for v in (0.0, math.pi))
    return torch.where(x.isnan(), x, torch.where(x < 0, half_turn, zero))


def ldexp(self: Tensor, other: Tensor) -> Tensor:
    """self * 2**other, rounded where torch rounds it."""
    return self * torch.pow(2.0, other)


# -- scatters -----------------------------------------------------------------------------------------------------------


def _of_rows(op: OpOverload, *tensors: int) -> Callable[..., Any]:
    """`op` on tensors without dimensions, whose positions are `tensors`, as if they had one of size 1."""

    def opened(*args: Any, **options: Any) -> Any:
        if args[0].dim() > 1 or all(args[k].dim() for k in tensors):
            return NotImplemented
        lifted = [a.reshape(-1) if k in tensors else a for k, a in enumerate(args)]
        return op(*lifted, **options).reshape(args[0].shape)

    return opened


#: What an element starts from where a scatter does not include the element itself.
_START: dict[str, Callable[[torch.dtype], float]] = {
    "sum": lambda dtype: 0,
    "mean": lambda dtype: 0,
    "prod": lambda dtype: 1,
    "amax": lambda dtype: -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min,
    "amin": lambda dtype: math.inf if dtype.is_floating_point else torch.iinfo(dtype).max,
}


def scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:  # fmt: skip
    """Opened where there is more to it than one ordered scatter: without `self`, what is hit starts afresh; a mean divides
    a sum by a count."""
    if self.dtype.is_complex or self.dtype is torch.bool:
        return NotImplemented
    if not (self.dim() and index.dim()):
        parts = (self.reshape(-1), dim, index.reshape(-1), src.reshape(-1), reduce)
        return torch.scatter_reduce(*parts, include_self=include_self).reshape(self.shape)
    if include_self and reduce != "mean":
        return NotImplemented
    start = self if include_self else self.scatter(dim, index, _START[reduce](self.dtype))
    if reduce != "mean":
        return aten.scatter_reduce.two(start, dim, index, src, reduce)
    ones = torch.ones_like(src)
    count = (torch.ones_like(self) if include_self else torch.zeros_like(self)).scatter_add(dim, index, ones)
    total, count = start.scatter_add(dim, index, src), count.clamp(min=1)
    return total / count if self.dtype.is_floating_point else torch.div(total, count, rounding_mode="floor")


def index_reduce(
    self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:  # fmt: skip
    """scatter_reduce with one index for whole slices."""
    if self.dim() == 0 or source.dim() != self.dim():
        parts = (self.reshape(-1), dim, index.reshape(-1), source.reshape(-1), reduce)
        return (
            torch.index_reduce(*parts, include_self=include_self).reshape(self.shape) if self.dim() < 2 else NotImplemented
        )
    shape = [1] * self.dim()
    shape[dim % self.dim()] = index.numel()
    spread = index.to(torch.int64).reshape(shape).expand(source.shape)
    return torch.scatter_reduce(self, dim, spread, source, reduce, include_self=include_self)


def index_put(self: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """One mask and one value: a choice, element by element. Any other mask picks sizes that are known only at run time."""
    used = [k for k, t in enumerate(indices) if t is not None]
    mask = indices[used[0]] if len(used) == 1 else None
    if mask is None or mask.dtype is not torch.bool or values.numel() != 1:
        return NotImplemented
    behind = self.dim() - used[0] - mask.dim()
    spread = mask.reshape([1] * used[0] + list(mask.shape) + [1] * behind)
    value = values.reshape(())
    return torch.where(spread, self + value if accumulate else value, self)


def masked_scatter(self: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The n-th element under the mask is the n-th of `source`: a running count of the mask, and a gather."""
    if source.numel() == 0:
        return NotImplemented
    mask, self = torch.broadcast_tensors(mask, self)
    position = mask.reshape(-1).to(torch.int64).cumsum(0) - 1  # -1 before the first, the last element: not chosen
    return torch.where(mask, source.reshape(-1)[position].reshape(self.shape), self)


def put(self: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """index_put by the position in row-major order."""
    flat = self.reshape(-1).index_put([index.reshape(-1)], source.reshape(-1), accumulate)
    return flat.reshape(self.shape)


def embedding_dense_backward(grad: Tensor, indices: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """Rows of the gradient added into zeros, those of the padding as zeros."""
    if scale_grad_by_freq or grad.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    if padding_idx >= 0:
        grad = grad.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    width = grad.shape[-1]
    return grad.new_zeros([rows, width]).index_add(0, indices.reshape(-1), grad.reshape(-1, width))


def max_unpool(self: Tensor, indices: Tensor, output_size: list[int], *_: Any) -> Tensor:
    """A scatter into zeros, one row for each image and channel."""
    lead = self.shape[: self.dim() - len(output_size)]
    if self.numel() == 0 or 0 in output_size:
        return self.new_zeros([*lead, *output_size])
    rows = math.prod(lead)
    zeros = self.new_zeros([rows, math.prod(output_size)])
    filled = zeros.scatter(1, indices.reshape(rows, -1), self.reshape(rows, -1))
    return filled.view([*lead, *output_size])


#: Decompositions of plait's own.
OWN: dict[str, Callable[..., Any]] = {
    "nll_loss_backward.default": nll_loss_backward,
    "repeat.default": repeat,
    "split_with_sizes.default": split_with_sizes,
    "take.default": take,
    "empty_permuted.default": empty_permuted,
    "narrow_copy.default": narrow_copy,
    "view_copy.default": view_copy,
    "angle.default": angle,
    "ldexp.Tensor": ldexp,
    "scatter.src": _of_rows(aten.scatter.src, 0, 2, 3),
    "scatter.value": _of_rows(aten.scatter.value, 0, 2),
    "scatter.reduce": _of_rows(aten.scatter.reduce, 0, 2, 3),
    "scatter.value_reduce": _of_rows(aten.scatter.value_reduce, 0, 2),
    "scatter_add.default": _of_rows(aten.scatter_add.default, 0, 2, 3),
    "index_add.default": _of_rows(aten.index_add.default, 0, 2, 3),
    "cumsum.default": _of_rows(aten.cumsum.default, 0),
    "cumprod.default": _of_rows(aten.cumprod.default, 0),
    "scatter_reduce.two": scatter_reduce,
    "index_reduce.default": index_reduce,
    "index_put.default": index_put,
    "masked_scatter.default": masked_scatter,
    "put.default": put,
    "embedding_dense_backward.default": embedding_dense_backward,
    "max_unpool2d.default": max_unpool,
    "max_unpool3d.default": max_unpool,
    "unbind.int": unbind,
}


def _overloads(packet: str) -> list[OpOverload]:
    name, _, overload = packet.partition(".")
    found = getattr(aten, name, None)
    if found is None:
        return []
    return [getattr(found, o) for o in ([overload] if overload else found.overloads())]


@cache
def _base() -> Table:
    table: Table = {k: v for k, v in core_aten_decompositions().items() if isinstance(k, OpOverload)}
    further = [o for name in FURTHER for o in _overloads(name) if o in decomposition_table]
    table.update({k: v for k, v in get_decompositions(further).items() if isinstance(k, OpOverload)})
    for packets in WHOLE.values():
        for packet in packets:
            for overload in _overloads(packet):
                table.pop(overload, None)
    for name, fn in OWN.items():
        table.update(dict.fromkeys(_overloads(name), fn))
    table.update(foreach.decompositions())
    table.update(quantize.decompositions())
    return table


def _multiply_add(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """a·b + c, rounded twice as torch's own implementation of `prims.fma` does."""
    return a * b + c


def _late() -> Table:
    """Of ops that exist only once Dynamo has met what it writes with them: addcdiv with a factor and the like."""
    fused = getattr(torch.ops.prims, "fma", None)
    return {} if fused is None else {fused.default: _multiply_add}


def table(keep: Iterable[str] = ()) -> Table:
    """Decompositions to hand to AOTAutograd. `keep` names further ops to leave whole, such as `aten.hardswish` (every
    overload) or `aten.hardswish.default`, for passes that match them."""
    kept = set(keep)
    found = {**_base(), **_late()}
    return {k: v for k, v in found.items() if str(k) not in kept and str(k).rpartition(".")[0] not in kept}
