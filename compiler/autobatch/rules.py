"""Ops for which torch has no batching rule, or one that holds for one number of instances only.

They are made of ops that have rules, or run on the stacked tensors themselves, whose first axis is that of instances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
        return activation(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))

    return cell


def _gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    xr, xz, xn = F.linear(x, w_ih, b_ih).chunk(3, -1)
    hr, hz, hn = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = torch.sigmoid(hr + xr), torch.sigmoid(hz + xz)
    n = torch.tanh(xn + hn * r)
    return (h - n) * z + n


def _lstm_cell(
    x: Tensor, hx: tuple[Tensor, Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
) -> tuple[Tensor, Tensor]:
    h, c = hx
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _stacked(x: Any, like: Sequence[Any]) -> Any:
    """The tensor of all instances, its first axis theirs; of a shared tensor a view for every instance."""
    if not isinstance(x, Tensor):
        return x
    if functorch.is_batchedtensor(x):
        return functorch.get_unwrapped(x).movedim(functorch.maybe_get_bdim(x), 0)
    batched = next(t for t in like if isinstance(t, Tensor) and functorch.is_batchedtensor(t))
    return x.expand(_stacked(batched, ()).shape[0], *x.shape)


def _on_stacked(fn: Callable[..., Tensor], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that computes on stacked tensors, which `fn` takes for single ones. NotImplemented leaves it to torch."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        levels = {functorch.maybe_get_level(x) for x in found if functorch.is_batchedtensor(x)}
        if len(levels) != 1:
            return otherwise(*args, **kwargs)
        made = fn(*tree_map(lambda x: _stacked(x, found), args), **tree_map(lambda x: _stacked(x, found), kwargs))
        return otherwise(*args, **kwargs) if made is NotImplemented else functorch._add_batch_dim(made, 0, levels.pop())

    return rule


def _axis(dim: int) -> int:
    return dim if dim < 0 else dim + 1


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(tensors), _axis(dim))


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    made = F.layer_norm(x, tuple(shape), None, None, eps)
    for parameter, fn in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            between = x.dim() - parameter.dim()
            made = fn(made, parameter.reshape(parameter.shape[0], *[1] * between, *parameter.shape[1:]))
    return made


def _gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return torch.gather(x, _axis(dim), index) if x.dim() > 1 else NotImplemented  # type: ignore[return-value]


def _cross_entropy(x: Tensor, target: Tensor, **how: Any) -> Tensor:
    plain = {
        "weight": None,
        "size_average": None,
        "ignore_index": -100,
        "reduce": None,
        "reduction": "mean",
        "label_smoothing": 0.0,
    }
    if x.dim() != 2 or target.dim() != 1 or any(plain.get(k, how) != v for k, v in how.items()):
        return NotImplemented  # type: ignore[return-value]
    at = torch.where(target == -100, 0, target)  # -100 is a class that does not count, and a mean of nothing
    found = -F.log_softmax(x, -1).gather(-1, at.unsqueeze(-1)).squeeze(-1)
    return torch.where(target == -100, float("nan"), found)


def _is_position(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0 and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _getitem(x: Any, index: Any) -> Any:
    """Indexing by numbers that are tensors, which torch would turn into plain numbers."""
    if not isinstance(x, Tensor) or not _is_position(index):
        return Tensor.__getitem__(x, index)
    at = torch.where(index < 0, index + x.shape[0], index)
    if x.dim() < 2 or functorch.is_batchedtensor(x):
        return x.index_select(0, at.reshape(1)).squeeze(0)
    return F.embedding(at, x.flatten(1)).unflatten(-1, x.shape[1:])  # whose batched form holds for any number of instances


def _tensor(data: Any, **how: Any) -> Tensor:
    """A tensor of a number that may be a tensor already."""
    if not isinstance(data, Tensor):
        return torch.tensor(data, **how)
    dtype = how.get("dtype") or (torch.get_default_dtype() if data.is_floating_point() else data.dtype)
    return data.to(dtype=dtype, device=how.get("device"))


RULES: dict[Any, Callable[..., Any]] = {
    torch.rnn_tanh_cell: _rnn_cell(torch.tanh),
    torch.rnn_relu_cell: _rnn_cell(torch.relu),
    torch.gru_cell: _gru_cell,
    torch.lstm_cell: _lstm_cell,
    **{op: _on_stacked(_cat, torch.cat) for op in (torch.cat, torch.concat, torch.concatenate)},
    F.layer_norm: _on_stacked(_layer_norm, F.layer_norm),
    torch.layer_norm: _on_stacked(lambda *args: _layer_norm(*args[:5]), torch.layer_norm),
    **{op: _on_stacked(_gather, torch.gather) for op in (torch.gather, Tensor.gather)},
    Tensor.__getitem__: _getitem,
    torch.tensor: _tensor,
    F.cross_entropy: _on_stacked(_cross_entropy, F.cross_entropy),
}


class Batchable(TorchFunctionMode):
    """Ops in the forms of RULES."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (RULES.get(func) or func)(*args, **(kwargs or {}))
