"""A transformer that stops as soon as it is sure, written for one sentence and run in batches.

python examples/autobatch/early_exit.py
python examples/autobatch/early_exit.py --sentences 16 --width 256

Each sentence takes as many layers as it needs; those that are still running take their next layer together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import plait
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    """A transformer layer for one sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (length, width) to the same."""
        n, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, 3, self.heads, w // self.heads).permute(1, 2, 0, 3).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(n, w)
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class EarlyExit(nn.Module):
    """Classifies a sequence with as many layers as it takes to be sure."""

    def __init__(self, width: int, layers: int, classes: int = 4, sure: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, 4) for _ in range(layers))
        self.exits = nn.ModuleList(nn.Linear(width, classes) for _ in range(layers))
        self.sure = sure

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        """(scores of the classes, number of layers that were needed)."""
        scores, used = x[0, :4], 0
        for layer, out in zip(self.layers, self.exits, strict=True):
            x = layer(x)
            scores = out(x.mean(0))
            used += 1
            if F.softmax(scores, -1).max() > self.sure:
                break
        return scores, used


def median_ms(run: Callable[[], Any], times: int) -> float:
    """Median milliseconds of some calls."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found)


def main() -> None:
    """Run sentences one by one and in a batch, compare the answers, and print both times."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = EarlyExit(given.width, given.layers).eval()
    sentences = [torch.randn(given.length, given.width) for _ in range(given.sentences)]
    batched = plait.autobatch(model)
    with torch.no_grad():
        for _ in range(6):  # learns the program, then compiles it
            found = batched(sentences)
        expected = [model(x) for x in sentences]
        worst = max(float((a - b).abs().max()) for (a, _), (b, _) in zip(found, expected, strict=True))
        same = [a for _, a in found] == [b for _, b in expected]
        alone = median_ms(lambda: [model(x) for x in sentences], 3)
        together = median_ms(lambda: batched(sentences), 7)
    used = Counter(n for _, n in found)
    print("layers needed: " + ", ".join(f"{n} by {used[n]}" for n in sorted(used)))
    print(f"the same number of layers: {same}; scores differ by {worst:.1e} at most")
    print(f"one by one {alone:.1f} ms, in a batch {together:.1f} ms: {alone / together:.1f}x")
    print(batched.report())


if __name__ == "__main__":
    main()
