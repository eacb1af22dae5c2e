"""The table from kernel IR operations and dtypes to C++ text (see vops.h and vmath.h)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..kernel_ir import COMPUTE_OPS, FLOATS

CTYPE = {
    "float16": "f16", "bfloat16": "bf16", "float32": "float", "float64": "double",
    "int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "int64": "int64_t", "uint8": "uint8_t", "bool": "bool",
}  # fmt: skip

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
_INFIX_BOOL = {**_INFIX, "add": "|", "mul": "&", "sub": "^"}  # as torch: + is or, * is and

# Ops worth about sixteen simple ones: they weigh so in the estimate of work, and fill the pipeline by themselves.
HEAVY = frozenset({
    "pow", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan", "atan2",
    "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid", "floordiv", "mod", "fmod",
})  # fmt: skip
HEAVY_WEIGHT = 16

REDUCER = {"sum": "Sum", "prod": "Prod", "max": "Max", "min": "Min", "any": "Any", "all": "All"}
ARG_OPS = {"argmax": "true", "argmin": "false"}

_KEYWORDS = (
    "alignas alignof and asm auto bool break case catch char class const constexpr continue decltype default delete do "
    "double else enum explicit export extern false float for friend goto if inline int long mutable namespace new "
    "noexcept not nullptr operator or private protected public register return short signed sizeof static struct switch "
    "template this throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor"
)
_HELPERS = (  # what printed text itself uses of the headers and of its own frame
    "accumulate accumulate_arg accumulate_lanes All Any Arg at atomic_add atomic_scatter_if begin bf16 bufs end f16 "
    "fill gather gather_if highest iota l lanes live load load_if load_strided lowest Max max_of Min min_of nthreads "
    "parallel part per_lane plait PLAIT_BODY Prod reduce scatter scatter_if sizes store store_if store_strided stream "
    "streams_done Sum tile_count tiles transpose vec W WIDE"
)
RESERVED = frozenset(_KEYWORDS.split()) | frozenset(_HELPERS.split()) | frozenset(COMPUTE_OPS) | frozenset(CTYPE.values())


def identifier(name: str) -> str:
    """A C++ identifier for an IR name; names that C++ or the headers use get a trailing underscore."""
    text = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    if text[:1].isdigit():
        text = "_" + text
    return text + "_" if text in RESERVED else text


def literal(value: float | int | bool, dtype: str) -> str:
    """`value` as a C++ constant of `dtype`, in the fewest digits that read back to the same bits."""
    if dtype == "bool":
        return "true" if value else "false"
    if dtype not in FLOATS:
        value = int(value)
        if value == -(2**63):
            return "(-9223372036854775807 - 1)"
        return str(value)
    if dtype in ("float16", "bfloat16"):
        return f"cast<{CTYPE[dtype]}>({literal(value, 'float32')})"
    suffix = "f" if dtype == "float32" else ""
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    number = np.float32(value) if dtype == "float32" else np.float64(value)
    if np.isinf(number):
        return f"{'-' if number < 0 else ''}__builtin_inf{suffix}()"
    return np.format_float_scientific(number, trim="-") + suffix if _is_extreme(number) else f"{number!s}{suffix}"


def _is_extreme(number: np.floating) -> bool:
    return number != 0 and not 1e-4 <= abs(float(number)) < 1e15


def compute_text(
    op: str, operand_dtype: str, dtype: str, args: list[str], varying: list[bool], vec: Callable[[str], str]
) -> str:
    """The right-hand side of a Compute: infix where C++ has the operator, else a call.

    Infix operators mix lanes and scalars; calls want every operand alike, so there a scalar beside lanes is spread to
    `vec(dtype)`.
    """
    infix = _INFIX_BOOL if operand_dtype == "bool" else _INFIX
    if op in infix:
        return f"{args[0]} {infix[op]} {args[1]}"
    if op == "neg":
        return f"-{args[0]}"
    if op == "not":
        return f"{'!' if operand_dtype == 'bool' else '~'}{args[0]}"
    if op == "square":
        return f"{args[0]} * {args[0]}"
    if op == "div" and operand_dtype in FLOATS:
        return f"{args[0]} / {args[1]}"
    if op == "cast":
        return f"cast<{CTYPE[dtype]}>({args[0]})"
    if op == "bitcast":
        return f"bitcast<{CTYPE[dtype]}>({args[0]})"
    if op == "where":
        kinds = ["bool", dtype, dtype]
    else:
        kinds = [operand_dtype] * len(args)
    if any(varying):
        args = [a if v else f"{vec(k)}({a})" for a, v, k in zip(args, varying, kinds, strict=True)]
        return f"{op}({', '.join(args)})"
    return f"{op}<{CTYPE[dtype]}>({', '.join(args)})" if op != "isnan" and op != "isinf" else f"{op}({args[0]})"
