"""How the values of a plan become addresses and tensors at run time: bases, views, allocations, deaths."""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..errors import UnsafePlan, WrongOpResult
from . import sizes
from .calls import Values
from .layout import Layout
from .plan import Launch, ValueSpec

log = logging.getLogger(__name__)

Step = Callable[[Values, Any], None]
Maker = Callable[[Values, Any], Any]

# Half the cost of torch.empty_strided; a CPU-only helper that Inductor's generated code relies on too.
_empty_cpu = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)  # type: ignore[attr-defined]


def view_of(
    base: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], offset: int
) -> torch.Tensor:
    """A tensor over `base`'s memory, `offset` bytes behind its first element."""
    if base.dtype == dtype:
        return base.as_strided(shape, strides, base.storage_offset() + offset // dtype.itemsize)
    start = (base.storage_offset() * base.element_size() + offset) // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=base.device).set_(base.untyped_storage(), start, shape, strides)


def same_memory(t: torch.Tensor, strides: Sequence[int]) -> bool:
    """Whether other strides address the same elements: they differ only where a dimension has one element, or none."""
    if t.is_neg():  # negated lazily: the bits are those of another tensor
        return False
    return t.numel() == 0 or all(a == b or n == 1 for n, a, b in zip(t.shape, t.stride(), strides, strict=True))


def describe(x: Any) -> str:
    """Dtype and shape of a tensor, or the type of anything else, for messages."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return type(x).__name__


class Memory:
    """Bases, views and allocations of one plan, handed out in the order of its steps.

    `bases` maps the values that kernels address to places in the call's table of addresses: 0 is the arena, then come
    the inputs, then everything else.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.plan = layout.plan
        self._made: set[int] = set()  # views that some step has already put into the call's values
        self._prepared: set[int] = set()
        self.origins: dict[int, str] = {}  # handles -> the ops that made them
        self._tail: dict[int, Maker] = {}
        self.bases = self._assign_bases()
        self.base_count = 1 + len(self.bases)
        self.mutated = self._mutated_inputs()
        self._deaths = self._find_deaths()

    def value(self, id: int | None) -> ValueSpec:
        """The value called `id`."""
        spec = self.layout.specs.get(id)  # type: ignore[arg-type]
        if spec is None:
            raise UnsafePlan(why=f"value {id} does not exist")
        return spec

    def _assign_bases(self) -> dict[int, int]:
        roots = [self.layout.place(b)[0] for s in self.plan.steps if isinstance(s, Launch) for b in s.buffers]
        owned = [r for r in dict.fromkeys(roots) if self.value(r).storage != "arena"]
        owned.sort(key=lambda r: self.value(r).storage != "input")
        return {root: base for base, root in enumerate(owned, 1)}

    def native_inputs(self) -> list[int]:
        """Argument numbers of the inputs that have bases, in the order of these."""
        return [self.layout.index[r] for r in self.bases if self.value(r).storage == "input"]

    def _mutated_inputs(self) -> list[int]:
        """Argument numbers of the inputs that kernels write (torch ops count their own writes)."""
        access = {k.name: k.access for k in self.plan.kernels}
        found = set()
        for step in self.plan.steps:
            if isinstance(step, Launch):
                modes = access.get(step.kernel, ())
                if len(modes) != len(step.buffers):
                    raise UnsafePlan(
                        why=f"kernel {step.kernel} has {len(modes)} buffers, a launch gives {len(step.buffers)}"
                    )
                found |= {self.layout.place(b)[0] for b, a in zip(step.buffers, modes, strict=True) if a != "read"}
        return sorted(self.layout.index[r] for r in found if self.value(r).storage == "input")

    def buffers(self, step: Launch) -> list[tuple[int, int]]:
        """(base, slot of the byte offset) of each buffer."""
        pairs = []
        for id in step.buffers:
            root, offset = self.layout.place(id)
            pairs.append((self.bases.get(root, 0), self.layout.slot(offset)))
        return pairs

    def arena_device(self) -> torch.device:
        """The device of the arena's values."""
        return torch.device(next((v.device for v in self.plan.values if v.storage == "arena"), "cpu"))

    def sizes(self, exprs: tuple[sizes.SizeExpr, ...]) -> tuple[tuple[int, ...] | None, Callable[[Any], tuple[int, ...]]]:
        """(the static sizes or None, a function from slots to the sizes)."""
        static = self.layout.static(exprs)
        if static is not None:
            return static, lambda slots: static
        at = [self.layout.slot(e) for e in exprs]
        if len(at) == 1:
            only = at[0]
            return None, lambda slots: (slots[only],)
        return None, operator.itemgetter(*at)

    def view_maker(self, id: int) -> tuple[bool, Maker]:
        """(whether it depends on nothing but the arena, a function that makes the tensor of a view or an arena value)."""
        spec, dtype = self.value(id), self.layout.dtype(id)
        root, offset = self.layout.place(id)
        fixed_shape, shape = self.sizes(spec.shape)
        fixed_strides, strides = self.sizes(spec.strides)
        at = self.layout.slot(offset)
        in_arena = self.value(root).storage == "arena"
        position = self.layout.index[root]

        def make(vals: Values, frame: Any) -> torch.Tensor:
            slots = frame.slots
            return view_of(frame.arena if in_arena else vals[position], dtype, shape(slots), strides(slots), slots[at])

        fixed = None not in (fixed_shape, fixed_strides, self.layout.slots.constant(at))
        return in_arena and fixed, make

    def materialise(self, ids: Sequence[int]) -> list[tuple[int, Maker]]:
        """(position, maker) of the views and arena values among `ids` that no earlier step has made into tensors."""
        todo = []
        for id in dict.fromkeys(ids):
            if self.value(id).storage not in ("view", "arena") or id in self._made:
                continue
            self._made.add(id)
            lasting, make = self.view_maker(id)
            if lasting:
                self._tail[self.layout.index[id]] = make
            else:
                todo.append((self.layout.index[id], make))
        return todo

    def static_arena_tensors(self) -> list[tuple[int, Maker]]:
        """(position, maker) of tensors that are made once per arena."""
        return list(self._tail.items())

    def prepare(self, ids: Sequence[int]) -> Step | None:
        """What must happen before a step addresses `ids`, unless an earlier step has done it: fresh values are allocated,
        and handles that kernels or views address are checked to lie in memory as the plan says."""
        todo: list[Step] = []
        for root in dict.fromkeys(self.layout.place(id)[0] for id in ids):
            spec = self.value(root)
            if root in self._prepared or spec.storage not in ("fresh", "handle"):
                continue
            self._prepared.add(root)
            todo.append(self._allocation(spec) if spec.storage == "fresh" else self._settling(spec))
        if len(todo) < 2:
            return todo[0] if todo else None

        def prepare(vals: Values, frame: Any) -> None:
            for step in todo:
                step(vals, frame)

        return prepare

    def _allocation(self, spec: ValueSpec) -> Step:
        position, base, make = self.layout.index[spec.id], self.bases.get(spec.id), self._allocator(spec)

        def allocate(vals: Values, frame: Any) -> None:
            vals[position] = t = make(frame.slots)
            if base is not None:
                frame.bases[base] = t.data_ptr()

        return allocate

    def _settling(self, spec: ValueSpec) -> Step:
        position, base = self.layout.index[spec.id], self.bases.get(spec.id)
        (_, shape_of), (_, strides_of) = self.sizes(spec.shape), self.sizes(spec.strides)
        dtype, op, told = self.layout.dtype(spec.id), self.origins.get(spec.id), False

        def settle(vals: Values, frame: Any) -> None:
            nonlocal told
            t, shape, strides = vals[position], shape_of(frame.slots), strides_of(frame.slots)
            if not isinstance(t, torch.Tensor) or t.dtype != dtype or t.shape != shape:
                raise WrongOpResult(op=op, got=describe(t), expected=f"{spec.dtype}{list(shape)}")
            if (t.stride() != strides or t.is_neg()) and not same_memory(t, strides):
                if not told:
                    log.warning("%s returns strides %s where %s were announced: copied", op, t.stride(), strides)
                    told = True
                vals[position] = t = torch.empty_strided(shape, strides, dtype=dtype, device=t.device).copy_(t)
            if base is not None:
                frame.bases[base] = t.data_ptr()

        return settle

    def _allocator(self, spec: ValueSpec) -> Callable[[Any], torch.Tensor]:
        dtype = self.layout.dtype(spec.id)
        (shape, shape_of), (strides, strides_of) = self.sizes(spec.shape), self.sizes(spec.strides)
        if spec.device == "cpu" and _empty_cpu is not None:
            empty = _empty_cpu
            if shape is not None and strides is not None:
                return lambda slots: empty(shape, strides, dtype)
            return lambda slots: empty(shape_of(slots), strides_of(slots), dtype)
        device = torch.device(spec.device)
        return lambda slots: torch.empty_strided(shape_of(slots), strides_of(slots), dtype=dtype, device=device)

    def _find_deaths(self) -> dict[int, list[int]]:
        """Step -> positions of the values that own memory and are used last by that step."""
        owners = ("input", "fresh", "handle")
        deaths = defaultdict(list)
        for id, step in self.layout.last_use.items():
            position = self.layout.index[id]
            if self.value(self.layout.place(id)[0]).storage in owners and position not in self.mutated:
                deaths[step].append(position)
        return deaths

    def deaths(self, steps: Iterable[int]) -> list[int]:
        """Positions of the tensors that can be dropped once these steps have run."""
        return [position for step in steps for position in self._deaths.get(step, ())]
