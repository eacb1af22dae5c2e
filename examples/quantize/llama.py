"""A Llama in plain torch: for whole sequences, and one token at a time with caches of keys and values.

Its modules have the names that transformers gives them, so a state dict of transformers' LlamaForCausalLM loads as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama. `heads` queries share `kv_heads` keys and values; `context` is the longest sequence."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int = 2048
    rope_base: float = 10000.0
    eps: float = 1e-5
    tied: bool = True

    @property
    def head_size(self) -> int:
        """Numbers of a head."""
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    """Rows divided by their root mean square, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., width]."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.size = config.head_size
        self.q_proj = nn.Linear(config.hidden, config.heads * self.size, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(config.heads * self.size, config.hidden, bias=False)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads, length, size] of `x` [batch, length, hidden]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [batch, length, hidden]; `cos` and `sin` [length, size]. No token sees later ones."""
        q, k, v = self.heads(x, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [batch, length, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)
        cos, sin = rotary(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states [batch, length, hidden] of tokens [batch, length]."""
        x, length = self.embed_tokens(tokens), tokens.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return self.norm(x)


class Llama(nn.Module):
    """A Llama for language modelling: logits [batch, length, vocabulary] of tokens [batch, length]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def of(cls, config: LlamaConfig, state: Mapping[str, Tensor]) -> Llama:
        """A model with these weights, shared with `state`, which has `lm_head.weight` where that is not tied."""
        with torch.device("meta"):
            model = cls(config)
        if config.tied:
            state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
        model.load_state_dict(state, assign=True)
        if config.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.model.cos, model.model.sin = rotary(config)
        return model.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for the token after each one."""
        return self.lm_head(self.model(tokens))


class DecodeStep(nn.Module):
    """One more token for each sequence of a batch: logits [batch, vocabulary].

    Keys and values of earlier tokens are buffers, [batch, kv_heads, capacity, size] for each layer, written in place.
    Positions are written in order from 0; starting at 0 again begins new sequences. The model's modules are shared, not
    copied.
    """

    def __init__(self, model: Llama, capacity: int, batch: int = 1) -> None:
        super().__init__()
        config, like = model.config, model.model.norm.weight
        assert capacity <= config.context, f"the model was made for {config.context} tokens, not {capacity}"
        self.model, self.lm_head, self.capacity = model.model, model.lm_head, capacity
        shape = (batch, config.kv_heads, capacity, config.head_size)
        for i in range(config.layers):
            for name in ("keys", "values"):
                self.register_buffer(f"{name}_{i}", torch.zeros(shape, dtype=like.dtype, device=like.device))

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """`tokens` [batch], all at `position` [1], an int64 from 0 to capacity - 1."""
        x = self.model.embed_tokens(tokens[:, None])
        cos, sin = self.model.cos[position], self.model.sin[position]
        seen = torch.arange(self.capacity, device=position.device) <= position
        for i, layer in enumerate(self.model.layers):
            keys, values, attention = self.get_buffer(f"keys_{i}"), self.get_buffer(f"values_{i}"), layer.self_attn
            q, k, v = attention.heads(layer.input_layernorm(x), cos, sin)
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None], enable_gqa=True)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(-2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm_head(self.model.norm(x))[:, 0]


def rotary(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, head_size] of the angles by which positions turn queries and keys."""
    turns = config.rope_base ** -(torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size)
    angles = torch.arange(config.context, dtype=torch.float32)[:, None] * turns
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [.., length, size] turned: number i goes with number i + size / 2."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@torch.no_grad()
def perplexity(model: Callable[[Tensor], Any], tokens: Tensor, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of tokens [n], read in windows that do not overlap.

    Each window predicts all of its tokens but the first. `model` takes tokens [1, window] and gives logits, or something
    that has them as `.logits`. What is left over at the end is not read.
    """
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    assert len(windows), f"{len(tokens)} tokens are less than one window of {window}"
    loss = 0.0
    for w in windows:
        out = model(w[None])
        logits = getattr(out, "logits", out)[0, :-1]
        loss += float(F.cross_entropy(logits.float(), w[1:], reduction="sum"))
    mean = loss / (len(windows) * (window - 1))
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def generate(step: Callable[[Tensor, Tensor], Tensor], prompt: Tensor, capacity: int) -> Iterator[int]:
    """The likeliest next tokens after a prompt [n], from a decode step of one sequence, until its capacity is used up."""
    token = 0
    for position in range(capacity):
        token = int(prompt[position]) if position < len(prompt) else token
        token = int(step(torch.tensor([token]), torch.tensor([position]))[0].argmax())
        if position >= len(prompt) - 1:
            yield token
