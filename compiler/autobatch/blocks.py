"""Blocks: tensor code of one instance, its batched form, and what one application of it gives."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import DataDependentShape, SharedWrite, WriteThroughView
from .rules import Batchable
from .values import Pending, Type

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .compile import Compiled

Instance = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]  # values of one instance to results of one instance


@dataclass(eq=False)
class Block:
    """Straight-line tensor code that many instances run: `fn` takes one instance's tensors, shared ones are closed over.

    `looped` says why the batched form is a loop over instances, where torch has no batching rule for an op. `compiled` are
    its graphs once it has been compiled, `uncompiled` says why it cannot be.
    """

    number: int
    name: str
    source: str
    fn: Instance
    inputs: tuple[Type, ...]
    shared: tuple[torch.Tensor, ...]
    outputs: tuple[Type, ...]
    grad: bool
    looped: str = ""
    launches: int = 0
    examined: bool = False  # for what can be hoisted out of it
    indexed: bool = False  # compiled, or not to be, to read arguments through ids of rows
    compiled: Compiled | None = None
    uncompiled: str = ""

    def batched(self, stacked: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results of all instances, each stacked along a new first axis as the arguments are."""
        if self.looped:
            rows = [self.fn([x[i] for x in stacked]) for i in range(stacked[0].shape[0])]
            return [torch.stack(column) for column in zip(*rows, strict=True)]
        with Batchable():
            return vmap(lambda *xs: tuple(self.fn(xs)), randomness="different")(*stacked)  # type: ignore[return-value]


@dataclass(frozen=True)
class Hoisted:
    """A block that runs before another one, at a smaller depth: it takes the arguments at `places`; the other one takes
    those at `kept`, then its results."""

    block: Block
    places: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What an application of an op gives: a block and where its results go, or plain data alone.

    `results` are, in the order of `spec`, positions among the block's results, or plain data. `written` are positions of
    arguments that eager writes to, each with the position of the result that is its new value. `views` are results that
    share memory with an argument in eager, `same` those that are the very argument. `places` are the positions of the
    arguments that are one instance's.
    """

    block: Block | None
    spec: TreeSpec
    results: tuple[tuple[bool, Any], ...]
    written: dict[int, int] = field(default_factory=dict)
    views: dict[int, int] = field(default_factory=dict)
    same: dict[int, int] = field(default_factory=dict)
    places: tuple[int, ...] = ()
    before: Hoisted | None = None


def block_of(number: int, like: Block, fn: Instance, inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Block:
    """A part of a block as a block of its own. Raises what running it on fake tensors raises."""
    touched = _Touched(like.source)
    with (
        disable_proxy_modes_tracing(),
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
        without_modes(),
        touched,
    ):
        fn([torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs])
    made = Block(number, like.name, like.source, fn, inputs, tuple(touched.real.values()), outputs, like.grad, examined=True)
    made.looped = _why_looped(made)
    return made


def analyse(
    number: int,
    func: Callable[..., Any],
    leaves: Sequence[Any],
    spec: TreeSpec,
    places: Sequence[int],
    source: str,
    grad: bool,
) -> Outcome:
    """Find out what `func` gives by running it on fake tensors. `places` are the positions of one instance's tensors among
    the leaves. Raises DataDependentShape, SharedWrite, WriteThroughView."""
    name = getattr(func, "__name__", str(func))
    given, results, out_spec, versions, shared = _on_fakes(func, leaves, spec, places, source, name)
    written = {}
    for at, x in enumerate(given):
        if version_of(x) != versions[at]:
            _refuse_write(leaves[at], at in places, name, source)
            written[at] = len(written)
    tensors = [x for x in results if isinstance(x, torch.Tensor)]
    if not tensors and not written:
        return Outcome(None, out_spec, tuple((False, x) for x in results))
    same = {k: at for k, x in enumerate(results) for at in places if x is given[at]}
    kept = [k for k, x in enumerate(results) if isinstance(x, torch.Tensor) and k not in same]
    storages = {given[at].untyped_storage()._cdata: at for at in places}
    views = {k: storages[s] for k in kept if (s := results[k].untyped_storage()._cdata) in storages}
    count = len(written)
    order = {k: count + i for i, k in enumerate(kept)}
    outputs = (*(Type.of(given[at]) for at in written), *(Type.of(results[k]) for k in kept))
    fn = _instance(func, leaves, spec, tuple(places), tuple(written), tuple(kept))
    block = Block(number, name, source, fn, tuple(Type.of(given[at]) for at in places), shared, outputs, grad)
    block.looped = _why_looped(block)
    found = tuple((k in order or k in same, order.get(k, x if k not in same else None)) for k, x in enumerate(results))
    return Outcome(block, out_spec, found, written, views, same, tuple(places))


_WRITERS = frozenset(
    [
        "__setitem__",
        "__iadd__",
        "__isub__",
        "__imul__",
        "__itruediv__",
        "__ifloordiv__",
        "__imod__",
        "__iand__",
        "__ior__",
        "__ixor__",
    ]
)


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Torch's API as it is outside of the batched program: no mode sees it."""
    modes = _get_current_function_mode_stack()
    for _ in modes:
        _pop_mode()
    try:
        with torch._C._EnableTorchFunction():
            yield
    finally:
        for mode in modes:
            _push_mode(mode)


class _Touched(TorchFunctionMode):
    """Collects the real tensors that ops take."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.real: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor):
                self.real[id(x)] = x
        name = getattr(func, "__name__", "")
        if (name in _WRITERS or (name.endswith("_") and not name.endswith("__"))) and args and id(args[0]) in self.real:
            raise SharedWrite(op=name, what="a shared tensor", source=self.source)
        return func(*args, **(kwargs or {}))


def _on_fakes(
    func: Callable[..., Any], leaves: Sequence[Any], spec: TreeSpec, places: Sequence[int], source: str, name: str
) -> tuple[list[Any], list[Any], TreeSpec, list[int], tuple[torch.Tensor, ...]]:
    """(fake arguments, results, their structure, versions of the arguments before, shared tensors that were read)."""
    touched = _Touched(source)
    with disable_proxy_modes_tracing(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [fake_of(x, mode) if at in places else x for at, x in enumerate(leaves)]
        versions = [version_of(x) for x in given]
        args, kwargs = tree_unflatten(given, spec)
        try:
            with without_modes(), Batchable(), touched:
                made = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as why:
            raise DataDependentShape(op=name, why=type(why).__name__, source=source) from None
    results, out_spec = tree_flatten(made)
    return given, results, out_spec, versions, tuple(touched.real.values())


def version_of(x: Any) -> int:
    """How often a tensor has been written to; 0 where that is not counted, and for other data."""
    return x._version if isinstance(x, torch.Tensor) and not x.is_inference() else 0


def fake_of(x: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor for one that is pending or real; other data as it is."""
    if type(x) is Pending:
        return torch.empty(x.type.shape, dtype=x.type.dtype, device=x.type.device)
    if isinstance(x, torch.Tensor):
        return mode.from_tensor(x.detach(), static_shapes=True)
    return x


def _refuse_write(leaf: Any, of_instance: bool, name: str, source: str) -> None:
    if type(leaf) is not Pending:
        raise SharedWrite(
            op=name, what="a tensor that the instance was given" if of_instance else "a shared tensor", source=source
        )
    if leaf.view_of is not None or leaf.viewed:
        raise WriteThroughView(op=name, source=source)


def _instance(
    func: Callable[..., Any],
    leaves: Sequence[Any],
    spec: TreeSpec,
    places: tuple[int, ...],
    written: tuple[int, ...],
    kept: tuple[int, ...],
) -> Instance:
    fixed = [None if at in places else x for at, x in enumerate(leaves)]

    def fn(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        filled = list(fixed)
        for at, value in zip(places, values, strict=True):
            filled[at] = value.clone() if at in written else value
        args, kwargs = tree_unflatten(filled, spec)
        results = tree_flatten(func(*args, **kwargs))[0]
        changed: list[Any] = [filled[at] for at in written]
        return [*changed, *(results[k] for k in kept)]

    return fn


def _why_looped(block: Block) -> str:
    """Why torch cannot batch a block; empty where it can."""
    with disable_proxy_modes_tracing(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        stacked = [torch.empty((2, *t.shape), dtype=t.dtype, device=t.device) for t in block.inputs]
        try:
            with without_modes(), warnings.catch_warnings():
                warnings.filterwarnings("error", "There is a performance drop because we have not yet implemented")
                made = block.batched(stacked)
        except Exception as why:  # vmap raises many classes
            return (str(why) or type(why).__name__).split("\n")[0]
    wrong = [
        k for k, (x, t) in enumerate(zip(made, block.outputs, strict=True)) if x.shape[1:] != t.shape or x.dtype != t.dtype
    ]
    return f"its batched form gives another type of result {wrong[0]}" if wrong else ""
