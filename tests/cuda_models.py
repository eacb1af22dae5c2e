"""Small models for tests of CUDA targets, captured on the CPU, and what tells a cubin from anything else."""

from __future__ import annotations

import struct
from typing import Any

import torch
from plait.compiler import capture
from plait.compiler.export import export, from_exported
from plait.ir import Graph
from plait.passes.decompositions import table
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A transformer block: layer norm, causal attention, a feed-forward layer with GELU."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Mlp(nn.Module):
    """Token ids to classes: an embedding, a mean over tokens, two layers, a softmax."""

    def __init__(self, vocab: int = 50, width: int = 24, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(self.embedding(tokens).mean(1)))).softmax(-1)


def block() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return Block().eval(), (torch.randn(2, 9, 32),)


def mlp() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return Mlp().eval(), (torch.randint(0, 50, (6, 7)),)


def captured(model: nn.Module, inputs: Any, dynamic_shapes: Any = None) -> Graph:
    """The lowered graph of a model on positional or keyword inputs, on the CPU."""
    return capture.lower(from_exported(export(model, inputs, dynamic_shapes)).graph, table(), "inference")


def compute_capability(cubin: bytes) -> int:
    """The compute capability that a cubin (an ELF file for CUDA) was compiled for, as 90 for 9.0."""
    assert cubin[:4] == b"\x7fELF" and struct.unpack_from("<H", cubin, 18)[0] == 190
    return struct.unpack_from("<I", cubin, 48)[0] & 0xFF
