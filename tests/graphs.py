"""A pytest plugin: every graph that any test makes must round-trip through its text and run.

Constructing a `plait.ir.Graph` is recorded; after each test the new ones, told apart by their text, are checked. Graphs
that the verifier refuses are counted as made wrong on purpose. A test whose graphs fail errors at its teardown. The count
is printed at the end of the session, and `--graphs FILE` writes it as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from plait.errors import InvalidGraph, PlaitError
from plait.ir import (
    Graph,
    OpaqueType,
    ScalarType,
    TensorType,
    TokenType,
    Value,
    parse_graph,
    print_graph,
    structurally_equal,
)
from plait.ir.verify import problem, verify_types

COUNTS = pytest.StashKey[Counter]()
EXEMPT = "unchecked_graphs"  # marker


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--graphs", type=Path, metavar="FILE", help="write how many graphs the tests made and checked")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{EXEMPT}(reason): graphs that this test makes need not run or round-trip")
    config.stash[COUNTS] = Counter()
    config.pluginmanager.register(Recorder(config), "plait-graphs")


class Checker:
    """Checks graphs, each distinct text once, and counts."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self.known: set[bytes] = set()

    def check(self, graph: Graph) -> str:
        """Why a graph breaks the rule, with its text; empty when it is fine or was seen before."""
        if problem(graph) is not None:
            self.counts["refused by the verifier"] += 1
            return ""
        text = print_graph(graph)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self.counts["made"] += 1
        if digest in self.known:
            return ""
        self.known.add(digest)
        self.counts["distinct"] += 1
        try:
            again = parse_graph(text, _constants(graph))
        except PlaitError as error:
            return f"its text does not parse: {error}\n{text}"
        if not structurally_equal(again, graph):
            return f"its text parses to another graph\n{text}"
        self.counts["round trips"] += 1
        try:
            verify_types(graph)
        except InvalidGraph as error:
            return f"its types are not inferred again: {error}\n{text}"
        if graph.level != "tensor":
            return ""
        if any((n.op.effect or "").startswith("collective") for n in graph.nodes):
            self.counts["not run: its process group does not exist"] += 1
            return ""
        try:
            with torch.random.fork_rng():
                graph.to_fx()(*inputs_for(graph))
        except Unfit as unfit:
            self.counts[f"not run: {unfit}"] += 1
            return ""
        except Exception as error:  # reported with the graph
            return f"it does not run: {type(error).__name__}: {error}\n{text}"
        self.counts["ran"] += 1
        return ""


class Recorder(Checker):
    """Collects graphs as they are made, and checks them when their test is over."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config.stash[COUNTS])
        self.made: list[Graph] = []
        construct, made = Graph.__init__, self.made

        def recording(graph: Graph, *args: Any, **kwargs: Any) -> None:
            construct(graph, *args, **kwargs)
            made.append(graph)

        Graph.__init__ = recording  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        yield
        graphs = self.made[:]  # checking makes graphs too
        try:
            if item.get_closest_marker(EXEMPT) is None:
                failures = [why for g in graphs if (why := self.check(g))]
                if failures:
                    pytest.fail(f"{len(failures)} graphs made by this test fail; the first:\n{failures[0]}", pytrace=False)
        finally:
            self.made.clear()


def _constants(graph: Graph) -> dict[str, torch.Tensor]:
    """What the graph and its regions own; the verifier has seen that equal names mean equal tensors."""
    inside = [_constants(region) for node in graph.nodes for region in node.regions]
    return {name: tensor for owned in [*inside, graph.constants] for name, tensor in owned.items()}


class Unfit(Exception):
    """A graph takes inputs that cannot be made up."""


def inputs_for(graph: Graph) -> list[Any]:
    """Inputs of the right types: sizes as seen at capture, floats in (0, 1), integers 0, booleans False. Raises Unfit."""
    sizes = {s: i.hint if i.hint is not None else max(i.low, 2) for s, i in graph.symbols.items()}
    generator = torch.Generator().manual_seed(0)
    return [_input(v, sizes, generator) for v in graph.inputs]


def _input(value: Value, sizes: dict[sympy.Symbol, int], generator: torch.Generator) -> Any:
    kind = value.type
    if isinstance(kind, ScalarType):
        return {"int": _size(kind.expr, sizes) if kind.expr is not None else 1, "float": 0.5, "bool": True}[kind.kind]
    if isinstance(kind, TokenType):
        return None
    if isinstance(kind, OpaqueType):
        raise Unfit("an input is opaque")
    assert isinstance(kind, TensorType)
    if kind.device != "cpu" and not torch.cuda.is_available():
        raise Unfit("an input is on another device")
    shape, strides = ([_size(d, sizes) for d in ds] for ds in (kind.shape, kind.strides))
    numel = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    if kind.dtype == torch.uint8 and tuple(shape) == tuple(torch.get_rng_state().shape):
        return torch.get_rng_state()  # restored around a checkpointed region; nothing else has this type
    if kind.dtype.is_floating_point or kind.dtype.is_complex:
        store = torch.rand(numel, generator=generator).to(kind.dtype)
    else:
        store = torch.zeros(numel, dtype=kind.dtype)
    return store.as_strided(shape, strides).to(kind.device)


def _size(expr: Any, sizes: dict[sympy.Symbol, int]) -> int:
    return int(expr.subs(sizes)) if isinstance(expr, sympy.Expr) else int(expr)


# -- the count, over all processes of pytest-xdist --------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[COUNTS].update(getattr(node, "workeroutput", {}).get("graphs", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["graphs"] = dict(session.config.stash[COUNTS])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts = config.stash[COUNTS]
    if not counts:
        return
    terminalreporter.write_line("graphs: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    if path := config.getoption("--graphs"):
        path.write_text(json.dumps(dict(sorted(counts.items())), indent=1) + "\n")
