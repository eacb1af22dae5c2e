"""The table from kernel IR operations and dtypes to Triton text, and the helper functions that the text calls."""

from __future__ import annotations

import ast
import functools
import keyword
import math
import re
from pathlib import Path

import numpy as np

from ...errors import InvalidKernel
from ..kernel_ir import COMPUTE_OPS, FLOATS, INTS
from .source import TL_DTYPE

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
_BOOL_INFIX = {
    **{op: sign for op, sign in _INFIX.items() if op not in ("add", "sub", "mul")},
    "add": "|", "mul": "&", "sub": "^", "maximum": "|", "minimum": "&",  # as torch: + is or, * is and
}  # fmt: skip
_INT_CALLS = {
    "floordiv": "_floordiv_int", "mod": "_mod_int", "trunc_div": "_trunc_div_int", "fmod": "_fmod_int",
    "minimum": "tl.minimum", "maximum": "tl.maximum", "abs": "tl.abs", "sign": "_sign", "pow": "_pow_int",
    "shl": "_shl", "shr": "_shr",
}  # fmt: skip
_FLOAT_CALLS = {
    "minimum": "_minimum", "maximum": "_maximum", "abs": "tl.abs", "sign": "_sign", "fma": "tl.fma", "pow": "_pow",
    "floordiv": "_floordiv", "mod": "_mod", "fmod": "_fmod", "rsqrt": "tl.rsqrt",
    "exp": "tl.exp", "exp2": "tl.exp2", "expm1": "_expm1", "log": "tl.log", "log1p": "_log1p", "log2": "tl.log2",
    "sin": "tl.sin", "cos": "tl.cos", "tan": "_tan", "asin": "_asin", "acos": "_acos", "atan": "_atan", "atan2": "_atan2",
    "sinh": "_sinh", "cosh": "_cosh", "tanh": "_tanh", "asinh": "_asinh", "acosh": "_acosh", "atanh": "_atanh",
    "erf": "tl.erf", "erfc": "_erfc", "sigmoid": "_sigmoid",
    "floor": "tl.floor", "ceil": "tl.ceil", "trunc": "_trunc", "round": "_round",
}  # fmt: skip
_UNCHANGED = ("floor", "ceil", "trunc", "round")  # on integers


def compute_text(kernel: str, op: str, dtype: str, out: str, args: list[str]) -> str:
    """The right-hand side of a Compute whose operands (of a `where`, the branches) have `dtype` and whose result has `out`.

    Raises InvalidKernel where the operation has no meaning for the dtype.
    """
    a = args[0]
    b = args[1] if len(args) > 1 else ""
    if op == "where":
        return f"tl.where({', '.join(args)})"
    if op == "cast":
        return cast_text(a, dtype, out)
    if op == "bitcast":
        return f"{a}.to({TL_DTYPE[out]}, bitcast=True)"
    text: str | None = None
    if dtype == "bool":
        text = f"{a} {_BOOL_INFIX[op]} {b}" if op in _BOOL_INFIX else {"not": f"~{a}"}.get(op)
    elif op in _INFIX and not (op in ("and", "or", "xor") and dtype in FLOATS):
        text = f"{a} {_INFIX[op]} {b}"
    elif dtype in INTS:
        text = _int_text(op, dtype, args)
    elif dtype in ("float32", "float64"):
        text = _float_text(op, dtype, args)
    if text is None:
        raise InvalidKernel(kernel=kernel, why=f"{op} has no meaning for {dtype}")
    return text


def _int_text(op: str, dtype: str, args: list[str]) -> str | None:
    if op in _INT_CALLS:
        return f"{_INT_CALLS[op]}({', '.join(args)})"
    if op in _UNCHANGED:
        return args[0]
    invert = "{0} ^ 255" if dtype == "uint8" else "~{0}"  # the interpreter has no ~ for unsigned numbers
    simple = {"neg": "-{0}", "not": invert, "square": "{0} * {0}", "fma": "{0} * {1} + {2}"}
    return simple[op].format(*args) if op in simple else None


def _float_text(op: str, dtype: str, args: list[str]) -> str | None:
    if op in _FLOAT_CALLS:
        return f"{_FLOAT_CALLS[op]}({', '.join(args)})"
    # Triton's / and sqrt are approximate on float32; its unary minus is 0 - x, which loses the sign of zero
    double = dtype == "float64"
    simple = {
        "neg": "{0} * -1.0", "square": "{0} * {0}", "isnan": "{0} != {0}", "isinf": 'tl.abs({0}) == float("inf")',
        "div": "{0} / {1}" if double else "tl.div_rn({0}, {1})",
        "reciprocal": "1.0 / {0}" if double else "tl.div_rn(1.0, {0})",
        "trunc_div": "_trunc({0} / {1})" if double else "_trunc(tl.div_rn({0}, {1}))",
        "sqrt": "tl.sqrt({0})" if double else "tl.sqrt_rn({0})",
        "log10": "tl.log({0}) * 0.4342944819032518",
    }  # fmt: skip
    return simple[op].format(*args) if op in simple else None


def cast_text(a: str, source: str, target: str) -> str:
    """Conversion as torch does it: through float32 to and from 16-bit floats, through int32 from a float to narrow ints."""
    if source == target:
        return a
    if target == "bool":
        return f"{a} != 0"
    narrow = ("float16", "bfloat16")
    via = ""
    if (source in narrow or target in narrow) and "float32" not in (source, target):
        via = ".to(tl.float32)"
        source = "float32"
    if source in FLOATS and target in ("int8", "int16", "uint8"):
        via += ".to(tl.int32)"
    return f"{a}{via}.to({TL_DTYPE[target]})"


def literal(value: float | int | bool, dtype: str) -> str:
    """`value` as Python text with the fewest digits that read back to the same number of `dtype`."""
    if dtype == "bool":
        return str(bool(value))
    if dtype not in FLOATS:
        return str(int(value))
    if math.isnan(value):
        return 'float("nan")'
    with np.errstate(over="ignore"):
        number = np.float64(value) if dtype == "float64" else np.float32(value)
    if np.isinf(number):
        return f'float("{"-" if number < 0 else ""}inf")'
    return str(number)


def full_text(shape: str, value: float | int | bool, dtype: str) -> str:
    """A tensor of `shape` filled with `value`; the 16-bit floats and -0.0 take a detour that every backend knows."""
    if dtype in ("float16", "bfloat16"):
        return f"{full_text(shape, value, 'float32')}.to({TL_DTYPE[dtype]})"
    if dtype in FLOATS and value == 0 and math.copysign(1.0, value) < 0:
        return f"tl.full({shape}, 0.0, {TL_DTYPE[dtype]}) * -1.0"
    return f"tl.full({shape}, {literal(value, dtype)}, {TL_DTYPE[dtype]})"


def identity(op: str, dtype: str) -> float | int | bool:
    """The neutral element of a reduction; of argmax and argmin, of the values."""
    if op in ("any", "all"):
        return op == "all"
    if op in ("sum", "prod"):
        return int(op == "prod")
    lowest = op in ("max", "argmax")
    if dtype == "bool":
        return not lowest
    if dtype in FLOATS:
        return -math.inf if lowest else math.inf
    info = np.iinfo(dtype)
    return int(info.min if lowest else info.max)


_MERGE = {"sum": "{0} + {1}", "prod": "{0} * {1}", "any": "{0} | {1}", "all": "{0} & {1}"}


def merge_text(op: str, dtype: str, acc: str, value: str) -> str:
    """One step of a reduction."""
    if op in _MERGE:
        return _MERGE[op].format(acc, value)
    if dtype == "bool":
        return f"{acc} {'|' if op == 'max' else '&'} {value}"
    return f"{'tl.' if dtype in INTS else '_'}{op}imum({acc}, {value})"


def combine_text(op: str, dtype: str, tile: str, axis: int) -> str:
    """The reduction of a tile's lanes along `axis`."""
    if dtype == "bool":
        return f"tl.{'max' if op in ('any', 'max') else 'min'}({tile}.to(tl.int32), {axis}) != 0"
    if op == "sum" or (op in ("max", "min") and dtype in INTS):
        narrow = f".to({TL_DTYPE[dtype]})" if dtype in ("int8", "int16", "uint8") else ""
        return f"tl.{op}({tile}, {axis}){narrow}"
    function = {"prod": "_product", "max": "_maximum", "min": "_minimum"}[op]
    return f"tl.reduce({tile}, {axis}, {function})"


@functools.cache
def helpers() -> dict[str, str]:
    """Name and text of every helper function, in the order of device_math.py."""
    source = Path(__file__).with_name("device_math.py").read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            start = node.decorator_list[0].lineno - 1
            found[node.name] = "\n".join(lines[start : node.end_lineno])
    return found


def helpers_of(text: str) -> list[str]:
    """Texts of the helper functions that `text` calls, directly or through another, callees first."""
    table = helpers()
    needed: set[str] = set()
    todo = [text]
    while todo:
        for name in re.findall(r"\b_\w+", todo.pop()):
            if name in table and name not in needed:
                needed.add(name)
                todo.append(table[name])
    return [body for name, body in table.items() if name in needed]


def _reserved() -> frozenset[str]:
    names = {"tl", "triton", "float", "range", "xindex", "xmask", "XBLOCK", "RBLOCK", *COMPUTE_OPS, *helpers()}
    return frozenset(names | set(keyword.kwlist))


@functools.cache
def identifier(name: str) -> str:
    """A Python name for an IR name; names that the printed module uses itself get a trailing underscore."""
    text = re.sub(r"\W", "_", name)
    if text[:1].isdigit():
        text = "_" + text
    return text + "_" if text in _reserved() else text
