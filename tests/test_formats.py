"""Number formats of weights: packing loses nothing, rounding is to nearest, and the ops keep torch's rules.

Hypothesis prints the type and the seed of an example that fails.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait.errors import BadQuantizedType, GroupDoesNotDivide
from plait.formats import LAYOUTS, SCALES, Quantized, QuantizedType, ops, quantize
from plait.formats.quantized import best_layout, rounded, scale_for
from torch.library import opcheck

assert ops is not None  # importing registers torch.ops.plait
SEEDS = st.integers(0, 2**32 - 1)
EXAMPLES = settings(deadline=None, max_examples=60)


@st.composite
def kinds(draw: st.DrawFn, scales: tuple[str, ...] = tuple(SCALES), stacked: bool = True) -> QuantizedType:
    """Types of every layout, width, sign and scale, with sizes that fill no panel as well."""
    layout = draw(st.sampled_from(LAYOUTS))
    group = 32 * draw(st.integers(1, 3)) if layout == "panels" else draw(st.integers(1, 40))
    bits, symmetric = (8, True) if layout == "bytes" else (draw(st.integers(2, 8)), draw(st.booleans()))
    lead = draw(st.sampled_from([(), (2,), (2, 3)])) if stacked else ()
    shape = (*lead, draw(st.integers(1, 70)), group * draw(st.integers(1, 4)))
    return QuantizedType(shape, bits, group, symmetric, draw(st.sampled_from(scales)), layout)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_parts(kind: QuantizedType, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [.., N, K], scales [.., N, G] in float32, exact in the dtype of the type, and zeros [.., N, G]."""
    g = generator(seed)
    lead, groups = (*kind.shape[:-2], kind.rows), kind.groups
    codes = torch.randint(0, kind.levels + 1, kind.shape, generator=g)
    zeros = torch.randint(0, kind.levels + 1, (*lead, groups), generator=g)
    if kind.scale == "e8m0":
        return codes, torch.exp2(torch.randint(-100, 101, (*lead, groups), generator=g).float()), zeros
    return codes, torch.rand((*lead, groups), generator=g).to(SCALES[kind.scale]).float(), zeros


def same_parts(a: Quantized, b: Quantized) -> bool:
    return a.type == b.type and all(
        y is None if x is None else y is not None and x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(a[1:], b[1:], strict=True)
    )


# -- types and layouts --------------------------------------------------------------------------------------------------


@given(kinds())
@EXAMPLES
def test_the_text_of_a_type_gives_the_type(kind: QuantizedType) -> None:
    assert QuantizedType.of(str(kind)) == kind


@given(kinds(), SEEDS)
@EXAMPLES
def test_unpacking_gives_what_was_packed(kind: QuantizedType, seed: int) -> None:
    codes, scales, zeros = random_parts(kind, seed)
    made = kind.pack(codes, scales, None if kind.symmetric else zeros)
    kind.check(*made[1:])
    assert sum(part.nbytes for part in made[1:] if part is not None) == kind.nbytes
    got = kind.unpack(*made[1:])
    want = (codes, scales, torch.full_like(zeros, kind.middle) if kind.symmetric else zeros)
    assert all(torch.equal(a.double(), b.double()) for a, b in zip(got, want, strict=True))
    grouped = codes.unflatten(-1, (kind.groups, kind.group)) - want[2][..., None]
    exact = (grouped.double() * scales.double()[..., None]).flatten(-2)
    assert torch.equal(made.dequantize(torch.float64), exact)


@given(kinds(), SEEDS, st.sampled_from(LAYOUTS))
@EXAMPLES
def test_a_change_of_layout_changes_no_code(kind: QuantizedType, seed: int, layout: str) -> None:
    codes, scales, zeros = random_parts(kind, seed)
    made = kind.pack(codes, scales, None if kind.symmetric else zeros)
    try:
        other = made.to_layout(layout)
    except BadQuantizedType:
        return
    assert other.type.layout == layout
    other.type.check(*other[1:])
    assert torch.equal(other.dequantize(torch.float64), made.dequantize(torch.float64))
    assert same_parts(other.to_layout(kind.layout), made)


def test_where_codes_lie_in_rows() -> None:
    """Five codes of 3 bits, lowest bits first: 1 2 3 4 5 = 0b101_100_011_010_001."""
    kind = QuantizedType((1, 5), 3, 5, layout="rows")
    made = kind.pack(torch.tensor([[1, 2, 3, 4, 5]]), torch.ones(1, 1), torch.tensor([[6]]))
    assert made.codes.tolist() == [[0b11010001, 0b1011000]] and made.zeros is not None and made.zeros.tolist() == [[6]]


def test_where_codes_lie_in_panels() -> None:
    """Word 0 of 4 bits holds the codes of columns 0 to 7 of a row; zeros of rows 16 to 31 are the upper halves of bytes."""
    kind = QuantizedType((2, 32), 4, 32)
    codes = torch.stack([torch.arange(32) % 16, torch.full((32,), 15)])
    made = kind.pack(codes, torch.tensor([[1.0], [2.0]]), torch.tensor([[3], [4]]))
    words = made.codes[0, 0].to(torch.int64) & 0xFFFFFFFF
    assert [hex(int(w)) for w in words[:, 0]] == ["0x76543210", "0xfedcba98"] * 2
    assert words[:, 1].tolist() == [0xFFFFFFFF] * 4 and not words[:, 2:].any()
    assert made.scales[0, 0, :3].tolist() == [1, 2, 0] and made.zeros is not None and made.zeros[0, 0, :2].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (BadQuantizedType, {"shape": (64,)}),
        (BadQuantizedType, {"shape": (0, 64)}),
        (BadQuantizedType, {"bits": 1}),
        (BadQuantizedType, {"bits": 9}),
        (BadQuantizedType, {"scale": "f8"}),
        (BadQuantizedType, {"layout": "tiles"}),
        (BadQuantizedType, {"group": 16}),
        (BadQuantizedType, {"layout": "bytes"}),
        (BadQuantizedType, {"layout": "bytes", "bits": 8}),
        (GroupDoesNotDivide, {"group": 48}),
        (GroupDoesNotDivide, {"group": 0}),
        (GroupDoesNotDivide, {"group": 256}),
    ],
)
def test_types_that_do_not_exist_are_refused(error: type[Exception], arguments: dict) -> None:
    with pytest.raises(error):
        QuantizedType(**{"shape": (64, 128), "group": 32} | arguments)


def test_a_refused_group_names_sizes_that_divide() -> None:
    with pytest.raises(GroupDoesNotDivide, match=r"such as 96, 192"):
        QuantizedType((4, 192), group=100)


@pytest.mark.parametrize(
    "text", ["", "u4", "u4g32", "x4g32[64,64]", "u4g32[64]", "u9g32[64,64]", "u4g32[64,64] ", "u4g32/f8[64,64]"]
)
def test_texts_that_name_no_type_are_refused(text: str) -> None:
    with pytest.raises(BadQuantizedType):
        QuantizedType.of(text)


def test_parts_of_another_type_are_refused() -> None:
    kind = QuantizedType((64, 64), group=32)
    made = quantize(torch.randn(64, 64, generator=generator(0)), kind)
    for parts in (
        (made.codes.float(), made.scales, made.zeros),
        (made.codes, made.scales.float(), made.zeros),
        (made.codes, made.scales, None),
        (made.codes[:1], made.scales, made.zeros),
    ):
        with pytest.raises(BadQuantizedType):
            kind.check(*parts)
    with pytest.raises(BadQuantizedType, match=r"the weight is \[64, 32\]"):
        quantize(torch.zeros(64, 32), kind)
    with pytest.raises(BadQuantizedType, match=r"the weight is \[64, 32\]"):
        torch.ops.plait.fake_quantize(torch.zeros(64, 32), str(kind))
    with pytest.raises(BadQuantizedType, match="no weight for an input"):
        torch.ops.plait.quantized_linear(torch.zeros(3, 32), *made[1:], None, str(kind))


# -- rounding -----------------------------------------------------------------------------------------------------------


def check_nearest(weight: torch.Tensor, made: Quantized) -> None:
    """Every element is the nearest that its group can hold: half a scale off at most, between the ends of the group."""
    kind, exact = made.type, weight.double()
    _, scales, zeros = (t.double() for t in kind.unpack(*made[1:]))
    assert bool(scales.isfinite().all()) and bool((scales > 0).all())
    each = [t.repeat_interleave(kind.group, -1) for t in (scales, zeros)]
    low, high = -each[1] * each[0], (kind.levels - each[1]) * each[0]
    nearest = exact.clamp(low, high)
    off = (made.dequantize(torch.float64) - nearest).abs()
    assert bool((off <= each[0] * (0.5 + 1e-4)).all())


@given(kinds(), SEEDS, st.integers(-4, 3))
@EXAMPLES
def test_codes_are_the_nearest(kind: QuantizedType, seed: int, power: int) -> None:
    weight = torch.randn(kind.shape, generator=generator(seed)) * 10.0**power
    made = quantize(weight, kind)
    check_nearest(weight, made)
    assert torch.equal(rounded(weight, kind), made.dequantize())


@given(kinds(scales=("f32", "e8m0")), SEEDS, st.integers(-12, 12))
@EXAMPLES
def test_no_element_is_off_by_more_than_half_a_scale(kind: QuantizedType, seed: int, power: int) -> None:
    """With scales that hold any range, no end of a group cuts anything off."""
    weight = torch.randn(kind.shape, generator=generator(seed)) * 10.0**power
    made = quantize(weight, kind)
    scales = kind.unpack(*made[1:])[1].double().repeat_interleave(kind.group, -1)
    if kind.scale == "e8m0" and not kind.symmetric:
        scales = scales * 2  # the zero point is a whole number of steps, and so the range may end half a step early
    assert bool(((made.dequantize(torch.float64) - weight.double()).abs() <= scales * (0.5 + 1e-4)).all())


@given(kinds(scales=("f16",), stacked=False), SEEDS, st.sampled_from([1e-12, 1e-7, 1e-5, 1.0, 1e5, 1e9, 1e30]))
@EXAMPLES
def test_scale_for_holds_every_range(kind: QuantizedType, seed: int, size: float) -> None:
    """Halves overflow above 65504 and lose digits below 2^-14; with scales of float32 the error stays in proportion."""
    weight = torch.randn(kind.shape, generator=generator(seed)) * size
    chosen = scale_for(weight, kind)
    if size in (1e-12, 1e-7, 1e30):
        assert chosen.scale == "f32"
    made = quantize(weight, chosen)
    check_nearest(weight, made)
    top = weight.abs().unflatten(-1, (kind.groups, kind.group)).amax(-1, keepdim=True).double()
    off = (made.dequantize(torch.float64) - weight.double()).abs().unflatten(-1, (kind.groups, kind.group))
    assert bool((off <= top * 0.501).all())


def test_scale_for_looks_past_groups_of_zeros() -> None:
    weight = torch.zeros(2, 64)
    assert scale_for(weight, QuantizedType((2, 64), group=32)).scale == "f16"
    weight[0] = 3.0
    assert scale_for(weight, QuantizedType((2, 64), group=32)).scale == "f16"
    weight[1, 0] = 1e7
    assert scale_for(weight, QuantizedType((2, 64), group=32)).scale == "f32"
    assert scale_for(weight, QuantizedType((2, 64), group=32, scale="bf16")).scale == "bf16"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_stay_zeros_and_constants_are_held(scale: str, symmetric: bool) -> None:
    weight = torch.tensor([0.0, 1.0, -3.0, 5e-3, -0.0])[:, None].expand(5, 64)
    made = quantize(weight, QuantizedType((5, 64), 4, 32, symmetric, scale))
    got = made.dequantize()
    assert not got[0].any() and not got[4].any()
    check_nearest(weight, made)
    if scale == "f32":
        assert torch.allclose(got, weight, rtol=1e-6)


@given(kinds(stacked=False), SEEDS)
@EXAMPLES
def test_strides_and_dtype_of_a_weight_do_not_matter(kind: QuantizedType, seed: int) -> None:
    weight = torch.randn(kind.shape, generator=generator(seed)).bfloat16()
    made = quantize(weight.float(), kind)
    assert same_parts(quantize(weight, kind), made)
    wide = torch.zeros(kind.rows, 2 * kind.columns)
    wide[:, ::2] = weight
    for strided in (weight.float().t().contiguous().t(), wide[:, ::2]):
        other = quantize(strided, kind)
        assert same_parts(other, made)
        assert all(part.is_contiguous() for part in other[1:] if part is not None)


def test_clipping_takes_the_range_that_is_given() -> None:
    weight = torch.linspace(-1, 1, 64).expand(3, 64)
    kind = QuantizedType((3, 64), 4, 32, scale="f32")
    half = torch.full((3, 2), 0.5)
    got = quantize(weight, kind, -half, half).dequantize()
    assert got.max() <= 0.55 and got.min() >= -0.55
    assert torch.equal(got, rounded(weight, kind, -half, half))


def test_best_layout_is_what_kernels_read_where_sizes_allow() -> None:
    assert [best_layout(*sizes) for sizes in ((64, 32), (64, 64), (48, 48), (64, 16))] == [
        "panels",
        "panels",
        "rows",
        "rows",
    ]


# -- ops ----------------------------------------------------------------------------------------------------------------

TYPES = ["u4g32[48,64]", "i4g32/bf16[33,64]", "u3g16/f32:rows[10,48]", "i8g64:bytes[40,64]", "i4g32/e8m0[32,64]"]


def example(text: str, seed: int = 0) -> tuple[torch.Tensor, Quantized]:
    kind = QuantizedType.of(text)
    weight = torch.randn(kind.shape, generator=generator(seed))
    return weight, quantize(weight, kind)


def inputs(columns: int) -> dict[str, torch.Tensor]:
    g = generator(1)
    return {
        "matrix": torch.randn(5, columns, generator=g),
        "stack": torch.randn(2, 3, columns, generator=g),
        "vector": torch.randn(columns, generator=g),
        "empty": torch.randn(0, columns),
        "transposed": torch.randn(columns, 7, generator=g).t(),
        "permuted": torch.randn(3, 2, columns, generator=g).transpose(0, 1),
        "half": torch.randn(4, columns, generator=g).half(),
    }


@pytest.mark.parametrize("text", TYPES)
def test_ops_on_weights_keep_the_rules(text: str) -> None:
    weight, made = example(text)
    opcheck(torch.ops.plait.dequantize.default, (*made[1:], text, torch.bfloat16))
    for strided in (weight, weight.t().contiguous().t()):
        opcheck(torch.ops.plait.quantize.default, (strided, text))
        opcheck(torch.ops.plait.fake_quantize.default, (strided.detach().requires_grad_(), text))


@pytest.mark.parametrize("form", inputs(1))
def test_ops_on_inputs_keep_the_rules(form: str) -> None:
    for text in TYPES:
        _, made = example(text)
        x = inputs(made.type.columns)[form].requires_grad_()
        bias = torch.randn(made.type.rows, generator=generator(2)).requires_grad_()
        opcheck(torch.ops.plait.quantized_linear.default, (x, *made[1:], bias, text))
    opcheck(torch.ops.plait.quantize_rows.default, (inputs(64)[form].requires_grad_(),))
    _, made = example("i8g64:bytes[40,64]")
    bias = torch.randn(40, generator=generator(2)).requires_grad_()
    opcheck(torch.ops.plait.dynamic_linear.default, (inputs(64)[form].requires_grad_(), made.codes, made.scales, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", TYPES)
def test_products_and_gradients_are_those_of_the_dequantized_weight(text: str, dtype: torch.dtype) -> None:
    _, made = example(text)
    g = generator(3)
    x = torch.randn(2, 7, made.type.columns, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(made.type.rows, generator=g).to(dtype).requires_grad_()
    seed = torch.randn(2, 7, made.type.rows, generator=g).to(dtype)
    got = torch.ops.plait.quantized_linear(x, *made[1:], bias, text)
    got.backward(seed)
    weight = made.dequantize(torch.float64)
    exact = torch.nn.functional.linear(x.double(), weight, bias.double())
    eps = torch.finfo(dtype).eps
    near = {"rtol": 2 * eps, "atol": 2 * eps * float(exact.detach().abs().max())}
    assert got.dtype == x.dtype and torch.allclose(got.double(), exact, **near)
    assert x.grad is not None and bias.grad is not None and x.grad.dtype == dtype
    inner = weight.to(dtype).double()
    assert torch.allclose(x.grad.double(), seed.double() @ inner, rtol=4 * eps, atol=8 * eps * float(inner.abs().max()) * 7)
    assert torch.allclose(bias.grad.double(), seed.double().sum((0, 1)), rtol=4 * eps, atol=32 * eps)


@given(st.integers(1, 9), st.integers(1, 50), st.integers(1, 40), SEEDS)
@EXAMPLES
def test_dynamic_products_are_exact_sums(m: int, k: int, n: int, seed: int) -> None:
    g = generator(seed)
    x = torch.randn(m, k, generator=g) * torch.tensor([0.0, 1e-3, 1.0, 1e4])[torch.randint(0, 4, (m, 1), generator=g)]
    kind = QuantizedType((n, k), 8, k, True, "f32", "bytes")
    made = quantize(torch.randn(n, k, generator=g), kind)
    rows, scales = torch.ops.plait.quantize_rows(x)
    assert bool(((rows.double() * scales.double() - x.double()).abs() <= scales.double() * (0.5 + 1e-4)).all())
    assert bool((rows[x.abs().amax(-1) == 0] == 0).all()) and rows.abs().max() <= 127
    got = torch.ops.plait.dynamic_linear(x, made.codes, made.scales, None)
    exact = (rows.double() @ made.codes.double().t()) * scales.double() * made.scales.double().flatten()
    assert torch.allclose(got.double(), exact, rtol=1e-6, atol=0)


def test_gradients_of_dynamic_products_go_straight_through() -> None:
    _, made = example("i8g64:bytes[40,64]")
    for form in ("matrix", "stack", "vector", "permuted"):
        x = inputs(64)[form].requires_grad_()
        bias = torch.zeros(40, requires_grad=True)
        y = torch.ops.plait.dynamic_linear(x, made.codes, made.scales, bias)
        seed = torch.randn(y.shape, generator=generator(4))
        y.backward(seed)
        assert x.grad is not None and bias.grad is not None
        assert torch.allclose(x.grad, seed @ made.dequantize(), atol=1e-5)
        assert torch.allclose(bias.grad, seed.reshape(-1, 40).sum(0), atol=1e-5)


def test_gradients_of_rounding_go_straight_through() -> None:
    weight, made = example("u4g32[48,64]")
    weight.requires_grad_()
    y = torch.ops.plait.fake_quantize(weight, "u4g32[48,64]")
    assert torch.equal(y, made.dequantize())
    seed = torch.randn(48, 64, generator=generator(5))
    y.backward(seed)
    assert weight.grad is not None and torch.equal(weight.grad, seed)
    assert not any(part.requires_grad for part in torch.ops.plait.quantize(weight, "u4g32[48,64]"))
