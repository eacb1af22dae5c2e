"""Written-out attention becomes one op where nothing else reads its scores, and nowhere else."""

from __future__ import annotations

import math

import plait
import pytest
import torch
from plait.passes.attention import Attention
from torch import nn

from tests.helpers import apply, graph, refusals, run

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
HEAD = """
def f(q: "f32[6,5,8]", k: "f32[6,7,8]", v: "f32[6,7,8]", m: "f32[2,1,5,7]", c: "b1[5,7]"):
    t = aten.permute.default(k, (0, 2, 1))
    s = aten.bmm.default(q, t)
"""
TAIL = """
    p = aten._softmax.default(x, {dim}, False)
    w = aten.view.default(p, (6, 5, 7))
    o = aten.bmm.default(w, v)
    return ({result},)
"""


def text(middle: str, result: str = "o", dim: int = 3) -> str:
    lines = "".join(f"    {line}\n" for line in middle.split("; "))
    return HEAD + lines + TAIL.format(dim=dim, result=result).lstrip("\n")


LEAST = torch.finfo(torch.float32).min
VIEW = "y = aten.view.default(s, (2, 3, 5, 7))"


@pytest.mark.parametrize(
    "middle",
    [
        f"{VIEW}; x = aten.mul.Tensor(y, 0.25)",
        f"{VIEW}; z = aten.div.Tensor(y, 2.0); x = aten.add.Tensor(z, m)",
        f"{VIEW}; x = aten.add.Tensor(m, y)",
        f"{VIEW}; n = aten.full.default((), float('-inf')); x = aten.where.self(c, y, n)".replace("'", '"'),
        f"{VIEW}; n = aten.full.default((), {LEAST}); z = aten.where.self(c, n, y); x = aten.add.Tensor(z, m)",
        "r = aten.mul.Tensor(s, 0.5); y = aten.view.default(r, (2, 3, 5, 7)); x = aten.clone.default(y)",
    ],
)
def test_it_fires_and_computes_the_same(middle):
    before = graph(text(middle))
    step = apply(Attention(), before)
    assert step.fired == {"written-attention": 1}
    assert [n for n in step.after.nodes if n.op.name == FLASH]
    generator = torch.Generator().manual_seed(len(middle))
    made = [torch.randn(*n, generator=generator) for n in ((6, 5, 8), (6, 7, 8), (6, 7, 8), (2, 1, 5, 7))]
    made.append(torch.rand(5, 7, generator=generator) < 0.6)
    made[3][1, 0, 2] = -math.inf  # a row that sees no key is NaN
    (got,), (want,) = run(step.after, [x.clone() for x in made]), run(before, made)
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    "source, why",
    [
        (text(f"{VIEW}; x = aten.relu.default(y)"), "aten.relu.default is no part of attention"),
        (text(f"{VIEW}; x = aten.mul.Tensor(y, m)"), "the scale of the scores is not known"),
        (text(f"{VIEW}; x = aten.mul.Tensor(y, 2.0)", "o, s"), "something else reads the scores"),
        (text(f"{VIEW}; x = aten.clone.default(y)", dim=2), "the softmax is not along the rows"),
        (text(f"{VIEW}; n = aten.full.default((), -5.0); x = aten.where.self(c, n, y)"), "which others may be less than"),
        (text(f"{VIEW}; z = aten.add.Tensor(y, m); x = aten.mul.Tensor(z, 2.0)"), "aten.add.Tensor is no part of attention"),
    ],
)
def test_it_says_why_it_does_not_fire(source, why):
    step = apply(Attention(), graph(source))
    assert not step.changed and any(why in r for r in refusals(step)), refusals(step)


def test_it_leaves_weights_that_are_read_elsewhere():
    step = apply(Attention(), graph(text(f"{VIEW}; x = aten.mul.Tensor(y, 2.0)", "o, p")))
    assert not step.changed and not step.fired


class Grouped(nn.Module):
    """Attention as decoders write it: keys and values repeated for the queries that share them."""

    def forward(self, x, mask):
        b, n, _ = x.shape
        q, k, v = (x[..., i : i + w].view(b, n, w // 8, 8).transpose(1, 2) for i, w in ((0, 32), (32, 16), (48, 16)))
        k, v = (t[:, :, None].expand(b, 2, 2, n, 8).reshape(b, 4, n, 8) for t in (k, v))
        scores = q @ k.transpose(2, 3) * 8**-0.5 + mask
        weights = torch.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), 0.1, self.training)
        return (weights @ v).transpose(1, 2).contiguous().reshape(b, n, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_are_not_repeated(dtype):
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 64).to(dtype), torch.zeros(2, 1, 5, 5, dtype=dtype)
    mask[1, 0, 2, 3] = mask[0, 0, 1] = -math.inf
    model = Grouped().eval()
    compiled = plait.compile(model, (x, mask))
    (node,) = [n for n in compiled.graph.nodes if n.op.name == FLASH]
    assert node["key"].tensor.shape == (2, 2, 5, 8)
    close = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(compiled(x, mask), model(x, mask), equal_nan=True, **close)


def test_sizes_may_be_symbols_and_training_keeps_its_weights():
    torch._dynamo.reset()
    model = Grouped().eval()
    compiled = torch.compile(model, backend="plait", dynamic=True, options={"fallback": "error"})
    for n in (5, 40):
        x, mask = torch.randn(3, n, 64), torch.zeros(3, 1, n, n)
        torch.testing.assert_close(compiled(x, mask), model(x, mask))
    x.requires_grad_()
    compiled(x, mask).sum().backward()
    got, x.grad = x.grad, None
    model(x, mask).sum().backward()
    torch.testing.assert_close(got, x.grad)
