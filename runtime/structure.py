"""How a model's arguments and results nest: between what users pass and the flat lists that plans run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils import _pytree as pytree

from ..errors import WrongInputStructure


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
        self._single = out_tree.is_leaf()

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The flat inputs of a call. Raises WrongInputStructure."""
        if self._positional and not kwargs and len(args) == self.in_tree.num_leaves:
            return list(args)  # a container among them is refused by the check of each input
        if kwargs.keys() == set(self._keywords):
            kwargs = {name: kwargs[name] for name in self._keywords}  # the structure knows their order
        flat, tree = pytree.tree_flatten((args, kwargs))
        if tree != self.in_tree:
            raise WrongInputStructure(expected=show(self.in_tree), got=show(tree))
        return flat

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The result of a call from the flat outputs."""
        return results[0] if self._single else pytree.tree_unflatten(results, self.out_tree)


def show(tree: pytree.TreeSpec) -> str:
    """The structure as one short line, leaves as `*`: `((*, [*, *]), {'mask': *})`."""
    leaf = type("Leaf", (), {"__repr__": lambda self: "*"})()
    return repr(pytree.tree_unflatten([leaf] * tree.num_leaves, tree))
