"""Kinds of tensors and ops at the edge of what graphs hold: compiled like eager, or left to torch with a word about it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import plait
import pytest
import torch
from plait.errors import CannotExport, CannotImport, CannotLower
from plait.runtime.ops import _as_strided, _as_strided_scatter
from torch import nn
from torch.nn import functional as F

from tests.generate.judge import judge


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Called(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


class First(nn.Module):
    """The first result of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)[0]


RECURRENT = {
    "gru": lambda: nn.GRU(4, 8, 2, bidirectional=True),
    "lstm": lambda: nn.LSTM(4, 8, 2, batch_first=True),
    "lstm with projection": lambda: nn.LSTM(4, 8, proj_size=3),
    "rnn": lambda: nn.RNN(4, 8, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str) -> None:
    """In `plait.compile` torch takes gru apart into ops that write in place; graphs must not."""
    model, x = First(RECURRENT[name]()).eval(), torch.randn(5, 3, 4)
    with torch.no_grad():
        compiled = plait.compile(model, (x,))
        torch.testing.assert_close(compiled(x), model(x))
        assert not [n for n in compiled.graph.nodes if n.op.has("mutates")]
    twin, other = copy.deepcopy(model).train(), x.clone().requires_grad_()
    x.requires_grad_()
    torch.compile(model.train(), backend="plait")(x).square().sum().backward()
    twin(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_ops_that_write_in_place_are_not_imported() -> None:
    gm = torch.fx.symbolic_trace(lambda x: torch.ops.aten.add_.Tensor(torch.ops.aten.neg.default(x), 1))
    for n in gm.graph.nodes:
        n.meta["val"] = torch.empty(3)
    with pytest.raises(CannotImport, match=r"aten\.add_\.Tensor.*functional"):
        plait.ir.from_fx(gm)


# -- memory that is addressed directly -----------------------------------------------------------------------------------


def strided(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided((2, 2), (1, 2), 1) * 2


def strided_scatter(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a, b = x.sin(), x.cos()
    return torch.as_strided_scatter(a, y, (2, 2), (1, 3), 2) + torch.as_strided_scatter(b, y, (2, 2), (4, 1))


def strided_view_of_a_sum(x: torch.Tensor) -> torch.Tensor:
    total = x + x.flip(0)
    return total.exp().as_strided((3, 2), (1, 1), 2) + total[1:].as_strided((3, 2), (2, 1), 1)


def test_gradient_of_as_strided() -> None:
    """The gradient is written into a value that begins somewhere in the memory of the plan."""
    x = torch.randn(3, 4, requires_grad=True)
    torch.compile(strided, backend="plait")(x).sum().backward()
    found, x.grad = x.grad, None
    strided(x).sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_as_strided_of_computed_values(dynamic: bool) -> None:
    for fn, shapes in ((strided_scatter, ((3, 4), (2, 2))), (strided_view_of_a_sum, ((4, 4),))):
        args = [torch.randn(s) for s in shapes]
        got = torch.compile(fn, backend="plait", dynamic=dynamic)(*args)
        torch.testing.assert_close(got, fn(*args))


def test_as_strided_of_an_input_that_begins_inside_its_memory() -> None:
    whole = torch.randn(20)
    for start in (0, 3):
        x = whole[start : start + 12].view(3, 4)
        torch.testing.assert_close(torch.compile(strided, backend="plait")(x), strided(x))


class Strided(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return strided(self.weight) + y


def test_as_strided_of_a_weight() -> None:
    y = torch.randn(2, 2)
    model = Strided(torch.randn(3, 4))
    torch.testing.assert_close(plait.compile(model, (y,))(y), model(y))
    inside = Strided(torch.randn(20)[4:16].view(3, 4))
    with pytest.raises(CannotImport, match="weight weight: the graph uses as_strided"):
        plait.compile(inside, (y,))


def test_addresses_past_the_end_are_refused() -> None:
    whole = torch.arange(100.0)
    inside = whole[10:16].view(2, 3)
    torch.testing.assert_close(_as_strided(inside, (2, 2), (3, 1), 1), torch.tensor([[11.0, 12.0], [14.0, 15.0]]))
    assert _as_strided(inside, (0, 4), (4, 1), 0).shape == (0, 4)
    with pytest.raises(RuntimeError, match="elements up to 7 of a value that holds 6"):
        _as_strided(inside, (2, 2), (3, 1), 2)
    with pytest.raises(RuntimeError, match="out of bounds"):
        _as_strided_scatter(inside, torch.ones(2, 2), (2, 2), (3, 1), 2, (2, 3), (3, 1), 0)
    assert torch.equal(whole, torch.arange(100.0))


def test_addresses_inside_a_view_that_torch_makes() -> None:
    """Where the view begins in its memory only torch knows: refused ahead of time, run by torch under torch.compile."""

    def parts(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(x * 2).as_strided((2, 2), (2, 1), 1)

    x = torch.randn(4, dtype=torch.complex64)
    torch.testing.assert_close(torch.compile(parts, backend="plait")(x), parts(x))
    with pytest.raises(CannotLower, match=r"as_strided.*view that torch makes"):
        plait.compile(Called(parts), (x,))


# -- what graphs do not hold ---------------------------------------------------------------------------------------------


def test_nested_tensors_run_in_torch(caplog: Any) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)

    def padded(n: torch.Tensor) -> torch.Tensor:
        return torch.nested.to_padded_tensor(n.sin() * 2, 0.0)

    torch.testing.assert_close(torch.compile(padded, backend="plait")(nested), padded(nested))
    assert "ragged dimension" in caplog.text
    with pytest.raises(CannotExport):
        plait.compile(Called(padded), (nested,))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_run_in_torch(layout: torch.layout) -> None:
    def product(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (s @ x).relu()

    s, x = torch.eye(4).to_sparse(layout=layout), torch.randn(4, 3)
    torch.testing.assert_close(torch.compile(product, backend="plait")(s, x), product(s, x))
    with pytest.raises(CannotImport, match=f"layout {str(layout).removeprefix('torch.')}"):
        plait.compile(Called(product), (s, x))


def test_sparse_tensors_made_inside() -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(x.to_sparse(), x)

    x = torch.randn(4, 4)
    torch.testing.assert_close(torch.compile(product, backend="plait")(x), product(x))
    with pytest.raises(CannotImport, match="layout sparse_coo"):
        plait.compile(Called(product), (x,))


def test_complex_numbers_as_arguments(tmp_path: Any) -> None:
    model, x = Called(lambda x: (torch.fft.fft(x) * (1 + 2j)).abs()), torch.randn(4, 8)
    compiled = plait.compile(model, (x,))
    compiled.save(tmp_path / "model.plait")
    for run in (compiled, plait.load(tmp_path / "model.plait")):
        torch.testing.assert_close(run(x), model(x))


# -- everything else that people write -----------------------------------------------------------------------------------


def _r(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


HALVES = (torch.float16, torch.bfloat16, torch.float64)
CASES: dict[str, tuple[Callable[..., Any], Callable[[], list[torch.Tensor]]]] = {
    "dropout": (lambda x: F.dropout(x, 0.3), lambda: [_r(50, 4)]),
    "gumbel softmax": (F.gumbel_softmax, lambda: [_r(3, 4)]),
    "draws": (lambda x: x + torch.rand_like(x) + torch.randn(3, 4) + torch.randint(0, 9, (3, 4)), lambda: [_r(3, 4)]),
    "permutation": (lambda x: x[torch.randperm(3)], lambda: [_r(3, 4)]),
    "normal_": (lambda x: torch.empty_like(x).normal_(), lambda: [_r(3, 4, grad=False)]),
    "multinomial": (lambda x: torch.multinomial(x.softmax(-1), 2), lambda: [_r(3, 4, grad=False)]),
    "complex product": (
        lambda x, y: (x * y).real.exp(),
        lambda: [_r(3, 4, dtype=torch.complex64), _r(3, 4, dtype=torch.complex64)],
    ),
    "complex matrix": (lambda x: (x @ x.mH).abs(), lambda: [_r(3, 4, dtype=torch.complex64)]),
    "short-time Fourier": (lambda x: torch.stft(x, 16, return_complex=True).abs(), lambda: [_r(64)]),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), lambda: [_r(1, 2, 8, 8)]),
    "bicubic": (lambda x: F.interpolate(x, (5, 13), mode="bicubic", align_corners=True), lambda: [_r(1, 2, 8, 8)]),
    "nearest": (lambda x: F.interpolate(x, (5, 13), mode="nearest-exact"), lambda: [_r(1, 2, 8, 8)]),
    "windows": (lambda x: F.unfold(x, 3), lambda: [_r(1, 2, 8, 8)]),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), lambda: [_r(1, 4, 8, 8)]),
    "repeated rows": (
        lambda x: x.index_put((torch.tensor([1, 1, 2, 3, 3]),), torch.ones(5), accumulate=True),
        lambda: [_r(10)],
    ),
    "largest per row": (
        lambda x: x.scatter_reduce(0, torch.tensor([1, 1, 2, 3, 3]), torch.ones(5), "amax"),
        lambda: [_r(10)],
    ),
    "sort": (lambda x: x.sort(-1, descending=True)[0], lambda: [_r(3, 9)]),
    "top": (lambda x: x.topk(3)[0], lambda: [_r(3, 9)]),
    "running maximum": (lambda x: x.cummax(-1)[0], lambda: [_r(3, 9)]),
    "running product": (lambda x: x.cumprod(-1), lambda: [_r(3, 9)]),
    "bags of rows": (
        lambda w: F.embedding_bag(torch.tensor([1, 2, 4]), w, torch.tensor([0, 2])),
        lambda: [_r(10, 4)],
    ),
    "einsum": (lambda x, y: torch.einsum("bij,bkj->ik", x, y), lambda: [_r(2, 3, 4), _r(2, 5, 4)]),
    "bytes": (lambda x: (x + 200) // 3, lambda: [torch.randint(0, 255, (9,), dtype=torch.uint8)]),
    "shifts": (lambda x: (x << 3) ^ 5, lambda: [torch.randint(0, 255, (9,), dtype=torch.int16)]),
    "nothing": (lambda x: x.sum() + x.numel(), lambda: [_r(0, 4)]),
    "a number read back": (lambda x: x * x.max().item(), lambda: [_r(3, 4)]),
    "vmap": (lambda x: torch.vmap(lambda y: y.sin().sum())(x), lambda: [_r(3, 4)]),
    "grad inside": (lambda x: torch.func.grad(lambda y: (y**3).sum())(x), lambda: [_r(3, 4)]),
} | {
    f"{name} {str(dtype)[6:]}": (fn, lambda dtype=dtype, shapes=shapes: [_r(*s, dtype=dtype) for s in shapes])
    for dtype in HALVES
    for name, fn, shapes in (
        ("convolution", lambda x, w: F.conv2d(x, w, padding=1), ((2, 3, 8, 8), (4, 3, 3, 3))),
        ("attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), ((2, 3, 8, 4),) * 3),
        ("norm", lambda x: F.layer_norm(x, (8,)), ((4, 8),)),
    )
}  # fmt: skip


def answer(call: Callable[..., Any], given: list[torch.Tensor]) -> tuple[Any, ...]:
    """Result, gradients, and the next draw of the random generator."""
    torch.manual_seed(1)
    args = [x.detach().clone().requires_grad_(x.requires_grad) for x in given]
    out = call(*args)
    if out.requires_grad:
        weights = torch.linspace(-1, 2, out.numel()).view(out.shape)
        ((out.abs() if out.is_complex() else out) * weights).sum().backward()
    return out.detach(), [x.grad for x in args], torch.rand(1)


@pytest.mark.parametrize("name", CASES)
def test_as_in_eager(name: str) -> None:
    """Results, gradients, and where the random generator stands afterwards; halves no further from float64 than eager's."""
    fn, make = CASES[name]
    given = make()
    got, expected = (answer(call, given) for call in (torch.compile(fn, backend="plait"), fn))
    if given[0].dtype in (torch.float16, torch.bfloat16):
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
        verdict = judge(got, expected, lambda: answer(fn, wide))
        assert verdict.kind != "wrong", verdict.detail
    else:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("limits", [(1, 1.5), (True, 1.5), (1.0, 1), (0.5, True)], ids=str)
def test_a_comparison_does_not_hang_on_the_ones_before_it(dtype: torch.dtype, limits: tuple[Any, Any]) -> None:
    """1, 1.0 and True are equal, and are three ways to compare."""
    x = torch.tensor([0, 1, 2, 3]).to(dtype)
    for limit in limits:

        def below(x: torch.Tensor, limit: Any = limit) -> torch.Tensor:
            return x < limit

        torch._dynamo.reset()
        assert torch.equal(torch.compile(below, backend="plait")(x), below(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_number_written_to_an_input(dynamic: bool) -> None:
    def fill(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.copy_(0.75)
        y[:, 1:].copy_(x[:, 1:] + 1)
        return x

    given, expected = ([torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64)] for _ in range(2))
    got = torch.compile(fill, backend="plait", dynamic=dynamic)(*given)
    assert torch.equal(got, fill(*expected)) and got.data_ptr() == given[0].data_ptr()
    assert all(map(torch.equal, given, expected))


@pytest.mark.parametrize("dynamic", [False, True])
def test_of_no_rows_nothing_is_kept_but_views_are_taken(dynamic: bool) -> None:
    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        part = x[-3:, :, :2, 1::2]
        inverse = part.reciprocal()
        part[..., ::2] = 0.5
        return F.relu(F.linear(F.instance_norm(inverse + 2 * part), w))

    compiled = torch.compile(norm, backend="plait", dynamic=dynamic)
    weight = torch.randn(16, 9, dtype=torch.float64)[:, 1::2]
    for n in (5, 24, 0):
        memory = torch.randn(n, n, 1, 17, dtype=torch.float64)
        given, expected = memory[..., 1::2], memory.clone()[..., 1::2]
        torch.testing.assert_close(compiled(given, weight), norm(expected, weight))


def _scaled(x: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    return x.view(x.shape[0])


def _partly(x: torch.Tensor) -> torch.Tensor:
    x[1:].mul_(2)
    return x[1:].view(x.shape[0] - 1)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x.add_(1.5)
    first, second = x.split(x.shape[0] // 2 + x.shape[0] % 2)
    return second, first


def _swapped(x: torch.Tensor) -> torch.Tensor:
    front, back = x[: x.shape[0] // 2].clone(), x[x.shape[0] // 2 :].clone()
    x.copy_(torch.cat([back, front]))
    return x.view(x.shape).unsqueeze(0)


VIEWING = [(fn, grad) for fn in (_scaled, _partly, _swapped) for grad in (False, True)]
VIEWING += [(_halves, False)]  # with gradients, parts of a split are no views to AOTAutograd


@pytest.mark.parametrize(("fn", "grad"), VIEWING)
def test_views_of_written_inputs_that_start_later_in_their_storage(fn: Callable[..., Any], grad: bool) -> None:
    """AOTAutograd makes such results anew from the offset and the strides of what the graph returned."""
    compiled = torch.compile(fn, backend="plait", fullgraph=True, dynamic=True)
    for n in (6, 9, 4):
        stores = [torch.arange(2.0 * n + 3).requires_grad_(grad) for _ in range(2)]
        given = [(s * 1)[3:][::2] for s in stores]
        got, expected = compiled(given[0]), fn(given[1])
        pairs = list(zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True))
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset())
            assert a.untyped_storage().data_ptr() == given[0].untyped_storage().data_ptr()
        torch.testing.assert_close(given[0], given[1], rtol=0, atol=0)
        if grad:
            for side in zip(*pairs, strict=True):
                sum((t * (k + 2)).sum() for k, t in enumerate(side)).backward()
            torch.testing.assert_close(stores[0].grad, stores[1].grad)
