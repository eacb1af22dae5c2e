"""Fused micro-benchmarks: what a fusing compiler should win on. float32 unless the name says otherwise; memory-bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class Micro:
    """`fn(*make(n))`; `n` scales the number of rows: FULL for a timing, 1 for the cost of a call with no work in it. It may
    write to its arguments."""

    name: str
    fn: Callable[..., object]
    make: Callable[[int], list[Tensor]]
    full: int


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return F.softmax(scores * 0.125 + mask, -1)


def residual_norm(x: Tensor, y: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y + bias
    return total, F.layer_norm(total, total.shape[-1:], weight, None)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotary(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = q.chunk(2, -1)
    return q * cos + torch.cat([-second, first], -1) * sin


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True, correction=0)
    return F.relu((x - mean) * torch.rsqrt(var + 1e-5) * weight + bias), mean, var


def adam_step(p: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = m * 0.9 + grad * 0.1
    v = v * 0.999 + grad * grad * 0.001
    return p - 1e-3 * (m / 0.5) / ((v / 0.1).sqrt() + 1e-8), m, v


def transposed_chain(x: Tensor, y: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return torch.tanh((x + y.t()) * row + column).mul(0.5).clamp(-0.4, 0.4)


def geglu(gate_up: Tensor) -> Tensor:
    up, gate = gate_up.chunk(2, -1)
    return up * F.gelu(gate)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias))


def smoothed_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1)


def softmax_backward(grad: Tensor, probabilities: Tensor, mask: Tensor) -> Tensor:
    grad = grad * mask
    return (grad - (grad * probabilities).sum(-1, keepdim=True)) * probabilities * 0.125


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    shape = list(x.shape[-1:])
    return torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, weight, [True, True, True])


def adamw_list(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One step over a list of parameters, gradients and both moments of each, in place as torch.optim takes it: 100 MB of
    fresh results a call would time how the allocator gives memory back."""
    for p, grad, m, v in zip(*(tensors[k::4] for k in range(4)), strict=True):
        m.lerp_(grad, 0.1)
        v.mul_(0.999).addcmul_(grad, grad, value=0.001)
        p.mul_(1 - 1e-3 * 0.01).addcdiv_(m, v.sqrt().add_(1e-8), value=-1e-3)
    return tensors[::4]


def embedding_norm(ids: Tensor, words: Tensor, positions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(F.embedding(ids, words) + positions, words.shape[-1:], weight, bias)


def bf16_residual_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    wide = total.float()
    return total, (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def _adamw_tensors(n: int) -> list[Tensor]:
    """Weights and biases of a few layers of width 512; `n` scales the rows of the weights."""
    shapes = [shape for _ in range(4) for shape in ((n, 512), (512,), (512, n), (n,))]
    return [_randn(*shape, seed=k).abs() for shape in shapes for k in range(4)]


MICROS = (
    Micro("bias gelu", bias_gelu, lambda n: [_randn(n, 1024), _randn(1024, seed=1)], 4096),
    Micro("layer norm", layer_norm, lambda n: [_randn(n, 1024), _randn(1024, seed=1), _randn(1024, seed=2)], 4096),
    Micro("rms norm", rms_norm, lambda n: [_randn(n, 1024), _randn(1024, seed=1)], 4096),
    Micro("masked softmax", masked_softmax, lambda n: [_randn(n, 12, 128, 128), _randn(n, 1, 1, 128, seed=1)], 16),
    Micro("residual norm", residual_norm, lambda n: [_randn(n, 1024), _randn(n, 1024), _randn(1024), _randn(1024)], 4096),
    Micro("swiglu", swiglu, lambda n: [_randn(n, 4096)], 1024),
    Micro("rotary", rotary, lambda n: [_randn(n, 8, 128, 64), _randn(128, 64, seed=1), _randn(128, 64, seed=2)], 32),
    Micro("cross entropy", cross_entropy, lambda n: [_randn(n, 8192), torch.arange(n) % 8192], 512),
    Micro("channel norm", channel_norm, lambda n: [_randn(n, 64, 56, 56), _randn(64, 1, 1), _randn(64, 1, 1, seed=1)], 16),
    Micro("adam step", adam_step, lambda n: [_randn(n), _randn(n, seed=1), _randn(n, seed=2), _randn(n).square()], 1 << 22),
    Micro(
        "transposed chain",
        transposed_chain,
        lambda n: [_randn(n, 2048), _randn(2048, n, seed=1), _randn(2048, seed=2), _randn(n, 1, seed=3)],
        2048,
    ),
    Micro("geglu", geglu, lambda n: [_randn(n, 4096)], 1024),
    Micro("group norm silu", group_norm_silu, lambda n: [_randn(n, 320, 32, 32), _randn(320), _randn(320, seed=1)], 8),
    Micro("smoothed loss", smoothed_loss, lambda n: [_randn(n, 8192), torch.arange(n) % 8192], 512),
    Micro(
        "softmax backward",
        softmax_backward,
        lambda n: [_randn(n, 12, 128, 128), _randn(n, 12, 128, 128, seed=1).softmax(-1), _randn(n, 1, 1, 128, seed=2)],
        16,
    ),
    Micro(
        "layer norm backward",
        layer_norm_backward,
        lambda n: [_randn(n, 1024), _randn(n, 1024, seed=1), _randn(1024), _randn(n, 1), _randn(n, 1, seed=1).abs()],
        4096,
    ),
    Micro("adamw list", adamw_list, _adamw_tensors, 2048),
    Micro(
        "embedding norm",
        embedding_norm,
        lambda n: [torch.arange(n * 512).reshape(n, 512) * 7919 % 30000, _randn(30000, 768), _randn(512, 768, seed=1),
                   _randn(768), _randn(768, seed=1)],
        8,
    ),
    Micro(
        "bf16 residual norm",
        bf16_residual_norm,
        lambda n: [_randn(n, 2048).bfloat16(), _randn(n, 2048, seed=1).bfloat16(), _randn(2048).bfloat16()],
        4096,
    ),
)  # fmt: skip
