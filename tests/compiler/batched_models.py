"""The seven models of the paper on automatic batching, each written for one instance, small, with instances to run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = 50


@dataclass(frozen=True)
class Tree:
    """A binary tree with words at its leaves."""

    word: int = -1
    left: Tree | None = None
    right: Tree | None = None


def tree(rng: random.Random, leaves: int) -> Tree:
    """A random tree."""
    if leaves == 1:
        return Tree(word=rng.randrange(WORDS))
    cut = rng.randrange(1, leaves)
    return Tree(left=tree(rng, cut), right=tree(rng, leaves - cut))


class TreeLSTM(nn.Module):
    """A binary TreeLSTM that classifies a tree."""

    def __init__(self, hidden: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, hidden)
        self.leaf = nn.Linear(hidden, 3 * hidden)
        self.left = nn.Linear(hidden, 5 * hidden)
        self.right = nn.Linear(hidden, 5 * hidden, bias=False)
        self.out = nn.Linear(hidden, classes)

    def visit(self, t: Tree) -> tuple[Tensor, Tensor]:
        if t.left is None:
            x = self.embedding(torch.tensor(t.word))
            i, o, u = self.leaf(x).chunk(3, -1)
            c = torch.sigmoid(i) * torch.tanh(u)
            return torch.sigmoid(o) * torch.tanh(c), c
        hl, cl = self.visit(t.left)
        hr, cr = self.visit(t.right)
        i, fl, fr, o, u = (self.left(hl) + self.right(hr)).chunk(5, -1)
        c = torch.sigmoid(i) * torch.tanh(u) + torch.sigmoid(fl) * cl + torch.sigmoid(fr) * cr
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, c

    def forward(self, t: Tree) -> Tensor:
        h, _ = self.visit(t)
        return self.out(h)


class MVRNN(nn.Module):
    """Every word is a vector and a matrix; a node's are composed from those of its parts."""

    def __init__(self, hidden: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.vectors = nn.Embedding(WORDS, hidden)
        self.matrices = nn.Parameter(torch.eye(hidden) + 0.1 * torch.randn(WORDS, hidden, hidden))
        self.w = nn.Linear(2 * hidden, hidden)
        self.wm = nn.Linear(2 * hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, classes)

    def visit(self, t: Tree) -> tuple[Tensor, Tensor]:
        if t.left is None:
            return self.vectors.weight[t.word], self.matrices[t.word]
        a, am = self.visit(t.left)
        b, bm = self.visit(t.right)
        p = torch.tanh(self.w(torch.cat([bm @ a, am @ b])))
        pm = self.wm(torch.cat([am, bm], 0).t()).t()
        return p, pm

    def forward(self, t: Tree) -> Tensor:
        return self.out(self.visit(t)[0])


class BiRNN(nn.Module):
    """A sequence read from both ends; one result for each token."""

    def __init__(self, hidden: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.there = nn.RNNCell(hidden, hidden)
        self.back = nn.RNNCell(hidden, hidden)
        self.out = nn.Linear(2 * hidden, classes)
        self.hidden = hidden

    def run(self, cell: nn.Module, xs: list[Tensor]) -> list[Tensor]:
        h = torch.zeros(self.hidden)
        states = []
        for x in xs:
            h = cell(x, h)
            states.append(h)
        return states

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        there = self.run(self.there, xs)
        back = self.run(self.back, xs[::-1])[::-1]
        return [self.out(torch.cat([a, b])) for a, b in zip(there, back, strict=False)]


class NestedRNN(nn.Module):
    """A GRU whose every step runs an RNN of its own, for as many steps as the instance says."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.inner = nn.RNNCell(hidden, hidden)
        self.outer = nn.GRUCell(hidden, hidden)
        self.start = nn.Parameter(torch.randn(hidden))

    def forward(self, x: Tensor, steps: list[int]) -> Tensor:
        state = self.start
        for n in steps:
            h = state
            for _ in range(n):
                h = self.inner(x, h)
            state = self.outer(h, state)
        return state


class DRNN(nn.Module):
    """Generates a tree from the top down: whether a node has children depends on its state."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, 2 * hidden)
        self.stop = nn.Linear(hidden, 1)
        self.label = nn.Linear(hidden, 3)

    def grow(self, h: Tensor, depth: int) -> Any:
        label = self.label(h)
        if depth == 0 or self.stop(h).sum() > 0.2:
            return label
        left, right = torch.tanh(self.down(h)).chunk(2)
        return label, self.grow(left, depth - 1), self.grow(right, depth - 1)

    def forward(self, h: Tensor) -> Any:
        return self.grow(h, 5)


class Layer(nn.Module):
    """A transformer layer for one sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n, w = x.shape
        q, k, v = self.qkv(x).view(n, 3, self.heads, w // self.heads).permute(1, 2, 0, 3).unbind(0)
        mixed = F.softmax(q @ k.transpose(-1, -2) * (w // self.heads) ** -0.5, -1) @ v
        x = self.norm1(x + self.proj(mixed.transpose(0, 1).reshape(n, w)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class EarlyExit(nn.Module):
    """A transformer with one layer used again and again until the classifier is sure enough."""

    def __init__(self, width: int = 8, layers: int = 6) -> None:
        super().__init__()
        self.layer = Layer(width, 2)
        self.classify = nn.Linear(width, 3)
        self.layers = layers

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        used = 0
        logits = self.classify(x[0])
        while used < self.layers and F.softmax(logits, -1).max() < 0.6:
            x = self.layer(x)
            logits = self.classify(x[0])
            used += 1
        return logits, used


class StackRNN(nn.Module):
    """A parser: shifts a word or reduces two entries of its stack, whichever scores higher."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, hidden)
        self.compose = nn.Linear(2 * hidden, hidden)
        self.state = nn.GRUCell(hidden, hidden)
        self.action = nn.Linear(hidden, 2)
        self.hidden = hidden

    def forward(self, words: list[int]) -> Tensor:
        buffer = [self.embedding.weight[w] for w in reversed(words)]
        stack: list[Tensor] = []
        state = torch.zeros(self.hidden)
        while buffer or len(stack) > 1:
            shift = int(self.action(state).argmax()) == 0
            if not buffer or (len(stack) > 1 and not shift):
                right, left = stack.pop(), stack.pop()
                stack.append(torch.tanh(self.compose(torch.cat([left, right]))))
            else:
                stack.append(buffer.pop())
            state = self.state(stack[-1], state)
        return stack[0] + state


@dataclass(frozen=True)
class Case:
    """`columns(rng, n)` gives the arguments of n instances, a list for each parameter."""

    make: Callable[[], nn.Module]
    columns: Callable[[random.Random, int], tuple[list[Any], ...]]
    trains: bool = True


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(1 << 30))


def _vectors(rng: random.Random, n: int, *shape: int) -> list[Tensor]:
    g = _generator(rng)
    return [torch.randn(shape, generator=g) for _ in range(n)]


CASES = {
    "TreeLSTM": Case(TreeLSTM, lambda rng, n: ([tree(rng, rng.randrange(1, 12)) for _ in range(n)],)),
    "MV-RNN": Case(MVRNN, lambda rng, n: ([tree(rng, rng.randrange(1, 9)) for _ in range(n)],)),
    "BiRNN": Case(BiRNN, lambda rng, n: ([_vectors(rng, rng.randrange(1, 8), 8) for _ in range(n)],)),
    "NestedRNN": Case(
        NestedRNN,
        lambda rng, n: (_vectors(rng, n, 8), [[rng.randrange(1, 4) for _ in range(rng.randrange(1, 4))] for _ in range(n)]),
    ),
    "DRNN": Case(DRNN, lambda rng, n: (_vectors(rng, n, 8),)),
    "early exit": Case(EarlyExit, lambda rng, n: (_vectors(rng, n, 5, 8),)),
    "StackRNN": Case(
        StackRNN, lambda rng, n: ([[rng.randrange(WORDS) for _ in range(rng.randrange(1, 8))] for _ in range(n)],)
    ),
}  # fmt: skip
