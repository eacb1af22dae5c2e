"""Random graphs with collectives on their way, which read their operands when they are waited for: memory that is used again
too early gives wrong numbers, and operands that are freed too early are missed. No process group is needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plait.codegen.compile import CodegenOptions, compile_graph
from plait.codegen.schedule import schedule
from plait.ir import Graph, Value
from plait.ir.graph import map_arg
from plait.runtime.check import check
from plait.runtime.pending import WAIT
from plait.runtime.plan import from_json, to_json

from tests.codegen.test_collectives import in_order
from tests.helpers import graph, random_inputs
from tests.runtime.late import put_off

SEED = random.SystemRandom().randrange(1 << 30)
SQUARE, HALF, COLUMN = "f32[48,48]", "f32[24,48]", "f32[48,1]"

COLLECTIVES: dict[str, Callable[..., Any]] = {
    "_c10d_functional.all_reduce.default": lambda x, *_: x * 0.5 + 1,
    "_c10d_functional.all_to_all_single.default": lambda x, *_: x.flip(0),
    "_c10d_functional.all_reduce_coalesced.default": lambda xs, *_: [x + 0.25 * xs[0].sum() for x in xs],
}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    put_off(monkeypatch, COLLECTIVES)


def interpreted(g: Graph, inputs: list[Any], collectives: Mapping[str, Callable[..., Any]]) -> list[Any]:
    """Results and written inputs; collectives happen at their start."""
    held: dict[Value, Any] = dict(zip(g.inputs, inputs, strict=True))
    for node in g.nodes:
        run = collectives.get(node.op.name) or ((lambda x: x) if node.op.name == WAIT else node.op.reference)
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

    def __init__(self, seed: int, groups: Sequence[str] = ("g", "h")) -> None:
        self.draw = random.Random(seed)
        self.groups = groups
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
        kind, group = self.draw.choice((SQUARE, SQUARE, HALF, COLUMN)), self.draw.choice(self.groups)
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


def agree(seed: int, options: CodegenOptions, groups: Sequence[str] = ("g", "h"), collectives: Any = COLLECTIVES) -> None:
    """Compile a random graph, check its plan, run it, compare with interpretation."""
    g = graph(Program(seed, groups).text())
    made = compile_graph(g, options)
    check(made.plan)
    assert from_json(to_json(made.plan)) == made.plan
    inputs = random_inputs(g, seed)
    wanted = interpreted(g, [x.clone() for x in inputs], collectives)
    for _ in range(2):  # the second call finds the arena as the first left it
        mine = [x.clone() for x in inputs]
        kept = [mine[i] for i, _ in g.writes]
        got = [*made.executable.run(mine), *kept]
        for g_, w in zip(got, wanted, strict=True):
            scale = max(1.0, float(w.abs().max()))
            torch.testing.assert_close(g_ / scale, w / scale, rtol=1e-3, atol=1e-4, msg=lambda m: f"seed {seed}: {m}")


@pytest.mark.parametrize("turn", range(40))
def test_plans_of_random_graphs_are_safe_and_in_order(turn: int) -> None:
    g = graph(Program(SEED + turn).text())
    in_order(schedule(g))


@pytest.mark.parametrize("turn", range(6))
def test_kernels_beside_collectives_compute_what_the_graph_says(late: None, turn: int) -> None:
    agree(SEED + turn, CodegenOptions())


@pytest.mark.parametrize("turn", range(20))
def test_torch_ops_beside_collectives_compute_what_the_graph_says(late: None, turn: int) -> None:
    agree(SEED + turn, CodegenOptions(generate=False))


@pytest.fixture(scope="module")
def groups() -> Iterator[list[str]]:
    """Two process groups of this process alone, where what is sent comes back."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield [dist.new_group([0]).group_name, dist.new_group([0]).group_name]
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("turn", range(6))
def test_channels_beside_kernels_compute_what_the_graph_says(groups: list[str], turn: int) -> None:
    agree(SEED + turn, CodegenOptions(), groups, dict.fromkeys(COLLECTIVES, _copied))


def test_what_is_sent_before_it_is_written_comes_back_as_it_was(groups: list[str]) -> None:
    agree(968498897, CodegenOptions(), groups, dict.fromkeys(COLLECTIVES, _copied))


def _copied(x: Any, *_: Any) -> Any:
    """What comes back where nobody else is: memory of its own."""
    return [t.clone() for t in x] if isinstance(x, list) else x.clone()
