"""Random graphs with collectives on their way: the worst that memory can meet is a collective that reads at its wait only.

Without a process group: what a start does is put off until the wait, so that memory which is used again too early gives
wrong numbers, and operands that are freed too early are missed.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plait.codegen.compile import CodegenOptions, compile_graph
from plait.codegen.schedule import schedule
from plait.ir import Graph, Value
from plait.ir.graph import map_arg
from plait.runtime import steps
from plait.runtime.check import check
from plait.runtime.plan import Plan, from_json, to_json

from tests.codegen.test_collectives import in_order
from tests.helpers import graph, random_inputs

SEED = random.SystemRandom().randrange(1 << 30)
SQUARE, HALF, COLUMN = "f32[48,48]", "f32[24,48]", "f32[48,1]"
WAIT = "_c10d_functional.wait_tensor.default"

COLLECTIVES: dict[str, Callable[..., Any]] = {
    "_c10d_functional.all_reduce.default": lambda x, *_: x * 0.5 + 1,
    "_c10d_functional.all_to_all_single.default": lambda x, *_: x.flip(0),
    "_c10d_functional.all_reduce_coalesced.default": lambda xs, *_: [x + 0.25 * xs[0].sum() for x in xs],
}


class Pending:
    """A collective that reads when it is waited for; it does not keep what it was given alive."""

    def __init__(self, fn: Callable[..., Any], given: Any, rest: Sequence[Any], part: int | None) -> None:
        self.fn, self.rest, self.part = fn, rest, part
        self.given = [weakref.ref(x) for x in given] if isinstance(given, list) else weakref.ref(given)

    def wait(self) -> torch.Tensor:
        refs = self.given if isinstance(self.given, list) else [self.given]
        alive = [ref() for ref in refs]
        assert all(x is not None for x in alive), "an operand was freed while it was in use"
        found = self.fn(alive if isinstance(self.given, list) else alive[0], *self.rest)
        return found if self.part is None else found[self.part]


def started(fn: Callable[..., Any]) -> Callable[..., Any]:
    def start(given: Any, *rest: Any) -> Any:
        if isinstance(given, list):
            return [Pending(fn, given, rest, i) for i in range(len(given))]
        return Pending(fn, given, rest, None)

    return start


@pytest.fixture
def put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives of plans do at their wait what they would do at their start."""
    fakes = {name: started(fn) for name, fn in COLLECTIVES.items()} | {WAIT: lambda pending: pending.wait()}
    resolve = steps.resolve_op
    monkeypatch.setattr(steps, "resolve_op", lambda name: fakes.get(name) or resolve(name))


def interpreted(g: Graph, inputs: list[Any]) -> list[Any]:
    """Results and written inputs; collectives happen at their start."""
    held: dict[Value, Any] = dict(zip(g.inputs, inputs, strict=True))
    for node in g.nodes:
        run = COLLECTIVES.get(node.op.name) or ((lambda x: x) if node.op.name == WAIT else node.op.reference)
        args = [map_arg(a, lambda leaf: held[leaf] if isinstance(leaf, Value) else leaf) for a in node.args]
        args = [list(a) if isinstance(a, tuple) else a for a in args]
        named = {p.name: a for p, a in zip(node.op.params, args, strict=True) if p.keyword_only}
        result = run(*(a for p, a in zip(node.op.params, args, strict=True) if not p.keyword_only), **named)
        results = list(result) if isinstance(result, list | tuple) else [result]
        held.update(zip(node.results, results, strict=True))
    for i, new in [(i, held[v].clone()) for i, v in g.writes]:
        inputs[i].copy_(new)  # seen by outputs that are views of it
    return [held[v] for v in g.outputs] + [inputs[i] for i, _ in g.writes]


class Program:
    """Writes the text of a random graph: elementwise work, sums, products, views, sorts, collectives, writes to inputs."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.lines: list[str] = []
        self.values: dict[str, list[str]] = {SQUARE: ["x", "y", "p"], HALF: ["h"], COLUMN: ["c"]}
        self.pending: list[tuple[str, str]] = []  # (result of a start, its type)
        self.waited: list[tuple[str, str]] = []
        self.tokens: dict[str, str] = {}
        self.updates: dict[str, str] = {}
        self.count = 0

    def text(self) -> str:
        for _ in range(self.draw.randrange(10, 40)):
            self.step()
        self.draw.shuffle(self.pending)
        while self.pending:
            self.wait(self.pending.pop())
        outputs = [self.any(kind) for kind in (SQUARE, SQUARE, HALF, COLUMN)]
        written = [f"{target}[...] = {v}" for target, v in self.updates.items()]
        outputs = [v for v in dict.fromkeys(outputs) if v not in ("x", "y", "p", "h", "c")]
        inputs = f'x: "{SQUARE}", y: "{SQUARE}", p: "{SQUARE}", h: "{HALF}", c: "{COLUMN}"'
        end = f"return ({''.join(f'{v}, ' for v in outputs)})"
        return "\n    ".join([f"def f({inputs}):", *self.lines, *written, end]) + "\n"

    def any(self, kind: str) -> str:
        known = self.values[kind]
        return self.draw.choice(known[-4:] if self.draw.random() < 0.6 else known)

    def new(self, kind: str, call: str) -> None:
        self.count += 1
        self.lines.append(f"v{self.count} = {call}")
        self.values[kind].append(f"v{self.count}")

    def collective(self, outs: Sequence[str], call: str, effect: str) -> None:
        after = f", after=({self.tokens[effect]},)" if effect in self.tokens else ""
        self.tokens[effect] = f"t{len(self.lines)}"
        self.lines.append(f"{', '.join(outs)}, {self.tokens[effect]} = {call}{after})")

    def wait(self, which: tuple[str, str]) -> None:
        self.count += 1
        self.collective([f"v{self.count}"], f"{WAIT}({which[0]}", "waits")
        self.values[which[1]].append(f"v{self.count}")
        self.waited.append(which)

    def start(self) -> None:
        kind, group = self.draw.choice((SQUARE, SQUARE, HALF, COLUMN)), self.draw.choice("gh")
        self.count += 1
        one, two = f"s{self.count}", f"r{self.count}"
        what = self.draw.randrange(4)
        if what == 0:
            given = f"({self.any(kind)}, {self.any(HALF)})"
            self.collective([one, two], f'_c10d_functional.all_reduce_coalesced.default({given}, "sum", "{group}"', group)
            self.pending += [(one, kind), (two, HALF)]
            return
        if what == 1:
            self.new(kind, f"aten.clone.default({self.any(kind)}, memory_format=torch.contiguous_format)")
            rows = kind[4:].split(",")[0]
            call = f'_c10d_functional.all_to_all_single.default({self.values[kind][-1]}, ({rows},), ({rows},), "{group}"'
            self.collective([one], call, group)
        else:
            self.collective([one], f'_c10d_functional.all_reduce.default({self.any(kind)}, "sum", "{group}"', group)
        self.pending.append((one, kind))

    def step(self) -> None:
        kind = self.draw.choice((SQUARE, SQUARE, HALF, COLUMN))
        what = self.draw.randrange(17)
        if what < 3:
            self.start()
        elif what < 5 and self.pending:
            self.wait(self.pending.pop(self.draw.randrange(len(self.pending))))
        elif what == 5 and self.waited:
            self.wait(self.draw.choice(self.waited))
        elif what == 6:
            self.new(SQUARE, f"aten.mm.default({self.any(SQUARE)}, {self.any(SQUARE)})")
        elif what == 7:
            self.new(COLUMN, f"aten.sum.dim_IntList({self.any(SQUARE)}, (1,), True)")
        elif what == 8:
            self.new(SQUARE, f"aten.permute.default({self.any(SQUARE)}, (1, 0))")
        elif what == 9:
            self.new(HALF, f"aten.slice.Tensor({self.any(SQUARE)}, 0, {self.draw.choice(('0, 24', '12, 36'))})")
        elif what == 10:
            self.new(SQUARE, f"aten.cat.default(({self.any(HALF)}, {self.any(HALF)}))")
        elif what == 11:
            self.count += 1
            self.lines.append(f"v{self.count}, i{self.count} = aten.sort.default({self.any(kind)})")
            self.values[kind].append(f"v{self.count}")
        elif what == 12:
            self.new(SQUARE, f"aten.mul.Tensor({self.any(SQUARE)}, {self.any(COLUMN)})")
        elif what == 13 and self.draw.random() < 0.5:
            target = self.draw.choice("py")
            self.new(SQUARE, f"aten.add.Tensor({target}, {self.any(SQUARE)})")
            self.updates[target] = self.values[SQUARE][-1]
        elif what < 16:
            self.new(kind, f"aten.{self.draw.choice(('add', 'sub'))}.Tensor({self.any(kind)}, {self.any(kind)})")
        else:
            self.new(kind, f"aten.{self.draw.choice(('tanh', 'neg', 'relu', 'gelu'))}.default({self.any(kind)})")


def agree(seed: int, options: CodegenOptions) -> Plan:
    """Compile a random graph, check its plan, run it with collectives put off, compare with interpretation."""
    g = graph(Program(seed).text())
    made = compile_graph(g, options)
    check(made.plan)
    assert from_json(to_json(made.plan)) == made.plan
    inputs = random_inputs(g, seed)
    wanted = interpreted(g, [x.clone() for x in inputs])
    for _ in range(2):  # the second call finds the arena as the first left it
        mine = [x.clone() for x in inputs]
        kept = [mine[i] for i, _ in g.writes]
        got = [*made.executable.run(mine), *kept]
        for g_, w in zip(got, wanted, strict=True):
            scale = max(1.0, float(w.abs().max()))
            torch.testing.assert_close(g_ / scale, w / scale, rtol=1e-3, atol=1e-4, msg=lambda m: f"seed {seed}: {m}")
    return made.plan


@pytest.mark.parametrize("turn", range(40))
def test_plans_of_random_graphs_are_safe_and_in_order(turn: int) -> None:
    g = graph(Program(SEED + turn).text())
    in_order(schedule(g))


@pytest.mark.parametrize("turn", range(6))
def test_kernels_beside_collectives_compute_what_the_graph_says(put_off: None, turn: int) -> None:
    agree(SEED + turn, CodegenOptions())


@pytest.mark.parametrize("turn", range(20))
def test_torch_ops_beside_collectives_compute_what_the_graph_says(put_off: None, turn: int) -> None:
    agree(SEED + turn, CodegenOptions(generate=False))
