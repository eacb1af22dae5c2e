"""Models, losses and batches that training steps are tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Loss = Callable[..., torch.Tensor]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = (
            part.view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, length, width)
        x = x + F.dropout(self.out(seen), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.between(x)))), self.dropout, self.training)


class GPT(nn.Module):
    """The head shares its weight with the embedding."""

    def __init__(self, vocabulary: int = 50, width: int = 32, heads: int = 4, layers: int = 2, length: int = 16,
                 dropout: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def classes(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(24), nn.Linear(24, 5))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def vectors(dtype: torch.dtype = torch.float64, count: int = 8) -> tuple[Any, ...]:
    return torch.randn(count, 12, dtype=dtype), torch.randint(5, (count,))


def images(dtype: torch.dtype = torch.float64, count: int = 4) -> tuple[Any, ...]:
    return torch.randn(count, 3, 10, 10, dtype=dtype), torch.randint(5, (count,))


def texts(dtype: torch.dtype = torch.float64, count: int = 4) -> tuple[Any, ...]:
    return (torch.randint(50, (count, 17)),)


#: name -> model, loss, batch
MODELS: dict[str, tuple[Callable[[], nn.Module], Loss, Callable[..., tuple[Any, ...]]]] = {
    "mlp": (mlp, classes, vectors),
    "conv": (conv, classes, images),
    "gpt": (GPT, next_token, texts),
    "mlp-dropout": (lambda: mlp(0.3), classes, vectors),
    "gpt-dropout": (lambda: GPT(dropout=0.2), next_token, texts),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 3e-3),
}


def eager_step(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, batch: tuple[Any, ...]) -> torch.Tensor:
    optimizer.zero_grad()
    value = loss(model, *batch)
    value.backward()
    optimizer.step()
    return value.detach()
