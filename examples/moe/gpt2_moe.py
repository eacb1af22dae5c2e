"""A GPT-2 that reads characters, every other MLP of which is a mixture of experts; and text for it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import plait
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes. `experts` are those of all ranks; `hidden` is the inner width of MLPs and experts."""

    vocabulary: int
    width: int = 128
    heads: int = 4
    layers: int = 4
    context: int = 64
    hidden: int = 512
    experts: int = 4
    gate: str = "switch"
    capacity_factor: float = 1.25
    balance: float = 0.01


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and an MLP or a mixture, each behind a norm and beside a residual."""

    def __init__(self, config: Config, mixture: bool, group: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.mlp = (
            plait.moe.MoE(
                config.width,
                config.hidden,
                config.experts,
                config.gate,
                config.capacity_factor,
                group,
                activation="gelu_tanh",
                balance=config.balance,
            )
            if mixture
            else MLP(config.width, config.hidden)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, time, width] -> the same, and the mixture's auxiliary loss (0 without one)."""
        x = x + self.attention(self.norm1(x))
        found = self.mlp(self.norm2(x))
        y, extra = found if isinstance(found, tuple) else (found, x.new_zeros(()))
        return x + y, extra


class GPT2MoE(nn.Module):
    """Tokens [batch, time] -> logits [batch, time, vocabulary] and the sum of auxiliary losses.

    With torch's generator seeded alike on all ranks of `group`, any number of ranks starts from the same model.
    """

    def __init__(self, config: Config, group: Any = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.place = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, i % 2 == 1, group) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        extra = x.new_zeros(())
        for block in self.blocks:
            x, more = block(x)
            extra = extra + more
        return self.head(self.norm(x)), extra


def loss(model: GPT2MoE, tokens: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy of the following characters, and the mixtures' auxiliary losses."""
    logits, extra = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1), following.flatten()) + extra


class Text:
    """Characters as tokens; `batch` draws windows of them."""

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        number = {c: i for i, c in enumerate(self.characters)}
        self.tokens = torch.tensor([number[c] for c in text])

    def batch(self, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """`count` windows of `length` characters and of those that follow each: [count, length] twice."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.tokens) - length, (count, 1), generator=generator)
        windows = self.tokens[starts + torch.arange(length + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def sentences(count: int = 4000, seed: int = 0) -> str:
    """Text with something to learn: who does what, and sums that are right."""
    draw = random.Random(seed)
    who = ["a weaver", "the old ferryman", "my sister", "a red fox", "the night train", "nobody"]
    does = ["crosses", "remembers", "follows", "mends", "counts", "forgets"]
    what = ["the river", "seven bridges", "a blue thread", "the market", "its shadow", "every star"]
    lines = []
    for _ in range(count):
        a, b = draw.randrange(50), draw.randrange(50)
        lines.append(
            f"{a} and {b} are {a + b}." if draw.random() < 0.4 else " ".join(map(draw.choice, (who, does, what))) + "."
        )
    return "\n".join(lines)
