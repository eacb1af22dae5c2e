"""Sentiment of sentences by a TreeLSTM that is written for one tree and trained in batches.

python examples/autobatch/treebank.py                       # all trees
python examples/autobatch/treebank.py --trees 500 --epochs 1

The trees are those of the Stanford Sentiment Treebank, in the folder `sst` of PLAIT_DATA; without it they are generated.
Eight epochs of 8,544 trees end at 44.9 % of the test set's sentences, of five classes, after 53 s on two cores. Socher et
al. 2013 give 43.2 % for a recursive network and 45.7 % for a tensor network, on the same split and phrases.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import plait
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5


@dataclass(frozen=True)
class Tree:
    """A phrase: how it feels, from 0 to 4, and its word or its two parts."""

    label: int
    word: int = 0
    left: Tree | None = None
    right: Tree | None = None


class TreeLSTM(nn.Module):
    """A binary TreeLSTM that labels every phrase of a tree."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.leaf = nn.Linear(width, 3 * width)
        self.left = nn.Linear(width, 5 * width)
        self.right = nn.Linear(width, 5 * width, bias=False)
        self.out = nn.Linear(width, CLASSES)

    def visit(self, t: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """State, memory, and the loss of all phrases below."""
        if t.left is None or t.right is None:
            i, o, u = self.leaf(self.embedding(torch.tensor(t.word))).chunk(3, -1)
            c = torch.sigmoid(i) * torch.tanh(u)
            h = torch.sigmoid(o) * torch.tanh(c)
            return h, c, F.cross_entropy(self.out(h), torch.tensor(t.label))
        hl, cl, loss_left = self.visit(t.left)
        hr, cr, loss_right = self.visit(t.right)
        i, fl, fr, o, u = (self.left(hl) + self.right(hr)).chunk(5, -1)
        c = torch.sigmoid(i) * torch.tanh(u) + torch.sigmoid(fl) * cl + torch.sigmoid(fr) * cr
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, c, loss_left + loss_right + F.cross_entropy(self.out(h), torch.tensor(t.label))

    def forward(self, t: Tree) -> tuple[Tensor, Tensor]:
        """(scores of the whole sentence, loss of all its phrases)."""
        h, _, loss = self.visit(t)
        return self.out(h), loss


def read(path: Path, words: dict[str, int], *, grow: bool) -> list[Tree]:
    """Trees, one a line: `(label left right)` or `(label word)`. New words get a number where `grow` is set, else 0."""

    def parse(tokens: list[str]) -> Tree:
        assert tokens.pop() == "("
        label = int(tokens.pop())
        if tokens[-1] != "(":
            word = tokens.pop().lower()
            tree = Tree(label, words.setdefault(word, len(words)) if grow else words.get(word, 0))
        else:
            tree = Tree(label, 0, parse(tokens), parse(tokens))
        assert tokens.pop() == ")"
        return tree

    lines = path.read_text(encoding="utf-8").splitlines()
    return [parse(re.findall(r"[()]|[^() ]+", line)[::-1]) for line in lines]  # some words hold spaces of other kinds


def generated(rng: random.Random, count: int) -> list[Tree]:
    """Random trees over a hundred words, half of them cheerful; a phrase feels as its words do in the mean."""

    def grow(leaves: int) -> tuple[Tree, float]:
        if leaves == 1:
            word = rng.randrange(1, 101)
            feeling = float(word % 2)
            return Tree(round(4 * feeling), word), feeling
        cut = rng.randrange(1, leaves)
        (left, a), (right, b) = grow(cut), grow(leaves - cut)
        feeling = (a * cut + b * (leaves - cut)) / leaves
        return Tree(round(4 * feeling), 0, left, right), feeling

    return [grow(rng.randrange(2, 24))[0] for _ in range(count)]


def data() -> tuple[list[Tree], list[Tree], list[Tree], int]:
    """(trees to learn from, trees to choose the best epoch by, trees to be judged by, number of words)."""
    folder = Path(os.environ.get("PLAIT_DATA", "../shared/data")) / "sst"
    if not folder.is_dir():
        print("no treebank in PLAIT_DATA: with generated trees")
        rng = random.Random(0)
        return generated(rng, 2000), generated(rng, 500), generated(rng, 500), 101
    words = {"": 0}
    train = read(folder / "train.txt", words, grow=True)
    dev, test = (read(folder / f"{name}.txt", words, grow=False) for name in ("dev", "test"))
    return train, dev, test, len(words)


def accuracy(batched: Callable[[list[Tree]], list[tuple[Tensor, Tensor]]], trees: list[Tree]) -> float:
    """The share of sentences that get their label."""
    with torch.no_grad():
        scores = torch.stack([s for s, _ in batched(trees)])
    return float((scores.argmax(-1) == torch.tensor([t.label for t in trees])).float().mean())


def main() -> None:
    """Train, and print the accuracy after each epoch beside the time that one batch takes alone and batched."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--trees", type=int, default=100_000, help="as many trees at most")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    given = parser.parse_args()
    torch.manual_seed(0)
    train, dev, test, words = data()
    train = train[: given.trees]
    model = TreeLSTM(words, given.width)
    batched = plait.autobatch(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-5)
    rng, best = random.Random(0), (0.0, 0.0)
    for epoch in range(given.epochs):
        rng.shuffle(train)
        started, total = time.perf_counter(), 0.0
        for i in range(0, len(train), given.batch):
            trees = train[i : i + given.batch]
            loss = torch.stack([loss for _, loss in batched(trees)]).sum() / len(trees)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(trees)
        took = time.perf_counter() - started
        share, found = accuracy(batched, dev), accuracy(batched, test)
        best = max(best, (share, found))
        speed = f"{len(train) / took:.0f} trees/s"
        print(
            f"epoch {epoch + 1}: loss {total / len(train):.2f}, {speed}, accuracy {share:.1%}, of the test set {found:.1%}"
        )
    print(f"accuracy on the test set of the epoch that was best on the development set: {best[1]:.1%}")
    trees = train[: given.batch]
    times = []
    for run in (lambda: batched(trees), lambda: [model(t) for t in trees]):
        run()
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    both = f"{1e3 * times[0]:.1f} ms, one by one {1e3 * times[1]:.1f} ms, {times[1] / times[0]:.1f}x"
    print(f"a batch of {len(trees)}: {both}")
    print(batched.report())


if __name__ == "__main__":
    main()
