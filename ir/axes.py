"""Axis rules: which axes of an application can be cut into pieces, which must stay whole, which are summed away.

Every axis of an operand or a result is labelled with letters, as in einsum. Where a letter is *free*, the op works on
pieces: cutting the operands that carry it and joining the results along it gives what the whole application gives.
Operands without it are shared by all pieces; a piece is a row-major tensor of its own. That is one question under three
names: chunks that overlap communication, instances of a batch that share some arguments, shards on several devices.

An axis may carry several letters, outermost first (`view` of `(6, 4)` as `(24,)` gives one axis with two letters), or none
(a size of 1 that is broadcast). The rules are in `axis_rules.py` and `axis_products.py`; an op without one is a `Reason`,
never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .effects import effect_of
from .graph import Arg, Node, Value, flatten, map_arg
from .infer import infer
from .op import Op
from .rewrite import Reason
from .types import Dim, OpaqueType, Symbols, TensorType, product

Axis = tuple[str, ...]
Axes = tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class AxisMap:
    """Labelled axes of one application.

    `operands` has one entry for each tensor among the arguments, in order, `results` one for each result. `whole` letters
    must not be cut. `reduced` letters occur in operands only; partial results over pieces of them combine by `combine`
    ("sum", "max", "min", "prod", "any", "all"), or not at all where it is "". `sized` lists parameters that hold sizes of
    axes, which change with the pieces: (name, one axis for each size; a single size has one axis).
    """

    operands: tuple[Axes, ...]
    results: tuple[Axes, ...]
    sizes: Mapping[str, Dim]
    whole: frozenset[str] = frozenset()
    reduced: frozenset[str] = frozenset()
    combine: str = ""
    sized: tuple[tuple[str, Axes], ...] = ()

    @property
    def free(self) -> frozenset[str]:
        """Letters along which the application can be cut."""
        return frozenset(self.sizes) - self.whole - self.reduced

    def where(self, letter: str, axes: Axes) -> int | None:
        """The axis that carries a letter, None where none does."""
        return next((i for i, axis in enumerate(axes) if letter in axis), None)

    def plain(self, letter: str) -> bool:
        """True where a letter is outermost on every axis that carries it, so that its pieces are contiguous slices."""
        return all(letter not in axis[1:] for axes in (*self.operands, *self.results) for axis in axes)

    def letters(self, operand: int, axis: int) -> Axis:
        """Letters of one axis of one operand."""
        return self.operands[operand][axis]

    def args(self, op: Op, args: tuple[Arg, ...], pieces: Mapping[str, Dim]) -> tuple[Arg, ...]:
        """Arguments for a piece: parameters that hold sizes follow the new sizes of letters."""
        out = list(args)
        sizes = {**self.sizes, **pieces}
        for name, axes in self.sized:
            i = op.index[name]
            found = tuple(product(sizes[c] for c in axis) for axis in axes)
            if isinstance(out[i], tuple):
                out[i] = found
            elif out[i] is not None:
                out[i] = found[0]
        return tuple(out)

    def __str__(self) -> str:
        def text(axes: Axes) -> str:
            return " ".join("(" + " ".join(a) + ")" if len(a) > 1 else a[0] if a else "1" for a in axes)

        notes = [
            f"{what}: {' '.join(sorted(which))}"
            for what, which in (("whole", self.whole), ("reduced", self.reduced))
            if which
        ]
        line = f"{', '.join(map(text, self.operands))} -> {', '.join(map(text, self.results))}"
        return f"{line}  [{'; '.join(notes)}]" if notes else line


@dataclass(slots=True)
class Call:
    """One application as a rule sees it: argument types by parameter name, and a supply of letters."""

    op: Op
    args: tuple[Arg, ...]
    operands: tuple[TensorType, ...]
    results: tuple[TensorType, ...]
    sizes: dict[str, Dim] = field(default_factory=dict[str, Dim])

    def __getitem__(self, name: str) -> Any:
        """The argument for parameter `name`, types in place of values."""
        return self.args[self.op.index[name]]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument for parameter `name`, `default` where the op has no such parameter."""
        i = self.op.index.get(name)
        return default if i is None else self.args[i]

    def letter(self, size: Dim) -> str:
        """A new letter for an axis of that size."""
        n = len(self.sizes)
        name = chr(ord("a") + n % 26) + (str(n // 26) if n >= 26 else "")
        self.sizes[name] = size
        return name

    def axis(self, size: Dim) -> Axis:
        """A new axis of that size."""
        return (self.letter(size),)

    def axes(self, x: TensorType) -> list[Axis]:
        """New axes for a tensor."""
        return [self.axis(s) for s in x.shape]

    def dim(self, name: str, rank: int) -> int:
        """A dimension argument, counted from the front."""
        return int(self[name]) % max(rank, 1)

    def map(
        self,
        operands: Sequence[Sequence[Axis]],
        results: Sequence[Sequence[Axis]],
        *,
        whole: Sequence[Axis] = (),
        reduced: Sequence[Axis] = (),
        combine: str = "",
        sized: Sequence[tuple[str, Sequence[Axis]]] = (),
    ) -> AxisMap:
        """The finished map."""
        return AxisMap(
            tuple(tuple(a) for a in operands),
            tuple(tuple(a) for a in results),
            dict(self.sizes),
            frozenset(c for axis in whole for c in axis),
            frozenset(c for axis in reduced for c in axis),
            combine,
            tuple((name, tuple(axes)) for name, axes in sized),
        )


AxisRule = Callable[[Call], AxisMap | Reason]

AXIS_RULES: dict[str, AxisRule] = {}


def axis_rule(*names: str) -> Callable[[AxisRule], AxisRule]:
    """Register an axis rule for op names with overload."""

    def register(fn: AxisRule) -> AxisRule:
        for name in names:
            if name in AXIS_RULES:
                raise ValueError(f"{name} has two axis rules")
            AXIS_RULES[name] = fn
        return fn

    return register


def axes(node: Node) -> AxisMap | Reason:
    """The labelled axes of a node, or why it has none; results that are masked out have no axes."""
    typed = map_arg(node.args, lambda a: a.type if isinstance(a, Value) else a)
    return _axes(node.op, typed, tuple(v.type for v in node.results if not isinstance(v.type, OpaqueType)))


def axes_of(op: Op, args: tuple[Arg, ...], symbols: Symbols) -> AxisMap | Reason:
    """The labelled axes of an application of `op` to types, or why it has none. Raises what `infer` raises."""
    results = infer(op, args, symbols)
    return _axes(op, args, tuple(r for r in results if isinstance(r, TensorType)))


def _axes(op: Op, typed: tuple[Arg, ...], results: tuple[Any, ...]) -> AxisMap | Reason:
    from . import axis_products, axis_rules, moe_rules, quantized_rules  # register the rules

    assert all((axis_products, moe_rules, quantized_rules))
    if effect_of(op, typed) == "random":
        return Reason(f"{op.name} draws random numbers: pieces would draw others")
    operands = tuple(a for a in flatten(typed) if isinstance(a, TensorType))
    if not operands:
        return Reason(f"{op.name} has no tensor operands")
    if not all(isinstance(r, TensorType) for r in results):
        return Reason(f"{op.name} returns something that is no tensor")
    rule = AXIS_RULES.get(op.name) or (axis_rules.elementwise if op.has("elementwise") else None)
    if rule is None:
        return Reason(f"{op.name} has no axis rule")
    return rule(Call(op, typed, operands, results))


__all__ = ["AXIS_RULES", "Axes", "Axis", "AxisMap", "Call", "axes", "axes_of", "axis_rule"]
