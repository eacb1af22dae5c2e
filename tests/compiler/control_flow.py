"""Generated programs with control flow for one instance: recursion, loops, branches on data and on tensors' values."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH = 6

HEADER = '''"""Generated program, seed {seed}."""

import torch
from torch import nn
from torch.nn import functional as F


class Program(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.ModuleList([nn.Linear({width}, {width}) for _ in range(3)])
        self.scale = nn.Parameter(torch.linspace(-1, 1, {width}))
        self.cell = nn.GRUCell({width}, {width})

'''


@dataclass
class _Writer:
    """Writes one method; `tensors` are names that hold a tensor of WIDTH numbers on every path to here."""

    rng: random.Random
    recursive: bool
    lines: list[str]
    tensors: list[str]
    count: int = 0

    def add(self, depth: int, text: str) -> None:
        self.lines.append("    " * depth + text)

    def pick(self) -> str:
        return self.rng.choice(self.tensors)

    def target(self) -> str:
        return self.rng.choice([n for n in self.tensors if n.isidentifier()])

    def expression(self, level: int = 0) -> str:
        """Tensor code of WIDTH numbers."""
        rng = self.rng
        a = self.pick() if level > 1 or rng.random() < 0.5 else self.expression(level + 1)
        b = self.pick() if level > 1 or rng.random() < 0.7 else self.expression(level + 1)
        chosen = rng.choice([
            f"torch.tanh({a} + {b})", f"torch.sigmoid({a}) * {b}", f"{a} - {b} * 0.5", f"self.scale * {a}",
            f"torch.tanh(self.linear[{rng.randrange(3)}]({a}))", f"torch.stack([{a}, {b}]).mean(0)", f"F.softmax({a}, -1)",
            f"({a}).flip(0) + {b}", f"torch.cat([{a}, {b}])[::2]", f"self.cell({a}[None], {b}[None])[0]",
            f"torch.maximum({a}, {b})", f"({a}).view(2, -1).t().reshape(-1)", f"torch.where({a} > {b}, {a}, {b} * 0.3)",
            f"({a}) / (1 + ({b}).abs().sum())",
        ])  # fmt: skip
        return f"({chosen})" if level else chosen

    def condition(self) -> str:
        """What a branch depends on: data, or a value."""
        a = self.pick()
        return self.rng.choice(
            [
                "t.n % 2 == 0",
                "t.kids",
                "len(t.kids) > 1",
                f"{a}.sum() > 0",
                f"({a}.max() > 0.4 and t.n > 2)",
                f"bool(({a} > 0).any())",
            ]
        )

    def block(self, depth: int, budget: int) -> None:
        """Some statements."""
        for _ in range(self.rng.randrange(1, 4)):
            self.statement(depth, budget)

    def statement(self, depth: int, budget: int) -> None:
        rng = self.rng
        kind = (
            rng.choice(["let", "let", "let", "if", "for", "while", "list", "kids", "words", "augment"])
            if budget > 0
            else "let"
        )
        match kind:
            case "let":
                name = rng.choice([f"v{self.count}", self.target()])
                self.count += 1
                self.add(depth, f"{name} = {self.expression()}")
                self.know(name)
            case "augment":
                name = f"v{self.count}"
                self.count += 1
                self.add(depth, f"{name} = {self.pick()} * 1.5")
                self.add(depth, f"{name} += {self.pick()}")
                self.know(name)
            case "if":
                self.add(depth, f"if {self.condition()}:")
                before = list(self.tensors)
                self.block(depth + 1, budget - 1)
                self.tensors = list(before)
                if rng.random() < 0.6:
                    self.add(depth, "else:")
                    self.block(depth + 1, budget - 1)
                    self.tensors = list(before)
            case "for":
                self.add(depth, f"for i{depth} in range(t.n % {rng.randrange(2, 5)}):")
                before = list(self.tensors)
                self.block(depth + 1, budget - 1)
                if rng.random() < 0.3:
                    self.add(depth + 1, f"if {self.condition()}:")
                    self.add(depth + 2, rng.choice(["break", "continue"]))
                self.tensors = before
            case "while":
                name, counter = self.target(), f"n{self.count}"
                self.count += 1
                self.add(depth, f"{counter} = 0")
                self.add(depth, f"while {counter} < 3 and {name}.abs().max() > 0.3:")
                before = list(self.tensors)
                self.add(depth + 1, f"{name} = {name} * 0.5")
                self.block(depth + 1, budget - 1)
                self.add(depth + 1, f"{counter} += 1")
                self.tensors = before
            case "list":
                name = f"v{self.count}"
                self.count += 1
                self.add(depth, f"items = [{', '.join(self.expression() for _ in range(rng.randrange(1, 4)))}]")
                self.add(depth, f"items.append({self.expression()})")
                self.add(depth, f"{name} = items.pop() + sum(items)")
                self.know(name)
            case "kids":
                name = f"v{self.count}"
                self.count += 1
                if self.recursive:
                    self.add(depth, f"states = [self.visit(k, {self.pick()}) for k in t.kids]")
                else:
                    self.add(depth, f"states = [{self.pick()} * k.x for k in t.kids]")
                self.add(depth, f"{name} = torch.stack([*states, {self.pick()}]).sum(0)")
                self.know(name)
            case "words":
                name = f"v{self.count}"
                self.count += 1
                self.add(depth, f"{name} = self.scale[t.n % {WIDTH}] * {self.pick()}")
                self.know(name)

    def know(self, name: str) -> None:
        if name not in self.tensors:
            self.tensors.append(name)


def text(seed: int) -> str:
    """The source of a program."""
    rng = random.Random(seed)
    lines: list[str] = []
    for name, recursive in (("visit", True), ("finish", False)):
        writer = _Writer(rng, recursive, [], ["h", "t.x"])
        writer.add(1, f"def {name}(self, t, h):")
        if recursive:
            writer.add(2, "if t.depth == 0:")
            writer.add(3, f"return {writer.expression()}")
        for _ in range(rng.randrange(2, 5)):
            writer.statement(2, 2)
        writer.add(2, f"return torch.tanh({writer.pick()} + {writer.expression()})")
        lines += [*writer.lines, ""]
    lines += ["    def forward(self, t):", "        h = self.visit(t, t.x * 0.5)", "        return h, self.finish(t, h)", ""]
    return HEADER.format(seed=seed, width=WIDTH) + "\n".join(lines)


@dataclass(frozen=True)
class Node:
    """Data that a program's control flow follows."""

    n: int
    depth: int
    x: torch.Tensor
    kids: tuple[Node, ...]


def node(rng: random.Random, depth: int) -> Node:
    """Random data; the same for equal states of `rng`."""
    x = torch.tensor([rng.gauss(0, 1) for _ in range(WIDTH)])
    kids = tuple(node(rng, depth - 1) for _ in range(rng.randrange(0, 3))) if depth else ()
    return Node(rng.randrange(8), depth, x, kids)


def load(seed: int, folder: Path) -> nn.Module:
    """The program of a seed, from a file of its own, so that its source can be found."""
    path = folder / f"program_{seed}.py"
    path.write_text(text(seed))
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    return module.Program()
