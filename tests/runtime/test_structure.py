"""Nested arguments and results: what is decided once does as pytree does, and refuses no call that pytree takes."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from plait.errors import WrongInputStructure
from plait.runtime.structure import Structure
from torch.utils import _pytree as pytree

Point = namedtuple("Point", "x y")
TREES = [
    0,
    (),
    (0,),
    [0, (0, [0])],
    {"a": 0, "b": (0, {"c": 0})},
    OrderedDict(z=0, a=[0]),
    Point(0, (0, 0)),
    (None, [], {}),
]


def structure(args, kwargs, out):
    return Structure(pytree.tree_structure((args, kwargs)), pytree.tree_structure(out))


def numbered(tree):
    leaves, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten(list(range(len(leaves))), spec)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_results_nest_as_pytree_nests_them(tree):
    expected = numbered(tree)
    got = structure((0,), {}, tree).unflatten(list(range(pytree.tree_structure(tree).num_leaves)))
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_arguments_flatten_as_pytree_flattens_them(tree):
    args, kwargs = (numbered(tree),), {"mask": numbered(tree), "bias": 7}
    assert structure((tree,), {"mask": tree, "bias": 0}, 0).flatten(args, kwargs) == pytree.tree_leaves((args, kwargs))


def test_keyword_arguments_come_in_any_order():
    one = structure((), {"a": 0, "b": 0}, 0)
    assert one.flatten((), {"b": 2, "a": 1}) == one.flatten((), {"a": 1, "b": 2}) == [1, 2]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (([1, 2],), {"m": {"a": 1, "b": 2}}),
        (((1, 2, 3),), {"m": {"a": 1, "b": 2}}),
        (((1, (2,)),), {"m": {"a": 1, "b": 2}}),
        (((1, 2),), {"m": {"b": 2, "a": 1}}),
        (((1, 2),), {"m": {"a": 1}}),
        (((1, 2),), {"m": OrderedDict(a=1, b=2)}),
        (((1, 2),), {"other": {"a": 1, "b": 2}}),
        (((1, 2), 3), {"m": {"a": 1, "b": 2}}),
    ],
)
def test_another_structure_is_refused(args, kwargs):
    with pytest.raises(WrongInputStructure):
        structure(((0, 0),), {"m": {"a": 0, "b": 0}}, 0).flatten(args, kwargs)


def test_leaves_of_any_type_are_taken():
    class Odd(torch.Tensor):
        pass

    given = (torch.zeros(2).as_subclass(Odd), object())
    assert all(a is b for a, b in zip(structure(((0, 0),), {}, 0).flatten((given,), {}), given, strict=True))
