"""Trees that grow from the top down, written for one tree, trained and sampled in batches.

python examples/autobatch/generator.py
python examples/autobatch/generator.py --steps 100 --trees 32

A node's state decides whether it has children, so the shape of a tree is only known once its values are. Trees wait for
each other's values; both children of a node grow side by side. The model learns to grow trees of a wanted size.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import plait
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Node:
    """A node with its label's scores, and its children."""

    label: Tensor
    children: tuple[Node, ...]
    surprise: Tensor  # minus the logarithm of the probability of all decisions below

    def size(self) -> int:
        """Nodes of the tree."""
        return 1 + sum(c.size() for c in self.children)


class Generator(nn.Module):
    """Grows a binary tree from a vector and noise for its decisions."""

    def __init__(self, width: int, labels: int = 8, deepest: int = 6) -> None:
        super().__init__()
        self.down = nn.Linear(width, 2 * width)
        self.more = nn.Linear(width, 1)
        self.label = nn.Linear(width, labels)
        self.deepest = deepest

    def grow(self, h: Tensor, noise: Tensor, depth: int) -> Node:
        """A tree below a state. `noise` holds a number from 0 to 1 for each depth."""
        label = self.label(h)
        odds = torch.sigmoid(self.more(h)).squeeze(0)
        surprise = -torch.log(1 - odds + 1e-6)
        if depth == self.deepest:
            return Node(label, (), surprise * 0)
        if bool(odds < noise[depth]):
            return Node(label, (), surprise)
        left, right = torch.tanh(self.down(h)).chunk(2)
        a, b = self.grow(left, noise, depth + 1), self.grow(right, noise.flip(0), depth + 1)
        return Node(label, (a, b), a.surprise + b.surprise - torch.log(odds + 1e-6))

    def forward(self, h: Tensor, noise: Tensor) -> Node:
        """The tree of one vector."""
        return self.grow(h, noise, 0)


def main() -> None:
    """Train towards trees of a wanted size by policy gradients, and print their mean size and both times."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--trees", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--wanted", type=int, default=15)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = Generator(given.width)
    batched = plait.autobatch(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    started = time.perf_counter()
    for step in range(given.steps):
        vectors, noise = torch.randn(given.trees, given.width), torch.rand(given.trees, model.deepest)
        trees = batched(list(vectors), list(noise))
        sizes = torch.tensor([float(t.size()) for t in trees])
        reward = -(sizes - given.wanted).abs()
        loss = (torch.stack([t.surprise for t in trees]) * (reward - reward.mean())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step + 1 == given.steps:
            off = -reward.mean()
            print(f"step {step + 1}: mean size {sizes.mean():.1f}, off by {off:.1f} from {given.wanted} in the mean")
    print(f"{given.steps * given.trees / (time.perf_counter() - started):.0f} trees/s in training, compilation included")
    vectors, noise = torch.randn(given.trees, given.width), torch.rand(given.trees, model.deepest)
    times = []
    with torch.no_grad():
        for run in (
            lambda: batched(list(vectors), list(noise)),
            lambda: [model(v, n) for v, n in zip(vectors, noise, strict=True)],
        ):
            for _ in range(4):
                run()
            started = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - started))
    print(f"a batch of {given.trees}: {times[0]:.1f} ms, one by one {times[1]:.1f} ms, {times[1] / times[0]:.1f}x")
    print(batched.report())


if __name__ == "__main__":
    main()
