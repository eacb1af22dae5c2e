"""Recording: one instance after the other runs its Python code, and every tensor op leaves a line in a table."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...errors import AutocastNotBatched, SharedWrite, TensorNotBatched
from .blocks import Block, Hoisted, Outcome, analyse, block_of, version_of, without_modes
from .constants import CONSTANTS
from .deliver import deliver
from .execute import Execution
from .fibers import Fibers
from .fuse import Derived, fuse
from .hoist import split
from .native import record
from .seen import Seen, stack_of
from .tasks import drive
from .values import INTEGER, REAL, Pending, Type

DEPTHS, AGENDA, FEWER = range(3)  # schedulers, as in state.h
PHASE_BITS = 24  # of a depth, below the number of the phase
here = threading.local()
_PACKAGE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)

# what reads a tensor's content, so that the instance can only go on with a value
DEMANDS = {
    getattr(torch.Tensor, name)
    for name in [
        "item",
        "tolist",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__complex__",
        "__index__",
        "__contains__",
        "__repr__",
        "__format__",
        "is_nonzero",
        "equal",
        "allclose",
        "__array__",
        "__deepcopy__",
        "__reduce_ex__",
    ]
} | {torch.equal, torch.allclose, torch.is_nonzero}


_DENSE = (torch.Tensor, nn.Parameter)


def autocasts() -> bool:
    """Whether ops choose their own dtypes in this thread."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _check_dense(x: torch.Tensor) -> None:
    """Raise TensorNotBatched for what has no rows."""
    if type(x) not in _DENSE:
        raise TensorNotBatched(what=f"class {type(x).__name__}")
    if x.layout is not torch.strided or x.is_quantized:
        raise TensorNotBatched(what=f"layout {x.layout}" if not x.is_quantized else "a quantized dtype")


def current() -> Recorder:
    """The recorder of the batch that this thread is recording."""
    return here.recorder


def is_recording() -> bool:
    """Whether this thread records a batch."""
    return getattr(here, "recorder", None) is not None


def begin_phase(number: int) -> None:
    """What this instance records from now on runs after all that others record in earlier phases."""
    here.recorder.state.floor = number << PHASE_BITS


def driven(generator: Any) -> Any:
    """The result of a function that waits, where its caller cannot."""
    recorder = here.recorder

    def wait(x: Pending) -> Any:
        recorder.wait_for(x)
        return recorder.numbers([x])[0]

    return drive(generator, wait)


def deeper(by: int, x: Any) -> Any:
    """A value as if it had been computed so many ops later; other data as it is."""
    if type(x) is not Pending or here.recorder.execution.has(x.id):
        return x
    made = Pending.of(here.recorder.state, x.type, x.id, x.depth + by)
    made.view_of, made.viewed = x.view_of, x.viewed
    return made


def constant(func: Callable[..., Any]) -> Callable[..., Any]:
    """An op that gives the same for the same arguments, as cut code calls it."""
    return lambda *args, **kwargs: here.recorder.constant(func, args, kwargs)


def fork(*calls: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    """The results of calls that may run in any order: side by side where instances wait for values."""
    recorder = here.recorder
    state, floor = recorder.state, recorder.state.floor

    def begun(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        state.floor = floor
        return fn(*args)

    made = recorder.spread([lambda fn=fn, args=args: begun(fn, args) for fn, args in calls])
    if made is None:
        return tuple(fn(*args) for fn, args in calls)
    state.floor = floor
    return tuple(made)


class Table:
    """What a batched function has learnt about its ops; lives as long as it does."""

    def __init__(self, without: frozenset[str] = frozenset()) -> None:
        self.without = without
        self.outcomes: dict[Any, Outcome] = {}
        self.blocks: list[Block] = []
        self.fresh: list[Any] = []  # keys of outcomes that `improve` has not looked at
        self.seen = Seen()
        self.demanded: set[tuple[types.CodeType, int]] = set()  # instructions that asked for values, all noted
        self.native = record.Table()
        self.types: dict[Type, int] = {}
        for type in (INTEGER, REAL):  # plain numbers are written by number of type
            self.number_of(type)
        self.derived: dict[int, Derived] = {}  # by the identity of their stand-ins
        self.binder: Any = None  # of the call whose shared tensors blocks without Python read
        self.spare: list[dict[Type, torch.Tensor]] = []  # pools of calls that have ended, for later ones

    def number_of(self, type: Type) -> int:
        """The number of a type."""
        found = self.types.get(type)
        if found is None:
            found = self.types[type] = self.native.type(type.row_bytes)
        return found

    def outcome(self, key: Any, make: Callable[[int], Outcome]) -> Outcome:
        """The outcome of an application, analysed once."""
        found = self.outcomes.get(key)
        if found is None:
            found = self.outcomes[key] = make(len(self.blocks))
            if found.block is not None:
                self.add(found.block)
                self.fresh.append(key)
        return found

    def add(self, block: Block) -> None:
        """Take up a new block, which has the next number."""
        self.blocks.append(block)
        self.native.block(*(tuple(map(self.number_of, types)) for types in (block.inputs, block.outputs)))

    def improve(self) -> set[Any]:
        """Rewrite new blocks: take out what does not depend on the recursion, and make products of one operand one. Gives
        the functions whose outcome is another one now."""
        found = set()
        keys, self.fresh = self.fresh, []
        for key in keys:
            outcome = self.outcomes[key]
            block = outcome.block
            assert block is not None
            if not block.launches:  # the call ended before it ran
                self.fresh.append(key)
                continue
            block.examined = True
            if block.looped or outcome.written:
                continue
            made = self._fused(self._hoisted(outcome, block))
            if made is not outcome:
                self.outcomes[key] = made
                found.add(key[0])
        return found

    def _hoisted(self, outcome: Outcome, block: Block) -> Outcome:
        parts = None if "hoisting" in self.without else split(block, self.native.recursive(block.number))
        if parts is None:
            return outcome
        count = len(self.blocks)
        before = block_of(count, block, parts.before, tuple(block.inputs[k] for k in parts.places), parts.types)
        inputs = (*(block.inputs[k] for k in parts.kept), *parts.types)
        after = block_of(count + 1, block, parts.after, inputs, block.outputs)
        if before.looped or after.looped:
            return outcome
        self.add(before)
        self.add(after)
        return replace(outcome, block=after, before=Hoisted(before, parts.places, parts.kept))

    def _fused(self, outcome: Outcome) -> Outcome:
        block = outcome.block
        made = fuse(block) if block is not None and "fusion" not in self.without else None
        if made is None or block is None:
            return outcome
        new = block_of(len(self.blocks), block, made.fn, block.inputs, block.outputs)
        if new.looped:
            return outcome
        self.add(new)
        self.derived.update({id(d.stand_in): d for d in made.derived})
        return replace(outcome, block=new)


class Recorder(TorchFunctionMode):
    """The tables of one call: for each block the ids of arguments, the depths, and the ids of results.

    As a mode it sees every call of torch's API, on plain tensors too.
    """

    def __init__(
        self, table: Table, shared: dict[int, torch.Tensor], fibers: Fibers, compile: Callable[[Block], None]
    ) -> None:
        super().__init__()
        self.table = table
        self.seen = table.seen
        self.shared = dict(shared)
        self.shares = "shared" not in table.without
        self.park = fibers.park  # lets others run until values are there; False where this call cannot wait
        self.spread = fibers.spread  # runs functions side by side; None where nobody waits
        self.state = record.State(self, table.native)  # lines, ids, and the depth below which nothing is recorded
        self.state.shared = self.shared if self.shares else None
        self.state.keeps = "structure" not in table.without
        self.state.scheduler = AGENDA if "depths" in table.without else DEPTHS if "agenda" in table.without else FEWER
        self.execution = Execution(self.state, table, table.spare.pop() if table.spare else {}, compile)
        self.derived: dict[Any, Any] = {}
        self.constants: dict[Any, Pending] = {}
        self.demanded = table.demanded
        self.last: Outcome | None = None  # of the op that was recorded last
        self.closed = False  # all is computed: what the program kept for later are plain values

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.apply(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`apply` for a method of a pending tensor, which torch does not hand over itself."""
        with torch._C.DisableTorchFunction():
            return self.apply(func, args, kwargs)

    def demand(self, x: Pending, convert: Callable[[Any], Any]) -> Any:
        """What `convert` makes of one number. Called by a method of a pending tensor."""
        frame = sys._getframe(3)  # above this, `_number` and the method
        place = frame.f_code, frame.f_lasti
        if place not in self.demanded:
            self.demanded.add(place)
            self.seen.note(self._stack(), demand=True)
        if not self.closed and (self.execution.has(x.id) or self.execution.given_as(x) is None):
            self.wait_for(x)
            with torch._C.DisableTorchFunction():
                return convert(self.execution.numbers([x])[0])
        with torch._C.DisableTorchFunction():
            return convert(self.known(x))

    # -- ops ----------------------------------------------------------------------------------------------------------

    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], source: str = "") -> Any:
        """Record one application; gives pending tensors, or plain data where the op only asks for a size or the like.
        `source` is where a block is in the user's program, as file:line; without it this is an op of the line that this
        thread is at."""
        if self.closed:
            args, kwargs = tree_map(self.known, (args, kwargs))
            return func(*args, **kwargs)
        if func in DEMANDS:
            self.seen.note(self._stack(), demand=True)
            args, kwargs = tree_map(self.known, (args, kwargs))
            return func(*args, **kwargs)
        if autocasts():
            raise AutocastNotBatched(where=f" at {source or user_line()}")
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [self._plain(x) for x in leaves]
        tensors = [at for at, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        places = [at for at in tensors if type(leaves[at]) is Pending or not self.is_shared(leaves[at])]
        if not places:
            return self._apart(func, args, kwargs, leaves, spec, bool(tensors), noted=bool(source))
        for at in places:
            if type(leaves[at]) is not Pending:
                _check_dense(leaves[at])
        if not source:  # where a block is called is no place of an op
            self.seen.note(self._stack(), demand=False)
        grad = torch.is_grad_enabled()
        key = func, spec, grad, tuple(self._key(x, at in places) for at, x in enumerate(leaves))
        outcome = self.table.outcome(
            key, lambda number: analyse(number, func, leaves, spec, places, source or user_line(), grad)
        )
        if outcome.block is None:
            return tree_unflatten([x for _, x in outcome.results], outcome.spec)
        return self._record(outcome, outcome.block, leaves, places)

    def _record(self, outcome: Outcome, block: Block, leaves: list[Any], places: list[int]) -> Any:
        self.last = outcome
        given = {at: self.lift(leaves[at]) for at in places}
        arguments = [given[at] for at in places]
        if (before := outcome.before) is not None:
            hoisted = self.line(before.block, [arguments[k] for k in before.places])
            arguments = [*(arguments[k] for k in before.kept), *hoisted]
        made = self.line(block, arguments)
        for at, k in outcome.written.items():
            given[at].id, given[at].depth = made[k].id, made[k].depth
        results: list[Any] = []
        for k, (tensor, x) in enumerate(outcome.results):
            if k in outcome.same:
                results.append(given[outcome.same[k]])
                continue
            results.append(made[x] if tensor else x)
            if k in outcome.views:
                base = given[outcome.views[k]]
                results[-1].view_of, base.viewed = base, True
        return tree_unflatten(results, outcome.spec)

    def line(self, block: Block, given: Sequence[Pending]) -> list[Pending]:
        """One line for one application of a block; its results."""
        depth, first, ancestors = self.state.line(block.number, list(given), len(block.outputs))
        return [Pending.of(self.state, t, first + k, depth, ancestors) for k, t in enumerate(block.outputs)]

    def _apart(
        self, func: Callable[..., Any], args: Any, kwargs: Any, leaves: list[Any], spec: Any, on_shared: bool, *, noted: bool
    ) -> Any:
        """What depends on no instance: computed at once; from shared tensors once for all, and then shared itself."""
        number = func is torch.tensor and type(args[0]) in (int, float)  # it may be a block's argument
        if not noted and (on_shared or number):
            self.seen.note(self._stack(), demand=False)
        if not on_shared:
            return self._constant(func, args, kwargs, leaves, spec) if func in CONSTANTS else func(*args, **kwargs)
        try:
            key = func, spec, torch.is_grad_enabled(), tuple(self._key(x, False) for x in leaves)
            if key in self.derived:
                return self.derived[key]
        except TypeError:
            key = None
        versions = [(x, version_of(x)) for x in leaves if isinstance(x, torch.Tensor)]
        made = func(*args, **kwargs)
        for x, version in versions:
            if version_of(x) != version:
                raise SharedWrite(op=getattr(func, "__name__", str(func)), what="a shared tensor", source=user_line())
        numbers = any(type(x) in (int, float, slice) for x in leaves)  # which another instance may have otherwise
        for x in tree_flatten(made)[0]:
            if isinstance(x, torch.Tensor) and not numbers:
                self.shared[id(x)] = x
        if key is not None:
            self.derived[key] = made
        return made

    def _constant(self, func: Callable[..., Any], args: Any, kwargs: Any, leaves: list[Any], spec: Any) -> Any:
        """A constant: one value for all that make the same, to each a tensor of its own."""
        if "constants" in self.table.without or kwargs.get("requires_grad") or "out" in kwargs:
            return func(*args, **kwargs)
        try:
            key = func, spec, torch.get_default_dtype(), tuple(self._key(x, False) for x in leaves)
            found = self.constants.get(key)
        except TypeError:
            return func(*args, **kwargs)
        if found is None:
            found = self.constants[key] = self.lift(func(*args, **kwargs))
        return Pending.of(self.state, found.type, found.id, 0)

    def constant(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`_constant` where all arguments are whole numbers, dtypes and devices, which are compared at once."""
        plain = all(type(a) is int for a in args) and all(type(a) in (torch.dtype, torch.device) for a in kwargs.values())
        if not plain:
            return func(*args, **kwargs)
        found = self.constants.get(key := (func, args, tuple(kwargs.items()), torch.get_default_dtype()))
        if found is None:
            made = func(*args, **kwargs)
            if type(made) is not Pending:
                return made
            found = self.constants[key] = made
        return Pending.of(self.state, found.type, found.id, 0)

    @staticmethod
    def _stack() -> list[Any]:
        return stack_of(sys._getframe(1), (_PACKAGE, _TORCH))

    # -- tensors ------------------------------------------------------------------------------------------------------

    def is_shared(self, tensor: torch.Tensor) -> bool:
        """Whether all instances see this real tensor."""
        return self.shares and (id(tensor) in self.shared or isinstance(tensor, nn.Parameter))

    def lift(self, tensor: Any) -> Pending:
        """A tensor that an instance brought along, as a value of depth 0."""
        if type(tensor) is Pending:
            return tensor
        kind = Type.of(tensor)
        self.table.number_of(kind)
        return self.state.lift(Pending, tensor, kind)

    def number(self, n: int | float) -> Pending:
        """A plain number of an instance, as a value of depth 0."""
        return Pending.of(self.state, INTEGER if type(n) is int else REAL, self.state.number(n), 0)

    def known(self, x: Any) -> Any:
        """The real tensor of a pending one; waits for it. Other data as it is."""
        if type(x) is not Pending:
            return x
        if self.closed:  # kept for later: it still has its gradient
            return deliver(self.execution, [x])[0]
        if (given := self.execution.given_as(x)) is not None:
            return given
        self.wait_for(x)
        return self.execution.copy(x)

    def numbers(self, values: list[Pending]) -> list[Any]:
        """The numbers of computed values; the tensors of those that hold several."""
        return self.execution.numbers(values)

    def wait_for(self, x: Pending) -> None:
        """Come back when a value is computed."""
        if not self.execution.has(x.id):
            floor = self.state.floor
            if not self.park():
                self.flush()
            self.state.floor = floor

    def flush(self) -> None:
        """Compute all that is recorded."""
        with without_modes():
            self.execution.run(self.table.blocks)

    def release(self) -> None:
        """The call has ended: let go of what is not needed any more. Pools serve later calls, unless the program kept
        pending tensors, or a backward may come."""
        self.closed = True
        self.derived.clear()
        self.constants.clear()
        if self.state.end() and not self.execution.launches:
            self.table.spare.append(self.execution.pools)

    def _plain(self, x: Any) -> Any:
        if type(x) is slice:
            return slice(*(self._number(n) for n in (x.start, x.stop, x.step)))
        return x

    def _number(self, n: Any) -> Any:
        return int(self.known(n)) if isinstance(n, torch.Tensor) else n

    def _key(self, x: Any, of_instance: bool) -> Any:
        """What decides how an op is batched: of one instance's tensors their type, of anything else the thing itself."""
        if of_instance:
            return x.type if type(x) is Pending else Type.of(x)
        if isinstance(x, torch.Tensor):
            return "shared", id(x), x.requires_grad, x.dtype, x.shape, x.device
        if type(x) is slice:
            return "slice", x.start, x.stop, x.step
        return type(x), repr(x) if isinstance(x, float) else x


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Make a recorder the one of this thread."""
    before = getattr(here, "recorder", None)
    here.recorder = recorder
    record.enter(recorder.state)
    try:
        yield
    finally:
        here.recorder = before
        record.enter(None if before is None else before.state)


def user_line() -> str:
    """Where in the user's program this thread is, as file:line."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_PACKAGE, _TORCH)) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
