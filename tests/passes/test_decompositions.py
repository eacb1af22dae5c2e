"""The decomposition policy: right values and gradients, and only ops that the code generator or the library knows."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plait.ir import from_fx, verify
from plait.passes.decompositions import FURTHER, OWN, WHOLE, _overloads, table
from torch._dynamo.backends.common import aot_autograd


def ops_of(fn: Callable[..., Any], *args: torch.Tensor) -> Counter[str]:
    """Compile with the policy, compare results and gradients with eager, return the ops of forward and backward."""
    ops: Counter[str] = Counter()

    def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
        graph = from_fx(gm)
        verify(graph)
        ops.update(n.op.name for n in graph.nodes)
        boxed = lambda inputs: gm.forward(*inputs)  # noqa: E731
        boxed._boxed_call = True
        return boxed

    torch._dynamo.reset()
    mine, theirs = ([a.detach().clone().requires_grad_(a.requires_grad) for a in args] for _ in range(2))
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, decompositions=table())
    got, want = torch.compile(fn, backend=backend, fullgraph=True)(*mine), fn(*theirs)
    torch.testing.assert_close(got, want)
    if want.requires_grad:
        weight = torch.rand_like(want)
        (got * weight).sum().backward()
        (want * weight).sum().backward()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    return ops


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


SPREAD = torch.randint(0, 8, (8, 10), generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([1, 9, 0, -100, 3, 3, 7, 2])


@pytest.mark.parametrize(
    ("fn", "args", "without"),
    [
        (lambda a, t: F.cross_entropy(a, t), (x(8, 10), TARGET), "aten.scatter"),
        (lambda a, t: F.cross_entropy(a, t, reduction="none"), (x(8, 10), TARGET), "aten.scatter"),
        (lambda a, t: F.cross_entropy(a, t, torch.arange(10.0), reduction="sum"), (x(8, 10), TARGET), "aten.scatter"),
        (lambda a, t: F.cross_entropy(a, t, label_smoothing=0.1), (x(8, 10), TARGET), "aten.scatter"),
        (lambda a, t: F.cross_entropy(a[0], t[0]), (x(8, 10), TARGET), "aten.scatter"),
        (lambda a, i: a.take(i[2]), (x(8, 10), TARGET), "aten.take"),
        (lambda a, i: a.t().take(i[:3]), (x(8, 10), TARGET), "aten.take"),
        (lambda a: a.repeat(2, 3, 1, 2), (x(2, 1, 3),), "repeat"),
        (lambda a: torch.cat([p.exp() for p in a.chunk(3, 1)], 1), (x(8, 10),), "as_strided"),
        (lambda a: torch.stack([p.exp() for p in a.split([2, 8], 1)[1].unbind(0)]), (x(3, 10),), "as_strided"),
        (lambda a: F.group_norm(a, 2), (x(2, 4, 6),), "native_group_norm.default"),
        (lambda a: F.batch_norm(a, None, None, training=True), (x(6, 4),), "batch_norm"),
        (lambda a: F.layer_norm(a, (10,)), (x(8, 10),), "layer_norm_backward"),
        (lambda a: F.rms_norm(a, (10,)), (x(8, 10),), "rms_norm"),
        (lambda a: F.elu(a) + F.hardtanh(a) + F.leaky_relu(a) + F.hardswish(a) + F.mish(a), (x(8, 10),), "hardtanh"),
        (lambda a: F.gelu(a) + F.silu(a) + F.softplus(a), (x(8, 10),), "backward"),
        (lambda a: a.norm(dim=1) + torch.linalg.vector_norm(a, 1, 1), (x(8, 10),), "vector_norm"),
        (lambda a: F.smooth_l1_loss(a, a.flip(0)) + F.mse_loss(a, a * 2) + F.huber_loss(a, a * 3), (x(8, 10),), "_loss"),
        (lambda a: torch.softmax(a, 1).log() + torch.log_softmax(a, 0), (x(8, 10),), "_backward_data"),
        (lambda a, i: a.scatter_reduce(0, i, a * 2, "mean"), (x(8, 10), SPREAD), "scatter_reduce"),
        (lambda a, i: a.index_reduce(0, i[:, 0], a * 2, "mean"), (x(8, 10).detach(), SPREAD), "index_reduce"),
        (lambda a, i: a.index_reduce(0, i[:, 0], a * 2, "prod"), (x(8, 10).detach(), SPREAD), "index_reduce"),
        (lambda a: a.masked_scatter(a[:, :1] > 0, a * 2), (x(8, 10).detach(),), "masked_scatter"),
        (lambda a, i: a.put(i[0], a[1], True), (x(8, 10), SPREAD), "aten.put"),
        (lambda a: torch.index_put(a, [a[:, 0] > 0], torch.tensor(3.0)), (x(8, 10),), "index_put"),
        (lambda a: F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2), (x(2, 3, 4, 4),), "max_unpool"),
        (lambda a, i: torch.ldexp(a, i) + a.angle(), (x(8, 10), SPREAD), "ldexp"),
        (lambda a: torch.empty_permuted((8, 10), (1, 0)).fill_(1.0) + a, (x(8, 10),), "empty_permuted"),
    ],
)
def test_broken_up(fn: Callable[..., Any], args: tuple[torch.Tensor, ...], without: str):
    ops = ops_of(fn, *args)
    assert not [name for name in ops if without in name], ops


@pytest.mark.parametrize("reduce", ["sum", "prod", "amax", "amin", "mean"])
@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_scatters_that_leave_out_the_element_itself(reduce: str, kind: torch.dtype):
    a, source = (x(8, 10).detach() * 9).to(kind), (x(8, 10).detach() * 20).to(kind)
    ops_of(lambda a, i, s: a.scatter_reduce(0, i, s, reduce, include_self=False), a, SPREAD, source)


@pytest.mark.parametrize(
    ("fn", "args", "kept"),
    [
        (lambda a, w: F.linear(a, w, w[0]), (x(8, 10), x(10, 10)), "aten.addmm.default"),
        (lambda a: F.scaled_dot_product_attention(a, a, a), (x(2, 2, 4, 8),),
         "aten._scaled_dot_product_flash_attention_for_cpu.default"),
        (lambda a: F.layer_norm(a, (10,)), (x(8, 10),), "aten.native_layer_norm.default"),
        (lambda a: F.silu(a), (x(8, 10),), "aten.silu.default"),
        (lambda a: torch.softmax(a, 1), (x(8, 10),), "aten._softmax.default"),
        (lambda a, w: F.conv2d(a, w, padding=1), (x(2, 3, 5, 5), x(4, 3, 3, 3)), "aten.convolution_backward.default"),
        (lambda w: F.embedding(TARGET.clamp(min=0), w, scale_grad_by_freq=True), (x(10, 4),),
         "aten.embedding_dense_backward.default"),
        (lambda a: F.max_pool2d(a, 2), (x(2, 3, 4, 4),), "aten.max_pool2d_with_indices_backward.default"),
    ],
)  # fmt: skip
def test_left_whole(fn: Callable[..., Any], args: tuple[torch.Tensor, ...], kept: str):
    ops = ops_of(fn, *args)
    assert ops[kept] == 1, ops


@pytest.mark.parametrize("padding", [None, 3])
def test_gradients_of_embeddings_are_added_to_their_rows(padding: int | None):
    ops = ops_of(lambda w: F.embedding(TARGET.clamp(min=0), w, padding_idx=padding), x(10, 4))
    assert ops["aten.index_add.default"] == 1 and ops["aten.embedding_dense_backward.default"] == 0


def test_random_numbers_are_those_of_eager():
    def fn(a: torch.Tensor) -> torch.Tensor:
        return F.dropout(a, 0.5) + torch.bernoulli(a.sigmoid()) + torch.rand_like(a)

    a = x(32, 32).detach()
    torch.manual_seed(7)
    want = fn(a)
    backend = aot_autograd(fw_compiler=lambda gm, _: gm, decompositions=table())
    torch._dynamo.reset()
    torch.manual_seed(7)
    assert torch.equal(torch.compile(fn, backend=backend, fullgraph=True)(a), want)


def test_names_in_the_policy_exist():
    names = [*FURTHER, *OWN, *(name for group in WHOLE.values() for name in group)]
    assert not [n for n in names if not _overloads(n)]
    assert len(names) == len(set(names))


def test_a_pass_can_keep_more():
    hardswish = torch.ops.aten.hardswish.default
    assert hardswish in table() and hardswish not in table(keep=["aten.hardswish"])
    assert hardswish not in table(keep=["aten.hardswish.default"])
    assert hardswish in table(), "the policy itself is not changed"


def test_a_fractional_factor_of_integers_is_truncated_as_in_eager() -> None:
    def scaled(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(a, a, b, value=2.7)

    a, b = torch.arange(6), torch.arange(6) * 3
    torch._dynamo.reset()
    assert torch.equal(torch.compile(scaled, backend="plait", fullgraph=True)(a, b), scaled(a, b))
    x, y = a.float() / 7, b.float() / 5
    torch.testing.assert_close(torch.compile(scaled, backend="plait", fullgraph=True)(x, y), scaled(x, y))
