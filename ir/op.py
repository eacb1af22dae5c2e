"""The op table: what each op takes, returns, promises and costs.

ATen and `torch.library` ops are derived from their `OpOverload`: the schema gives parameters and effects, tags give
traits, and the overload itself is the reference. What cannot be derived (control flow, constants, Python scalar
arithmetic) is declared here; axis rules, costs and hand-written inference are attached by `ir/axes.py` and `ir/infer.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch._library.simple_registry import singleton as _singleton
from torch._ops import OpOverload

from ..errors import UnknownOp
from .types import LIST, TUPLE

ParamKind = Literal["tensor", "tensors", "number", "size", "sizes", "region", "other"]

#: Ops whose result does not depend on operand order. Tags do not say so.
_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "eq", "ne", "bitwise_and", "bitwise_or", "bitwise_xor", "logical_and",
                "logical_or", "logical_xor"}  # fmt: skip

#: Ops that return nothing and raise where a condition does not hold. Their schemas say "pure".
_ASSERTIONS = {"_assert_async", "_assert_scalar", "_linalg_check_errors"}

#: Namespaces whose ops run on a process group.
_COLLECTIVE_NAMESPACES = ("_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "c10d")

#: Ops of plait that do.
_COLLECTIVES = ("plait::all_to_all_capacity", "plait::all_to_all_capacity_start")


#: The class of torch's operator overloads for `isinstance` on what is typed `Any` (see `types.TUPLE`).
OVERLOAD: Any = OpOverload


class Required:
    """Default of a parameter that must be given."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of an op: name, kind, default (`REQUIRED` where there is none), keyword-only or not."""

    name: str
    kind: ParamKind
    default: Any = REQUIRED
    keyword_only: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One entry of the op table.

    `effect` is None for pure ops, else "random", "collective", "assert" (may raise, must stay) or "world" (unknown side
    effects, such as those that torch.library registers as ordered: a barrier).
    Traits: "elementwise", "commutative", "view", "reduction", "data_dependent", "mutates", "control_flow", "scalar".
    `returns` is the number of results, None where a list is returned whose length depends on the arguments.
    """

    name: str
    params: tuple[Param, ...]
    returns: int | None
    reference: Callable[..., Any]
    traits: frozenset[str] = frozenset()
    effect: str | None = None
    overload: OpOverload[..., Any] | None = None
    index: dict[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        self.index.update({p.name: i for i, p in enumerate(self.params)})

    @property
    def base(self) -> str:
        """The name without overload: `aten.add` for `aten.add.Tensor`."""
        return self.name.rsplit(".", 1)[0] if self.overload is not None else self.name

    def has(self, trait: str) -> bool:
        """True where the op carries `trait`."""
        return trait in self.traits

    def __repr__(self) -> str:
        return self.name


def _param_kind(type_text: str) -> ParamKind:
    if type_text in ("Tensor", "Optional[Tensor]"):
        return "tensor"
    if "Tensor" in type_text:
        return "tensors"
    if type_text in ("int", "SymInt", "Optional[int]", "Optional[SymInt]"):
        return "size"
    if type_text in ("List[int]", "List[SymInt]", "Optional[List[int]]", "Optional[List[SymInt]]"):
        return "sizes"
    if type_text in ("number", "float", "Optional[number]", "Optional[float]", "Scalar", "Optional[Scalar]"):
        return "number"
    return "other"


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, (LIST, TUPLE)) else value


#: Schemas spell the default memory format as a number.
_MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)


def _default(argument: Any) -> Any:
    if not argument.has_default_value():
        return REQUIRED
    if str(argument.real_type) in ("MemoryFormat", "Optional[MemoryFormat]") and isinstance(argument.default_value, int):
        return _MEMORY_FORMATS[argument.default_value]
    return _freeze(argument.default_value)


def _from_overload(overload: OpOverload[..., Any], registered: bool) -> Op:
    schema = overload._schema  # pyright: ignore[reportPrivateUsage]
    params = tuple(Param(a.name, _param_kind(str(a.real_type)), _default(a), a.kwarg_only) for a in schema.arguments)
    traits: set[str] = set()
    tags = overload.tags
    packet = overload.name().split("::")[1].split(".")[0]
    if torch.Tag.pointwise in tags:
        traits.add("elementwise")
    if getattr(torch.Tag, "reduction", None) in tags:
        traits.add("reduction")
    if packet in _COMMUTATIVE:
        traits.add("commutative")
    if schema.is_mutable:
        traits.add("mutates")
    elif any(a.alias_info is not None for a in schema.arguments):
        traits.add("view")
    if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
        traits.add("data_dependent")
    effect: str | None = None
    if overload.namespace in _COLLECTIVE_NAMESPACES or overload.name() in _COLLECTIVES:
        effect = "collective"
    elif packet in _ASSERTIONS:
        effect = "assert"
    elif torch.Tag.nondeterministic_seeded in tags:
        effect = "random"
    elif schema.is_mutable or registered:
        effect = "world"
    results = schema.returns
    variadic = len(results) == 1 and "List" in str(results[0].type)
    return Op(
        name=str(overload),
        params=params,
        returns=None if variadic else len(results),
        reference=overload,
        traits=frozenset(traits),
        effect=effect,
        overload=overload,
    )


def _python_ops() -> dict[str, Op]:
    """Arithmetic on Python numbers that are not sizes: SymFloat, SymBool and values read from tensors."""
    table: dict[str, Callable[..., Any]] = {
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "eq", "ne", "lt", "le", "gt",
                     "ge", "and_", "or_", "xor", "not_", "abs", "lshift", "rshift")
    }  # fmt: skip
    for name in ("sqrt", "sin", "cos", "tan", "exp", "log", "log2", "floor", "ceil", "trunc"):
        table[name] = getattr(math, name)
    for name in ("sym_float", "sym_int", "sym_not", "sym_ite", "sym_max", "sym_min"):
        table[name] = getattr(torch, name)
    table["round"] = round
    arity = {"neg": 1, "pos": 1, "not_": 1, "abs": 1, "sym_float": 1, "sym_int": 1, "sym_not": 1, "sym_ite": 3}
    ops: dict[str, Op] = {}
    for name, fn in table.items():
        n = arity.get(name, 1 if (name in dir(math) and name != "pow") or name == "round" else 2)
        params = tuple(Param(f"x{i}", "number") for i in range(n))
        ops[f"py.{name}"] = Op(f"py.{name}", params, 1, fn, frozenset({"scalar"}))
    return ops


def _constant_reference(name: str) -> Any:
    raise RuntimeError(f"constant {name!r} has no value outside its graph")


def _control_flow_ops() -> dict[str, Op]:
    from torch._higher_order_ops.while_loop import while_loop_stack_output_op  # its package registers the others

    region = "region"
    declared: list[tuple[str, tuple[Param, ...], Callable[..., Any]]] = [
        ("plait.cond", (Param("pred", "tensor"), Param("true", region), Param("false", region),
                        Param("operands", "tensors")), torch.ops.higher_order.cond),
        ("plait.while_loop", (Param("condition", region), Param("body", region), Param("carried", "tensors"),
                              Param("captured", "tensors", ())), torch.ops.higher_order.while_loop),
        ("plait.while_loop_stack_output", (Param("condition", region), Param("body", region), Param("carried", "tensors"),
                                           Param("captured", "tensors", ())), while_loop_stack_output_op),
        ("plait.scan", (Param("body", region), Param("carried", "tensors"), Param("xs", "tensors"),
                        Param("captured", "tensors", ())), torch.ops.higher_order.scan),
        ("plait.call", (Param("body", region), Param("operands", "tensors")), torch.ops.higher_order.invoke_subgraph),
    ]  # fmt: skip
    return {name: Op(name, params, None, ref, frozenset({"control_flow"})) for name, params, ref in declared}


@lru_cache(maxsize=1)
def _declared() -> dict[str, Op]:
    constant = Op("plait.constant", (Param("name", "other"),), 1, _constant_reference)
    return {constant.name: constant, **_python_ops(), **_control_flow_ops()}


def op(name: str) -> Op:
    """The op called `name`: `aten.add.Tensor`, `plait.cond`, `py.mul`. Raises `UnknownOp` with near names."""
    declared = _declared().get(name)
    return declared if declared is not None else of(_overload(name))


@cache
def _overload(name: str) -> OpOverload[..., Any]:
    target: Any = torch.ops
    try:
        for part in name.split("."):
            target = getattr(target, part)
    except (AttributeError, RuntimeError):
        target = None
    if not isinstance(target, OVERLOAD):
        raise UnknownOp(name=name)
    return target


def of(overload: OpOverload[..., Any]) -> Op:
    """The entry derived from a torch operator overload, and from the effect that is registered for it now."""
    return _entry(overload, _singleton.find(overload.name()).effect.effect is not None)


@cache
def _entry(overload: OpOverload[..., Any], registered: bool) -> Op:
    return _from_overload(overload, registered)
