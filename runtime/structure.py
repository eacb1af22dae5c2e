"""How a model's arguments and results nest: between what users pass and the flat lists that plans run on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import WrongInputStructure

LEAVES = frozenset((torch.Tensor, torch.nn.Parameter, int, float, bool, type(None)))
"""Types that never are containers; others may be, and pytree knows."""


class Structure:
    """`in_tree` is the structure of `(args, kwargs)`, `out_tree` that of the result; leaves are flat inputs and outputs.

    Raises ValueError where `in_tree` is not of that form.
    """

    def __init__(self, in_tree: pytree.TreeSpec, out_tree: pytree.TreeSpec) -> None:
        sample = pytree.tree_unflatten([0] * in_tree.num_leaves, in_tree)
        if not isinstance(sample, tuple) or len(sample) != 2 or not isinstance(sample[1], dict):
            raise ValueError("the structure of the inputs is not (args, kwargs)")
        self.in_tree, self.out_tree = in_tree, out_tree
        self._keywords = list(sample[1])
        self._positional = in_tree == pytree.tree_structure(((0,) * in_tree.num_leaves, {}))
        self._read = reader(in_tree)
        self._build = builder(out_tree)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The flat inputs of a call. Raises WrongInputStructure."""
        if self._positional and not kwargs and len(args) == self.in_tree.num_leaves:
            return list(args)  # a container among them is refused by the check of each input
        if kwargs.keys() == set(self._keywords):
            kwargs = {name: kwargs[name] for name in self._keywords}  # the structure knows their order
        read: list[Any] = []
        if self._read is not None and self._read((args, kwargs), read):
            return read
        flat, tree = pytree.tree_flatten((args, kwargs))
        if tree != self.in_tree:
            raise WrongInputStructure(expected=show(self.in_tree), got=show(tree))
        return flat

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The result of a call from the flat outputs."""
        return self._build(results)


def reader(tree: pytree.TreeSpec) -> Callable[[Any, list[Any]], bool] | None:
    """A function that appends the leaves of what has this structure to a list, and says False where that is not certain.

    What it refuses may have the structure all the same, or say better what is wrong. None: only pytree can read it.
    """
    if tree.is_leaf():
        return _read_leaf
    parts = [part for child in tree.children() if (part := reader(child)) is not None]
    if tree.type not in (tuple, list, dict) or len(parts) < tree.num_children:
        return None
    kind, keys = tree.type, tree.context  # only dicts have a context: their keys

    def read(x: Any, out: list[Any]) -> bool:
        if type(x) is not kind or len(x) != len(parts):
            return False
        if keys is not None and list(x) != keys:
            return False
        children = x if keys is None else x.values()  # pyright: ignore[reportAttributeAccessIssue]
        return all(part(child, out) for part, child in zip(parts, children, strict=True))

    return read


def _read_leaf(x: Any, out: list[Any]) -> bool:
    if type(x) not in LEAVES:
        return False
    out.append(x)
    return True


def builder(tree: pytree.TreeSpec, first: int = 0) -> Callable[[Sequence[Any]], Any]:
    """`tree_unflatten` for one structure, decided once: a function of flat results, its own from `first` on."""
    if tree.is_leaf():
        return operator.itemgetter(first)
    parts: list[Callable[[Sequence[Any]], Any]] = []
    for child in tree.children():
        parts.append(builder(child, first))
        first += child.num_leaves
    if tree.type is dict:
        pairs = list(zip(tree.context, parts, strict=True))
        return lambda results: {key: part(results) for key, part in pairs}
    if tree.type is tuple:
        return lambda results: tuple([part(results) for part in parts])
    if tree.type is list:
        return lambda results: [part(results) for part in parts]
    make, context = pytree.SUPPORTED_NODES[tree.type].unflatten_fn, tree.context
    return lambda results: make([part(results) for part in parts], context)


def show(tree: pytree.TreeSpec) -> str:
    """The structure as one short line, leaves as `*`: `((*, [*, *]), {'mask': *})`."""
    leaf = type("Leaf", (), {"__repr__": lambda self: "*"})()
    return repr(pytree.tree_unflatten([leaf] * tree.num_leaves, tree))
