"""The intermediate representation: types, ops, graphs, text form, verifier, rewriting."""

from .fx import from_fx, to_fx
from .graph import NOWHERE, Arg, Graph, Loc, Node, Program, Value, bind, difference, flatten, map_arg, structurally_equal
from .infer import infer
from .op import Op, op
from .rewrite import Builder, Match, Pattern, Reason, Rule, RuleLog, Such, Var, pattern, prune, rewrite
from .text import parse_graph, print_graph
from .types import (
    Dim,
    OpaqueType,
    ScalarType,
    SymbolInfo,
    Symbols,
    TensorType,
    TokenType,
    ValueType,
    contiguous_strides,
    dim,
    seen,
    size_symbol,
)
from .verify import verify

__all__ = [
    "NOWHERE", "Arg", "Builder", "Dim", "Graph", "Loc", "Match", "Node", "Op", "OpaqueType", "Pattern", "Program", "Reason",
    "Rule", "RuleLog", "ScalarType", "Such", "SymbolInfo", "Symbols", "TensorType", "TokenType", "Value", "ValueType", "Var",
    "bind", "contiguous_strides", "difference", "dim", "flatten", "from_fx", "infer", "map_arg", "op", "parse_graph",
    "pattern", "print_graph", "prune", "rewrite", "seen", "size_symbol", "structurally_equal", "to_fx", "verify",
]  # fmt: skip
